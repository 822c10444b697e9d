// Three small curves of the last two minutes, drawn by uPlot: who was in time, the queue, the pages.

import { $ } from "./past.js";

const SECONDS = 120;
const WINDOW_S = 60; // over which attainment is counted
const DASHES = [[], [5, 4], [2, 3]]; // told apart without colours, and seen where they lie upon each other
const BORDERS = ["solid", "dashed", "dotted"]; // the same in a legend
const AGES = Array.from({ length: SECONDS }, (_, place) => place - SECONDS + 1);

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export class Curves {
  constructor() {
    this.samples = []; // one a second, the newest last
    this.charts = {};
    this.names = "";
    this.queue = this.chart("queue", [["waiting", "--c1"], ["parked", "--c2"], ["running", "--quiet"]], {});
    this.pages = this.chart("pages", [["held", "--c0"], ["parked", "--c2"], ["cached", "--plain"]], {});
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
    new ResizeObserver(() => this.fit()).observe(document.querySelector(".curves"));
  }

  chart(id, series, y) {
    const axis = { stroke: () => colour("--quiet"), grid: { stroke: () => colour("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const options = {
      width: Math.max(120, $(id).clientWidth),
      height: 110,
      padding: [8, 16, 0, 0],
      cursor: { show: false },
      legend: { live: false, markers: { dash: (chart, place) => BORDERS[(place - 1) % BORDERS.length] } },
      scales: { x: { time: false, range: [1 - SECONDS, 0] }, y: { range: (chart, low, high) => [0, y.most ?? Math.max(4, (high ?? 0) * 1.1)] } },
      axes: [
        { ...axis, size: 22, splits: () => [-90, -60, -30, 0], values: (chart, ages) => ages.map((age) => (age ? `−${-age} s` : "now")) },
        { ...axis, size: 46, space: 26, values: (chart, values) => values.map((value) => (value >= 1000 ? `${value / 1000}k` : `${value}${y.unit ?? ""}`)), incrs: y.incrs },
      ],
      series: [
        { label: "age" },
        ...series.map(([label, name], place) => ({ label, stroke: () => colour(name), dash: DASHES[place % DASHES.length], width: 1.75, points: { show: false } })),
      ],
    };
    this.charts[id]?.destroy();
    $(id).replaceChildren();
    this.charts[id] = new uPlot(options, [AGES, ...series.map(() => AGES.map(() => null))], $(id));
    return this.charts[id];
  }

  /** Once a second. */
  sample(beat, classes) {
    const judged = Object.fromEntries(Object.entries(classes).map(([name, { met, missed }]) => [name, { met, missed }]));
    this.samples.push({ beat, judged });
    this.samples = this.samples.slice(-(SECONDS + WINDOW_S));
    this.redraw();
  }

  redraw() {
    if (!this.samples.length || !this.samples.at(-1).beat) return;
    const shown = this.samples.slice(-SECONDS);
    const filled = (pick) => [...Array(SECONDS - shown.length).fill(null), ...shown.map(pick)];
    const of = (pick) => filled((sample) => (sample.beat ? pick(sample.beat) : null));
    this.queue.setData([AGES, of((beat) => beat.num_waiting), of((beat) => beat.num_parked), of((beat) => beat.num_running)]);
    this.pages.setData([AGES, of((beat) => beat.pages.held), of((beat) => beat.pages.parked), of((beat) => beat.pages.cached)]);
    const names = Object.keys(this.samples.at(-1).judged);
    if (names.join() !== this.names || !this.charts.attained) {
      this.names = names.join();
      const series = names.map((name, place) => [name, `--c${place % 6}`]);
      this.chart("attained", series.length ? series : [["nobody with a target yet", "--quiet"]], { most: 105, unit: " %", incrs: [50] });
    }
    const late = this.samples.length - shown.length;
    const share = (name) => filled((sample) => this.share(name, late + shown.indexOf(sample)));
    this.charts.attained.setData([AGES, ...(names.length ? names.map(share) : [AGES.map(() => null)])]);
  }

  /** Of those judged in the window before sample `place`, how many in a hundred were in time; null if nobody was. */
  share(name, place) {
    const none = { met: 0, missed: 0 };
    const now = this.samples[place].judged[name] ?? none;
    const before = this.samples[Math.max(0, place - WINDOW_S)].judged[name] ?? none;
    const met = now.met - before.met;
    const all = met + now.missed - before.missed;
    return all > 0 ? (100 * met) / all : null;
  }

  fit() {
    for (const [id, chart] of Object.entries(this.charts)) chart.setSize({ width: Math.max(120, $(id).clientWidth), height: 110 });
  }
}
