"""What a step costs: a formula that can be done by hand, and what the model learns from steps that took longer."""

import pytest

from headway.core.cost import CostFit, CostModel, Share, shares_of
from headway.core.work import Segment

FIT = CostFit(step_s=1.0, stream_s=10.0, token_s=0.5, segment_s=0.25, pair_s=0.01)
SHORT = [Share(4, 0)]  # 4 tokens cost 2 s of arithmetic: the 10 s of reading weights count
LONG = [Share(40, 0)]  # 40 tokens cost 20 s: arithmetic counts


def test_a_short_step_pays_for_the_weights() -> None:
    """Four tokens without context: 1 + max(10, 4 · 0.5) + 0.25 + 0.01 · 4 · (0 + 2)."""
    assert CostModel(FIT).predict(SHORT) == pytest.approx(11.33)


def test_a_long_step_pays_for_its_tokens() -> None:
    """Forty tokens after 100 others: 1 + max(10, 40 · 0.5) + 0.25 + 0.01 · 40 · (100 + 20)."""
    assert CostModel(FIT).prefill(40, 100) == pytest.approx(69.25)


def test_a_mixture_is_one_pass() -> None:
    """A prompt of 30 beside two who decode reads the weights once: 1 + 16 + 3 · 0.25 + 0.01 · (450 + 7.5 + 9.5)."""
    assert CostModel(FIT).predict([Share(30, 0), Share(1, 7), Share(1, 9)]) == pytest.approx(22.42)


def test_packing_pays_where_memory_is_the_bound() -> None:
    """Five prompts of four tokens together cost little more than one of them, far less than five steps."""
    cost = CostModel(FIT)
    together = cost.predict(SHORT * 5)
    assert together < 1.2 * cost.predict(SHORT)
    assert together < 0.3 * 5 * cost.predict(SHORT)


def test_shares_of_a_work() -> None:
    """Prices look at how many tokens and how much context, at nothing else of a segment."""
    segments = [Segment("a", (1, 2, 3), 8, 8, (0, 1, 2), (2,)), Segment("b", (4,), 5, 5, (3, 4), (0,))]
    assert shares_of(segments) == (Share(3, 8), Share(1, 5))


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_the_correction_converges(factor: float) -> None:
    """The device is half, or three times, as slow as fitted: after some steps the prediction says so."""
    cost = CostModel(FIT)
    fitted = cost.predict(LONG)
    errors = []
    for _ in range(30):
        cost.observe(LONG, factor * fitted)
        errors.append(abs(cost.predict(LONG) / (factor * fitted) - 1))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


def test_one_odd_step_does_not_turn_the_prediction_over() -> None:
    """A single step that took ten times as long moves the prediction by a fifth of the way."""
    cost = CostModel(FIT)
    fitted = cost.predict(LONG)
    cost.observe(LONG, 10 * fitted)
    assert cost.predict(LONG) == pytest.approx(fitted * (1 + 0.2 * 9))


def test_the_two_sides_learn_apart() -> None:
    """A busy neighbour slows long prompts down; single tokens, bound by memory, are still priced as before."""
    cost = CostModel(FIT)
    before = cost.predict(SHORT)
    for _ in range(10):
        cost.observe(LONG, 5 * 29.25)
    assert cost.predict(SHORT) == before
    for _ in range(10):
        cost.observe(SHORT, 0.5 * before)
    assert cost.predict(SHORT) < 0.6 * before
    assert cost.predict(LONG) > 4 * 29.25


def test_a_suspended_machine_teaches_nothing_absurd() -> None:
    """The lid was closed in mid-step, or the clock stood still: corrections stay within their bounds."""
    cost = CostModel(FIT)
    fitted = cost.predict(LONG)
    low, high = CostModel.BOUNDS
    for _ in range(100):
        cost.observe(LONG, 1e9)
    assert cost.predict(LONG) == pytest.approx(high * fitted)
    for _ in range(100):
        cost.observe(LONG, 0.0)
    assert cost.predict(LONG) == pytest.approx(low * fitted)


def test_a_free_step_teaches_nothing() -> None:
    """No fit at all: there is no ratio to learn from, and no division by zero."""
    cost = CostModel(CostFit(token_s=0.0))
    cost.observe(LONG, 1.0)
    assert cost.predict(LONG) == 0.0
