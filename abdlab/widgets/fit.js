// Lets plotly's figure beside it be as wide as the card that both are in: plotly itself listens to the window only.
function render({ model, el }) {
  el.style.height = "0px";
  let fitted = null;
  const fit = () => {
    const card = el.parentElement;
    const plot = card && card.querySelector(".js-plotly-plot");
    if (!plot || !card.clientWidth) return;
    const now = `${plot.clientWidth} ${plot.querySelectorAll(".main-svg").length}`;
    if (now === fitted) return;
    fitted = now;
    window.dispatchEvent(new Event("resize"));
  };
  const watch = new ResizeObserver(fit);
  const begin = requestAnimationFrame(() => el.parentElement && watch.observe(el.parentElement));
  watch.observe(el);
  return () => {
    cancelAnimationFrame(begin);
    watch.disconnect();
  };
}

export default { render };
