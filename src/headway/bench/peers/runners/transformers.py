"""Transformers: a forward call with a cache, and an argmax."""

import time
from typing import Any

import torch
import transformers as library

from .protocol import Decoded, Load, Prompts, serve


class Transformers:
    def __init__(self, load: Load) -> None:
        torch.set_num_threads(load.threads)
        classes: Any = library.AutoModelForCausalLM
        self._model = classes.from_pretrained(load.model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        self.notes = "eager, attention by sdpa; prompts of unlike lengths one after another, padded would be slower"

    @torch.inference_mode()
    def prefill(self, prompts: Prompts) -> float:
        begun = time.perf_counter()
        for prompt in prompts:
            self._forward(torch.tensor([prompt]), library.DynamicCache())
        return time.perf_counter() - begun

    @torch.inference_mode()
    def decode(self, prompts: Prompts, steps: int) -> Decoded:
        cache = library.DynamicCache()
        last = self._forward(torch.tensor(prompts), cache)
        seconds, first = [], [last[0]]
        for _ in range(steps):
            begun = time.perf_counter()
            last = self._forward(torch.tensor(last)[:, None], cache)
            seconds.append(time.perf_counter() - begun)
            first.append(last[0])
        return Decoded(seconds, first)

    def _forward(self, tokens_BT: torch.Tensor, cache: library.DynamicCache) -> list[int]:
        """The likeliest token behind each row."""
        found = self._model(tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        drawn: list[int] = found.logits[:, -1].argmax(-1).tolist()
        return drawn


if __name__ == "__main__":
    serve(Transformers)
