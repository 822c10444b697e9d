"""The flags of `headway bench`, and what they resolve to before anything is measured. Imports nothing heavy."""

import argparse
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

from headway.bench import load as loads
from headway.bench import traces
from headway.bench.load import Load
from headway.bench.named import TRACES, named
from headway.bench.score import GOOD_SHARE
from headway.core.request import SLO

DESCRIPTION = """\
Measure an OpenAI-compatible server by its deadlines: how many requests it answers in time, by class, and the highest
rate at which it still does (goodput). Ours, vLLM's, llama.cpp's: whatever streams POST /v1/completions, or with --chat
/v1/chat/completions.

A load, with lengths and classes from a production trace, is sent open loop: each request at its instant, whatever
became of the others. Nothing is retried; what is refused has missed. Targets are multiples of what the server needs
for a lone request, measured first, so that they mean the same on any machine.
"""
EXAMPLES = """\
examples:
  headway bench http://127.0.0.1:8000                        the highest rate at which 90% of each class are in time
  headway bench URL --rates 1 2 4                            these rates and no search
  headway bench URL --load azure-conv --class-mix text=0.8,search=0.2
  headway bench URL --slo text=250:100 search=4000:200       targets in milliseconds, TTFT:TPOT
  headway bench --compare fifo=http://a:8000 ours=http://b:8000 --rates 2
"""
MIN_REQUESTS = 10
ALONE = {"share": 0.9, "start": None, "tolerance": 0.1, "repeats": 2}  # flags for one server only, and their defaults


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, without the wall of flags that argparse would put before it."""
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> Parser:
    found = Parser(
        prog="headway bench",
        usage="headway bench URL [flags]\n       headway bench --compare A B --rates R [flags]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=112),
    )
    found.add_argument("url", nargs="?", metavar="URL", help="the server, with or without /v1")
    found.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two servers in turns (A B B A), as URL or LABEL=URL"
    )
    found.add_argument("--out", type=Path, metavar="FOLDER", help="for result.json, chart.png and report.html")
    _load_flags(found.add_argument_group("load"))
    _rate_flags(found.add_argument_group("rates"))
    _target_flags(found.add_argument_group("targets"))
    _server_flags(found.add_argument_group("server"))
    return found


def _load_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--load", default="qwen", metavar="NAME", help=f"{', '.join(TRACES)}, or a trace's file (default: qwen)"
    )
    shape_flags(group, 100, "the longest fits the context")
    group.add_argument("--context", type=count, metavar="N", help="tokens of the server's context, if it does not say")
    group.add_argument(
        "--token-seed", type=int, metavar="N", help="of the tokens; new each time, or prefix caches would know them"
    )


def shape_flags(group: argparse._ArgumentGroup, num_requests: int, scale: str) -> None:
    """What `load_of` reads of how many requests there are, how long and when. The last two are defaults, in words."""
    group.add_argument(
        "--num-requests", type=count, default=num_requests, metavar="N", help=f"in each run (default: {num_requests})"
    )
    group.add_argument("--length-scale", type=_scale, metavar="X", help=f"lengths times X or A/B (default: {scale})")
    group.add_argument("--max-tokens", type=count, metavar="N", help="length of every answer; 1 is TTFT only")
    group.add_argument(
        "--class-mix", type=_mix, metavar="MIX", help="such as text=0.7,search=0.3; by length if the trace has none"
    )
    group.add_argument("--arrivals", choices=loads.ARRIVALS, help="default: the trace's own, if it has any, or poisson")
    group.add_argument("--cv", type=positive, default=1.0, metavar="X", help="of gamma arrivals' gaps (default: 1)")
    group.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of lengths, classes and arrivals (default: 0)"
    )


def _rate_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rates", type=positive, nargs="+", metavar="R", help="requests/s to measure (default: search for goodput)"
    )
    rate_scale_flag(group)
    group.add_argument("--start", type=positive, metavar="R", help="where the search begins (default: an estimate)")
    group.add_argument("--tolerance", type=positive, metavar="X", help="where it ends (default: 0.1)")
    group.add_argument("--repeats", type=count, metavar="N", help="runs near the line (default: 2)")
    group.add_argument("--blocks", type=count, default=5, metavar="N", help="of A B B A, to compare (default: 5)")


def rate_scale_flag(group: argparse._ArgumentGroup) -> None:
    """For `rates_of`."""
    group.add_argument(
        "--rate-scale", type=positive, nargs="+", metavar="X", help="the same as multiples of the load's own rate"
    )


def _target_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--share", type=share, metavar="X", help="of each class in time (default: 0.9)")
    group.add_argument(
        "--slo-factor", type=positive, default=5.0, metavar="K", help="TTFT target over a lone request's (default: 5)"
    )
    group.add_argument("--tpot-factor", type=positive, metavar="K", help="the same for TPOT (default: as for TTFT)")
    group.add_argument(
        "--slo", type=_slo, nargs="+", metavar="CLASS=TTFT[:TPOT]", help="targets in ms instead, of classes you name"
    )
    group.add_argument("--ttft-only", action="store_true", help="judge by TTFT alone")


def _server_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", default="", metavar="NAME", help="default: the first that the server names")
    group.add_argument("--text", action="store_true", help="send words, for a server that takes no token ids")
    group.add_argument("--chat", action="store_true", help="ask /v1/chat/completions: words, as one user message")
    group.add_argument("--vocab-size", type=count, default=1024, metavar="N", help="ids are below it (default: 1024)")
    group.add_argument("--api-key", default="", metavar="KEY", help="or in HEADWAY_BENCH_API_KEY")
    group.add_argument("--no-slo-headers", action="store_true", help="keep the targets from the server")
    group.add_argument("--slo-class-header", action="store_true", help="name the class, too: x-slo-class")
    group.add_argument("--timeout", type=positive, default=600.0, metavar="S", help="of a request (default: 600)")


# Words to values


def positive(word: str) -> float:
    value = _number(word)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"it must be a positive number, not {word!r}")
    return value


def _scale(word: str) -> float:
    """A number, or a fraction such as 1/16."""
    above, slash, below = word.partition("/")
    return positive(above) / positive(below) if slash else positive(word)


def share(word: str) -> float:
    value = _number(word)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"it must be over 0 and at most 1, not {word!r}")
    return value


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def count(word: str) -> int:
    if not (word.isascii() and word.isdigit() and 0 < int(word) < 10**9):
        raise argparse.ArgumentTypeError(f"it must be a whole number from 1 on, not {word!r}")
    return int(word)


def _seed(word: str) -> int:
    if not (word.isascii() and word.isdigit() and int(word) < 2**63):
        raise argparse.ArgumentTypeError(f"it must be a whole number from 0 on, not {word!r}")
    return int(word)


def _mix(word: str) -> dict[str, float]:
    pairs = [part.partition("=") for part in word.split(",")]
    if any(kind not in traces.KINDS or not _number(share) >= 0 for kind, _, share in pairs):
        classes = ", ".join(traces.KINDS)
        raise argparse.ArgumentTypeError(f"it must be like text=0.7,search=0.3 with classes of {classes}, not {word!r}")
    return {kind: float(share) for kind, _, share in pairs}


def _slo(word: str) -> tuple[str, SLO]:
    kind, _, both = word.partition("=")
    ttft, _, tpot = both.partition(":")
    seconds = [_number(one) / 1000 for one in (ttft, tpot) if one]
    if kind not in traces.KINDS or not seconds or not all(0 < one < math.inf for one in seconds):
        classes = ", ".join(traces.KINDS)
        raise argparse.ArgumentTypeError(
            f"it must be like text=250 or text=250:100, milliseconds with a class of {classes}, not {word!r}"
        )
    return kind, SLO(_number(ttft) / 1000 if ttft else None, _number(tpot) / 1000 if tpot else None)


class Side(NamedTuple):
    """A server by the name that the report gives it."""

    label: str
    url: str


def sides(options: argparse.Namespace, found: Parser) -> tuple[Side, ...]:
    """One server, or two to compare."""
    if options.compare is None:
        if options.url is None:
            found.error("give the URL of a server, or two with --compare.")
        return (Side("", _url(options.url, found)),)
    if options.url is not None:
        found.error("give either one URL or --compare with two, not both.")
    if len(options.rates or options.rate_scale or ()) != 1:
        found.error("--compare needs one rate for both servers: give --rates R.")
    named_ = []
    for letter, word in zip("AB", options.compare, strict=True):
        label, equals, url = word.partition("=")
        is_labelled = equals and "/" not in label
        named_.append(Side(label if is_labelled else letter, _url(url if is_labelled else word, found)))
    if named_[0].label == named_[1].label:
        found.error(f"the two servers need different labels, not {named_[0].label!r} twice.")
    return tuple(named_)


def fill(options: argparse.Namespace, found: Parser) -> None:
    """Defaults of what one server is judged and searched by; refused where two are compared, which nothing judges."""
    for name, default in ALONE.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif options.compare is not None:
            found.error(
                f"--{name} has no meaning with --compare, which looks for no rate and judges none: leave it out."
            )


def _url(word: str, found: Parser) -> str:
    if not word.startswith(("http://", "https://")):
        found.error(f"a server is given as http://HOST:PORT, not {word!r}.")
    return word.rstrip("/").removesuffix("/v1")


def load_of(options: argparse.Namespace, context: int | None) -> Load:
    """The load that the flags describe, fitted to the server's context. Raises ValueError."""
    path = Path(options.load)
    if options.load in TRACES or not path.exists():
        load = named(options.load, num_requests=options.num_requests, seed=options.seed)
    else:
        trace = traces.read(path, seed=options.seed)
        load = Load.of(path.name, f"trace {path.name}", trace, options.num_requests, options.seed)
    if options.class_mix is not None:
        load = load.mixed(options.class_mix, options.seed)
    if not load.timed or options.arrivals not in (None, "trace"):
        process: loads.Arrivals = options.arrivals or "poisson"
        rate = load.rate if load.timed and load.rate < math.inf else 1.0
        load = load.arriving(process, rate, options.seed, options.cv)
    answering = load if options.max_tokens is None else load.answering(options.max_tokens)
    scale = options.length_scale or fitting_scale(answering, context)
    if scale != 1:
        load = load.scaled(scale)
    if options.max_tokens is not None:
        load = load.answering(options.max_tokens)
    return load if context is None else load.within(context)


def rates_of(options: argparse.Namespace, load: Load) -> list[float] | None:
    """Requests per second to measure; None: to be searched for. Raises ValueError."""
    if options.rate_scale is None:
        return options.rates  # type: ignore[no-any-return]
    return [load.faster(scale).rate for scale in options.rate_scale]


def fitting_scale(load: Load, context: int | None) -> float:
    """So that the longest request fits the context, rounded down to two digits; 1 if it does, or nobody knows."""
    longest = max(asked.num_prompt + asked.num_output for asked in load.requests)
    if context is None or longest <= context:
        return 1.0
    digits = 10.0 ** (math.floor(math.log10(context / longest)) - 1)
    return math.floor(context / longest / digits) * digits


def targets_of(
    options: argparse.Namespace, load: Load, ttft_s: Mapping[str, float], tpot_s: float | None
) -> dict[str, SLO]:
    """Targets in proportion to what a lone request takes; those that were named go before them."""
    base = loads.base_kind(load)
    found = loads.targets(load, ttft_s[base], options.slo_factor, tpot_s, options.tpot_factor)
    return found | {kind: slo for kind, slo in options.slo or () if kind in found}


def check(options: argparse.Namespace, found: Parser) -> None:
    """Refuse what could only give a meaningless number."""
    if options.num_requests < MIN_REQUESTS:
        found.error(f"--num-requests must be at least {MIN_REQUESTS}: of fewer no share means anything.")
    if options.rates is not None and options.rate_scale is not None:
        found.error("give either --rates or --rate-scale, not both.")
    if options.arrivals == "trace" and options.load == "qwen":
        found.error("the load qwen has no arrivals of its own: give another process to --arrivals.")


def make_folder(out: Path) -> None:
    """For the results, before they are measured. Raises ValueError with one sentence."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # it may be there, and be somebody else's
            pass
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written to: {error.strerror}.") from error


def check_reachable(
    options: argparse.Namespace,
    load: Load,
    targets: Mapping[str, SLO],
    ttft_s: Mapping[str, float],
    tpot_s: float | None,
) -> None:
    """Raise ValueError where no rate can be found: more than may be late are when they are alone. `ttft_s` is that of
    each class's p90 prompt."""
    for kind, slo in targets.items():
        has_pace = any(asked.kind == kind and asked.num_output > 1 for asked in load.requests)
        asked = {
            "TTFT": (slo.ttft_s if options.share >= GOOD_SHARE else None, ttft_s[kind]),
            "TPOT": (slo.tpot_s if has_pace and not options.ttft_only else None, tpot_s),
        }
        for name, (target_s, alone_s) in asked.items():
            if target_s is not None and alone_s is not None and target_s < alone_s:
                raise ValueError(
                    f"No rate can keep {kind}'s {name} target of {target_s * 1000:.3g} ms: a lone request takes "
                    f"{alone_s * 1000:.3g} ms. Give it more time with --slo, or rates to look at with --rates."
                )
