"""A decoder's step as a generator over operators: whole prompts, chunks, packs, tokens, or all of them mixed.

Every operator is one `models` function over tiles of rows; after each tile comes a yield. Where a whole layer takes no
longer than a tile, it is one (`layers.py`). Rows are all alike to the linear operators, attention works segment by
segment on pages, so nothing is padded, masked or unpacked. The stage knows neither scheduler nor clock; how operators
are cut is `tiling`'s.

Between layers a step holds N·E hidden values; within a layer N·(H + 2K)·D more. The wide middle of the MLP exists
for one tile of rows at a time only, which bounds what a suspended prompt keeps. Shape legend: see models/decoder.py.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.core.request import Request
from headway.core.work import Boundary, Commit, Outcome, Segment, Tile, Work
from headway.kv.pool import KVPool
from headway.models.decoder import Decoder, Layer
from headway.stages.batch import Batch, PageLists, make_batch
from headway.stages.device import LAUNCH_AHEAD, LaunchAhead, check_device, operators_for
from headway.stages.layers import whole_layers
from headway.stages.matrices import Matrices, matrices_of
from headway.stages.pooling import NOT_FINITE, Pooler
from headway.stages.recorded import Part, Recordable, Recording, Stand, sizes, standing_batch
from headway.stages.sample import Sampler
from headway.stages.stage import Running
from headway.stages.step import Cutting, Step
from headway.stages.tiling import Span, Tiling


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
        self.layers = whole_layers(model, self.matrices, self.operators)
        self.launch_ahead = LAUNCH_AHEAD
        self._fence = LaunchAhead(model.device)
        self._recordings: list[Recording] = []  # the smallest first
        self._page_lists = PageLists()
        self._leaving: dict[int, frozenset[str]] = {}

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
        # made anew: another lane's thread may be looking at what there was
        self._leaving[work_id] = self._leaving.get(work_id, frozenset()) | {request_id}

    def run(self, work: Work) -> Running:
        tiles = self._tiles(work)
        if self.model.device.type == "cpu":
            return (yield from tiles)
        torch.cuda.set_device(self.model.device)  # each thread has a current one of its own
        self._fence.depth = self.launch_ahead
        try:
            while True:
                tile = next(tiles)
                self._fence.passed()
                yield tile
                torch.cuda.set_device(self.model.device)  # it may be another thread that goes on
        except StopIteration as stop:
            outcome: Outcome = stop.value
            return outcome
        except Exception:  # the step's own fault, unless nothing runs on the device any more
            check_device(self.model.device)
            raise
        finally:
            tiles.close()

    def _tiles(self, work: Work) -> Running:
        batch = self._lay_out(work.segments)
        recording = self._recording_for(batch)
        step = held = self._begin(batch, recording)
        num_done, logits = 0, list[Tensor]()
        try:
            if recording is not None:
                num_done = yield from self._replay(work.id, step, recording, logits)
            if num_done == 0:
                for rows in self.tiling.elementwise(batch.num_rows, self.model.config.hidden_size):
                    part = slice(rows.start, rows.end)
                    step.x_NE[part] = F.embedding(batch.tokens_N[part], self.model.embedding_VE)
                    yield step.tile("embedding")
            for number in range(num_done, self.model.config.num_layers):
                if work.id in self._leaving:
                    step = self._without(step, self._leaving.pop(work.id), number)
                    if not step.batch.segments:
                        yield step.tile("left")
                        return Outcome(())
                yield from self._layer(step, number, self.model.layers[number])
            drawn: list[Commit] = []
            sums: list[tuple[Segment, Tensor]] = []
            yield from self._pool(step, sums)
            if logits:
                yield from self._draw(step, Span(0, batch.num_rows), logits[0], drawn)
            else:
                yield from self._head(step, drawn)
            vectors = [self.pooler.take(segment, sum_E) for segment, sum_E in sums]
            return Outcome(_merged(chain(drawn, filter(None, vectors), self._spoilt(step))))
        finally:
            self._leaving.pop(work.id, None)
            if recording is not None:
                recording.let_go(held)

    # Beginning, and going on with fewer

    def _lay_out(self, segments: Sequence[Segment]) -> Batch:
        return make_batch(segments, self._page_lists, self.pool.shape.page_tokens, self.model.device)

    def _begin(self, batch: Batch, recording: Recording | None) -> Step:
        x_NE = self.model.embedding_VE.new_empty(batch.num_rows, self.model.config.hidden_size)
        if recording is not None:
            return self._cutting.replayed(batch, x_NE, len(recording.parts))
        return self._cutting.cut(batch, x_NE)

    @property
    def _cutting(self) -> Cutting:
        return Cutting(self.model, self.matrices, self.tiling, self.operators, self.layers)

    def _without(self, step: Step, leaving: frozenset[str], num_layers: int) -> Step:
        """The same step, so many layers of it done, after some members have left; their pages are not touched again."""
        pairs = list(zip(step.batch.segments, step.batch.rows, strict=True))
        staying = [(segment, rows) for segment, rows in pairs if segment.request_id not in leaving]
        left = tuple(segment.request_id for segment, _ in pairs if segment.request_id in leaving)
        if not staying:
            step.batch.segments.clear()
            step.left = left
            return step
        x_NE = torch.cat([step.x_NE[rows.start : rows.end] for _, rows in staying])
        rest = self._cutting.cut(self._lay_out([segment for segment, _ in staying]), x_NE)
        rest.go_on_from(num_layers, self.model.config.num_layers, left)
        return rest

    # One layer

    def _layer(self, step: Step, number: int, layer: Layer) -> Iterator[Tile]:
        if step.course is not None:
            assert self.layers is not None
            self.layers.run(number, step.x_NE, step.course)
            yield step.tile("layer", Boundary.LAYER)
            return
        config, operators, x_NE, n = self.model.config, self.operators, step.x_NE, step.batch.num_rows
        matrices = self.matrices.layers[number]

        qkv_N = x_NE.new_empty(n, config.q_size + 2 * config.kv_size)
        for rows in step.qkv.rows:
            normed = operators.norm(x_NE[rows.start : rows.end], layer.input_norm)
            for columns in step.qkv.columns:
                matrices.qkv.into(qkv_N[rows.start : rows.end], normed, columns)
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
                matrices.o.onto(x_NE[rows.start : rows.end], y_N[rows.start : rows.end], columns)
                yield step.tile("o")
        del qkv_N, q_NHD, y_NHD, y_N, look

        for rows in step.gate_up.rows:
            x = x_NE[rows.start : rows.end]
            normed = operators.norm(x, layer.post_norm)
            gates = matrices.gate_up.gates
            middle = normed.new_empty(len(x), config.intermediate_size * (1 if gates else 2))
            for columns in step.gate_up.columns:
                matrices.gate_up.into(middle, normed, columns)
                yield step.tile("gate_up")
            if not gates:
                middle = operators.activate(middle)
                yield step.tile("activation")
            for columns in step.down.columns:
                matrices.down.onto(x, middle, columns)
                is_last = rows.end == n and columns.end == config.hidden_size
                yield step.tile("down", Boundary.LAYER if is_last else Boundary.OPERATOR)

    # The head

    def _spoilt(self, step: Step) -> Iterator[Commit]:
        """Whose prompt goes on in another step, but is no numbers any more: none of its pages may be shown to others.
        Its last row has seen all that were before it, or as far back as the layers' windows reach. Of who is drawn for,
        or scored, the logits tell."""
        pairs = zip(step.batch.segments, step.batch.rows, strict=True)
        ends = {s.request_id: rows.end - 1 for s, rows in pairs if not (s.logits_at or s.scored_at)}
        if ends:
            for request_id, is_whole in zip(ends, step.x_NE[[*ends.values()]].isfinite().all(1).tolist(), strict=True):
                if not is_whole:
                    yield Commit(request_id, (), failure=NOT_FINITE)

    def _pool(self, step: Step, sums: list[tuple[Segment, Tensor]]) -> Iterator[Tile]:
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

    def _head(self, step: Step, drawn: list[Commit]) -> Iterator[Tile]:
        """Final norm, logits of the asked rows only; from each a token is drawn, or the prompt's next one scored."""
        batch, model = step.batch, self.model
        for rows in step.head.rows:
            chosen = batch.asked_rows[rows.start : rows.end]
            chosen_RE = self.operators.norm(step.x_NE[chosen], model.final_norm)
            logits_RV = chosen_RE.new_empty(len(chosen), model.config.vocab_size)
            for columns in step.head.columns:
                self.matrices.head.into(logits_RV, chosen_RE, columns)
                yield step.tile("head")
            yield from self._draw(step, rows, logits_RV, drawn)
            del chosen_RE, logits_RV  # before the next block's are made

    def _draw(self, step: Step, rows: Span, logits_RV: Tensor, drawn: list[Commit]) -> Iterator[Tile]:
        """A token, or a score, from each of these rows: first what a device can draw by itself, then the rest."""
        whole = slice(*rows)
        asked_by, asked_for = step.batch.asked_by[whole], step.batch.asked_for[whole]
        left = list(range(len(asked_by)))
        if self._cutting.draws_elsewhere:
            left = []
            for few in self._cutting.draws_there(rows):
                part = slice(*few)
                done, others = self.sampler.draw_there(logits_RV[part], asked_by[part], asked_for[part])
                drawn += done
                left += [few.start + row for row in others]
                yield step.tile("sample")
        for few in self._cutting.draws(len(left)):
            some = left[few.start : few.end]
            of_RV = logits_RV[few.start : few.end] if len(left) == len(asked_by) else logits_RV[some]
            drawn += self.sampler.draw(of_RV, [asked_by[row] for row in some], [asked_for[row] for row in some])
            yield step.tile("sample")

    # Recorded steps

    def record(self, most_tokens: int) -> None:
        """Record steps of one token for up to so many requests, and of a few rows of any kind, where operators can be
        recorded."""
        operators = self.operators
        if not isinstance(operators, Recordable):
            return
        model, memory = self.model, torch.cuda.graph_pool_handle()
        max_pages = -(-len(model.rope) // self.pool.shape.page_tokens)
        row_s = 2.0 * self._layer_cells() / self.tiling.rates.linear_flops
        for size in reversed(sizes(most_tokens, int(self.tiling.aim_s / row_s), operators.block_rows)):
            batch = standing_batch(size.num_rows, max_pages * (size.num_tokens + size.num_blocks), model.device)
            looks = operators.standing(size.num_blocks, size.num_tokens, model.device)
            x_NE = model.embedding_VE.new_empty(size.num_rows, model.config.hidden_size)
            logits_NV = None if size.num_blocks else x_NE.new_empty(size.num_rows, model.config.vocab_size)
            stand = Stand(batch, looks, x_NE, logits_NV)
            self._recordings.insert(0, Recording(size, stand, operators, self._parts, memory))

    def _parts(self, stand: Stand) -> list[Part]:
        """A step over these tensors, in parts that take about a tile's time."""
        model, matrices, rates = self.model, self.matrices, self.tiling.rates
        batch, looks, x_NE, logits_NV = stand
        step = self._cutting.cut(batch, x_NE, [looks])
        cells = self._layer_cells()
        layer_s = cells * max(model.dtype.itemsize / rates.linear_bytes, 2.0 * len(x_NE) / rates.linear_flops)
        together = max(1, int(self.tiling.aim_s / layer_s))

        def layers(first: int, end: int) -> None:
            if first == 0:
                x_NE.copy_(F.embedding(batch.tokens_N, model.embedding_VE))
            for number in range(first, end):
                for _ in self._layer(step, number, model.layers[number]):
                    pass

        def head(logits_NV: Tensor) -> None:
            normed = self.operators.norm(x_NE, model.final_norm)
            matrices.head.into(logits_NV, normed, Span(0, model.config.vocab_size))

        edges = [*range(0, model.config.num_layers, together), model.config.num_layers]
        parts = [Part("layers", end, partial(layers, first, end)) for first, end in pairwise(edges)]
        if logits_NV is not None:
            parts.append(Part("head", model.config.num_layers, partial(head, logits_NV)))
        return parts

    def _layer_cells(self) -> int:
        """Weights of a layer's matrices."""
        return sum(d_in * d_out for d_in, d_out in (matrix.size for matrix in self.matrices.layers[0]))

    def _recording_for(self, batch: Batch) -> Recording | None:
        """The smallest that has place for these rows, of those whose parts keep the bound with such contexts."""
        if batch.num_rows > max((recording.size.num_rows for recording in self._recordings), default=0):
            return None
        assert isinstance(self.operators, Recordable)
        items = self.operators.items(batch)
        config, size = self.model.config, self.model.dtype.itemsize
        heads = (config.num_heads, config.num_kv_heads, config.head_size)
        attention_s = max(
            self.tiling.attention_s(batch.segments, *heads, size, window) for window in set(config.windows)
        )
        wants_tokens = not items.blocks and len(batch.asked_by) == batch.num_rows and not self._pools(batch)
        for recording in self._recordings:
            is_short = attention_s * recording.most_layers <= self.tiling.aim_s
            if is_short and recording.size.fits(batch.num_rows, items) and (wants_tokens or recording.size.num_blocks):
                return recording
        return None

    def _pools(self, batch: Batch) -> bool:
        return any(self.pooler.wanted(segment) is not None for segment in batch.segments)

    def _replay(
        self, work_id: int, step: Step, recording: Recording, logits: list[Tensor]
    ) -> Generator[Tile, None, int]:
        """Part after part, until a member is to leave. Returns how many layers are done; `logits` gets those of the
        rows, if the recording has them."""
        num_done = 0
        for part in recording.parts:
            if work_id in self._leaving and num_done < self.model.config.num_layers:
                break
            recording.hold(step, begun=num_done > 0)
            part.replay()
            num_done = part.layers
            if part.operator == "head":
                assert recording.logits_NV is not None
                logits.append(recording.logits_NV[: step.batch.num_rows].clone())
            yield step.tile(part.operator, Boundary.LAYER)
        if not logits:
            recording.put_aside(step)
        return num_done


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
