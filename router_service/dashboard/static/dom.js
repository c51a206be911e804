// Elements are made of text nodes only: whatever a memory or a source is called, it is text.

export const byId = (id) => document.getElementById(id);

export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

export function put(place, ...children) {
  (typeof place === "string" ? byId(place) : place).replaceChildren(...children);
}

// columns: [{title, of: row -> text or Node, number?: bool, words?: bool}]; the first column heads its row.
export function table(caption, columns, rows, { chosen = () => false, unread = () => false } = {}) {
  const kind = (column) => (column.number ? "number" : column.words ? "words" : undefined);
  const head = el("tr", {}, ...columns.map((c) => el("th", { scope: "col", class: kind(c) }, c.title)));
  const body = rows.map((row) => {
    const cells = columns.map((column, at) =>
      el(at ? "td" : "th", { scope: at ? undefined : "row", class: kind(column) }, column.of(row) ?? "–"));
    const classes = [chosen(row) && "chosen", unread(row) && "unread"].filter(Boolean).join(" ");
    return el("tr", { class: classes || undefined }, ...cells);
  });
  const made = el("table", {}, el("caption", {}, caption), el("thead", {}, head), el("tbody", {}, ...body));
  return el("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": caption }, made);
}

export function keepOpen(place, makeTable) {
  // The table beside a chart: filled when it is opened, and again with every change while it is open.
  let details = place.querySelector("details");
  if (!details) {
    details = el("details", {}, el("summary", {}, "As a table"), el("div"));
    details.addEventListener("toggle", () => details.refill());
    place.append(details);
  }
  details.refill = () => put(details.lastChild, ...(details.open ? [makeTable()] : []));
  if (details.open && !details.contains(document.activeElement)) details.refill();
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
export const count = (n) => whole.format(n);
export const percent = (share) => (share === null || Number.isNaN(share) ? "–" : `${(100 * share).toFixed(1)} %`);
export const fixed = (n, digits = 3) => (n === null || n === undefined ? "–" : n.toFixed(digits));
export const ms = (n) => (n === null ? "–" : n < 10 ? n.toFixed(2) : n.toFixed(0));
export const time = (unixMs) => new Date(unixMs).toLocaleTimeString();
export const date = (unixMs) => (unixMs ? new Date(unixMs).toLocaleString() : "–");

export function bytes(n) {
  if (n === null) return "unknown";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (n >= 1024 && at < units.length - 1) { n /= 1024; at += 1; }
  return `${at && n < 100 ? n.toFixed(1) : Math.round(n)} ${units[at]}`;
}
