"""What the goodput command found, as a file for programs and a page for people. Measures nothing itself."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from headway.bench import report
from headway.bench.chart import COLOURS, Curve, Mark, Panel, Style, png
from headway.bench.contest import Contender, Run, crossing, told
from headway.bench.score import GOOD_SHARE

OURS = "operator"
WANTED = {  # ours over another's, by case; 0.95 of the best chunk size in all others
    "qwen 1/16, k = 2": {"fcfs": 5.6, "fcfs, packed": 5.6, "chunk": 1.2},
    "qwen 1/32, k = 2": {"fcfs": 5.6, "fcfs, packed": 5.6, "chunk": 1.2},
    "qwen 1/16, k = 1.5": {"chunk": 3.0},
    "qwen 1/32, k = 1.5": {"chunk": 3.0},
}
ELSEWHERE = {"chunk": 0.95}
AROUND = (  # the sections that belong to a case, beside the ratios: `goodput_more` makes them
    "Tighter and looser targets",
    "Light load and overload",
    "Where nothing is gained: uniform lengths",
    "First token and pace together",
)
UNMEASURED = "Nothing on this page was measured on an engine: `python -m headway.bench.goodput` does that."
MORE = "python -m headway.bench.goodput_more"
FILE = "goodput.json"
PICTURE = "goodput.png"


class Measured(msgspec.Struct, frozen=True):
    """One run, in short."""

    rate: float
    shares: dict[str, float]  # of TTFT targets met, by class
    overall: float
    disturbed: bool = False


class Policy(msgspec.Struct, frozen=True):
    """One scheduler in one case. `goodputs`: requests per second, one for each draw, 0 if no rate that was tried passed
    (of chunk sizes only the best are followed to where they fail)."""

    name: str
    goodputs: list[float]
    simulated: float
    runs: list[Measured]  # of the first draw, by rate
    simulated_runs: list[Measured]
    preemptions: float  # per request, in the run nearest to the goodput
    parked_tokens: int
    decision_p50_us: float
    decision_p99_us: float
    num_disturbed: int

    @property
    def goodput(self) -> float:
        return statistics.median(self.goodputs)

    @property
    def is_open(self) -> bool:
        """Whether no rate that was tried in the first draw was too high: its goodput may be higher."""
        worst = {
            rate: [(min(r.shares.values()), r.disturbed) for r in self.runs if r.rate == rate] for rate in self.rates
        }
        return all(told(runs) >= GOOD_SHARE for runs in worst.values())

    @property
    def overall(self) -> tuple[float, bool]:
        """Of the first draw, all classes as one; and whether no rate that was tried was too high for that."""
        points = [(r, told((run.overall, run.disturbed) for run in self.runs if run.rate == r)) for r in self.rates]
        return crossing(points), all(share >= GOOD_SHARE for _, share in points)

    @property
    def rates(self) -> list[float]:
        """That were tried in the first draw, in order."""
        return sorted({run.rate for run in self.runs})

    @property
    def too_much(self) -> float:
        """The lowest rate of the first draw at which a class failed."""
        return min((run.rate for run in self.runs if min(run.shares.values()) < GOOD_SHARE), default=math.inf)


class CaseResult(msgspec.Struct, frozen=True):
    """Everything of one load and k."""

    name: str
    source: str
    num_requests: int
    isolated_ttft_ms: float
    targets_ms: dict[str, float]
    policies: list[Policy]
    provenance: str
    bytes_per_parked_token: int
    model: str = ""
    num_discarded: int = 0  # runs that were disturbed and made again
    kernels: str = ""  # with which it was made, and the prices that the engine measured of them
    alone: dict[str, float] = {}  # share of each class that would be in time if nobody else were there
    most_rate: float = 0.0  # at which the prompts' own work would fill all time, were a step free; 0: not known
    command: str = ""  # that made it

    @property
    def full_name(self) -> str:
        return f"{self.model}: {self.name}"

    def policy(self, name: str) -> Policy:
        return next(policy for policy in self.policies if policy.name == name)

    @property
    def chunks(self) -> list[Policy]:
        return [policy for policy in self.policies if policy.name.startswith("chunk")]

    def lasting(self, goodputs: Sequence[float]) -> list[float]:
        """Of each draw, as far as it could be kept for ever."""
        return [min(good, self.most_rate or good) for good in goodputs]

    @property
    def best_chunk(self) -> Policy:
        """The size that is best in most draws, and has the best figure in one of those."""
        return max(self.chunks, key=lambda p: (p.goodput, max(p.goodputs)))

    @property
    def best_chunks(self) -> list[float]:
        """The goodput of the best size of each draw: not always the same one."""
        return [max(each) for each in zip(*(policy.goodputs for policy in self.chunks), strict=True)]


def policy_of(
    name: str,
    draws: Sequence[Mapping[str, Contender]],
    simulated: Contender,
    num_requests: int,
) -> Policy:
    """A scheduler's part of a case."""
    contenders = [draw[name] for draw in draws if name in draw]
    first = contenders[0]
    knee = min(first.runs, key=lambda run: abs(run.rate - first.good))
    return Policy(
        name=name,
        goodputs=[contender.good for contender in contenders],
        simulated=simulated.good,
        runs=_measured(first.runs),
        simulated_runs=_measured(simulated.runs),
        preemptions=knee.num_preemptions / num_requests,
        parked_tokens=max(run.most_parked_tokens for contender in contenders for run in contender.runs),
        decision_p50_us=1e6 * knee.decision_p50_s,
        decision_p99_us=1e6 * knee.decision_p99_s,
        num_disturbed=sum(run.disturbed for contender in contenders for run in contender.runs),
    )


def _measured(runs: Sequence[Run]) -> list[Measured]:
    return [
        Measured(run.rate, run.score.shares(ttft_only=True), run.overall, run.disturbed)
        for run in sorted(runs, key=lambda run: run.rate)
    ]


class Section(msgspec.Struct, frozen=True):
    """A part of the page that is not a case: a title, and its text with tables. `case` names the one whose rates it
    goes by: it says nothing any more when that is made anew."""

    title: str
    body: str
    case: str = ""


class Kept(msgspec.Struct, frozen=True):
    """All that was ever found, the newest of each."""

    cases: list[CaseResult] = []
    sections: list[Section] = []


def keep(folder: Path, found: CaseResult | Section) -> None:
    """Put a case or section into the folder's file, in place of an older one of the same model and name."""
    kept = read(folder)
    if isinstance(found, Section):
        sections = [section for section in kept.sections if section.title != found.title]
        kept = Kept(kept.cases, [*sections, found])
    else:
        cases = [case for case in kept.cases if (case.model, case.name) != (found.model, found.name)]
        kept = Kept([*cases, found], [section for section in kept.sections if section.case != found.full_name])
    folder.mkdir(parents=True, exist_ok=True)
    report.replace(folder / FILE, msgspec.json.format(msgspec.json.encode(kept), indent=1))


def read(folder: Path) -> Kept:
    path = folder / FILE
    return msgspec.json.decode(path.read_bytes(), type=Kept) if path.exists() else Kept()


def write(folder: Path) -> None:
    """The page and its picture, from what is kept."""
    kept = read(folder)
    sections = [f"## {section.title}\n\n{section.body}" for section in kept.sections]
    measured = _measured_part(kept, folder) if kept.cases else [f"{UNMEASURED} {_how([])}"]
    body = "\n\n".join([*measured, *sections])
    command = "python -m headway.bench.goodput"
    report.write("goodput", "Goodput", f"{command}`, `{command}_more` and `{command}_simulated", body, folder)


def _measured_part(kept: Kept, folder: Path) -> list[str]:
    """Everything about the cases; the picture is of the first that something special is wanted of, and the sections
    belong to that."""
    cases = kept.cases
    drawn = next((case for name in WANTED for case in cases if case.name == name), cases[0])
    png([_panel(drawn, name) for name in _drawn(drawn)], folder / PICTURE, num_columns=3)
    return [
        summary(cases),
        verdicts(cases),
        *missing(drawn, kept.sections),
        f"## Predicted and measured\n\nThe worst class's attainment against the rate: dots were measured, lines "
        f"simulated with the prices that the engine measured at its start ({drawn.model}, {drawn.name}).\n\n"
        f"![attainment, measured and simulated]({PICTURE})",
        *(details(case) for case in cases),
    ]


def missing(case: CaseResult, sections: Sequence[Section]) -> list[str]:
    """A line that says which sections about the case are not there; none if all are."""
    known = {section.title for section in sections if section.case == case.full_name}
    absent = "; ".join(title for title in AROUND if title not in known)
    if not absent:
        return []
    return [f"Not here for {case.full_name}, never made or older than the case: {absent}. `{MORE}` makes them."]


def _drawn(case: CaseResult) -> list[str]:
    return [OURS, case.best_chunk.name, "fcfs"]


def _panel(case: CaseResult, name: str) -> Panel:
    policy = case.policy(name)

    def curve(label: str, runs: Sequence[Measured], style: Style, colour: str) -> Curve:
        return Curve(label, [run.rate for run in runs], [min(run.shares.values()) for run in runs], style, colour)

    rates = [run.rate for run in policy.runs]
    near = [run for run in policy.simulated_runs if min(rates) / 1.5 <= run.rate <= max(rates) * 1.5]
    curves = [
        curve("simulated", near, "line", COLOURS[0]),
        curve("measured", policy.runs, "dots", COLOURS[1]),
    ]
    return Panel(name, "requests per second", "worst class", curves, [Mark("y", GOOD_SHARE)], y_range=(0.0, 1.02))


def summary(cases: Sequence[CaseResult]) -> str:
    """Our goodput over that of the others, case by case, and what is compared."""
    return f"## Ratios of goodput\n\n{_how(cases)}\n\n{ratios(cases)}"


def ratios(cases: Sequence[CaseResult]) -> str:
    """The table of them."""
    rows = []
    for case in cases:
        ours, chunk = case.policy(OURS), case.best_chunk
        known = {policy.name: policy for policy in case.policies}
        others = [known.get(name) for name in ("fcfs", "fcfs, packed", "deadline, none", "layer")]
        lasting = case.lasting(ours.goodputs)
        over = [_ratio(lasting, case.lasting(case.best_chunks))]
        over += ["" if other is None else _ratio(lasting, case.lasting(other.goodputs)) for other in others]
        rows.append([case.model, case.name, f"{ours.goodput:.3g}", chunk.name, *over])
    header = ["model", "load, targets", "ours, req/s", "best chunk", "ours / best chunk", "/ FCFS unchunked",
              "/ FCFS packed", "/ deadline order, no preemption", "/ layer-level"]  # fmt: skip
    return report.table(header, rows)


def _first(policy: Policy) -> str:
    """The goodput of the first draw; if no rate passed, what it is below, and if all did, at least what."""
    good = policy.goodputs[0]
    if not good:
        return f"< {policy.too_much:.3g}"
    return f"≥ {good:.3g}" if policy.is_open else f"{good:.3g}"


def verdicts(cases: Sequence[CaseResult]) -> str:
    """What was wanted of each case, and whether it was reached."""
    lines = []
    for case in cases:
        known = {policy.name: policy for policy in case.policies} | {"chunk": case.best_chunk}
        ours = case.lasting(case.policy(OURS).goodputs)
        for name, wanted in WANTED.get(case.name, ELSEWHERE).items():
            if (other := known.get(name)) is None:
                continue
            ratios = _ratios(ours, case.lasting(case.best_chunks if name == "chunk" else other.goodputs))
            if not ratios:
                lines.append(f"- {case.model}, {case.name}: no verdict, {other.name} kept no rate that was tried.")
                continue
            found = statistics.median(ratios)
            said = "reached" if found >= wanted else "not reached"
            if (other if found >= wanted else case.policy(OURS)).is_open:
                said = "undecided, since no rate was too high for " + (other.name if found >= wanted else OURS)
            bound = "" if found >= wanted else _bound(case.most_rate, other) + _alone(case)
            if min(ratios) < wanted <= max(ratios) and len(ratios) > 1:
                bound = f", which lies within the spread of the draws{bound}"
            lines.append(f"- {case.model}, {case.name}: {said}, {found:.2f} × {other.name} against {wanted:g}{bound}.")
    return "\n".join(lines)


def _ratios(ours: Sequence[float], others: Sequence[float]) -> list[float]:
    """Draw by draw, of those in which the other kept any rate."""
    return [a / b for a, b in zip(ours, others, strict=True) if b > 0]


def _alone(case: CaseResult) -> str:
    """Of the class that has it hardest, how many would be in time in an empty house."""
    if not case.alone:
        return ""
    kind, share = min(case.alone.items(), key=lambda pair: pair[1])
    return (
        f"; of {kind} prompts {share:.0%} would be in time if nobody else were there: {share - GOOD_SHARE:.0%} of "
        f"them may be late for others' sake"
    )


def _bound(most_rate: float, other: Policy) -> str:
    """What no scheduler could exceed, as so many times another's goodput."""
    if not other.goodput or not most_rate:
        return ""
    return (
        f"; at {most_rate:.3g} requests a second, {most_rate / other.goodput:.2f} × {other.name}, the prompts' own "
        "work would fill all time, were a step free and every wait possible"
    )


def _how(cases: Sequence[CaseResult]) -> str:
    most = max((len(policy.goodputs) for case in cases for policy in case.policies), default=1)
    draws = "Medians over draws of the load (least … most)." if most > 1 else "One draw of each load."
    return (
        "Goodput is the rate at which what all runs attained, of the worst class and as shares that never rise with "
        f"the rate, crosses {GOOD_SHARE:.0%}; ≥ if no rate that was tried was too high. {draws} "
        "Ours is suspended at operators, takes prompts in the order of slack, packs them, and refuses what it cannot "
        "serve in time. Layers differ from it in nothing but where a step may be suspended. A chunk is filled up to "
        "its size with prompts in the same order, as servers do, whoever in it is hurt by that, and runs to its end; "
        "deadline order is not suspended; FCFS refuses nobody and reads prompts one by one, or together if it is "
        "called packed. Nobody keeps a prefix cache. In ratios and verdicts nothing counts as more than the rate at "
        "which the prompts' own work would fill all time: what is kept beyond that is kept for as long as the requests "
        "last."
    )


def _ratio(ours: Sequence[float], others: Sequence[float]) -> str:
    ratios = _ratios(ours, others)
    if not ratios:
        return "none served"
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"


def against(case: CaseResult, policy: Policy) -> list[str]:
    """A row: a scheduler, its goodput, and ours over it."""
    told = f"{'≥ ' if policy.is_open else ''}{policy.goodput:.3g}" if policy.goodput else "none"
    if len(policy.goodputs) > 1:
        told += f" ({min(policy.goodputs):.3g} … {max(policy.goodputs):.3g})"
    ours = case.lasting(case.policy(OURS).goodputs)
    return [policy.name, told, "" if policy.name == OURS else _ratio(ours, case.lasting(policy.goodputs))]


def details(case: CaseResult) -> str:
    """One case: every scheduler's goodput, and what it did there."""
    rows = []
    for policy in sorted(case.policies, key=lambda policy: -policy.goodput):
        runs = [run for run in policy.runs if run.rate > policy.goodputs[0]]
        next_rate = min((run.rate for run in runs), default=0.0)
        at_it = sorted((run.shares for run in runs if run.rate == next_rate), key=lambda shares: min(shares.values()))
        beyond = at_it[len(at_it) // 2] if at_it else {}  # the run that decided, if there were several
        overall, is_open = policy.overall
        rows.append(
            [
                policy.name,
                " ".join([_first(policy), *(f"{good:.3g}" if good else "none" for good in policy.goodputs[1:])]),
                f"{policy.simulated:.3g}",
                f"≥ {overall:.3g}" if is_open else f"{overall:.3g}" if overall else f"< {policy.rates[0]:.3g}",
                ", ".join(f"{kind} {share:.0%}" for kind, share in beyond.items()),
                f"{policy.preemptions:.2f}",
                f"{policy.parked_tokens * case.bytes_per_parked_token / 2**20:.1f}",
                f"{policy.decision_p50_us:.0f} / {policy.decision_p99_us:.0f}",
            ]
        )
    header = ["scheduler", "goodput, req/s, each draw", "simulated", "all classes in one", "attained just beyond it",
              "preemptions per request", "parked MiB, most", "decision µs, p50 / p99"]  # fmt: skip
    targets = ", ".join(f"{kind} {milliseconds:.0f} ms" for kind, milliseconds in case.targets_ms.items())
    disturbed = sum(policy.num_disturbed for policy in case.policies)
    lines = [
        f"## {case.model}: {case.name}",
        f"{case.source}. {case.num_requests} requests a run, TTFT with one token each. Isolated TTFT of the p90 prompt "
        f"{case.isolated_ttft_ms:.1f} ms; targets: {targets}. {case.kernels}".strip(),
        report.table(header, rows),
    ]
    lines.append(
        f"Rates and targets are those of the machine at the beginning, and went with its speed from run to run. "
        f"{case.num_discarded} disturbed runs were thrown away and made again; {disturbed} stayed disturbed and are "
        f"included."
    )
    if 0 < case.most_rate < max(case.policy(OURS).rates, default=0.0):
        lines.append(
            f"At {case.most_rate:.3g} requests a second the prompts' own work would fill all time, were a step free: "
            f"what is kept beyond that lasts as long as {case.num_requests} requests, and not for ever."
        )
    lines.append(f"Printed by `{case.command}`. {case.provenance}" if case.command else case.provenance)
    return "\n\n".join(lines)
