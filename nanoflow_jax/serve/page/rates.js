// Turns the server's totals, which only grow, into rates; and keeps the last two minutes.

export const WINDOW_S = 120;
const LONGEST_STEP_S = 5; // Beyond it the page slept, and a mean over the time would mislead.

const TOTALS = [
  "prompt_tokens",
  "generation_tokens",
  "steps",
  "step_decode_tokens",
  "step_prefill_tokens",
  "preemptions",
];

/** History of the engine as points {at, in, out, decode, prefill, running, waiting, pages}. */
export class History {
  constructor() {
    this.points = [];
    this._last = null;
  }

  /**
   * Adds the stats of one poll.
   *
   * @param stats what /page/stats answered
   * @param at seconds on the page's clock
   * @returns the new point; rates are null where no difference can be taken
   */
  add(stats, at) {
    const last = this._last;
    this._last = stats;
    const point = {
      at,
      running: stats.running,
      waiting: stats.waiting,
      pages: stats.pages_used,
      in: null,
      out: null,
      decode: null,
      prefill: null,
      cpu: null,
    };
    const passed = last ? stats.now_s - last.now_s : 0;
    if (last && !restarted(last, stats) && passed > 0 && passed <= LONGEST_STEP_S) {
      const gained = (name) => stats.totals[name] - last.totals[name];
      const steps = gained("steps");
      point.in = gained("prompt_tokens") / passed;
      point.out = gained("generation_tokens") / passed;
      point.decode = steps ? gained("step_decode_tokens") / steps : 0;
      point.prefill = steps ? gained("step_prefill_tokens") / steps : 0;
      point.cpu = Object.fromEntries(
        Object.entries(stats.cpu_s ?? {}).map(([name, value]) => [
          name,
          Math.max(0, value - (last.cpu_s?.[name] ?? value)) / passed,
        ]),
      );
    } else if (this.points.length) {
      // The line is broken here: nothing is known of the time between.
      this.points.push({ at: (this.points.at(-1).at + at) / 2, gap: true });
    }
    this.points.push(point);
    while (this.points.length && this.points[0].at < at - WINDOW_S - LONGEST_STEP_S) {
      this.points.shift();
    }
    return point;
  }
}

/** Whether a new engine counts from zero again. */
export function restarted(last, stats) {
  return (
    stats.uptime_s < last.uptime_s || TOTALS.some((name) => stats.totals[name] < last.totals[name])
  );
}
