// "Show me a suspension": a long prompt that nobody waits for, a few short ones that are in a hurry, and what happened.

import { device, facts } from "./live.js";
import { $, claim, measured, send } from "./past.js";

const LONGEST_S = 2.5; // of reading the long prompt
const NUM_SHORT = 4;
const FIRST_AT = 0.15; // of the long prompt's time: when the first short one is sent …
const APART = 0.13; // … and how long after it the next

const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));
const settled = (promise) => Promise.allSettled([promise]).then(([outcome]) => outcome); // watched from the start
const random = (most) => Math.floor(Math.random() * most);

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
      $("show").focus();
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
  const ttft_ms = Math.round(Math.min(400, Math.max(40, 250 * long_s)));
  tell(`A prompt of ${num_tokens.toLocaleString("en")} tokens is being read, about ${measured(long_s * 1000)}; ${NUM_SHORT} short ones come in between and want their first token within ${ttft_ms} ms.`);
  device.follow();
  // Any tokens will do, but never the same twice: what was read before need not be read again.
  const prompt = Array.from({ length: num_tokens }, () => 300 + random(600));
  const quiet = () => {};
  const long = settled(send("v1/completions", { prompt, max_tokens: 4, temperature: 0 }, quiet));
  const shorts = [];
  await pause(FIRST_AT * long_s);
  for (let number = 0; number < NUM_SHORT; number += 1) {
    const body = { prompt: `def step_${random(1e6)}(state, action):`, max_tokens: 6, temperature: 0, slo: { ttft_ms } };
    shorts.push(settled(send("v1/completions", body, quiet)));
    await pause(APART * long_s);
  }
  const served = await long;
  const hurried = await Promise.all(shorts);
  if (served.status === "rejected") throw served.reason;
  await explain(served.value, hurried, ttft_ms, num_tokens);
}

async function explain(long, hurried, ttft_ms, num_tokens) {
  const serial = await claim(long.id);
  let pieces = [];
  for (let tries = 0; tries < 40 && pieces.at(-1)?.ending !== "done"; tries += 1) {
    await pause(0.1);
    pieces = device.piecesOf(serial);
  }
  if (!pieces.length) return tell("It is done, but this page did not hear how: open the rows below to see what happened.");
  device.show(pieces[0].begun, pieces.at(-1).ended);
  const times = pieces.filter((piece) => piece.ending === "suspended").length;
  const usages = hurried.filter((one) => one.status === "fulfilled").map((one) => one.value.usage.headway);
  const met = usages.filter((timing) => timing.slo_met).length;
  const firsts = usages.map((timing) => measured(timing.ttft_ms)).join(", ");
  const held_s = pieces.at(-1).ended - pieces[0].begun - pieces.reduce((sum, piece) => sum + piece.ended - piece.begun, 0);
  const name = `#${serial}, the prompt of ${num_tokens.toLocaleString("en")} tokens,`;
  const outcome = `${met} of ${hurried.length} short ones had their first token within ${ttft_ms} ms (${firsts}).`;
  if (!times) return tell(`This time nothing had to be suspended. ${outcome}`);
  tell(`${name} was suspended ${times === 1 ? "once" : `${times} times`}, ${measured(held_s * 1000)} in all, and went on where it had stopped. ${outcome}`);
}
