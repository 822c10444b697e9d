"""Whole layers of a decoder, each in one call of the compiled operators: for steps of few rows, of which a layer takes
no longer than a tile may. Called one by one from here, operators would take a part of a token's time that can be seen.

The operators and their order are the same as one by one, and so is every bit. Which steps are run so is `step`'s.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headway.models.decoder import Decoder, Layer
from headway.stages.batch import Batch
from headway.stages.matrices import LayerMatrices, Matrices
from headway.stages.native import Looks, NativeOperators
from headway.stages.operators import Operators
from headway.stages.panels import Panels


class Course(NamedTuple):
    """What a step's rows are, as the library takes it, by window; and what that stands on."""

    address: Mapping[int | None, int]
    held: Sequence[object]


class WholeLayers:
    """Of one decoder over one pool."""

    def __init__(
        self, model: Decoder, matrices: Matrices, parts: Sequence[NDArray[np.int64]], operators: NativeOperators
    ) -> None:
        self._windows = model.config.windows
        self._held = model, matrices  # whose addresses are in `parts`
        self._operators = operators
        self._rope = model.rope
        self._parts, self._heads = parts, operators.heads.ctypes.data
        self._addresses = [array.ctypes.data for array in parts]
        self._geometry = {window: operators.geometry(window) for window in set(model.config.windows)}

    def prepare(self, batch: Batch, looks: Mapping[int | None, object]) -> Course:
        """The same for all layers. `looks`: of each window, at what the step's queries look, in one tile."""
        arrays = {window: self._course(batch, window, look) for window, look in looks.items()}
        addresses = {window: array.ctypes.data for window, array in arrays.items()}
        return Course(addresses, (arrays, batch, looks))

    def run(self, number: int, x_NE: Tensor, course: Course) -> None:
        """All rows through layer `number`, in place."""
        operators = self._operators
        operators.lib.headway_layer(
            operators.dtype, x_NE.data_ptr(), len(x_NE), self._addresses[number], course.address[self._windows[number]],
            self._heads, operators.scale, operators.config.norm_eps, torch.get_num_threads(),
        )  # fmt: skip

    def _course(self, batch: Batch, window: int | None, look: object) -> NDArray[np.int64]:
        assert isinstance(look, Looks)
        numbers = (batch.positions_N, batch.pages_N, batch.slots_N, self._rope)
        return np.array(
            [tensor.data_ptr() for tensor in numbers]
            + [look.table.ctypes.data, self._geometry[window].ctypes.data, look.glances.ctypes.data, len(look.glances)],
            np.int64,
        )


def whole_layers(model: Decoder, matrices: Matrices, operators: Operators) -> WholeLayers | None:
    """None where operators or matrices are not the library's."""
    if not isinstance(operators, NativeOperators):
        return None
    parts = []
    for number, (layer, its_matrices) in enumerate(zip(model.layers, matrices.layers, strict=True)):
        found = _parts(layer, its_matrices, operators.layer_address(number))
        if found is None:
            return None
        parts.append(found)
    return WholeLayers(model, matrices, parts, operators)


def _parts(layer: Layer, matrices: LayerMatrices, pool: int) -> NDArray[np.int64] | None:
    norms = (layer.input_norm, layer.q_norm, layer.k_norm, layer.post_norm)
    addresses = [0 if norm is None else norm.data_ptr() for norm in norms]
    addresses.append(pool)
    for matrix in matrices:
        if not isinstance(matrix, Panels) or type(matrix) is not type(matrices.qkv):
            return None
        addresses += [*matrix.addresses, *matrix.size]
    return np.array([*addresses, matrices.gate_up.gates], np.int64)
