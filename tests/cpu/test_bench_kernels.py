"""The page about compiled operators: what is timed is the same by both, and said as it was."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from headway.bench import kernels, layers
from headway.bench.calm import Calm
from headway.bench.kernels import Case, Measured, Rows
from headway.config import EngineSettings
from headway.models.presets import preset
from headway.placement.engine import build_engine
from headway.stages.native import library, suits
from headway.stages.operators import Operators

needs_library = pytest.mark.skipif(
    library() is None, reason="nothing is compiled here: a C++ compiler was missing at installation"
)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", [Case(1, 40), Case(3, 9), Case(2, 1, 50)], ids=str)
def test_both_do_the_same_work(case: Case, dtype: torch.dtype) -> None:
    """Each part agrees, and has a figure from each for every pair."""
    found = library()
    assert found is not None
    config = preset("smollm2-135m")
    assert suits(found, config, dtype, torch.device("cpu"))
    rows = Rows(config, dtype, case)
    operators = kernels.both(rows, found)
    calm = Calm()
    for name, part in rows.parts.items():
        measured = kernels.measure(part, name, operators, 1, calm)
        assert len(measured.torch_s) == len(measured.compiled_s) == 1, name
        assert min(*measured.torch_s, *measured.compiled_s) > 0, name


@needs_library
def test_nothing_wrong_is_timed() -> None:
    """One that writes no page is noticed: its pool is its own, and still as it was drawn."""
    found = library()
    assert found is not None
    rows = Rows(preset("smollm2-135m"), torch.float32, Case(1, 20))
    theirs, _ = kernels.both(rows, found)
    idle = Operators(rows.config, rows.pool())

    def place(operators: Operators) -> Tensor:
        if operators is idle:
            return operators.pool.blocks_PL2KSD[:, -1]
        return rows.parts["rope and page writes"](operators)

    with pytest.raises(RuntimeError, match="differ"):
        kernels.measure(place, "rope and page writes", (theirs, idle), 1, Calm())


@pytest.mark.parametrize("value", [1.1, float("nan"), float("inf")])
def test_what_is_far_off_is_not_close(value: float) -> None:
    good = torch.ones(8)
    kernels.check("good", good, good + 1e-6)
    wrong = good.clone()
    wrong[3] = value
    with pytest.raises(RuntimeError, match="wrong: compiled and torch differ"):
        kernels.check("wrong", good, wrong)


def test_slower_rows_are_named() -> None:
    """Medians of the pairs' ratios: 2.0 and 0.5; the second is where torch is faster."""
    fast = Measured([40e-6, 20e-6, 60e-6], [10e-6, 10e-6, 60e-6])
    slow = Measured([10e-6], [20e-6])
    assert str(fast) == "40 / 10 = 2.0 (1.0 … 4.0)"
    said = kernels.verdict({"attention": [fast, slow], "norms": [fast, fast]}, ["a", "b"])
    assert said == "torch is faster at attention of b (0.50)."
    assert kernels.verdict({"norms": [fast]}, ["a"]) == "Compiled is faster in every row."


def test_requests_have_pages_of_their_own() -> None:
    """Every page of the pool belongs to one request, and rows are counted."""
    case = Case(4, 3, 30)
    rows = Rows(preset("smollm2-135m"), torch.bfloat16, case)
    assert (case.pages_each, rows.num_pages, rows.batch.num_rows) == (3, 12, 12)
    assert sorted(torch.cat(rows.batch.tables).tolist()) == list(range(12))
    assert rows.batch.positions_N.tolist() == [30, 31, 32] * 4


@needs_library
def test_whole_layers_are_timed_beside_their_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page has a gain for each case of both precisions; and a layer that leaves its rows as they are is noticed."""
    monkeypatch.setattr(layers, "MODELS", (None,))  # the embedded one
    layers.main(["--pairs", "1", "--folder", str(tmp_path)])
    page = (tmp_path / "layers.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith(("| one token", "| 4 ×", "| a prompt"))]
    assert len(rows) == 4
    assert all(row.count(" = ") == 2 for row in rows)
    engine = build_engine(EngineSettings(max_model_len=1024))
    steps = layers.Steps(engine)
    assert engine.stage.layers is not None
    engine.stage.layers.run = lambda number, x_NE, course: None  # type: ignore[method-assign]
    with torch.inference_mode(), pytest.raises(RuntimeError, match="differ"):
        steps.check(Case(1, 20))
    engine.pool.close()
