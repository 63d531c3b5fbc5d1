// The document, changed only where it differs. Whatever comes from outside is text, never markup.

const SVG = "http://www.w3.org/2000/svg";

export const at = (id) => document.getElementById(id);

export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function hide(element, hidden) {
  if (element.hidden !== hidden) element.hidden = hidden;
}

/**
 * Fill a table with a row for each item, and keep the rows of items that were there: `keyOf(item)` tells which is which,
 * `cellsOf(item)` what its cells hold: {text, sub, narrow, title, kind, bar}, of which only `text` must be there.
 * `narrow` is a second line for narrow screens only, `bar` a share (0..1) drawn under the text.
 */
export function rows(table, items, keyOf, cellsOf, isKnown = true) {
  const body = table.tBodies[0];
  const heads = table.tHead.rows[0].cells;
  const kept = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  let before = null;
  for (const item of items) {
    const key = keyOf(item);
    const row = kept.get(key) ?? newRow(key, heads);
    kept.delete(key);
    const place = before ? before.nextSibling : body.firstChild;
    if (row !== place) body.insertBefore(row, place);
    cellsOf(item).forEach((cell, number) => fill(row.cells[number], cell));
    before = row;
  }
  for (const row of kept.values()) row.remove();
  hide(table, items.length === 0);
  hide(table.nextElementSibling, items.length > 0 || !isKnown);
}

function newRow(key, heads) {
  const row = document.createElement("tr");
  row.dataset.key = key;
  [...heads].forEach((head, number) => {
    const cell = document.createElement(number ? "td" : "th");
    if (!number) cell.scope = "row";
    cell.className = head.className;
    cell.append(part("text"), part("sub"), part("narrow"));
    row.append(cell);
  });
  return row;
}

function part(name) {
  const element = document.createElement("span");
  element.className = name;
  return element;
}

function fill(cell, { text, sub = "", narrow = "", title = "", kind = "", bar = null }) {
  const [main, second, third] = cell.children;
  say(main, text);
  say(second, sub);
  say(third, narrow);
  const shown = title || (sub ? `${text} (${sub})` : text);
  if (cell.title !== shown) cell.title = shown;
  if (main.dataset.kind !== kind) main.dataset.kind = kind;
  if (bar === null) return;
  let gauge = cell.children[3];
  if (!gauge) {
    gauge = part("gauge");
    gauge.setAttribute("aria-hidden", "true");
    gauge.append(document.createElement("i"));
    cell.append(gauge);
  }
  gauge.firstChild.style.inlineSize = `${Math.min(1, Math.max(0, bar)) * 100}%`;
}

/** Lines over the same steps, [{values, className}], from 0 up to the highest of them; null is a gap. */
export function sparkline(svg, lines, label) {
  const steps = lines[0].values.length;
  const highest = Math.max(0, ...lines.flatMap(({ values }) => values.filter((value) => value !== null)));
  svg.setAttribute("viewBox", `0 0 ${steps - 1} 40`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-label", label);
  lines.forEach(({ values, className }, number) => {
    const path = svg.children[number] ?? svg.appendChild(document.createElementNS(SVG, "path"));
    path.setAttribute("class", className);
    path.setAttribute("d", pathOf(values, highest));
  });
  return highest;
}

function pathOf(values, highest) {
  const height = (value) => (highest ? (38 - (value / highest) * 36).toFixed(2) : "38");
  let path = "";
  values.forEach((value, step) => {
    if (value === null) return;
    const starts = step === 0 || values[step - 1] === null;
    const ends = step === values.length - 1 || values[step + 1] === null;
    // A step between two gaps is a short line, or it would not be seen.
    path += starts ? `M${ends ? step - 0.3 : step} ${height(value)}` : `L${step} ${height(value)}`;
    if (starts && ends) path += `L${step + 0.3} ${height(value)}`;
  });
  return path;
}
