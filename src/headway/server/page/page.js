// The playground: sends a request with its targets, streams the answer, shows whether they were met.
// Talks to its own server only, through the same API as everybody else.

const $ = (id) => document.getElementById(id);

// Sliders walk along these steps; null is "no target".
const SLIDERS = {
  ttft: { steps: [20, 50, 100, 150, 200, 300, 500, 750, 1000, 2000, 5000, null], at: 6, show: milliseconds },
  tpot: { steps: [5, 10, 20, 30, 40, 50, 75, 100, 150, 250, 500, null], at: 7, show: milliseconds },
  length: { steps: [16, 32, 64, 128, 256, 512, 1024], at: 3, show: (n) => `${n} tokens` },
  heat: { steps: [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5], at: 2, show: (t) => (t ? `${t}` : "0, greedy") },
};
const CAUSES = {
  queued_behind: "others were served first",
  parked: "suspended for something more urgent",
  starved_of_pages: "waited for memory",
  predicted_wrong: "its own work took longer than predicted",
  infeasible: "less than the work takes",
  engine_lost: "the engine died",
  step_failed: "the model failed",
  refused: "refused",
  cancelled: "cancelled",
};

function milliseconds(value) {
  if (value === null || value === undefined) return "no target";
  return value < 1000 ? `${value} ms` : `${value / 1000} s`;
}

function measured(value) {
  if (value === null || value === undefined) return "–";
  return value < 10 ? `${value.toFixed(1)} ms` : value < 1000 ? `${value.toFixed(0)} ms` : `${(value / 1000).toFixed(2)} s`;
}

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

function chosen(name) {
  return SLIDERS[name].steps[$(name).value];
}

// One request

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
    const response = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, ...settings, stream: true, stream_options: { include_usage: true } }),
      signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (choice) grow(choice.text ?? choice.delta.content ?? "");
      if (event.usage) remember(event.usage);
    }
  } catch (error) {
    if (error.name === "AbortError") remember(null);
    else complain(error.message);
  } finally {
    running = null;
    busy(false);
    refresh();
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
    }
  }
}

function complain(message) {
  $("error").textContent = message;
  $("error").hidden = false;
}

function busy(yes) {
  for (const [id, words] of [["run-code", "Continue"], ["run-chat", "Send"]]) {
    const key = document.createElement("kbd");
    key.textContent = yes ? "Esc" : "Ctrl ↵";
    $(id).replaceChildren(yes ? "Stop " : `${words} `, key);
  }
  document.querySelectorAll(".growing").forEach((node) => node.classList.toggle("growing", yes));
}

// Continue a text

async function continueText() {
  const given = document.createElement("span");
  const fresh = document.createElement("span");
  given.className = "given";
  given.textContent = $("prompt").value;
  fresh.className = "new growing";
  $("answer").replaceChildren(given, fresh);
  $("keep").disabled = true;
  await ask("v1/completions", { prompt: given.textContent }, (text) => {
    fresh.append(text);
    stayBelow($("answer"));
  });
  fresh.classList.remove("growing");
  $("keep").disabled = !fresh.textContent;
}

$("keep").addEventListener("click", () => {
  $("prompt").value = $("answer").textContent;
  $("prompt").focus();
});

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

function stayBelow(box) {
  box.scrollTop = box.scrollHeight;
}

$("clear").addEventListener("click", () => {
  running?.abort();
  talk = [];
  $("talk").replaceChildren();
  $("say").focus();
});

// What became of each request

function remember(usage) {
  document.querySelector("#past .none")?.remove();
  const row = document.createElement("tr");
  const timing = usage?.headway;
  const cell = (words, late = false) => {
    const node = document.createElement("td");
    node.append(words);
    if (late) node.className = "late";
    row.append(node);
  };
  cell(verdict(timing));
  if (timing) {
    const target = (name) => (timing.slo[name] ? ` of ${milliseconds(timing.slo[name].target_ms)}` : "");
    const late = (name) => timing.slo[name]?.met === false;
    const expected = timing.predicted_ttft_ms === null ? "" : `, ${measured(timing.predicted_ttft_ms)} expected`;
    cell(measured(timing.ttft_ms) + target("ttft") + expected, late("ttft"));
    cell(measured(timing.tpot_ms) + target("tpot"), late("tpot"));
    cell(measured(timing.queue_ms));
    cell(measured(timing.total_ms));
    cell(`${usage.prompt_tokens} + ${usage.completion_tokens}`);
    cell(`${timing.cached_tokens}`);
    cell(timing.preemptions ? `${timing.preemptions}×` : "–");
  } else {
    row.insertCell().colSpan = 7;
  }
  $("past").prepend(row);
  while ($("past").rows.length > 20) $("past").lastElementChild.remove();
}

function verdict(timing) {
  const node = document.createElement("span");
  const missed = Object.values(timing?.slo ?? {}).find((report) => !report.met);
  node.className = "verdict";
  if (!timing) node.textContent = "stopped";
  else if (timing.slo_met === null) node.textContent = "no target";
  else if (timing.slo_met) node.textContent = "met";
  else node.textContent = `missed: ${CAUSES[missed.cause] ?? missed.cause}`;
  if (timing?.slo_met === true) node.classList.add("met");
  if (timing?.slo_met === false) node.classList.add("missed");
  return node;
}

// The engine's state, while somebody looks

async function refresh() {
  try {
    const state = await (await fetch("state", { signal: AbortSignal.timeout(5000) })).json();
    $("model").textContent = state.facts ? `${state.models[0]} · ${state.facts.dtype} · ${state.facts.device}` : state.models[0];
    $("s-state").textContent = state.state;
    const judged = Object.entries(state.classes).map(([name, { met, missed }]) => `${name} ${met} of ${met + missed}`);
    $("classes").textContent = `In time since the server's start, of all callers, by class: ${judged.join(" · ")}`;
    $("classes").hidden = judged.length === 0;
    if (!state.beat) return;
    const { num_running, num_waiting, num_parked, pages } = state.beat;
    const total = Object.values(pages).reduce((sum, count) => sum + count, 0);
    const used = pages.held + pages.parked;
    $("s-running").textContent = num_running;
    $("s-waiting").textContent = num_waiting;
    $("s-parked").textContent = num_parked;
    $("s-pages").textContent = `${used} used, ${pages.cached} cached of ${total}`;
    $("s-bar").setAttribute("aria-label", $("s-pages").textContent);
    $("s-held").style.width = `${(100 * used) / total}%`;
    $("s-cached").style.width = `${(100 * pages.cached) / total}%`;
  } catch {
    $("s-state").textContent = "unreachable";
  }
}

setInterval(() => document.hidden || refresh(), 1000);
refresh();

// Keys and tabs

const TABS = ["code", "chat"];

function open(name) {
  for (const tab of TABS) {
    const here = tab === name;
    $(`tab-${tab}`).setAttribute("aria-selected", here);
    $(`tab-${tab}`).tabIndex = here ? 0 : -1;
    $(`panel-${tab}`).hidden = !here;
  }
  location.hash = name;
}

function run() {
  if (running) running.abort();
  else if ($("panel-chat").hidden) continueText();
  else say();
}

for (const tab of TABS) {
  $(`tab-${tab}`).addEventListener("click", () => open(tab));
  $(`tab-${tab}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = TABS[1 - TABS.indexOf(tab)];
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
if (location.hash === "#chat") open("chat");
