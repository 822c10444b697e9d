"""What was wanted of Headway beside its peers, and whether it was reached: figures in, words out."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# tokens a second, by engine's name and case; what failed or was not asked for is not in it
Rates = Mapping[tuple[str, str], float]

PREFILLS = ("prefill 128", "prefill 512", "prefill 2048", "prefill mixed")
ALL_BF16 = ("OpenVINO", "llama.cpp", "transformers", "vLLM")
BATCHING = ("OpenVINO", "vLLM")
OF_READING = 0.92  # of the read bandwidth, which is as good as being ahead where reading is all there is


class Wanted(NamedTuple):
    """Ours at least `times` the best of these."""

    case: str
    ours: str
    peers: tuple[str, ...]
    times: float


WANTED = (
    *(Wanted(case, "Headway", ALL_BF16, 1.0) for case in PREFILLS),
    Wanted("decode B1", "Headway", ("llama.cpp",), 1.1),
    Wanted("decode B4", "Headway", BATCHING, 1.1),
    Wanted("decode B8", "Headway", BATCHING, 1.15),
    Wanted("decode B16", "Headway", BATCHING, 1.15),
    *(
        Wanted(case, "Headway int8", ("OpenVINO int8",), 1.0)
        for case in (*PREFILLS, "decode B1", "decode B4", "decode B8", "decode B16")
    ),
)


class Best(NamedTuple):
    name: str
    rate: float


def best(rates: Rates, case: str, names: Sequence[str]) -> Best | None:
    """The fastest of these, if any was measured."""
    there = [Best(name, rates[name, case]) for name in names if (name, case) in rates]
    return max(there, key=lambda each: each.rate, default=None)


def verdict(wanted: Wanted, rounds: Sequence[Rates], of_reading: float | None = None) -> str:
    """One sentence. `rounds`: what each found; a ratio is one of the same round, and the median of them counts, unless
    what was wanted lies between the least and the most. `of_reading` is our share of the read bandwidth, where that
    counts too."""
    rates = medians(rounds)
    case = f"{wanted.case}{', int8' if 'int8' in wanted.ours else ''}"
    ours = rates.get((wanted.ours, wanted.case))
    peer = best(rates, wanted.case, wanted.peers)
    if ours is None:
        return f"{case}: not measured."
    asked, missing = f"{wanted.times:g} × {_either(wanted.peers)}", ""
    reads = wanted.case == "decode B1" and of_reading is not None and wanted.ours == "Headway"
    if reads:
        asked += f" or {OF_READING:.0%} of the read bandwidth"
    if absent := [name for name in wanted.peers if (name, wanted.case) not in rates]:
        missing = f" (without {', '.join(absent)})"
    shown, said = [], "short"
    if peer is not None:
        ratios = _ratios(wanted, rounds)
        spread = f" ({min(ratios):.2f} … {max(ratios):.2f})" if len(ratios) > 1 else ", in a single round"
        shown.append(f"{statistics.median(ratios):.2f} × {peer.name}{spread}")
        if min(ratios) < wanted.times <= max(ratios):
            said = "undecided"
        elif min(ratios) >= wanted.times:
            said = "reached"
    if reads and of_reading is not None:
        shown.append(f"{of_reading:.0%} of the read bandwidth")
        said = "reached" if of_reading >= OF_READING else said
    if not shown:
        return f"{case}: cannot be said, wanted {asked}{missing}."
    return f"{case}: {said}, {', '.join(shown)}; wanted {asked}{missing}."


def medians(rounds: Sequence[Rates]) -> Rates:
    """Of each engine and case, over the rounds."""
    keys = dict.fromkeys(key for rates in rounds for key in rates)
    return {key: statistics.median([rates[key] for rates in rounds if key in rates]) for key in keys}


def _ratios(wanted: Wanted, rounds: Sequence[Rates]) -> list[float]:
    """Ours over the best of the peers, round by round."""
    ratios = []
    for rates in rounds:
        peer = best(rates, wanted.case, wanted.peers)
        if peer is not None and (wanted.ours, wanted.case) in rates:
            ratios.append(rates[wanted.ours, wanted.case] / peer.rate)
    return ratios


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"the best of {', '.join(names)}"
