// A number with a slider and a box to type it into; what is typed is kept as it is, or refused in words.
const DIGITS = 2;

function shown(value) {
  return value === null || value === undefined ? "none" : String(Number(Number(value).toPrecision(7)));
}

function render({ model, el }) {
  const frame = document.createElement("div");
  frame.className = "abdlab-dial";
  const label = document.createElement("label");
  const slider = document.createElement("input");
  slider.type = "range";
  const box = document.createElement("input");
  box.type = "text";
  // arrow keys and letters are the dial's here, and not JupyterLab's shortcuts
  for (const input of [slider, box]) input.setAttribute("data-lm-suppress-shortcuts", "true");
  box.spellcheck = false;
  box.id = `abdlab-dial-${Math.random().toString(36).slice(2)}`;
  label.htmlFor = box.id;
  const wrong = document.createElement("div");
  wrong.className = "abdlab-dialwrong";
  wrong.setAttribute("role", "alert");
  frame.append(label, slider, box, wrong);
  el.append(frame);

  const log = () => model.get("log");
  const place = (value) => (log() ? (value > 0 ? Math.log10(value) : Math.log10(model.get("low"))) : value);
  const complain = (text) => {
    wrong.textContent = text;
    box.setAttribute("aria-invalid", Boolean(text));
  };
  const draw = () => {
    label.textContent = model.get("label");
    frame.title = model.get("tooltip") || "";
    const low = model.get("low");
    const high = model.get("high");
    slider.min = place(low);
    slider.max = place(high);
    slider.step = log() ? 0.05 : model.get("step");
    const value = model.get("value");
    slider.value = value === null ? slider.min : place(value);
    slider.setAttribute("aria-label", model.get("description"));
    slider.setAttribute("aria-valuetext", shown(value));
    box.setAttribute("aria-label", `${model.get("description")}, typed`);
    if (document.activeElement !== box || box.dataset.typing !== "yes") box.value = shown(value);
    slider.disabled = box.disabled = model.get("disabled");
    frame.classList.toggle("abdlab-off", model.get("disabled"));
  };
  const send = (value) => {
    complain("");
    model.set("value", value);
    model.save_changes();
  };
  const slid = () => {
    let value = Number(slider.value);
    if (log()) value = Number((10 ** value).toPrecision(DIGITS));
    if (model.get("whole")) value = Math.round(value);
    return value;
  };
  slider.addEventListener("input", () => {
    box.value = shown(slid());
    if (model.get("continuous")) send(slid());
  });
  slider.addEventListener("change", () => send(slid()));
  const typed = () => {
    if (box.dataset.typing !== "yes") return;
    box.dataset.typing = "";
    const text = box.value.trim().replace(/^(-?)\./, "$10.");
    if (model.get("optional") && (text === "" || text.toLowerCase() === "none")) return send(null);
    const value = Number(text);
    const stays = `; it stays ${shown(model.get("value"))}`;
    if (text === "" || !Number.isFinite(value)) complain(`"${box.value}" is no number${stays}`);
    else if (model.get("whole") && !Number.isInteger(value)) complain(`${text} is no whole number${stays}`);
    else if (model.get("bounded") && (value < model.get("low") || value > model.get("high")))
      complain(`from ${shown(model.get("low"))} to ${shown(model.get("high"))}, not ${text}${stays}`);
    else send(value);
    draw();
  };
  box.addEventListener("input", () => (box.dataset.typing = "yes"));
  box.addEventListener("blur", typed);
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter") typed();
    if (event.key === "Escape") {
      box.dataset.typing = "";
      draw();
    }
  });
  const heard = ["value", "low", "high", "disabled", "label", "tooltip"];
  for (const name of heard) model.on(`change:${name}`, draw);
  draw();
  return () => {
    for (const name of heard) model.off(`change:${name}`, draw);
  };
}

export default { render };
