"""What a step takes on a share of the device: by hand, and what must hold whatever the rates are."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.cost import Share
from headway.core.roofline import Anatomy, Power, Roofline, Split

ANATOMY = Anatomy(
    layer_flops=100.0, layer_bytes=1000.0, head_flops=10.0, head_bytes=100.0, pair_flops=1.0, context_bytes=2.0
)
TOKEN, PROMPT = (Share(1, 0),), (Share(100, 0),)


def test_each_operator_takes_the_longer_of_arithmetic_and_memory() -> None:
    """One unit: 1000 operations and 100 bytes a second. A token waits for memory in layers (10 s) and head (1 s);
    a hundred wait for arithmetic in the layers (10 s) and in attention (5000 pairs, 5 s), for memory in the head."""
    roofline = Roofline(ANATOMY, {1: Power(1000.0, 1000.0, 100.0)})
    token, prompt = roofline.demand(TOKEN, 1), roofline.demand(PROMPT, 1)
    assert token.seconds == pytest.approx(11.0005)
    assert token.memory_share == pytest.approx(11 / 11.0005)
    assert prompt.seconds == pytest.approx(16.0)
    assert prompt.memory_share == pytest.approx(1 / 16)
    assert roofline.demand((Share(1, 1000),), 1).seconds == pytest.approx(11 + 20)  # context is read


def test_where_memory_serves_both_a_share_costs_the_arithmetic_only() -> None:
    """Two units compute twice as fast as one, but one reads as fast as two: tokens lose only what prompts read
    meanwhile. Those take 10 + 2.5 + 1 s on both; on one 5 s of attention, and the layers' and the head's bytes."""
    powers = {1: Power(1000.0, 1000.0, 100.0), 2: Power(2000.0, 2000.0, 100.0)}
    prompts, tokens = Roofline(ANATOMY, powers).paces(PROMPT, TOKEN, Split(1, 1))
    left = 100 / (100 * 1 / 16 + 100 * 11 / 11.0005)  # both together ask for a little more than there is
    assert tokens == pytest.approx(1 / left, rel=1e-3)
    assert prompts == pytest.approx((10 / left + 5 + 1 / left) / 13.5, rel=1e-3)


def test_memory_that_both_want_is_divided() -> None:
    """Two steps of tokens, each of which alone waits for memory all the time: each takes twice as long."""
    powers = {1: Power(1e9, 1e9, 100.0), 2: Power(2e9, 2e9, 100.0)}
    assert Roofline(ANATOMY, powers).paces(TOKEN, TOKEN, Split(1, 1)) == pytest.approx((2.0, 2.0), rel=1e-3)


def test_friction_is_a_factor_of_its_split() -> None:
    powers = {1: Power(1000.0, 1000.0, 50.0), 2: Power(2000.0, 2000.0, 100.0)}
    plain = Roofline(ANATOMY, powers)
    rough = Roofline(ANATOMY, powers, {Split(1, 1): (1.5, 1.2)})
    prompts, tokens = plain.paces(PROMPT, TOKEN, Split(1, 1))
    assert rough.paces(PROMPT, TOKEN, Split(1, 1)) == pytest.approx((1.5 * prompts, 1.2 * tokens))


rates = st.floats(1.0, 1e12)


@given(
    st.lists(st.tuples(rates, rates, rates), min_size=2, max_size=6),
    st.lists(st.builds(Share, st.integers(1, 4096), st.integers(0, 4096)), min_size=1, max_size=5),
    st.lists(st.builds(Share, st.just(1), st.integers(0, 4096)), min_size=1, max_size=16),
)
def test_nobody_is_faster_on_a_share_and_more_units_never_harm(
    steps: list[tuple[float, float, float]], prompts: list[Share], tokens: list[Share]
) -> None:
    """Rates that do not shrink as units are added."""
    totals = [0.0, 0.0, 0.0]
    powers = {}
    for units, more in enumerate(steps, start=1):
        totals = [max(total, each) for total, each in zip(totals, more, strict=True)]
        powers[units] = Power(*totals)
    roofline = Roofline(ANATOMY, powers)
    assert all(min(roofline.paces(prompts, tokens, split)) >= 1 - 1e-9 for split in roofline.splits)
    assert [split.prompts + split.tokens for split in roofline.splits] == [len(steps)] * (len(steps) - 1)
    alone = [roofline.demand(prompts, units).seconds for units in sorted(powers)]
    assert all(more <= fewer * (1 + 1e-9) for fewer, more in itertools.pairwise(alone))
