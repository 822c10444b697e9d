"""What a CUDA device does with our stages, against what it could do: `python -m headway.bench.gpu`.

Prefill as a share of the rate at which the device multiplies large bfloat16 matrices, decode as a share of the rate at
which it reads memory, both measured in the same run, and both beside transformers with weights of the same shape, in
turn. Then, for several depths of launching ahead: how long an urgent request waits until the device is free for it
while long prompts are read, and what the depth is worth in throughput.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track

from headway.bench import report
from headway.bench.blocking import blocked, mixture
from headway.bench.score import quantile
from headway.config import EngineSettings
from headway.core.cost import Share
from headway.core.settings import SchedulerSettings
from headway.models.config import DecoderConfig
from headway.placement.calibrate import step_s
from headway.placement.engine import Engine, build_engine

COMMAND = "python -m headway.bench.gpu"
MODELS = ("random:llama-3.2-1b", "random:llama-3.1-8b")
PREFILLS = (512, 2048, 8192)
BATCHES = (1, 8, 32)
CONTEXT = 1024  # behind every decoded token
DEPTHS = (1, 2, 4, 8, 16)
SQUARE = 8192  # of the matrices whose product is the ceiling
READ_BYTES = 4 << 30
WANTED_SHARE, WANTED_S = 0.6, 2e-3


class Ceilings(NamedTuple):
    """What the device does at best, in a second."""

    flops: float
    bytes: float


class Row(NamedTuple):
    """One case: milliseconds of ours and of transformers' runs, and the share of the ceiling that ours reach."""

    case: str
    ours_s: list[float]
    theirs_s: list[float]
    share: float

    def cells(self) -> list[str]:
        ours, theirs = statistics.median(self.ours_s), statistics.median(self.theirs_s)
        return [
            self.case,
            f"{1e3 * ours:.2f} ({1e3 * min(self.ours_s):.2f} … {1e3 * max(self.ours_s):.2f})",
            f"{self.share:.0%}",
            f"{1e3 * theirs:.2f}",
            f"{theirs / ours:.2f}",
        ]


def seconds_of(run: Callable[[], object], repeats: int) -> list[float]:
    """By the host's clock, from an idle device to an idle device; two runs before are not counted."""
    taken = []
    for number in range(repeats + 2):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if number >= 2:
            taken.append(time.perf_counter() - begun)
    return taken


def ceilings() -> Ceilings:
    a, b = (torch.randn(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_s = statistics.median(seconds_of(lambda: [a @ b for _ in range(10)], 5)) / 10
    block = torch.zeros(READ_BYTES // 4, device="cuda", dtype=torch.float32)
    other = torch.empty_like(block)
    copy_s = statistics.median(seconds_of(lambda: other.copy_(block), 5))
    read_s = statistics.median(seconds_of(lambda: block.sum(), 5))
    return Ceilings(2.0 * SQUARE**3 / product_s, max(2 * READ_BYTES / copy_s, READ_BYTES / read_s))


def prefill_flops(config: DecoderConfig, num_tokens: int) -> float:
    """Of the linear operators for all tokens, of the head for the last one, and of causal attention."""
    attention = 4.0 * config.num_layers * config.q_size * num_tokens**2 / 2
    return 2.0 * _layer_weights(config) * num_tokens + 2.0 * config.vocab_size * config.hidden_size + attention


def decode_bytes(config: DecoderConfig, batch: int, context: int) -> float:
    """Every weight once, every key and value once."""
    cells = _layer_weights(config) + config.vocab_size * config.hidden_size
    return 2.0 * (cells + 2 * config.num_layers * config.kv_size * batch * (context + 1))


def _layer_weights(config: DecoderConfig) -> int:
    attention = config.hidden_size * (2 * config.q_size + 2 * config.kv_size)
    return config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


class Transformers:
    """The reference: a model of the same shape with weights of its own, attention by torch's fused kernels."""

    def __init__(self, config: DecoderConfig) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        made = LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_size,
            max_position_embeddings=16384,
            tie_word_embeddings=config.tie_embeddings,
        )
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"):
                made._attn_implementation = "sdpa"
                model: Any = LlamaForCausalLM(made)
        finally:
            torch.set_default_dtype(torch.float32)
        self.model = model.eval()
        self.vocab_size = config.vocab_size

    def prefill(self, num_tokens: int) -> Callable[[], object]:
        tokens = torch.randint(0, self.vocab_size, (1, num_tokens), device="cuda")
        return lambda: self.model(tokens, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist()

    def decode(self, batch: int, context: int) -> Callable[[], object]:
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        tokens = torch.randint(0, self.vocab_size, (batch, context), device="cuda")
        self.model(tokens, past_key_values=cache, logits_to_keep=1)

        def step() -> None:
            cache.crop(context)
            self.model(tokens[:, :1], past_key_values=cache, logits_to_keep=1).logits.argmax(-1).tolist()

        return step


def in_turn(ours: Callable[[], float], theirs: Callable[[], object], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of either, A B B A."""
    found: tuple[list[float], list[float]] = ([], [])
    ours()
    seconds_of(theirs, 1)
    for number in range(repeats):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            if which == 0:
                found[0].append(ours())
            else:
                torch.cuda.synchronize()
                begun = time.perf_counter()
                theirs()
                torch.cuda.synchronize()
                found[1].append(time.perf_counter() - begun)
    return found


def rows_of(engine: Engine, reference: Transformers, best: Ceilings, repeats: int) -> list[Row]:
    config, stage, rows = engine.stage.model.config, engine.stage, []
    longest = engine.facts.max_model_len
    for length in track([n for n in PREFILLS if n <= longest], description="prefill"):
        ours, theirs = in_turn(partial(step_s, stage, (Share(length, 0),)), reference.prefill(length), repeats)
        share = prefill_flops(config, length) / statistics.median(ours) / best.flops
        rows.append(Row(f"prefill of {length}", ours, theirs, share))
    for batch in track([n for n in BATCHES if n <= engine.facts.max_num_seqs], description="decode"):
        run = partial(step_s, stage, (Share(1, CONTEXT),) * batch)
        ours, theirs = in_turn(run, reference.decode(batch, CONTEXT), 4 * repeats)
        share = decode_bytes(config, batch, CONTEXT) / statistics.median(ours) / best.bytes
        rows.append(Row(f"a token each of {batch} behind {CONTEXT}", ours, theirs, share))
    return rows


def depths(engine: Engine, rounds: int, long_tokens: int) -> list[list[str]]:
    """By depth: how long urgent requests wait for the device, and seconds of a long prompt alone."""
    stage = engine.stage
    before = stage.launch_ahead
    settings: SchedulerSettings = replace(engine.scheduler.settings, refuse_unattainable=False, order="deadline")
    waits: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    lone: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    for number in track(range(rounds), description="launching ahead"):
        requests = mixture(engine, 5, long_tokens, 40, number).requests
        for depth in DEPTHS if number % 2 == 0 else DEPTHS[::-1]:
            stage.launch_ahead = depth
            waits[depth] += blocked(engine, requests, settings)[0].waits_s
            lone[depth].append(step_s(stage, (Share(long_tokens, 0),)))
    stage.launch_ahead = before
    return [
        [
            str(depth),
            *(f"{1e3 * quantile(waits[depth], share):.2f}" for share in (0.5, 0.99, 1.0)),
            str(len(waits[depth])),
            f"{1e3 * statistics.median(lone[depth]):.1f}",
        ]
        for depth in DEPTHS
    ]


def section(name: str, options: argparse.Namespace, best: Ceilings) -> str:
    """Everything about one model."""
    engine = build_engine(
        EngineSettings(
            model=name, device="cuda", dtype="bfloat16", max_model_len=options.longest, max_num_seqs=max(BATCHES),
            max_tile_ms=options.max_tile_ms, enable_prefix_caching=False, cost_cache=False,
        )
    )  # fmt: skip
    with torch.inference_mode():
        reference = Transformers(engine.stage.model.config)
        rows = rows_of(engine, reference, best, options.repeats)
        del reference
        torch.cuda.empty_cache()
        waits = depths(engine, options.rounds, options.longest - 64)
    facts, fit = engine.facts, engine.facts.cost_fit
    header = ["case", "ours, ms (least … most)", "of the ceiling", "transformers, ms", "times as long as ours"]
    waited = ["tiles ahead", "wait p50 ms", "p99 ms", "longest ms", "urgent requests", "a long prompt alone, ms"]
    return (
        f"## {name}\n\n{facts.means}, B = {facts.max_tile_ms:g} ms. A step is priced at {1e3 * fit.step_s:.2f} ms + "
        f"{1e6 * fit.token_s:.1f} µs per token ({facts.cost_error:.0%} off on steps held out).\n\n"
        f"{report.table(header, [row.cells() for row in rows])}\n\n{reading(rows)}\n\n"
        f"Urgent prompts of 16 tokens while prompts of {options.longest - 64} are read, {options.rounds} rounds; a "
        f"wait ends when the device has nothing else to do. The default is {engine.stage.launch_ahead} tiles.\n\n"
        f"{report.table(waited, waits)}\n\n{waiting(waits, engine.stage.launch_ahead)}"
    )


def waiting(waits: Sequence[Sequence[str]], depth: int) -> str:
    """What was wanted of the longest waits at the depth that is the default, and whether it was reached."""
    p99_ms = next(float(row[2]) for row in waits if row[0] == str(depth))
    said = "reached" if p99_ms <= 1e3 * WANTED_S else "not reached"
    return f"At {depth} tiles a p99 of at most {1e3 * WANTED_S:g} ms: {said}, {p99_ms:.2f} ms."


def reading(rows: Sequence[Row]) -> str:
    """What was wanted, and whether it was reached."""
    wanted = {f"prefill of {max(PREFILLS)}", f"a token each of {max(BATCHES)} behind {CONTEXT}"}
    said = [
        f"{row.case}: {'reached' if row.share >= WANTED_SHARE else 'not reached'}, {row.share:.0%} of the ceiling "
        f"against {WANTED_SHARE:.0%}"
        for row in rows
        if row.case in wanted
    ]
    return "; ".join(said) + "."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--longest", type=int, default=8256, help="tokens of a context")
    parser.add_argument("--max-tile-ms", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=7, help="of each prefill; four times as many of each decode")
    parser.add_argument("--rounds", type=int, default=4, help="of urgent and long prompts at every depth")
    parser.add_argument("--folder", type=Path, default=report.RESULTS, help="where the page is written")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: run this where there is one.")
    with torch.inference_mode():
        best = ceilings()
    torch.cuda.empty_cache()
    body = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}. Its ceilings, measured in this run: "
        f"{best.flops / 1e12:.0f} TFLOP/s for products of {SQUARE} × {SQUARE} bfloat16 matrices, and "
        f"{best.bytes / 1e12:.2f} TB/s of memory, the better of reading and of copying {READ_BYTES >> 30} GiB.\n\n"
        "Ours: a step of the stage in tiles of at most B, and a greedy draw; steps of few rows are recorded and "
        "replayed. transformers: one forward call and an argmax. In turn, A B B A; medians."
    ]
    for name in options.models:
        body.append(section(name, options, best))
        gc.collect()  # recordings and their stage know each other
        torch.cuda.empty_cache()
        report.write("gpu", "On a GPU", report.command(COMMAND, arguments), "\n\n".join(body), options.folder)


if __name__ == "__main__":
    main()
