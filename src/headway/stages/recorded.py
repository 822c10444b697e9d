"""Steps of few rows, recorded as CUDA graphs and replayed: to launch a decoder's operators one by one takes the host
longer than the device needs to run them.

A recording is made for some number of rows, with places for some prompts and some single tokens; a step of fewer fills
up with rows that have no page. It comes in parts, none of which takes much longer than a tile, and between parts the
step may be suspended like any other. Parts are sized by their matrices: where attention alone would take a tile's time
in one, the step is launched operator by operator instead, and cut as any other.

A recording's numbers and hidden states stand in tensors that never move. They belong to one step at a time: when
another one comes in between, what the first had there is put aside, and brought back when it goes on.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from headway.stages.batch import Batch
from headway.stages.tiling import Span

NOWHERE = -1  # the page and position of a row that fills up
MOST_ROWS = 1024
TOKENS_APART = 128  # of a mixed recording: so many members may have a token each
BLOCKS_BEYOND = 16  # and so many blocks of prompts beyond those that full ones would make


class Held(Protocol):
    """A step as far as recordings know it."""

    batch: Batch
    x_NE: Tensor


class Items(NamedTuple):
    """What attention looks at in one step: blocks of prompts, and single tokens, as the operators number them."""

    blocks: Sequence[Sequence[int]]
    tokens: Sequence[Sequence[int]]


@runtime_checkable
class Recordable(Protocol):
    """Operators that can be recorded."""

    block_rows: int  # queries of a block

    def items(self, batch: Batch) -> Items:
        """Those of a whole step."""

    def standing(self, num_blocks: int, num_tokens: int, device: torch.device) -> object:
        """A tile of attention with places for so many, none of them taken."""

    def fill(self, standing: object, items: Items) -> None:
        """From now on these places are taken."""


class Part(NamedTuple):
    """What is replayed between two yields. `layers`: how many of them are done after it."""

    operator: str
    layers: int
    replay: Callable[[], None]


def most_layers(parts: Sequence[Part]) -> int:
    """Of one part."""
    ends = [0, *(part.layers for part in parts)]
    return max(end - start for start, end in pairwise(ends))


class Size(NamedTuple):
    """Of a recording. With no place for a block it is for steps of single tokens, and has their logits as well."""

    num_rows: int
    num_blocks: int
    num_tokens: int

    def fits(self, num_rows: int, items: Items) -> bool:
        return (
            num_rows <= self.num_rows and len(items.blocks) <= self.num_blocks and len(items.tokens) <= self.num_tokens
        )


def sizes(most_tokens: int, most_rows: int, block_rows: int) -> list[Size]:
    """The smallest first: steps of up to `most_tokens` single tokens, and of up to `most_rows` rows of any kind."""
    powers = [1 << power for power in range(max(most_tokens, most_rows).bit_length() + 1)]
    tokens = sorted({min(most_tokens, power) for power in powers})
    between = [power * 3 // 2 for power in powers if power >= 128]
    rows = [rows for rows in sorted({*powers, *between}) if 16 <= rows <= min(most_rows, MOST_ROWS)]
    return [Size(n, 0, n) for n in tokens] + [
        Size(n, -(-n // block_rows) + BLOCKS_BEYOND, min(n, TOKENS_APART)) for n in rows
    ]


class Stand(NamedTuple):
    """The tensors that a recording works on."""

    batch: Batch
    looks: object
    x_NE: Tensor
    logits_NV: Tensor | None


class Recording:
    """One size. `make_parts` gets the tensors that stand; what it returns is run once, and then recorded."""

    def __init__(
        self,
        size: Size,
        stand: Stand,
        operators: Recordable,
        make_parts: Callable[[Stand], Sequence[Part]],
        memory: Any,
    ) -> None:
        self.size = size
        self.logits_NV = stand.logits_NV
        self._stand = stand
        self._operators = operators
        self._holder: Held | None = None
        self.parts = tuple(part._replace(replay=_record(part.replay, memory)) for part in make_parts(stand))
        self.most_layers = most_layers(self.parts)

    def hold(self, step: Held, begun: bool) -> None:
        """From here on the tensors are this step's, with its hidden states if it has begun."""
        if self._holder is step:
            return
        if self._holder is not None:
            self.put_aside(self._holder)
        batch, here, n = step.batch, self._stand.batch, step.batch.num_rows
        for mine, theirs in (
            (here.tokens_N, batch.tokens_N),
            (here.positions_N, batch.positions_N),
            (here.pages_N, batch.pages_N),
            (here.slots_N, batch.slots_N),
            (here.table, batch.table),
        ):
            mine[: len(theirs)].copy_(theirs)
        if n < self.size.num_rows:
            here.positions_N[n:] = NOWHERE
            here.pages_N[n:] = NOWHERE
        self._operators.fill(self._stand.looks, self._operators.items(batch))
        if begun:
            self._stand.x_NE[:n].copy_(step.x_NE)
        self._holder = step

    def put_aside(self, step: Held) -> None:
        """The step's hidden states into its own tensor."""
        if self._holder is step:
            step.x_NE.copy_(self._stand.x_NE[: step.batch.num_rows])
            self._holder = None

    def let_go(self, step: Held) -> None:
        """It has ended."""
        if self._holder is step:
            self._holder = None


def standing_batch(num_rows: int, num_pages: int, device: torch.device) -> Batch:
    """Tensors that never move, for so many rows and pages; all of them fill up as yet."""

    def zeros(length: int) -> Tensor:
        return torch.zeros(length, dtype=torch.int64, device=device)

    return Batch(
        segments=[],
        rows=[Span(0, num_rows)],
        tokens_N=zeros(num_rows),
        positions_N=zeros(num_rows) + NOWHERE,
        pages_N=zeros(num_rows) + NOWHERE,
        slots_N=zeros(num_rows),
        table=zeros(num_pages),
        asked_rows=zeros(0),
        table_lengths=[],
        asked_by=[],
        asked_for=[],
    )


def _record(run: Callable[[], None], memory: Any) -> Callable[[], None]:
    run()  # what is compiled or looked up on first use must not be recorded
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory):
        run()
    return graph.replay
