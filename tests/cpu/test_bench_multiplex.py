"""The page on ways of sharing a device: what it says of the controller's steadiness is what a run of the engine did."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from headway.bench import multiplex
from headway.bench.contest import Contender, Run
from headway.bench.goodput import Tries
from headway.bench.multiplex_loads import AUTO, MIXED
from headway.bench.score import score
from headway.config import EngineSettings
from headway.placement.engine import build_engine

NUM_THREADS = torch.get_num_threads()
NO_SCORE = score([], {})


def test_where_it_did_not_divide_its_runs_are_those_of_riding_along() -> None:
    """At the first rate both are judged by the two of them together, at the second, where it did divide, each by its
    own; and so in each draw."""

    def run(rate: float, num_met: int, num_repartitions: int = 0, draw: int = 0) -> Run:
        met = tuple(number < num_met for number in range(20))
        return Run(rate, NO_SCORE, num_repartitions=num_repartitions, met=met, draw=draw)

    auto, mixed = Contender(AUTO, 1.0), Contender(MIXED, 1.0)
    auto.runs = [run(1.0, 17), run(2.0, 16, 1), run(1.0, 17, draw=1), run(2.0, 10, 2, draw=1)]
    mixed.runs = [run(1.0, 20), run(2.0, 18), run(1.0, 20, draw=1), run(2.0, 16, draw=1)]
    found = multiplex.pooled({AUTO: auto, MIXED: mixed})
    assert [len(each.runs) for each in (auto, mixed)] == [6, 6]
    assert [sum(run.met) for run in auto.runs] == [17, 16, 17, 10, 20, 20], "its own are the first"
    assert [sum(run.met) for run in mixed.runs] == [20, 18, 20, 16, 17, 17]
    # 0.925 at 1 for both; at 2 it attains 0.65 of its own, and riding along 0.85
    assert found[AUTO].good == pytest.approx(1 + 0.025 / 0.275)
    assert found[MIXED].good == pytest.approx(1 + 0.025 / 0.075)


def test_steadiness_is_told_by_the_minute(tiny_folder: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short watch, at the rate that was asked for; a division that changes too often is told as that."""
    monkeypatch.setattr(multiplex, "STEADY_S", 1.0)
    folder: Path = tiny_folder("llama2", num_hidden_layers=2)  # type: ignore[operator]
    engine = build_engine(EngineSettings(model=str(folder), lanes="auto", max_model_len=512, cost_cache=False))
    try:
        field = multiplex.field_of(engine, "balanced", 8, Tries())
        said = multiplex.steadiness(field, 12.5)
        monkeypatch.setattr(multiplex, "MOST_CHANGES", -1.0)
        strict = multiplex.steadiness(field, 12.5)
    finally:
        engine.pool.close()
        torch.set_num_threads(NUM_THREADS)
    assert re.match(r"At 10\.00 requests/s for \d\.\d minutes, auto divided the device anew \d+ times, ", said)
    assert "a minute; at most 1: " in said
    assert strict.endswith("not reached.")


def test_rates_go_on_until_the_best_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first draw for all of them; in the others the same rates, for those who are near."""
    monkeypatch.setattr(multiplex, "JOINT", lambda run: sum(run.met) / len(run.met))
    knees = {"chunk 32": 13.0, AUTO: 15.5, MIXED: 15.0, "fixed split": 9.0}
    asked: list[tuple[str, float, str]] = []

    def attaining(draw: str) -> SimpleNamespace:
        def attain(name: str, rate: float) -> Run:
            asked.append((name, round(rate, 2), draw))
            num_met = 100 if rate <= knees[name] else 50
            return Run(rate, NO_SCORE, num_repartitions=1, met=tuple(n < num_met for n in range(100)))

        return SimpleNamespace(attain=attain)

    found = multiplex.swept_at(attaining("first"), [attaining("second")], list(knees), [10.0, 12.0])  # type: ignore[arg-type, list-item]
    rates = [10.0, 12.0, 13.8, 15.87]
    assert [rate for name, rate, draw in asked if (name, draw) == (AUTO, "first")] == rates
    assert [rate for name, rate, draw in asked if (name, draw) == (AUTO, "second")] == rates
    assert {name for name, _, draw in asked if draw == "second"} == {AUTO, MIXED, "chunk 32"}
    assert [run.draw for run in found[AUTO].runs] == [0] * 4 + [1] * 4
    assert 13.8 < found[AUTO].good < 15.87
    assert found["fixed split"].good == 0.0
