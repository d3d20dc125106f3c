// Brings the output that it is in to the top of the page when it is first shown. JupyterLab scrolls too while cells
// run, so it is done again until the page has settled, or its user scrolls or types.
const TIMES_MS = [300, 1000, 2500];
const AFTER_CLICK_MS = 50;

function render({ model, el }) {
  el.style.display = "none";
  if (model.get("done")) return;
  const lead = () => el.closest(".jp-OutputArea-output")?.scrollIntoView({ block: "start" });
  const timers = TIMES_MS.map((time) => setTimeout(lead, time));
  const off = () => {
    timers.forEach(clearTimeout);
    document.removeEventListener("wheel", stop, true);
    document.removeEventListener("keydown", stop, true);
    document.removeEventListener("click", clicked);
  };
  const stop = () => {
    off();
    model.set("done", true);
    model.save_changes();
  };
  // a first click in it comes before the last time: it must not move under the pointer later on
  const clicked = (event) => {
    if (!el.closest(".jp-OutputArea-output")?.contains(event.target)) return;
    stop();
    setTimeout(lead, AFTER_CLICK_MS);
  };
  document.addEventListener("wheel", stop, true);
  document.addEventListener("keydown", stop, true);
  document.addEventListener("click", clicked);
  timers.push(setTimeout(stop, TIMES_MS.at(-1) + 1));
  return off;
}

export default { render };
