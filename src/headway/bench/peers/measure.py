"""The rounds: each engine in turn starts anew, reads prompts, decodes, and ends. Ours is started beside each peer and
does the same in turn with it, case by case, the other one idle: the machine is another a few minutes later, and a ratio
is one of two measurements within seconds.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from headway.bench.peers import convert, install
from headway.bench.peers.engines import OURS, Engine
from headway.bench.peers.install import OwnFailed, PeerFailed
from headway.bench.peers.limits import Limits
from headway.bench.peers.process import Process
from headway.models import presets

MIXED = (64, 128, 256, 384, 512, 768, 1024, 1696)  # 4832 tokens
UNCOUNTED_STEPS = 2  # of each decode
SETTLED_S = 0.05  # after so long the threads of the engine that has answered spin no more


class Case(NamedTuple):
    """A row of the page: prompts that are read together, or a token for each of `batch` behind `context`."""

    name: str
    lengths: tuple[int, ...] = ()
    repeats: int = 1  # of a prefill, after one that is not counted
    batch: int = 0
    context: int = 0
    steps: int = 0


class Plan(NamedTuple):
    """What is asked of every engine in a round."""

    prefills: tuple[Case, ...]
    decodes: tuple[Case, ...]

    @property
    def cases(self) -> tuple[Case, ...]:
        return self.prefills + self.decodes

    @property
    def longest(self) -> int:
        """Tokens of a sequence, with room for the tokens that those read first draw while the last is read."""
        behind = max((case.context + case.steps for case in self.decodes), default=0)
        return max(*(length for case in self.prefills for length in case.lengths), behind) + 256

    @property
    def batch(self) -> int:
        return max(*(len(case.lengths) for case in self.prefills), *(case.batch for case in self.decodes))


def _decode(batch: int, context: int, steps: int) -> Case:
    return Case(f"decode B{batch}", batch=batch, context=context, steps=steps)


FULL = Plan(
    (
        Case("prefill 128", (128,), 4),
        Case("prefill 512", (512,), 3),
        Case("prefill 2048", (2048,), 1),
        Case("prefill mixed", MIXED, 1),
    ),
    tuple(_decode(batch, 512, 32) for batch in (1, 4, 8, 16)),
)
QUICK = Plan(
    (Case("prefill 128", (128,), 1), Case("prefill 512", (512,), 1)),
    (_decode(1, 128, 8), _decode(4, 128, 8)),
)


@dataclass
class Found:
    """What one engine did. Tokens a second by case, one figure for each round; `beside`: what ours did in turn with it;
    `failure` is why there are none."""

    engine: Engine
    rates: dict[str, list[float]] = field(default_factory=dict)
    beside: dict[str, list[float]] = field(default_factory=dict)
    cold_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    install_bytes: int = 0
    notes: str = ""
    first_tokens: list[int] = field(default_factory=list)  # one of each decoded case, of the first round
    failure: str = ""


def command_of(root: Path, engine: Engine) -> list[str]:
    """What starts its runner. Raises PeerFailed when its environment cannot be made."""
    python = sys.executable if engine.venv is None else str(install.installed(root, engine.venv).absolute())
    return [python, "-m", f"runners.{engine.runner}"]


def prepare(root: Path, model: str, found: Found, num_threads: int, plan: Plan) -> None:
    """Install, convert, and start once: files are in the page cache and whatever is kept for later starts is kept."""
    engine = found.engine
    command_of(root, engine)
    convert.converted(root, model, engine.reads)
    venv = engine.venv
    found.install_bytes = install.own_bytes() if venv is None else install.size_bytes(root / venv.name)
    with _started(root, model, engine, num_threads) as process:
        found.notes = _loaded(process, root, model, engine, num_threads, plan, seed=0)


def one_round(
    root: Path, model: str, found: Found, ours: Engine | None, num_threads: int, plan: Plan, number: int
) -> None:
    """Adds a figure to every case. `ours` is started as well, and asked the same in turn. Raises PeerFailed."""

    def loaded(engine: Engine) -> Process:
        process = processes.enter_context(_started(root, model, engine, num_threads))
        _loaded(process, root, model, engine, num_threads, plan, seed=1 + number)
        return process

    rates: dict[str, float] = {}
    beside: dict[str, float] = {}
    drawn: list[int] = []
    with ExitStack() as processes:
        process = loaded(found.engine)
        cold_s = time.monotonic() - process.begun
        other = None if ours is None else loaded(ours)
        for place, case in enumerate(plan.cases):
            both = [process] if other is None else [process, other]
            answers = _asked(case, both if (number + place) % 2 == 0 else both[::-1])
            rates[case.name] = _rate(case, answers[process])
            if other is not None:
                beside[case.name] = _rate(case, answers[other])
            if case.batch:
                drawn.append(answers[process][0]["tokens"][0])
        peak_bytes = process.ask("quit")["peak_bytes"]
        if other is not None:
            other.ask("quit")
    # only now: a round that broke off counts for nothing
    for each, figures in ((found.rates, rates), (found.beside, beside)):
        for name, rate in figures.items():
            each.setdefault(name, []).append(rate)
    found.cold_s.append(cold_s)
    found.peak_bytes = max(found.peak_bytes, peak_bytes)
    found.first_tokens = found.first_tokens or drawn


Answers = list[dict[str, Any]]


def _asked(case: Case, processes: Sequence[Process]) -> dict[Process, Answers]:
    """What each of them answered, asked in turn: prompts one for one; before the steps of a decode the one that comes
    second reads its context, too."""

    def ask(process: Process) -> dict[str, Any]:
        time.sleep(SETTLED_S)
        if case.batch:
            steps = UNCOUNTED_STEPS + case.steps
            return process.ask("decode", batch=case.batch, context=case.context, steps=steps)
        return process.ask("prefill", lengths=case.lengths)

    turns = [{each: ask(each) for each in processes} for _ in range(1 if case.batch else 1 + case.repeats)]
    return {each: [turn[each] for turn in turns[0 if case.batch else 1 :]] for each in processes}


def _rate(case: Case, answers: Answers) -> float:
    """Tokens a second."""
    if case.batch:
        steps_s: list[float] = answers[0]["seconds"]
        return case.batch / statistics.median(steps_s[UNCOUNTED_STEPS:])
    taken_s: list[float] = [answer["seconds"] for answer in answers]
    return sum(case.lengths) / statistics.median(taken_s)


def _started(root: Path, model: str, engine: Engine, num_threads: int) -> Process:
    log = root / "logs" / f"{model}-{engine.name.replace(' ', '-')}.log"
    return Process(command_of(root, engine), log, num_threads, is_ours=engine.venv is None)


def _loaded(process: Process, root: Path, model: str, engine: Engine, num_threads: int, plan: Plan, seed: int) -> str:
    """Its notes; it has given a first token."""
    answer = process.ask(
        "load", model=str(convert.converted(root, model, engine.reads)), seed=seed,
        vocab_size=presets.preset(model).vocab_size, precision=engine.precision,
        threads=num_threads, longest=plan.longest, batch=plan.batch,
    )  # fmt: skip
    return str(answer["notes"])


class Measured(NamedTuple):
    """Everything about one model."""

    model: str
    found: list[Found]
    limits: list[Limits]


def measure(
    root: Path,
    model: str,
    engines: list[Engine],
    plan: Plan,
    rounds: int,
    num_threads: int,
    limits: Callable[[int], Limits],
    tell: Callable[[str], None],
) -> Measured:
    """All rounds, every second one backwards. `tell` hears what is done next; an engine that fails is left out."""
    measured = Measured(model, [Found(engine) for engine in engines], [])
    for each in measured.found:
        tell(f"{each.engine.name}: set-up, first start")
        _attempt(each, partial(prepare, root, model, each, num_threads, plan))
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}: limits")
        measured.limits.append(limits(num_threads))
        for each in measured.found[:: 1 if number % 2 == 0 else -1]:
            if not each.failure:
                tell(f"round {number + 1} of {rounds}: {each.engine.name}")
                ours = _ours(engines, each.engine)
                _attempt(each, partial(one_round, root, model, each, ours, num_threads, plan, number))
        measured.limits.append(limits(num_threads))
    return measured


def _ours(engines: Sequence[Engine], peer: Engine) -> Engine | None:
    """What a peer is compared with; nothing, if it is ours itself."""
    same = (engine for engine in engines if engine.group == OURS and engine.precision == peer.precision)
    return None if peer.group == OURS else next(same, None)


def _attempt(found: Found, do: Callable[[], None]) -> None:
    try:
        do()
    except PeerFailed as failed:
        if found.engine.venv is None or isinstance(failed, OwnFailed):
            raise
        found.failure = str(failed)
