"""What the embedded model's card and result file say, measured on the exported folder.

Everything is measured on the weights as stored, in bfloat16, computed in float32. Knows no training.
"""

import json
import platform
import random
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import torch
from tokenizers import Tokenizer

from headway.models.decoder import Decoder
from headway.models.weights import load
from headway.train.data import Corpus, Document
from headway.train.infill import cut, pieces
from headway.train.judge import function_parses, functions_begun, repeated_share
from headway.train.loop import Account
from headway.train.measure import HeldOutLoss, continuation, middle_loss, plain_loss

if TYPE_CHECKING:
    from embedded import Settings

LOOPS = "loops"  # the second run's folder within the run
PROMPTS = (
    "def fibonacci(n):",
    "import os\nimport sys\n\ndef main():\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "<|fim_prefix|>def area(width, height):\n    <|fim_suffix|>\n    return result\n<|fim_middle|>",
)
TEMPERATURES = (0.0, 0.2, 0.5, 0.8)
NUM_FUNCTIONS, CONTINUED_TOKENS = 32, 64


class Trial(NamedTuple):
    """Work that is not in the model: a short run that chose a setting, or steps thrown away."""

    question: str
    outcome: str  # losses are means over the steps named
    cpu_s: float


class Mix(NamedTuple):
    """A point between the weights before and after the second run, as it was measured when one was chosen."""

    share: float
    nats_per_token: float
    repeated_share: float


MIXES = (Mix(0, 2.814, 0.34), Mix(0.5, 2.847, 0.33), Mix(0.75, 2.903, 0.35), Mix(1, 2.985, 0.31), Mix(1.3, 3.122, 0.23))
TRIALS = (
    Trial("rates 0.02 (matrices), 0.004 (rest)", "5.50 over steps 24–35 of 40", 74.4),
    Trial("rates 0.04, 0.004: worse", "5.56 over steps 24–35 of 36", 46.3),
    Trial("rates 0.02, 0.012: better, yet a short run flatters high rates, so 0.008 was taken", "5.37, likewise", 49.4),
    Trial(
        "batches of 2048 tokens instead of 4096: better per token, not per second (118 s against 94 s)",
        "5.00 against 5.09 at 0.33 M tokens",
        118.5,
    ),
    Trial(
        "the first two lessons, tokenizing files whole or in long stretches, sentinels among the targets",
        "at steps 600 and 900, greedy text after a line end began with a sentinel; 39 steps undone to change lessons",
        45.3,
    ),
)


class Spread(NamedTuple):
    """How text sampled at one temperature fares."""

    temperature: float
    parsing_share: float
    repeated_share: float


class Report(NamedTuple):
    """Everything the card and the result file say, measured on the exported bf16 weights, computed in fp32."""

    corpus: Corpus
    num_parameters: int
    account: Account
    plain: HeldOutLoss
    middle: HeldOutLoss
    middle_without_suffix: HeldOutLoss
    spreads: tuple[Spread, ...]
    num_functions: int
    samples: tuple[tuple[str, str], ...]
    curve: tuple[tuple[int, float], ...]  # (steps done, mean loss of the hundred before)
    unwanted_chances: tuple[float, float]  # of a loop's next word: the first and the last ten steps of the second run


def measure(corpus: Corpus, account: Account, folder: Path, run: Path) -> Report:
    model = load(folder, torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rng = random.Random(0)
    cuts = [cut(piece, rng) for document in corpus.held_out for piece in pieces(document.text, 4000)]
    unwanted = figures_of(run / LOOPS, "unwanted_chance")
    begun = held_out_functions(corpus.held_out, NUM_FUNCTIONS)
    return Report(
        corpus=corpus,
        num_parameters=model.config.num_parameters,
        account=account,
        plain=plain_loss(model, tokenizer, corpus.held_out),
        middle=middle_loss(model, tokenizer, cuts, see_suffix=True),
        middle_without_suffix=middle_loss(model, tokenizer, cuts, see_suffix=False),
        spreads=tuple(spread(model, tokenizer, begun, temperature) for temperature in TEMPERATURES),
        num_functions=len(begun),
        samples=tuple((prompt, continuation(model, tokenizer, prompt, max_tokens=80)) for prompt in PROMPTS),
        curve=curve_of(figures_of(run, "loss")),
        unwanted_chances=(fmean(unwanted[:10]), fmean(unwanted[-10:])),
    )


def held_out_functions(documents: Sequence[Document], count: int) -> list[str]:
    """The text before the bodies of `count` functions spread over the held-out documents, 600 characters at most."""
    begun = [d.text[max(0, end - 600) : end] for d in documents for end in functions_begun(d.text)]
    return begun[:: max(1, len(begun) // count)][:count]


def spread(model: Decoder, tokenizer: Tokenizer, begun: Sequence[str], temperature: float) -> Spread:
    texts = [
        continuation(model, tokenizer, before, max_tokens=CONTINUED_TOKENS, temperature=temperature, seed=number)
        for number, before in enumerate(begun)
    ]
    parsing = sum(function_parses(before, text) for before, text in zip(begun, texts, strict=True))
    return Spread(temperature, parsing / len(begun), repeated_share(texts))


def figures_of(run: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (run / "log.jsonl").read_text(encoding="utf8").splitlines()]


def curve_of(losses: Sequence[float]) -> tuple[tuple[int, float], ...]:
    return tuple((done, fmean(losses[done - 100 : done])) for done in range(100, len(losses) + 1, 100))


def num_bytes(documents: Iterable[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def losses_table(report: Report) -> str:
    rows = {
        "plain files": report.plain,
        "middles, prefix and suffix seen (FIM order)": report.middle,
        "the same middles, prefix alone seen": report.middle_without_suffix,
    }
    lines = [
        f"| {name} | {loss.num_tokens:,} | {loss.nats_per_token:.3f} | {loss.bits_per_byte:.3f} |"
        for name, loss in rows.items()
    ]
    return "\n".join(["| held-out text | tokens | nats per token | bits per byte |", "|---|--:|--:|--:|", *lines])


def spreads_table(report: Report) -> str:
    lines = [f"| {s.temperature:g} | {s.parsing_share:.0%} | {s.repeated_share:.0%} |" for s in report.spreads]
    return "\n".join(["| temperature | functions that parse | repeated lines |", "|--:|--:|--:|", *lines])


def samples_text(report: Report) -> str:
    return "\n".join(f"```python\n{prompt}⟨…⟩{text}\n```\n" for prompt, text in report.samples)


def on_infilling(report: Report) -> str:
    if report.middle.bits_per_byte < report.middle_without_suffix.bits_per_byte:
        return "Infilled text often fails to meet its suffix."
    return "It takes infilling prompts but hardly uses the suffix: a middle is no likelier with it in sight."


def card(settings: "Settings", report: Report) -> str:
    config, account, last = settings.model, report.account, settings.lessons[-1]
    return f"""---
license: apache-2.0
language: code
pipeline_tag: text-generation
---
# Headway's embedded model

A decoder of {report.num_parameters / 1e6:.1f} million parameters that continues Python source, made by this project
itself so that a server can be tried, tested and demonstrated without a download. It is a base model: it continues
text and follows no instructions. Its chat template joins the messages with newlines and lets the model go on.

## Made of
- **Text:** the source of the standard library of CPython {platform.python_version()}, which is under the PSF licence
  (PSF-2.0): {len(report.corpus.train)} files, {num_bytes(report.corpus.train) / 1e6:.1f} MB. Left out: tests,
  installed packages, `lib2to3`, and the tables in `encodings` and `pydoc_data`.
  {len(report.corpus.held_out)} more files ({num_bytes(report.corpus.held_out) / 1e6:.2f} MB), chosen by a hash of their
  path, were never trained on. The model may repeat passages of what it read; these stay under their licence.
- **Shape:** Llama, {config.num_layers} layers, hidden size {config.hidden_size}, {config.num_heads} heads on
  {config.num_kv_heads} key-value heads, SwiGLU {config.intermediate_size}, tied embeddings,
  context {config.max_positions}.
- **Vocabulary:** {config.vocab_size} byte-level tokens trained on the same files. Any text can be spelled.
- **Training:** {account.num_tokens / 1e6:.1f} million tokens in {account.num_steps} steps, {last.num_steps} of them in
  sequences of {last.sequence_tokens}: {account.cpu_s / 60:.1f} CPU minutes of one core, and
  {sum(trial.cpu_s for trial in TRIALS) / 60:.1f} more for trials. The last {settings.loops.num_steps} steps taught it
  to leave loops; the model is the mean of its weights before and after them. Weights and steps in float32, products
  in bfloat16; stored in bfloat16.
- **Infilling:** {settings.fim_share:.0%} of the files, in every epoch other ones, came as
  `<|fim_prefix|>` P `<|fim_suffix|>` S `<|fim_middle|>` M `<|endoftext|>`, cut between any two characters.

`python recipes/embedded.py RUN_FOLDER` makes it again.

## What it can do
{losses_table(report)}

The bodies of {report.num_functions} held-out functions, {CONTINUED_TOKENS} tokens each. A function parses if Python's
parser takes it, the unfinished end forgiven; a line is repeated if it stood before in the same text. Parsing says
nothing of sense.

{spreads_table(report)}

`generation_config.json` asks for temperature {settings.temperature:g} and top-p 0.95, chosen from such a table.

## What it can't do
It knows the look of Python, not its meaning: names, indentation and idioms are right more often than the program is.
Don't expect a correct function, facts, prose, other languages than Python and English, instructions or dialogue.
{on_infilling(report)} Greedy text still falls into loops, sampled text less so. Never run
unread what it writes.

## Samples
Greedy, 80 tokens at most; the prompt ends at ⟨…⟩.

{samples_text(report)}"""


def result(settings: "Settings", report: Report) -> str:
    account = report.account
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    tokens_per_step = account.num_tokens / account.num_steps
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "tokenizers", "safetensors"))
    curve = "\n".join(f"| {done} | {done * tokens_per_step / 1e6:.2f} | {loss:.3f} |" for done, loss in report.curve)
    trials = "\n".join(f"| {trial.question} | {trial.outcome} | {trial.cpu_s:.0f} |" for trial in TRIALS)
    mixes = "\n".join(f"| {mix.share:g} | {mix.nats_per_token:.3f} | {mix.repeated_share:.0%} |" for mix in MIXES)
    return f"""# The embedded model

Written by `python recipes/embedded.py RUN_FOLDER`. What the model is and can do stands on
[its card](../../src/headway/assets/embedded/README.md).

- machine: {cpu_name()}, one thread used, shared with other work
- commit: {commit.stdout.strip() or "unknown"}
- versions: Python {platform.python_version()}, {versions}
- settings: `{asdict(settings)}`
- whole run: {account.num_tokens:,} tokens, {account.cpu_s:.0f} s of CPU, compiling included
  ({account.num_tokens / account.cpu_s:.0f} tokens per CPU second), {account.wall_s:.0f} s on the wall

## Held-out loss
{losses_table(report)}

## Text at several temperatures
{spreads_table(report)}

## Training loss
The mean of the hundred steps before; files as they stand and in FIM order together. From step
{sum(lesson.num_steps for lesson in settings.lessons if lesson.sentinels_predicted)} on, sentinels are no targets.

| steps | million tokens | nats per token |
|--:|--:|--:|
{curve}

## The second run
{settings.loops.num_steps} steps against loops (`train/repetition.py`): the chance that the model gives to a phrase's
third saying fell from {report.unwanted_chances[0]:.2f} (mean of the first ten steps) to
{report.unwanted_chances[1]:.2f} (of the last ten). The model is the mean of the weights before and after, chosen from
these on the held-out files. Where the second run had no share, the text after `def fibonacci(n):` repeated one word
without end.

| share of the second run's weights | nats per token, plain files | repeated lines, 16 greedy functions |
|--:|--:|--:|
{mixes}

## Trials
| question | outcome | CPU seconds |
|---|---|--:|
{trials}
"""


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {len(names) or '?'} cores"
