"""Decides token by token what may come next, by llguidance; everything else knows the `Matcher` contract alone.

A grammar is built from its source once and copied for each request, which costs microseconds. Building and deciding are
bounded by llguidance's own limits, and let other threads run meanwhile.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from headway.core.request import Constraint
from headway.grammar.limits import NAMES, ConstraintError
from headway.grammar.notation import notation

if TYPE_CHECKING:
    from llguidance import LLMatcher

log = logging.getLogger("headway.grammar")

MAX_KEPT = 64  # grammars
MAX_KEPT_CHARACTERS = 2**20  # of their sources: what was made of them is some multiple
_LIMITS: dict[str, Any] = {
    "step_lexer_fuel": 100_000,  # a few milliseconds of one draw
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,  # one or two kilobytes each
    "max_grammar_size": 200_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}


class Matcher(Protocol):
    """One answer under a constraint."""

    @property
    def is_complete(self) -> bool:
        """Nothing may follow what was accepted."""

    def allowed(self) -> NDArray[np.bool_]:
        """For every token of the vocabulary, whether it may come next; an end token may where an answer may end.

        Raises ConstraintError if the constraint turns out to be too costly to follow.
        """

    def accept(self, token: int) -> None:
        """It was drawn, being allowed."""

    def rollback(self, num_tokens: int) -> None:
        """Forget the last accepted ones."""


class Compiler:
    """Makes matchers for one vocabulary. Several threads may ask at once."""

    def __init__(self, tokenizer: str, vocab_size: int, end_ids: Sequence[int]) -> None:
        """`tokenizer` is the text of a tokenizer.json. Without `end_ids` an answer ends where nothing can follow."""
        from llguidance import LLParserLimits, LLTokenizer

        self.vocab_size = vocab_size
        self.end_ids = frozenset(token for token in end_ids if token < vocab_size)
        ends = sorted(self.end_ids) or None  # llguidance wants one, and finds one if need be
        self._tokenizer = LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=ends)
        self._never = [token for token in self._tokenizer.eos_tokens if token not in self.end_ids]
        self._limits = LLParserLimits(**_LIMITS)
        self._lock = threading.Lock()
        self._kept: OrderedDict[Constraint, LLMatcher | ConstraintError] = OrderedDict()
        self._num_characters = 0

    def matcher(self, constraint: Constraint) -> Matcher:
        """At the beginning of an answer. Raises ConstraintError."""
        with self._lock:
            made = self._kept.get(constraint)
            if made is not None:
                self._kept.move_to_end(constraint)
        if made is None:
            made = self._keep(constraint, self._made(constraint))
        if isinstance(made, ConstraintError):
            raise ConstraintError(str(made))
        return self._guided(made.deep_copy())

    def build(self, constraint: Constraint) -> "LLMatcher":
        """A grammar from its source, every time anew. Raises ConstraintError with what is wrong with it."""
        from llguidance import LLMatcher

        name = NAMES[constraint.kind]
        try:
            matcher = LLMatcher(self._tokenizer, notation(constraint), log_level=0, limits=self._limits)
        except ValueError as error:
            raise ConstraintError(f"The {name} cannot be understood: {_brief(str(error))}.") from error
        if matcher.is_error():
            raise ConstraintError(f"The {name} cannot be followed: {_brief(matcher.get_error())}.")
        return matcher

    def check(self, constraint: Constraint) -> None:
        """Build it and look at its first step. Raises ConstraintError."""
        matcher = self._guided(self.build(constraint))
        starts = matcher.allowed()
        starts[list(self.end_ids)] = False
        if not starts.any():
            raise ConstraintError(f"The {NAMES[constraint.kind]} allows no answer that this model could write.")

    def _guided(self, matcher: "LLMatcher") -> "GuidedMatcher":
        return GuidedMatcher(matcher, self.vocab_size, self.end_ids, self._never)

    def _made(self, constraint: Constraint) -> "LLMatcher | ConstraintError":
        try:
            return self.build(constraint)
        except ConstraintError as error:
            return error
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the compiled library is none of ours, and no Exception
            log.exception("A constraint cannot be built.")
            return ConstraintError(f"The {NAMES[constraint.kind]} cannot be built: {_brief(str(error))}.")

    def _keep(self, constraint: Constraint, made: "LLMatcher | ConstraintError") -> "LLMatcher | ConstraintError":
        with self._lock:
            if constraint not in self._kept:
                self._kept[constraint] = made
                self._num_characters += len(constraint.text)
            while len(self._kept) > 1 and (len(self._kept) > MAX_KEPT or self._num_characters > MAX_KEPT_CHARACTERS):
                oldest, _ = self._kept.popitem(last=False)
                self._num_characters -= len(oldest.text)
        return made


class GuidedMatcher:
    """llguidance's matcher as the contract has it. It never sees an end token."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int, end_ids: frozenset[int], never: list[int]) -> None:
        self._matcher = matcher
        self._never = never  # allowed
        self._vocab_size = vocab_size
        self._end_ids = end_ids
        self._has_ended = False

    @property
    def is_complete(self) -> bool:
        return self._has_ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    def allowed(self) -> NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        complaint = self._matcher.get_error()
        if complaint.startswith("NoExtension"):
            return np.zeros(self._vocab_size, dtype=np.bool_)
        if complaint:
            raise ConstraintError(f"The constraint cannot be followed further: {_brief(complaint)}.")
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        allowed[self._never] = False
        return allowed

    def accept(self, token: int) -> None:
        if token in self._end_ids:
            self._has_ended = True
        else:
            accepted = self._matcher.consume_token(token)
            assert accepted, f"token {token} is not allowed"

    def rollback(self, num_tokens: int) -> None:
        if self._has_ended and num_tokens:
            self._has_ended = False
            num_tokens -= 1
        if num_tokens:
            rolled_back = self._matcher.rollback(num_tokens)
            assert rolled_back, f"{num_tokens} tokens cannot be taken back"


def _brief(complaint: str) -> str:
    lines = [line.strip() for line in complaint.partition("<non-verbose/>")[0].splitlines()]
    return " ".join(filter(None, lines))[:300].rstrip(". ")
