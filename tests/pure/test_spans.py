"""What the device did, as it happened: spans that never overlap, hide nothing and tell a suspension from an end."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.core import event as ev
from headway.core.request import SLO, Request
from headway.core.settings import SchedulerSettings
from headway.core.work import Segment, Work
from headway.placement.simulate import FakeSimulation
from headway.placement.spans import MAX_NAMED, History, Span, Spans

SETTINGS = SchedulerSettings(max_model_len=250, tile_s=0.001, pack_tokens=16, refuse_unattainable=False)
NO_CACHE = SchedulerSettings(
    max_model_len=250, tile_s=0.001, pack_tokens=16, refuse_unattainable=False, prefix_caching=False, max_num_parked=2
)


def arrives(now: float, name: str, num_tokens: int, max_tokens: int = 1, ttft_s: float | None = None) -> ev.Arrived:
    prompt = tuple((7 * place + len(name)) % 997 for place in range(num_tokens))
    return ev.Arrived(Request(name, prompt, max_tokens, now, SLO(ttft_s=ttft_s)))


def told(spans: tuple[Span, ...]) -> list[tuple[str, str, int, str | None, bool]]:
    return [(span.request_ids[0], span.kind, span.num_tokens, span.ending, span.resumed) for span in spans]


def test_a_long_prompt_is_suspended_for_a_short_one_and_goes_on_after_it() -> None:
    """The long prompt takes 200 ms; at 50 ms a short one comes that must be answered within 40 ms. Its step ends what
    the long one's first span began; then come the short one's second token and the rest of the long one."""
    long, short = arrives(0.0, "long", 200), arrives(0.05, "short", 10, max_tokens=2, ttft_s=0.04)
    simulation = FakeSimulation([(0.0, long), (0.05, short)], SETTINGS)
    simulation.run()
    spans = simulation.driver.spans.take()
    assert simulation.driver.spans.running == ()
    assert told(spans)[:2] == [("long", "prefill", 200, "suspended", False), ("short", "prefill", 10, "done", False)]
    rest = [span for span in spans[2:] if span.request_ids == ("long",)]
    assert all(span.resumed for span in rest)
    assert [span.ending for span in rest] == ["suspended"] * (len(rest) - 1) + ["done"]
    decoded = [span for span in spans if span.kind == "decode"]
    assert [(span.request_ids, span.num_tokens) for span in decoded] == [(("short",), 1)]
    longs = [span for span in spans if span.request_ids == ("long",)]
    assert len({span.work_id for span in longs}) == 1
    assert sum(span.ended - span.begun for span in longs) == pytest.approx(0.2, rel=0.01)
    assert longs[0].begun == pytest.approx(0.0, abs=0.002)  # the pause in which arrivals are gathered
    assert 0.05 <= longs[0].ended <= 0.05 + 0.02  # the tile in which the short one came


def test_a_suspended_prompt_whose_caller_leaves_has_a_last_span_of_no_length() -> None:
    """It is given up while the short one has the device: whoever watches sees when it stopped waiting."""
    long, short = arrives(0.0, "long", 200), arrives(0.05, "short", 60, ttft_s=0.08)
    simulation = FakeSimulation([(0.0, long), (0.05, short), (0.08, ev.Cancelled("long"))], SETTINGS, num_pages=128)
    simulation.run()
    spans = simulation.driver.spans.take()
    assert told(spans) == [
        ("long", "prefill", 200, "suspended", False),
        ("long", "prefill", 200, "left", True),
        ("short", "prefill", 60, "done", False),
    ]
    assert spans[1].begun == spans[1].ended
    assert 0.08 <= spans[1].ended < 0.1


def test_a_step_that_all_have_left_and_one_that_fails() -> None:
    simulation = FakeSimulation([(0.0, arrives(0.0, "gone", 100)), (0.05, ev.Cancelled("gone"))], SETTINGS)
    simulation.run()
    (span,) = simulation.driver.spans.take()
    assert (span.ending, span.resumed) == ("left", False)
    assert 0.05 <= span.ended < 0.07

    def breaks(num_tokens: int) -> None:
        raise RuntimeError("out of luck")

    simulation = FakeSimulation([(0.0, arrives(0.0, "unlucky", 100))], SETTINGS)
    simulation.stage.spend = breaks
    simulation.run()
    assert told(simulation.driver.spans.take()) == [("unlucky", "prefill", 100, "failed", False)]


letters = st.lists(
    st.tuples(
        st.floats(0, 0.6),
        st.sampled_from((3, 17, 90, 200)),
        st.integers(1, 6),
        st.sampled_from((None, 0.02, 0.1, 1.0)),
        st.none() | st.floats(0, 0.3),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=150)
@given(letters)
def test_spans_of_any_load(asked: list[tuple[float, int, int, float | None, float | None]]) -> None:
    """Whoever comes, with whatever targets, and leaves whenever: one step at a time has the device; what was suspended
    comes back as resumed, as often as it was suspended, and ends once; what is told of a step never changes; and the
    records agree about how often it happened."""
    mail: list[tuple[float, ev.Event]] = []
    for number, (at, num_tokens, max_tokens, ttft_s, leaves) in enumerate(asked):
        mail.append((at, arrives(at, f"r{number}", num_tokens, max_tokens, ttft_s)))
        if leaves is not None:
            mail.append((at + leaves, ev.Cancelled(f"r{number}")))
    simulation = FakeSimulation(mail, NO_CACHE, num_pages=200)
    simulation.driver.spans = Spans(most=100_000)
    simulation.run()
    spans = simulation.driver.spans.take()
    assert simulation.driver.spans.running == ()
    assert [span.ended for span in spans] == sorted(span.ended for span in spans)
    on_device = [span for span in spans if span.begun < span.ended]
    assert all(one.ended <= other.begun for one, other in pairwise(on_device))
    last: dict[int, Span] = {}
    for span in spans:
        before = last.get(span.work_id)
        assert span.resumed == (before is not None)
        if before is not None:
            assert before.ending == "suspended"
            same = {"begun": 0.0, "ended": 0.0, "ending": None, "resumed": False}
            assert before._replace(**same) == span._replace(**same)
        last[span.work_id] = span
    assert "suspended" not in {span.ending for span in last.values()}
    num_suspended = sum(span.ending == "suspended" for span in spans)
    assert num_suspended == simulation.scheduler.counters["preemptions"]
    assert len(last) == max((span.work_id for span in spans), default=0)


def segment(name: str, first_position: int, num_tokens: int) -> Segment:
    return Segment(name, (1,) * num_tokens, first_position, first_position, (0,), (0,))


def test_what_a_step_is_for() -> None:
    """A segment behind its request's prompt is a token; one token of a prompt, or of an answer computed again, is not
    called decoding for its length."""
    spans = Spans()
    for name in ("a", "b"):
        spans.open(Request(name, (1,) * 10, 5, 0.0))
    steps = [
        [segment("a", 0, 10)],
        [segment("b", 9, 1)],
        [segment("a", 10, 1), segment("b", 10, 1)],
        [segment("a", 11, 1), segment("b", 0, 11)],
    ]
    for number, segments in enumerate(steps):
        spans.begin(Work(number, "language", tuple(segments)), 0.0)
        spans.end(number, "done", 1.0)
    assert [span.kind for span in spans.take()] == ["prefill", "prefill", "decode", "mixed"]


def test_nothing_grows_if_nobody_takes() -> None:
    """The oldest are forgotten, a step of many requests names a few, and a request that has ended is not remembered."""
    spans = Spans(most=3)
    for number in range(10):
        spans.open(Request(f"r{number}", (1,), 1, 0.0))
        spans.begin(Work(number, "language", tuple(segment(f"r{k}", 0, 1) for k in range(20))), number)
        spans.end(number, "done", number + 0.5)
        spans.close(f"r{number}")
    taken = spans.take()
    assert [span.work_id for span in taken] == [7, 8, 9]
    assert all((span.num_requests, len(span.request_ids)) == (20, MAX_NAMED) for span in taken)
    assert spans.take() == ()
    assert spans._prompt_tokens == {}


def one(work_id: int, begun: float, ending: str | None = "done", resumed: bool = False) -> Span:
    return Span(work_id, begun, begun + 1, "prefill", 5, 1, ("r",), ending, resumed)  # type: ignore[arg-type]


def test_a_reader_of_the_history_gets_each_span_once_and_misses_what_it_was_too_slow_for() -> None:
    history = History(most=4)
    history.add((one(1, 0), one(2, 1)), (one(3, 2, None),))
    assert (history.since(0), history.num_heard) == ([one(1, 0), one(2, 1)], 2)
    assert history.since(2) == []
    assert history.running == (one(3, 2, None),)
    history.add(tuple(one(number, number) for number in range(3, 9)), ())
    assert [span.work_id for span in history.since(2)] == [5, 6, 7, 8]
    assert [span.work_id for span in history.since(7)] == [8]
    assert history.running == ()


def test_an_engine_that_dies_takes_its_steps_with_it_and_the_next_one_counts_on() -> None:
    """One step had the device, one was suspended: both have failed. Work 1 of the next engine is another one."""
    history = History()
    history.add((one(1, 0, "suspended"),), (one(2, 1, None),))
    history.lose(5.0)
    assert [(span.work_id, span.begun, span.ended, span.ending) for span in history.since(1)] == [
        (2, 1, 5.0, "failed"),
        (1, 5.0, 5.0, "failed"),
    ]
    history.lose(6.0)
    assert history.num_heard == 3, "nothing is lost twice"
    history.add((one(1, 7),), ())
    assert history.since(3)[0].work_id == 3
