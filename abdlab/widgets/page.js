// The page that shows the widgets: which theme it has, and that it is still there.
const BEAT_MS = 4000;

function isDark() {
  const theme = document.body.dataset.jpThemeLight;
  return theme === undefined ? matchMedia("(prefers-color-scheme: dark)").matches : theme === "false";
}

function render({ model, el }) {
  el.style.display = "none";
  const look = () => {
    if (model.get("dark") !== isDark()) {
      model.set("dark", isDark());
      model.save_changes();
    }
  };
  const beat = () => {
    model.set("beat", Date.now());
    model.save_changes();
  };
  const watch = new MutationObserver(look);
  watch.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
  const timer = setInterval(beat, BEAT_MS);
  look();
  beat();
  return () => {
    watch.disconnect();
    clearInterval(timer);
  };
}

export default { render };
