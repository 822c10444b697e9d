"""Every family through pages, packs, prefix hits and suspensions, against transformers: 64 greedy tokens and logits."""

import pytest
import torch
from assembled import Assembled

from headway.core import event as ev
from headway.core.request import SLO, Request, Sampling

GREEDY = Sampling(temperature=0.0)
NUM_TOKENS = 64


def prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def greedy(name: str, tokens: tuple[int, ...], max_tokens: int = NUM_TOKENS, **more: object) -> ev.Arrived:
    return ev.Arrived(Request(name, tokens, max_tokens, 0.0, sampling=GREEDY, **more))  # type: ignore[arg-type]


@torch.inference_mode()
def expected(model, tokens: tuple[int, ...], count: int = NUM_TOKENS) -> tuple[list[int], torch.Tensor]:
    """What transformers says, one forward pass per token over the whole text."""
    text = list(tokens)
    logits = []
    for _ in range(count):
        logits.append(model(torch.tensor([text])).logits[0, -1])
        text.append(int(logits[-1].argmax()))
    return text[len(tokens) :], torch.stack(logits)


def check(engine: Assembled, model, name: str, tokens: tuple[int, ...]) -> None:
    answer, logits = expected(model, tokens, len(engine.answers[name]))
    assert engine.answers[name] == answer
    assert (torch.stack(engine.sampler.logits[name]) - logits).abs().max() < 1e-4


def test_a_pack_of_prompts(family, tiny, tiny_folder):
    """Four prompts of different lengths, one of a single token, share one prefill and then decode together."""
    engine = Assembled(tiny_folder(family))
    prompts = {f"r{length}": prompt(length, length) for length in (1, 9, 16, 30)}
    engine.run([(0, greedy(name, tokens)) for name, tokens in prompts.items()])
    assert engine.scheduler.counters["plans"] < 2 * NUM_TOKENS, "the prompts were not packed"
    for name, tokens in prompts.items():
        check(engine, tiny(family), name, tokens)


def test_a_prompt_suspended_for_others(family, tiny, tiny_folder):
    """A long prompt gives way to two urgent ones that arrive in the middle of it, and decodes beside them."""
    engine = Assembled(tiny_folder(family))
    long, first, second = prompt(150, 1), prompt(11, 2), prompt(5, 3)
    soon = SLO(ttft_s=20.0)
    engine.run(
        [
            (0, greedy("long", long)),
            (7, greedy("first", first, slo=soon)),
            (60, greedy("second", second, slo=soon)),
        ]
    )
    assert engine.records["long"].num_preemptions >= 2
    for name, tokens in {"long": long, "first": first, "second": second}.items():
        check(engine, tiny(family), name, tokens)


def test_a_prompt_whose_beginning_is_cached(family, tiny, tiny_folder):
    """The second prompt shares 40 tokens with the first; the third repeats the second and its whole answer."""
    engine = Assembled(tiny_folder(family))
    shared = prompt(40, 4)
    second = shared + prompt(9, 6)
    engine.run([(0, greedy("one", shared + prompt(7, 5)))])
    engine.run([(0, greedy("two", second))])
    assert engine.records["two"].num_cached_tokens == 40
    check(engine, tiny(family), "two", second)
    third = second + tuple(engine.answers["two"])
    engine.run([(0, greedy("three", third, max_tokens=16))])
    assert engine.records["three"].num_cached_tokens > len(second)
    check(engine, tiny(family), "three", third)


def test_memory_too_small_for_everybody(family, tiny, tiny_folder):
    """Eight requests where pages suffice for three: some lose theirs in mid-answer, none loses or changes a token."""
    engine = Assembled(tiny_folder(family), num_pages=34, prefix_caching=family != "qwen3")
    prompts = {f"r{number}": prompt(20 + number, number) for number in range(8)}
    engine.run([(0, greedy(name, tokens)) for name, tokens in prompts.items()])
    assert engine.scheduler.counters["recomputes"] > 0
    for name, tokens in prompts.items():
        assert engine.answers[name] == expected(tiny(family), tokens)[0]


@pytest.mark.parametrize("family", ["llama3-scaled", "qwen2", "mistral"])
def test_a_pack_goes_on_when_a_member_leaves(family, tiny, tiny_folder):
    """One of three packed prompts is cancelled in the first layer; the others' answers are as if it had never been."""
    engine = Assembled(tiny_folder(family))
    prompts = {"a": prompt(13, 1), "gone": prompt(17, 2), "b": prompt(8, 3)}
    letters: list[tuple[int, ev.Event]] = [(0, greedy(name, tokens)) for name, tokens in prompts.items()]
    engine.run([*letters, (3, ev.Cancelled("gone"))])
    assert engine.records["gone"].kind == "cancelled"
    assert engine.answers.get("gone", []) == []
    check(engine, tiny(family), "a", prompts["a"])
    check(engine, tiny(family), "b", prompts["b"])


def test_chunks_equal_the_whole_prompt(tiny, tiny_folder):
    """A prompt in three uneven chunks, mixed with another's tokens in the same step, gives the same logits."""
    from headway.core.work import Segment, Work

    engine = Assembled(tiny_folder("qwen3"))
    stage, long, other = engine.stage, prompt(50, 1), prompt(6, 2)
    for name, tokens in (("long", long), ("other", other)):
        stage.open(Request(name, tokens, 9, 0.0, sampling=GREEDY))
    pages, others_pages = tuple(range(10)), (20, 21)

    def finish(*segments: Segment) -> dict[str, int]:
        running = stage.run(Work(finish.count, "language", segments))  # type: ignore[attr-defined]
        finish.count += 1  # type: ignore[attr-defined]
        with torch.inference_mode():
            while True:
                try:
                    next(running)
                except StopIteration as stop:
                    return {commit.request_id: commit.tokens[0] for commit in stop.value.commits}

    finish.count = 1  # type: ignore[attr-defined]
    token = finish(Segment("other", other, 0, 0, others_pages, (5,)))["other"]
    for number, (start, end) in enumerate(((0, 3), (3, 20), (20, 50))):
        asked = (end - start - 1,) if end == 50 else ()
        chunk = Segment("long", long[start:end], start, start, pages, asked)
        got = finish(chunk, Segment("other", (token,), 6 + number, 6 + number, others_pages, (0,)))
        token = got["other"]
    check_tokens, logits = expected(tiny("qwen3"), long, 1)
    assert got["long"] == check_tokens[0]
    assert (engine.sampler.logits["long"][0] - logits[0]).abs().max() < 1e-4
    assert torch.stack(engine.sampler.logits["other"]).argmax(-1).tolist() == expected(tiny("qwen3"), other, 4)[0]


def test_a_token_that_breaks_the_model_is_not_handed_on_with_the_pages_before_it(tiny_folder):
    """One row of the embedding is no number. A prompt that holds it, in the middle, is read in pieces, the first of
    which draws nothing: it fails then and there, and whoever begins with the same sixteen tokens gets its answer."""
    shared, bad = prompt(16, 1), 7
    shared = tuple(token + (token == bad) for token in shared)
    good = (*shared, *(token + (token == bad) for token in prompt(10, 2)))
    alone = Assembled(tiny_folder("llama2"))
    alone.run([(0, greedy("good", good))])
    engine = Assembled(tiny_folder("llama2"), chunk_tokens=24)
    engine.stage.model.embedding_VE[bad] = float("nan")
    engine.run([(0, greedy("bad", (*shared, 9, bad, *prompt(20, 3)))), (10_000, greedy("good", good))])
    assert (engine.records["bad"].kind, engine.records["bad"].reason) == ("failed", "not_finite")
    assert "bad" not in engine.answers
    assert engine.answers["good"] == alone.answers["good"]
