// The device as a moving timeline on a canvas: one lane for the step that has it, one below for those that are suspended.
// Knows what the server tells of steps and how to draw them; where it comes from is live.js's part.

import { $, measured, mine } from "./past.js";

const LAG_S = 0.6; // behind the server, so that what is drawn has been heard
const KEPT_S = 180;
const MOST = 8000;
const WIDTHS = [0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60];
const ROWS = 3; // of suspended steps

export class Device {
  constructor(canvas) {
    this.canvas = canvas;
    this.stretches = [];
    this.parks = []; // {stretch, from, to, row}; `to` is null while it is suspended
    this.running = []; // what has a lane, its end not known
    this.width = 8; // seconds
    this.end = null; // the right edge when held, on the server's clock
    this.zero = null; // from where the axis counts; null: the second of the minute, on that clock
    this.offset = null; // the server's clock less ours
    this.numParked = 0;
    this.pointed = null;
    this.drawnAt = 0;
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    new ResizeObserver(() => this.fit()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.paint());
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => { this.pointed = null; });
    this.paint();
    requestAnimationFrame(() => this.frame());
  }

  // What is heard

  hear(news, isFirst) {
    const offset = news.now - performance.now() / 1000;
    this.offset = this.offset === null || isFirst ? offset : Math.max(this.offset, offset);
    const newest = isFirst && this.stretches.length ? this.stretches.at(-1).ended : -Infinity;
    for (const stretch of news.stretches) if (stretch.ended > newest) this.add(stretch);
    this.running = news.running;
    for (const stretch of this.running) this.unpark(stretch);
    this.numParked = news.beat?.num_parked ?? 0;
    const oldest = news.now - KEPT_S;
    if (this.stretches.length > MOST || this.stretches[0]?.ended < oldest - 20) {
      this.stretches = this.stretches.filter((stretch) => stretch.ended > oldest).slice(-MOST);
      this.parks = this.parks.filter((park) => park.to === null || park.to > oldest);
    }
    if (!this.pointed) this.say();
  }

  add(stretch) {
    this.unpark(stretch);
    this.stretches.push(stretch);
    if (stretch.ending !== "suspended") return;
    const taken = new Set(this.parks.filter((park) => park.to === null).map((park) => park.row));
    let row = 0;
    while (taken.has(row) && row < ROWS - 1) row += 1;
    this.parks.push({ stretch, from: stretch.ended, to: null, row });
  }

  unpark(stretch) {
    const park = this.parks.findLast((one) => one.to === null && one.stretch.step === stretch.step);
    if (park) park.to = stretch.begun;
  }

  /** The stretches in which the prompt of this request was read. */
  piecesOf(serial) {
    const isIts = (stretch) => stretch.kind !== "decode" && stretch.of.some((label) => label.serial === serial);
    return this.stretches.filter(isIts);
  }

  // What is looked at

  now() {
    const now = performance.now() / 1000 + (this.offset ?? 0) - LAG_S;
    return this.calm.matches ? Math.floor(now) : now;
  }

  edges() {
    const end = this.end ?? this.now();
    return [end - this.width, end];
  }

  hold(end = this.now()) {
    this.end = end;
    this.changed();
  }

  follow() {
    this.end = this.zero = null;
    if (!WIDTHS.includes(this.width)) this.width = 8;
    this.changed();
  }

  toggle() {
    if (this.end === null) this.hold();
    else this.follow();
  }

  zoom(direction) {
    const wider = WIDTHS.find((width) => width > this.width * 1.01) ?? this.width;
    const closer = WIDTHS.findLast((width) => width < this.width * 0.99) ?? this.width;
    const width = direction > 0 ? closer : wider;
    if (this.end !== null) this.end += (width - this.width) / 2;
    this.width = width;
    this.changed();
  }

  /** Hold what was from `begun` to `ended`, with a little before and after. */
  show(begun, ended) {
    const margin = (ended - begun) * 0.05 + 0.01;
    this.zero = begun;
    this.width = ended - begun + 2 * margin;
    this.hold(ended + margin);
  }

  changed() {
    $("hold").setAttribute("aria-pressed", this.end !== null);
    $("hold").textContent = this.end === null ? "Hold" : "Follow";
    $("width").textContent = this.width < 1 ? `${Math.round(this.width * 1000)} ms` : `${Number(this.width.toFixed(1))} s`;
    this.draw();
  }

  key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1 };
    if (event.key in steps) this.hold((this.end ?? this.now()) + (steps[event.key] * this.width) / 8);
    else if (event.key === "+" || event.key === "=") this.zoom(1);
    else if (event.key === "-") this.zoom(-1);
    else if (event.key === " ") this.toggle();
    else if (event.key === "End") this.follow();
    else return;
    event.preventDefault();
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const [from] = this.edges();
    const at = from + ((event.clientX - box.left) / box.width) * this.width;
    const near = (3 / box.width) * this.width;
    this.pointed = this.stretches.findLast((one) => one.begun - near <= at && at <= one.ended + near) ?? null;
    this.say();
  }

  say() {
    const one = this.pointed ?? this.running[0];
    $("device-says").textContent = one ? words(one) : this.stretches.length ? "The device is idle." : "Nothing has run yet.";
  }

  // Drawing

  paint() {
    const style = getComputedStyle(this.canvas);
    const colour = (name) => style.getPropertyValue(name).trim();
    this.ink = Object.fromEntries(["ink", "quiet", "line", "ground", "plain", "bad", "on"].map((name) => [name, colour(`--${name}`)]));
    this.hues = [0, 1, 2, 3, 4, 5].map((number) => colour(`--c${number}`));
    this.font = `600 12px ${style.fontFamily}`;
    this.draw();
  }

  fit() {
    const ratio = devicePixelRatio || 1;
    this.canvas.width = Math.round(this.canvas.clientWidth * ratio);
    this.canvas.height = Math.round(this.canvas.clientHeight * ratio);
    this.draw();
  }

  frame() {
    requestAnimationFrame(() => this.frame());
    const pace = this.calm.matches ? 1000 : this.running.length || this.stretches.at(-1)?.ended > this.edges()[0] ? 33 : 500;
    if (this.end === null && performance.now() - this.drawnAt >= pace) this.draw();
  }

  draw() {
    const { canvas } = this;
    const ratio = devicePixelRatio || 1;
    const [width, height] = [canvas.width / ratio, canvas.height / ratio];
    if (!width || !this.ink) return;
    this.drawnAt = performance.now();
    const pen = canvas.getContext("2d");
    const [from, to] = this.edges();
    const x = (at) => ((at - from) / this.width) * width;
    const lanes = { top: 20, high: 46, parked: 74, row: 16 };
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    this.drawAxis(pen, x, from, to, width, height);
    const counts = { stretches: 0, suspended: 0, resumed: 0, parked: 0 };
    for (const park of this.parks) {
      const until = park.to ?? (this.numParked ? to : park.from);
      if (until < from || park.from > to) continue;
      this.drawPark(pen, x(park.from), x(Math.min(until, to)), lanes.parked + park.row * (lanes.row + 3), lanes, park.stretch);
      counts.parked += 1;
    }
    const shown = this.stretches.filter((one) => one.ended >= from && one.begun <= to);
    for (const one of this.running) if (one.begun < to) shown.push({ ...one, ended: Math.max(to, one.begun) });
    const isBeside = (one) => one.lane === "tokens"; // on a share of the device: drawn over what runs on the other
    for (const one of [...shown.filter((one) => !isBeside(one)), ...shown.filter(isBeside)]) this.drawStretch(pen, x, one, lanes, counts);
    Object.assign(canvas.dataset, counts);
  }

  drawAxis(pen, x, from, to, width, height) {
    const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20].find((size) => (size / this.width) * width > 70) ?? 30;
    pen.font = this.font.replace("600 12px", "11px");
    pen.fillStyle = this.ink.quiet;
    pen.strokeStyle = this.ink.line;
    pen.textAlign = "left";
    const zero = this.zero ?? 0;
    const decimals = step < 0.1 ? 2 : step < 1 ? 1 : 0;
    for (let tick = Math.ceil((from - zero) / step); zero + tick * step <= to; tick += 1) {
      const at = Math.round(x(zero + tick * step)) + 0.5;
      pen.beginPath();
      pen.moveTo(at, 4);
      pen.lineTo(at, height);
      pen.stroke();
      const mark = tick * step;
      const text = this.zero === null ? `${(mark % 60).toFixed(decimals)} s` : `${(Math.round(mark * 1000) || 0).toLocaleString("en")} ms`;
      if (at < width - 44) pen.fillText(text, at + 4, 13);
    }
    pen.fillText("suspended", 5, height - 6);
  }

  hue(one) {
    if (one.kind === "decode") return this.ink.plain;
    return this.hues[(one.of[0]?.serial ?? one.step) % this.hues.length];
  }

  drawStretch(pen, x, one, { top, high }, counts) {
    const left = x(one.begun);
    const wide = Math.max(1.5, x(one.ended) - left);
    const isToken = one.kind === "decode";
    const isBeside = one.lane === "tokens";
    const y = isBeside ? top + high - 6 : isToken ? top + 10 : top;
    const tall = isBeside ? 6 : isToken ? high - 20 : high;
    if (isBeside) {
      pen.fillStyle = this.ink.ground; // between it and what it is drawn over
      pen.fillRect(left, y - 1, wide, 1);
    }
    pen.fillStyle = this.hue(one);
    pen.fillRect(left, y, wide, tall);
    counts.stretches += 1;
    if (one.ending === "failed" || one.ending === "left") {
      pen.fillStyle = this.ink.bad;
      pen.fillRect(left + wide - 2, y, 2, tall);
    }
    if (one.ending === "suspended") {
      counts.suspended += 1;
      pen.fillStyle = this.ink.ink;
      pen.fillRect(left + wide - 1, top - 3, this.width > 2 ? 1 : 2, high + 11);
    }
    if (one.resumed && one.begun < one.ended) {
      counts.resumed += 1;
      pen.fillStyle = this.ink.ink;
      pen.fillRect(left - 1, top - 3, this.width > 2 ? 1 : 2, high + 11);
    }
    if (isToken || wide < 26) return;
    pen.save();
    pen.beginPath();
    pen.rect(left, y, wide - 4, tall);
    pen.clip();
    pen.font = this.font;
    pen.fillStyle = this.ink.on;
    const inner = Math.max(left, 0) + 6;
    const room = Math.min(left + wide - 4, this.canvas.clientWidth) - inner;
    const line = (words, below) => words.some((text) => pen.measureText(text).width <= room && (pen.fillText(text, inner, y + below), true));
    line([name(one), `#${one.of[0]?.serial ?? ""}`], 19);
    pen.font = this.font.replace("600 12px", "11px");
    const tokens = `${one.tokens.toLocaleString("en")} tokens`;
    line([...(one.resumed ? [`${tokens}, going on`, "going on"] : []), tokens], 35);
    pen.restore();
  }

  drawPark(pen, left, right, y, { row }, one) {
    const wide = Math.max(2, right - left);
    pen.save();
    pen.beginPath();
    pen.rect(left, y, wide, row);
    pen.clip();
    pen.fillStyle = this.ink.ground;
    pen.fillRect(left, y, wide, row);
    pen.strokeStyle = this.hue(one);
    pen.lineWidth = 2.5;
    pen.beginPath();
    for (let at = Math.max(left, 0) - row - (Math.max(left, 0) % 8); at < Math.min(right, this.canvas.clientWidth); at += 8) {
      pen.moveTo(at, y + row);
      pen.lineTo(at + row, y);
    }
    pen.stroke();
    pen.strokeRect(left + 1, y + 1, wide - 2, row - 2);
    pen.restore();
  }
}

function name(one) {
  const [first, ...others] = one.of;
  if (!first) return one.requests > 1 ? `${one.requests} prompts` : "a prompt";
  const more = one.requests - 1 ? ` and ${one.requests - 1} more` : "";
  return `#${first.serial}${mine.has(first.serial) ? ", yours" : ""}${more}`;
}

function words(one) {
  const long = one.ending ? `, ${measured((one.ended - one.begun) * 1000)}` : ", now";
  const ending = { suspended: ", then suspended", failed: ", failed", left: ", given up" }[one.ending] ?? "";
  const begin = one.resumed ? "going on with" : "reading";
  if (one.kind === "decode") return `The next token of ${one.requests === 1 ? name(one).replace("a prompt", "one request") : `${one.requests} requests`}${long}${ending}.`;
  const classes = [...new Set(one.of.map((label) => label.slo_class))].join(", ");
  const what = one.kind === "mixed" ? "prompts and next tokens of" : "the prompt of";
  const text = `${begin} ${what} ${name(one)}: ${one.tokens.toLocaleString("en")} tokens${classes ? `, class ${classes}` : ""}${long}${ending}.`;
  return text[0].toUpperCase() + text.slice(1);
}
