"""A step under way, and how its operators are cut into tiles: by its shape alone, and fixed when it begins."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from torch import Tensor

from headway.core.work import Boundary, Tile
from headway.models.decoder import Decoder
from headway.stages.batch import Batch
from headway.stages.layers import Course, WholeLayers
from headway.stages.matrices import Matrices
from headway.stages.operators import Operators
from headway.stages.tiling import Grid, Span, Tiling, spans

MAX_DRAWN_BYTES = 16 << 20  # of logits as float32, on a device
MAX_LOGITS_BYTES = 32 << 20  # of prompts that are scored, at a time
MOST_ROWS_WHOLE = 256  # of a step whose layers are not cut: what is between their operators stays small
_NOTHING = Grid((), ())


@dataclass(slots=True)
class Step:
    """Its rows, their hidden states, how each operator is cut, and how many tiles are done."""

    batch: Batch
    x_NE: Tensor
    of: int
    head: Grid
    qkv: Grid = _NOTHING
    small: tuple[Span, ...] = ()
    attention: dict[int | None, list[object]] = field(default_factory=dict)  # as operators want it, by window
    o: Grid = _NOTHING
    gate_up: Grid = _NOTHING
    down: Grid = _NOTHING
    course: Course | None = None  # where a whole layer is a tile
    number: int = 0
    left: tuple[str, ...] = ()

    def tile(self, operator: str, boundary: Boundary = Boundary.OPERATOR) -> Tile:
        tile = Tile(self.number, self.of, operator, self.left, boundary)
        self.number += 1
        self.left = ()
        return tile

    def go_on_from(self, before: Self, left: tuple[str, ...]) -> None:
        """Count on where another step stopped, which some members have just left."""
        self.number, self.left = before.number, left


class Cutting(NamedTuple):
    """All that decides how steps are cut."""

    model: Decoder
    matrices: Matrices
    tiling: Tiling
    operators: Operators
    layers: WholeLayers | None = None

    def cut(self, batch: Batch, x_NE: Tensor, looks: list[object] | None = None) -> Step:
        """A step whose operators are launched one by one. `looks`: attention that stands already, for any window."""
        config, tiling, n, size = self.model.config, self.tiling, batch.num_rows, self.model.dtype.itemsize
        attention = {window: self._looks(batch, window) if looks is None else looks for window in set(config.windows)}
        if self.layers is not None and self._is_short(batch, attention):
            head = self._head(batch)
            course = self.layers.prepare(batch, {window: tiles[0] for window, tiles in attention.items()})
            of = 1 + config.num_layers + self._num_head_tiles(head)
            return Step(batch, x_NE, of, head, course=course)
        layer = self.matrices.layers[0]
        qkv, o = (tiling.linear(n, *matrix.size, size, step=matrix.step) for matrix in (layer.qkv, layer.o))
        highest = tiling.most_active_rows(layer.gate_up.size[1])
        gate_up = tiling.linear(n, *layer.gate_up.size, size, highest, layer.gate_up.step)
        highest = max((rows.end - rows.start for rows in gate_up.rows), default=0)
        down = tiling.linear(highest, *layer.down.size, size, step=layer.down.step)
        small = tiling.elementwise(n, config.q_size + 2 * config.kv_size)
        per_layer = sum(len(grid.rows) * len(grid.columns) for grid in (qkv, o)) + len(small)
        per_layer += len(gate_up.rows) * (len(gate_up.columns) + 1 + len(down.columns))
        head = self._head(batch)
        of = 1 + per_layer * config.num_layers + sum(len(attention[window]) for window in config.windows)
        return Step(batch, x_NE, of + self._num_head_tiles(head), head, qkv, small, attention, o, gate_up, down)

    def replayed(self, batch: Batch, x_NE: Tensor, num_parts: int) -> Step:
        """A step whose layers have been recorded, in so many parts."""
        head = self._head(batch)
        return Step(batch, x_NE, num_parts + self._num_head_tiles(head), head)

    @property
    def draws_elsewhere(self) -> bool:
        """Whether the logits are on a device, which can draw from most of them by itself."""
        return self.model.device.type != "cpu"

    def draws(self, num_rows: int) -> tuple[Span, ...]:
        """Of so many rows of logits those that the host draws from, or scores by, in one tile."""
        return self.tiling.draws(num_rows, self.model.config.vocab_size) if num_rows else ()

    def draws_there(self, rows: Span) -> tuple[Span, ...]:
        """Of a block of rows those that a device draws from in one tile: it keeps some copies of them meanwhile."""
        return spans(rows.end - rows.start, MAX_DRAWN_BYTES // (4 * self.model.config.vocab_size))

    def _is_short(self, batch: Batch, attention: Mapping[int | None, list[object]]) -> bool:
        """Whether a layer of so few rows takes no longer than a tile is to take."""
        config, tiling, n, size = self.model.config, self.tiling, batch.num_rows, self.model.dtype.itemsize
        if n > MOST_ROWS_WHOLE or any(len(tiles) > 1 for tiles in attention.values()):
            return False
        layer_s = sum(tiling.linear_s(n, *matrix.size, size) for matrix in self.matrices.layers[0])
        layer_s += n * (config.q_size + 2 * config.kv_size) / tiling.rates.elements
        layer_s += n * config.intermediate_size / tiling.rates.activations
        heads = (config.num_heads, config.num_kv_heads, config.head_size)
        attention_s = max(tiling.attention_s(batch.segments, *heads, size, window) for window in attention)
        return layer_s + attention_s <= tiling.aim_s

    def _looks(self, batch: Batch, window: int | None) -> list[object]:
        config, operators = self.model.config, self.operators
        heads = (config.num_heads, config.num_kv_heads, config.head_size)
        size = self.model.dtype.itemsize
        tiles = self.tiling.attention(batch.segments, *heads, size, window, gathers=operators.gathers)
        return [operators.prepare(batch, glances) for glances in tiles]

    def _head(self, batch: Batch) -> Grid:
        """Few rows are drawn from, one a member; where prompts are scored there are many, and their logits are never
        all there at once."""
        if not batch.asked_by:
            return _NOTHING
        head, size = self.matrices.head, self.model.dtype.itemsize
        highest = max(len(batch.segments), MAX_LOGITS_BYTES // (head.size[1] * size))
        return self.tiling.linear(len(batch.asked_by), *head.size, size, highest, head.step)

    def _num_head_tiles(self, head: Grid) -> int:
        num_tiles = 0  # at most: what a device has drawn is left out by the host
        for rows in head.rows:
            num_tiles += len(head.columns) + len(self.draws(rows.end - rows.start))
            num_tiles += len(self.draws_there(rows)) if self.draws_elsewhere else 0
        return num_tiles
