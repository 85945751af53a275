// Elements and figures. Text goes in as text: nothing on this page parses HTML.

const SVG = "http://www.w3.org/2000/svg";
const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const byId = (id) => document.getElementById(id);

/** An element with attributes and children; strings become text nodes. */
export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function makeSvg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(name, String(value));
    }
  }
  element.append(...children);
  return element;
}

/** Sets text only where it differs, so that a selection on the page survives. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Fills a <dl> with [term, value, class] rows and keeps the elements between calls. */
export function fillList(list, rows) {
  while (list.children.length > rows.length) list.lastElementChild.remove();
  rows.forEach(([term, value, style = ""], i) => {
    let row = list.children[i];
    if (!row) {
      row = make("div", {}, make("dt"), make("dd"));
      list.append(row);
    }
    setText(row.children[0], term);
    setText(row.children[1], value);
    if (row.className !== style) row.className = style;
  });
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** 12345.6 as "12,346", 3.14159 as "3.1"; what is no number as a dash. */
export function count(value) {
  if (!isNumber(value)) return "–";
  if (Math.abs(value) >= 100 || Number.isInteger(value)) return grouped.format(value);
  return value.toFixed(1);
}

export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

/** A duration in seconds with the unit that suits it. */
export function seconds(value) {
  if (!isNumber(value)) return "–";
  if (value < 0.001) return `${Math.round(value * 1e6)} µs`;
  if (value < 0.01) return `${(value * 1e3).toFixed(1)} ms`;
  if (value < 1) return `${Math.round(value * 1e3)} ms`;
  if (value < 10) return `${value.toFixed(2)} s`;
  if (value < 60) return `${value.toFixed(1)} s`;
  return clock(value);
}

/** A long duration: "4 min 05 s", "2 h 13 min", "3 d 4 h". */
export function clock(value) {
  if (!isNumber(value)) return "–";
  const all = Math.floor(value);
  const pair = (size, big, small, smallSize, pad) => {
    const rest = Math.floor((all % size) / smallSize);
    return `${Math.floor(all / size)} ${big} ${String(rest).padStart(pad, "0")} ${small}`;
  };
  if (all < 60) return `${all} s`;
  if (all < 3600) return pair(60, "min", "s", 1, 2);
  if (all < 86400) return pair(3600, "h", "min", 60, 2);
  return pair(86400, "d", "h", 3600, 1);
}

export const percent = (part, whole) => (whole > 0 ? `${Math.round((100 * part) / whole)} %` : "–");
