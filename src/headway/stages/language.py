"""A decoder's step as a generator over operators: whole prompts, chunks, packs, tokens, or all of them mixed.

Every operator is one `models` function over tiles of rows; after each tile comes a yield. Rows are all alike to the
linear operators, attention works segment by segment on pages, so nothing is padded, masked or unpacked. The stage
knows neither scheduler nor clock; how operators are cut is `tiling`'s.

Between layers a step holds N·E hidden values; within a layer N·(H + 2K)·D more. The wide middle of the MLP exists
for one tile of rows at a time only, which bounds what a suspended prompt keeps. Shape legend: see models/decoder.py.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.core.request import Request
from headway.core.work import Boundary, Commit, Outcome, Segment, Tile, Work
from headway.kv.pool import KVPool
from headway.models.decoder import Decoder, Layer
from headway.stages.batch import Batch, PageLists, make_batch
from headway.stages.device import LaunchAhead
from headway.stages.matrices import Matrices, matrices_of
from headway.stages.native import operators_for
from headway.stages.pooling import Pooler
from headway.stages.sample import Sampler
from headway.stages.stage import Running
from headway.stages.tiling import Grid, Span, Tiling

MAX_LOGITS_BYTES = 32 << 20  # of prompts that are scored, at a time


@dataclass(slots=True)
class _Pass:
    """One step under way: its rows, how they are cut, the hidden states, and how many tiles are done."""

    batch: Batch
    x_NE: Tensor
    qkv: Grid
    small: tuple[Span, ...]
    attention: dict[int | None, list[object]]  # tiles as the operators want them, by the layer's window
    o: Grid
    gate_up: Grid
    down: Grid
    head: Grid
    of: int
    number: int = 0
    left: tuple[str, ...] = field(default=())

    def tile(self, operator: str, boundary: Boundary = Boundary.OPERATOR) -> Tile:
        tile = Tile(self.number, self.of, operator, self.left, boundary)
        self.number += 1
        self.left = ()
        return tile


class LanguageStage:
    """Runs steps of one decoder over one pool."""

    def __init__(
        self, model: Decoder, pool: KVPool, tiling: Tiling, sampler: Sampler, matrices: Matrices | None = None
    ) -> None:
        """`matrices`: the model's own, in whatever order; by default as it has them."""
        self.model = model
        self.matrices = matrices or matrices_of(model)
        self.pool = pool
        self.tiling = tiling
        self.sampler = sampler
        self.pooler = Pooler()
        self.operators = operators_for(model, pool)
        self._page_lists = PageLists()
        self._leaving: dict[int, set[str]] = {}

    @property
    def bytes_per_token(self) -> int:
        """What a suspended step keeps for each of its tokens, pages aside: hidden states, q, k, v and attention's."""
        config = self.model.config
        return (config.hidden_size + 2 * config.q_size + 2 * config.kv_size) * self.model.dtype.itemsize

    def open(self, request: Request) -> None:
        self.sampler.open(request)
        self.pooler.open(request)

    def close(self, request_id: str) -> None:
        self.sampler.close(request_id)
        self.pooler.close(request_id)
        self._page_lists.forget(request_id)

    def drop(self, work_id: int, request_id: str) -> None:
        self._leaving.setdefault(work_id, set()).add(request_id)

    def run(self, work: Work) -> Running:
        fence = LaunchAhead(self.model.device)
        step = self._begin(self._lay_out(work.segments))
        try:
            for rows in self.tiling.elementwise(step.batch.num_rows, self.model.config.hidden_size):
                part = slice(rows.start, rows.end)
                step.x_NE[part] = F.embedding(step.batch.tokens_N[part], self.model.embedding_VE)
                fence.passed()
                yield step.tile("embedding")
            for number, layer in enumerate(self.model.layers):
                if work.id in self._leaving:
                    step = self._without(step, self._leaving.pop(work.id))
                    if not step.batch.segments:
                        yield step.tile("left")
                        return Outcome(())
                for tile in self._layer(step, number, layer):
                    fence.passed()
                    yield tile
            drawn: list[Commit] = []
            sums: list[tuple[Segment, Tensor]] = []
            for tile in chain(self._pool(step, sums), self._head(step, drawn)):
                fence.passed()
                yield tile
            vectors = [self.pooler.take(segment, sum_E) for segment, sum_E in sums]
            return Outcome(_merged(chain(drawn, filter(None, vectors))))
        finally:
            self._leaving.pop(work.id, None)

    # Beginning, and going on with fewer

    def _lay_out(self, segments: Sequence[Segment]) -> Batch:
        return make_batch(segments, self._page_lists, self.pool.shape.page_tokens, self.model.device)

    def _begin(self, batch: Batch) -> _Pass:
        return self._cut(batch, self.model.embedding_VE.new_empty(batch.num_rows, self.model.config.hidden_size))

    def _cut(self, batch: Batch, x_NE: Tensor) -> _Pass:
        """How this step's operators are cut into tiles: fixed from here on."""
        config, tiling, n = self.model.config, self.tiling, batch.num_rows
        layer, size = self.matrices.layers[0], self.model.dtype.itemsize
        qkv, o = (tiling.linear(n, *matrix.size, size, step=matrix.step) for matrix in (layer.qkv, layer.o))
        highest = tiling.most_active_rows(layer.gate_up.size[1])
        gate_up = tiling.linear(n, *layer.gate_up.size, size, highest, layer.gate_up.step)
        highest = max((rows.end - rows.start for rows in gate_up.rows), default=0)
        down = tiling.linear(highest, *layer.down.size, size, step=layer.down.step)
        small = tiling.elementwise(n, config.q_size + 2 * config.kv_size)
        heads = (config.num_heads, config.num_kv_heads, config.head_size)
        attention = {
            window: [
                self.operators.prepare(batch, glances)
                for glances in tiling.attention(batch.segments, *heads, size, window, gathers=self.operators.gathers)
            ]
            for window in set(config.windows)
        }
        per_layer = sum(len(grid.rows) * len(grid.columns) for grid in (qkv, o)) + len(small)
        per_layer += len(gate_up.rows) * (len(gate_up.columns) + 1 + len(down.columns))
        head = self._cut_head(batch)
        of = 1 + per_layer * config.num_layers + sum(len(attention[window]) for window in config.windows)
        of += sum(len(head.columns) + len(self._draws(rows)) for rows in head.rows)
        return _Pass(batch, x_NE, qkv, small, attention, o, gate_up, down, head, of)

    def _cut_head(self, batch: Batch) -> Grid:
        """Few rows are drawn from, one a member; where prompts are scored there are many, and their logits are never
        all there at once."""
        if not batch.asked_by:
            return Grid((), ())
        head, size = self.matrices.head, self.model.dtype.itemsize
        highest = max(len(batch.segments), MAX_LOGITS_BYTES // (head.size[1] * size))
        return self.tiling.linear(len(batch.asked_by), *head.size, size, highest, head.step)

    def _draws(self, rows: Span) -> tuple[Span, ...]:
        """Of a block of rows of logits, those that are drawn from, or scored by, in one tile."""
        return self.tiling.elementwise(rows.end - rows.start, 4 * self.model.config.vocab_size)

    def _without(self, step: _Pass, leaving: set[str]) -> _Pass:
        """The same step after some members have left; their pages are not touched any more."""
        pairs = list(zip(step.batch.segments, step.batch.rows, strict=True))
        staying = [(segment, rows) for segment, rows in pairs if segment.request_id not in leaving]
        left = tuple(segment.request_id for segment, _ in pairs if segment.request_id in leaving)
        if not staying:
            step.batch.segments.clear()
            step.left = left
            return step
        x_NE = torch.cat([step.x_NE[rows.start : rows.end] for _, rows in staying])
        rest = self._cut(self._lay_out([segment for segment, _ in staying]), x_NE)
        rest.number, rest.left = step.number, left
        return rest

    # One layer

    def _layer(self, step: _Pass, number: int, layer: Layer) -> Iterator[Tile]:
        config, operators, x_NE, n = self.model.config, self.operators, step.x_NE, step.batch.num_rows
        matrices = self.matrices.layers[number]

        qkv_N = x_NE.new_empty(n, config.q_size + 2 * config.kv_size)
        for rows in step.qkv.rows:
            normed = operators.norm(x_NE[rows.start : rows.end], layer.input_norm)
            for columns in step.qkv.columns:
                qkv_N[rows.start : rows.end, columns.start : columns.end] = matrices.qkv.columns(normed, columns)
                yield step.tile("qkv")

        for rows in step.small:
            operators.place(step.batch, number, layer, self.model.rope, qkv_N, slice(rows.start, rows.end))
            yield step.tile("rope")

        q_NHD = qkv_N[:, : config.q_size].view(n, config.num_heads, config.head_size)
        y_NHD = torch.empty_like(q_NHD, memory_format=torch.contiguous_format)
        look = operators.looking(step.batch, number, q_NHD, y_NHD)
        for glances in step.attention[config.windows[number]]:
            look(glances)
            yield step.tile("attention")

        y_N = y_NHD.flatten(1)
        for rows in step.o.rows:
            for columns in step.o.columns:
                x_NE[rows.start : rows.end, columns.start : columns.end] += matrices.o.columns(
                    y_N[rows.start : rows.end], columns
                )
                yield step.tile("o")
        del qkv_N, q_NHD, y_NHD, y_N, look

        for rows in step.gate_up.rows:
            x = x_NE[rows.start : rows.end]
            normed = operators.norm(x, layer.post_norm)
            wide = normed.new_empty(len(x), matrices.gate_up.size[1])
            for columns in step.gate_up.columns:
                wide[:, columns.start : columns.end] = matrices.gate_up.columns(normed, columns)
                yield step.tile("gate_up")
            middle = operators.activate(wide)
            yield step.tile("activation")
            for columns in step.down.columns:
                x[:, columns.start : columns.end] += matrices.down.columns(middle, columns)
                is_last = rows.end == n and columns.end == config.hidden_size
                yield step.tile("down", Boundary.LAYER if is_last else Boundary.OPERATOR)

    # The head

    def _pool(self, step: _Pass, sums: list[tuple[Segment, Tensor]]) -> Iterator[Tile]:
        """Final norm and sum, float64, of the rows that go into vectors."""
        size = self.model.config.hidden_size
        for segment, rows in zip(step.batch.segments, step.batch.rows, strict=True):
            wanted = self.pooler.wanted(segment)
            if wanted is None:
                continue
            sum_E = torch.zeros(size, dtype=torch.float64, device=self.model.device)
            for part in self.tiling.elementwise(wanted.end - wanted.start, 4 * size):
                start = rows.start + wanted.start
                normed = self.operators.norm(step.x_NE[start + part.start : start + part.end], self.model.final_norm)
                sum_E += normed.sum(0, dtype=torch.float64)
                yield step.tile("pool")
            sums.append((segment, sum_E))

    def _head(self, step: _Pass, drawn: list[Commit]) -> Iterator[Tile]:
        """Final norm, logits of the asked rows only; from each a token is drawn, or the prompt's next one scored."""
        batch, model = step.batch, self.model
        for rows in step.head.rows:
            chosen = batch.asked_rows[rows.start : rows.end]
            chosen_RE = self.operators.norm(step.x_NE[chosen], model.final_norm)
            logits_RV = chosen_RE.new_empty(len(chosen), model.config.vocab_size)
            for columns in step.head.columns:
                logits_RV[:, columns.start : columns.end] = self.matrices.head.columns(chosen_RE, columns)
                yield step.tile("head")
            for few in self._draws(rows):
                part = slice(rows.start + few.start, rows.start + few.end)
                logits = logits_RV[few.start : few.end]
                drawn += self.sampler.draw(logits, batch.asked_by[part], batch.asked_for[part])
                yield step.tile("sample")
            del chosen_RE, logits_RV, logits  # before the next block's are made


def _merged(drawn: Iterable[Commit]) -> tuple[Commit, ...]:
    """One commit per request, in order of first appearance."""
    by_request: dict[str, list[Commit]] = {}
    for commit in drawn:
        by_request.setdefault(commit.request_id, []).append(commit)
    return tuple(_joined(commits) for commits in by_request.values())


def _joined(commits: Sequence[Commit]) -> Commit:
    if len(commits) == 1:
        return commits[0]
    return Commit(
        commits[0].request_id,
        tokens=tuple(chain.from_iterable(commit.tokens for commit in commits)),
        logprobs=tuple(chain.from_iterable(commit.logprobs for commit in commits)),
        failure=next((commit.failure for commit in commits if commit.failure), None),
        prompt_logprobs=tuple(chain.from_iterable(commit.prompt_logprobs for commit in commits)),
        vector=next((commit.vector for commit in commits if commit.vector), ()),
        complete=commits[-1].complete,
    )
