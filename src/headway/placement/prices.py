"""The prices that an engine starts with: those of an earlier start on this machine if they still hold, or new ones.

Owns the files in which they are kept and the rule which to believe. Knows no operator: `calibrate` measures.

The rule, one probe step per start: within TOLERANCE of what they say, kept prices are taken. If the probe is faster,
they were measured beside a busy neighbour: they are measured again, and the faster ones stay. If it is slower, a
neighbour is busy now and will go: they are taken nevertheless, since the online correction follows whoever is slow, and
a loaded start must not spoil later ones. Only a machine that was slow at MAX_SLOW_STARTS starts in a row has changed.
Prices that do not even predict the steps they were measured beside are used if there are no others, and never kept.
"""

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import msgspec

from headway.core.cost import CostFit, Share
from headway.models.config import DecoderConfig
from headway.stages.tiling import Rates

FORMAT = 3  # also grows when what is measured means something else
TOLERANCE = 0.35
MAX_SLOW_STARTS = 3
REFERENCE = (Share(64, 0),)  # by its seconds two fits are told apart as faster and slower
_NO_SHAPE = {"dtype", "eos_ids", "bos_id"}  # of a model's config: what no price depends on


@dataclass(frozen=True, slots=True)
class Prices:
    """By which operators are cut, by which steps are predicted, and how far off those are (mean, held-out steps)."""

    rates: Rates
    fit: CostFit
    error: float

    @property
    def are_worth_keeping(self) -> bool:
        """They are numbers that can be, and predict steps better than a start's probe could tell."""
        numbers = (*astuple(self.rates), *astuple(self.fit), self.error)
        return (
            all(math.isfinite(number) and number >= 0 for number in numbers)
            and min(astuple(self.rates)) > 0
            and self.fit.token_s > 0
            and self.error <= TOLERANCE
        )


class Kept(msgspec.Struct, frozen=True):
    """What stands in a file. `num_slow_starts`: in a row, the last ones."""

    format: int
    measured_at: float  # seconds since 1970, for whoever looks into the file
    prices: Prices
    num_slow_starts: int = 0


def settle(path: Path | None, measure: Callable[[], Prices], probe: Callable[[Prices], float]) -> tuple[Prices, str]:
    """The prices to start with and where they are from, by the rule above; None keeps nothing.

    `probe` runs a step and says how many times as long as predicted it took.
    """
    kept = None if path is None else read(path)
    if path is None or kept is None:
        prices, source = _timed(measure)
        return prices, source if path is None else source + _keep(path, prices)
    ratio = probe(kept.prices)
    if abs(ratio - 1) <= TOLERANCE:
        if kept.num_slow_starts:
            write(path, msgspec.structs.replace(kept, num_slow_starts=0))
        return kept.prices, "cached"
    is_slow, source = ratio > 1, "cached"
    if is_slow:
        source = f"cached; the machine is {ratio:.1f} × as slow at present"
        if kept.num_slow_starts + 1 < MAX_SLOW_STARTS:
            write(path, msgspec.structs.replace(kept, num_slow_starts=kept.num_slow_starts + 1))
            return kept.prices, source
    prices, measured = _timed(measure)
    stays_faster = not is_slow and kept.prices.fit.seconds(REFERENCE) < prices.fit.seconds(REFERENCE)
    if stays_faster or not prices.are_worth_keeping:
        return kept.prices, source
    return prices, measured + _keep(path, prices)


def _timed(measure: Callable[[], Prices]) -> tuple[Prices, str]:
    begun = time.perf_counter()
    prices = measure()
    return prices, f"measured in {time.perf_counter() - begun:.1f} s"


def _keep(path: Path, prices: Prices) -> str:
    """What to add to the source: nothing if they are kept, else why not."""
    if not prices.are_worth_keeping:
        return "; not kept (the machine was too busy)"
    problem = write(path, Kept(FORMAT, time.time(), prices))
    return f"; not kept ({problem})" if problem else ""


def read(path: Path) -> Kept | None:
    """What was kept; None if that is nothing, or nothing that can be understood and believed."""
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=Kept)
    except (OSError, ValueError):  # msgspec's errors are ValueErrors
        return None
    return kept if kept.format == FORMAT and kept.prices.are_worth_keeping else None


def write(path: Path, kept: Kept) -> str:
    """Replace the file as a whole; says what kept it from being written, or nothing. Never raises for a full disk."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, delete=False) as file:
            temporary = file.name
            file.write(msgspec.json.format(msgspec.json.encode(kept)) + b"\n")
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
        return error.strerror or str(error)
    return ""


class Subject(NamedTuple):
    """What prices depend on: a file for each. Of a model that is its shape, whatever its weights are."""

    config: DecoderConfig
    dtype: str
    device: str
    num_threads: int
    page_tokens: int
    max_tile_ms: float
    longest_probe: int
    operators: str = ""  # which ones: torch's, or those compiled for some kind of processor

    @property
    def path(self) -> Path | None:
        """None where there is no home to keep it in."""
        folder = _folder()
        if folder is None:
            return None
        shape = {name: value for name, value in asdict(self.config).items() if name not in _NO_SHAPE}
        about = (shape, *self[1:], _cpu_name(), version("torch"), _own_version())
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return folder / f"{digest[:24]}.json"


def _folder() -> Path | None:
    """HEADWAY_CACHE_DIR, or the XDG cache folder of this user. XDG ignores relative paths."""
    if own := os.environ.get("HEADWAY_CACHE_DIR"):
        return Path(own) / "costs"
    if (base := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        return base / "headway" / "costs"
    try:
        return Path.home() / ".cache" / "headway" / "costs"
    except RuntimeError:
        return None


def _own_version() -> str:
    """Empty when run from a tree that is not installed."""
    try:
        return version("headway")
    except PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    """As the system calls it; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
