"""What the compiled operators gain over torch's: `python -m headway.bench.kernels`.

Prompts, a pack of short ones, and tokens of several requests behind contexts, on real shapes with random numbers. Each
part of a layer that is compiled is run through all layers as a step does it, nothing cut, by torch and compiled in
turn. Both must come to the same before either is timed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from headway.bench import report
from headway.bench.calm import Calm
from headway.bench.tiles import UNCUT
from headway.core.work import Segment
from headway.kv.pool import KVPool, PoolShape
from headway.models import presets
from headway.models.config import DecoderConfig, ModelError
from headway.models.decoder import Layer, Linear
from headway.models.layers import rope_table
from headway.placement.memory import keep_freed_memory, num_cores
from headway.stages.batch import PageLists, make_batch
from headway.stages.native import Library, NativeOperators, library, suits
from headway.stages.operators import Operators
from headway.stages.tiling import Tiling

PAGE_TOKENS = 16
LEAST_S = 0.02  # of one measurement: short passes are repeated until then
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # root mean square of the difference over that of the values
NO_MATRIX = Linear(torch.empty(0, 0))
LAYER = Layer(torch.empty(0), NO_MATRIX, None, None, NO_MATRIX, torch.empty(0), NO_MATRIX, NO_MATRIX)


class Case(NamedTuple):
    """`num_requests` requests, each with `num_tokens` new tokens behind `context` that stand in pages already."""

    num_requests: int
    num_tokens: int
    context: int = 0

    @property
    def pages_each(self) -> int:
        return -(-(self.context + self.num_tokens) // PAGE_TOKENS)

    def __str__(self) -> str:
        what = f"{self.num_requests} × " if self.num_requests > 1 else ""
        if self.num_tokens == 1:
            return f"{what}one token behind {self.context}"
        return f"{what}a prompt of {self.num_tokens}" + (f" behind {self.context}" if self.context else "")


PROMPTS = (Case(1, 128), Case(1, 512), Case(1, 2048), Case(8, 64))
TOKENS = tuple(Case(num_requests, 1, 512) for num_requests in (1, 4, 8, 16))

Part = Callable[[Operators], Tensor]  # runs it through all layers; returns what the last one made


class Measured(NamedTuple):
    """Seconds of one layer by torch and compiled, pair by pair."""

    torch_s: list[float]
    compiled_s: list[float]

    @property
    def ratios(self) -> list[float]:
        """How many times as long torch takes."""
        return [torch_s / compiled_s for torch_s, compiled_s in zip(self.torch_s, self.compiled_s, strict=True)]

    def __str__(self) -> str:
        by_torch, compiled = (statistics.median(each) * 1e6 for each in (self.torch_s, self.compiled_s))
        ratios = self.ratios
        said = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} … {max(ratios):.1f})"
        return f"{by_torch:.0f} / {compiled:.0f} = {said}"


class Rows:
    """The rows of one case on pages of their own, in no order, and what operators do with them."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, case: Case) -> None:
        self.config, self.dtype = config, dtype
        generator = torch.Generator().manual_seed(0)
        self.num_pages = case.num_requests * case.pages_each
        pages = iter(torch.randperm(self.num_pages, generator=generator).tolist())
        segments = [
            Segment(
                request_id=f"bench{number}",
                tokens=(0,) * case.num_tokens,
                first_position=case.context,
                context_tokens=case.context,
                pages=tuple(next(pages) for _ in range(case.pages_each)),
                logits_at=(),
            )
            for number in range(case.num_requests)
        ]
        self.batch = make_batch(segments, PageLists(), PAGE_TOKENS, torch.device("cpu"))
        n = self.batch.num_rows

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator).to(dtype)

        self.qkv_N = draw(n, config.q_size + 2 * config.kv_size)
        self.q_NHD = self.qkv_N[:, : config.q_size].view(n, config.num_heads, config.head_size)
        self.q_NHD *= config.head_size**-0.5
        self.x_NE, self.weight_E = draw(n, config.hidden_size), draw(config.hidden_size)
        self.wide = draw(n, 2 * config.intermediate_size)
        self.rope = rope_table(config, case.context + case.num_tokens)
        self.parts: dict[str, Part] = {
            "rope and page writes": self._place,
            "attention": self._attend,
            "norms": self._norm,
            "activation": self._activate,
        }

    def pool(self) -> KVPool:
        """The same numbers in every pool that is made."""
        config = self.config
        shape = (config.num_layers, PAGE_TOKENS, config.num_kv_heads, config.head_size, self.dtype)
        pool = KVPool(PoolShape(self.num_pages, *shape))
        pool.blocks_PL2KSD.normal_(generator=torch.Generator().manual_seed(1))
        return pool

    def _place(self, operators: Operators) -> Tensor:
        for number in range(self.config.num_layers):
            operators.place(self.batch, number, LAYER, self.rope, self.qkv_N, slice(0, self.batch.num_rows))
        return operators.pool.blocks_PL2KSD[:, -1]

    def _attend(self, operators: Operators) -> Tensor:
        config, segments = self.config, self.batch.segments
        sizes = (config.num_heads, config.num_kv_heads, config.head_size, self.dtype.itemsize)
        tiles = {
            window: [
                operators.prepare(self.batch, glances)
                for glances in Tiling(UNCUT, 1.0).attention(segments, *sizes, window, gathers=operators.gathers)[0]
            ]
            for window in set(config.windows)
        }
        y_NHD = torch.empty_like(self.q_NHD, memory_format=torch.contiguous_format)
        for number, window in enumerate(config.windows):
            look = operators.looking(self.batch, number, self.q_NHD, y_NHD)
            for tile in tiles[window]:
                look(tile)
        return y_NHD

    def _norm(self, operators: Operators) -> Tensor:
        """Two in a layer."""
        y_NE = self.x_NE
        for _ in range(2 * self.config.num_layers):
            y_NE = operators.norm(self.x_NE, self.weight_E)
        return y_NE

    def _activate(self, operators: Operators) -> Tensor:
        middle = self.wide
        for _ in range(self.config.num_layers):
            middle = operators.activate(self.wide)
        return middle


def both(rows: Rows, found: Library) -> tuple[Operators, NativeOperators]:
    """torch's and the compiled ones, each over a pool of its own."""
    operators = Operators(rows.config, rows.pool()), NativeOperators(rows.config, rows.pool(), found)
    for each in operators:
        each.scale = 1.0  # the same queries are rotated again and again: scaled each time they would vanish
    return operators


def check(name: str, expected: Tensor, found: Tensor) -> None:
    """Raises RuntimeError if the two are further apart than rounding explains."""
    allowed = CLOSE[expected.dtype]
    expected, found = expected.double(), found.double()
    difference = float(((found - expected).square().mean() / expected.square().mean()).sqrt())
    if not difference <= allowed:  # nor is what is no number close to anything
        raise RuntimeError(
            f"{name}: compiled and torch differ by {difference:.2g} of the values, more than {allowed:g}: "
            "run `make test-native`."
        )


def measure(part: Part, name: str, operators: tuple[Operators, Operators], num_pairs: int, calm: Calm) -> Measured:
    """torch and compiled in turn, A B B A …"""
    check(name, *(part(each) for each in operators))  # which warms both

    def timing(way: Operators) -> Callable[[], float]:
        begun = time.perf_counter()
        part(way)
        num_passes = max(1, round(LEAST_S / (time.perf_counter() - begun)))

        def seconds() -> float:
            begun = time.perf_counter()
            for _ in range(num_passes):
                part(way)
            return (time.perf_counter() - begun) / num_passes / way.config.num_layers

        return seconds

    ways = [(timing(way), list[float]()) for way in operators]
    for number in range(num_pairs):
        for seconds, found in ways[:: 1 if number % 2 == 0 else -1]:
            found.append(calm.measure(seconds))
    return Measured(*(found for _, found in ways))


def verdict(measured: dict[str, list[Measured]], cases: list[str]) -> str:
    """Where torch was faster, in words. `measured`: of each part, one for each case."""
    behind = [
        f"{name} of {case} ({statistics.median(each.ratios):.2f})"
        for name, several in measured.items()
        for case, each in zip(cases, several, strict=True)
        if statistics.median(each.ratios) < 1.0
    ]
    return f"torch is faster at {', '.join(behind)}." if behind else "Compiled is faster in every row."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b"], help="presets' shapes"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--num-threads", type=int, default=num_cores())
    parser.add_argument("--pairs", type=int, default=5, help="of torch and compiled runs")
    parser.add_argument("--longest", type=int, default=2048, help="skip cases with longer prompts or contexts")
    arguments = parser.parse_args()
    found, dtype = library(), getattr(torch, arguments.dtype)
    if found is None:
        sys.exit("There are no compiled operators: install g++, then Headway again, and do not set HEADWAY_NATIVE=0.")
    try:
        configs = {name: presets.preset(name) for name in arguments.models}
    except ModelError as error:
        sys.exit(str(error))
    unsuited = [name for name, config in configs.items() if not suits(found, config, dtype, torch.device("cpu"))]
    if unsuited:
        sys.exit(f"The compiled operators do not suit {', '.join(unsuited)}: leave it out.")
    keep_freed_memory()
    torch.set_num_threads(arguments.num_threads)
    cases = [case for case in (*PROMPTS, *TOKENS) if max(case.num_tokens, case.context) <= arguments.longest]
    sections = []
    with torch.inference_mode():
        calm = Calm()
        for name, config in configs.items():
            measured: dict[str, list[Measured]] = {}
            for case in track(cases, description=name):
                rows = Rows(config, dtype, case)
                operators = both(rows, found)
                for part_name, part in rows.parts.items():
                    what = f"{part_name}, {case}, {name}"
                    measured.setdefault(part_name, []).append(measure(part, what, operators, arguments.pairs, calm))
                for each in operators:
                    each.pool.close()
            said = [str(case) for case in cases]
            lines = [[case, *cells] for case, *cells in zip(said, *measured.values(), strict=True)]
            sections.append(f"## {name}\n\n{report.table(['tokens', *measured], lines)}\n\n{verdict(measured, said)}")

    report.write(
        "kernels",
        "Compiled operators against torch's",
        report.command("python -m headway.bench.kernels", None),
        f"{arguments.dtype}, {arguments.num_threads} threads, compiled for {found.kind}. Microseconds of one layer, "
        "medians of several pairs: torch / compiled = how many times as long torch takes (smallest … largest). "
        "Attention contains what a step prepares for it; all layers' keys and values are read in turn.\n\n"
        + "\n\n".join(sections)
        + f"\n\n{calm.verdict()}",
    )


if __name__ == "__main__":
    main()
