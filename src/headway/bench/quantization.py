"""What eight-bit integers cost in quality and gain in time: `python -m headway.bench.quantization`.

Quality on the embedded model, through the engine that serves: how surprised it is by text that it was not trained on,
and how far its greedy answers are the same. Time on published shapes with random weights, both engines in turn.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.progress import track

from headway.bench import report
from headway.bench.calm import Calm
from headway.config import EngineSettings
from headway.core.cost import Share
from headway.llm import LLM, SamplingParams
from headway.placement.calibrate import step_s
from headway.placement.engine import build_engine
from headway.stages.panels import panels_for
from headway.train.data import split, standard_library

COMMAND = "python -m headway.bench.quantization"
HELD_OUT_SHARE = 0.04  # the embedded model's own split
WINDOW = 1024  # tokens that are scored together
SHAPES = {
    "a prompt of 128": (Share(128, 0),),
    "a prompt of 512": (Share(512, 0),),
    "a prompt of 2048": (Share(2048, 0),),
    "a token of 1 behind 512": (Share(1, 512),),
    "a token each of 4": (Share(1, 512),) * 4,
    "a token each of 16": (Share(1, 512),) * 16,
}


def surprise(llm: LLM, windows: Sequence[Sequence[int]]) -> float:
    """Nats per token."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    answers = llm.generate(windows, params)
    scores = [each.logprob for answer in answers for each in answer.prompt_logprobs]
    return -sum(scores) / len(scores)


def greedy(llm: LLM, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    return [answer.token_ids for answer in llm.generate(prompts, params)]


def same_tokens(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """From the beginning on."""
    return next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))


def quality(num_windows: int, num_prompts: int, num_tokens: int) -> str:
    """The embedded model in both."""
    found: dict[str, tuple[float, list[list[int]]]] = {}
    for name in ("none", "int8"):
        with LLM(dtype="bfloat16", quantization=name, max_model_len=2048, enable_prefix_caching=False) as llm:
            documents = split(standard_library(), HELD_OUT_SHARE).held_out
            ids = [token for document in documents for token in llm.tokenizer.encode(document.text)]
            windows = [ids[n : n + WINDOW] for n in range(0, len(ids) - WINDOW, WINDOW)][:num_windows]
            prompts = [window[:64] for window in windows][:num_prompts]
            found[name] = surprise(llm, windows), greedy(llm, prompts, num_tokens)
    (plain_s, plain), (int8_s, int8) = found["none"], found["int8"]
    kept = [same_tokens(a, b) for a, b in zip(int8, plain, strict=True)]
    first = sum(n > 0 for n in kept) / len(kept)
    return (
        f"Held-out text of the embedded model, {len(windows)} windows of {WINDOW} tokens: {plain_s:.4f} nats a token "
        f"in bfloat16, {int8_s:.4f} in int8 ({int8_s - plain_s:+.4f}). Greedy answers of {num_tokens} tokens to "
        f"{len(kept)} prompts: the first token is the same in {first:.0%}, and so are {statistics.median(kept):.0f} "
        f"from the beginning on (median); {sum(n == num_tokens for n in kept)} answers are the same to their end."
    )


def speed(model: str, num_pairs: int, calm: Calm) -> list[list[str]]:
    """Steps of one shape in both, A B B A."""
    engines = [
        build_engine(
            EngineSettings(
                model=model, dtype="bfloat16", quantization=name, max_model_len=2560, max_num_seqs=16,
                enable_prefix_caching=False,
            )
        )
        for name in ("none", "int8")
    ]  # fmt: skip
    rows = []
    with torch.inference_mode():
        for case, shape in track(SHAPES.items(), description=model):
            taken: list[list[float]] = [[], []]
            for engine in engines:
                step_s(engine.stage, shape)
            for number in range(num_pairs):
                for which in (0, 1) if number % 2 == 0 else (1, 0):
                    taken[which].append(calm.measure(partial(step_s, engines[which].stage, shape)))
            ratios = [a / b for a, b in zip(*taken, strict=True)]
            plain, int8 = (1e3 * statistics.median(each) for each in taken)
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"
            rows.append([model.removeprefix("random:"), case, f"{plain:.1f}", f"{int8:.1f}", spread])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="*", default=["random:smollm2-135m", "random:qwen2.5-0.5b"])
    parser.add_argument("--windows", type=int, default=40, help="of held-out text")
    parser.add_argument("--prompts", type=int, default=32, help="that are answered greedily")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=report.RESULTS, help="where the page is written")
    options = parser.parse_args(arguments)
    if panels_for(torch.bfloat16, torch.device("cpu"), integers=True) is None:
        sys.exit("This needs a CPU and compiled operators: install a C++ compiler and Headway again.")
    told = quality(options.windows, options.prompts, options.tokens)
    calm = Calm()
    rows = [row for model in options.models for row in speed(model, options.pairs, calm)]
    header = ["model", "step", "bfloat16, ms", "int8, ms", "times as fast (least … most)"]
    report.write(
        "quantization",
        "int8",
        report.command(COMMAND, arguments),
        f"Weights as integers of eight bits with a scale for each output, made at load from bfloat16; the rows of "
        f"every call likewise, with a scale for each. All matrices, the head included; embeddings, norms, attention, "
        f"keys and values stay bfloat16.\n\n{told}\n\n{report.table(header, rows)}\n\n"
        f"{options.pairs} pairs of each. {calm.verdict()}",
        options.folder,
    )


if __name__ == "__main__":
    main()
