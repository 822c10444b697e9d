"""What the goodputs of several ways of sharing a device say of the one setting: nothing that they do not."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import NamedTuple

from headway.bench.contest import Contender
from headway.bench.multiplex_loads import AUTO, MIXED, SPLIT, TURNS
from headway.bench.multiplex_sure import Drawings, interval

WITHIN = 0.03  # of the best of the others: how far the one setting may be behind on any load
AHEAD = 1.15  # times each of the plain ways: wanted where prices say that a share pays


class Kept(NamedTuple):
    """The highest rate at which one way keeps its promises, or a bound of it: it kept every rate that was tried, or
    none."""

    rate: float
    or_more: bool = False
    or_less: bool = False
    again: Drawings = ()  # the same had other requests been drawn, drawing by drawing

    @classmethod
    def of(cls, contender: Contender, again: Drawings = ()) -> "Kept":
        if contender.good == 0.0:
            return cls(min(run.rate for run in contender.runs), or_less=True, again=again)
        return cls(contender.good, or_more=contender.good == max(run.rate for run in contender.runs), again=again)

    @property
    def told(self) -> str:
        return f"{'≥ ' if self.or_more else '< ' if self.or_less else ''}{self.rate:.2f}{_between(self.again)}"

    def over(self, other: "Kept") -> "Over":
        ratio = self.rate / other.rate if other.rate else 1.0 if self.rate == 0.0 else float("inf")
        both = zip(self.again, other.again, strict=False)
        again = tuple((low / most, high / least if least else inf) for (low, high), (least, most) in both)
        return Over(ratio, self.or_more or other.or_less, self.or_less or other.or_more, again)


class Over(NamedTuple):
    """One goodput over another, or a bound of that."""

    ratio: float
    or_more: bool = False
    or_less: bool = False
    again: Drawings = ()

    @property
    def told(self) -> str:
        sign = {(True, True): "about ", (True, False): "≥ ", (False, True): "≤ "}
        return f"{sign.get((self.or_more, self.or_less), '')}{self.ratio:.2f}{_between(self.again)}"

    def says(self, wanted: float) -> str:
        """Whether it is so much, if bounds and drawings say that."""
        low, high = interval(self.again) or (self.ratio, self.ratio)
        if self.ratio >= wanted:
            return "undecided" if self.or_less or low < wanted else "reached"
        return "undecided" if self.or_more or high >= wanted else "not reached"


def _between(again: Drawings) -> str:
    """Where most of the drawings lie, if there are any."""
    found = interval(again)
    return "" if found is None else f" ({found[0]:.2f} … {'' if found[1] == inf else f'{found[1]:.2f}'})"


def verdict(found: Mapping[str, Mapping[str, Kept]], predicted: Mapping[str, Mapping[str, Kept]] | None = None) -> str:
    """Load by load: whether the one setting keeps up with the best of the others, by how much it is ahead of each
    plain way, which is wanted where it is `predicted`, and where that leaves what is served by default."""
    expected = predicted or {}
    return "\n".join(f"- {name}: {_verdict(by_way, expected.get(name))}" for name, by_way in found.items())


def _verdict(by_way: Mapping[str, Kept], predicted: Mapping[str, Kept] | None) -> str:
    others = [way for way in by_way if way != AUTO and "shortest" not in way]
    over = by_way[AUTO].over(_best_of([by_way[way] for way in others]))
    rest = _best([way for way in others if way != MIXED], by_way)
    return (
        f"{over.told} × the best of the others ({_best(others, by_way)}); within {WITHIN:.0%}: "
        f"{over.says(1 - WITHIN)}. {_ahead(by_way)}. {'' if predicted is None else f'On prices {_ahead(predicted)}. '}"
        f"What is served by default, {MIXED}: {by_way[MIXED].over(by_way[rest]).told} × the best of the rest but "
        f"{AUTO} ({rest})."
    )


def _ahead(by_way: Mapping[str, Kept]) -> str:
    """By how much the one setting is ahead of each plain way."""
    chunks = [way for way in by_way if way.startswith("chunk") and "shortest" not in way]
    over = {way: by_way[AUTO].over(by_way[way]) for way in (_best(chunks, by_way), TURNS, SPLIT)}
    said = [each.says(AHEAD) for each in over.values()]
    of_all = next((word for word in ("not reached", "undecided") if word in said), "reached")
    return f"{', '.join(f'{each.told} × {way}' for way, each in over.items())}; {AHEAD:g} × each: {of_all}"


def _best_of(several: Sequence[Kept]) -> Kept:
    """The best of them, and in each drawing whoever is the best then."""
    best = max(several, key=lambda kept: kept.rate)
    drawings = zip(*(kept.again for kept in several), strict=False)
    return best._replace(again=tuple((max(low for low, _ in each), max(high for _, high in each)) for each in drawings))


def _best(ways: Sequence[str], by_way: Mapping[str, Kept]) -> str:
    return max(ways, key=lambda way: by_way[way].rate)
