// Tells the kernel when the last view of a widget is gone from the page. Draws nothing.
const views = new Map();

function count(model, by) {
  const key = model.get("key");
  const now = (views.get(key) ?? 0) + by;
  if (now) views.set(key, now);
  else views.delete(key);
  if (model.get("gone") !== !now) {
    model.set("gone", !now);
    model.save_changes();
  }
}

function render({ model, el }) {
  el.style.display = "none";
  count(model, 1);
  return () => count(model, -1);
}

export default { render };
