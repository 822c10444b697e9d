"""Whom to take along: as many as fit without making anybody late."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from headway.core.cost import CostFit, CostModel, Share
from headway.core.packing import pack

FITS = st.builds(
    CostFit,
    step_s=st.sampled_from([0.0, 1.0, 10.0, 50.0]),
    token_s=st.sampled_from([0.0, 0.5, 1.0]),
    segment_s=st.sampled_from([0.0, 0.25]),
    pair_s=st.sampled_from([0.0, 0.001]),
)
QUEUES = st.lists(
    st.tuples(st.builds(Share, st.integers(1, 40), st.integers(0, 40)), st.floats(-20, 60)), min_size=1, max_size=8
)


def makes_late(shares: Sequence[Share], slacks_s: Sequence[float], count: int, cost: CostModel) -> bool:
    """Whether the first `count` as one step push a member past a deadline that it would meet alone."""
    together = cost.predict(shares[:count])
    return any(
        slack >= 0 and together > slack + cost.predict([share])
        for share, slack in zip(shares[:count], slacks_s[:count], strict=True)
    )


@given(QUEUES, FITS, st.integers(1, 100))
def test_a_pack_is_the_largest_that_harms_nobody(queue: list[tuple[Share, float]], fit: CostFit, most: int) -> None:
    """Against trying every length: the longest beginning of the queue within the bound, in which nobody turns late."""
    shares, slacks_s = [share for share, _ in queue], [slack for _, slack in queue]
    cost = CostModel(fit)
    allowed = [
        count
        for count in range(1, len(queue) + 1)
        if count == 1
        or (sum(share.num_tokens for share in shares[:count]) <= most and not makes_late(shares, slacks_s, count, cost))
    ]
    assert pack(shares, slacks_s, cost, most) == max(allowed)


def test_a_long_prompt_goes_alone() -> None:
    """The first prompt is over the bound by itself: it runs, and takes nobody along."""
    assert pack([Share(500, 0), Share(1, 0)], [60.0, 60.0], CostModel(CostFit()), max_tokens=100) == 1


def test_what_is_late_already_holds_nobody_back() -> None:
    """The first one has missed its target: waiting with others changes nothing for it, so they come along."""
    cost = CostModel(CostFit(token_s=1.0))
    assert pack([Share(10, 0), Share(10, 0)], [-5.0, 60.0], cost, max_tokens=100) == 2
    assert pack([Share(10, 0), Share(10, 0)], [5.0, 60.0], cost, max_tokens=100) == 1


def test_a_follower_in_a_hurry_is_protected_too() -> None:
    """The leader has time, but the follower would be late by the leader's share: better in a step of its own."""
    cost = CostModel(CostFit(token_s=1.0))
    assert pack([Share(10, 0), Share(2, 0)], [60.0, 9.0], cost, max_tokens=100) == 1
    assert pack([Share(10, 0), Share(2, 0)], [60.0, 10.0], cost, max_tokens=100) == 2


def test_those_who_are_suspended_can_wait_only_so_long() -> None:
    """Company that would take more time than they have to spare does not come along; the first one goes anyway."""
    cost = CostModel(CostFit(token_s=1.0))
    shares, far = [Share(10, 0)] * 3, [600.0] * 3
    assert [pack(shares, far, cost, 100, max_s) for max_s in (5.0, 19.0, 20.0, 30.0)] == [1, 1, 2, 3]
