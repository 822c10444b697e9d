"""Matrices in panels: as close to the exact product as rounding allows, and the same bits for a row in any company."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.models.decoder import Linear
from headway.stages.panels import Panels, panels_for
from headway.stages.tiling import Span

FOUND = panels_for(torch.bfloat16, torch.device("cpu"))
pytestmark = pytest.mark.skipif(FOUND is None, reason="this processor has no matrix tiles, or nothing is compiled here")


def made(d_in: int, d_out: int, biased: bool) -> tuple[Linear, Panels]:
    assert FOUND is not None
    weight = torch.randn(d_out, d_in).bfloat16()
    linear = Linear(weight, torch.randn(d_out).bfloat16() if biased else None)
    return linear, Panels(linear, FOUND)


@settings(max_examples=60)
@given(
    d_in=st.one_of(st.integers(1, 200), st.sampled_from([576, 1536, 2100])),
    d_out=st.integers(1, 400),
    num_rows=st.one_of(st.integers(1, 50), st.sampled_from([255, 256, 257, 600])),
    biased=st.booleans(),
    adds=st.booleans(),
    data=st.data(),
)
def test_a_product_is_rounded_once(
    d_in: int, d_out: int, num_rows: int, biased: bool, adds: bool, data: st.DataObject
) -> None:
    """Against float64, for any shape and any span of panels; what stands beside them is not touched."""
    linear, panels = made(d_in, d_out, biased)
    first = data.draw(st.integers(0, (d_out - 1) // panels.step))
    last = data.draw(st.integers(first + 1, -(-d_out // panels.step)))
    span = Span(first * panels.step, min(d_out, last * panels.step))
    part = slice(span.start, span.end)
    x = torch.randn(num_rows, d_in + 3).bfloat16()[:, :d_in]  # rows that do not follow on each other
    y = torch.randn(num_rows, d_out).bfloat16()
    before = y.clone()
    exact = x.double() @ linear.weight.double().T[:, part]
    size = x.double().abs() @ linear.weight.double().abs().T[:, part]
    if linear.bias is not None:
        exact += linear.bias.double()[part]
    if adds:
        exact += before.double()[:, part]
        panels.onto(y, x, span)
    else:
        panels.into(y, x, span)
    allowed = exact.abs() * 2.0**-8 + size * 1e-6 + 1e-30  # half a unit in bfloat16's last place; float32 sums
    assert bool(((y.double()[:, part] - exact).abs() <= allowed).all())
    beside = torch.ones(d_out, dtype=torch.bool)
    beside[part] = False
    assert torch.equal(y[:, beside], before[:, beside])
    if not adds:
        assert torch.equal(panels.columns(x, span), y[:, part])


@settings(max_examples=30)
@given(
    shape=st.sampled_from([(576, 960), (1536, 576), (4864, 96), (70, 33)]),
    num_rows=st.integers(1, 300),
    num_threads=st.integers(1, 3),
    data=st.data(),
)
def test_a_row_has_the_same_bits_in_any_company(
    shape: tuple[int, int], num_rows: int, num_threads: int, data: st.DataObject
) -> None:
    """Alone, among others, in any span of columns, on any number of threads."""
    _, panels = made(*shape, biased=True)
    x = torch.randn(num_rows, shape[0]).bfloat16()
    whole = panels.columns(x, Span(0, shape[1]))
    row = data.draw(st.integers(0, num_rows - 1))
    end = data.draw(st.integers(row + 1, num_rows))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(panels.columns(x[row:end], Span(0, shape[1])), whole[row:end])
        last = data.draw(st.integers(1, -(-shape[1] // panels.step)))
        span = Span((last - 1) * panels.step, min(shape[1], last * panels.step))
        assert torch.equal(panels.columns(x[row:end], span), whole[row:end, span.start : span.end])
    finally:
        torch.set_num_threads(before)


def test_what_is_no_number_stays_in_its_row() -> None:
    _, panels = made(64, 64, biased=False)
    x = torch.randn(40, 64).bfloat16()
    clean = panels.columns(x, Span(0, 64))
    x[17, 5] = float("nan")
    spoilt = panels.columns(x, Span(0, 64))
    assert bool(spoilt[17].isnan().all())
    others = torch.arange(40) != 17
    assert torch.equal(spoilt[others], clean[others])
