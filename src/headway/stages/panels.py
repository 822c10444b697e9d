"""Matrices for the matrix tiles of a CPU (AMX), packed once at load into panels of 32 columns, and multiplied by the
`linear` of csrc/kernels.cpp, which is our own: bfloat16, or integers of eight bits.

A row's products are summed over the inputs from first to last, so its bits do not depend on how many rows there are,
how columns are cut or how many threads share the work. Nothing is compiled at run time: the first call of a shape takes
no longer than the others.
"""

from typing import ClassVar

import torch
from torch import Tensor

from headway.models.decoder import Linear
from headway.stages.native import Library, library
from headway.stages.tiling import Span


class Panels:
    """A `Matrix` (stages/matrices.py) of bfloat16, cut at multiples of a panel."""

    name: ClassVar[str] = "compiled for matrix tiles"
    are_integers: ClassVar[bool] = False

    def __init__(self, linear: Linear, found: Library) -> None:
        weight = linear.weight.contiguous()
        self.size = d_in, d_out = linear.size
        self.step: int = found.lib.headway_panel()
        self._lib = found.lib
        self._bias = None if linear.bias is None else linear.bias.contiguous()
        self._panels = torch.empty(found.lib.headway_panels_bytes(d_out, d_in, self.are_integers), dtype=torch.uint8)
        self._scales = torch.empty(d_out) if self.are_integers else None
        found.lib.headway_pack(weight.data_ptr(), d_out, d_in, self._panels.data_ptr(), _address(self._scales))

    @property
    def num_bytes(self) -> int:
        return self._panels.nbytes

    def columns(self, x: Tensor, span: Span) -> Tensor:
        y = x.new_empty(len(x), span.end - span.start)
        self._multiply(y, x, span, adds=False)
        return y

    def into(self, y: Tensor, x: Tensor, span: Span) -> None:
        self._multiply(y[:, span.start : span.end], x, span, adds=False)

    def onto(self, y: Tensor, x: Tensor, span: Span) -> None:
        self._multiply(y[:, span.start : span.end], x, span, adds=True)

    def _multiply(self, y: Tensor, x: Tensor, span: Span, adds: bool) -> None:
        assert span.start % self.step == 0
        assert x.stride(-1) == y.stride(-1) == 1
        self._lib.headway_linear(
            x.data_ptr(), x.stride(0), len(x), self._panels.data_ptr(), _address(self._scales), x.shape[1],
            span.start, span.end - span.start, _address(self._bias), y.data_ptr(), y.stride(0), adds,
            torch.get_num_threads(),
        )  # fmt: skip


class IntegerPanels(Panels):
    """Weights as integers of eight bits with a scale for each output, made at load from bfloat16; rows likewise, with a
    scale for each, in every call (W8A8, dynamic per token). Half of the bytes, and twice the products a second."""

    name: ClassVar[str] = "compiled for matrix tiles, int8"
    are_integers: ClassVar[bool] = True


def panels_for(dtype: torch.dtype, device: torch.device) -> Library | None:
    """What multiplies such matrices, if this processor has matrix tiles and the library was built for them."""
    if dtype is not torch.bfloat16 or device.type != "cpu":
        return None
    found = library()
    return found if found is not None and found.lib.headway_panel() else None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
