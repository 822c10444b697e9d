"""What the page on ways of sharing a device says of its figures: nothing that they do not say."""

from headway.bench.multiplex import AUTO, MIXED, SPLIT, TURNS, Over, verdict


def test_a_bound_is_no_figure() -> None:
    """Who kept every rate that was tried may be better than it looks: then only one side of a claim can be decided."""
    assert (Over(2.0, 1.0).told, Over(2.0, 1.0).says(1.5)) == ("2.00", "reached")
    assert (Over(2.0, 1.0, other_is_open=True).told, Over(2.0, 1.0, other_is_open=True).says(1.5)) == (
        "≤ 2.00",
        "undecided",
    )
    assert Over(1.0, 1.0, other_is_open=True).says(1.5) == "not reached"
    assert (Over(2.0, 1.0, is_open=True).says(1.5), Over(1.0, 1.0, is_open=True).says(1.5)) == ("reached", "undecided")
    assert (Over(0.0, 0.0).ratio, Over(1.0, 0.0).ratio) == (1.0, float("inf"))


def test_one_load_in_a_line() -> None:
    """Against the best of all, against each plain way, and what is served by default against the rest."""
    rates = {"chunk 32": 1.0, "chunk 128": 2.0, TURNS: 3.0, MIXED: 4.0, SPLIT: 2.5, AUTO: 3.9, f"{AUTO}, shortest": 9.0}
    assert verdict({"balanced": rates}, {}) == (
        "- balanced: 0.97 × the best of the others (turns, riding along); within 3%: reached. 1.95 × chunk 128, "
        "1.30 × turns, 1.56 × fixed split; 1.15 × each: reached. What is served by default, turns, riding along: "
        "1.33 × the best of the rest but auto (turns)."
    )
    assert "within 3%: undecided" in verdict({"balanced": rates}, {"balanced": frozenset({MIXED})})
