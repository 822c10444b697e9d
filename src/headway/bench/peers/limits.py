"""What this machine does at best, in a process of its own: `python -m headway.bench.peers.limits THREADS`."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from headway.bench.calm import Calm
from headway.bench.linear import read_rate
from headway.models.config import DecoderConfig

SIDE = 2048  # of the matrices whose product is the ceiling


class Limits(NamedTuple):
    """In a second: bfloat16 and int8 operations of large products, bytes read."""

    bf16: float
    int8: float
    read: float

    def operations(self, precision: str) -> float:
        return self.int8 if precision == "int8" else self.bf16


def measured(num_threads: int) -> Limits:
    """By a process that is gone afterwards, as an engine's is."""
    command = [sys.executable, "-m", "headway.bench.peers.limits", str(num_threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Limits(**json.loads(done.stdout.splitlines()[-1]))


def together(found: list[Limits]) -> Limits:
    """Of several measurements the best: what a limit was once, it is."""
    return Limits(*(max(each) for each in zip(*found, strict=True)))


def operations(config: DecoderConfig, lengths: list[int]) -> float:
    """Of reading prompts: linear operators for all tokens, the head for the last, causal attention."""
    total = 0.0
    for length in lengths:
        total += 2.0 * _layer_weights(config) * length + 2.0 * config.vocab_size * config.hidden_size
        total += 2.0 * config.num_layers * config.q_size * length**2
    return total


def prefill_s(config: DecoderConfig, lengths: list[int], precision: str, limits: Limits) -> float:
    """The least seconds of reading prompts."""
    return operations(config, lengths) / limits.operations(precision)


def decode_s(config: DecoderConfig, batch: int, context: int, precision: str, limits: Limits) -> float:
    """The least seconds of a step: every weight once, every key and value (in bfloat16) once, or the products."""
    weights = _layer_weights(config) + config.vocab_size * config.hidden_size
    cached = 4.0 * config.num_layers * config.kv_size * batch * (context + 1)
    read_s = (weights * (1 if precision == "int8" else 2) + cached) / limits.read
    products = 2.0 * weights * batch + 4.0 * config.num_layers * config.q_size * batch * (context + 1)
    return max(read_s, products / limits.operations(precision))


def _layer_weights(config: DecoderConfig) -> int:
    attention = config.hidden_size * (2 * config.q_size + 2 * config.kv_size)
    return config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def _best_rate(product: Callable[[], object]) -> float:
    """Operations in a second, in the best of several calls."""
    best = float("inf")
    for _ in range(12):
        begun = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - begun)
    return 2.0 * SIDE**3 / best


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    a, b = (torch.randn(SIDE, SIDE).bfloat16() for _ in range(2))
    i, j = (torch.randint(-127, 128, (SIDE, SIDE), dtype=torch.int8) for _ in range(2))
    limits = Limits(_best_rate(lambda: a @ b), _best_rate(lambda: torch._int_mm(i, j)), read_rate(Calm()))
    print(json.dumps(limits._asdict()))


if __name__ == "__main__":
    main()
