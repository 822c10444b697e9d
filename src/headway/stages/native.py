"""The compiled operators of csrc/kernels.cpp, if this machine can run them; `operators.py` has the same in torch.

The library is built once per kind of processor when the package is installed, and needs nothing but the C++ and OpenMP
runtimes that torch has loaded. Called through ctypes, which lets go of the interpreter lock. HEADWAY_NATIVE=0 leaves
it alone, HEADWAY_NATIVE_FOLDER takes it from somewhere else.
"""

import ctypes
import logging
import os
import platform
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headway.kv.pool import KVPool
from headway.models.config import DecoderConfig
from headway.models.decoder import Layer
from headway.stages.batch import Batch
from headway.stages.operators import Operators
from headway.stages.tiling import Glance

log = logging.getLogger("headway.native")

FOLDER = Path(os.environ.get("HEADWAY_NATIVE_FOLDER") or Path(__file__).parent.parent / "native")
KINDS = {  # library -> what the processor must be able to do, the best first
    "amx": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"},
    "avx512bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "avx512_bf16", "avx512_vnni"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"},
    "avx2": {"avx2", "fma"},
    "neonbf16": {"asimd", "asimddp", "bf16"},
    "neondot": {"asimd", "asimddp"},
    "neon": {"asimd"},
    "plain": set[str](),
}
INTERFACE = 6  # of the functions in csrc/kernels.cpp that this module knows
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_INT64 = ctypes.c_int64
_POINTER = ctypes.c_void_p


class Library(NamedTuple):
    """The compiled operators, and for which kind of processor."""

    kind: str
    lib: ctypes.CDLL


@cache
def library() -> Library | None:
    """The best one that there is and that this processor can run."""
    if os.environ.get("HEADWAY_NATIVE", "1") == "0":
        return None
    found = next(libraries(), None)
    if found is None:
        log.info("No compiled operators for this %s: torch's are used, which are slower.", platform.machine())
    return found


def libraries() -> Iterator[Library]:
    """All that there are and that this processor can run, the best first."""
    able = abilities()
    for kind, needed in KINDS.items():
        if needed <= able and (lib := _opened(FOLDER / f"kernels-{kind}.so")) is not None:
            yield Library(kind, lib)


def abilities() -> frozenset[str]:
    """What the processor says it can do, in Linux's words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    said = next((line for line in lines if line.lower().startswith(("flags", "features"))), ":")
    return frozenset(said.partition(":")[2].split())


def _opened(path: Path) -> ctypes.CDLL | None:
    """None if there is none, or one that is damaged, from other sources or made for a newer system than this."""
    try:
        if not path.exists():
            return None
        lib = ctypes.CDLL(str(path))
        if lib.headway_interface() != INTERFACE:
            return None
        return _declared(lib) if lib.headway_ready() else None
    except (OSError, AttributeError) as error:  # it cannot be loaded, or has not all the functions
        log.info("%s is left alone: %s", path.name, error)
        return None


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    for name, arguments in {
        "attend": (*(_POINTER,) * 6, _INT64, ctypes.c_int),
        "place": (_POINTER, _INT64, *(_POINTER,) * 8, ctypes.c_float, ctypes.c_float, ctypes.c_int),
        "layer": (_POINTER, _INT64, *(_POINTER,) * 3, ctypes.c_float, ctypes.c_float, ctypes.c_int),
        "norm": (_POINTER, _INT64, _POINTER, _POINTER, _INT64, _INT64, ctypes.c_float, ctypes.c_int),
        "activate": (_POINTER, _POINTER, _INT64, _INT64, ctypes.c_int),
        "pack": (_POINTER, _INT64, _INT64, ctypes.c_int, _POINTER, _POINTER),
        "linear": (
            *(_POINTER, _INT64, _INT64, _POINTER, _POINTER, _INT64, _INT64, _INT64),
            *(_POINTER, _POINTER, _INT64, ctypes.c_int, ctypes.c_int),
        ),
    }.items():
        function = getattr(lib, f"headway_{name}")
        function.restype, function.argtypes = None, (ctypes.c_int, *arguments)
    lib.headway_gates.argtypes = (ctypes.c_int, _INT64)
    lib.headway_panels_bytes.restype = _INT64
    lib.headway_panels_bytes.argtypes = (ctypes.c_int, _INT64, _INT64, ctypes.c_int)
    return lib


def suits(found: Library, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled operators can work on a model of this shape."""
    lanes: int = found.lib.headway_lanes()
    return (
        device.type == "cpu"
        and dtype in DTYPES
        and config.head_size % (2 * lanes) == 0
        and config.hidden_size % lanes == 0
        and config.intermediate_size % lanes == 0
        and config.num_heads // config.num_kv_heads <= 16
    )


def activate(lib: ctypes.CDLL, wide: Tensor) -> Tensor:
    """What passes the gate of an MLP, (n, I), from gate and up, (n, 2 I)."""
    assert wide.is_contiguous()
    num_rows, size = wide.size(0), wide.size(1) // 2
    y = wide.new_empty(num_rows, size)
    lib.headway_activate(DTYPES[wide.dtype], wide.data_ptr(), y.data_ptr(), num_rows, size, torch.get_num_threads())
    return y


class Looks(NamedTuple):
    """The glances of a tile as the library takes them."""

    glances: NDArray[np.int64]
    table: NDArray[np.int64]


class NativeOperators(Operators):
    """Attention from pages, a block at a time without gathering a whole context; rotation and page writes in one pass,
    norms and activations fused."""

    gathers = False

    def __init__(self, config: DecoderConfig, pool: KVPool, found: Library) -> None:
        super().__init__(config, pool)
        self.name = f"compiled for {found.kind}"
        self.lib = found.lib
        self.dtype = DTYPES[pool.shape.dtype]
        shape = pool.shape
        self._head_stride = shape.page_tokens * shape.head_size
        self._value_offset = shape.num_kv_heads * self._head_stride
        self._page_stride = shape.num_layers * 2 * self._value_offset
        self._layer_bytes = 2 * self._value_offset * shape.dtype.itemsize
        row = config.q_size + 2 * config.kv_size
        self.heads = np.array(
            [row, config.num_heads, config.num_kv_heads, config.head_size]
            + [self._page_stride, self._head_stride, self._value_offset],
            np.int64,
        )

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        assert x.stride(-1) == 1
        y = x.new_empty(x.shape)
        self.lib.headway_norm(
            self.dtype, x.data_ptr(), x.stride(0), weight.data_ptr(), y.data_ptr(), x.size(0), x.size(1),
            self.config.norm_eps, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def activate(self, wide: Tensor) -> Tensor:
        return activate(self.lib, wide)

    def place(self, batch: Batch, number: int, layer: Layer, rope: Tensor, qkv_N: Tensor, rows: slice) -> None:
        # the rows' own addresses: slices of four tensors in every layer would take as long as the rows do
        row_bytes, number_bytes = qkv_N.stride(0) * qkv_N.itemsize * rows.start, 8 * rows.start
        q_norm, k_norm = (0 if norm is None else norm.data_ptr() for norm in (layer.q_norm, layer.k_norm))
        self.lib.headway_place(
            self.dtype, qkv_N.data_ptr() + row_bytes, rows.stop - rows.start,
            batch.positions_N.data_ptr() + number_bytes, rope.data_ptr(), batch.pages_N.data_ptr() + number_bytes,
            batch.slots_N.data_ptr() + number_bytes, self.layer_address(number), self.heads.ctypes.data, q_norm, k_norm,
            self.config.norm_eps, self.scale, torch.get_num_threads(),
        )  # fmt: skip

    def prepare(self, batch: Batch, glances: list[Glance]) -> object:
        segments = sorted({glance.segment for glance in glances})
        tables = [batch.tables[segment].numpy() for segment in segments]
        starts = dict(zip(segments, np.cumsum([0, *map(len, tables)]), strict=False))
        rows = [
            (
                *(glance.rows.start, glance.rows.end - glance.rows.start),
                *(glance.first_query, starts[glance.segment]),
                *(glance.heads.start, glance.heads.end - glance.heads.start),
            )
            for glance in glances
        ]
        return Looks(np.array(rows, np.int64), np.concatenate(tables))

    def geometry(self, window: int | None) -> NDArray[np.int64]:
        """Of queries where `place` has put them, and of what they see in rows of their own."""
        config = self.config
        return np.array(
            [config.q_size + 2 * config.kv_size, config.q_size]
            + [self._page_stride, self._head_stride, self._value_offset, self.pool.shape.page_tokens]
            + [config.head_size, config.num_heads // config.num_kv_heads, window or 0],
            np.int64,
        )

    def looking(self, batch: Batch, number: int, q_NHD: Tensor, y_NHD: Tensor) -> Callable[[object], None]:
        geometry, layer = self.geometry(self.config.windows[number]), self.layer_address(number)
        geometry[:2] = q_NHD.stride(0), y_NHD.stride(0)

        def look(prepared: object) -> None:
            assert isinstance(prepared, Looks)
            self.lib.headway_attend(
                self.dtype, q_NHD.data_ptr(), y_NHD.data_ptr(), layer, prepared.table.ctypes.data,
                geometry.ctypes.data, prepared.glances.ctypes.data, len(prepared.glances), torch.get_num_threads(),
            )  # fmt: skip

        return look

    def layer_address(self, number: int) -> int:
        """Where the keys and values of this layer begin in the pool."""
        return self.pool.blocks_PL2KSD.data_ptr() + number * self._layer_bytes
