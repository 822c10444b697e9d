"""Matrices in panels: as close to the exact product as rounding allows, and the same bits for a row in any company.

Every library that this processor can run is tried, not only the one that would be chosen.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headway.models.decoder import Linear
from headway.stages import native
from headway.stages.native import DTYPES, Library
from headway.stages.panels import IntegerPanels, Panels
from headway.stages.tiling import Span

FOUND = list(native.libraries())
pytestmark = pytest.mark.skipif(not FOUND, reason="nothing is compiled here")
each_library = pytest.mark.parametrize("library", FOUND, ids=lambda library: library.kind)
KINDS: list[tuple[type[Panels], torch.dtype]] = [
    (Panels, torch.bfloat16),
    (IntegerPanels, torch.bfloat16),
    (Panels, torch.float32),
]
each_kind = pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=["bfloat16", "int8", "float32"])


def made(
    library: Library, d_in: int, d_out: int, biased: bool, kind: type[Panels], dtype: torch.dtype
) -> tuple[Linear, Panels]:
    linear = Linear(torch.randn(d_out, d_in, dtype=dtype), torch.randn(d_out, dtype=dtype) if biased else None)
    return linear, kind(linear, library)


def rounded(x: Tensor) -> Tensor:
    """Each row as the nearest whole numbers times its scale, of which the largest is 127."""
    scale = x.double().abs().amax(1, keepdim=True) / 127
    return torch.where(scale > 0, (x.double() / scale.clamp_min(1e-300)).round(), 0.0) * scale


def _middles(x: Tensor) -> Tensor:
    """One unit where a number is about in the middle between two whole ones."""
    units = x.double() / _unit(x).clamp_min(1e-300)
    return torch.where((units - units.floor() - 0.5).abs() < 1e-4, _unit(x), 0.0)


def _unit(x: Tensor) -> Tensor:
    """Of each row: what one is worth."""
    return x.double().abs().amax(1, keepdim=True) / 127


@each_library
@each_kind
@settings(max_examples=60)
@given(
    d_in=st.one_of(st.integers(1, 200), st.sampled_from([576, 1536, 2100])),
    d_out=st.integers(1, 400),
    num_rows=st.one_of(st.integers(0, 75), st.sampled_from([255, 256, 257, 600])),
    biased=st.booleans(),
    adds=st.booleans(),
    data=st.data(),
)
def test_a_product_is_rounded_once(
    library: Library,
    kind: type[Panels],
    dtype: torch.dtype,
    d_in: int,
    d_out: int,
    num_rows: int,
    biased: bool,
    adds: bool,
    data: st.DataObject,
) -> None:
    """Against float64, for any shape and any span of panels; what stands beside them is not touched."""
    linear, panels = made(library, d_in, d_out, biased, kind, dtype)
    first = data.draw(st.integers(0, (d_out - 1) // panels.step))
    last = data.draw(st.integers(first + 1, -(-d_out // panels.step)))
    span = Span(first * panels.step, min(d_out, last * panels.step))
    part = slice(span.start, span.end)
    x = torch.randn(num_rows, d_in + 3, dtype=dtype)[:, :d_in]  # rows that do not follow on each other
    y = torch.randn(num_rows, d_out, dtype=dtype)
    before = y.clone()
    rows, weight = x.double(), linear.weight.double()
    if panels.are_integers:
        rows, weight = rounded(x), rounded(linear.weight)
    exact = rows @ weight.T[:, part]
    size = rows.abs() @ weight.abs().T[:, part]
    if linear.bias is not None:
        exact += linear.bias.double()[part]
        size += linear.bias.double().abs()[part]
    if adds:
        exact += before.double()[:, part]
        size += before.double().abs()[:, part]
        panels.onto(y, x, span)
    else:
        panels.into(y, x, span)
    # half a unit in the last place; float32 sums; and a number in the middle of two may go to either of them
    allowed = exact.abs() * torch.finfo(dtype).eps / 2 + size * 1e-6 + 1e-30
    if panels.are_integers:
        most_rows, most_weights = (each.double().abs() + _unit(each) for each in (x, linear.weight))
        allowed += _middles(x) @ most_weights.T[:, part] + most_rows @ _middles(linear.weight).T[:, part]
    assert bool(((y.double()[:, part] - exact).abs() <= allowed).all())
    beside = torch.ones(d_out, dtype=torch.bool)
    beside[part] = False
    assert torch.equal(y[:, beside], before[:, beside])
    if not adds:
        assert torch.equal(panels.columns(x, span), y[:, part])


@each_library
@each_kind
@settings(max_examples=30)
@given(
    shape=st.sampled_from([(576, 960), (1536, 576), (4864, 96), (70, 33)]),
    num_rows=st.integers(1, 300),
    num_threads=st.integers(1, 3),
    data=st.data(),
)
def test_a_row_has_the_same_bits_in_any_company(
    library: Library,
    kind: type[Panels],
    dtype: torch.dtype,
    shape: tuple[int, int],
    num_rows: int,
    num_threads: int,
    data: st.DataObject,
) -> None:
    """Alone, among others, in any span of columns, on any number of threads."""
    _, panels = made(library, *shape, biased=True, kind=kind, dtype=dtype)
    x = torch.randn(num_rows, shape[0], dtype=dtype)
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


@each_library
@each_kind
@settings(max_examples=40)
@given(
    d_in=st.one_of(st.integers(1, 200), st.sampled_from([576, 1536, 2100])),
    num_middle=st.one_of(st.integers(1, 20).map(lambda number: 32 * number), st.integers(1, 300)),
    num_rows=st.one_of(st.integers(1, 75), st.sampled_from([255, 256, 600])),
    num_threads=st.integers(1, 3),
    biased=st.booleans(),
    data=st.data(),
)
def test_what_ends_as_a_gate_has_the_bits_of_both_put_somewhere_first(
    library: Library,
    kind: type[Panels],
    dtype: torch.dtype,
    d_in: int,
    num_middle: int,
    num_rows: int,
    num_threads: int,
    biased: bool,
    data: st.DataObject,
) -> None:
    """In any span, on any number of threads; and where there are no whole panels, or a library does not, it says so."""
    linear, plain = made(library, d_in, 2 * num_middle, biased, kind, dtype)
    gated = kind(linear, library, gates=True)
    in_tiles = library.kind == "amx" and dtype is torch.bfloat16
    assert gated.gates == (not in_tiles and num_middle % plain.step == 0)
    assert gated.size == plain.size
    if not gated.gates:
        return
    x = torch.randn(num_rows, d_in + 2, dtype=dtype)[:, :d_in]
    wide, middle = plain.columns(x, Span(0, 2 * num_middle)), torch.empty(num_rows, num_middle, dtype=dtype)
    library.lib.headway_activate(DTYPES[dtype], wide.data_ptr(), middle.data_ptr(), num_rows, num_middle, 1)
    first = data.draw(st.integers(0, 2 * num_middle // gated.step - 1))
    last = data.draw(st.integers(first + 1, 2 * num_middle // gated.step))
    span = Span(first * gated.step, last * gated.step)
    part = slice(span.start // 2, span.end // 2)
    found, before = torch.full((num_rows, num_middle), 7.0, dtype=dtype), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        gated.into(found, x, span)
        assert torch.equal(gated.columns(x, span), middle[:, part])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[:, part], middle[:, part])
    beside = torch.ones(num_middle, dtype=torch.bool)
    beside[part] = False
    assert bool((found[:, beside] == 7.0).all())


@each_library
@each_kind
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_comes_through_a_gate_in_its_own_row_only(
    library: Library, kind: type[Panels], dtype: torch.dtype, value: float
) -> None:
    linear = Linear(torch.randn(128, 64, dtype=dtype))
    gated, plain = kind(linear, library, gates=True), kind(linear, library)
    if not gated.gates:
        return
    x = torch.randn(5, 64, dtype=dtype)
    clean = gated.columns(x, Span(0, 128))
    x[2, 7] = value
    spoilt, wide = gated.columns(x, Span(0, 128)), plain.columns(x, Span(0, 128))
    middle = torch.empty(5, 64, dtype=dtype)
    library.lib.headway_activate(DTYPES[dtype], wide.data_ptr(), middle.data_ptr(), 5, 64, 1)
    assert torch.equal(spoilt.nan_to_num(1e30), middle.nan_to_num(1e30))
    assert not bool(spoilt[2].isfinite().all())
    others = [0, 1, 3, 4]
    assert torch.equal(spoilt[others], clean[others])


@each_library
@each_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(
    library: Library, kind: type[Panels], dtype: torch.dtype, value: float
) -> None:
    _, panels = made(library, 64, 64, biased=False, kind=kind, dtype=dtype)
    x = torch.randn(40, 64, dtype=dtype)
    clean = panels.columns(x, Span(0, 64))
    x[17, 5] = value
    spoilt = panels.columns(x, Span(0, 64))
    assert not bool(spoilt[17].isfinite().any())
    others = torch.arange(40) != 17
    assert torch.equal(spoilt[others], clean[others])


@each_library
@each_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_stays_in_its_column(
    library: Library, kind: type[Panels], dtype: torch.dtype, value: float
) -> None:
    """Rounded to integers, too: a damaged file must not become a model that answers."""
    weight = torch.randn(64, 64, dtype=dtype)
    clean = kind(Linear(weight.clone(), None), library).columns(torch.ones(3, 64, dtype=dtype), Span(0, 64))
    weight[17, 5] = value
    spoilt = kind(Linear(weight, None), library).columns(torch.ones(3, 64, dtype=dtype), Span(0, 64))
    assert not bool(spoilt[:, 17].isfinite().any())
    others = torch.arange(64) != 17
    assert torch.equal(spoilt[:, others], clean[:, others])


@each_library
def test_a_row_of_zeros_gives_the_bias(library: Library) -> None:
    linear, panels = made(library, 70, 33, biased=True, kind=IntegerPanels, dtype=torch.bfloat16)
    assert linear.bias is not None
    found = panels.columns(torch.zeros(3, 70).bfloat16(), Span(0, 33))
    assert torch.equal(found, linear.bias.expand(3, -1))
