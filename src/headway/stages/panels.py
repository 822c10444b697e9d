"""Matrices packed once at load into panels of some columns, and multiplied by the `linear` of csrc/, which is our own.
bfloat16 goes through the matrix tiles of a CPU (AMX) or, where it has none, through vectors: in pairs, where it
multiplies these itself, else widened. float32 goes through vectors; integers of eight bits through either.

A row's products are summed over the inputs in an order that does not depend on how many rows there are, how columns are
cut or how many threads share the work. Nothing is compiled at run time: the first call of a shape takes no longer than
the others.

The first matrix of an MLP can end as a gate: panels of gate and up stand beside each other, and what becomes of both is
made of their sums while these are at hand, with the bits that it has where both are put somewhere first.
"""

import mmap
from contextlib import suppress
from typing import ClassVar

import torch
from torch import Tensor

from headway.models.decoder import Linear
from headway.stages.native import DTYPES, Library, abilities, library
from headway.stages.tiling import Span

DOTS = {"amx", "avx512bf16", "neonbf16"}  # libraries that multiply bfloat16 as the processor does
NATIVE_BFLOAT16 = {"avx512_bf16", "bf16"}  # such processors do: under other libraries, oneDNN is twice as fast there
PUT, ADD, GATE = range(3)  # `Ending` of csrc/linear.hpp
HUGE_PAGE_BYTES = 1 << 21  # of most processors; where they are larger, fewer matrices fill one


class Panels:
    """A `Matrix` (stages/matrices.py) in its own dtype, cut at multiples of a panel, or of two that end as a gate."""

    name: ClassVar[str] = "compiled"
    are_integers: ClassVar[bool] = False

    def __init__(self, linear: Linear, found: Library, *, gates: bool = False) -> None:
        """`gates`: it is to end as a gate, if the library can."""
        weight = linear.weight.contiguous()
        self.size = d_in, d_out = linear.size
        self._lib, self._dtype = found.lib, DTYPES[weight.dtype]
        self.gates = gates and bool(found.lib.headway_gates(self._dtype, d_out))
        panel: int = found.lib.headway_panel()
        self.step = 2 * panel if self.gates else panel
        bias = linear.bias
        if self.gates and bias is not None:
            bias = bias.reshape(2, -1, panel).transpose(0, 1).flatten()
        self._bias = None if bias is None else bias.contiguous()
        num_bytes = found.lib.headway_panels_bytes(self._dtype, d_out, d_in, self.are_integers)
        self._panels = _in_huge_pages(num_bytes)
        self._scales = torch.empty(d_out) if self.are_integers else None
        found.lib.headway_pack(
            self._dtype, weight.data_ptr(), d_out, d_in, self.gates, self._panels.data_ptr(), _address(self._scales)
        )

    @property
    def num_bytes(self) -> int:
        return self._panels.nbytes

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of panels, scales and bias; 0 of what it has none."""
        return self._panels.data_ptr(), _address(self._scales), _address(self._bias)

    def columns(self, x: Tensor, span: Span) -> Tensor:
        part = self._part(span)
        y = x.new_empty(len(x), part.stop - part.start)
        self._multiply(y, x, span, self._ending)
        return y

    def into(self, y: Tensor, x: Tensor, span: Span) -> None:
        self._multiply(y[:, self._part(span)], x, span, self._ending)

    def onto(self, y: Tensor, x: Tensor, span: Span) -> None:
        assert not self.gates
        self._multiply(y[:, span.start : span.end], x, span, ADD)

    @property
    def _ending(self) -> int:
        return GATE if self.gates else PUT

    def _part(self, span: Span) -> slice:
        """Of what it gives: two columns that end as a gate are one."""
        return slice(span.start // 2, span.end // 2) if self.gates else slice(span.start, span.end)

    def _multiply(self, y: Tensor, x: Tensor, span: Span, ending: int) -> None:
        assert span.start % self.step == 0
        assert span.end % self.step == 0 or span.end == self.size[1]
        assert x.stride(-1) == y.stride(-1) == 1
        self._lib.headway_linear(
            self._dtype, x.data_ptr(), x.stride(0), len(x), self._panels.data_ptr(), _address(self._scales),
            x.shape[1], span.start, span.end - span.start, _address(self._bias), y.data_ptr(), y.stride(0), ending,
            torch.get_num_threads(),
        )  # fmt: skip


class IntegerPanels(Panels):
    """Weights as integers of eight bits with a scale for each output, made at load from bfloat16; rows likewise, with a
    scale for each, in every call (W8A8, dynamic per token). Half of the bytes, and twice the products a second."""

    name: ClassVar[str] = "compiled, int8"
    are_integers: ClassVar[bool] = True


def panels_for(dtype: torch.dtype, device: torch.device, *, integers: bool = False) -> Library | None:
    """What multiplies such matrices, or the integers made of them, if it is compiled here and nobody does it better."""
    if device.type != "cpu" or dtype not in DTYPES:
        return None
    found = library()
    if found is None or found.kind in DOTS or dtype is torch.float32 or integers:
        return found
    return found if abilities().isdisjoint(NATIVE_BFLOAT16) else None


def _in_huge_pages(num_bytes: int) -> Tensor:
    """Memory that is read from end to end for every token, in as few pages as the system gives: a processor looks each
    page up, and fetches ahead within one only."""
    if num_bytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux's
        return torch.empty(num_bytes, dtype=torch.uint8)
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them: then in small ones
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)  # which keeps the mapping


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
