"""Vectors of prompts against transformers' hidden states, however the prompts were read."""

import pytest
import torch
from assembled import Assembled
from test_scoring import plain, prompt

from headway.core import event as ev
from headway.core.request import SLO, Pooling, Request
from headway.core.work import Segment
from headway.stages.pooling import Pooler

POOLINGS = ["mean", "last"]


def pooled(name: str, tokens: tuple[int, ...], pooling: Pooling = "mean", **more: object) -> ev.Arrived:
    return ev.Arrived(Request(name, tokens, 0, 0.0, pooling=pooling, **more))  # type: ignore[arg-type]


@torch.inference_mode()
def expected(model, tokens: tuple[int, ...], pooling: Pooling) -> torch.Tensor:
    hidden = model.model(torch.tensor([tokens])).last_hidden_state[0]
    vector = hidden.double().mean(0) if pooling == "mean" else hidden[-1].double()
    return vector / vector.norm()


def check(engine: Assembled, model, name: str, tokens: tuple[int, ...], pooling: Pooling) -> None:
    found = torch.tensor(engine.vectors[name]).double()
    assert torch.allclose(found, expected(model, tokens, pooling), atol=2e-6)
    record = engine.records[name]
    assert (record.kind, record.reason, record.num_output_tokens) == ("finished", "length", 0)
    assert record.first_token is not None


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_pack_of_texts(family, pooling, tiny, tiny_folder):
    """Several lengths share a prefill, and with them a prompt that is answered."""
    engine = Assembled(tiny_folder(family))
    texts = {f"r{length}": prompt(length, length) for length in (1, 2, 17, 30)}
    engine.run([*((0, pooled(name, tokens, pooling)) for name, tokens in texts.items()), (0, plain("p", prompt(9, 9)))])
    assert engine.scheduler.counters["plans"] < 12, "the texts were not packed"
    for name, tokens in texts.items():
        check(engine, tiny(family), name, tokens, pooling)
    assert len(engine.answers["p"]) == 4
    assert "p" not in engine.vectors


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_text_that_is_suspended_or_in_company_has_the_same_bits(pooling, tiny, tiny_folder):
    """A long one gives way in its layers; another is read in a pack. Neither shows in a bit."""
    long = prompt(150, 1)
    alone, engine, pack = (Assembled(tiny_folder("llama2")) for _ in range(3))
    alone.run([(0, pooled("long", long, pooling))])
    engine.run([(0, pooled("long", long, pooling)), (60, plain("urgent", prompt(5, 3), slo=SLO(ttft_s=6.2)))])
    assert engine.records["long"].num_preemptions == 1
    assert engine.vectors["long"] == alone.vectors["long"]
    check(engine, tiny("llama2"), "long", long, pooling)
    short = prompt(20, 2)
    alone.run([(0, pooled("short", short, pooling))])
    pack.run([(0, pooled("short", short, pooling)), (0, pooled("other", prompt(21, 4), pooling))])
    assert torch.allclose(torch.tensor(pack.vectors["short"]), torch.tensor(alone.vectors["short"]), atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_text_read_in_chunks(family, pooling, tiny, tiny_folder):
    """Sixteen tokens a step, others' tokens among them."""
    engine = Assembled(tiny_folder(family), chunk_tokens=16)
    long = prompt(70, 4)
    engine.run([(0, plain("beside", prompt(6, 6), 12)), (1, pooled("long", long, pooling))])
    check(engine, tiny(family), "long", long, pooling)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_only_the_mean_needs_what_is_cached(pooling, tiny, tiny_folder):
    engine = Assembled(tiny_folder("llama2"))
    tokens = prompt(41, 7)
    engine.run([(0, plain("before", tokens))])
    engine.run([(0, pooled("text", tokens, pooling))])
    assert engine.records["text"].num_cached_tokens == (0 if pooling == "mean" else 40)
    check(engine, tiny("llama2"), "text", tokens, pooling)


def test_a_piece_that_comes_again_counts_once():
    """After a step that was given up, and after all pages were lost and other pieces come."""
    pooler = Pooler()
    request = Request("r", tuple(range(10)), 0, 0.0, pooling="mean")
    pooler.open(request)

    def piece(start: int, end: int) -> Segment:
        return Segment("r", request.prompt[start:end], start, start, (), ())

    def ones(start: int, end: int) -> torch.Tensor:
        return torch.tensor([float(end - start), float(sum(range(start, end)))], dtype=torch.float64)

    for start, end in ((0, 4), (4, 6), (4, 6), (0, 3), (3, 10)):
        commit = pooler.take(piece(start, end), ones(start, end))
    assert commit is not None
    assert commit.vector == pytest.approx([10 / 2125**0.5, 45 / 2125**0.5])
    pooler.close("r")
    assert pooler.wanted(piece(0, 4)) is None


def test_a_text_that_breaks_the_model_fails_alone(tiny_folder):
    """Hidden states that are no numbers: that request fails, its neighbour in the pack does not."""
    engine = Assembled(tiny_folder("llama2"))
    take = engine.stage.pooler.take
    engine.stage.pooler.take = lambda segment, sum_E: take(  # type: ignore[method-assign]
        segment, sum_E * float("nan") if segment.request_id == "bad" else sum_E
    )
    engine.run([(0, pooled("bad", prompt(12, 1))), (0, pooled("good", prompt(9, 2)))])
    assert (engine.records["bad"].kind, engine.records["bad"].reason) == ("failed", "not_finite")
    assert set(engine.vectors) == {"good"}
