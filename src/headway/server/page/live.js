// Listens to the server and shows what it says: the figures on top, the device, the curves.

import { Curves } from "./curves.js";
import { Device } from "./device.js";
import { $ } from "./past.js";
import { allowFilling } from "./playground.js";

const AGAIN_S = 15; // after which a reader that was turned away tries again

export let device = null;
export let facts = null; // what the engine resolved at its start

let curves = null;
let source = null;
let again = null; // the timer of the next try
let latest = null;

export function look() {
  device = new Device($("device"));
  curves = new Curves();
  $("hold").addEventListener("click", () => device.toggle());
  $("closer").addEventListener("click", () => device.zoom(1));
  $("wider").addEventListener("click", () => device.zoom(-1));
  document.addEventListener("visibilitychange", () => (document.hidden ? leave() : listen()));
  setInterval(() => document.hidden || everySecond(), 1000);
  if (!document.hidden) listen();
  ask();
}

/** The live stream, while somebody looks at the page: there are places for so many readers only. */
function listen() {
  leave();
  let isFirst = true;
  source = new EventSource("live");
  source.onmessage = ({ data }) => {
    if (data === "[DONE]") return comeAgain(1);
    latest = JSON.parse(data);
    if (latest.state) {
      device.hear(latest, isFirst);
      isFirst = false;
      figures(latest);
    }
  };
  source.onerror = () => {
    isFirst = true;
    if (source?.readyState !== EventSource.CLOSED) return ($("s-state").textContent = "unreachable");
    source = null; // turned away: there are too many, or it needs a key
    ask();
    comeAgain(AGAIN_S);
  };
}

function leave() {
  clearTimeout(again);
  source?.close();
  source = null;
}

function comeAgain(seconds) {
  leave();
  again = setTimeout(() => document.hidden || listen(), seconds * 1000);
}

function everySecond() {
  if (source === null) return ask();
  if (facts === null) ask();
  if (latest) curves.sample(latest.beat, latest.classes);
}

/** The state as it is just now: facts that do not change, and figures where there is no place to listen. */
async function ask() {
  try {
    const state = await (await fetch("state", { signal: AbortSignal.timeout(5000) })).json();
    facts = state.facts;
    $("model").textContent = facts ? `${state.models[0]} · ${facts.dtype} · ${facts.device}` : state.models[0];
    allowFilling(state.fills_in_middle);
    if (source === null) {
      latest = state;
      figures(state);
      curves.sample(state.beat, state.classes);
    }
  } catch {
    $("s-state").textContent = "unreachable";
  }
}

function figures({ state, beat, classes }) {
  $("s-state").textContent = state;
  $("s-state").dataset.state = state;
  const judged = Object.entries(classes).map(([name, { met, missed }]) => `${name} ${met} of ${met + missed}`);
  $("classes").textContent = `In time since the server's start, of all callers, by class: ${judged.join(" · ")}`;
  $("classes").hidden = judged.length === 0;
  if (!beat) return;
  const { num_running, num_waiting, num_parked, pages } = beat;
  const total = Object.values(pages).reduce((sum, count) => sum + count, 0);
  const used = pages.held + pages.parked;
  $("s-running").textContent = num_running;
  $("s-waiting").textContent = num_waiting;
  $("s-parked").textContent = num_parked;
  $("s-pages").textContent = `${used.toLocaleString("en")} in use, ${pages.cached.toLocaleString("en")} cached of ${total.toLocaleString("en")}`;
  $("s-bar").setAttribute("aria-label", $("s-pages").textContent);
  $("s-bar").title = $("s-pages").textContent;
  $("s-held").style.width = `${(100 * used) / total}%`;
  $("s-cached").style.width = `${(100 * pages.cached) / total}%`;
}
