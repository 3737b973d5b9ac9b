// Tables sort by a click on a column's head, and Escape closes an enlarged figure. The page works without.
for (const table of document.querySelectorAll("table.sortable")) {
  const row = table.tHead.rows[table.tHead.rows.length - 1];
  [...row.cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(table, row, head, column));
  });
}

function sort(table, heads, head, column) {
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of heads.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  for (const body of table.tBodies) {
    const rows = [...body.rows].filter((row) => !row.classList.contains("group"));
    rows.sort((a, b) => compare(a.cells[column], b.cells[column], up));
    body.append(...rows);
  }
}

// numbers stand in data-v; a cell without one is last in either direction
function compare(a, b, up) {
  const x = a.dataset.v, y = b.dataset.v;
  if (x !== undefined && y !== undefined) return up ? x - y : y - x;
  if (x !== undefined || y !== undefined) return x === undefined ? 1 : -1;
  const order = a.textContent.localeCompare(b.textContent, undefined, { numeric: true });
  return up ? order : -order;
}

document.addEventListener("keydown", (event) => {
  const open = document.querySelector("figure:target");
  if (open && event.key === "Escape") location.hash = open.querySelector(".close").hash;
});
