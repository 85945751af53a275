// The live view: asks for /page/stats once a second and draws what came.

import { ApiError, getJson } from "./api.js";
import { latencyBar, TimeChart, timeline } from "./charts.js";
import { byId, clock, count, fillList, make, percent, seconds, setText } from "./dom.js";
import { History, WINDOW_S } from "./rates.js";

const EVERY_MS = 1000;
const AFTER_FAILURE_MS = 3000;

const SETTING_NAMES = {
  device: "Device",
  dtype: "Number format",
  num_pages: "Pages",
  page_size: "Tokens in a page",
  max_requests: "Most requests at once",
  dense_batch: "Dense batch",
  max_context_len: "Longest context",
};
const LATENCY_NAMES = {
  ttft_s: "Time to first token",
  tpot_s: "Per output token",
  e2e_s: "End to end",
};

export class Engine {
  /** @param hooks {onStats(stats), onLost(error)}: told of every answer, and of every failure */
  constructor(hooks) {
    this._hooks = hooks;
    this._history = new History();
    this._timer = null;
    this._asking = false;
    this._operations = "";
    this._charts = makeCharts();
    document.addEventListener("visibilitychange", () => this.pollNow());
    new ResizeObserver(() => this._drawOperations()).observe(byId("operations"));
  }

  /** Asks now, and from now on while the page is visible. */
  pollNow() {
    clearTimeout(this._timer);
    this._timer = null;
    if (!document.hidden && !this._asking) this._poll();
  }

  /** Draws again, after the view was hidden. */
  redraw() {
    if (this._stats) this._show(this._stats);
  }

  async _poll() {
    this._asking = true;
    let wait = EVERY_MS;
    const begun = performance.now();
    try {
      const stats = await getJson("page/stats");
      this._stats = stats;
      this._history.add(stats, performance.now() / 1000);
      this._problem("");
      this._show(stats);
      this._hooks.onStats(stats);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      // Each further question would make the browser ask for the key again.
      wait = error.status === 401 ? null : AFTER_FAILURE_MS;
      this._problem(error.message);
      this._hooks.onLost(error);
    } finally {
      this._asking = false;
      if (!document.hidden && wait !== null) {
        const left = Math.max(0, wait - (performance.now() - begun));
        this._timer = setTimeout(() => this._poll(), left);
      }
    }
  }

  _problem(text) {
    const box = byId("engine-problem");
    box.hidden = !text;
    setText(box, text && `No figures from the engine: ${text}`);
  }

  _show(stats) {
    if (byId("view-engine").hidden) return;
    const last = this._history.points.at(-1);
    fillList(byId("figures"), [
      ["Tokens/s out", count(last.out), "out"],
      ["Tokens/s in", count(last.in), "in"],
      ["Running", count(stats.running)],
      ["Waiting", count(stats.waiting), stats.waiting ? "busy" : ""],
      ["Pages used", percent(stats.pages_used, stats.pages_total)],
      ["Uptime", clock(stats.uptime_s)],
    ]);
    const { points } = this._history;
    const charts = this._charts;
    charts.tokens.show(points, last.at);
    charts.requests.show(points, last.at);
    const batch = stats.settings.dense_batch;
    const pages = stats.pages_total;
    charts.batch.show(points, last.at, capacity(batch, `dense batch ${count(batch)}`));
    charts.pages.show(points, last.at, capacity(pages, `all ${count(pages)} pages`));
    showLatency(stats.latency);
    fillList(byId("totals"), totalRows(stats, last));
    fillList(byId("settings"), settingRows(stats));
    this._drawOperations();
  }

  _drawOperations() {
    const operations = this._stats?.operations ?? [];
    byId("operations-card").hidden = operations.length === 0;
    if (operations.length === 0) return;
    const box = byId("operations");
    const width = Math.max(box.clientWidth, 640);
    const drawn = `${width} ${JSON.stringify(operations)}`;
    if (drawn === this._operations) return;
    this._operations = drawn;
    box.replaceChildren(timeline(operations, width));
  }
}

/** A level to mark; nothing while the engine has not said how large it is. */
const capacity = (value, label) => (value > 0 ? { value, label } : null);

function makeCharts() {
  const chart = (id, series, options) =>
    new TimeChart(byId(id), series, { windowS: WINDOW_S, ...options });
  return {
    tokens: chart(
      "chart-tokens",
      [
        { key: "in", label: "in", style: "in" },
        { key: "out", label: "out", style: "out" },
      ],
      { least: 10, unit: " tokens a second" },
    ),
    requests: chart(
      "chart-requests",
      [
        { key: "waiting", label: "waiting", style: "waiting" },
        { key: "running", label: "running", style: "running" },
      ],
      { least: 4 },
    ),
    batch: chart(
      "chart-batch",
      [
        { key: "decode", label: "decode", style: "out" },
        { key: "prefill", label: "prefill", style: "in" },
      ],
      { stacked: true, unit: " tokens a step" },
    ),
    pages: chart("chart-pages", [{ key: "pages", label: "used", style: "running" }], { stacked: true }),
  };
}

function showLatency(latency) {
  const box = byId("latency");
  const drawn = JSON.stringify(latency);
  if (box.dataset.drawn === drawn) return;
  box.dataset.drawn = drawn;
  const known = Object.keys(LATENCY_NAMES)
    .flatMap((name) => [latency[name]?.p50, latency[name]?.p99])
    .filter((value) => value > 0);
  const range = [Math.min(...known, 1) / 1.5, Math.max(...known, 0.01) * 1.5];
  const rows = Object.entries(LATENCY_NAMES).map(([name, title]) => {
    const found = latency[name] ?? {};
    const values = [found.p50, found.p90, found.p99];
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, title),
      ...values.map((value) => make("td", {}, seconds(value))),
      make("td", { class: "bar" }, latencyBar(values, range)),
      make("td", { class: "samples" }, count(found.count)),
    );
  });
  const head = ["", "p50", "p90", "p99"].map((text) =>
    text ? make("th", { scope: "col" }, text) : make("td"),
  );
  head.push(make("td", { class: "bar" }, "log scale"), make("th", { scope: "col", class: "samples" }, "requests"));
  box.replaceChildren(
    make("table", { class: "latency" }, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)),
  );
}

function totalRows(stats, last) {
  const { totals } = stats;
  const { requests } = totals;
  const rows = [
    ["Prompt tokens", count(totals.prompt_tokens)],
    ["Generated tokens", count(totals.generation_tokens)],
    ["Requests: came to a stop", count(requests.stop)],
    ["Requests: reached their length", count(requests.length)],
    ["Requests: aborted", count(requests.abort)],
    ["Requests: failed", count(requests.error), requests.error ? "bad" : ""],
    ["Steps", count(totals.steps)],
    ["Preemptions", count(totals.preemptions)],
    ["Late compiles", count(totals.late_compiles), totals.late_compiles ? "bad" : ""],
  ];
  for (const [name, used] of Object.entries(stats.cpu_s ?? {})) {
    const now = last.cpu?.[name];
    const share = typeof now === "number" ? `, now ${percent(now, 1)}` : "";
    rows.push([`CPU time: ${name === "front" ? "front end" : name}`, `${seconds(used)}${share}`]);
  }
  return rows;
}

function settingRows(stats) {
  const rows = [["Model", stats.model]];
  for (const [name, value] of Object.entries(stats.settings)) {
    const text = typeof value === "number" ? count(value) : String(value);
    rows.push([SETTING_NAMES[name] ?? name.replaceAll("_", " "), text]);
  }
  return rows;
}
