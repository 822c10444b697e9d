"""Where all operators are the project's own, a request's bits depend on nothing but the request: not on who else is in
the step, how it is cut into chunks and tiles, on how many threads it runs, or whether it was suspended."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.bench.exactness import USUAL, Bench
from headway.core.request import Request, Sampling
from headway.core.work import Segment
from headway.models.config import DecoderConfig, parse_config
from headway.models.weights import random_decoder
from headway.stages.panels import panels_for
from headway.stages.tiling import Rates, Tiling

SLOW = Rates(2e9, 1e9, 2e8, 1e9, 1e7, 1e7, 1e8)  # a device so slow that everything is cut
VOCABULARY = 512


def config() -> DecoderConfig:
    return parse_config(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": VOCABULARY,
            "hidden_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 640,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        }
    )


@pytest.fixture(scope="module", params=["bfloat16", "int8", "float32"])
def bench(request: pytest.FixtureRequest) -> Bench:
    integers = request.param == "int8"
    dtype = torch.bfloat16 if integers else getattr(torch, request.param)
    if panels_for(dtype, torch.device("cpu"), integers=integers) is None:
        pytest.skip("linear operators are another's here, who promises nothing")
    return Bench(random_decoder(config(), 0, dtype), USUAL, 400, served="int8" if integers else "none")


@settings(max_examples=25)
@given(
    length=st.integers(2, 200),
    company=st.lists(st.integers(1, 120), max_size=4),
    place=st.integers(0, 4),
    num_chunks=st.integers(1, 4),
    is_slow=st.booleans(),
    num_threads=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_a_request_has_bits_of_its_own(
    bench: Bench,
    length: int,
    company: list[int],
    place: int,
    num_chunks: int,
    is_slow: bool,
    num_threads: int,
    seed: int,
) -> None:
    """A prompt alone and whole, against the same in chunks, each among others' prompts; then a token of it, alone and
    among others' tokens. Logits, keys and values are compared bit for bit."""
    rng = random.Random(seed)
    tokens = [rng.randrange(VOCABULARY) for _ in range(length)]
    num_pages = -(-(length + 1) // bench.page_tokens)
    alone, mixed = range(num_pages), range(num_pages, 2 * num_pages)
    stage, logits = bench.stage, bench.sampler.logits
    with torch.inference_mode():
        segment = bench.prompt("alone", tokens, alone)
        first = bench.finish(stage.run(bench.work(segment)))["alone"]
        bench.finish(stage.run(bench.work(Segment("alone", (first,), length, length, tuple(alone), (0,)))))

        stage.tiling = Tiling(SLOW if is_slow else USUAL, 0.010)
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            stage.open(Request("mixed", tuple(tokens), 2, 0.0, sampling=Sampling(temperature=0.0)))
            others, free = [], 2 * num_pages
            for number, size in enumerate(company):
                pages = range(free, free + -(-(size + 1) // bench.page_tokens))
                others.append(bench.prompt(f"other{number}", [rng.randrange(VOCABULARY) for _ in range(size)], pages))
                free = pages.stop
            edges = sorted({0, length, *(rng.randrange(length) for _ in range(num_chunks - 1))})
            drawn: dict[str, int] = {}
            for start, end in pairwise(edges):
                asked = (end - start - 1,) if end == length else ()
                part = Segment("mixed", tuple(tokens[start:end]), start, start, tuple(mixed), asked)
                drawn |= bench.finish(stage.run(bench.work(*_among(part, others, place))))
            steps = [
                Segment(o.request_id, (drawn[o.request_id],), len(o.tokens), len(o.tokens), o.pages, (0,))
                for o in others
            ]
            token = Segment("mixed", (drawn["mixed"],), length, length, tuple(mixed), (0,))
            bench.finish(stage.run(bench.work(*_among(token, steps, place))))
        finally:
            torch.set_num_threads(before)
            stage.tiling = Tiling(USUAL, 0.010)
    assert all(torch.equal(a, b) for a, b in zip(logits["alone"], logits["mixed"], strict=True))
    used = bench.pool.blocks_PL2KSD[[*alone]], bench.pool.blocks_PL2KSD[[*mixed]]
    full, rest = divmod(length + 1, bench.page_tokens)
    assert torch.equal(used[0][:full], used[1][:full])
    assert torch.equal(used[0][full:, ..., :rest, :], used[1][full:, ..., :rest, :])
    logits.clear()


def _among(segment: Segment, others: list[Segment], place: int) -> list[Segment]:
    at = min(place, len(others))
    return [*others[:at], segment, *others[at:]]
