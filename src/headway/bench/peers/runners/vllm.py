"""vLLM: its engine in this process, `LLMEngine.step` by step, with token ids."""

import itertools
import os
import time

from .protocol import Decoded, Load, Prompts, serve

CACHE_GB = 2


class Vllm:
    def __init__(self, load: Load) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # every step is this process's own
            "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GB),
            "VLLM_CPU_OMP_THREADS_BIND": "-".join(str(core) for core in (0, load.threads - 1)),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        from vllm import EngineArgs, LLMEngine, SamplingParams

        self._params = SamplingParams
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=load.model, dtype="bfloat16", skip_tokenizer_init=True, max_model_len=load.longest,
                max_num_seqs=load.batch, max_num_batched_tokens=8192, enable_prefix_caching=False,
            )
        )  # fmt: skip
        self._numbers = itertools.count()
        self.notes = f"compiled by torch's inductor, {CACHE_GB} GB for keys and values"

    def prefill(self, prompts: Prompts) -> float:
        begun = time.perf_counter()
        self._open(prompts, 1)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return time.perf_counter() - begun

    def decode(self, prompts: Prompts, steps: int) -> Decoded:
        ids = self._open(prompts, self._room(prompts, steps))
        tokens: dict[str, list[int]] = {each: [] for each in ids}

        def step() -> bool:
            """Whether every prompt got a token."""
            before = {each: len(tokens[each]) for each in ids}
            for output in self._engine.step():
                tokens[output.request_id] = list(output.outputs[0].token_ids)
            return all(len(tokens[each]) > before[each] for each in ids)

        while not all(tokens.values()):
            step()
        seconds: list[float] = []
        while len(seconds) < steps and self._engine.has_unfinished_requests():
            begun = time.perf_counter()
            if step():
                seconds.append(time.perf_counter() - begun)
        self._engine.abort_request(ids)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return Decoded(seconds, tokens[ids[0]])

    @staticmethod
    def _room(prompts: Prompts, steps: int) -> int:
        """Those read first draw tokens until the last is read."""
        return steps + 2 + len(prompts)

    def _open(self, prompts: Prompts, max_tokens: int) -> list[str]:
        params = self._params(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        ids = [str(next(self._numbers)) for _ in prompts]
        for each, prompt in zip(ids, prompts, strict=True):
            self._engine.add_request(each, {"prompt_token_ids": prompt}, params)
        return ids


if __name__ == "__main__":
    serve(Vllm)
