"""The tensors behind the pages: one block of memory for all layers' keys and values.

Block-major: everything of one page, all layers, keys and values, is contiguous, so that a page is one descriptor in a
later hand-off. On a CPU the memory is an anonymous shared file (memfd): another process on the host can map it by its
descriptor, and it vanishes with its last user, even after a kill.

Shape legend: P pages, L layers, S slots of a page, K key-value heads, D head size, N rows, T positions.
"""

import ctypes
import mmap
import os
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14: fault pages in without changing their content


@dataclass(frozen=True, slots=True)
class PoolShape:
    num_pages: int
    num_layers: int
    page_tokens: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.page_tokens * self.head_size * self.dtype.itemsize

    @property
    def pool_bytes(self) -> int:
        return self.num_pages * self.page_bytes


class KVPool:
    """Keys and values of every page: `blocks_PL2KSD`."""

    def __init__(self, shape: PoolShape, device: torch.device | str = "cpu") -> None:
        self.shape = shape
        self.file = -1
        self._memory: mmap.mmap | None = None
        self._address = 0
        self.num_faulted_bytes = 0  # in memory already, from the start of the pool
        sizes = (shape.num_pages, shape.num_layers, 2, shape.num_kv_heads, shape.page_tokens, shape.head_size)
        if torch.device(device).type == "cpu":
            self.file = os.memfd_create("headway-kv", os.MFD_CLOEXEC)
            os.ftruncate(self.file, shape.pool_bytes)
            self._memory = mmap.mmap(self.file, shape.pool_bytes, mmap.MAP_SHARED)
            self.blocks_PL2KSD = torch.frombuffer(self._memory, dtype=shape.dtype).view(sizes)
            self._address = self.blocks_PL2KSD.data_ptr()
            self._close_file = weakref.finalize(self, os.close, self.file)  # also if nobody calls close
        else:
            self.blocks_PL2KSD = torch.zeros(sizes, dtype=shape.dtype, device=device)
        self._by_layer = [self.blocks_PL2KSD[:, layer] for layer in range(shape.num_layers)]

    def write(self, layer: int, pages_N: Tensor, slots_N: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> None:
        """Put one row's key and value at (page, slot), for every row."""
        blocks_P2KSD = self._by_layer[layer]
        blocks_P2KSD[pages_N, 0, :, slots_N] = k_NKD
        blocks_P2KSD[pages_N, 1, :, slots_N] = v_NKD

    def read(self, layer: int, pages: Tensor, heads: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Keys and values that stand in these pages, in order, for the given heads: each (K, T, D), copied."""
        blocks_2KPSD = self._by_layer[layer].permute(1, 2, 0, 3, 4)[:, heads]
        k_KPSD, v_KPSD = torch.index_select(blocks_2KPSD, 2, pages)
        return k_KPSD.flatten(1, 2), v_KPSD.flatten(1, 2)

    def layer(self, number: int) -> Tensor:
        """One layer of every page, a view: (P, 2, K, S, D)."""
        return self._by_layer[number]

    def page(self, number: int) -> Tensor:
        """All of one page, a contiguous view: (L, 2, K, S, D)."""
        return self.blocks_PL2KSD[number]

    def fault_in(self, num_bytes: int) -> bool:
        """Touch the next `num_bytes` of memory so that first use is not slow. False when all of it is touched."""
        if self._memory is None or self.num_faulted_bytes >= self.shape.pool_bytes:
            return False
        start = self.num_faulted_bytes
        length = min(num_bytes - num_bytes % mmap.PAGESIZE or mmap.PAGESIZE, self.shape.pool_bytes - start)
        # through the C library, because that call lets go of the interpreter lock
        failed = _libc.madvise(ctypes.c_void_p(self._address + start), ctypes.c_size_t(length), POPULATE_WRITE)
        if failed:  # an older kernel: pages come on first use, slower but right
            self.num_faulted_bytes = self.shape.pool_bytes
            return False
        self.num_faulted_bytes += length
        return self.num_faulted_bytes < self.shape.pool_bytes

    def close(self) -> None:
        """Give file and memory back; the mapping goes with its last tensor, if somebody still has one."""
        self.blocks_PL2KSD, self._by_layer, self._memory = self.blocks_PL2KSD.new_empty(0), [], None
        if self.file >= 0:
            self._close_file()
            self.file = -1
