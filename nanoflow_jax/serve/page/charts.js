// Small charts in SVG, drawn at the size they are shown at. Colours come from the style sheet.

import { count, make, makeSvg, seconds, setText } from "./dom.js";

const HEIGHT = 150;
const TOP = 10;
const BOTTOM = 18;
const RIGHT = 6;

/** The least round number (1, 1.5, 2, ... 10, 15, ...) that is not below the value. */
export function niceTop(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

/** A chart of the last seconds: lines, or areas stacked on each other. */
export class TimeChart {
  /**
   * @param box element that holds it
   * @param series [{key, label, style}] in drawing order, for stacked ones from the bottom
   * @param options {stacked, windowS, least: smallest top of the axis, unit: for the figures}
   */
  constructor(box, series, options) {
    this._series = series;
    this._options = { stacked: false, least: 1, unit: "", ...options };
    this._points = [];
    this._limit = null;
    this._hover = null;
    this._svg = makeSvg("svg", { class: "plot", height: HEIGHT, role: "img" });
    this._values = new Map();
    const legend = make("ul", { class: "legend" });
    for (const { key, label, style } of series) {
      const value = make("b");
      this._values.set(key, value);
      legend.append(make("li", { class: style }, make("i"), `${label} `, value));
    }
    this._when = make("li", { class: "when" });
    legend.append(this._when);
    box.append(legend, this._svg);
    new ResizeObserver(() => this._draw()).observe(box);
    this._svg.addEventListener("pointermove", (event) => this._point(event.offsetX));
    this._svg.addEventListener("pointerdown", (event) => this._point(event.offsetX));
    this._svg.addEventListener("pointerleave", () => this._point(null));
  }

  /**
   * Shows points.
   *
   * @param points in order of time: {at, [key]: number or null}, or {at, gap: true}
   * @param now right end of the time axis, in seconds
   * @param limit a level to mark, such as a capacity: {value, label}
   */
  show(points, now, limit = null) {
    this._points = points;
    this._now = now;
    this._limit = limit;
    this._draw();
  }

  _point(x) {
    this._hover = x;
    this._draw();
  }

  _sum(point) {
    const values = this._series.map(({ key }) => point[key] ?? 0);
    return this._options.stacked ? values.reduce((a, b) => a + b, 0) : Math.max(...values);
  }

  _draw() {
    const width = this._svg.parentElement.clientWidth;
    if (width === 0 || this._now === undefined) return; // In the view that is not shown.
    const { windowS, least } = this._options;
    const shown = this._points.filter((point) => point.at >= this._now - windowS - 2);
    const known = shown.filter((point) => !point.gap);
    const most = Math.max(least, ...known.map((point) => this._sum(point)));
    const limit = this._limit?.value ?? 0;
    const top = most <= limit ? limit : niceTop(most); // A capacity is the top: so full looks full.
    const left = 8 + 6.4 * count(top).length;
    this._x = (at) => width - RIGHT - ((this._now - at) / windowS) * (width - left - RIGHT);
    this._y = (value) => TOP + (1 - value / top) * (HEIGHT - TOP - BOTTOM);
    this._svg.setAttribute("width", width);
    this._svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const clip = `clip-${this._svg.parentElement.id}`;
    const lines = makeSvg("g", { "clip-path": `url(#${clip})` }, ...this._shapes(shown));
    this._svg.replaceChildren(
      makeSvg("clipPath", { id: clip }, makeSvg("rect", { x: left, y: 0, width: width - left, height: HEIGHT })),
      ...this._axes(width, left, top),
      lines,
      ...this._limitLine(width, left),
    );
    this._read(known);
  }

  _axes(width, left, top) {
    const marks = [];
    for (const value of [0, top / 2, top]) {
      const y = Math.round(this._y(value)) + 0.5;
      marks.push(makeSvg("line", { class: "rule", x1: left, x2: width - RIGHT, y1: y, y2: y }));
      marks.push(makeSvg("text", { x: left - 5, y: y + 3.5, "text-anchor": "end" }, count(value)));
    }
    const { windowS } = this._options;
    for (const [part, anchor] of [[1, "start"], [0.5, "middle"], [0, "end"]]) {
      const text = part === 0 ? "now" : `−${windowS * part} s`;
      const x = this._x(this._now - windowS * part);
      marks.push(makeSvg("text", { x, y: HEIGHT - 4, "text-anchor": anchor }, text));
    }
    return marks;
  }

  _limitLine(width, left) {
    if (!this._limit) return [];
    const y = Math.round(this._y(this._limit.value)) + 0.5;
    return [
      makeSvg("line", { class: "limit", x1: left, x2: width - RIGHT, y1: y, y2: y }),
      makeSvg("text", { class: "limit-label", x: left + 6, y: y + 12 }, this._limit.label),
    ];
  }

  /** Paths of all series: one part for each stretch without a gap. */
  _shapes(points) {
    const shapes = [];
    for (const stretch of stretches(points, this._series.map(({ key }) => key))) {
      let base = stretch.map(() => 0);
      for (const { key, style } of this._series) {
        const tops = stretch.map((point, i) => point[key] + (this._options.stacked ? base[i] : 0));
        const corners = (values) =>
          stretch.map((point, i) => `${this._x(point.at).toFixed(1)},${this._y(values[i]).toFixed(1)}`);
        if (this._options.stacked) {
          const outline = [...corners(tops), ...corners(base).reverse()].join(" L");
          shapes.push(makeSvg("path", { class: `area ${style}`, d: `M${outline} Z` }));
          base = tops;
        }
        shapes.push(makeSvg("path", { class: `line ${style}`, d: `M${corners(tops).join(" L")}` }));
      }
    }
    return shapes;
  }

  /** Writes the figures of the moment pointed at, or of the last one. */
  _read(known) {
    let point = known.at(-1);
    if (this._hover !== null && point) {
      const distance = (p) => Math.abs(this._x(p.at) - this._hover);
      point = known.reduce((a, b) => (distance(b) < distance(a) ? b : a));
      const x = this._x(point.at);
      this._svg.append(makeSvg("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }));
    }
    const spoken = [];
    for (const { key, label } of this._series) {
      const text = point ? count(point[key]) : "–";
      setText(this._values.get(key), text);
      spoken.push(`${label} ${text}${this._options.unit}`);
    }
    const ago = point && this._hover !== null ? Math.round(this._now - point.at) : 0;
    setText(this._when, ago ? `${ago} s ago` : "");
    this._svg.setAttribute("aria-label", spoken.join(", "));
  }
}

/** Runs of points in which all keys are known. */
function stretches(points, keys) {
  const found = [[]];
  for (const point of points) {
    if (point.gap || keys.some((key) => typeof point[key] !== "number")) found.push([]);
    else found.at(-1).push(point);
  }
  return found.filter((stretch) => stretch.length > 1);
}

/** Percentiles on one logarithmic axis: a bar from p50 to p99 with a mark at p90. */
export function latencyBar(values, range) {
  const [low, high] = range;
  const x = (value) => {
    const part = Math.log(value / low) / Math.log(high / low);
    return (2 + 96 * Math.min(1, Math.max(0, part))).toFixed(2);
  };
  const bar = makeSvg("svg", { class: "range", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
  bar.append(makeSvg("line", { class: "rule", x1: 0, x2: 100, y1: 5, y2: 5 }));
  if (values.every((value) => value > 0)) {
    const [p50, p90, p99] = values.map(x);
    bar.append(
      makeSvg("line", { class: "far", x1: p50, x2: p99, y1: 5, y2: 5 }),
      makeSvg("line", { class: "near", x1: p50, x2: p90, y1: 5, y2: 5 }),
      ...[p50, p90, p99].map((at) => makeSvg("line", { class: "mark", x1: at, x2: at, y1: 1, y2: 9 })),
    );
  }
  return bar;
}

const MOST_OPERATIONS = 2000;
const LANE_HEIGHT = 26;

/**
 * Operations of a step as bars, one row a lane.
 *
 * @param operations [{name, start_us, duration_us, lane}]
 * @param width in pixels
 */
export function timeline(operations, width) {
  const shown = operations.slice(0, MOST_OPERATIONS);
  const lanes = [...new Set(shown.map((operation) => String(operation.lane)))];
  const names = [...new Set(shown.map((operation) => operation.name))];
  const start = Math.min(...shown.map((operation) => operation.start_us));
  const end = Math.max(...shown.map((operation) => operation.start_us + operation.duration_us));
  const left = 12 + 7 * Math.max(...lanes.map((lane) => lane.length));
  const scale = (width - left - RIGHT) / Math.max(end - start, 1e-9);
  const height = lanes.length * LANE_HEIGHT + 22;
  const svg = makeSvg("svg", { class: "timeline", width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  svg.setAttribute(
    "aria-label",
    `${shown.length} operations in ${lanes.length} lanes over ${seconds((end - start) / 1e6)}`,
  );
  lanes.forEach((lane, row) => {
    const y = row * LANE_HEIGHT;
    svg.append(
      makeSvg("text", { class: "lane", x: 0, y: y + 16 }, lane),
      makeSvg("line", { class: "rule", x1: left, x2: width - RIGHT, y1: y + LANE_HEIGHT - 1.5, y2: y + LANE_HEIGHT - 1.5 }),
    );
  });
  for (const operation of shown) {
    const x = left + (operation.start_us - start) * scale;
    const wide = Math.max(operation.duration_us * scale - 1, 1);
    const y = lanes.indexOf(String(operation.lane)) * LANE_HEIGHT;
    const bar = makeSvg(
      "g",
      { class: `operation tone-${names.indexOf(operation.name) % 6}` },
      makeSvg("title", {}, `${operation.name}: ${seconds(operation.duration_us / 1e6)}`),
      makeSvg("rect", { x, y: y + 2, width: wide, height: LANE_HEIGHT - 6, rx: 2 }),
    );
    if (operation.name.length * 6.4 + 8 < wide) {
      bar.append(makeSvg("text", { x: x + 5, y: y + 16 }, operation.name));
    }
    svg.append(bar);
  }
  for (const [part, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]]) {
    const x = left + (width - left - RIGHT) * part;
    const text = seconds(((end - start) * part) / 1e6);
    svg.append(makeSvg("text", { x, y: height - 5, "text-anchor": anchor }, part ? text : "0"));
  }
  return svg;
}
