// Sends requests and keeps what became of each: a row with its verdict, and its life when the row is opened.

export const $ = (id) => document.getElementById(id);
export const mine = new Map(); // serial number in the live view -> id of a request sent from this page

const MOST_ROWS = 20;
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
const PHASES = { // what a moment begins
  scheduled: "reading",
  resumed: "reading",
  parked: "suspended",
  first_token: "answering",
  recomputed: "waiting",
};
const MOMENTS = {
  admitted: "let in",
  scheduled: "its prompt is being read",
  parked: "suspended",
  resumed: "goes on",
  first_token: "first token",
  recomputed: "back in the queue",
};

export function milliseconds(value) {
  if (value === null || value === undefined) return "no target";
  return value < 1000 ? `${value} ms` : `${value / 1000} s`;
}

export function measured(value) {
  if (value === null || value === undefined) return "–";
  return value < 10 ? `${value.toFixed(1)} ms` : value < 1000 ? `${value.toFixed(0)} ms` : `${(value / 1000).toFixed(2)} s`;
}

/** Streams one answer: `grow(text)` for each piece. Returns {id, usage}. Throws what the server says is wrong. */
export async function send(path, body, grow, signal) {
  const id = newId();
  const early = setTimeout(() => claim(id), 150); // a long prompt is seen below before its first token comes
  let usage = null;
  let status = 0;
  try {
    const response = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Request-Id": id },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    status = response.status;
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (choice) grow(choice.text ?? choice.delta.content ?? "");
      if (event.usage) usage = event.usage;
    }
  } catch (error) {
    const isKnown = ![400, 401, 404, 408, 413].includes(status); // such a request never began
    remember(id, null, isKnown, error.name === "AbortError" ? "stopped" : [429, 503].includes(status) ? "refused" : "no answer");
    throw error;
  } finally {
    clearTimeout(early);
  }
  remember(id, usage, true);
  return { id, usage };
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

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function lifeOf(id) {
  const response = await fetch(`v1/requests/${id}/timeline`, { signal: AbortSignal.timeout(5000) });
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response.json();
}

/** Finds out under which number everybody sees this request. Returns it, or undefined for one that never began. */
export async function claim(id) {
  try {
    const { serial } = await lifeOf(id);
    mine.set(serial, id);
    const number = document.querySelector(`[data-request="${id}"] .serial`);
    if (number) number.textContent = `#${serial} `;
    return serial;
  } catch {
    return undefined; // not begun yet, or forgotten
  }
}

// Rows

function remember(id, usage, isKnown, words) {
  document.querySelector("#past .none")?.remove();
  const row = document.createElement("tr");
  row.dataset.request = id;
  const timing = usage?.headway;
  const cell = (content, late = false) => {
    const node = document.createElement("td");
    node.append(content);
    if (late) node.className = "late";
    row.append(node);
  };
  cell(isKnown ? opener(id, timing, words) : verdict(timing, words));
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
  if (isKnown) claim(id);
  while ($("past").querySelectorAll("tr[data-request]").length > MOST_ROWS) $("past").lastElementChild.remove();
}

function opener(id, timing, words) {
  const button = document.createElement("button");
  button.className = "opener";
  button.setAttribute("aria-expanded", "false");
  button.title = "What happened, and when";
  const number = document.createElement("span");
  number.className = "serial quiet";
  button.append(number, verdict(timing, words));
  button.addEventListener("click", () => toggle(button, id));
  return button;
}

function verdict(timing, words) {
  const node = document.createElement("span");
  const missed = Object.values(timing?.slo ?? {}).find((report) => !report.met);
  node.className = "verdict";
  if (!timing) node.textContent = words ?? "no answer";
  else if (timing.slo_met === null) node.textContent = "no target";
  else if (timing.slo_met) node.textContent = "met";
  else node.textContent = `missed: ${CAUSES[missed.cause] ?? missed.cause}`;
  if (timing?.slo_met === true) node.classList.add("met");
  if (timing?.slo_met === false) node.classList.add("missed");
  return node;
}

// The life of a request

async function toggle(button, id) {
  const row = button.closest("tr");
  const wasOpen = button.getAttribute("aria-expanded") === "true";
  button.setAttribute("aria-expanded", !wasOpen);
  if (wasOpen) return row.nextElementSibling.remove();
  const opened = document.createElement("tr");
  opened.className = "life";
  const cell = opened.insertCell();
  cell.colSpan = 8;
  cell.textContent = "…";
  row.after(opened);
  try {
    const inside = document.createElement("div");
    inside.className = "inside";
    inside.append(...drawn(await lifeOf(id)));
    cell.replaceChildren(inside);
  } catch (error) {
    cell.textContent = error.message;
  }
}

function drawn(life) {
  const answer = life.choices[0];
  const moments = answer.moments.filter((moment) => moment.at_ms !== null);
  const end = Math.max(answer.total_ms ?? 0, ...moments.map((moment) => moment.at_ms), 0.001);
  const bar = document.createElement("div");
  bar.className = "phases";
  const spent = {};
  let phase = "waiting";
  let from = 0;
  const until = (at) => {
    if (at <= from) return;
    const piece = document.createElement("i");
    piece.className = phase;
    piece.style.left = `${(100 * from) / end}%`;
    piece.style.width = `${(100 * (at - from)) / end}%`;
    piece.title = `${phase}: ${measured(at - from)}`;
    bar.append(piece);
    spent[phase] = (spent[phase] ?? 0) + at - from;
    from = at;
  };
  const list = document.createElement("ol");
  for (const { at_ms, what, detail } of moments) {
    if (PHASES[what] || what === answer.kind) until(at_ms);
    phase = PHASES[what] ?? phase;
    const item = document.createElement("li");
    const at = document.createElement("b");
    at.textContent = measured(at_ms);
    const said = document.createElement("span");
    said.textContent = (MOMENTS[what] ?? what) + (detail ? `: ${detail}` : "");
    item.append(at, said);
    list.append(item);
  }
  until(end);
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", Object.entries(spent).map(([name, ms]) => `${name} ${measured(ms)}`).join(", "));
  const words = document.createElement("p");
  words.className = "quiet";
  for (const [name, ms] of Object.entries(spent)) {
    const key = document.createElement("i");
    key.className = `key ${name}`;
    words.append(key, `${name} ${measured(ms)} `);
  }
  if (life.choices.length > 1) words.append(`· the first of ${life.choices.length} answers`);
  return [bar, words, list];
}
