"""What reading prompts together takes of memory, each way: a step's activations, and the pages that are kept.

Computed by the stage's own account, and what a step keeps measured beside it: the process's resident memory at its
peak, against what it was before, with everything given back first that was free.
"""

import gc
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

from headway.bench import report
from headway.bench.packing_ways import SCHEDULED, WAYS, Batch, draw, packed, populations, take
from headway.placement.engine import Engine
from headway.placement.memory import give_back_freed_memory

LOAD = "qwen text"
SIZE = 16
CAP_BYTES = 256 * 2**20
MOST = 4096  # prompts that a batch may have
DRAWS = 7
MIB = 2**20
_FORGET_PEAK = "5"


def section(engine: Engine, mean_tokens: int, longest: int, most: int) -> str:
    """Two tables: of one batch of at most so many prompts, and of the largest batches within a fixed memory."""
    lengths = populations(mean_tokens, longest)[LOAD]
    batch = draw(lengths, min(SIZE, most), engine.stage.model.config.vocab_size, 0)
    rows = []
    for way in WAYS:
        take(engine, batch, way)  # what is kept for good from the first time on
        peak = statistics.median(_peak_bytes(engine, batch, way) for _ in range(3))
        activations, kept = activation_bytes(engine, batch.lengths, way), page_bytes(engine, batch.lengths, way)
        tokens = _largest_step(engine, batch.lengths, way)
        rows.append([way, tokens, *map(_mib, (activations, peak, kept))])
    header = [
        "way",
        "tokens of its largest step",
        "MiB of activations",
        "measured at the peak",
        "MiB of keys and values",
    ]
    return (
        f"## Memory\n\n{LOAD}, a batch of {len(batch.prompts)}. Computed: the largest step's tokens, padding included, "
        "times what the stage keeps between operators for each of them; and what the batch takes in pages once it is "
        "read, padding included. Measured: how much more memory than before the process held at its peak while it read "
        "the batch, pages not counted, within an operator and for the scheduler's and sampler's own needs too; median "
        f"of three.\n\n{report.table(header, rows)}\n\n{_largest_batches(engine, lengths)}"
    )


def _mib(size: float) -> str:
    return "not measured here" if math.isnan(size) else f"{size / MIB:.2f}"


def activation_bytes(engine: Engine, lengths: Sequence[int], way: str) -> int:
    return _largest_step(engine, lengths, way) * engine.stage.bytes_per_token


def page_bytes(engine: Engine, lengths: Sequence[int], way: str) -> int:
    """Of everybody's keys and values, of the padding too: whoever pads keeps them in one tensor."""
    shape = engine.pool.shape
    return sum(map(sum, _steps(engine, lengths, way))) * shape.page_bytes // shape.page_tokens


def largest_batch(engine: Engine, lengths: Sequence[int], way: str, cap_bytes: int) -> int:
    """How many of the first of these prompts fit into so much memory when they are read in one batch."""
    fits, too_many = 0, len(lengths) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        few = lengths[:middle]
        held = activation_bytes(engine, few, way) + page_bytes(engine, few, way)
        fits, too_many = (middle, too_many) if held <= cap_bytes else (fits, middle)
    return fits


def _largest_batches(engine: Engine, lengths: Sequence[int]) -> str:
    rng = random.Random(0)
    draws = [rng.choices(lengths, k=MOST) for _ in range(DRAWS)]
    found = {way: [largest_batch(engine, drawn, way, CAP_BYTES) for drawn in draws] for way in WAYS}
    rows = []
    for way, sizes in found.items():
        ratios = [size / padded for size, padded in zip(sizes, found["padded"], strict=True)]
        spread = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} … {max(ratios):.1f})"
        rows.append([way, f"{statistics.median(sizes):.0f} ({min(sizes)} … {max(sizes)})", spread])
    header = ["way", "prompts", "× padded"]
    return (
        f"The largest batch of such prompts of which activations and pages fit into {CAP_BYTES // MIB} MiB, computed "
        f"as above; {DRAWS} draws, median (least … most). Packs are as long as the device is fast with them, "
        f"and what is kept are tokens, not padding.\n\n{report.table(header, rows)}"
    )


def _steps(engine: Engine, lengths: Sequence[int], way: str) -> list[list[int]]:
    """Tokens of each member of each step."""
    if way == SCHEDULED:
        return packed(engine, lengths)
    batch = Batch([(0,) * length for length in lengths])
    return [[member.num_computed for member in step] for step in batch.steps(way)]


def _largest_step(engine: Engine, lengths: Sequence[int], way: str) -> int:
    return max(map(sum, _steps(engine, lengths, way)))


def _peak_bytes(engine: Engine, batch: Batch, way: str) -> float:
    """By how much the resident memory rises at most while the batch is read; no number where the system keeps none."""
    gc.collect()
    give_back_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text(_FORGET_PEAK, encoding="ascii")
        before = _status_bytes("VmRSS")
        take(engine, batch, way)
        return _status_bytes("VmHWM") - before
    except OSError:
        return math.nan


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
