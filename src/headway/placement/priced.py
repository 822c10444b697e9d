"""A stage whose tiles only cost time: what the simulator runs instead of a model.

Between two events nothing is decided, so there is no use in stopping at every tile: a priced step goes straight to the
first tile boundary at or after the next thing that can happen. Where that is, it is told; what a step takes, too.
"""

from collections.abc import Callable
from math import ceil, inf

from headway.core.clock import VirtualClock
from headway.core.request import Request
from headway.core.work import Boundary, Commit, Outcome, Segment, Tile, Work
from headway.stages.stage import Running


class PricedStage:
    """Conforms to `stages.stage.Stage`. A step of `price(work)` seconds has equal tiles of at most `tile_s` seconds.

    `horizon()` is the next instant at which something from outside may happen; `pace` how many times as long the step
    takes at present. Every drawn token is 0.
    """

    def __init__(
        self,
        clock: VirtualClock,
        price: Callable[[Work], float],
        horizon: Callable[[], float],
        tile_s: float,
        num_layers: int = 24,
        pace: Callable[[Work], float] = lambda work: 1.0,
    ) -> None:
        self.clock = clock
        self.price = price
        self.horizon = horizon
        self.tile_s = tile_s
        self.num_layers = num_layers
        self.pace = pace
        self._leaving: dict[int, set[str]] = {}

    def open(self, request: Request) -> None:
        """Nothing to keep for it."""

    def close(self, request_id: str) -> None:
        """Nothing was kept."""

    def drop(self, work_id: int, request_id: str) -> None:
        self._leaving.setdefault(work_id, set()).add(request_id)

    def run(self, work: Work) -> Running:
        segments = work.segments
        seconds = self.price(work)
        num_tiles = max(1, ceil(seconds / self.tile_s))
        done = 0
        try:
            while done < num_tiles:
                tile_s = seconds / num_tiles * self.pace(work)
                # where the next event falls, counted in tiles from here; the last hair is rounding, not another tile
                ahead = (self.horizon() - self.clock.now()) / tile_s if tile_s else inf
                most = num_tiles - done
                if work.id in self._leaving:  # a member leaves with the layer under way
                    most = self._end_of_layer(done, num_tiles) - done
                jump = most if ahead >= most else max(1, ceil(ahead - 1e-9))
                self.clock.advance(jump * tile_s)
                done += jump
                left = self._leave(work.id) if self._ends_layer(done, num_tiles) else ()
                segments = tuple(segment for segment in segments if segment.request_id not in left)
                boundary = Boundary.LAYER if self._ends_layer(done, num_tiles) else Boundary.OPERATOR
                yield Tile(done - 1, num_tiles, "priced", left, boundary)
            return Outcome(tuple(map(_commit, (segment for segment in segments if segment.logits_at))))
        finally:
            self._leaving.pop(work.id, None)

    def _ends_layer(self, done: int, num_tiles: int) -> bool:
        """Whether a layer ends with the last of the tiles done: layers are laid evenly over the tiles."""
        return done * self.num_layers // num_tiles > (done - 1) * self.num_layers // num_tiles

    def _end_of_layer(self, done: int, num_tiles: int) -> int:
        """How many tiles are done when the layer ends that the next tile belongs to."""
        return next(end for end in range(done + 1, num_tiles + 1) if self._ends_layer(end, num_tiles))

    def _leave(self, work_id: int) -> tuple[str, ...]:
        return tuple(sorted(self._leaving.pop(work_id, ())))


def _commit(segment: Segment) -> Commit:
    return Commit(segment.request_id, (0,))
