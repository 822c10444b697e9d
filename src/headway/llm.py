"""`headway.LLM`: the same engine in the caller's process, for scripts and notebooks.

from headway import LLM, SamplingParams

llm = LLM()  # the embedded model; or a folder, a hub id, random:PRESET
for answer in llm.generate(["def fibonacci(n):"], SamplingParams(max_tokens=64)):
    print(answer.text)
"""

import itertools
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from headway.config import engine_settings
from headway.core import event as ev
from headway.core.ledger import Record
from headway.core.request import SLO, Request, Sampling
from headway.core.work import TokenLogprobs
from headway.models.stops import StopMatcher
from headway.models.tokenizer import Detokenizer, open_model_text
from headway.placement.engine import MonotonicClock, build_engine
from headway.placement.mailbox import Letters


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to answer; names and meanings are vLLM's. A `temperature` of None means the model's own default, then 1.

    Without a `seed` every call draws anew. `stop` strings end an answer and are not part of it.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    seed: int | None = None
    slo: SLO = field(default_factory=SLO)

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}: ask for at least 1.")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}: give 0 (greedy) or more.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: give more than 0 and at most 1.")


@dataclass(slots=True)
class Completion:
    """One answer. `record` is its account: arrival, first token, preemptions, targets met or missed and why."""

    prompt_tokens: tuple[int, ...]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    record: Record | None = None


@dataclass(slots=True)
class _Open:
    answer: Completion
    detokenizer: Detokenizer
    matcher: StopMatcher
    stopped: bool = False


class LLM:
    """One engine, driven by whoever calls. Options are those of `headway serve`, with underscores for dashes.

    Raises ConfigError or ModelError, one sentence each, when the model or an option cannot be served.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self._engine = build_engine(engine_settings(model=model, **options))
        self._text = open_model_text(model)
        self.tokenizer = self._text.tokenizer
        self._letters = Letters()
        self._driver = self._engine.driver(MonotonicClock(), self._letters, self._tell)
        self._open: dict[str, _Open] = {}
        self._numbers = itertools.count()

    @property
    def facts(self) -> object:
        """What the engine resolved: dtype, context, pages, threads."""
        return self._engine.facts

    def generate(
        self, prompts: str | Sequence[str | Sequence[int]], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Answers in the order of the prompts (texts or token ids). Raises ValueError for a prompt that is too long."""
        several: Sequence[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else prompts
        submitted = [self._submit(prompt, params or SamplingParams()) for prompt in several]
        while any(request_id in self._open for request_id, _ in submitted):
            self._turn()
        return [_finished(answer) for _, answer in submitted]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
        """The answer's text, piece by piece. Leaving the loop early cancels the rest."""
        params = params or SamplingParams()
        request_id, answer = self._submit(prompt, params)
        shown = 0
        try:
            while request_id in self._open:
                self._turn()
                if len(answer.text) > shown:
                    yield answer.text[shown:]
                    shown = len(answer.text)
            _finished(answer)
        finally:
            if request_id in self._open:
                self._letters.put(ev.Cancelled(request_id))
                while request_id in self._open:
                    self._turn()

    def _submit(self, prompt: str | Sequence[int], params: SamplingParams) -> tuple[str, Completion]:
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        wrong = next((token for token in tokens if not 0 <= token < self.tokenizer.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"Token {wrong} is not in the vocabulary of {self.tokenizer.vocab_size}.")
        eos_ids = () if params.ignore_eos else self.tokenizer.eos_ids
        request = Request(
            id=f"local-{next(self._numbers)}",
            prompt=tokens,
            max_tokens=params.max_tokens,
            arrival=MonotonicClock.now(),
            slo=params.slo,
            sampling=self._sampling(params),
            stop_ids=(*eos_ids, *params.stop_token_ids),
            min_tokens=params.min_tokens,
        )
        answer = Completion(tokens)
        self._open[request.id] = _Open(answer, self.tokenizer.detokenizer(), StopMatcher(params.stop))
        self._letters.put(ev.Arrived(request))
        return request.id, answer

    def _sampling(self, params: SamplingParams) -> Sampling:
        defaults = self._text.sampling_defaults

        def chosen(name: str, otherwise: float) -> float:
            value = getattr(params, name)
            return float(defaults.get(name, otherwise) if value is None else value)

        return Sampling(
            temperature=chosen("temperature", 1.0),
            top_p=chosen("top_p", 1.0),
            top_k=max(0, int(chosen("top_k", 0))),  # -1 is off, as in vLLM
            min_p=chosen("min_p", 0.0),
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=chosen("repetition_penalty", 1.0),
            logit_bias=tuple(params.logit_bias.items()),
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            num_logprobs=params.logprobs,
        )

    def _turn(self) -> None:
        # not around a whole generator: the mode belongs to the thread, and the caller runs between two pieces
        with torch.inference_mode():
            if not self._driver.turn() and self._open:
                self._driver.wait()

    def _tell(self, effect: ev.Deliver | ev.End) -> None:
        if isinstance(effect, ev.Deliver):
            commit = effect.commit
            open_ = self._open[commit.request_id]
            if open_.stopped:
                return
            open_.answer.token_ids += commit.tokens
            open_.answer.logprobs += commit.logprobs
            passed = open_.matcher.feed(open_.detokenizer.feed(commit.tokens))
            open_.answer.text += passed.text
            if passed.stop is not None:
                open_.stopped = True
                self._letters.put(ev.Stopped(commit.request_id))
            return
        record = effect.record
        open_ = self._open.pop(record.request_id)
        if not open_.stopped:
            passed = open_.matcher.feed(open_.detokenizer.flush())
            open_.stopped = passed.stop is not None
            open_.answer.text += passed.text + open_.matcher.rest()
        open_.answer.record = record
        open_.answer.finish_reason = "stop" if open_.stopped else record.reason


def _finished(answer: Completion) -> Completion:
    """The answer, or an error in the words of whoever ended it."""
    record = answer.record
    assert record is not None
    if record.kind == "refused":
        raise ValueError(record.message)
    if record.kind == "failed":
        raise RuntimeError(record.message)
    return answer
