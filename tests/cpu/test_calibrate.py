"""What an engine measures at its start: what steps cost, how that is solved for, and how whole engines are priced."""

import math
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch

from headway.config import EngineSettings
from headway.core.cost import CostFit, Share
from headway.kv.pool import KVPool, PoolShape
from headway.models import weights
from headway.models.presets import preset
from headway.placement import fitting, prices
from headway.placement.calibrate import Calibration, step_s
from headway.placement.engine import build_engine
from headway.placement.fitting import (
    BUDGET_S,
    LONGEST_PROBES,
    MOST_REPEATS,
    NUM_ALWAYS,
    Shape,
    fit_cost,
    saturation,
    shapes,
)
from headway.stages.language import LanguageStage
from headway.stages.matrices import matrices_of
from headway.stages.sample import Sampler
from headway.stages.tiling import Rates, Tiling

TRUE = CostFit(step_s=0.004, token_s=1e-4, segment_s=2e-4, pair_s=5e-8)
RATES = Rates(4e11, 1.5e10, 2e11, 5e9, 1e8, 1e8, 1e8)


class Machine:
    """Steps take what `truth` says, times a factor that may depend on how many steps there were before."""

    def __init__(
        self, truth: CostFit = TRUE, factor: Callable[[int, Shape], float] = lambda number, shape: 1.0
    ) -> None:
        self.truth = truth
        self.factor = factor
        self.steps: list[Shape] = []

    def __call__(self, shape: Shape) -> float:
        self.steps.append(shape)
        return self.truth.seconds(shape) * self.factor(len(self.steps), shape)


# Solving


@pytest.mark.parametrize("known_pair_s", [0.5, 1.0, 2.0])
def test_coefficients_are_found_again(known_pair_s: float) -> None:
    """A machine that does exactly what the formula says, and a guess of `pair_s` that may be wrong twofold."""
    fitted = fit_cost(Machine(), 4096, replace(TRUE, pair_s=known_pair_s * TRUE.pair_s))
    for name in ("step_s", "token_s", "segment_s"):
        assert getattr(fitted.fit, name) == pytest.approx(getattr(TRUE, name), rel=0.05), name
    assert fitted.fit.pair_s == pytest.approx(TRUE.pair_s, rel=0.2)
    assert fitted.error < 0.01


@pytest.mark.parametrize("missing", ["step_s", "segment_s", "pair_s"])
def test_nothing_is_ever_negative(missing: str) -> None:
    """Noise of a tenth around a coefficient that is zero: it may come out small, not below zero."""
    truth = replace(TRUE, **{missing: 0.0})
    wobble = Machine(truth, lambda number, shape: 1.1 if number % 2 else 0.9)
    fit = fit_cost(wobble, 4096, TRUE).fit
    assert min(astuple(fit)) >= 0
    assert fit.token_s > 0


def test_the_error_is_of_steps_that_were_not_fitted() -> None:
    """No held-out shape was solved with, and the figure is theirs: here they alone are slow, by a fifth."""
    held_out = {shape for shape, is_held_out in shapes(4096) if is_held_out}
    fitted = fit_cost(Machine(factor=lambda number, shape: 1.25 if shape in held_out else 1.0), 4096, TRUE)
    assert set(fitted.held_out) == held_out
    assert not held_out & set(fitted.fitted_on)
    assert any(share.context_tokens for shape in held_out for share in shape), "no chunk behind a context is held out"
    assert fitted.fit.step_s == pytest.approx(TRUE.step_s, rel=0.01)
    assert fitted.error == pytest.approx(0.2, abs=0.01)


def test_a_disturbed_step_is_run_again() -> None:
    """A neighbour makes one long prompt take five times as long, once."""
    hit: list[Shape] = []

    def neighbour(number: int, shape: Shape) -> float:
        if shape == (Share(512, 0),) and not hit:
            hit.append(shape)
            return 5.0
        return 1.0

    machine = Machine(factor=neighbour)
    fitted = fit_cost(machine, 4096, TRUE)
    assert machine.steps[-1] == (Share(512, 0),), "it came last, after everything was seen"
    assert fitted.fit.token_s == pytest.approx(TRUE.token_s, rel=0.02)
    assert fitted.error < 0.01


def test_a_machine_that_is_slow_throughout_is_not_asked_for_ever() -> None:
    """Every step is disturbed, each in its own way: a second run of each at most, and there is a result."""
    machine = Machine(factor=lambda number, shape: 1.0 + number * 7 % 5)
    fitted = fit_cost(machine, 4096, TRUE)
    assert all(machine.steps.count(shape) <= MOST_REPEATS + 1 for shape, _ in shapes(4096)[1:])
    assert all(math.isfinite(value) for value in astuple(fitted.fit))


def test_a_neighbour_at_the_beginning_does_not_use_the_budget_up() -> None:
    """The first shapes take thirty times as long; the rest is undisturbed, still measured, and shows them to be odd."""
    truth = CostFit(*(5 * value for value in astuple(TRUE)))
    machine = Machine(truth, lambda number, shape: 30.0 if 2 <= number <= 3 else 1.0)
    fitted = fit_cost(machine, 4096, truth)
    assert len(fitted.fitted_on) + len(fitted.held_out) > 2 * NUM_ALWAYS
    assert fitted.fit.token_s == pytest.approx(truth.token_s, rel=0.02)
    assert fitted.error < 0.02


def test_a_neighbour_that_never_rests_is_not_believed() -> None:
    """Everything takes eighty times as long as the operators let expect, which no correction could ever make good:
    what was expected stays, and the error says what that is worth."""
    fitted = fit_cost(Machine(factor=lambda number, shape: 80.0), 4096, TRUE)
    assert astuple(fitted.fit) == pytest.approx(astuple(TRUE))
    assert fitted.error > 0.9


@pytest.mark.parametrize("slow", [1, 10, 100, 1000])
def test_the_budget_is_kept(slow: int) -> None:
    """Ever slower models are measured by ever fewer steps, and by the four that are always needed in the end."""
    truth = CostFit(*(slow * value for value in astuple(TRUE)))
    machine = Machine(truth)
    fitted = fit_cost(machine, 4096, truth)
    spent_s = sum(truth.seconds(shape) for shape in machine.steps[1:])  # the warm-up aside
    num_shapes = len(fitted.fitted_on) + len(fitted.held_out)
    needed_s = sum(truth.seconds(shape) for shape, _ in shapes(4096)[:NUM_ALWAYS])
    assert spent_s <= max(1.4 * BUDGET_S, needed_s)
    assert num_shapes == (len(shapes(4096)) if slow == 1 else NUM_ALWAYS if slow == 1000 else num_shapes)
    assert len(machine.steps) <= 1 + MOST_REPEATS * num_shapes
    assert fitted.fit.token_s == pytest.approx(truth.token_s, rel=0.05)


@pytest.mark.parametrize("max_model_len", [2, 3, 16, 33, 400, 4096])
def test_no_probe_is_longer_than_a_request_may_be(max_model_len: int) -> None:
    for shape, _ in shapes(max_model_len):
        assert all(sum(share) <= max_model_len for share in shape)
    fitted = fit_cost(Machine(), max_model_len, TRUE)
    assert fitted.held_out
    assert fitted.fit.seconds((Share(1, 0),)) == pytest.approx(TRUE.seconds((Share(1, 0),)), rel=0.01)


def test_a_fast_device_is_measured_by_long_prompts_too() -> None:
    """Where a thousand tokens take as long as one, only longer prompts tell what a token costs."""
    truth = CostFit(step_s=1.7e-3, token_s=2.5e-6, segment_s=1e-6, pair_s=2e-11)
    machine = Machine(truth)
    fitted = fit_cost(machine, 131_072, truth, longest=LONGEST_PROBES["cuda"])
    assert {(Share(8192, 0),), (Share(1024, 4096),)} <= set(fitted.fitted_on)
    assert (Share(3072, 0),) in fitted.held_out
    assert max(sum(share) for shape, _ in shapes(131_072) for share in shape) <= LONGEST_PROBES["cpu"]


def test_saturation_is_where_the_fixed_part_is_a_sixteenth() -> None:
    """15 · 4 ms / 0.1 ms = 600 tokens: 60 ms of arithmetic beside 4 ms. Never fewer than 16."""
    assert saturation(TRUE) == 600
    assert saturation(replace(TRUE, step_s=0.0)) == 16


# Real steps


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    config = replace(
        preset("smollm2-135m"), num_layers=2, hidden_size=64, intermediate_size=96, vocab_size=131, max_positions=96
    )
    model = weights.random_decoder(config, 0, torch.float32)
    pool = KVPool(PoolShape(64, config.num_layers, 8, config.num_kv_heads, config.head_size, torch.float32))
    return Calibration(model, pool, 64, 0.010, 96, matrices_of(model))


@torch.inference_mode()
def test_a_tiny_model_has_prices(calibration: Calibration) -> None:
    """Everything is finite, nothing negative, and a real step takes about what they say."""
    measured = calibration.measure()
    assert all(math.isfinite(value) and value > 0 for value in astuple(measured.rates))
    assert all(math.isfinite(value) and value >= 0 for value in astuple(measured.fit))
    assert measured.fit.token_s > 0
    assert math.isfinite(measured.error)
    assert 0.1 < calibration.check(measured) < 10


@torch.inference_mode()
def test_a_step_of_a_shape_is_that_shape(calibration: Calibration) -> None:
    """A token and a chunk behind a context, each on pages of its own; afterwards nothing is left of them."""
    seen = []

    class Watched(LanguageStage):
        def run(self, work):
            seen.append(work)
            return super().run(work)

    sampler = Sampler(calibration.model.config.vocab_size)
    stage = Watched(calibration.model, calibration.pool, Tiling(RATES, 0.010), sampler)
    assert step_s(stage, (Share(1, 0), Share(5, 20))) > 0
    one, chunk = seen[0].segments
    assert (len(one.tokens), one.first_position, one.pages) == (1, 0, (0,))
    assert (len(chunk.tokens), chunk.first_position, chunk.context_tokens) == (5, 20, 20)
    assert chunk.pages == (1, 2, 3, 4)
    assert sampler._sessions == {}


# A whole engine


def test_a_second_start_is_priced_like_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The embedded model, twice: the second start runs few steps and cuts and predicts by the very same numbers."""
    monkeypatch.setenv("HEADWAY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(prices, "TOLERANCE", 1e9)  # however busy this machine is
    settings = EngineSettings(num_threads=1, dtype="float32", max_model_len=256)
    engines = [build_engine(settings) for _ in range(2)]
    uncached = build_engine(replace(settings, cost_cache=False))
    first, second = (engine.facts for engine in engines)
    assert first.cost_source.startswith("measured in ")
    assert second.cost_source == "cached"
    assert uncached.facts.cost_source.startswith("measured in ")
    assert engines[0].stage.tiling.rates == engines[1].stage.tiling.rates
    assert (first.cost_fit, first.cost_error) == (second.cost_fit, second.cost_error)
    assert first.pack_tokens == second.pack_tokens == saturation(first.cost_fit)
    assert engines[1].scheduler.settings.pack_tokens == first.pack_tokens
    assert engines[1].scheduler.cost.fit == first.cost_fit
    assert len(list((tmp_path / "costs").iterdir())) == 1
    for engine in (*engines, uncached):
        engine.pool.close()


def test_without_a_cache_nothing_is_read_or_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADWAY_CACHE_DIR", str(tmp_path))
    engine = build_engine(EngineSettings(num_threads=1, dtype="float32", max_model_len=64, cost_cache=False))
    engine.pool.close()
    assert list(tmp_path.iterdir()) == []


def test_the_formula_is_linear_in_its_coefficients() -> None:
    """Which is what solving relies on: the seconds of a fit are those of its coefficients one by one."""
    for shape, _ in shapes(4096):
        parts = [unit.seconds(shape) * value for unit, value in zip(fitting._UNITS, astuple(TRUE), strict=True)]
        assert TRUE.seconds(shape) == pytest.approx(sum(parts))
