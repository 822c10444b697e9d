"""`headway.LLM`: the same engine in the caller's process, for scripts and notebooks.

from headway import LLM, SamplingParams

llm = LLM()  # the embedded model; or a folder, a hub id, random:PRESET
for answer in llm.generate(["def fibonacci(n):"], SamplingParams(max_tokens=64)):
    print(answer.text)
"""

import itertools
import json
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from headway.config import ConfigError, engine_settings
from headway.core import event as ev
from headway.core.admission import Crowd, Limits, refusal
from headway.core.ledger import Record
from headway.core.request import SLO, Constraint, Request, Sampling
from headway.core.work import TokenLogprobs
from headway.grammar.check import Checker
from headway.grammar.frames import Vocabulary
from headway.grammar.limits import check_source
from headway.grammar.notation import MISSING, is_available
from headway.models.stops import StopMatcher
from headway.models.tokenizer import Detokenizer, open_model_text
from headway.placement.engine import MonotonicClock, build_engine
from headway.placement.mailbox import Letters

_RANGES: dict[str, tuple[float, float]] = {  # the server's
    "temperature": (0, 2),
    "top_k": (-1, 2**31),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 100),  # less would overflow a logit
    "max_tokens": (1, 2**31),
    "min_tokens": (0, 2**31),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
    "seed": (-(2**63), 2**63 - 1),
}
_MAX_STOPS = 4
_MAX_STOP_CHARACTERS = 256
_LONGEST_TARGET_S = 1e6
_MAX_IDS = 1024  # entries of logit_bias, stop_token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What an answer must look like: one of these, as the server's `structured_outputs`. A schema is a mapping or its
    text, a grammar is in Lark's notation. Needs `headway[grammar]`."""

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        given = (self.json, self.regex, self.choice, self.grammar, self.json_object or None)
        if sum(one is not None for one in given) != 1:
            raise ValueError("StructuredOutputsParams takes one of json, regex, choice, grammar and json_object.")
        if self.choice is not None and not (self.choice and all(isinstance(one, str) for one in self.choice)):
            raise ValueError("choice must be a list of one text or more.")
        check_source(self.constraint)

    @property
    def constraint(self) -> Constraint:
        if self.regex is not None:
            return Constraint("regex", self.regex)
        if self.choice is not None:
            return Constraint("choice", json.dumps(list(self.choice)))
        if self.grammar is not None:
            return Constraint("lark", self.grammar)
        schema = {"type": "object"} if self.json is None else self.json
        return Constraint("json", schema if isinstance(schema, str) else json.dumps(schema))


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to answer; names and meanings are vLLM's. A `temperature` of None means the model's own default, then 1.

    Without a `seed` every call draws anew. `stop` strings end an answer and are not part of it. What the server would
    refuse is a ValueError here.
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
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    slo: SLO = field(default_factory=SLO)

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} is {value}: give {least} to {most}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: give more than 0 and at most 1.")
        self._check_stops()
        self._check_ids("logit_bias", self.logit_bias)
        self._check_ids("stop_token_ids", self.stop_token_ids)
        wrong = next((bias for bias in self.logit_bias.values() if not -100 <= bias <= 100), None)
        if wrong is not None:
            raise ValueError(f"logit_bias has a bias of {wrong}: give -100 to 100.")
        for name in ("ttft_s", "tpot_s", "total_s"):
            target = getattr(self.slo, name)
            if target is not None and not 0 < target <= _LONGEST_TARGET_S:
                raise ValueError(f"slo has a {name} of {target}: give more than 0 and at most {_LONGEST_TARGET_S:g}.")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def _check_stops(self) -> None:
        if len(self.stops) > _MAX_STOPS:
            raise ValueError(f"stop has {len(self.stops)} strings: give {_MAX_STOPS} or fewer.")
        wrong = next((stop for stop in self.stops if not 0 < len(stop) <= _MAX_STOP_CHARACTERS), None)
        if wrong is not None:
            raise ValueError(f"stop has a string of {len(wrong)} characters: give 1 to {_MAX_STOP_CHARACTERS}.")

    @staticmethod
    def _check_ids(name: str, ids: Iterable[int]) -> None:
        given = tuple(ids)
        if len(given) > _MAX_IDS:
            raise ValueError(f"{name} has {len(given)} entries: give {_MAX_IDS} or fewer.")
        wrong = next((token for token in given if not 0 <= token < 2**31), None)
        if wrong is not None:
            raise ValueError(f"{name} names the token {wrong}: give ids from 0 on, less than {2**31}.")


@dataclass(slots=True)
class Completion:
    """One answer. `record` is its account: arrival, first token, preemptions, targets met or missed and why."""

    prompt_tokens: tuple[int, ...]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # from the second token on, if asked for
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

    Several threads may call at once: one of them drives, its turns serve all, the others wait for their own answers.
    `close()`, or leaving a `with` block, gives the memory of keys and values back at once.
    Raises ConfigError or ModelError, one sentence each, when the model or an option cannot be served.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        options = {"refuse_unattainable": False} | options  # nobody else waits: late is better than never
        settings = engine_settings(model=model, **options)
        if settings.lanes in ("split", "auto"):
            raise ConfigError(f"lanes={settings.lanes!r} needs a server's own process: choose 'turns' or 'mixed'.")
        self._engine = build_engine(settings)
        self._text = open_model_text(model, chats=False)
        self.tokenizer = self._text.tokenizer
        text = self.tokenizer
        self._checker = Checker(lambda: Vocabulary(text.source, text.vocab_size, text.eos_ids))
        self._letters = Letters()
        self._driver = self._engine.driver(MonotonicClock(), self._letters, self._tell)
        facts = self._engine.facts
        self._max_open = self._engine.settings.max_num_queued_reqs  # never more, so that the queue refuses nothing
        self._limits = Limits(facts.max_model_len, self._max_open, facts.num_pages, facts.page_tokens)
        self._open: dict[str, _Open] = {}  # grows under `_turned`, shrinks in a turn
        self._numbers = itertools.count()
        self._turned = threading.Condition()  # notified after every turn
        self._turner: int | None = None  # the thread that drives; the driver is its alone
        self._closed = False

    @property
    def facts(self) -> object:
        """What the engine resolved: dtype, context, pages, threads."""
        return self._engine.facts

    def close(self) -> None:
        """Cancel what is open and give the memory of keys and values back. Nothing can be asked afterwards."""
        with self._turned:
            self._closed = True
            open_ids = list(self._open)
        self._give_up(open_ids)
        with self._turned:
            self._turned.wait_for(lambda: self._turner is None)
            self._driver.close()
            self._engine.pool.close()
        self._checker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def generate(
        self, prompts: str | Sequence[str | Sequence[int]], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Answers in the order of the prompts (texts or token ids), however many.

        Raises ValueError for a prompt that is empty or too long, before any work is done.
        """
        several: Sequence[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else prompts
        params = params or SamplingParams()
        requests = [self._request(prompt, params) for prompt in several]
        try:
            answers = [self._submit(request, params) for request in requests]
            while any(request.id in self._open for request in requests):
                self._turn()
        finally:
            self._give_up(request.id for request in requests)
        return [_finished(answer) for answer in answers]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
        """The answer's text, piece by piece. Leaving the loop early cancels the rest."""
        params = params or SamplingParams()
        request = self._request(prompt, params)
        shown = 0
        try:
            answer = self._submit(request, params)
            while request.id in self._open:
                self._turn()
                if len(answer.text) > shown:
                    piece = answer.text[shown:]
                    shown += len(piece)
                    yield piece
            if len(answer.text) > shown:  # ended in another caller's turn
                yield answer.text[shown:]
            _finished(answer)
        finally:
            self._give_up([request.id])

    def _request(self, prompt: str | Sequence[int], params: SamplingParams) -> Request:
        """Raises ValueError for what can never be answered."""
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
        refused = refusal(request, self._limits, Crowd(0, 0, 0.0))
        if refused is not None:
            raise ValueError(refused.message)
        if request.sampling.constraint is not None:
            self._check(request.sampling.constraint)
        return request

    def _check(self, constraint: Constraint) -> None:
        """Raises ValueError for what cannot be followed; found out in a process that is killed if it takes too long."""
        if not is_available():
            raise ValueError(MISSING)
        self._checker.check(constraint).result()

    def _submit(self, request: Request, params: SamplingParams) -> Completion:
        """Hand it to the engine, as soon as there is room."""
        answer = Completion(request.prompt)
        while True:
            with self._turned:
                if self._closed:
                    raise RuntimeError("This LLM is closed: make a new one.")
                if len(self._open) < self._max_open:
                    self._open[request.id] = _Open(answer, self.tokenizer.detokenizer(), StopMatcher(params.stops))
                    self._letters.put(ev.Arrived(request))
                    return answer
            self._turn()

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
            num_prompt_logprobs=params.prompt_logprobs,
            constraint=None if params.structured_outputs is None else params.structured_outputs.constraint,
        )

    def _turn(self, *, wait: bool = True) -> bool:
        """Drive until something happens, or let the thread that drives do so. False if there was nothing to run."""
        with self._turned:
            if self._turner is not None:
                self._turned.wait()
                return True
            self._turner = threading.get_ident()
        try:
            # not around a whole generator: the mode belongs to the thread, and the caller runs between two pieces
            with torch.inference_mode():
                ran = self._driver.turn()
                if not ran and wait and self._open:
                    self._driver.wait()
            return ran
        finally:
            with self._turned:
                self._turner = None
                self._turned.notify_all()

    def _give_up(self, request_ids: Iterable[str]) -> None:
        """Cancel those of them that are open, and turn until they are gone: whoever was interrupted holds no page."""
        given_up = [request_id for request_id in request_ids if request_id in self._open]
        for request_id in given_up:
            self._letters.put(ev.Cancelled(request_id))
        if self._turner == threading.get_ident():
            return  # a stream that is collected as garbage in the middle of a turn: the next turn reads the letter
        while any(request_id in self._open for request_id in given_up) and self._turn(wait=False):
            pass
        for request_id in given_up:  # an interrupt may have come before the engine had heard of it
            self._open.pop(request_id, None)

    def _tell(self, effect: ev.Admit | ev.Deliver | ev.End) -> None:
        if isinstance(effect, ev.Deliver):
            commit = effect.commit
            open_ = self._open.get(commit.request_id)
            if open_ is None or open_.stopped:
                return
            open_.answer.token_ids += commit.tokens
            open_.answer.logprobs += commit.logprobs
            open_.answer.prompt_logprobs += commit.prompt_logprobs
            passed = open_.matcher.feed(open_.detokenizer.feed(commit.tokens))
            open_.answer.text += passed.text
            if passed.stop is not None:
                open_.stopped = True
                self._letters.put(ev.Stopped(commit.request_id))
            return
        if isinstance(effect, ev.Admit):
            return
        record = effect.record
        open_ = self._open.pop(record.request_id, None)
        if open_ is None:
            return
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
