"""What was wanted of Headway beside its peers, and whether it was reached: figures in, words out."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# ours over a peer, by the peer's name and the case, in one round; what failed or was not asked for is not in it
Ratios = Mapping[tuple[str, str], float]

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
    """A peer, and ours over it: the median of the rounds."""

    name: str
    ratio: float


def best(rounds: Sequence[Ratios], case: str, names: Sequence[str]) -> Best | None:
    """The one of these that ours is least ahead of, if any was measured."""
    found = {name: [ratios[name, case] for ratios in rounds if (name, case) in ratios] for name in names}
    there = [Best(name, statistics.median(ratios)) for name, ratios in found.items() if ratios]
    return min(there, key=lambda each: each.ratio, default=None)


def verdict(wanted: Wanted, rounds: Sequence[Ratios], of_reading: float | None = None) -> str:
    """One sentence. Against the best of the peers; the median of the rounds counts, unless what was wanted lies between
    the least and the most. `of_reading` is our share of the read bandwidth, where that counts too."""
    case = f"{wanted.case}{', int8' if 'int8' in wanted.ours else ''}"
    peer = best(rounds, wanted.case, wanted.peers)
    asked, missing = f"{wanted.times:g} × {_either(wanted.peers)}", ""
    reads = wanted.case == "decode B1" and of_reading is not None and wanted.ours == "Headway"
    if reads:
        asked += f" or {OF_READING:.0%} of the read bandwidth"
    if absent := [name for name in wanted.peers if not any((name, wanted.case) in ratios for ratios in rounds)]:
        missing = f" (without {', '.join(absent)})"
    shown, said = [], "short"
    if peer is not None:
        ratios = [each[peer.name, wanted.case] for each in rounds if (peer.name, wanted.case) in each]
        spread = f" ({min(ratios):.2f} … {max(ratios):.2f})" if len(ratios) > 1 else ", in a single round"
        shown.append(f"{peer.ratio:.2f} × {peer.name}{spread}")
        if min(ratios) < wanted.times <= max(ratios):
            said = "undecided"
        elif min(ratios) >= wanted.times:
            said = "reached"
    if reads and of_reading is not None:
        shown.append(f"{of_reading:.0%} of the read bandwidth")
        said = "reached" if of_reading >= OF_READING else said
    if not shown and not any(name == wanted.case for each in rounds for _, name in each):
        return f"{case}: not measured."
    if not shown:
        return f"{case}: cannot be said, wanted {asked}{missing}."
    return f"{case}: {said}, {', '.join(shown)}; wanted {asked}{missing}."


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"the best of {', '.join(names)}"
