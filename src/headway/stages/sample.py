"""From logits to tokens: one draw per row, by the request's own settings and its own random stream.

Owns the sampling sessions (what each open request has drawn so far) and the arithmetic of drawing; knows no model, page
or schedule. A row is drawn on its own, so no token depends on what else is in the batch. The order of operations is
vLLM's: logprobs of the raw logits; then logit_bias, penalties, min_tokens, the constraint's mask, temperature, min_p,
top_k, top_p.

Every step is linear in the vocabulary, but for a sort of few candidates: with 150,000 tokens a draw takes between a
quarter of a millisecond and two, a greedy one a tenth of that. Where logits are on a device, draws that ask for nothing
besides are made there. Shape legend: R rows, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headway.core.request import Constraint, Request, Sampling
from headway.core.work import Commit, Failure, TokenLogprobs
from headway.grammar.limits import ConstraintError
from headway.grammar.matcher import Matcher
from headway.grammar.notation import MISSING

Floats = NDArray[np.float32]
Find = Callable[[Tensor], tuple[list[int], list[float]]]
MakeMatcher = Callable[[Constraint], Matcher]  # may raise ConstraintError

_BLOCK = 1024  # tokens whose mass is summed before looking for the drawn one
_HEAVIEST = 2.0**40  # of whole weights: a million million of them may be added
_LEAST_TEMPERATURE = 1e-6  # below it only equal logits share a draw, and float32 soon overflows
_NOT_FINITE = Failure(
    "not_finite", "The model's logits are not finite: its weights are damaged or overflow in this dtype."
)
_STUCK = "Nothing that the constraint allows can be written with this model's tokens."


def no_matcher(constraint: Constraint) -> Matcher:
    """Of an engine without the extra."""
    raise ConstraintError(MISSING)


class Sampler:
    """The sessions of all open requests."""

    def __init__(self, vocab_size: int, make_matcher: MakeMatcher = no_matcher) -> None:
        self.vocab_size = vocab_size
        self._make_matcher = make_matcher
        self._sessions: dict[str, _Session] = {}

    def open(self, request: Request) -> None:
        """A constraint that cannot be followed fails its request at the first draw."""
        session = self._sessions[request.id] = _Session(request, self.vocab_size)
        if request.sampling.constraint is not None:
            try:
                session.matcher = self._make_matcher(request.sampling.constraint)
            except ConstraintError as error:
                session.broken = _not_followed(error)

    def close(self, request_id: str) -> None:
        """Forget a request; one that was never opened is no error, since refusals end requests too."""
        self._sessions.pop(request_id, None)

    def draw_there(
        self, logits_RV: Tensor, request_ids: Sequence[str], positions: Sequence[int]
    ) -> tuple[tuple[Commit, ...], list[int]]:
        """What `draw` does, where the logits are, as far as that can be: for who wants the likeliest token or a free
        draw, and nothing besides. A few kernels and one transfer, however many rows there are. Returns also the rows of
        all others, and of those that are not finite: they are for `draw`."""
        turns = self._turns(request_ids, positions)
        drawing = {row: session for row, (session, num_drawn) in enumerate(turns) if num_drawn >= 0}
        plain = [row for row, session in drawing.items() if session.is_plain]
        free = {row: session for row, session in drawing.items() if session.is_free}
        tokens = {**_best(logits_RV, plain, best_on_device), **_drawn(logits_RV, free)}
        commits = tuple(drawing[row].commit(token) for row, token in tokens.items())
        return commits, [row for row in range(len(turns)) if row not in tokens]

    def draw(self, logits_RV: Tensor, request_ids: Sequence[str], positions: Sequence[int]) -> tuple[Commit, ...]:
        """Draw the token at `positions[r]` of request `request_ids[r]` from row r; one row per request. Where that is
        within the prompt, the token is known and the row tells how likely it was; of such rows there may be many.

        A row that is not finite costs nobody but its own request, whose commit then has a failure and no token.
        The first token's position is the prompt's length, and each position follows the last. A position may be drawn
        again, after a step that was given up: what was drawn there and behind is forgotten first.
        """
        turns = self._turns(request_ids, positions)
        plain = [row for row, (session, num_drawn) in enumerate(turns) if num_drawn >= 0 and session.is_plain]
        best = _best(logits_RV, plain, best_on_host)
        commits = []
        for row, (session, num_drawn) in enumerate(turns):
            if row in best:
                commits.append(session.commit(best[row]))
            elif num_drawn >= 0:
                commits.append(session.draw(_floats(logits_RV[row])))
            else:
                commits.append(session.score(_floats(logits_RV[row]), positions[row]))
        return tuple(commits)

    def _turns(self, request_ids: Sequence[str], positions: Sequence[int]) -> "list[tuple[_Session, int]]":
        """Whose turn it is, row by row, with how many tokens were drawn before; below 0 within the prompt."""
        turns = []
        for request_id, position in zip(request_ids, positions, strict=True):
            session = self._sessions[request_id]
            num_drawn = position - len(session.request.prompt)
            if num_drawn >= 0:
                session.rewind(num_drawn)
            turns.append((session, num_drawn))
        return turns


@dataclass(slots=True)
class _Session:
    """What one request has drawn, with its settings in the form that arithmetic wants."""

    request: Request
    vocab_size: int
    outputs: list[int] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)  # of `outputs`
    prompt_ids: NDArray[np.int64] = field(init=False)
    stop_ids: list[int] = field(init=False)
    bias: dict[int, float] = field(init=False)
    matcher: Matcher | None = None
    broken: Failure | None = None

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        repeats = sampling.repetition_penalty != 1
        self.prompt_ids = np.unique(np.array(self.request.prompt if repeats else (), dtype=np.int64))
        # an id that the model cannot draw can be neither stopped at nor biased
        self.stop_ids = [token for token in self.request.stop_ids if 0 <= token < self.vocab_size]
        self.bias = {token: bias for token, bias in sampling.logit_bias if 0 <= token < self.vocab_size}

    @property
    def is_plain(self) -> bool:
        """Whether the next token is that of the highest logit, and nothing more is asked."""
        sampling = self.request.sampling
        return sampling.temperature == 0 and sampling.num_logprobs is None and not self.changes_scores

    @property
    def is_free(self) -> bool:
        """Whether the next token is a draw by the logits as they are, and nothing more is asked."""
        sampling = self.request.sampling
        return sampling.temperature > 0 and sampling.num_logprobs is None and not self.changes_scores

    @property
    def changes_scores(self) -> bool:
        sampling = self.request.sampling
        if sampling.constraint is not None:
            return True
        penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty - 1)
        return bool(self.bias) or any(penalties) or self.masks_stops

    @property
    def masks_stops(self) -> bool:
        return bool(self.stop_ids) and len(self.outputs) < self.request.min_tokens

    def rewind(self, num_drawn: int) -> None:
        assert 0 <= num_drawn <= len(self.outputs), f"{self.request.id}: token {num_drawn} after {len(self.outputs)}"
        if self.matcher is not None:
            self.matcher.rollback(len(self.outputs) - num_drawn)
        while len(self.outputs) > num_drawn:
            token = self.outputs.pop()
            self.counts[token] -= 1
            if not self.counts[token]:
                del self.counts[token]

    def commit(self, token: int, logprobs: tuple[TokenLogprobs, ...] = ()) -> Commit:
        self.outputs.append(token)
        self.counts[token] = self.counts.get(token, 0) + 1
        if self.matcher is None:
            return Commit(self.request.id, (token,), logprobs)
        self.matcher.accept(token)
        return Commit(self.request.id, (token,), logprobs, complete=self.matcher.is_complete)

    @property
    def num_drawn(self) -> int:
        return len(self.outputs)

    def draw(self, logits_V: Floats) -> Commit:
        sampling = self.request.sampling
        if self.broken is not None:
            return Commit(self.request.id, (), failure=self.broken)
        scores = self._scores(logits_V) if self.changes_scores else logits_V
        if self.matcher is not None:
            try:
                scores[~self._allowed(self.matcher)] = -np.inf
            except ConstraintError as error:
                return Commit(self.request.id, (), failure=_not_followed(error))
        best = int(scores.argmax())
        if not (_is_finite(scores[best]) and _is_finite(logits_V.max())):  # a mask may hide what a logprob would show
            return Commit(self.request.id, (), failure=_NOT_FINITE)
        if sampling.temperature == 0:
            token = best
        else:
            weights = np.exp((scores - scores[best]) / np.float32(max(sampling.temperature, _LEAST_TEMPERATURE)))
            drop_unlikely(weights, sampling)
            token = inverse_cdf(weights, uniform(sampling.seed, self.num_drawn))
        asked = sampling.num_logprobs
        return self.commit(token, () if asked is None else (token_logprobs(logits_V, token, asked),))

    def score(self, logits_V: Floats, position: int) -> Commit:
        """How likely the prompt's own token at `position` was."""
        asked = self.request.sampling.num_prompt_logprobs
        assert asked is not None, f"{self.request.id}: nobody asked about its prompt"
        if not _is_finite(logits_V.max()):
            return Commit(self.request.id, (), failure=_NOT_FINITE)
        scored = token_logprobs(logits_V, self.request.prompt[position], asked)
        return Commit(self.request.id, (), prompt_logprobs=(scored,))

    def _allowed(self, matcher: Matcher) -> NDArray[np.bool_]:
        """What the constraint lets come next, and min_tokens: unless that would leave nothing to come."""
        allowed_V = matcher.allowed()
        if self.masks_stops:
            more_V = allowed_V.copy()
            more_V[self.stop_ids] = False
            allowed_V = more_V if more_V.any() else allowed_V
        if not allowed_V.any():
            raise ConstraintError(_STUCK)
        return allowed_V

    def _scores(self, logits_V: Floats) -> Floats:
        """A copy of the logits with bias, penalties and the mask of min_tokens applied."""
        sampling = self.request.sampling
        scores = logits_V.copy()
        if self.bias:
            scores[list(self.bias)] += np.array(list(self.bias.values()), dtype=np.float32)
        drawn = np.fromiter(self.counts, dtype=np.int64, count=len(self.counts))
        if sampling.repetition_penalty != 1:
            seen = np.union1d(self.prompt_ids, drawn)
            penalty = np.float32(sampling.repetition_penalty)
            scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            counts = np.fromiter(self.counts.values(), dtype=np.float32, count=len(self.counts))
            scores[drawn] -= counts * np.float32(sampling.frequency_penalty) + np.float32(sampling.presence_penalty)
        if self.masks_stops and self.matcher is None:
            scores[self.stop_ids] = -np.inf
        return scores


def _not_followed(error: ConstraintError) -> Failure:
    return Failure("constraint_failed", str(error))


def uniform(seed: int, num_drawn: int) -> float:
    """The number in [0, 1) that draws token `num_drawn`: Philox with the seed as key and the token as counter."""
    bits = np.random.Philox(key=seed % 2**64, counter=num_drawn).random_raw()
    return (int(bits) >> 11) * 2.0**-53


def drop_unlikely(weights_V: Floats, sampling: Sampling) -> None:
    """Set to zero the weight of every token that min_p, top_k or top_p excludes. The heaviest weight is 1.

    Of equal weights the lower ids are kept, so exactly `top_k` tokens remain, and for top_p the fewest that reach it.
    """
    if sampling.min_p > 0:
        weights_V[weights_V < np.float32(sampling.min_p)] = 0
    if 0 < sampling.top_k < len(weights_V):
        _keep(weights_V, _heaviest(weights_V, num_tokens=sampling.top_k))
    if sampling.top_p < 1:
        _keep(weights_V, _heaviest(weights_V[weights_V > 0], share=sampling.top_p))


def inverse_cdf(weights_V: Floats, u: float) -> int:
    """The token at share `u` of the total weight, counting through the vocabulary in order of ids."""
    starts = np.arange(0, len(weights_V), _BLOCK)
    totals = np.cumsum(np.add.reduceat(weights_V, starts, dtype=np.float64))
    target = u * totals[-1]
    block = _first_above(totals, target)
    if block:
        target -= totals[block - 1]
    start = block * _BLOCK
    return start + _first_above(np.cumsum(weights_V[start : start + _BLOCK], dtype=np.float64), target)


def token_logprobs(logits_V: Floats, token: int, num_top: int) -> TokenLogprobs:
    """Log-probability of `token` and the `num_top` best, by the raw logits."""
    best = logits_V.max()
    weights = np.exp(logits_V - best)
    log_total = float(best) + float(np.log(weights.sum(dtype=np.float64)))
    num_top = min(num_top, len(logits_V))
    if num_top == 0:
        return TokenLogprobs(float(logits_V[token]) - log_total, ())
    if num_top == 1:  # what evaluations ask of every token of a prompt
        ids = np.array([logits_V.argmax()])
    else:
        ids = np.flatnonzero(weights >= _heaviest(weights, num_tokens=num_top).least)
        ids = ids[np.argsort(-logits_V[ids], kind="stable")][:num_top]
    top = tuple((int(i), float(logits_V[i]) - log_total) for i in ids)
    return TokenLogprobs(float(logits_V[token]) - log_total, top)


def _best(logits_RV: Tensor, rows: Sequence[int], find: Find) -> dict[int, int]:
    """The token of the highest logit in each of these rows, of equal ones the lowest id; none for a bad row."""
    if not rows:
        return {}
    tokens, highest = find(logits_RV[list(rows)] if len(rows) < len(logits_RV) else logits_RV)
    found = zip(rows, tokens, highest, strict=True)
    return {row: token for row, token, logit in found if _is_finite(logit)}


def best_on_host(logits_RV: Tensor) -> tuple[list[int], list[float]]:
    """Token and logit of each row's highest: NumPy's argmax is ten times as fast as torch's."""
    tokens, highest = [], []
    for row in logits_RV:
        values = _floats(row)
        tokens.append(int(values.argmax()))
        highest.append(float(values[tokens[-1]]))
    return tokens, highest


def best_on_device(logits_RV: Tensor) -> tuple[list[int], list[float]]:
    """The same in two kernels and two short transfers, for all rows at once."""
    tokens = logits_RV.argmax(dim=-1, keepdim=True)
    return tokens.flatten().tolist(), logits_RV.gather(-1, tokens).flatten().tolist()


def _drawn(logits_RV: Tensor, sessions: "Mapping[int, _Session]") -> dict[int, int]:
    """The token that each of these requests draws from its row, where the rows are; none for a bad row."""
    if not sessions:
        return {}
    samplings = [session.request.sampling for session in sessions.values()]
    numbers = [uniform(session.request.sampling.seed, session.num_drawn) for session in sessions.values()]
    tokens = draw_on_device(logits_RV[list(sessions)], samplings, numbers).tolist()
    return {row: token for row, token in zip(sessions, tokens, strict=True) if token >= 0}


def draw_on_device(logits_RV: Tensor, samplings: Sequence[Sampling], numbers: Sequence[float]) -> Tensor:
    """The draws that sessions make on the host, where the logits are: int64, -1 for a row that is not finite.

    Weights are whole numbers, the heaviest 2^40, so that a row's sums are the same in whatever order a device adds, and
    whatever rows are beside it.
    """

    def column(values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits_RV.device)[:, None]

    scores_RV = logits_RV.float()
    best_R1 = scores_RV.amax(-1, keepdim=True)
    temperatures = [max(sampling.temperature, _LEAST_TEMPERATURE) for sampling in samplings]
    weights_RV = torch.exp((scores_RV - best_R1) / column(temperatures, torch.float32)).mul(_HEAVIEST).long()
    if any(sampling.min_p > 0 for sampling in samplings):
        weights_RV *= weights_RV >= _HEAVIEST * column([sampling.min_p for sampling in samplings])
    most = logits_RV.shape[1]
    cut = [row for row, sampling in enumerate(samplings) if 0 < sampling.top_k < most or sampling.top_p < 1]
    if cut:
        top_k = column([samplings[row].top_k or most for row in cut], torch.int64)
        top_p = column([samplings[row].top_p for row in cut])
        weights_RV[cut] = _likeliest(weights_RV[cut], top_k, top_p)
    sums_RV = weights_RV.cumsum(-1)
    targets_R1 = (column(numbers) * sums_RV[:, -1:]).long()
    tokens_R1 = torch.searchsorted(sums_RV, targets_R1, right=True)
    return torch.where(best_R1.isfinite(), tokens_R1, -1)[:, 0]


def _likeliest(weights_RV: Tensor, top_k_R1: Tensor, top_p_R1: Tensor) -> Tensor:
    """These weights, 0 beyond the `top_k` heaviest and the fewest of those that hold `top_p` of their sum; of equal
    ones the lower ids go first."""
    sorted_RV, ids_RV = torch.sort(weights_RV, dim=-1, descending=True, stable=True)
    sorted_RV *= torch.arange(weights_RV.shape[1], device=weights_RV.device) < top_k_R1
    sums_RV = sorted_RV.cumsum(-1)
    sorted_RV *= sums_RV - sorted_RV < top_p_R1 * sums_RV[:, -1:]
    return torch.zeros_like(weights_RV).scatter(-1, ids_RV, sorted_RV)


def _floats(row_V: Tensor) -> Floats:
    """A row as float32 on the host; a view where it already is."""
    values: Floats = row_V.detach().float().cpu().numpy()
    return values


def _is_finite(highest: float | np.float32) -> bool:
    """A NaN anywhere in a row becomes its maximum, so the highest score speaks for all."""
    return bool(np.isfinite(highest))


class _Heaviest(NamedTuple):
    """The `number` heaviest tokens, of which the lightest weighs `least`."""

    number: int
    least: np.float32


def _heaviest(weights_V: Floats, *, num_tokens: int | None = None, share: float = 1.0) -> _Heaviest:
    """The `num_tokens` heaviest, or else the fewest that hold this share of the total weight.

    Bits of floats that are not negative sort as the floats do: a histogram over the upper sixteen finds the few tokens
    among which the border lies, and only those are sorted.
    """
    keys = (weights_V.view(np.uint32) >> 16).astype(np.int64)
    by_count = num_tokens is not None
    sums = np.cumsum(np.bincount(keys, weights=None if by_count else weights_V)[::-1])  # from the heaviest bucket down
    amount = num_tokens if num_tokens is not None else share * sums[-1]
    bucket = int(np.searchsorted(sums, amount))
    key = len(sums) - 1 - bucket
    inside = np.sort(weights_V[keys == key])[::-1]
    before = sums[bucket - 1] if bucket else 0
    steps = before + np.cumsum(np.ones_like(inside) if by_count else inside, dtype=np.float64)
    last = min(int(np.searchsorted(steps, amount)), len(inside) - 1)
    return _Heaviest(int(np.count_nonzero(keys > key)) + last + 1, inside[last])


def _keep(weights_V: Floats, kept: _Heaviest) -> None:
    weights_V *= weights_V >= kept.least  # faster than a mask, whose pattern no branch predictor guesses
    surplus = int(np.count_nonzero(weights_V)) - kept.number
    if surplus > 0:  # equal to the lightest one
        weights_V[np.flatnonzero(weights_V == kept.least)[-surplus:]] = 0


def _first_above(sums: NDArray[np.float64], target: float) -> int:
    """Index of the first running sum above `target`; rounding may put the target at the end, which is still drawn."""
    last = np.searchsorted(sums, sums[-1], side="left")
    return int(min(np.searchsorted(sums, target, side="right"), last))
