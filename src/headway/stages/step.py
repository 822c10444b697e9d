"""A step under way, and how it is cut into tiles: operators, or whole layers where these are short; by its shape alone,
and fixed when it begins."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

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
    """Its rows and hidden states, how operators are cut or what whole layers need, and how many tiles are done."""

    batch: Batch
    x_NE: Tensor
    of: int
    head: Grid
    in_layers: int = 0  # of its tiles
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

    def go_on_from(self, num_layers: int, of_layers: int, left: tuple[str, ...]) -> None:
        """After so many of all layers, where another step stopped which some members have just left."""
        self.number, self.left = 1 + self.in_layers * num_layers // of_layers, left


class Cutting(NamedTuple):
    """All that decides how steps are cut."""

    model: Decoder
    matrices: Matrices
    tiling: Tiling
    operators: Operators
    layers: WholeLayers | None = None

    def cut(self, batch: Batch, x_NE: Tensor, looks: list[object] | None = None) -> Step:
        """A step that is launched tile by tile. `looks`: attention that stands already, for any window."""
        config, tiling, n, size = self.model.config, self.tiling, batch.num_rows, self.model.dtype.itemsize
        windows = set(config.windows)
        priced = {window: self._looks(batch, window) if looks is None else (looks, 0.0) for window in windows}
        attention = {window: tiles for window, (tiles, _) in priced.items()}
        head = self._head(batch)
        num_others = 1 + self._num_head_tiles(head)
        if self.layers is not None and self._is_short(n, priced.values()):
            course = self.layers.prepare(batch, {window: tiles[0] for window, tiles in attention.items()})
            return Step(batch, x_NE, num_others + config.num_layers, head, config.num_layers, course=course)
        layer = self.matrices.layers[0]
        qkv, o = (tiling.linear(n, *matrix.size, size, step=matrix.step) for matrix in (layer.qkv, layer.o))
        gates = layer.gate_up.gates
        highest = n if gates else tiling.most_active_rows(layer.gate_up.size[1])
        gate_up = tiling.linear(n, *layer.gate_up.size, size, highest, layer.gate_up.step)
        highest = max((rows.end - rows.start for rows in gate_up.rows), default=0)
        down = tiling.linear(highest, *layer.down.size, size, step=layer.down.step)
        small = tiling.elementwise(n, config.q_size + 2 * config.kv_size)
        per_layer = sum(len(grid.rows) * len(grid.columns) for grid in (qkv, o)) + len(small)
        per_layer += len(gate_up.rows) * (len(gate_up.columns) + (not gates) + len(down.columns))
        in_layers = per_layer * config.num_layers + sum(len(attention[window]) for window in config.windows)
        return Step(batch, x_NE, num_others + in_layers, head, in_layers, qkv, small, attention, o, gate_up, down)

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

    def _is_short(self, num_rows: int, attention: Collection[tuple[list[object], float]]) -> bool:
        """Whether a layer of so few rows takes no longer than a tile is to take, by what its parts would as tiles."""
        config, rates, size = self.model.config, self.tiling.rates, self.model.dtype.itemsize
        if num_rows > MOST_ROWS_WHOLE or any(len(tiles) > 1 for tiles, _ in attention):
            return False
        layer = self.matrices.layers[0]
        layer_s = sum(self.tiling.linear_s(num_rows, *matrix.size, size) for matrix in layer)
        layer_s += num_rows * (config.q_size + 2 * config.kv_size + 2 * config.hidden_size) / rates.elements
        if not layer.gate_up.gates:
            layer_s += num_rows * layer.gate_up.size[1] / rates.activations
        return layer_s + max(seconds for _, seconds in attention) <= self.tiling.aim_s

    def _looks(self, batch: Batch, window: int | None) -> tuple[list[object], float]:
        """Tiles of attention as the operators want them, and what they are planned to take."""
        config, operators = self.model.config, self.operators
        sizes = (config.num_heads, config.num_kv_heads, config.head_size, self.model.dtype.itemsize)
        tiles, seconds = self.tiling.attention(batch.segments, *sizes, window, gathers=operators.gathers)
        return [operators.prepare(batch, glances) for glances in tiles], seconds

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
