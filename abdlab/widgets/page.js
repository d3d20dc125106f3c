// The page that shows the widgets: which theme it has, that it is still there, and names for its controls.
const BEAT_MS = 4000;

function isDark() {
  const theme = document.body.dataset.jpThemeLight;
  return theme === undefined ? matchMedia("(prefers-color-scheme: dark)").matches : theme === "false";
}

// what ipywidgets leaves without a name for a screen reader: the handles of its sliders, bars, lists without a label
function name() {
  const told = (widget) => {
    const label = widget.querySelector(":scope > .widget-label");
    return label?.textContent.trim() || widget.title || widget.querySelector("[title]")?.title || "";
  };
  const mark = (part, text) => {
    if (text && part.getAttribute("aria-label") !== text) part.setAttribute("aria-label", text);
  };
  for (const widget of document.querySelectorAll(".abdlab .widget-slider")) {
    const handles = [...widget.querySelectorAll(".noUi-handle")];
    const ends = handles.length > 1 ? [", from", ", to"] : [""];
    const read = widget.querySelector(".widget-readout")?.textContent.trim();
    handles.forEach((handle, i) => {
      mark(handle, told(widget) + ends[i]);
      if (handles.length === 1 && read) handle.setAttribute("aria-valuetext", read);
    });
    for (const readout of widget.querySelectorAll(".widget-readout[contenteditable=true]")) {
      readout.setAttribute("role", "textbox");
      mark(readout, `${told(widget)}, typed`);
    }
  }
  for (const widget of document.querySelectorAll(".abdlab .widget-progress")) {
    const bar = widget.querySelector(".progress");
    if (!bar) continue;
    bar.setAttribute("role", "progressbar");
    mark(bar, told(widget) || "progress");
    bar.setAttribute("aria-valuetext", bar.querySelector(".progress-bar")?.style.width || "");
  }
  for (const plot of document.querySelectorAll(".abdlab .js-plotly-plot")) {
    plot.setAttribute("role", "figure");
    mark(plot, "curves of the chosen runs; Save as CSV writes their values");
    for (const drawing of plot.querySelectorAll("svg")) drawing.setAttribute("aria-hidden", "true");
  }
  for (const widget of document.querySelectorAll(".abdlab .widget-select-multiple, .abdlab .widget-textarea")) {
    const part = widget.querySelector("select, textarea");
    if (part && !widget.querySelector(":scope > .widget-label")?.textContent.trim())
      mark(part, told(widget) || part.placeholder);
  }
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
    name();
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
