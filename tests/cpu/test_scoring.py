"""How likely a prompt's own tokens were: the same as transformers says, however the prompt was read."""

import math

import pytest
import torch
from assembled import Assembled

from headway.core import event as ev
from headway.core.request import SLO, Request, Sampling
from headway.stages import step

TOLERANCE = 2e-5  # of a log-probability, in float32


def prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def scored(name: str, tokens: tuple[int, ...], max_tokens: int = 1, top: int = 1, **more: object) -> ev.Arrived:
    sampling = Sampling(temperature=0.0, num_logprobs=top, num_prompt_logprobs=top)
    return ev.Arrived(Request(name, tokens, max_tokens, 0.0, sampling=sampling, **more))  # type: ignore[arg-type]


def plain(name: str, tokens: tuple[int, ...], max_tokens: int = 4, **more: object) -> ev.Arrived:
    return ev.Arrived(Request(name, tokens, max_tokens, 0.0, sampling=Sampling(temperature=0.0), **more))  # type: ignore[arg-type]


@torch.inference_mode()
def check(engine: Assembled, model, name: str, tokens: tuple[int, ...], top: int = 1) -> None:
    """Every token of the prompt but the first, once: its log-probability, and the best ones in its place."""
    expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    scores = engine.scores.get(name, [])
    assert len(scores) == len(tokens) - 1
    for place, score in enumerate(scores):
        assert score.logprob == pytest.approx(float(expected[place, tokens[place + 1]]), abs=TOLERANCE)
        best = expected[place].topk(top)
        assert [token for token, _ in score.top] == best.indices.tolist()
        assert [logprob for _, logprob in score.top] == pytest.approx(best.values.tolist(), abs=TOLERANCE)


def test_a_pack_of_scored_prompts(family, tiny, tiny_folder):
    """Four lengths share a prefill, two of them only to be scored; a fifth, which nobody scores, is among them."""
    engine = Assembled(tiny_folder(family))
    prompts = {f"r{length}": prompt(length, length) for length in (1, 2, 17, 30)}
    letters = [(0, scored(name, tokens, len(name) - 2, top=3)) for name, tokens in prompts.items()]
    engine.run([*letters, (0, plain("plain", prompt(9, 9)))])
    assert engine.scheduler.counters["plans"] < 12, "the prompts were not packed"
    for name, tokens in prompts.items():
        check(engine, tiny(family), name, tokens, top=3)
        assert (engine.records[name].kind, engine.records[name].reason) == ("finished", "length")
        assert len(engine.answers.get(name, [])) == len(name) - 2
    assert engine.scores["plain"] == []


@pytest.mark.parametrize("place", ["layers", "logits"])
def test_a_scored_prompt_that_is_suspended(family, place, tiny, tiny_folder):
    """A long one gives way to another that cannot wait, in its first layers or between two blocks of its logits."""
    long = prompt(150, 1)
    alone, engine = Assembled(tiny_folder(family)), Assembled(tiny_folder(family))
    alone.run([(0, scored("long", long))])
    stop = 60 if place == "layers" else alone.driver.num_tiles - 4
    engine.run([(0, scored("long", long)), (stop, plain("urgent", prompt(5, 3), slo=SLO(ttft_s=6.2)))])
    assert engine.records["long"].num_preemptions == 1
    assert engine.scores["long"] == alone.scores["long"], "suspending changed a bit"
    check(engine, tiny(family), "long", long)


def test_a_prompt_scored_in_chunks(family, tiny, tiny_folder):
    """Sixteen tokens a step, others' tokens among them: what a chunk's last row says is of the next chunk's first."""
    engine = Assembled(tiny_folder(family), chunk_tokens=16)
    long, short = prompt(70, 4), prompt(20, 5)
    engine.run([(0, plain("beside", prompt(6, 6), 12)), (1, scored("long", long)), (2, scored("short", short, 0))])
    check(engine, tiny(family), "long", long)
    check(engine, tiny(family), "short", short)
    assert engine.answers["short"] == []


@pytest.mark.parametrize("family", ["llama3-scaled", "qwen2"])
def test_no_row_is_skipped_by_a_cached_beginning(family, tiny, tiny_folder):
    """The prompt lies in the cache as a whole. Scored it is read anew, and then serves others as before."""
    engine = Assembled(tiny_folder(family))
    tokens = prompt(41, 7)
    engine.run([(0, plain("before", tokens))])
    engine.run([(0, scored("scored", tokens))])
    engine.run([(0, plain("after", tokens))])
    assert engine.records["scored"].num_cached_tokens == 0
    assert engine.records["after"].num_cached_tokens == 40
    check(engine, tiny(family), "scored", tokens)


@pytest.mark.parametrize("family", ["llama3-scaled", "qwen2"])
def test_what_is_computed_again_is_not_told_again(family, tiny, tiny_folder):
    """Pages suffice for three of eight: some lose theirs in mid-answer and read their prompts twice."""
    engine = Assembled(tiny_folder(family), num_pages=34)
    prompts = {f"r{number}": prompt(20 + number, number) for number in range(8)}
    engine.run([(0, scored(name, tokens, 64)) for name, tokens in prompts.items()])
    assert engine.scheduler.counters["recomputes"] > 0
    for name, tokens in prompts.items():
        check(engine, tiny(family), name, tokens)
        assert len(engine.answers[name]) == 64


def test_the_logits_of_a_prompt_are_never_all_there(tiny, tiny_folder, monkeypatch):
    """A prompt of 90 is scored seven rows at a time; with several members in the step, a row for each."""
    monkeypatch.setattr(step, "MAX_LOGITS_BYTES", 7 * 131 * 4 + 5)
    engine = Assembled(tiny_folder("llama2"))
    made = []
    draw = engine.sampler.draw
    monkeypatch.setattr(
        engine.sampler,
        "draw",
        lambda logits, *rest: made.append(logits.untyped_storage().nbytes()) or draw(logits, *rest),
    )
    tokens = prompt(90, 8)
    engine.run([(0, scored("r", tokens))])
    assert max(made) == 7 * 131 * 4
    check(engine, tiny("llama2"), "r", tokens)


def test_a_request_that_is_only_scored_needs_no_more_than_its_prompt(tiny_folder):
    """No token is drawn: what is told of the prompt counts as the first. A single token has no score at all."""
    engine = Assembled(tiny_folder("llama2"))
    engine.run([(0, scored("r", prompt(12, 1), 0, slo=SLO(ttft_s=9.0, total_s=99.0))), (0, scored("one", (5,), 0))])
    record = engine.records["r"]
    assert (record.num_output_tokens, record.first_token, record.missed) == (0, 0.0, {})
    assert "one" not in engine.scores
    assert engine.records["one"].reason == "length"


def test_a_prompt_that_breaks_the_model_fails_alone(tiny_folder):
    """One row that is not finite, in the midst of a prompt: that request fails, its neighbour in the pack does not."""
    engine = Assembled(tiny_folder("llama2"))
    draw = engine.sampler.draw

    def broken(logits, request_ids, positions):
        for row, (request_id, position) in enumerate(zip(request_ids, positions, strict=True)):
            if (request_id, position) == ("bad", 5):
                logits[row, 7] = math.nan
        return draw(logits, request_ids, positions)

    engine.sampler.draw = broken  # type: ignore[method-assign]
    engine.run([(0, scored("bad", prompt(12, 1))), (0, scored("good", prompt(9, 2)))])
    assert (engine.records["bad"].kind, engine.records["bad"].reason) == ("failed", "not_finite")
    assert engine.scores.get("bad", []) == []
    assert len(engine.scores["good"]) == 8
