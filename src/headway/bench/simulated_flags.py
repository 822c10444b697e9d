"""The flags of `headway simulate`, and what they resolve to: a load, prices, devices, schedulers. Imports no torch."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import get_args

import msgspec

from headway.bench import flags
from headway.bench.flags import Parser, count, positive, shape_flags, share
from headway.bench.load import Load
from headway.bench.named import TRACES
from headway.bench.policies import EXAMPLE_FIT, policies
from headway.config import EngineSettings, all_settings, flag, value_type
from headway.core.cost import CostFit
from headway.core.settings import SchedulerSettings
from headway.placement.fitting import saturation
from headway.placement.prices import FORMAT, Kept
from headway.placement.simulate import Device
from headway.stages.tiling import AIM

DESCRIPTION = """\
Run a load on simulated devices: the engine's own scheduler and driver on a virtual clock, with steps that only cost
what they are priced at. Without --rates, the highest rate is searched at which 90% of each class are in time (goodput).
What it says is as good as its prices.
"""
EXAMPLES = """\
examples:
  headway simulate qwen --length-scale 1/16 --max-tokens 1        goodput of this scheduler, TTFT only
  headway simulate qwen --policies ours,layer,chunk:64,fcfs       beside others
  headway simulate azure-conv --devices 4 --rates 1 2 4           these rates and no search
  headway simulate mooncake --costs ~/.cache/headway/costs/KEY.json   with the prices of an engine of yours
  headway simulate qwen --misprediction 0.5 --spread 0.3          if the prices are wrong

policies:
  ours            suspended at operators, in the order of slack, refusing what cannot be in time
  layer           ours, but suspended between layers only
  none            ours, but what runs is never suspended
  deadline-none   in the order of deadlines, never suspended
  fcfs            in the order of arrival, never suspended, nothing packed, nobody refused
  chunk:N         ours in steps of N tokens that are never suspended
  chunk:N:fcfs    the same in the order of arrival, nobody refused
"""
MAX_PRICE_S = 1000.0
UNDIVIDED = ("turns", "mixed")  # prices alone say nothing of what a share of a device is worth
MAX_FILE_BYTES = 1 << 20
NAMES = {  # word -> name in bench/policies.py
    "ours": "operator",
    "operator": "operator",
    "layer": "layer",
    "none": "none",
    "deadline-none": "deadline, none",
    "fcfs": "fcfs",
}
_SERVED = EngineSettings()


def parser() -> Parser:
    found = Parser(
        prog="headway simulate",
        usage="headway simulate LOAD [flags]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=112),
    )
    found.add_argument("load", metavar="LOAD", help=f"{', '.join(TRACES)}, or a trace's file")
    found.add_argument("--out", type=Path, metavar="FOLDER", help="for result.json, chart.png and report.html")
    load = found.add_argument_group("load")
    shape_flags(load, 1000, "1")
    load.add_argument("--context", type=count, metavar="N", help="tokens of a context: what is longer is made to fit")
    _rate_flags(found.add_argument_group("rates and targets"))
    _device_flags(found.add_argument_group("devices"))
    _scheduler_flags(found.add_argument_group("scheduler"))
    return found


def _rate_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rates", "--rate", type=positive, nargs="+", metavar="R", help="requests/s (default: search for goodput)"
    )
    flags.rate_scale_flag(group)
    group.add_argument("--tolerance", type=positive, default=0.03, metavar="X", help="of the search (default: 0.03)")
    group.add_argument("--share", type=share, default=0.9, metavar="X", help="of each class in time (default: 0.9)")
    group.add_argument(
        "--slo-k", type=positive, default=2.0, metavar="K", help="TTFT target over a lone request's (default: 2)"
    )
    group.add_argument("--tpot-k", type=positive, metavar="K", help="the same for TPOT (default: no target)")


def _device_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--devices", type=_devices, default=1, metavar="N", help="each with a scheduler (default: 1)")
    group.add_argument(
        "--costs",
        default="default",
        metavar="FILE",
        help="prices: a file that an engine keeps, or the four as JSON "
        "(default: of half a billion parameters on two cores)",
    )
    group.add_argument(
        "--spread", type=_spread, default=0.0, metavar="X", help="standard deviation of a step's log time (default: 0)"
    )
    group.add_argument(
        "--misprediction",
        type=_misprediction,
        default=1.0,
        metavar="X",
        help="the scheduler believes X times the prices",
    )
    group.add_argument("--num-pages", type=count, default=16384, metavar="N", help="of 16 tokens (default: 16384)")
    group.add_argument("--num-layers", type=count, default=24, metavar="N", help="of the model (default: 24)")
    group.add_argument(
        "--tile-ms",
        type=float,
        default=1e3 * _SERVED.tile_s,
        metavar="MS",
        help=f"no piece of work is planned to run longer (default: {1e3 * _SERVED.tile_s:g})",
    )


def _scheduler_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--policies", type=_words, metavar="A,B,…", help="several schedulers, from the list below")
    for name in ("order", "preempt"):
        choices = get_args(value_type(EngineSettings, name))
        group.add_argument(flag(name), choices=choices, help=_help(name, getattr(_SERVED, name)))
    group.add_argument(
        flag("lanes"), choices=UNDIVIDED, default=_SERVED.lanes,
        help=f"tokens take turns with prompts, or ride along (default: {_SERVED.lanes})",
    )  # fmt: skip
    group.add_argument("--chunk-tokens", type=count, metavar="N", help=_help("chunk_tokens", _SERVED.chunk_tokens))
    for name in ("pack", "refuse_unattainable"):
        group.add_argument(flag(name), action=argparse.BooleanOptionalAction, default=True, help=_help(name))
    for name in ("max_num_seqs", "max_num_parked"):
        default = getattr(_SERVED, name)
        group.add_argument(flag(name), type=count, default=default, metavar="N", help=_help(name, default))
    group.add_argument("--prefix-caching", action="store_true", help="share equal beginnings; slower to simulate")


def _help(name: str, default: object = None) -> str:
    """A setting's words, as `headway serve` has them."""
    words = str(all_settings(EngineSettings)[name][1].metadata["help"])
    return words if default is None else f"{words} (default: {default})"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Leaves with one sentence if something is wrong with them."""
    found = parser()
    options = found.parse_args(list(words))
    flags.check(options, found)
    switched = [name for name in ("order", "preempt", "chunk_tokens") if getattr(options, name) is not None]
    if options.policies is not None and switched:
        found.error(f"the policies differ in what {flag(switched[0])} says: give that or --policies, not both.")
    if options.chunk_tokens is not None and options.preempt != "chunk":
        found.error("--chunk-tokens is for --preempt chunk: give both, or --policies chunk:N.")
    return options


# Words to values


def _devices(word: str) -> int:
    if count(word) > 1000:
        raise argparse.ArgumentTypeError(f"it must be 1000 at most, not {word!r}")
    return count(word)


def _spread(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"it must be from 0 (exact) to 2 (a factor of seven), not {word!r}")
    return value


def _misprediction(word: str) -> float:
    value = positive(word)
    if not 0.01 <= value <= 100:
        raise argparse.ArgumentTypeError(f"it must be from 0.01 to 100, not {word!r}")
    return value


def _words(text: str) -> list[str]:
    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    for word in words:
        if word not in NAMES:
            _chunk_of(word)
    return words


def _chunk_of(word: str) -> tuple[int, str]:
    """What chunk:N or chunk:N:fcfs means: a size, and what its name in bench/policies.py ends with."""
    kind, _, rest = word.partition(":")
    size, colon, order = rest.partition(":")
    if kind != "chunk" or (colon and order != "fcfs"):
        choices = ", ".join(name for name in NAMES if name != "operator")
        raise argparse.ArgumentTypeError(
            f"there is no policy {word!r}: choose from {choices}, chunk:N and chunk:N:fcfs"
        )
    return count(size), ", fcfs" if colon else ""


def schedulers(options: argparse.Namespace, base: SchedulerSettings) -> dict[str, SchedulerSettings]:
    """Each scheduler under the word that asked for it; the one that the switches describe if none was named."""
    if options.policies is None:
        switched = {name: getattr(options, name) for name in ("order", "preempt", "chunk_tokens")}
        given = {name: value for name, value in switched.items() if value is not None}
        asked = replace(base, **given)
        label = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items())
        return {label if asked != base else "ours": asked}
    found = {}
    for word in options.policies:
        if word in NAMES:
            found[word] = policies(base, ())[NAMES[word]]
        else:
            size, order = _chunk_of(word)
            found[word] = policies(base, (size,))[f"chunk {size}{order}"]
    return found


# Prices


class Four(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The prices by themselves, seconds each."""

    step_s: float
    token_s: float
    segment_s: float = 0.0
    pair_s: float = 0.0


def fit_of(given: str) -> CostFit:
    """The prices in a file: those that an engine keeps, or the four by themselves. Raises ValueError."""
    if given == "default":
        return EXAMPLE_FIT
    path = Path(given).expanduser()
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"--costs {given} is larger than any file of prices: give another.")
        four = _four(msgspec.json.decode(content))
    except OSError as error:
        raise ValueError(f"--costs {given} cannot be read: {error.strerror}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--costs {given} holds no prices ({str(error)[:120]}): give a file that an engine keeps, or "
            '{"step_s": …, "token_s": …, "segment_s": …, "pair_s": …}.'
        ) from error
    values = msgspec.structs.astuple(four)
    if not (four.token_s > 0 and all(0 <= value <= MAX_PRICE_S for value in values)):
        raise ValueError(
            f"--costs {given}: a price is between 0 and {MAX_PRICE_S:g} seconds, and a token costs something."
        )
    return CostFit(*values)


def _four(content: object) -> Four:
    if not (isinstance(content, dict) and "prices" in content):
        return msgspec.convert(content, Four)
    kept = msgspec.convert(content, Kept)
    if kept.format != FORMAT:
        raise msgspec.ValidationError(f"format {kept.format} is of another version of Headway, this one has {FORMAT}")
    return msgspec.convert(content["prices"]["fit"], Four)


# What is simulated


@dataclass(frozen=True)
class Plan:
    """Everything that a simulation needs, from the flags."""

    load: Load
    device: Device
    num_devices: int
    schedulers: dict[str, SchedulerSettings]

    @property
    def fit(self) -> CostFit:
        """The true prices."""
        return self.device.fit


def plan_of(options: argparse.Namespace) -> Plan:
    """Raises ValueError with one sentence."""
    EngineSettings(max_tile_ms=options.tile_ms)  # the same bounds hold
    fit = fit_of(options.costs)
    load = flags.load_of(options, options.context)
    device = Device(
        fit=fit,
        tile_s=AIM * options.tile_ms / 1e3,
        num_layers=options.num_layers,
        num_pages=options.num_pages,
        spread=options.spread,
        believed=CostFit(*(options.misprediction * price for price in astuple(fit))),
    )
    longest = max(asked.num_prompt + asked.num_output for asked in load.requests)
    if longest > device.num_pages * device.page_tokens:
        raise ValueError(
            f"A request of {longest} tokens does not fit into {device.num_pages} pages of {device.page_tokens}: give "
            f"--num-pages {math.ceil(longest / device.page_tokens)} or more, or a smaller --length-scale."
        )
    base = SchedulerSettings(
        max_model_len=longest,
        max_num_seqs=options.max_num_seqs,
        max_num_queued=max(_SERVED.max_num_queued_reqs, options.num_requests),  # to compare orders, not queues
        pack_tokens=saturation(fit),
        tile_s=options.tile_ms / 1e3,
        max_num_parked=options.max_num_parked,
        prefix_caching=options.prefix_caching,
        pack=options.pack,
        refuse_unattainable=options.refuse_unattainable,
        lanes=options.lanes,
    )
    return Plan(load, device, options.devices, schedulers(options, base))
