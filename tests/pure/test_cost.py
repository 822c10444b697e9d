"""What a step costs: a formula that can be done by hand, and what the model learns from steps that took longer."""

import random

import pytest

from headway.core.cost import CostFit, CostModel, Share, shares_of
from headway.core.work import Segment

FIT = CostFit(step_s=10.0, token_s=0.5, segment_s=0.25, pair_s=0.01)
SHORT = [Share(4, 0)]  # 2 s of arithmetic: the 10 s that any step costs count more
LONG = [Share(40, 0)]  # 20 s of arithmetic
QUICK = CostFit(*(value / 1000 for value in (FIT.step_s, FIT.token_s, FIT.segment_s, FIT.pair_s)))  # as steps are


def test_a_short_step_pays_for_being_one() -> None:
    """Four tokens without context: 10 + 4 · 0.5 + 0.25 + 0.01 · 4 · (0 + 2)."""
    assert CostModel(FIT).predict(SHORT) == pytest.approx(12.33)


def test_a_chunk_pays_for_its_context() -> None:
    """Forty tokens after 100 others: 10 + 40 · 0.5 + 0.25 + 0.01 · 40 · (100 + 20)."""
    assert CostModel(FIT).prefill(40, 100) == pytest.approx(78.25)


def test_a_mixture_is_one_pass() -> None:
    """A prompt of 30 beside two who decode is one step: 10 + 32 · 0.5 + 3 · 0.25 + 0.01 · (450 + 7.5 + 9.5)."""
    assert CostModel(FIT).predict([Share(30, 0), Share(1, 7), Share(1, 9)]) == pytest.approx(31.42)


def test_a_prompt_in_chunks_reads_the_same_pairs() -> None:
    """Cut in two, a prompt pays once more for a step and a segment, and for nothing else."""
    cost = CostModel(FIT)
    assert cost.prefill(30) + cost.prefill(50, 30) == pytest.approx(cost.prefill(80) + 10 + 0.25)


def test_a_prompt_that_will_be_cut_is_priced_so() -> None:
    """A hundred tokens behind ten, in chunks of forty, are three steps: as much as the three one after another."""
    cost = CostModel(FIT)
    pieces_s = cost.prefill(40, 10) + cost.prefill(40, 50) + cost.prefill(20, 90)
    cost.chunk_tokens = 40
    assert cost.prefill(100, 10) == pytest.approx(pieces_s)


def test_packing_saves_whole_steps() -> None:
    """Five prompts of four tokens together: 10 + 20 · 0.5 + 5 · (0.25 + 0.08) = 21.65, not five times 12.33."""
    assert CostModel(FIT).predict(SHORT * 5) == pytest.approx(21.65)


def test_an_empty_step_costs_what_any_step_does() -> None:
    assert FIT.price([]) == (10.0, False)
    assert FIT.price(LONG) == (pytest.approx(38.25), True)


def test_shares_of_a_work() -> None:
    """Prices look at how many tokens and how much context, at nothing else of a segment."""
    segments = [Segment("a", (1, 2, 3), 8, 8, (0, 1, 2), (2,)), Segment("b", (4,), 5, 5, (3, 4), (0,))]
    assert shares_of(segments) == (Share(3, 8), Share(1, 5))


@pytest.mark.parametrize("shares", [SHORT, LONG], ids=["bound by memory", "bound by arithmetic"])
@pytest.mark.parametrize("factor", [0.5, 2.0, 3.0])
def test_the_correction_converges(factor: float, shares: list[Share]) -> None:
    """The device is twice as fast as fitted, or two or three times as slow: after some steps the prediction says so."""
    cost = CostModel(QUICK)
    fitted = cost.predict(shares)
    errors = []
    for _ in range(30):
        cost.observe(QUICK.price(shares), factor * fitted)
        errors.append(abs(cost.predict(shares) / (factor * fitted) - 1))
    assert errors == sorted(errors, reverse=True)
    assert errors[7] < 0.25
    assert errors[-1] < 0.01


def test_one_odd_step_does_not_turn_the_prediction_over() -> None:
    """A single step that took a hundred times as long is believed to have taken twice as long, and moves the
    prediction by a fifth of that way; by no more than three fifths if it was fitted to last long."""
    cost = CostModel(QUICK)
    fitted = cost.predict(LONG)
    cost.observe(QUICK.price(LONG), 100 * fitted)
    assert cost.predict(LONG) == pytest.approx(fitted * (1 + 0.2 * 1))
    assert cost.correction == pytest.approx(1.2)
    cost = CostModel(FIT)
    cost.observe(FIT.price(LONG), 100 * FIT.seconds(LONG))
    assert cost.correction == pytest.approx(1.6)


@pytest.mark.parametrize("shares", [SHORT, LONG], ids=["bound by memory", "bound by arithmetic"])
def test_a_slow_down_that_stays_is_followed(shares: list[Share]) -> None:
    """Not believed at once, but from then on a neighbour takes most of the machine: after a dozen steps that take five
    times as long the prediction is nearly there, and after twenty more it is back when the neighbour goes."""
    cost = CostModel(QUICK)
    fitted = cost.predict(shares)
    for _ in range(12):
        cost.observe(QUICK.price(shares), 5 * fitted)
    assert cost.predict(shares) == pytest.approx(5 * fitted, rel=0.15)
    for _ in range(20):
        cost.observe(QUICK.price(shares), fitted)
    assert cost.predict(shares) == pytest.approx(fitted, rel=0.15)


@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.0, 4.0])
def test_a_slow_down_is_followed_within_ten_seconds_however_long_a_step_takes(seconds: float) -> None:
    """Beside a busy neighbour steps take twice as long: `seconds`, as long prompts of a large model do. Ten seconds
    later prices are within 15 per cent, though only two steps of four seconds have ended by then."""
    cost = CostModel(CostFit(step_s=0.01, token_s=seconds / 2 / 1000))
    price = cost.fit.price([Share(1000, 0)])
    for _ in range(int(10 / seconds)):
        cost.observe(price, seconds)
    assert cost.seconds(price) == pytest.approx(seconds, rel=0.15)


def test_prices_made_before_are_stale_when_they_are_wrong_by_much() -> None:
    """Small corrections leave the version alone, so that nobody is priced anew for nothing; a slow-down does not."""
    cost = CostModel(QUICK)
    for number in range(50):
        cost.observe(QUICK.price(LONG), QUICK.seconds(LONG) * (1.1 if number % 2 else 0.9))
    assert cost.version == 0
    for _ in range(20):
        cost.observe(QUICK.price(LONG), 2 * QUICK.seconds(LONG))
    assert 1 <= cost.version <= 5


def test_the_two_sides_learn_apart() -> None:
    """A busy neighbour slows long prompts down; single tokens, bound by memory, are still priced as before."""
    cost = CostModel(QUICK)
    short, long = cost.predict(SHORT), cost.predict(LONG)
    for _ in range(10):
        cost.observe(QUICK.price(LONG), 5 * long)
    assert cost.predict(SHORT) == short
    assert cost.predict(LONG) > 4 * long
    for _ in range(10):
        cost.observe(QUICK.price(SHORT), 0.5 * short)
    assert cost.predict(SHORT) < 0.6 * short
    assert cost.predict(LONG) > 4 * long


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.05, 0.2, 0.5])
def test_the_upper_estimate_holds_nine_times_in_ten(seed: int, noise: float) -> None:
    """Steps vary around a mean that is 1.3 × the fitted one; of the last 1500 about nine in ten stay below `upper`."""
    rng = random.Random(seed)
    cost = CostModel(QUICK)
    fitted = QUICK.seconds(LONG)
    within = []
    for _ in range(2000):
        taken_s = 1.3 * fitted * rng.uniform(1 - noise, 1 + noise)
        within.append(taken_s <= cost.upper(cost.predict(LONG)))
        cost.observe(QUICK.price(LONG), taken_s)
    assert 0.85 < sum(within[500:]) / 1500 < 0.97


def test_a_promise_is_never_tighter_than_the_mean_nor_absurdly_loose() -> None:
    """Steps like clockwork still leave two per cent; steps that vary a hundredfold triple the mean at most."""
    steady, wild = CostModel(QUICK), CostModel(QUICK)
    for number in range(300):
        steady.observe(QUICK.price(LONG), QUICK.seconds(LONG))
        wild.observe(QUICK.price(LONG), QUICK.seconds(LONG) * (0.2 if number % 3 else 20.0))
    assert steady.upper(1.0) == 1.02
    assert 1.02 < wild.upper(1.0) <= 3.0


def test_the_model_knows_how_wrong_it_is() -> None:
    """No error while steps take what was predicted; about a quarter when they are off by one, up and down in turn."""
    cost = CostModel(QUICK)
    for _ in range(10):
        cost.observe(QUICK.price(LONG), QUICK.seconds(LONG))
    assert cost.mean_error == 0.0
    for number in range(400):
        cost.observe(QUICK.price(LONG), QUICK.seconds(LONG) * (1.25 if number % 2 else 0.75))
    assert cost.mean_error == pytest.approx(0.25, abs=0.04)


def test_an_error_that_is_corrected_is_forgotten() -> None:
    """The machine became twice as slow: the error jumps, and falls again as the correction follows."""
    cost = CostModel(QUICK)
    errors = []
    for _ in range(200):
        cost.observe(QUICK.price(LONG), 2 * QUICK.seconds(LONG))
        errors.append(cost.mean_error)
    assert max(errors) > 0.1
    assert errors[-1] < 0.001


def test_a_suspended_machine_teaches_nothing_absurd() -> None:
    """The lid was closed in mid-step, or the clock stood still: corrections stay within their bounds."""
    cost = CostModel(QUICK)
    fitted = cost.predict(LONG)
    low, high = CostModel.BOUNDS
    for _ in range(100):
        cost.observe(QUICK.price(LONG), 1e9)
    assert cost.predict(LONG) == pytest.approx(high * fitted)
    for _ in range(100):
        cost.observe(QUICK.price(LONG), 0.0)
    assert cost.predict(LONG) == pytest.approx(low * fitted)


def test_a_free_step_teaches_nothing() -> None:
    """No fit at all: there is no ratio to learn from, and no division by zero."""
    cost = CostModel(CostFit(token_s=0.0))
    cost.observe(cost.fit.price(LONG), 1.0)
    assert cost.predict(LONG) == 0.0
