// A table whose rows can be chosen with the pointer or the keyboard, and sorted by a column's heading.
function render({ model, el }) {
  const frame = document.createElement("div");
  frame.className = "abdlab-rows";
  el.append(frame);
  let sorted = [null, 1];

  const toggle = (id) => {
    const most = model.get("most");
    const before = model.get("chosen").filter((other) => other !== id);
    const chosen = before.length < model.get("chosen").length ? before : [...before, id].slice(most ? -most : 0);
    model.set("chosen", chosen);
    model.save_changes();
  };
  const draw = () => {
    const active = frame.contains(document.activeElement) ? document.activeElement.dataset : {};
    const focused = "id" in active ? ["id", active.id] : "column" in active ? ["column", active.column] : null;
    const table = document.createElement("table");
    table.setAttribute("role", "grid");
    table.setAttribute("aria-multiselectable", "true");
    table.setAttribute("aria-label", "choose rows with Enter");
    const head = table.createTHead().insertRow();
    const columns = model.get("columns");
    columns.forEach((name, i) => {
      const cell = document.createElement("th");
      const button = document.createElement("button");
      button.textContent = name + (sorted[0] === i ? (sorted[1] > 0 ? " ▲" : " ▼") : "");
      button.title = `sort by ${name}`;
      button.dataset.column = name;
      button.addEventListener("click", () => {
        sorted = [i, sorted[0] === i ? -sorted[1] : 1];
        draw();
      });
      if (sorted[0] === i) cell.setAttribute("aria-sort", sorted[1] > 0 ? "ascending" : "descending");
      cell.append(button);
      head.append(cell);
    });
    const body = table.createTBody();
    const rows = [...model.get("rows")];
    if (sorted[0] !== null) {
      const value = (row) => row.cells[sorted[0]];
      const number = (text) => (text === "" || isNaN(Number(text)) ? null : Number(text));
      rows.sort((a, b) => {
        const [x, y] = [number(value(a)), number(value(b))];
        if (x !== null && y !== null) return sorted[1] * (x - y);
        if ((x === null) !== (y === null)) return x === null ? 1 : -1;
        return sorted[1] * value(a).localeCompare(value(b));
      });
    }
    for (const row of rows) {
      const line = body.insertRow();
      const on = model.get("chosen").includes(row.id);
      line.dataset.id = row.id;
      line.tabIndex = 0;
      line.setAttribute("aria-selected", on);
      line.className = on ? "abdlab-chosen" : "";
      row.cells.forEach((text, i) => {
        const cell = line.insertCell();
        if (i === 0 && row.color) {
          const dot = document.createElement("span");
          dot.className = "abdlab-dot";
          dot.style.background = row.color;
          cell.append(dot);
        }
        cell.append(text);
        cell.title = text;
      });
      line.addEventListener("click", () => toggle(row.id));
      line.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          event.stopPropagation();
          toggle(row.id);
        } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
          event.preventDefault();
          event.stopPropagation();
          const next = event.key === "ArrowDown" ? line.nextElementSibling : line.previousElementSibling;
          if (next) next.focus();
        }
      });
    }
    const [left, top] = [frame.scrollLeft, frame.scrollTop];
    frame.replaceChildren(table);
    if (focused) frame.querySelector(`[data-${focused[0]}="${CSS.escape(focused[1])}"]`)?.focus({ preventScroll: true });
    frame.scrollTo(left, top);
  };

  for (const name of ["rows", "columns", "chosen"]) model.on(`change:${name}`, draw);
  draw();
  return () => {
    for (const name of ["rows", "columns", "chosen"]) model.off(`change:${name}`, draw);
  };
}

export default { render };
