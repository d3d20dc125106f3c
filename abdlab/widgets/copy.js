// A text with a button that copies it.
function render({ model, el }) {
  const frame = document.createElement("div");
  frame.className = "abdlab-copy";
  const text = document.createElement("pre");
  text.className = "abdlab-code";
  text.tabIndex = 0;
  const button = document.createElement("button");
  button.className = "jupyter-button widget-button abdlab-copybutton";
  button.textContent = "Copy to the clipboard";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(model.get("text"));
      button.textContent = "Copied";
    } catch {
      // without a secure connection browsers refuse: the text is then selected, to be copied by hand
      getSelection().selectAllChildren(text);
      button.textContent = "Selected: press Ctrl+C";
    }
    setTimeout(() => (button.textContent = "Copy to the clipboard"), 2500);
  });
  frame.append(text, button);
  el.append(frame);
  const draw = () => {
    text.textContent = model.get("text");
    frame.hidden = !model.get("text");
  };
  model.on("change:text", draw);
  draw();
  return () => model.off("change:text", draw);
}

export default { render };
