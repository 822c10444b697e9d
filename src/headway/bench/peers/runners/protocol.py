"""What the bench and a runner say to each other: a JSON object a line, on standard input and output.

  {"do": "load", "seed", … the fields of `Load`}  → {"notes": …}, when a short prompt has its first token
  {"do": "prefill", "lengths": [128]}             → {"seconds": …}, until every prompt has its first token
  {"do": "decode", "batch", "context", "steps"}   → {"seconds": [… of each step], "tokens": [… the first prompt's]}
  {"do": "quit"}                                  → {"peak_bytes": …}

An error is {"error": "its first line"}, and the end of the runner. Knows no engine; the standard library only.
"""

import gc
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Prompts = Sequence[list[int]]


class Load(NamedTuple):
    """What an engine is made of. `longest` bounds the tokens of a sequence, `batch` how many there are at once."""

    model: str
    vocab_size: int
    precision: str
    threads: int
    longest: int
    batch: int


class Decoded(NamedTuple):
    """Seconds of each step in which every prompt got a token, and the tokens of the first prompt."""

    seconds: list[float]
    tokens: list[int]


class Runner(Protocol):
    """An engine that is loaded. Draws greedily, keeps nothing between two calls, shares no beginnings of prompts."""

    notes: str  # what the engine chose, to be told on the page

    def prefill(self, prompts: Prompts) -> float:
        """Seconds until every prompt has its first token; all are there at the beginning."""

    def decode(self, prompts: Prompts, steps: int) -> Decoded:
        """Read all prompts, then time `steps` steps of all of them."""


def serve(load: Callable[[Load], Runner]) -> None:
    """Answer until told to quit. What the engine prints goes to standard error."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        try:
            _serve(load, lambda answer: print(json.dumps(answer), file=answers, flush=True))
        except Exception as error:
            first = (str(error).strip() or "no words").splitlines()[0]
            print(json.dumps({"error": f"{type(error).__name__}: {first}"}), file=answers, flush=True)
            raise


def _serve(load: Callable[[Load], Runner], answer: Callable[[dict[str, Any]], None]) -> None:
    runner: Runner | None = None
    vocab_size = 0
    draws = random.Random()
    for line in sys.stdin:
        asked = json.loads(line)
        what = asked.pop("do")
        if what == "quit":
            answer({"peak_bytes": peak_bytes()})
            return
        if what == "load":
            vocab_size = asked["vocab_size"]
            draws.seed(asked.pop("seed"))  # the same prompts for every engine, and no prompt twice
            runner = load(Load(**asked))
            runner.prefill(_prompts(draws, [16], vocab_size))
            answer({"notes": runner.notes})
            continue
        assert runner is not None, "load comes first"
        gc.collect()
        if what == "prefill":
            answer({"seconds": runner.prefill(_prompts(draws, asked["lengths"], vocab_size))})
        else:
            prompts = _prompts(draws, [asked["context"]] * asked["batch"], vocab_size)
            answer(runner.decode(prompts, asked["steps"])._asdict())


def _prompts(draws: random.Random, lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    return [[draws.randrange(vocab_size) for _ in range(length)] for length in lengths]


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0
