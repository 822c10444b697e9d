"""OpenVINO GenAI: its continuous batching pipeline, step by step."""

import itertools
import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from .protocol import Decoded, Load, Prompts, serve

CACHE_GB = 2


class OpenVino:
    def __init__(self, load: Load) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.max_num_batched_tokens = 8192  # prompts are read whole and together
        scheduler.max_num_seqs = load.batch
        scheduler.enable_prefix_caching = False
        settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": load.threads}
        self._pipeline = genai.ContinuousBatchingPipeline(load.model, scheduler, "CPU", settings)
        self._numbers = itertools.count()
        self.notes = f"INFERENCE_PRECISION_HINT bf16, {CACHE_GB} GB for keys and values in its own default precision"

    def prefill(self, prompts: Prompts) -> float:
        begun = time.perf_counter()
        handles = self._open(prompts, 1)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        seconds = time.perf_counter() - begun
        for handle in handles:
            handle.read_all()
        return seconds

    def decode(self, prompts: Prompts, steps: int) -> Decoded:
        handles = self._open(prompts, 1 + steps)
        tokens: list[list[int]] = [[] for _ in prompts]

        def step() -> bool:
            """Whether every prompt got one token."""
            self._pipeline.step()
            found = 0
            for handle, own in zip(handles, tokens, strict=True):
                if handle.can_read():
                    for output in handle.read().values():
                        own += output.generated_ids
                    found += 1
            return found == len(handles)

        while not all(tokens):
            step()
        seconds: list[float] = []
        while self._pipeline.has_non_finished_requests():
            begun = time.perf_counter()
            whole = step()
            if whole:
                seconds.append(time.perf_counter() - begun)
        return Decoded(seconds, tokens[0])

    def _open(self, prompts: Prompts, max_tokens: int) -> list[Any]:
        config = genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        return [
            self._pipeline.add_request(next(self._numbers), ov.Tensor(np.array([prompt], dtype=np.int64)), config)
            for prompt in prompts
        ]


if __name__ == "__main__":
    serve(OpenVino)
