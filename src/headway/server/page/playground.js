// The playground: three ways to ask, the targets they are asked with, and keys for all of it.

import { $, milliseconds, send } from "./past.js";

// Sliders walk along these steps; null is "no target".
const SLIDERS = {
  ttft: { steps: [20, 50, 100, 150, 200, 300, 500, 750, 1000, 2000, 5000, null], at: 6, show: milliseconds },
  tpot: { steps: [5, 10, 20, 30, 40, 50, 75, 100, 150, 250, 500, null], at: 7, show: milliseconds },
  length: { steps: [16, 32, 64, 128, 256, 512, 1024], at: 2, show: (n) => `${n} tokens` },
  heat: { steps: [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5], at: 2, show: (t) => (t ? `${t}` : "0, greedy") },
};
const WORDS = { code: "Continue", chat: "Send", fill: "Fill in" };

export function preparePlayground() {
  for (const [name, slider] of Object.entries(SLIDERS)) {
    const input = $(name);
    Object.assign(input, { min: 0, max: slider.steps.length - 1, step: 1, value: slider.at });
    const show = () => {
      const words = slider.show(chosen(name));
      $(`${name}-out`).textContent = words;
      input.setAttribute("aria-valuetext", words);
    };
    input.addEventListener("input", show);
    show();
  }
  prepareTabs();
  $("keep").addEventListener("click", keep);
  $("clear").addEventListener("click", clear);
}

function chosen(name) {
  return SLIDERS[name].steps[$(name).value];
}

// One request at a time

let running = null; // its AbortController

async function ask(path, body, grow) {
  running = new AbortController();
  busy(true);
  $("error").hidden = true;
  const slo = {};
  if (chosen("ttft") !== null) slo.ttft_ms = chosen("ttft");
  if (chosen("tpot") !== null) slo.tpot_ms = chosen("tpot");
  const settings = { max_tokens: chosen("length"), temperature: chosen("heat"), slo };
  try {
    await send(path, { ...body, ...settings }, grow, running.signal);
  } catch (error) {
    if (error.name !== "AbortError") complain(error.message);
  } finally {
    running = null;
    busy(false);
  }
}

function complain(message) {
  $("error").textContent = message;
  $("error").hidden = false;
}

function busy(yes) {
  for (const [name, words] of Object.entries(WORDS)) {
    const key = document.createElement("kbd");
    key.textContent = yes ? "Esc" : "Ctrl ↵";
    $(`run-${name}`).replaceChildren(yes ? "Stop " : `${words} `, key);
  }
  document.querySelectorAll(".growing").forEach((node) => node.classList.toggle("growing", yes));
}

function span(kind, text = "") {
  const node = document.createElement("span");
  node.className = kind;
  node.textContent = text;
  return node;
}

function stayBelow(box) {
  box.scrollTop = box.scrollHeight;
}

// Continue a text

async function continueText() {
  const given = span("given", $("prompt").value);
  const fresh = span("new growing");
  $("answer").replaceChildren(given, fresh);
  $("keep").disabled = true;
  await ask("v1/completions", { prompt: given.textContent }, (text) => {
    fresh.append(text);
    stayBelow($("answer"));
  });
  fresh.classList.remove("growing");
  $("keep").disabled = !fresh.textContent;
}

function keep() {
  $("prompt").value = $("answer").textContent;
  $("prompt").focus();
}

// Fill in the middle

async function fillIn() {
  const prefix = $("before").value;
  const suffix = $("after").value;
  const fresh = span("new growing");
  $("filled").replaceChildren(span("given", prefix), fresh, span("given", suffix));
  await ask("v1/completions", { prompt: prefix, suffix }, (text) => fresh.append(text));
  fresh.classList.remove("growing");
}

// Chat

let talk = [];

async function say() {
  const content = $("say").value.trim();
  if (!content) return $("say").focus();
  $("say").value = "";
  const messages = talk; // another conversation may begin before the answer is there
  messages.push({ role: "user", content });
  const asked = bubble("user");
  asked.textContent = content;
  const node = bubble("assistant");
  node.classList.add("growing");
  await ask("v1/chat/completions", { messages }, (text) => {
    node.append(text);
    stayBelow($("talk"));
  });
  node.classList.remove("growing");
  if (node.textContent) {
    messages.push({ role: "assistant", content: node.textContent });
    return;
  }
  // An unanswered message goes back: many templates refuse two of the same role in a row.
  messages.pop();
  asked.remove();
  node.remove();
  if (messages === talk) $("say").value ||= content;
}

function bubble(role) {
  const node = document.createElement("li");
  node.className = role;
  $("talk").append(node);
  stayBelow($("talk"));
  return node;
}

function clear() {
  running?.abort();
  talk = [];
  $("talk").replaceChildren();
  $("say").focus();
}

// Tabs and keys

const TABS = ["code", "chat", "fill"];
const RUNS = { code: continueText, chat: say, fill: fillIn };

function usable() {
  return TABS.filter((tab) => !$(`tab-${tab}`).hidden);
}

function open(name) {
  for (const tab of TABS) {
    const here = tab === name;
    $(`tab-${tab}`).setAttribute("aria-selected", here);
    $(`tab-${tab}`).tabIndex = here ? 0 : -1;
    $(`panel-${tab}`).hidden = !here;
  }
  history.replaceState(null, "", `#${name}`);
}

export function allowFilling(yes) {
  const wasOpen = !$("panel-fill").hidden;
  $("tab-fill").hidden = !yes;
  if (!yes && wasOpen) open("code");
}

function run() {
  if (running) running.abort();
  else RUNS[TABS.find((tab) => !$(`panel-${tab}`).hidden)]();
}

function prepareTabs() {
  for (const tab of TABS) {
    $(`tab-${tab}`).addEventListener("click", () => open(tab));
    $(`tab-${tab}`).addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      const tabs = usable();
      const other = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
      open(other);
      $(`tab-${other}`).focus();
    });
    $(`run-${tab}`).addEventListener("click", run);
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) {
      event.preventDefault();
      run();
    } else if (event.key === "Escape" && running) running.abort();
  });
  const wanted = location.hash.slice(1);
  if (TABS.includes(wanted)) open(wanted);
}
