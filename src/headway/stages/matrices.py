"""A decoder's matrices as the device multiplies with them best: as they are, or packed once at load.

On a CPU they go into the panels of the project's own kernels (`panels.py`), unless the processor multiplies bfloat16
itself and what was compiled does not (Arm's `bf16`): there oneDNN does it. It puts the weights of every call into the
order that its kernels want, unless it has been done beforehand: for few rows that takes longer than to multiply. Its
matrices are kept in parts of some columns, so that an operator can still be cut into tiles. Packed matrices stand in
place of the others, not beside them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.models.decoder import Decoder, Linear
from headway.stages.panels import IntegerPanels, Panels, panels_for
from headway.stages.tiling import Span

PART_CELLS = 1 << 20  # weights of a part, about: 512 rows of it take a few milliseconds
LEAST_COLUMNS = 64  # parts are multiples of so many columns
PACKED_FOR_ROWS = 64  # oneDNN chooses an order by how many rows to expect; this one suits one row as well


class Matrix(Protocol):
    """y = x @ weight.T + bias, of which any columns can be had that begin and end at multiples of `step`. Where it
    `gates`, what is had is what passes: half as many columns, of a y that has half as many."""

    name: ClassVar[str]  # by whom it is multiplied

    @property
    def size(self) -> tuple[int, int]:
        """(in, out)"""

    @property
    def step(self) -> int: ...

    @property
    def gates(self) -> bool:
        """Whether it ends as the gate of an MLP: silu of the first half of the columns times the second. Not added to
        anything."""

    @property
    def num_bytes(self) -> int:
        """Of the weights."""

    def columns(self, x: Tensor, span: Span) -> Tensor:
        """(n, in) -> (n, columns of the span)"""

    def into(self, y: Tensor, x: Tensor, span: Span) -> None:
        """Put those columns where they belong in y (n, out)."""

    def onto(self, y: Tensor, x: Tensor, span: Span) -> None:
        """Add them to what is there."""


@dataclass(frozen=True, slots=True)
class Plain:
    """As the model has it."""

    name: ClassVar[str] = "torch's"
    gates: ClassVar[bool] = False

    linear: Linear
    step: int = 1

    @property
    def size(self) -> tuple[int, int]:
        return self.linear.size

    @property
    def num_bytes(self) -> int:
        return self.linear.weight.nbytes

    def columns(self, x: Tensor, span: Span) -> Tensor:
        return F.linear(x, *self._part(span))

    def into(self, y: Tensor, x: Tensor, span: Span) -> None:
        weight, bias = self._part(span)
        to = y[:, span.start : span.end]
        if x.device.type == "cpu":
            to.copy_(F.linear(x, weight, bias))
        elif bias is None:
            torch.mm(x, weight.t(), out=to)
        else:
            torch.addmm(bias, x, weight.t(), out=to)

    def onto(self, y: Tensor, x: Tensor, span: Span) -> None:
        weight, bias = self._part(span)
        to = y[:, span.start : span.end]
        if x.device.type == "cpu":
            to += F.linear(x, weight, bias)
            return
        to.addmm_(x, weight.t())
        if bias is not None:
            to += bias

    def _part(self, span: Span) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.linear
        if span.end - span.start == len(weight):
            return weight, bias
        return weight[span.start : span.end], None if bias is None else bias[span.start : span.end]


class Packed:
    """In oneDNN's order, in parts of `step` columns."""

    name: ClassVar[str] = "oneDNN's, packed"
    gates: ClassVar[bool] = False

    def __init__(self, linear: Linear) -> None:
        self.size = linear.size
        self.num_bytes = linear.weight.nbytes
        d_in, d_out = linear.size
        self.step = min(d_out, max(LEAST_COLUMNS, PART_CELLS // d_in // LEAST_COLUMNS * LEAST_COLUMNS))
        edges = range(0, d_out, self.step)
        self._parts = [_reorder(linear.weight[start : start + self.step].contiguous()) for start in edges]
        self._biases = [None if linear.bias is None else linear.bias[start : start + self.step] for start in edges]

    def columns(self, x: Tensor, span: Span) -> Tensor:
        first, last = span.start // self.step, -(-span.end // self.step)
        if last == first + 1:
            return _multiply(x, self._parts[first], self._biases[first])
        y = x.new_empty(len(x), span.end - span.start)
        for number in range(first, last):
            start = (number - first) * self.step
            y[:, start : start + self.step] = _multiply(x, self._parts[number], self._biases[number])
        return y

    def into(self, y: Tensor, x: Tensor, span: Span) -> None:
        y[:, span.start : span.end] = self.columns(x, span)

    def onto(self, y: Tensor, x: Tensor, span: Span) -> None:
        y[:, span.start : span.end] += self.columns(x, span)


class LayerMatrices(NamedTuple):
    qkv: Matrix
    o: Matrix
    gate_up: Matrix
    down: Matrix


class Matrices(NamedTuple):
    """All of a model's."""

    layers: tuple[LayerMatrices, ...]
    head: Matrix


def matrices_of(model: Decoder) -> Matrices:
    """As they are. Nothing is copied."""
    return _each(model, Plain)


def packed(model: Decoder, *, integers: bool = False) -> tuple[Decoder, Matrices]:
    """The matrices in the order that is best for this device, and the model without what is not needed beside them: its
    linear operators keep their shape and no weights. Where nothing is to be gained, both are as before. `integers`:
    rounded to eight bits, which needs compiled operators (`panels_for`)."""
    packing = _packing(model, integers)
    if packing is None:
        return model, matrices_of(model)
    pack, pack_gate = packing
    is_tied = model.head.weight.data_ptr() == model.embedding_VE.data_ptr()
    layers = tuple(
        LayerMatrices(
            qkv=_take(layer.qkv, pack),
            o=_take(layer.o, pack),
            gate_up=_take(layer.gate_up, pack_gate),
            down=_take(layer.down, pack),
        )
        for layer in model.layers
    )
    head = pack(model.head) if is_tied else _take(model.head, pack)
    return _hollow(model), Matrices(layers, head)


def packs(dtype: torch.dtype, device: torch.device, *, integers: bool = False) -> bool:
    """Whether matrices of this kind are packed on this device."""
    return panels_for(dtype, device, integers=integers) is not None or is_packable(dtype, device)


def _packing(model: Decoder, integers: bool) -> tuple[Callable[[Linear], Matrix], Callable[[Linear], Matrix]] | None:
    """How this model's matrices are packed here, and the first one of an MLP, if they are."""
    found = panels_for(model.dtype, model.device, integers=integers)
    if found is not None:
        kind = IntegerPanels if integers else Panels
        return partial(kind, found=found), partial(kind, found=found, gates=True)
    assert not integers
    return (Packed, Packed) if is_packable(model.dtype, model.device) else None


def is_packable(dtype: torch.dtype, device: torch.device) -> bool:
    """By oneDNN. float32 gains nothing: its kernels read weights as they are."""
    return (
        device.type == "cpu"
        and dtype is torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _each(model: Decoder, make: Callable[[Linear], Matrix]) -> Matrices:
    layers = tuple(
        LayerMatrices(make(layer.qkv), make(layer.o), make(layer.gate_up), make(layer.down)) for layer in model.layers
    )
    return Matrices(layers, make(model.head))


def _take(linear: Linear, pack: Callable[[Linear], Matrix]) -> Matrix:
    """Packed; the memory of the weights is given back at once, or loading would need twice as much."""
    made = pack(linear)
    storage = linear.weight.untyped_storage()
    if storage.resizable() and storage.nbytes() == linear.weight.nbytes:  # else it is a file's, or others are in it
        storage.resize_(0)
    return made


def _hollow(model: Decoder) -> Decoder:
    """Shapes without weights where matrices have them."""

    def shell(linear: Linear) -> Linear:
        return Linear(torch.empty(linear.weight.shape, dtype=linear.weight.dtype, device="meta"), linear.bias)

    layers = [
        layer._replace(qkv=shell(layer.qkv), o=shell(layer.o), gate_up=shell(layer.gate_up), down=shell(layer.down))
        for layer in model.layers
    ]
    return model._replace(layers=tuple(layers), head=shell(model.head))


def _reorder(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
    return packed


def _multiply(x: Tensor, part: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, part, bias, "none", [], "")
    return y
