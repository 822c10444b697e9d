"""The page on ways of sharing a device: what it says of the controller's steadiness is what a run of the engine did."""

from pathlib import Path

import pytest
import torch

from headway.bench import multiplex
from headway.bench.contest import Contender, Run
from headway.bench.goodput import Tries
from headway.bench.multiplex_loads import AUTO, MIXED
from headway.config import EngineSettings
from headway.placement.engine import build_engine

NUM_THREADS = torch.get_num_threads()


def test_where_it_did_not_divide_its_runs_are_those_of_riding_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first rate both are judged by the mean of the two, at the second, where it did divide, each by its own."""
    monkeypatch.setattr(multiplex, "JOINT", lambda run: run.score)

    def contender(name: str, first: float, second: float, num_repartitions: int = 0) -> Contender:
        found = Contender(name, 1.0)
        found.runs = [Run(1.0, first), Run(2.0, second, num_repartitions=num_repartitions)]  # type: ignore[arg-type]
        return found

    found = multiplex.pooled({AUTO: contender(AUTO, 0.8, 0.7, 1), MIXED: contender(MIXED, 1.0, 0.9)})
    assert found[AUTO].attained(lambda run: run.score) == [(1.0, 0.9), (2.0, 0.7)]  # type: ignore[arg-type, return-value]
    assert found[MIXED].attained(lambda run: run.score) == [(1.0, 0.9), (2.0, 0.9)]  # type: ignore[arg-type, return-value]
    assert (found[AUTO].good, found[MIXED].good) == (1.0, 2.0)
    assert [run.score for run in found[AUTO].runs] == [0.8, 0.7, 1.0], "its own are the first"


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
    assert said.startswith("At 10.00 requests/s for 0.0 minutes, auto divided the device anew ")
    assert "a minute; at most 1: " in said
    assert strict.endswith("not reached.")
