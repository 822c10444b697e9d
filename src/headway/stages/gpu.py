"""The operators of a decoder's step on CUDA, by the Triton kernels of `gpu_kernels.py`: keys and values are read from
their pages, nothing is gathered, padded or masked. Knows how work is laid out for the kernels; `operators.py` has the
same in torch, which is the oracle.

A prompt's queries are taken in blocks, a single token's keys in splits of a fixed length. Shape legend: see
gpu_kernels.py.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from headway.kv.pool import KVPool
from headway.models.config import DecoderConfig
from headway.models.decoder import Layer
from headway.stages import gpu_kernels as kernels
from headway.stages.batch import Batch
from headway.stages.operators import Operators
from headway.stages.recorded import Items
from headway.stages.tiling import Glance, Span

ACTIVATED = 1024  # elements of a program
BLOCK_NUMBERS, TOKEN_NUMBERS = 6, 4  # of an item, see gpu_kernels.py
TOKEN_KEYS = 64  # a block of keys under single tokens
LEAST_SPLIT, MOST_SPLITS = 512, 64  # keys of a split, and how many of them the longest context has at most


class _Block(NamedTuple):
    """How a prompt's attention is cut: queries and keys of a program, and what the compiler is told."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


class Looks(NamedTuple):
    """A tile's glances as the kernels take them: `numbers` has blocks of prompts, then single tokens."""

    numbers: Tensor
    blocks: Tensor  # (blocks, BLOCK_NUMBERS)
    tokens: Tensor  # (tokens, TOKEN_NUMBERS)


class TritonOperators(Operators):
    """Of one model's shape over one pool on a CUDA device."""

    gathers = False

    def __init__(self, config: DecoderConfig, pool: KVPool, num_positions: int) -> None:
        super().__init__(config, pool)
        self.name = "Triton's"
        shape = pool.shape
        self._head_stride = shape.page_tokens * shape.head_size
        self._value_offset = shape.num_kv_heads * self._head_stride
        self._page_stride = shape.num_layers * 2 * self._value_offset
        self._groups = config.num_heads // config.num_kv_heads
        self._split_keys = max(
            LEAST_SPLIT, triton.cdiv(triton.cdiv(num_positions, MOST_SPLITS), TOKEN_KEYS) * TOKEN_KEYS
        )
        self._num_splits = triton.cdiv(num_positions, self._split_keys)
        is_exact = shape.dtype is torch.float32
        self._precision = "ieee" if is_exact else "tf32"
        if is_exact:
            self._block = _Block(32, 32, 4, 1)
        elif config.head_size > 128:
            self._block = _Block(64, 32, 8, 2)
        else:
            self._block = _Block(128, 64 if config.head_size <= 64 else 128, 8, 3)
        self.block_rows = self._block.rows

    def activate(self, wide: Tensor) -> Tensor:
        y = wide.new_empty(len(wide), wide.shape[1] // 2)
        grid = (len(y), triton.cdiv(y.shape[1], ACTIVATED))
        kernels.activate[grid](wide, y, wide.stride(0), y.shape[1], ACTIVATED)
        return y

    def place(self, batch: Batch, number: int, layer: Layer, rope: Tensor, qkv_N: Tensor, rows: slice) -> None:
        config, part = self.config, qkv_N[rows]
        self.norm_heads(layer, part)
        kernels.place[(len(part),)](
            part, batch.positions_N[rows], batch.pages_N[rows], batch.slots_N[rows], rope, self.pool.layer(number),
            self.scale, part.stride(0), self._page_stride, self._head_stride, self._value_offset,
            config.num_heads, config.num_kv_heads, config.head_size // 2,
            triton.next_power_of_2(config.num_heads), triton.next_power_of_2(config.num_kv_heads),
        )  # fmt: skip

    def prepare(self, batch: Batch, glances: list[Glance]) -> object:
        items = self._items(batch, glances)
        looks = self.standing(len(items.blocks), len(items.tokens), batch.table.device)
        self.fill(looks, items)
        return looks

    def items(self, batch: Batch) -> Items:
        whole = Span(0, self.config.num_kv_heads)
        pairs = zip(batch.segments, batch.rows, strict=True)
        return self._items(
            batch, [Glance(n, rows, segment.first_position, whole) for n, (segment, rows) in enumerate(pairs)]
        )

    def _items(self, batch: Batch, glances: Sequence[Glance]) -> Items:
        starts = [0, *accumulate(batch.table_lengths)]
        blocks, tokens = [], []
        for glance in glances:
            num_rows, num_kv_heads = glance.rows.end - glance.rows.start, glance.heads.end - glance.heads.start
            if len(batch.segments[glance.segment].tokens) == 1:
                tokens.append((glance.rows.start, starts[glance.segment], glance.heads.start, num_kv_heads))
                continue
            for offset in range(0, num_rows, self.block_rows):
                blocks.append(
                    (
                        *(glance.rows.start + offset, min(self.block_rows, num_rows - offset)),
                        *(glance.first_query + offset, starts[glance.segment]),
                        *(glance.heads.start * self._groups, num_kv_heads * self._groups),
                    )
                )
        blocks.sort(key=lambda block: -block[2])  # the latest rows see the most keys: they go first
        return Items(blocks, tokens)

    def standing(self, num_blocks: int, num_tokens: int, device: torch.device) -> Looks:
        numbers = torch.zeros(BLOCK_NUMBERS * num_blocks + TOKEN_NUMBERS * num_tokens, dtype=torch.int64, device=device)
        blocks, tokens = numbers.split((BLOCK_NUMBERS * num_blocks, TOKEN_NUMBERS * num_tokens))
        return Looks(numbers, blocks.view(num_blocks, BLOCK_NUMBERS), tokens.view(num_tokens, TOKEN_NUMBERS))

    def fill(self, standing: object, items: Items) -> None:
        assert isinstance(standing, Looks)
        numbers = np.zeros(len(standing.numbers), np.int64)  # a place that is not taken has no heads
        border = standing.blocks.numel()
        for start, each in ((0, items.blocks), (border, items.tokens)):
            taken = np.array(each, np.int64).reshape(-1)
            numbers[start : start + len(taken)] = taken
        standing.numbers.copy_(torch.from_numpy(numbers))

    def looking(self, batch: Batch, number: int, q_NHD: Tensor, y_NHD: Tensor) -> Callable[[object], None]:
        cache, window = self.pool.layer(number), self.config.windows[number]

        def look(prepared: object) -> None:
            assert isinstance(prepared, Looks)
            if len(prepared.blocks):
                self._look_of_blocks(batch, prepared.blocks, cache, q_NHD, y_NHD, window)
            if len(prepared.tokens):
                self._look_of_tokens(batch, prepared.tokens, cache, q_NHD, y_NHD, window)

        return look

    def _look_of_blocks(
        self, batch: Batch, blocks: Tensor, cache: Tensor, q: Tensor, y: Tensor, window: int | None
    ) -> None:
        block, shape = self._block, self.pool.shape
        kernels.attend[(len(blocks), self.config.num_heads)](
            q, y, cache, batch.table, blocks, q.stride(0), y.stride(0), self._page_stride, self._head_stride,
            self._value_offset, window or 0, self._groups, shape.head_size, shape.page_tokens, block.rows, block.keys,
            window is not None, self._precision, num_warps=block.num_warps, num_stages=block.num_stages,
        )  # fmt: skip

    def _look_of_tokens(
        self, batch: Batch, tokens: Tensor, cache: Tensor, q: Tensor, y: Tensor, window: int | None
    ) -> None:
        config, shape = self.config, self.pool.shape
        partial = q.new_empty((len(tokens), config.num_heads, self._num_splits, shape.head_size), dtype=torch.float32)
        peaks = q.new_empty((len(tokens), config.num_heads, self._num_splits, 2), dtype=torch.float32)
        kernels.attend_token[(len(tokens), config.num_kv_heads, self._num_splits)](
            q, cache, batch.table, tokens, batch.positions_N, partial, peaks, q.stride(0), self._page_stride,
            self._head_stride, self._value_offset, window or 0, self._num_splits, self._split_keys, config.num_heads,
            self._groups, max(16, triton.next_power_of_2(self._groups)), shape.head_size, shape.page_tokens, TOKEN_KEYS,
            window is not None, self._precision, num_stages=1 if self._precision == "ieee" else 3,
        )  # fmt: skip
        kernels.combine[(len(tokens), config.num_heads)](
            y, tokens, batch.positions_N, partial, peaks, y.stride(0), window or 0, self._num_splits, self._split_keys,
            config.num_heads, self._groups, shape.head_size, window is not None, num_warps=1,
        )  # fmt: skip


def suits(config: DecoderConfig) -> bool:
    """Whether the kernels can work on a model of this shape."""
    return config.head_size in (16, 32, 64, 128, 256)
