"""What this device does with this model, measured once at the engine's start in about two seconds.

Two results: the rates by which operators are cut into tiles, and the coefficients of the cost model. Owns how an
operator and a step are timed; which steps, and what follows from them, is `fitting`'s.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import partial
from typing import NamedTuple

import torch

from headway.core.cost import CostFit, Share
from headway.core.request import Request, Sampling
from headway.core.work import Segment, Work
from headway.kv.pool import KVPool
from headway.models.decoder import Decoder
from headway.placement.fitting import LONGEST_PROBES, Shape, fit_cost
from headway.placement.prices import Prices
from headway.stages.batch import PageLists, make_batch
from headway.stages.device import operators_for
from headway.stages.language import LanguageStage
from headway.stages.matrices import Matrices, Matrix
from headway.stages.operators import Operators
from headway.stages.sample import Sampler
from headway.stages.tiling import Glance, Rates, Span, Tiling

PROBE_S = 0.03
CACHE_BYTES = 512 << 20  # no processor's last cache is larger, yet
CALLS_S = 5e-4  # of a layer, for calling its operators
SEGMENT_CALLS_S = 1e-4  # of a layer and segment
CHECK_TOKENS = 32  # of the step that says whether kept prices still hold: weights and arithmetic both count in it


class _Sizes(NamedTuple):
    """Of what is timed: small enough for a short start, large enough to keep the device busy."""

    rows: int
    keys: int
    queries: int


_SIZES = {"cpu": _Sizes(128, 4096, 16), "cuda": _Sizes(2048, 4096, 1024)}
RECORDED_ROWS = 16  # of the widest step of tokens that is timed


class Calibration(NamedTuple):
    """What is measured: a model on its device, its pool (of which nobody uses a page yet), and the bound on tiles.

    Only the first `num_touched_pages` pages are read when rates are measured: reading others brings them into memory.
    """

    model: Decoder
    pool: KVPool
    num_touched_pages: int
    bound_s: float
    max_model_len: int
    matrices: Matrices

    def measure(self) -> Prices:
        rates = measure_rates(self.model, self.matrices, self.pool, self.num_touched_pages)
        stage = self._stage(rates)
        longest = LONGEST_PROBES[self.model.device.type]
        fitted = fit_cost(
            lambda shape: step_s(stage, shape), self.max_model_len, self._expected(rates), longest=longest
        )
        return Prices(rates, fitted.fit, fitted.error)

    def check(self, prices: Prices) -> float:
        """How many times as long as these prices say a short prompt takes."""
        stage = self._stage(prices.rates)
        shape = (Share(min(CHECK_TOKENS, self.max_model_len), 0),)
        step_s(stage, (Share(1, 0),))  # a warm-up
        return min(step_s(stage, shape) for _ in range(2)) / prices.fit.seconds(shape)

    def _expected(self, rates: Rates) -> CostFit:
        """What a step should take by the rates of its operators and a generous guess at what calling them costs.

        Rates are the best of many short runs, so a neighbour hardly shows in them.
        """
        config = self.model.config
        return CostFit(
            step_s=config.num_parameters * self.model.dtype.itemsize / rates.linear_bytes + CALLS_S * config.num_layers,
            token_s=2.0 * config.num_parameters / rates.linear_flops,
            segment_s=SEGMENT_CALLS_S * config.num_layers,
            pair_s=4.0 * config.num_layers * config.q_size / rates.attention_flops,
        )

    def _stage(self, rates: Rates) -> LanguageStage:
        sampler = Sampler(self.model.config.vocab_size)
        stage = LanguageStage(self.model, self.pool, Tiling(rates, self.bound_s), sampler, self.matrices)
        stage.record(RECORDED_ROWS)
        return stage


def measure_rates(model: Decoder, matrices: Matrices, pool: KVPool, num_touched_pages: int) -> Rates:
    """The rates of an undisturbed device: the better of all threads together and of one alone, each.

    Threads that must wait for each other are slower than one as long as a neighbour holds a core; but these rates
    decide for the engine's whole life how operators are cut, and the neighbour will go.
    """
    num_threads = torch.get_num_threads()
    together = rates_now(model, matrices, pool, num_touched_pages)
    if model.device.type != "cpu" or num_threads == 1:
        return together
    torch.set_num_threads(1)
    try:
        alone = rates_now(model, matrices, pool, num_touched_pages)
    finally:
        torch.set_num_threads(num_threads)
    return Rates(*map(max, astuple(together), astuple(alone)))


def rates_now(model: Decoder, matrices: Matrices, pool: KVPool, num_touched_pages: int) -> Rates:
    """With as many threads as the calling one has: what an undisturbed device does."""
    config, device, operators = model.config, model.device, operators_for(model, pool)
    sizes = _SIZES[device.type]
    x = torch.randn(sizes.rows, config.hidden_size, device=device).to(model.dtype)
    few = _more_than_a_cache([layer.gate_up for layer in matrices.layers])
    d_in, d_out = few[0].size
    whole = Span(0, d_out)
    linear_s = _best(lambda: few[0].columns(x, whole), device)
    stream_s = _best(lambda: [matrix.columns(x[:1], whole) for matrix in few], device)
    wide = torch.randn(sizes.rows, d_out, device=device).to(model.dtype)
    active_s = _best(lambda: operators.activate(wide), device)

    num_keys = min(sizes.keys, len(model.rope))
    num_queries = min(sizes.queries, num_keys)
    num_rows = min(sizes.rows, len(model.rope))
    probe = _Probe(model, operators, num_rows, len(model.rope), num_touched_pages)
    small_s = _best(lambda: probe.place(), device)
    probe = _Probe(model, operators, num_queries, num_keys, num_touched_pages)
    attention_s = _best(probe.looking(0), device)
    return Rates(
        linear_flops=2.0 * sizes.rows * d_in * d_out / linear_s,
        linear_bytes=sum(matrix.num_bytes for matrix in few) / stream_s,
        attention_flops=4.0 * num_queries * num_keys * config.q_size / attention_s,
        copy_bytes=_copy_rate(model, operators, num_touched_pages),
        elements=num_rows * (config.q_size + 2 * config.kv_size) / small_s,
        activations=wide.numel() / active_s,
        logits=config.vocab_size / _draw_s(model),
    )


def _draw_s(model: Decoder) -> float:
    """Seconds of drawing one of the likelier tokens on the host: with a penalty, so that it is there on any device."""
    sampler, generator = Sampler(model.config.vocab_size), torch.Generator().manual_seed(0)
    sampler.open(Request("probe", (0,), 2, 0.0, sampling=Sampling(presence_penalty=0.1, top_p=0.95)))
    logits_RV = torch.randn(1, model.config.vocab_size, generator=generator).to(model.device, model.dtype)
    return _best(lambda: sampler.draw(logits_RV, ["probe"], [1]), model.device)


def _more_than_a_cache(each: Sequence[Matrix]) -> Sequence[Matrix]:
    """The first of these that together fill what may lie between processor and memory, or all of them: as in a step,
    each is read when the others have been since."""
    total = 0
    for number, matrix in enumerate(each, start=1):
        total += matrix.num_bytes
        if total > CACHE_BYTES:
            return each[:number]
    return each


class _Probe:
    """The last rows of a prompt, with pages that are scattered over those that may be touched."""

    def __init__(self, model: Decoder, operators: Operators, num_rows: int, num_keys: int, num_touched: int) -> None:
        shape, config = operators.pool.shape, model.config
        num_pages = -(-num_keys // shape.page_tokens)
        generator = torch.Generator().manual_seed(0)
        pages = torch.randint(0, max(1, num_touched), (num_pages,), generator=generator).tolist()
        first = num_keys - num_rows
        segment = Segment("probe", (0,) * num_rows, first, first, tuple(pages), ())
        self.batch = make_batch([segment], PageLists(), shape.page_tokens, model.device)
        row_size = config.q_size + 2 * config.kv_size
        self._qkv = torch.randn(num_rows, row_size, device=model.device).to(model.dtype)
        self._q = torch.randn(num_rows, config.num_heads, config.head_size, device=model.device).to(model.dtype)
        self._y = torch.empty_like(self._q)
        self._model, self._operators = model, operators
        whole = Span(0, config.num_kv_heads)
        self._gathering = Glance(0, Span(0, 0), first, whole)
        self._glance = Glance(0, Span(0, num_rows), first, whole)

    def place(self) -> None:
        model, rows = self._model, slice(0, len(self._qkv))
        self._operators.place(self.batch, 0, model.layers[0], model.rope, self._qkv, rows)

    def looking(self, layer: int) -> Callable[[], None]:
        """Queries look at their keys; what must be gathered for that is gathered beforehand."""
        operators = self._operators
        look = operators.looking(self.batch, layer, self._q, self._y)
        if operators.gathers:
            look(operators.prepare(self.batch, [self._gathering]))
        prepared = operators.prepare(self.batch, [self._glance])
        return lambda: look(prepared)


def _copy_rate(model: Decoder, operators: Operators, num_touched_pages: int) -> float:
    """Bytes per second of gathering scattered pages that are in no cache, or of reading them for one query where
    nothing is gathered: another layer each time."""
    shape, device = operators.pool.shape, model.device
    num_pages = max(
        1, min(num_touched_pages, _SIZES[device.type].keys // shape.page_tokens, len(model.rope) // shape.page_tokens)
    )
    probe = _Probe(model, operators, 1, num_pages * shape.page_tokens, num_touched_pages)
    table = probe.batch.tables[0]
    seconds = []
    for number in range(8):
        layer = number % shape.num_layers
        if operators.gathers:
            read: Callable[[], object] = partial(operators.pool.read, layer, table)
        else:
            read = probe.looking(layer)
        begun = time.perf_counter()
        read()
        wait_for(device)
        seconds.append(time.perf_counter() - begun)
    return num_pages * shape.page_bytes / shape.num_layers / statistics.median(seconds)


def step_s(stage: LanguageStage, shape: Shape, name: str = "probe") -> float:
    """Seconds of one step of this shape, on the first pages of the pool: only while nobody else uses them. Two at once
    have other names; they overwrite each other's pages, of which nobody reads an answer."""
    pool, vocab_size, device = stage.pool.shape, stage.model.config.vocab_size, stage.model.device
    segments, first_page = [], 0
    for index, (num_tokens, context) in enumerate(shape):
        num_pages = -(-(context + num_tokens) // pool.page_tokens)
        pages = tuple(page % pool.num_pages for page in range(first_page, first_page + num_pages))
        tokens = tuple(token % vocab_size for token in range(1, num_tokens + 1))
        segments.append(Segment(f"{name}{index}", tokens, context, context, pages, (num_tokens - 1,)))
        first_page += num_pages
    for segment, (num_tokens, context) in zip(segments, shape, strict=True):
        prompt = (0,) * (context + num_tokens)
        stage.open(Request(segment.request_id, prompt, 1, 0.0, sampling=Sampling(temperature=0.0)))
    wait_for(device)
    begun = time.perf_counter()
    for _ in stage.run(Work(0, "language", tuple(segments))):
        pass
    wait_for(device)
    seconds = time.perf_counter() - begun
    for segment in segments:
        stage.close(segment.request_id)
    return seconds


def _best(operation: Callable[[], object], device: torch.device) -> float:
    """Seconds of the least disturbed of a few runs: after a warm-up, until `PROBE_S` are spent, at least twice."""
    best, spent = float("inf"), 0.0
    for number in range(13):
        begun = time.perf_counter()
        operation()
        wait_for(device)
        seconds = time.perf_counter() - begun
        spent += seconds
        best = min(best, seconds)
        if number >= 2 and spent > PROBE_S:
            break
    return best


def wait_for(device: torch.device) -> None:
    """Until it has done all it was asked to do; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
