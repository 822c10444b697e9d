"""Which of several schedulers keeps its promises at the highest rate: bisections in lockstep, against a known knee."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from headway.bench import goodput_page
from headway.bench.contest import JOINT, TTFT, Run, contest, crossing, outlast, sweep
from headway.bench.goodput_page import CaseResult, Measured, Policy, Section
from headway.bench.score import Outcome, score
from headway.core.request import SLO

TARGETS = {"text": SLO(ttft_s=1.0)}


def run_of(rate: float, met: float) -> Run:
    """A hundred requests of which this share got their first token in time."""
    outcomes = [
        Outcome("text", float(n), 10, 1, "finished", 2.0, ttft_s=0.5 if n < 100 * met else 1.5) for n in range(100)
    ]
    return Run(rate, score(outcomes, TARGETS))


def falls_at(knee: float) -> Callable[[float], float]:
    """Attainment that crosses 90 % at the knee."""
    return lambda rate: max(0.0, min(1.0, 0.9 + 0.5 * (knee - rate) / knee))


def test_each_finds_its_own_knee() -> None:
    """Wherever the search begins, each bracket closes around the rate at which that scheduler begins to fail."""
    knees = {"quick": 8.0, "slow": 1.5, "slowest": 0.2}
    found = contest(
        dict.fromkeys(knees, 2.0), lambda name, rate: run_of(rate, falls_at(knees[name])(rate)), TTFT,
        most_rates=20,
    )  # fmt: skip
    for name, knee in knees.items():
        assert found[name].good == pytest.approx(knee, rel=0.08)
        assert found[name].good <= knee * 1.021 < found[name].bad * 1.021  # whole requests round a little


def test_all_take_turns() -> None:
    """Nobody's second run comes before everybody's first."""
    asked: list[str] = []

    def attain(name: str, rate: float) -> Run:
        asked.append(name)
        return run_of(rate, falls_at(3.0)(rate))

    contest({"a": 1.0, "b": 1.0, "c": 1.0}, attain, TTFT)
    assert asked[:6] == ["a", "b", "c", "a", "b", "c"]


def test_a_neighbour_on_the_machine_does_not_decide() -> None:
    """Every fourth run is spoilt by something else: near the line a rate is run three times, and the median counts."""
    rng = random.Random(1)

    def attain(name: str, rate: float) -> Run:
        return run_of(rate, falls_at(4.0)(rate) - (0.04 if rng.random() < 0.25 else 0.0))

    found = contest({"a": 3.0}, attain, TTFT, repeats=3, most_rates=20)
    assert found["a"].good == pytest.approx(4.0, rel=0.1)


def policy(name: str, *goodputs: float) -> Policy:
    return Policy(name, list(goodputs), 1.0, [Measured(1.0, {"text": 0.95}, 0.95), Measured(9.0, {"text": 0.5}, 0.5)],
                  [Measured(1.0, {"text": 1.0}, 1.0)], 0.5, 100, 50.0, 90.0, 0)  # fmt: skip


def case(name: str, *others: Policy) -> CaseResult:
    policies = [policy("operator", 6.0, 5.0, 7.0), policy("chunk 64", 3.0, 2.5, 3.5), policy("fcfs", 1.0, 1.0, 1.0)]
    return CaseResult(name, "a trace", 100, 20.0, {"text": 40.0}, [*policies, *others], "a machine", 1024, "m")


def test_ratios_are_those_of_the_draws() -> None:
    """The median of ratios within a draw, with the least and the most; the best chunk by the median of its goodputs."""
    assert "| m | one | 6 | chunk 64 | 2.00 (2.00 … 2.00) | 6.00 (5.00 … 7.00) |" in goodput_page.summary([case("one")])


def test_one_request_alone_does_not_decide() -> None:
    """Of four, three in time are too few and four would do: such a run is repeated, and so is one that fails, but not
    by far; one that passes clearly is not."""
    few = [Outcome("image", float(n), 10, 1, "finished", 2.0, ttft_s=1.5 if n == 0 else 0.5) for n in range(4)]
    all_in_time = [replace(outcome, ttft_s=0.5) for outcome in few]
    results = iter([few, all_in_time, all_in_time])
    targets = TARGETS | {"image": SLO(ttft_s=1.0)}
    assert not TTFT.is_close(run_of(1.0, 0.7))
    assert TTFT.is_close(run_of(1.0, 0.8))
    assert not TTFT.is_close(run_of(1.0, 0.94))
    assert JOINT.is_close(run_of(1.0, 0.88))
    found = contest(
        {"a": 1.0}, lambda name, rate: Run(rate, score(next(results), targets)), TTFT, most_rates=1,
        repeats=3,
    )  # fmt: skip
    assert found["a"].good == 1.0


def test_who_passes_goes_on() -> None:
    """Who does not pass the first rate is left alone; who does is found to within a step."""
    knees = {"chunk 16": 0.5, "chunk 128": 3.3, "chunk 256": 7.0}
    found = outlast(list(knees), lambda name, rate: run_of(rate, falls_at(knees[name])(rate)), TTFT, 3.0)
    assert found["chunk 16"].good == 0
    assert len(found["chunk 16"].runs) == 1
    for name in ("chunk 128", "chunk 256"):
        assert found[name].good <= knees[name] * 1.021
        assert found[name].good * 1.12 > knees[name] * 0.99


def test_the_page_says_what_was_not_reached() -> None:
    """Each case is held against what was wanted of it; all others against the best chunk size."""
    said = goodput_page.verdicts([case("one"), case("qwen 1/16, k = 2"), case("qwen 1/32, k = 1.5")])
    assert said.splitlines() == [
        "- m, one: reached, 2.00 × chunk 64 against 0.95.",
        "- m, qwen 1/16, k = 2: reached, 6.00 × fcfs against 5.6, which lies within the spread of the draws.",
        "- m, qwen 1/16, k = 2: reached, 2.00 × chunk 64 against 1.2.",
        "- m, qwen 1/32, k = 1.5: not reached, 2.00 × chunk 64 against 3.",
    ]


def test_each_draw_has_its_best_chunk() -> None:
    """Sizes that fail where another passes have no figure of their own; ours is held against the best of each draw."""
    chunks = [policy("chunk 32", 5.0, 0.0, 0.0), policy("chunk 64", 0.0, 6.0, 0.0), policy("chunk 128", 0.0, 0.0, 4.0)]
    found = CaseResult("one", "a trace", 100, 20.0, {}, [policy("operator", 10.0, 6.0, 8.0), *chunks], "", 1024, "m")
    assert found.best_chunks == [5.0, 6.0, 4.0]
    assert "reached, 2.00 × chunk 64 against 0.95" in goodput_page.verdicts([found])
    assert "2.00 (1.00 … 2.00)" in goodput_page.ratios([found])
    nobody = CaseResult("one", "", 100, 20.0, {}, [policy("operator", 0.0), policy("chunk 32", 0.0)], "", 1024, "m")
    assert goodput_page.verdicts([nobody]) == "- m, one: no verdict, chunk 32 kept no rate that was tried."


def test_all_classes_in_one_are_never_worse_than_the_worst() -> None:
    """From the same runs: the worst class fails beyond 2, all together beyond any rate that was tried."""
    runs = [Measured(rate, {"text": share, "file": 1.0}, overall) for rate, share, overall in
            ((1.0, 0.95, 0.97), (2.0, 0.9, 0.95), (4.0, 0.7, 0.92))]  # fmt: skip
    one = Policy("operator", [2.0], 1.0, runs, [], 0.5, 100, 50.0, 90.0, 0)
    assert one.overall == (4.0, True)
    assert "| 2 | 1 | ≥ 4 | text 70%, file 100% |" in goodput_page.details(
        CaseResult("one", "", 100, 20.0, {}, [one, policy("chunk 64", 1.0)], "", 1024, "m")
    )


def test_the_line_is_crossed_between_two_rates() -> None:
    """Neither the last rate that passed nor the first that failed is the goodput, but where what lies between them is
    90 %; and a rate that did better than a lower one lifts that one."""
    shares = {1.0: 0.92, 1.3: 0.98, 1.69: 0.86, 1.482: 0.94}
    found = contest({"a": 1.0}, lambda name, rate: run_of(rate, shares[round(rate, 3)]), TTFT, most_rates=4)
    assert found["a"].good == pytest.approx(1.482 + (1.69 - 1.482) / 2, abs=1e-3)


def test_if_nobody_passes_all_begin_lower() -> None:
    """The first rate was too high for both: the better one is found all the same."""
    knees = {"chunk 16": 0.2, "chunk 128": 0.8}
    found = outlast(list(knees), lambda name, rate: run_of(rate, falls_at(knees[name])(rate)), TTFT, 3.0)
    assert 0.8 / 1.26 < found["chunk 128"].good <= 0.8 * 1.021
    assert found["chunk 16"].good == 0


def test_nobody_descends_where_another_is_known_to_pass() -> None:
    """Who is worse than the one already measured is left alone at once."""
    knees = {"chunk 16": 0.2, "chunk 128": 0.8}
    found = outlast(list(knees), lambda name, rate: run_of(rate, falls_at(knees[name])(rate)), TTFT, 3.0, descend=False)
    assert [len(contender.runs) for contender in found.values()] == [1, 1]
    assert all(contender.good == 0 for contender in found.values())


def test_a_chunk_size_that_failed_at_once_has_no_figure() -> None:
    """The page says below which rate its goodput lies; the best chunk is the best that has one."""
    found = case("one", policy("chunk 128", 3.3), policy("chunk 16", 0.0))
    assert found.best_chunk.name == "chunk 128"
    assert "| chunk 16 | < 9 |" in goodput_page.details(found)


def test_what_was_found_is_kept(tmp_path: Path) -> None:
    """A newer case takes the place of an older one of the same name and model; sections stay beside the cases."""
    goodput_page.keep(tmp_path, case("one"))
    goodput_page.keep(tmp_path, case("two"))
    goodput_page.keep(tmp_path, Section("more", "words"))
    goodput_page.keep(tmp_path, case("one", policy("chunk 16", 0.0)))
    kept = goodput_page.read(tmp_path)
    assert [(found.name, len(found.policies)) for found in kept.cases] == [("two", 3), ("one", 4)]
    assert kept.sections == [Section("more", "words")]


# All at the same rates


def test_all_are_run_at_the_same_rates_in_turn() -> None:
    """One of each at a rate, then the next rate; the knee is found between two rates."""
    asked: list[tuple[str, float]] = []
    knees = {"one": 2.5, "other": 3.5}

    def attain(name: str, rate: float) -> Run:
        asked.append((name, rate))
        return run_of(rate, falls_at(knees[name])(rate))

    found = sweep(list(knees), attain, TTFT, (2.0, 3.0, 4.0))
    assert asked == [(name, rate) for rate in (2.0, 3.0, 4.0) for name in knees]
    for name, knee in knees.items():
        assert found[name].good == pytest.approx(knee, rel=0.02)


@pytest.mark.parametrize(
    ("points", "rate"),
    [
        ([(1.0, 1.0), (2.0, 0.95), (3.0, 0.85)], 2.5),
        ([(3.0, 0.85), (1.0, 1.0), (2.0, 0.95)], 2.5),
        ([(1.0, 0.92), (2.0, 0.96), (3.0, 0.86)], 2.5),  # the first two are as good as each other: 0.94
        ([(1.0, 0.80), (2.0, 1.0), (3.0, 0.9), (4.0, 0.7)], 3.0),
        ([(1.0, 0.89), (2.0, 0.5)], 0.0),
        ([(1.0, 0.99), (2.0, 0.95)], 2.0),
    ],
)
def test_the_line_is_crossed_where_shares_that_never_rise_cross_it(
    points: list[tuple[float, float]], rate: float
) -> None:
    assert crossing(points) == pytest.approx(rate)


def test_sections_go_with_the_case_that_they_are_about(tmp_path: Path) -> None:
    """What was measured at multiples of a goodput says nothing any more when that is found anew."""
    goodput_page.keep(tmp_path, case("one"))
    goodput_page.keep(tmp_path, Section("around it", "at half of it", case("one").full_name))
    goodput_page.keep(tmp_path, Section("elsewhere", "something", case("two").full_name))
    goodput_page.keep(tmp_path, case("one"))
    assert [section.title for section in goodput_page.read(tmp_path).sections] == ["elsewhere"]


def test_an_open_end_decides_nothing_against_it() -> None:
    """A chunk size that kept every rate may keep more: being ahead of it is not shown; being behind ours, which kept
    every rate, is not either."""
    runs = [Measured(1.0, {"text": 0.95}, 0.95), Measured(2.0, {"text": 0.93}, 0.95)]
    found = case("one")
    ours, chunk, fcfs = found.policies
    chunk_is_open = msgspec.structs.replace(found, policies=[ours, msgspec.structs.replace(chunk, runs=runs), fcfs])
    assert goodput_page.verdicts([chunk_is_open]) == (
        "- m, one: undecided, since no rate was too high for chunk 64, 2.00 × chunk 64 against 0.95."
    )
    behind = [msgspec.structs.replace(ours, runs=runs, goodputs=[1.0, 1.0, 1.0]), chunk, fcfs]
    assert "undecided, since no rate was too high for operator" in goodput_page.verdicts(
        [msgspec.structs.replace(found, policies=behind)]
    )


def test_the_page_says_what_is_not_there(tmp_path: Path) -> None:
    """Sections belong to the first case of which something special is wanted. Those never made, made around another
    case, or dropped when theirs was made anew are named, in one line after the ratios."""
    around = case("qwen 1/16, k = 2")
    sweep_, loads, uniform, pace = goodput_page.AROUND
    goodput_page.keep(tmp_path, case("one"))
    goodput_page.keep(tmp_path, around)
    goodput_page.keep(tmp_path, Section(loads, "words", case("one").full_name))
    for title in (sweep_, uniform):
        goodput_page.keep(tmp_path, Section(title, "words", around.full_name))
    said = (
        f"Not here for m: qwen 1/16, k = 2, never made or older than the case: {{}}. `{goodput_page.MORE}` makes them."
    )
    goodput_page.write(tmp_path)
    page = (tmp_path / "goodput.md").read_text(encoding="utf8")
    assert f"\n\n{said.format(f'{loads}; {pace}')}\n\n## Predicted" in page
    goodput_page.keep(tmp_path, around)
    goodput_page.write(tmp_path)
    assert said.format("; ".join(goodput_page.AROUND)) in (tmp_path / "goodput.md").read_text(encoding="utf8")
    assert goodput_page.missing(around, [Section(title, "", around.full_name) for title in goodput_page.AROUND]) == []


def test_ours_over_one_of_them() -> None:
    """Draw by draw, with the median, the least and the most; nothing over itself."""
    found = case("one", policy("chunk 16", 0.0, 0.0, 0.0))
    assert [goodput_page.against(found, one) for one in found.policies] == [
        ["operator", "6 (5 … 7)", ""],
        ["chunk 64", "3 (2.5 … 3.5)", "2.00 (2.00 … 2.00)"],
        ["fcfs", "1 (1 … 1)", "6.00 (5.00 … 7.00)"],
        ["chunk 16", "none (0 … 0)", "none served"],
    ]
