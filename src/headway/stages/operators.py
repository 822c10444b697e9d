"""The operators of a decoder's step that are not linear, in torch: on any device, in any dtype, for any shape.

Owns how queries look at pages and how keys and values get there; `native.py` has the same compiled, for CPUs. Knows
neither tiles nor requests. Shape legend: see models/decoder.py.
"""

from collections.abc import Callable

from torch import Tensor

from headway.kv.pool import KVPool
from headway.models.attention import attend
from headway.models.config import DecoderConfig
from headway.models.decoder import Layer, position_qk, split_qkv
from headway.models.layers import rms_norm, silu_mul
from headway.stages.batch import Batch
from headway.stages.tiling import Glance, Span


class Operators:
    """Of one model's shape over one pool."""

    gathers = True  # keys and values are copied from their pages before queries look at them

    def __init__(self, config: DecoderConfig, pool: KVPool) -> None:
        self.config = config
        self.pool = pool
        self.name = "torch's"
        self.scale = config.head_size**-0.5

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Root-mean-square norm of each row."""
        return rms_norm(x, weight, self.config.norm_eps)

    def activate(self, wide: Tensor) -> Tensor:
        """The middle of the MLP, (n, I), from gate and up, (n, 2 I)."""
        return silu_mul(wide)

    def place(self, batch: Batch, number: int, layer: Layer, rope: Tensor, qkv_N: Tensor, rows: slice) -> None:
        """Rotate queries (scaled, in place) and keys of these rows; keys and values go to their pages."""
        q, k, v = split_qkv(self.config, qkv_N[rows])
        cos, sin = rope[batch.positions_N[rows]].unbind(1)
        rotated_q, rotated_k = position_qk(self.config, layer, q, k, cos, sin)
        q.copy_(rotated_q.mul_(self.scale))
        self.pool.write(number, batch.pages_N[rows], batch.slots_N[rows], rotated_k.to(v.dtype), v)

    def norm_heads(self, layer: Layer, qkv_N: Tensor) -> None:
        """Norm queries and keys in place, where the model has it."""
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k, _ = split_qkv(self.config, qkv_N)
            q.copy_(rms_norm(q, layer.q_norm, self.config.norm_eps))
            k.copy_(rms_norm(k, layer.k_norm, self.config.norm_eps))

    def prepare(self, batch: Batch, glances: list[Glance]) -> object:
        """A tile's glances in the form that `looking` wants them in, the same for all layers."""
        return glances

    def looking(self, batch: Batch, number: int, q_NHD: Tensor, y_NHD: Tensor) -> Callable[[object], None]:
        """A function that lets the queries of a prepared tile look at their pages in layer `number`; what they see is
        put into `y_NHD`. Tiles come in order."""
        config, window = self.config, self.config.windows[number]
        reader, groups = _PageReader(self.pool, batch, number, window), config.num_heads // config.num_kv_heads

        def look(prepared: object) -> None:
            assert isinstance(prepared, list)
            for glance in prepared:
                if glance.rows.start == glance.rows.end:
                    reader.gather(glance)
                    continue
                heads = slice(glance.heads.start * groups, glance.heads.end * groups)
                rows = slice(glance.rows.start, glance.rows.end)
                end = glance.first_query + glance.rows.end - glance.rows.start
                k_KTD, v_KTD, first_key = reader.up_to(glance, end)
                y_NHD[rows, heads] = attend(q_NHD[rows, heads], k_KTD, v_KTD, first_key, glance.first_query, window)

        return look


class _PageReader:
    """Gathers a segment's keys and values from its pages once per layer and group of heads."""

    def __init__(self, pool: KVPool, batch: Batch, layer: int, window: int | None) -> None:
        self._pool = pool
        self._batch = batch
        self._layer = layer
        self._window = window
        self._held: tuple[int, Span] | None = None
        self._keys: tuple[Tensor, Tensor]
        self._start = 0

    def up_to(self, glance: Glance, end: int) -> tuple[Tensor, Tensor, int]:
        """Keys and values (K, T, D) that the glance's queries may see, and the position of the first of them."""
        assert self._held == (glance.segment, glance.heads), "looked before it was gathered"
        first = self._start
        if self._window is not None:
            first = max(first, glance.first_query - self._window + 1)
        k, v = self._keys
        return k[:, first - self._start : end - self._start], v[:, first - self._start : end - self._start], first

    def gather(self, glance: Glance) -> None:
        """Copy what the glances after this one, of the same segment and heads, may see."""
        segment, table = self._batch.segments[glance.segment], self._batch.tables[glance.segment]
        page_tokens = self._pool.shape.page_tokens
        oldest = 0 if self._window is None else max(0, segment.first_position - self._window + 1)
        first_page = oldest // page_tokens
        self._start = first_page * page_tokens
        self._keys = self._pool.read(self._layer, table[first_page:], slice(glance.heads.start, glance.heads.end))
        self._held = (glance.segment, glance.heads)
