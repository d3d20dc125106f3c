// Brings the output that it is in to the top of the page, the first time that it is shown.
const SETTLED_MS = 400;

function render({ model, el }) {
  el.style.display = "none";
  if (model.get("done")) return;
  const timer = setTimeout(() => {
    el.closest(".jp-OutputArea-output")?.scrollIntoView({ block: "start" });
    model.set("done", true);
    model.save_changes();
  }, SETTLED_MS);
  return () => clearTimeout(timer);
}

export default { render };
