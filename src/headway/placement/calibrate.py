"""What this device does with this model, measured once at the engine's start in well under two seconds.

Two results: the rates by which operators are cut into tiles, and the coefficients of the cost model.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import astuple

import torch

from headway.core.cost import CostFit
from headway.core.request import Request, Sampling
from headway.core.work import Segment, Work
from headway.kv.pool import KVPool
from headway.models.attention import attend
from headway.models.decoder import Decoder, position_qk, split_qkv
from headway.models.layers import silu_mul
from headway.stages.language import LanguageStage
from headway.stages.tiling import Rates

PROBE_ROWS = 128
PROBE_KEYS = 1024
LONGEST_PROBE_S = 0.6
PROBE_S = 0.03


def measure_rates(model: Decoder, pool: KVPool, num_touched_pages: int) -> Rates:
    """The rates of an undisturbed device: the better of all threads together and of one alone, each.

    Threads that must wait for each other are slower than one as long as a neighbour holds a core; but these rates
    decide for the engine's whole life how operators are cut, and the neighbour will go.
    """
    num_threads = torch.get_num_threads()
    together = _measure_rates(model, pool, num_touched_pages)
    if model.device.type != "cpu" or num_threads == 1:
        return together
    torch.set_num_threads(1)
    try:
        alone = _measure_rates(model, pool, num_touched_pages)
    finally:
        torch.set_num_threads(num_threads)
    return Rates(*map(max, astuple(together), astuple(alone)))


def _measure_rates(model: Decoder, pool: KVPool, num_touched_pages: int) -> Rates:
    """Seconds per unit of each kind of operator: what an undisturbed device does.

    Only the first `num_touched_pages` pages are read: reading the others would bring them into memory.
    """
    config, layer, device = model.config, model.layers[0], model.device
    x = torch.randn(PROBE_ROWS, config.hidden_size, device=device).to(model.dtype)
    qkv = torch.randn(PROBE_ROWS, config.q_size + 2 * config.kv_size, device=device).to(model.dtype)
    q, k, _ = split_qkv(config, qkv)
    cos, sin = model.rope[:PROBE_ROWS].unbind(1) if len(model.rope) >= PROBE_ROWS else _repeated(model)
    keys = torch.randn(config.num_kv_heads, PROBE_KEYS, config.head_size, device=device).to(model.dtype)
    few_layers = model.layers[:4]

    d_in, d_out = layer.gate_up.size
    linear_s = _best(lambda: layer.gate_up(x), device)
    stream_s = _best(lambda: [each.gate_up(x[:1]) for each in few_layers], device)
    attention_s = _best(lambda: attend(q[:16], keys, keys, 0, PROBE_KEYS - 16, None), device)
    wide = layer.gate_up(x)
    active_s = _best(lambda: silu_mul(wide), device)
    small_s = _best(lambda: position_qk(config, layer, q, k, cos, sin), device)
    return Rates(
        linear_flops=2.0 * PROBE_ROWS * d_in * d_out / linear_s,
        linear_bytes=len(few_layers) * layer.gate_up.weight.nbytes / stream_s,
        attention_flops=4.0 * 16 * PROBE_KEYS * config.q_size / attention_s,
        copy_bytes=_copy_rate(pool, num_touched_pages, device),
        elements=0.5 * qkv.numel() / small_s,  # the store to pages comes on top of the measured half
        activations=wide.numel() / active_s,
    )


def _copy_rate(pool: KVPool, num_touched_pages: int, device: torch.device) -> float:
    """Bytes per second of gathering scattered pages that are in no cache: other pages and another layer each time."""
    shape = pool.shape
    num_pages = max(1, min(num_touched_pages, PROBE_KEYS // shape.page_tokens))
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for number in range(8):
        table = torch.randint(0, max(1, num_touched_pages), (num_pages,), generator=generator).to(device)
        begun = time.perf_counter()
        pool.read(number % shape.num_layers, table)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return num_pages * shape.page_bytes / shape.num_layers / statistics.median(seconds)


def fit_cost(stage: LanguageStage, rates: Rates, max_model_len: int) -> CostFit:
    """Run a few steps on pages that nobody uses yet, and solve for the coefficients of `core.cost`."""
    config = stage.model.config
    pair_s = 4.0 * config.num_layers * config.q_size / rates.attention_flops
    one_s = _step_s(stage, (1,))
    eight_s = _step_s(stage, (1,) * 8)
    num_tokens, long_s = 16, one_s
    while 2 * num_tokens < min(max_model_len, 1024) and long_s < LONGEST_PROBE_S / 4:
        num_tokens *= 2
        long_s = _step_s(stage, (num_tokens,), repeats=1)
    segment_s = max(0.0, (eight_s - one_s) / 7)
    token_s = max(1e-7, long_s - pair_s * num_tokens**2 / 2 - segment_s) / num_tokens
    return CostFit(
        step_s=0.0, stream_s=max(0.0, one_s - segment_s), token_s=token_s, segment_s=segment_s, pair_s=pair_s
    )


def _step_s(stage: LanguageStage, lengths: tuple[int, ...], repeats: int = 2) -> float:
    """Seconds of one step of prompts of these lengths, the better of `repeats` after a warm-up."""
    page_tokens = stage.pool.shape.page_tokens
    segments, first_page = [], 0
    for index, length in enumerate(lengths):
        num_pages = -(-length // page_tokens)
        pages = tuple(page % stage.pool.shape.num_pages for page in range(first_page, first_page + num_pages))
        tokens = tuple(token % stage.model.config.vocab_size for token in range(1, length + 1))
        segments.append(Segment(f"probe{index}", tokens, 0, 0, pages, (length - 1,)))
        first_page += num_pages
    for segment in segments:
        stage.open(Request(segment.request_id, segment.tokens, 1, 0.0, sampling=Sampling(temperature=0.0)))

    def step() -> None:
        for _ in stage.run(Work(0, "language", tuple(segments))):
            pass

    seconds = _best(step, stage.model.device, repeats)
    for segment in segments:
        stage.close(segment.request_id)
    return seconds


def _best(operation: Callable[[], object], device: torch.device, repeats: int = 12) -> float:
    """Seconds of the least disturbed of a few runs: after a warm-up, until `PROBE_S` are spent, at least twice."""
    best, spent = float("inf"), 0.0
    for number in range(repeats + 1):
        begun = time.perf_counter()
        operation()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begun
        spent += seconds
        best = min(best, seconds)
        if number >= 2 and spent > PROBE_S:
            break
    return best


def _repeated(model: Decoder) -> tuple[torch.Tensor, torch.Tensor]:
    """The rope table of a model whose context is shorter than the probe."""
    cos, sin = model.rope[torch.arange(PROBE_ROWS, device=model.device) % len(model.rope)].unbind(1)
    return cos, sin
