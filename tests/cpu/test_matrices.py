"""Packed matrices against plain ones: as close as rounding, for any rows and any part of the columns; and cut where
they can be cut."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.models.decoder import Linear
from headway.models.presets import preset
from headway.models.weights import random_decoder
from headway.stages.matrices import LEAST_COLUMNS, Packed, Plain, is_packable, matrices_of, packed
from headway.stages.panels import panels_for
from headway.stages.tiling import Rates, Span, Tiling

CPU = torch.device("cpu")
needs_packing = pytest.mark.skipif(
    not is_packable(torch.bfloat16, CPU), reason="this torch has no bfloat16 kernels of oneDNN for this processor"
)


@needs_packing
@settings(max_examples=30)
@given(
    d_in=st.sampled_from([64, 576, 4864]),
    d_out=st.integers(1, 3000),
    num_rows=st.integers(1, 130),
    biased=st.booleans(),
    data=st.data(),
)
def test_columns_are_those_of_the_matrix(
    d_in: int, d_out: int, num_rows: int, biased: bool, data: st.DataObject
) -> None:
    """Any span of parts, the last of which may be narrow."""
    weight = torch.randn(d_out, d_in).bfloat16()
    linear = Linear(weight, torch.randn(d_out).bfloat16() if biased else None)
    made = Packed(linear)
    assert made.size == linear.size
    assert made.step == d_out or made.step % LEAST_COLUMNS == 0
    num_parts = -(-d_out // made.step)
    first = data.draw(st.integers(0, num_parts - 1))
    last = data.draw(st.integers(first + 1, num_parts))
    span = Span(first * made.step, min(d_out, last * made.step))
    x = torch.randn(num_rows, d_in).bfloat16()
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if not biased else linear.bias.double())  # type: ignore[union-attr]
    found = made.columns(x, span).double()
    error = (found - exact[:, span.start : span.end]).abs().max()
    plain = (Plain(linear).columns(x, span).double() - exact[:, span.start : span.end]).abs().max()
    assert error <= 1.5 * plain + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packing_leaves_no_second_copy(dtype: torch.dtype) -> None:
    """Its weights are gone from the model, the tied embedding is not, and shapes are still to be read."""
    if panels_for(dtype, CPU) is None and not is_packable(dtype, CPU):
        pytest.skip("nothing is packed here")
    model = random_decoder(preset("smollm2-135m"), 0, dtype, CPU, 64)
    weights = [model.layers[0].qkv.weight, model.layers[3].down.weight]
    shapes = [layer.gate_up.size for layer in model.layers]
    embedding = model.embedding_VE.clone()
    light, matrices = packed(model)
    assert all(weight.untyped_storage().nbytes() == 0 for weight in weights)
    assert [layer.gate_up.size for layer in light.layers] == shapes
    assert light.layers[0].qkv.weight.device.type == "meta"
    assert torch.equal(light.embedding_VE, embedding)
    assert matrices.head.size == (576, 49152)
    found = panels_for(dtype, CPU)
    if found is not None:
        in_tiles = found.kind == "amx" and dtype is torch.bfloat16
        assert all(layer.gate_up.gates != in_tiles for layer in matrices.layers)
        assert not any(layer.qkv.gates or layer.o.gates or layer.down.gates for layer in matrices.layers)


def test_without_compiled_operators_float32_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied: the same tensors."""
    monkeypatch.setattr("headway.stages.matrices.panels_for", lambda *_, **__: None)
    model = random_decoder(preset("smollm2-135m"), 0, torch.float32, CPU, 64)
    same, matrices = packed(model)
    assert same is model
    assert matrices == matrices_of(model)


@given(
    num_rows=st.integers(1, 5000),
    d_in=st.sampled_from([64, 896, 4864]),
    d_out=st.integers(1, 20_000),
    step=st.sampled_from([64, 192, 1152]),
)
def test_a_grid_is_cut_where_parts_meet(num_rows: int, d_in: int, d_out: int, step: int) -> None:
    """Everything once, in order, edges at multiples of the step."""
    step = min(step, d_out)
    grid = Tiling(Rates(2e11, 1e10, 1e11, 1e10, 1e9, 1e9, 1e8), 0.010).linear(num_rows, d_in, d_out, 2, step=step)
    for spans, length in ((grid.rows, num_rows), (grid.columns, d_out)):
        assert spans[0].start == 0
        assert spans[-1].end == length
        assert all(a.end == b.start for a, b in pairwise(spans))
    assert all(span.start % step == 0 for span in grid.columns)
    highest = max(span.end - span.start for span in grid.rows)
    widest = max(span.end - span.start for span in grid.columns)
    assert highest == 1 or widest <= step or 2 * highest * widest * d_in / 2e11 <= 0.0061
