"""llama.cpp through llama-cpp-python: `llama_decode` on batches of many sequences."""

import ctypes
import time
from collections.abc import Sequence
from typing import NamedTuple

import llama_cpp as native
import numpy as np

from .protocol import Decoded, Load, Prompts, serve

BATCH_TOKENS = 2048  # of a call of `llama_decode`; the library cuts it into pieces of 512, as it does by default


class Row(NamedTuple):
    """A token of a sequence, at a position; whether what follows it is asked for."""

    token: int
    position: int
    sequence: int
    is_last: bool


class LlamaCpp:
    def __init__(self, load: Load) -> None:
        native.llama_backend_init()
        model = native.llama_model_default_params()
        self._model = native.llama_model_load_from_file(load.model.encode(), model)
        if not self._model:
            raise RuntimeError(f"{load.model} cannot be loaded.")
        settings = native.llama_context_default_params()
        settings.n_ctx = load.longest * load.batch  # cells for keys and values, as many for each sequence
        settings.n_batch = BATCH_TOKENS
        settings.n_seq_max = load.batch
        settings.n_threads = settings.n_threads_batch = load.threads
        self._context = native.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context for this model.")
        self._memory = native.llama_get_memory(self._context)
        self._batch = native.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._vocab_size = load.vocab_size
        self.notes = "keys and values in float16, its default; built from source for this processor"

    def prefill(self, prompts: Prompts) -> float:
        native.llama_memory_clear(self._memory, True)
        begun = time.perf_counter()
        self._read(prompts)
        return time.perf_counter() - begun

    def decode(self, prompts: Prompts, steps: int) -> Decoded:
        native.llama_memory_clear(self._memory, True)
        last, seconds, first = self._read(prompts), [], []
        for number in range(steps):
            first.append(last[0])
            begun = time.perf_counter()
            rows = [Row(token, len(prompts[sequence]) + number, sequence, True) for sequence, token in enumerate(last)]
            last = [token for _, token in self._run(rows)]
            seconds.append(time.perf_counter() - begun)
        return Decoded(seconds, [*first, last[0]])

    def _read(self, prompts: Prompts) -> list[int]:
        """The first token of each prompt."""
        rows = [
            Row(token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        drawn: dict[int, int] = {}
        for start in range(0, len(rows), BATCH_TOKENS):
            drawn.update(self._run(rows[start : start + BATCH_TOKENS]))
        return [drawn[sequence] for sequence in range(len(prompts))]

    def _run(self, rows: Sequence[Row]) -> list[tuple[int, int]]:
        """Sequence and likeliest token, for every row that asked."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, row in enumerate(rows):
            batch.token[index] = row.token
            batch.pos[index] = row.position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row.sequence
            batch.logits[index] = row.is_last
        if (code := native.llama_decode(self._context, batch)) != 0:
            raise RuntimeError(f"llama_decode answered {code}.")
        return [(row.sequence, self._likeliest(index)) for index, row in enumerate(rows) if row.is_last]

    def _likeliest(self, index: int) -> int:
        logits = native.llama_get_logits_ith(self._context, index)
        pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(pointer, shape=(self._vocab_size,)).argmax())


if __name__ == "__main__":
    serve(LlamaCpp)
