"""A target for the whole answer has a place in the order: what it leaves for the first token."""

import pytest
from story import Story

from headway.core.request import SLO


@pytest.mark.parametrize(
    ("total_s", "max_tokens", "ttft_s", "is_first"),
    [
        (1.5, 21, 1.4, True),  # twenty more tokens take 0.2 s, so the first is due within 1.3 s
        (1.5, 21, 1.2, False),
        (4.0, 381, 2.1, True),  # 380 more would take all but 0.2 s of it, but half of it is left to the first
        (4.0, 381, 1.9, False),
    ],
)
def test_it_goes_before_who_is_due_later(total_s: float, max_tokens: int, ttft_s: float, is_first: bool) -> None:
    """Both wait behind a prompt that is being read; neither comes first by arrival alone."""
    story = Story(pack=False)
    story.arrives("running", 50, slo=SLO(ttft_s=0.6))
    running = story.plan()
    names = ["other", "whole"] if is_first else ["whole", "other"]
    for name in names:
        slo = SLO(total_s=total_s) if name == "whole" else SLO(ttft_s=ttft_s)
        story.arrives(name, 10, max_tokens=max_tokens if name == "whole" else 1, slo=slo)
    assert story.plan(progress=0.01) is running
    story.passes(0.5)
    story.done(running, running=1)
    work = story.plan()
    assert work is not None
    assert work.segments[0].request_id == ("whole" if is_first else "other")


def test_the_sooner_of_both_targets_counts() -> None:
    """A TTFT target that is sooner than what the whole answer leaves stays what it is."""
    story = Story(pack=False)
    story.arrives("running", 50, slo=SLO(ttft_s=0.6))
    running = story.plan()
    story.arrives("later", 10, max_tokens=1, slo=SLO(ttft_s=1.0))
    story.arrives("both", 10, max_tokens=2, slo=SLO(ttft_s=0.9, total_s=30.0))
    story.passes(0.5)
    story.done(running, running=1)
    work = story.plan()
    assert work is not None
    assert work.segments[0].request_id == "both"


def test_who_can_still_meet_its_first_target_is_on_time() -> None:
    """A whole answer's target orders it, but does not make it late before its TTFT target does."""
    story = Story(pack=False)
    story.arrives("running", 130, slo=SLO(ttft_s=1.4))
    running = story.plan()
    story.arrives("both", 20, max_tokens=300, slo=SLO(ttft_s=2.0, total_s=2.0))
    story.arrives("later", 20, max_tokens=1, slo=SLO(ttft_s=5.0))
    story.passes(1.3)
    story.done(running, running=1)
    work = story.plan()
    assert work is not None
    assert work.segments[0].request_id == "both"
