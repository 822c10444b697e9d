"""Our linear operators against the best that torch has here: `python -m headway.bench.linear`.

That is oneDNN with packed bfloat16 weights where the processor multiplies bfloat16, and torch's float32 elsewhere. The
four matrices of a layer of real shapes, with random weights, in so many copies that each is read from memory, as in a
step: what a cache holds of it is gone. Both multiply the same rows in turn, and must come to the same
first. Then the first product of an MLP and what is made of it, one after the other and at once, where it can be at
once. Beside it, how long the first call of a number of rows takes, and at which rate one row's weights are read,
against what the machine reads at best in the same run.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from headway.bench import report
from headway.bench.calm import Calm
from headway.models import presets
from headway.models.config import DecoderConfig
from headway.models.decoder import Linear
from headway.placement.memory import keep_freed_memory, num_cores
from headway.stages.matrices import Matrix, Packed, Plain, is_packable
from headway.stages.native import Library, activate, library
from headway.stages.panels import Panels
from headway.stages.tiling import Span

COMMAND = "python -m headway.bench.linear"
MODELS = ("smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b")
ROWS = (1, 4, 16, 64, 128, 256, 512)
COPIES_BYTES = 512 << 20  # of each matrix together: more than a cache holds
NEW_ROWS = 100  # a number of rows that has not been seen before
GATE_UP = "gate, up"
CLOSE = 1e-2  # root mean square of the difference over that of the values


class Timed(NamedTuple):
    """Seconds of a call by torch and by us, pair by pair."""

    theirs_s: list[float]
    ours_s: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(a / b for a, b in zip(self.theirs_s, self.ours_s, strict=True))

    def __str__(self) -> str:
        theirs, ours = (1e6 * statistics.median(each) for each in self)
        return f"{theirs:.0f} / {ours:.0f} = {self.ratio:.2f}"


def shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of a layer's matrices."""
    return {
        "qkv": (config.hidden_size, config.q_size + 2 * config.kv_size),
        "o": (config.q_size, config.hidden_size),
        GATE_UP: (config.hidden_size, 2 * config.intermediate_size),
        "down": (config.intermediate_size, config.hidden_size),
    }


def calls(
    matrices: Sequence[Matrix], x: Tensor, then: Callable[[Tensor], object] = lambda _: None
) -> Callable[[], float]:
    """Seconds of a call, and of what is done with its result, the mean over all copies."""
    whole = Span(0, matrices[0].size[1])

    def seconds() -> float:
        begun = time.perf_counter()
        for matrix in matrices:
            then(matrix.columns(x, whole))
        return (time.perf_counter() - begun) / len(matrices)

    return seconds


def first_call_s(matrix: Matrix, x: Tensor) -> float:
    begun = time.perf_counter()
    matrix.columns(x, Span(0, matrix.size[1]))
    return time.perf_counter() - begun


def measure(
    size: tuple[int, int], found: Library, theirs_in: torch.dtype, num_pairs: int, calm: Calm
) -> tuple[list[Timed], Timed]:
    """One for each number of rows; and the first call of one more."""
    d_in, d_out = size
    copies = max(2, COPIES_BYTES // (2 * d_in * d_out))
    weight = torch.randn(d_out, d_in).bfloat16()
    theirs: list[Matrix] = [
        Packed(Linear(weight)) if theirs_in is torch.bfloat16 else Plain(Linear(weight.float())) for _ in range(copies)
    ]
    ours = [Panels(Linear(weight), found) for _ in range(copies)]
    timed = []
    for num_rows in ROWS:
        x = torch.randn(num_rows, d_in).bfloat16()
        theirs_x = x.to(theirs_in)
        check(theirs[0].columns(theirs_x, Span(0, d_out)), ours[0].columns(x, Span(0, d_out)))
        timed.append(in_turn(calls(theirs, theirs_x), calls(ours, x), num_pairs, calm))
    x = torch.randn(NEW_ROWS, d_in).bfloat16()
    return timed, Timed([first_call_s(theirs[0], x.to(theirs_in))], [first_call_s(ours[0], x)])


def measure_gate(size: tuple[int, int], found: Library, num_pairs: int, calm: Calm) -> list[Timed]:
    """The product of gate and up and what passes, one after the other and at once, for each number of rows; nothing
    where it cannot be at once."""
    d_in, d_out = size
    copies = max(2, COPIES_BYTES // (2 * d_in * d_out))
    weight = torch.randn(d_out, d_in).bfloat16()
    at_once = [Panels(Linear(weight), found, gates=True) for _ in range(copies)]
    if not at_once[0].gates:
        return []
    apart = [Panels(Linear(weight), found) for _ in range(copies)]
    then = partial(activate, found.lib)
    timed = []
    for num_rows in ROWS:
        x = torch.randn(num_rows, d_in).bfloat16()
        if not torch.equal(then(apart[0].columns(x, Span(0, d_out))), at_once[0].columns(x, Span(0, d_out))):
            raise RuntimeError("A product that ends as a gate has other bits: run `make test-native`.")
        timed.append(in_turn(calls(apart, x, then), calls(at_once, x), num_pairs, calm))
    return timed


def in_turn(one: Callable[[], float], other: Callable[[], float], num_pairs: int, calm: Calm) -> Timed:
    """A B B A …"""
    ways = [(one, list[float]()), (other, list[float]())]
    for number in range(num_pairs):
        for seconds, taken in ways[:: 1 if number % 2 == 0 else -1]:
            taken.append(calm.measure(seconds))
    return Timed(*(taken for _, taken in ways))


def check(expected: Tensor, found: Tensor) -> None:
    """Raises RuntimeError if the two are further apart than rounding explains."""
    expected, found = expected.double(), found.double()
    difference = float(((found - expected).square().mean() / expected.square().mean()).sqrt())
    if not difference <= CLOSE:
        raise RuntimeError(
            f"torch's and our operators differ by {difference:.2g} of the values: run `make test-native`."
        )


def read_rate(calm: Calm) -> float:
    """Bytes that a sum over much memory reads in a second."""
    block = torch.ones(COPIES_BYTES // 4)

    def seconds() -> float:
        begun = time.perf_counter()
        block.sum()
        return time.perf_counter() - begun

    seconds()
    return block.nbytes / statistics.median(calm.measure(seconds) for _ in range(7))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="presets' shapes")
    parser.add_argument("--num-threads", type=int, default=num_cores())
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=report.RESULTS, help="where the page is written")
    options = parser.parse_args(arguments)
    found = library()
    if found is None:
        sys.exit("This needs compiled operators: install a C++ compiler and Headway again.")
    theirs_in = torch.bfloat16 if is_packable(torch.bfloat16, torch.device("cpu")) else torch.float32
    theirs = "oneDNN with packed bfloat16" if theirs_in is torch.bfloat16 else "torch in float32"
    keep_freed_memory()
    torch.set_num_threads(options.num_threads)
    lines, gates, ratios = [], [], []
    with torch.inference_mode():
        calm = Calm()
        best = read_rate(calm)
        cases = [
            (model, name, size) for model in options.models for name, size in shapes(presets.preset(model)).items()
        ]
        for model, name, size in track(cases, description="matrices"):
            timed, first = measure(size, found, theirs_in, options.pairs, calm)
            ratios += [each.ratio for each in timed]
            share = 2 * size[0] * size[1] / statistics.median(timed[0].ours_s) / best
            new = f"{1e3 * first.theirs_s[0]:.1f} / {1e3 * first.ours_s[0]:.1f}"
            lines.append([f"{model}: {name}, {size[0]} → {size[1]}", *timed, f"{share:.0%}", new])
            if name == GATE_UP and (timed := measure_gate(size, found, options.pairs, calm)):
                gates.append([model, *timed])
    rows = [f"{n} rows" if n > 1 else "1 row" for n in ROWS]
    header = ["matrix", *rows, "of memory's rate, 1 row", f"first call of {NEW_ROWS} rows, ms"]
    gate = (
        "\n\nThe first product of an MLP and what passes its gate, bit for bit the same: one after the other / at once "
        f"= how many times as long the first takes.\n\n{report.table(['model', *rows], gates)}"
    )
    slower = sum(ratio < 1 for ratio in ratios)
    report.write(
        f"linear-{found.kind}",
        f"Linear operators compiled for {found.kind}, against torch's",
        report.command(COMMAND, arguments),
        f"Ours with bfloat16 weights, {theirs}; {options.num_threads} threads. Microseconds of a call, theirs / ours = "
        f"how many times as long they take; medians of {options.pairs} pairs. Memory is read at {best / 1e9:.1f} GB/s "
        f"by a plain sum.\n\n{report.table(header, lines)}\n\n"
        f"Theirs takes {statistics.median(ratios):.2f} times as long (median of all cells; {min(ratios):.2f} … "
        f"{max(ratios):.2f}), and is faster in {slower} of {len(ratios)}.{gate if gates else ''}\n\n{calm.verdict()}",
        options.folder,
    )


if __name__ == "__main__":
    main()
