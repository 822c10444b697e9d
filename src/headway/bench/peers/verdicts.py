"""What was wanted of Headway beside its peers, and whether it was reached: figures in, words out."""

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


def verdict(wanted: Wanted, rates: Rates, of_reading: float | None = None) -> str:
    """One sentence. `of_reading` is our share of the read bandwidth, where that counts too."""
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
    shown, reached = [], False
    if peer is not None:
        shown.append(f"{ours / peer.rate:.2f} × {peer.name}")
        reached = ours >= wanted.times * peer.rate
    if reads and of_reading is not None:
        shown.append(f"{of_reading:.0%} of the read bandwidth")
        reached = reached or of_reading >= OF_READING
    if not shown:
        return f"{case}: cannot be said, wanted {asked}{missing}."
    return f"{case}: {'reached' if reached else 'short'}, {', '.join(shown)}; wanted {asked}{missing}."


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"the best of {', '.join(names)}"
