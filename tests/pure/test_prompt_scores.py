"""What is told of a prompt's own tokens: once each, in order, whatever else happens to the request."""

from collections import defaultdict
from dataclasses import replace

import pytest
from story import Story

from headway.bench.storm import NUM_PAGES, SETTINGS, storm
from headway.core import event as ev
from headway.core.request import SLO, Request, Sampling
from headway.core.settings import SchedulerSettings
from headway.core.work import Commit, Outcome, TokenLogprobs
from headway.placement.simulate import FakeSimulation

SCORED = Sampling(num_prompt_logprobs=0)


def scores(*logprobs: float) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(logprob, ()) for logprob in logprobs)


def test_every_row_but_the_last_is_asked_for_the_next_token_of_the_prompt() -> None:
    story = Story()
    story.arrives("a", (5, 6, 7, 8), sampling=SCORED)
    work = story.plan()
    assert work is not None
    (segment,) = work.segments
    assert (segment.scored_at, segment.logits_at) == (range(3), (3,))
    commit = Commit("a", (9,), prompt_logprobs=scores(-0.6, -0.7, -0.8))
    assert story.tell(ev.StepDone(work.id, Outcome((commit,)), 0.04)) == [ev.Deliver(commit)]
    work = story.plan()
    assert work is not None
    assert not work.segments[0].scored_at


def test_in_chunks_the_last_row_of_one_asks_about_the_first_token_of_the_next() -> None:
    """Ten tokens in pieces of four: four rows, four, and one before the row from which a token is drawn."""
    story = Story(preempt="chunk", chunk_tokens=4)
    story.arrives("a", 10, sampling=SCORED)
    seen = []
    for num_told in (4, 4, 1):
        work = story.plan()
        assert work is not None
        (segment,) = work.segments
        seen.append((segment.scored_at, segment.logits_at))
        told = scores(*([-1.0] * num_told))
        commit = Commit("a", (9,) if segment.logits_at else (), prompt_logprobs=told)
        assert story.tell(ev.StepDone(work.id, Outcome((commit,)), 0.04)) == [ev.Deliver(commit)]
    assert seen == [(range(4), ()), (range(4), ()), (range(1), (1,))]


def test_an_answer_of_no_tokens_ends_when_the_prompt_is_read() -> None:
    """With scores or without: nothing is drawn, and the end is that of a full answer."""
    story = Story()
    story.arrives("a", 6, max_tokens=0, sampling=SCORED, slo=SLO(ttft_s=2.0))
    story.arrives("b", 5, max_tokens=0, slo=SLO(ttft_s=9.0))
    work = story.plan()
    assert work is not None
    assert [(bool(segment.scored_at), segment.logits_at) for segment in work.segments] == [(True, ()), (False, ())]
    commit = Commit("a", (), prompt_logprobs=scores(-1, -2, -3, -4, -5))
    story.now += 3.0
    deliver, *ends = story.tell(ev.StepDone(work.id, Outcome((commit,)), 0.11))
    assert deliver == ev.Deliver(commit)
    assert [(end.record.request_id, end.record.reason) for end in ends if isinstance(end, ev.End)] == [
        ("a", "length"),
        ("b", "length"),
    ]
    assert [set(end.record.missed) for end in ends if isinstance(end, ev.End)] == [{"ttft"}, set()]
    assert story.scheduler.num_open == 0


def test_steps_that_score_teach_the_prices_nothing() -> None:
    """They take longer than their price, which is without the scores; others are not to be thought slower for it."""
    story = Story()
    story.arrives("a", 40, max_tokens=1, sampling=SCORED)
    work = story.plan()
    story.done(work, busy_s=9.0, a=1)
    assert story.scheduler.cost.correction == 1.0
    story.arrives("b", 40, max_tokens=1)
    story.done(story.plan(), busy_s=9.0, b=1)
    assert story.scheduler.cost.correction > 1.0


class Listening(FakeSimulation):
    """Keeps what was told of prompts."""

    def _tell(self, effect: ev.Admit | ev.Deliver | ev.End) -> None:
        super()._tell(effect)
        if isinstance(effect, ev.Deliver):
            self.told[effect.commit.request_id] += effect.commit.prompt_logprobs

    def listen(self) -> "Listening":
        self.told: defaultdict[str, list[TokenLogprobs]] = defaultdict(list)
        return self


@pytest.mark.parametrize(
    "settings", [SETTINGS, replace(SETTINGS, preempt="chunk", chunk_tokens=8)], ids=["whole", "chunks"]
)
@pytest.mark.parametrize("seed", range(4))
def test_every_token_is_told_once_in_any_storm(seed: int, settings: SchedulerSettings) -> None:
    """A third of 500 requests are scored, some of them only that, amid preemptions, lost pages and engines, cancels."""
    letters, requests = storm(seed, 500)

    def changed(request: Request) -> Request:
        number = int(request.id[1:])
        if number % 3:
            return request
        return replace(request, sampling=SCORED, max_tokens=0 if number % 2 else request.max_tokens)

    requests = {name: changed(request) for name, request in requests.items()}
    letters = [
        (at, ev.Arrived(requests[event.request.id]) if isinstance(event, ev.Arrived) else event)
        for at, event in letters
    ]
    simulation = Listening(letters, settings, num_pages=NUM_PAGES, page_tokens=4).listen()
    simulation.run()
    simulation.scheduler.check_integrity()
    assert simulation.scheduler.counters["recomputes"] > 0
    num_whole = 0
    for name, request in requests.items():
        asked = request.sampling is SCORED
        expected = scores(*(-token / 1000 for token in request.prompt[1:])) if asked else ()
        (record,) = simulation.ended[name]
        told = tuple(simulation.told[name])
        if record.kind == "finished" and record.reason != "stop":
            assert told == expected
            num_whole += asked
        assert told == expected[: len(told)], "out of order, or twice"
    assert num_whole > 10
