// "Show me a suspension": long prompts that nobody waits for, short ones that are in a hurry, and what happened.

import { device, facts } from "./live.js";
import { $, claim, measured, send } from "./past.js";

const LONGEST_S = 2.5; // of reading a long prompt
const LONG_S = 0.6; // a small model reads its longest prompt in less: then there are several, to look at for so long
const MOST_LONG = 8;
const NUM_SHORT = 6;
const TIGHTEST_MS = 40;
const APART = 0.31; // between two short ones, in the time of a long one

const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));
const random = (most) => Math.floor(Math.random() * most);
const counted = (number, one, many) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
const settled = (promise) => Promise.allSettled([promise]).then(([outcome]) => outcome); // watched from the start

export function prepareShow() {
  $("show").addEventListener("click", async () => {
    $("show").disabled = true;
    $("shown").hidden = false;
    try {
      await show();
    } catch (error) {
      tell(error.message);
    } finally {
      $("show").disabled = false;
      $("show").focus({ preventScroll: true });
    }
  });
}

function tell(words) {
  $("shown").textContent = words;
}

/** Seconds that reading so many tokens is predicted to take. */
function reading(num_tokens) {
  const { step_s, token_s, segment_s, pair_s } = facts.cost_fit;
  return step_s + segment_s + token_s * num_tokens + (pair_s * num_tokens * num_tokens) / 2;
}

function longest() {
  let num_tokens = facts.max_model_len - 8;
  while (num_tokens > 64 && reading(num_tokens) > LONGEST_S) num_tokens = Math.floor(num_tokens * 0.9);
  return num_tokens;
}

async function show() {
  if (!facts) return tell("The engine is not ready yet.");
  const num_tokens = longest();
  const long_s = reading(num_tokens);
  const num_long = Math.min(MOST_LONG, Math.max(1, Math.ceil(LONG_S / long_s)));
  const ttft_ms = Math.round(Math.min(400, Math.max(TIGHTEST_MS, 250 * long_s)));
  const prompts = `${counted(num_long, "prompt", "prompts")} of ${num_tokens.toLocaleString("en")} tokens`;
  tell(`Reading ${prompts}, about ${measured(long_s * 1000)} each, while ${NUM_SHORT} short ones want their first token within ${ttft_ms} ms.`);
  device.follow();
  // Any tokens will do, but never the same twice: what was read before need not be read again.
  const prompt = Array.from({ length: num_long }, () => Array.from({ length: num_tokens }, () => 300 + random(600)));
  const long = settled(send("v1/completions", { prompt, max_tokens: 1, temperature: 0 }, () => {}));
  const shorts = [];
  for (let number = 0; number < NUM_SHORT; number += 1) {
    await pause(APART * long_s);
    const body = { prompt: `def step_${random(1e6)}(state):`, max_tokens: 1, temperature: 0, slo: { ttft_ms } };
    shorts.push(settled(send("v1/completions", body, () => {})));
  }
  const served = await long;
  const hurried = await Promise.all(shorts);
  if (served.status === "rejected") throw served.reason;
  await explain(served.value.id, hurried, ttft_ms, num_long);
}

/** Waits until the end of it has been heard, and holds the timeline at the step that was suspended most. */
async function explain(id, hurried, ttft_ms, num_long) {
  const serial = await claim(id);
  let steps = [];
  for (let tries = 0; tries < 40; tries += 1) {
    await pause(0.1);
    steps = Object.values(Object.groupBy(device.piecesOf(serial), (piece) => piece.step));
    if (steps.length >= num_long && steps.every((pieces) => pieces.at(-1).ending === "done")) break;
  }
  const usages = hurried.filter((one) => one.status === "fulfilled").map((one) => one.value.usage.headway);
  const met = usages.filter((timing) => timing.slo_met).length;
  const firsts = usages.map((timing) => measured(timing.ttft_ms)).join(", ");
  const outcome = `${met} of ${hurried.length} short ones had their first token within ${ttft_ms} ms${firsts && ` (${firsts})`}.`;
  const times = steps.flat().filter((piece) => piece.ending === "suspended").length;
  if (!times) return tell(`This time nothing was suspended. ${outcome}`);
  const pieces = steps.reduce((most, other) => (other.length > most.length ? other : most));
  device.show(pieces[0].begun, pieces.at(-1).ended);
  const busy_s = pieces.reduce((sum, piece) => sum + piece.ended - piece.begun, 0);
  const held_s = pieces.at(-1).ended - pieces[0].begun - busy_s;
  tell(
    `A long prompt of #${serial} was suspended ${counted(pieces.length - 1, "time", "times")}, ${measured(held_s * 1000)} in all, ` +
    `and went on where it had stopped. ${outcome}`,
  );
}
