// One PNG that can be clicked, brushed with the pointer, or walked with the arrow keys. Places are shares of the picture.
const CLICK_PX = 4;

function render({ model, el }) {
  const frame = document.createElement("div");
  frame.className = "abdlab-picture";
  const image = document.createElement("img");
  image.draggable = false;
  const band = document.createElement("div");
  band.className = "abdlab-band";
  frame.append(image, band);
  el.append(frame);
  let url = null;

  const draw = () => {
    const png = model.get("png");
    if (url) URL.revokeObjectURL(url);
    url = null;
    frame.hidden = !png || !png.byteLength;
    if (frame.hidden) return;
    url = URL.createObjectURL(new Blob([png], { type: "image/png" }));
    image.src = url;
    image.alt = model.get("alt");
    image.style.width = model.get("width") ? `${model.get("width")}px` : "";
  };
  const arm = () => {
    const picks = model.get("picks");
    frame.dataset.picks = picks;
    frame.tabIndex = picks === "click" ? 0 : -1;
    image.alt = model.get("alt");
    if (!picks) return;
    frame.setAttribute("role", "application");
    frame.setAttribute("aria-label", model.get("alt"));
  };
  const place = (event) => {
    const box = image.getBoundingClientRect();
    const share = (value, start, length) => Math.min(1, Math.max(0, (value - start) / length));
    return [share(event.clientX, box.left, box.width), share(event.clientY, box.top, box.height)];
  };
  const tell = (name, value) => {
    // the number makes two equal picks two changes
    model.set("picked", { kind: name, at: value, count: (model.get("picked").count || 0) + 1 });
    model.save_changes();
  };

  let from = null;
  let start = null;
  frame.addEventListener("pointerdown", (event) => {
    if (!model.get("picks") || event.button) return;
    from = place(event);
    start = event;
    frame.setPointerCapture(event.pointerId);
  });
  frame.addEventListener("pointermove", (event) => {
    if (!from || model.get("picks") !== "brush") return;
    const to = place(event);
    band.style.display = "block";
    band.style.left = `${100 * Math.min(from[0], to[0])}%`;
    band.style.width = `${100 * Math.abs(from[0] - to[0])}%`;
    band.style.top = `${100 * Math.min(from[1], to[1])}%`;
    band.style.height = `${100 * Math.abs(from[1] - to[1])}%`;
  });
  frame.addEventListener("pointerup", (event) => {
    if (!from) return;
    const to = place(event);
    const moved = Math.hypot(event.clientX - start.clientX, event.clientY - start.clientY);
    band.style.display = "none";
    if (model.get("picks") === "brush" && moved > CLICK_PX) {
      tell("brush", [Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.max(from[0], to[0]), Math.max(from[1], to[1])]);
    } else {
      tell("click", to);
    }
    from = null;
  });
  frame.addEventListener("pointercancel", () => {
    from = null;
    band.style.display = "none";
  });
  frame.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (model.get("picks") !== "click" || !(event.key in steps)) return;
    event.preventDefault();
    event.stopPropagation();
    tell("key", steps[event.key]);
  });

  model.on("change:png", draw);
  model.on("change:picks", arm);
  model.on("change:alt", arm);
  draw();
  arm();
  return () => {
    model.off("change:png", draw);
    model.off("change:picks", arm);
    model.off("change:alt", arm);
    if (url) URL.revokeObjectURL(url);
  };
}

export default { render };
