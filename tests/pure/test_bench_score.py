"""Outcomes judged, by numbers that can be worked out by hand; the search for goodput; intervals of a comparison."""

import math
import random
from dataclasses import replace

import pytest

from headway.bench.compare import Block, compare
from headway.bench.score import Ending, Outcome, Score, attained, outcome_of, quantile, score
from headway.bench.search import Search, every_class
from headway.core.ledger import Record, settle
from headway.core.lifecycle import State
from headway.core.request import SLO

TARGETS = {"text": SLO(ttft_s=1.0, tpot_s=0.1), "file": SLO(ttft_s=10.0, tpot_s=0.1)}


def outcome(
    kind: str = "text",
    at_s: float = 0.0,
    ttft_s: float | None = 0.5,
    tpot_s: float | None = 0.05,
    ending: Ending = "finished",
    reason: str = "",
    end_s: float = 2.0,
) -> Outcome:
    return Outcome(kind, at_s, 10, 5, ending, end_s, ttft_s, tpot_s, (0.05, 0.07), reason)


STORY = [
    outcome(),  # met both
    outcome(at_s=1.0, ttft_s=1.0),  # exactly on the target is met
    outcome(at_s=2.0, ttft_s=1.5),  # late to begin
    outcome(at_s=3.0, tpot_s=0.2),  # slow
    outcome(at_s=4.0, ttft_s=None, tpot_s=None, ending="refused", reason="429", end_s=0.1),
    outcome("file", at_s=5.0, ttft_s=9.0, tpot_s=None, end_s=9.0),  # one token has no gaps
    outcome("file", at_s=6.0, ending="failed", reason="broken stream", end_s=4.0),  # begun in time, never finished
]


def test_what_was_attained_overall_and_by_class() -> None:
    judged = score(STORY, TARGETS)
    assert judged.overall.joint == pytest.approx(3 / 7)
    assert judged.overall.ttft_only == pytest.approx(4 / 7)
    assert judged.shares() == pytest.approx({"text": 2 / 5, "file": 1 / 2})
    assert judged.shares(ttft_only=True) == pytest.approx({"text": 3 / 5, "file": 1 / 2}), (
        "an answer that broke off is none"
    )
    assert (judged.overall.num_refused, judged.overall.num_failed) == (1, 1)
    assert judged.reasons == {"429": 1, "broken stream": 1}


def test_goodput_counts_until_the_last_one_ended() -> None:
    """From 0 to 5 + 9: three good ones in 14 seconds."""
    judged = score(STORY, TARGETS)
    assert judged.duration_s == 14.0
    assert judged.goodput == pytest.approx(3 / 14)
    assert judged.throughput_tokens == pytest.approx(35 / 14)


def test_a_rate_is_good_only_if_every_class_is() -> None:
    """Nine of ten are in time, but the only file is not."""
    judged = score([outcome()] * 9 + [outcome("file", ttft_s=11.0)], TARGETS)
    assert judged.meets_overall(0.9)
    assert not judged.meets(0.9)
    assert score([outcome()] * 9 + [outcome(ttft_s=2.0)], TARGETS).meets(0.9)
    assert score([outcome(tpot_s=0.2)], TARGETS).meets(0.9, ttft_only=True)


def test_other_scales_from_the_same_outcomes() -> None:
    judged = score([outcome(ttft_s=0.5, tpot_s=0.01), outcome(ttft_s=1.5, tpot_s=0.01)], TARGETS)
    by_scale = {scaled.scale: scaled.overall for scaled in judged.scales}
    assert by_scale == {0.4: 0.0, 0.6: 0.5, 0.8: 0.5, 1.0: 0.5, 1.2: 0.5, 1.4: 0.5, 1.6: 1.0, 1.8: 1.0, 2.0: 1.0}
    assert score(STORY, TARGETS).scales[3].by_kind == score(STORY, TARGETS).shares()


def test_a_class_without_targets_has_only_to_finish() -> None:
    assert attained([outcome("image", ttft_s=99.0), outcome("image", ending="failed")], TARGETS) == 0.5
    assert attained([outcome("image", end_s=3.0)], {"image": SLO(total_s=2.5)}) == 0.0


def test_other_scales_of_the_target_for_the_first_token() -> None:
    slow = outcome(ttft_s=1.5, tpot_s=9.0)
    assert [attained([slow], TARGETS, scale, ttft_only=True) for scale in (1.0, 1.6)] == [0.0, 1.0]
    assert attained([slow], TARGETS, 1.6) == 0.0


def test_who_was_cancelled_has_met_nothing_here() -> None:
    """The ledger leaves it the first token that came in time; whoever waits for an answer has none."""
    record = Record("a", 0.0, SLO(ttft_s=1.0, total_s=9.0), 10, num_output_tokens=1, first_token=0.5, slo_class="text")
    settle(record, State.CANCELLED, "client_left", 2.0)
    assert record.missed == {"total": "cancelled"}
    assert not outcome_of(record, 0.0).meets_ttft(record.slo)


def test_quantiles_are_values_that_occurred() -> None:
    """Nearest rank, by hand: of ten, p90 is the ninth, p99 the tenth, p50 the fifth."""
    values = [float(n) for n in (7, 3, 10, 1, 9, 2, 8, 4, 6, 5)]
    assert [quantile(values, share) for share in (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)] == [1, 1, 5, 9, 10, 10]
    assert math.isnan(quantile([], 0.5))
    judged = score(STORY, TARGETS)
    assert judged.overall.ttft_s == (0.5, 9.0, 9.0)
    assert judged.by_kind["text"].itl_s == (0.05, 0.07, 0.07)


def test_nothing_happened() -> None:
    judged = score([], {})
    assert (judged.goodput, judged.duration_s, judged.shares()) == (0.0, 0.0, {})


# The search


def with_shares(text: float, file: float = 1.0) -> Score:
    """A score of a thousand requests of each class with these shares in time."""
    some = [outcome(ttft_s=0.5 if n < round(text * 1000) else 2.0) for n in range(1000)]
    more = [outcome("file", ttft_s=0.5 if n < round(file * 1000) else 20.0) for n in range(1000)]
    return score(some + more, TARGETS)


@pytest.mark.parametrize("start", [0.05, 1.0, 5.3, 90.0])
def test_the_knee_is_found_from_wherever_one_begins(start: float) -> None:
    """In time up to 5 requests/s, then abruptly not."""
    found = Search(lambda rate: with_shares(1.0 if rate <= 5 else 0.2), every_class, tolerance=0.05).run(start)
    assert 5 / 1.05 <= found.rate <= 5 < found.failed_at <= found.rate * 1.05
    assert [point.rate for point in found.points] == sorted(point.rate for point in found.points)
    assert all(point.passed == (point.rate <= 5) for point in found.points)
    assert all(len(point.runs) == 1 for point in found.points)  # far from the line one run is enough


def test_the_class_that_is_served_worst_decides() -> None:
    found = Search(lambda rate: with_shares(1.0, 0.95 if rate < 3 else 0.7), every_class).run(1.0)
    assert 3 / 1.1 <= found.rate < 3
    assert found.points[-1].shares["file"] == 0.7


def test_near_the_line_a_rate_is_tried_again() -> None:
    """Shares fall slowly and every run is off by a few percent: still near where the mean crosses the line, at 4."""
    for seed in range(4):
        rng = random.Random(seed)

        def attain(rate: float, rng: random.Random = rng) -> Score:
            return with_shares(min(1.0, max(0.0, 0.9 - 0.1 * (rate - 4) + rng.gauss(0, 0.02))))

        found = Search(attain, every_class, repeats=4, tolerance=0.05).run(1.0)
        assert 3.3 <= found.rate <= 4.7
        assert any(len(point.runs) > 1 for point in found.points)


def test_one_request_of_a_small_class_does_not_decide() -> None:
    """Two of three are in time, and three would do: tried again, however far from the line; with many it is not."""

    def few(in_time: int) -> Score:
        return score([outcome("file", ttft_s=0.5 if n < in_time else 20.0) for n in range(3)], TARGETS)

    def one_request(score: Score) -> dict[str, float]:
        return {kind: 1 / marks.num for kind, marks in score.by_kind.items()}

    runs = iter([few(2), few(3)])
    again = Search(lambda _: next(runs), every_class, one_request, share=0.8).visit(1.0)
    assert (len(again.runs), again.passed) == (2, True)
    assert len(Search(lambda _: with_shares(0.6), every_class, one_request, repeats=4).visit(1.0).runs) == 1


def test_no_rate_passes_or_every_rate_does() -> None:
    never = Search(lambda rate: with_shares(0.1), every_class, max_points=5).run(1.0)
    assert (never.rate, never.failed_at, len(never.points)) == (0.0, 1 / 16, 5)
    always = Search(lambda rate: with_shares(1.0), every_class, highest=50.0).run(1.0)
    assert (always.rate, always.failed_at) == (50.0, math.inf)


# The comparison


def block(rng: random.Random, factor: float) -> Block:
    """Two runs of each side; B's TTFTs are so many times A's, apart from noise of their own."""
    lengths = [rng.uniform(0.1, 1.0) for _ in range(40)]

    def run(times: float) -> list[Outcome]:
        return [outcome(ttft_s=times * length * rng.uniform(0.9, 1.1)) for length in lengths]

    return Block((run(1), run(1)), (run(factor), run(factor)))


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """B's TTFT is 1.2 times A's."""
    rng = random.Random(0)
    held = 0
    for _ in range(20):
        ratios = compare([block(rng, 1.2) for _ in range(5)], TARGETS, seed=0, num_draws=200)
        p50 = next(ratio for ratio in ratios if ratio.name == "TTFT p50, answered (s)")
        assert p50.low <= p50.ratio <= p50.high
        assert p50.high - p50.low < 0.3
        held += p50.low <= 1.2 <= p50.high
    assert held >= 17


def test_equal_sides_are_called_equal_and_the_seed_decides_the_draw() -> None:
    one = [outcome(ttft_s=n / 40) for n in range(40)]
    ratios = compare([Block((one, one), (one, one))] * 3, TARGETS, seed=1, num_draws=50)
    *known, failed = ratios
    assert all((ratio.low, ratio.ratio, ratio.high) == (1.0, 1.0, 1.0) for ratio in known)
    assert (failed.name, failed.a, failed.b) == ("refused or failed", 0.0, 0.0)
    blocks = [block(random.Random(n), 2.0) for n in range(4)]
    first, again, other = (compare(blocks, TARGETS, seed, 50)[:-1] for seed in (1, 1, 2))
    assert first == again != other


def test_each_class_is_compared_by_the_targets_that_were_asked() -> None:
    """B keeps the pace of text, not that of files; their first tokens come in time at both. A second block has no file
    at all, and the draws without one say nothing of files."""
    text, file = [outcome() for _ in range(9)], outcome("file")
    one, other = [*text, file], [*text, replace(file, tpot_s=0.2)]
    blocks = [Block((one, one), (other, other)), Block((text, text), (text, text))]
    ratios = {ratio.name: ratio for ratio in compare(blocks, TARGETS, seed=1, num_draws=50)}
    assert list(ratios)[:3] == [f"attained, all targets{of}" for of in ("", ": text", ": file")]
    assert (ratios["attained, all targets"].a, ratios["attained, all targets"].b) == (1.0, 36 / 38)
    assert ratios["attained, all targets: text"].ratio == 1.0
    assert ratios["attained, all targets: file"] == ("attained, all targets: file", 1.0, 0.0, 0.0, 0.0, 0.0)
    first, *_ = by_ttft = compare(blocks, TARGETS, seed=1, num_draws=50, ttft_only=True)
    assert (first.name, first.a, first.b) == ("attained, TTFT target", 1.0, 1.0)
    assert by_ttft[2].name == "attained, TTFT target: file"


def test_who_is_refused_has_no_end_to_compare() -> None:
    """Half are refused in a millisecond: that is no quick answer, and it is said how many were."""
    served = [outcome(ttft_s=0.5) for _ in range(20)]
    refused = [
        replace(one, ending="refused", ttft_s=None, end_s=0.001) if n % 2 else one for n, one in enumerate(served)
    ]
    ratios = {ratio.name: ratio for ratio in compare([Block((served,), (refused,))] * 3, TARGETS, seed=1, num_draws=50)}
    assert ratios["end p50, finished (s)"].ratio == 1.0
    assert (ratios["refused or failed"].a, ratios["refused or failed"].b) == (0.0, 0.5)


def test_more_blocks_make_it_surer() -> None:
    rng = random.Random(3)
    few, many = [
        next(
            r
            for r in compare([block(rng, 1.5) for _ in range(n)], TARGETS, 0, 200)
            if r.name == "TTFT p50, answered (s)"
        )
        for n in (2, 30)
    ]
    assert many.high - many.low < few.high - few.low
