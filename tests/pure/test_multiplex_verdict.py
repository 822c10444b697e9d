"""What the page on ways of sharing a device says of its figures: nothing that they do not say."""

import pytest

from headway.bench.multiplex_loads import AUTO, MIXED, SPLIT, TURNS
from headway.bench.multiplex_verdict import Kept, verdict

FIGURE, AT_LEAST, BELOW = Kept(2.0), Kept(2.0, or_more=True), Kept(2.0, or_less=True)


@pytest.mark.parametrize(
    ("one", "other", "told", "at_least_half", "at_least_thrice"),
    [
        (FIGURE, FIGURE, "1.00", "reached", "not reached"),
        (AT_LEAST, FIGURE, "≥ 1.00", "reached", "undecided"),
        (FIGURE, AT_LEAST, "≤ 1.00", "undecided", "not reached"),
        (BELOW, FIGURE, "≤ 1.00", "undecided", "not reached"),
        (FIGURE, BELOW, "≥ 1.00", "reached", "undecided"),
        (AT_LEAST, AT_LEAST, "about 1.00", "undecided", "undecided"),
        (BELOW, BELOW, "about 1.00", "undecided", "undecided"),
    ],
)
def test_a_bound_is_no_figure(one: Kept, other: Kept, told: str, at_least_half: str, at_least_thrice: str) -> None:
    """Who kept every rate that was tried may be better, who kept none is worse: a claim may be left undecided."""
    over = one.over(other)
    assert (over.told, over.says(0.5), over.says(3.0)) == (told, at_least_half, at_least_thrice)


def test_one_load_in_a_line() -> None:
    """Against the best of all, against each plain way, and what is served by default against the rest."""
    rates = {"chunk 32": 1.0, "chunk 128": 2.0, TURNS: 3.0, MIXED: 4.0, SPLIT: 2.5, AUTO: 3.9, f"{AUTO}, shortest": 9.0}
    kept = {way: Kept(rate) for way, rate in rates.items()}
    assert verdict({"balanced": kept}) == (
        "- balanced: 0.97 × the best of the others (turns, riding along); within 3%: reached. 1.95 × chunk 128, "
        "1.30 × turns, 1.56 × fixed split; 1.15 × each: reached. What is served by default, turns, riding along: "
        "1.33 × the best of the rest but auto (turns)."
    )
    slower = {way: Kept(1.0) for way in rates}
    told = verdict({"balanced": kept}, {"balanced": slower})
    assert " On prices 1.00 × chunk 32, 1.00 × turns, 1.00 × fixed split; 1.15 × each: not reached. What" in told
    assert "within 3%: undecided" in verdict({"balanced": kept | {MIXED: Kept(4.0, or_more=True)}})


def drawings(*pairs: float) -> tuple[tuple[float, float], ...]:
    return tuple((each, each) for each in pairs for _ in range(10))


def test_ahead_of_each_is_ahead_of_all_of_them() -> None:
    """One that is left open leaves it open, however little another is ahead of; one that is not, decides."""
    auto = Kept(12.0, again=drawings(12.0, 12.0))
    ways = {
        "chunk 32": Kept(6.0, again=drawings(6.0, 6.0)),
        TURNS: Kept(10.0, again=drawings(10.0, 10.0)),
        MIXED: Kept(10.0, again=drawings(10.0, 10.0)),
        SPLIT: Kept(9.0, again=drawings(8.0, 11.0)),
        AUTO: auto,
    }
    assert "1.15 × each: undecided" in verdict({"balanced": ways})
    assert "1.15 × each: reached" in verdict({"balanced": ways | {SPLIT: Kept(9.0, again=drawings(8.0, 9.0))}})
    assert "1.15 × each: not reached" in verdict({"balanced": ways | {TURNS: Kept(11.0, again=drawings(11.0, 11.0))}})


def test_the_best_of_the_others_is_another_in_each_drawing() -> None:
    """Of two that are as good as each other, one is ahead in each."""
    ways = {
        "chunk 32": Kept(10.0, again=drawings(9.0, 11.0)),
        TURNS: Kept(9.9, again=drawings(11.0, 9.0)),
        MIXED: Kept(5.0, again=drawings(5.0, 5.0)),
        SPLIT: Kept(5.0, again=drawings(5.0, 5.0)),
        AUTO: Kept(10.0, again=drawings(10.0, 10.0)),
    }
    assert verdict({"balanced": ways}).startswith(
        "- balanced: 1.00 (0.91 … 0.91) × the best of the others (chunk 32); within 3%: undecided."
    )
