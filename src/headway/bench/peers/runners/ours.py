"""Headway: the engine that `headway.LLM` and `headway serve` drive, driven here turn by turn with token ids."""

import itertools
import time

import torch

from headway.config import EngineSettings
from headway.core import event as ev
from headway.core.request import Request, Sampling
from headway.placement.engine import MonotonicClock, build_engine
from headway.placement.mailbox import Letters

from .protocol import Decoded, Load, Prompts, serve

GREEDY = Sampling(temperature=0.0)


class Headway:
    """One engine; every token that it delivers is noted with its instant."""

    def __init__(self, load: Load) -> None:
        self._engine = build_engine(
            EngineSettings(
                model=load.model, dtype="bfloat16", max_model_len=load.longest, max_num_seqs=load.batch,
                quantization="int8" if load.precision == "int8" else "none",
                num_threads=load.threads, enable_prefix_caching=False, refuse_unattainable=False,
            )
        )  # fmt: skip
        facts = self._engine.facts
        self.notes = f"{facts.dtype}, matrices by {facts.linear}, the rest by {facts.operators}"
        self._letters = Letters()
        self._driver = self._engine.driver(MonotonicClock(), self._letters, self._tell)
        self._longest = load.longest
        self._numbers = itertools.count()
        self._tokens: dict[str, list[int]] = {}  # of each open request
        self._ended: set[str] = set()
        self._told = False

    def prefill(self, prompts: Prompts) -> float:
        begun = time.perf_counter()
        ids = self._open(prompts, max_tokens=1)
        while not self._ended.issuperset(ids):
            self._turn()
        return time.perf_counter() - begun

    def decode(self, prompts: Prompts, steps: int) -> Decoded:
        # those read first draw tokens until the last has been read: room enough, and cancelled when done
        ids = self._open(prompts, max_tokens=self._longest - len(prompts[0]))
        while not all(self._tokens[each] for each in ids):
            self._turn()
        seconds: list[float] = []
        while len(seconds) < steps:
            before = {each: len(self._tokens[each]) for each in ids}
            begun = time.perf_counter()
            while any(len(self._tokens[each]) == before[each] for each in ids):
                self._turn()
            taken_s = time.perf_counter() - begun
            if all(len(self._tokens[each]) == before[each] + 1 for each in ids):  # else it was more than a step
                seconds.append(taken_s)
        tokens = self._tokens[ids[0]]
        for each in ids:
            self._letters.put(ev.Cancelled(each))
        while not self._ended.issuperset(ids):
            self._turn()
        return Decoded(seconds, tokens)

    def _open(self, prompts: Prompts, max_tokens: int) -> list[str]:
        ids = [str(next(self._numbers)) for _ in prompts]
        self._tokens = {each: [] for each in ids}
        self._ended = set()
        for each, prompt in zip(ids, prompts, strict=True):
            asked = Request(each, tuple(prompt), max_tokens, MonotonicClock.now(), sampling=GREEDY)
            self._letters.put(ev.Arrived(asked))
        return ids

    def _turn(self) -> None:
        self._told = False
        with torch.inference_mode():
            if not self._driver.turn() and not self._told:
                self._driver.wait()

    def _tell(self, effect: ev.Admit | ev.Deliver | ev.End) -> None:
        self._told = True
        if isinstance(effect, ev.Deliver):
            self._tokens[effect.commit.request_id] += effect.commit.tokens
        elif isinstance(effect, ev.End):
            if effect.record.kind not in ("finished", "cancelled"):
                raise RuntimeError(effect.record.message)
            self._ended.add(effect.record.request_id)


if __name__ == "__main__":
    serve(Headway)
