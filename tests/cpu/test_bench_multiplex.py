"""The page on ways of sharing a device: what it says of the controller's steadiness is what a run of the engine did."""

from pathlib import Path

import pytest
import torch

from headway.bench import multiplex
from headway.bench.goodput import Tries
from headway.config import EngineSettings
from headway.placement.engine import build_engine

NUM_THREADS = torch.get_num_threads()


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
