"""A whole engine under constraints: random weights, temperature 1, suspended, recomputed, packed. Oracles judge."""

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from assembled import Assembled

from headway.core import event as ev
from headway.core.request import SLO, Constraint, Request, Sampling
from headway.grammar.limits import ConstraintError
from headway.grammar.matcher import Compiler
from headway.models.tokenizer import open_model_text
from headway.stages.sample import Sampler

TOKENIZER = open_model_text(None).tokenizer
COMPILER = Compiler(TOKENIZER.source, TOKENIZER.vocab_size, TOKENIZER.eos_ids)
POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": -100, "maximum": 100},
        "tags": {"type": "array", "items": {"enum": ["red", "grün", None]}, "maxItems": 3},
        "name": {"type": "string", "maxLength": 6},
    },
    "required": ["x", "name"],
    "additionalProperties": False,
}
JSON = Constraint("json", json.dumps(POINT))
PATTERN = Constraint("regex", "[ab]{3}c*(ü|😀)")
EITHER = Constraint("choice", '["yes", "no", "perhaps not"]')
KINDS = (JSON, PATTERN, EITHER)
TinyFolder = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tiny_folder: TinyFolder) -> Path:
    return tiny_folder("llama2", vocab_size=TOKENIZER.vocab_size)


def engine(folder: Path, **options: Any) -> Assembled:
    return Assembled(folder, make_matcher=COMPILER.matcher, **options)


def request(name: str, constraint: Constraint | None, *, seed: int = 0, **options: Any) -> Request:
    sampling = Sampling(seed=seed, constraint=constraint, num_logprobs=options.pop("num_logprobs", None))
    prompt = tuple(random.Random(name).randrange(5, 4096) for _ in range(options.pop("num_prompt", 9)))
    options = {"max_tokens": 200, "stop_ids": TOKENIZER.eos_ids} | options
    return Request(name, prompt, arrival=0.0, sampling=sampling, **options)


def text(tokens: list[int]) -> str:
    return TOKENIZER.decode([token for token in tokens if token not in TOKENIZER.eos_ids], skip_special_tokens=False)


def conforms(answer: str, constraint: Constraint) -> bool:
    if constraint.kind == "json":
        jsonschema.validate(json.loads(answer), POINT)
        return True
    if constraint.kind == "regex":
        return bool(re.fullmatch(constraint.text, answer))
    return answer in json.loads(constraint.text)


def test_every_answer_conforms_whatever_is_around_it(folder: Path) -> None:
    """Constrained and free requests share prefills and steps; what is complete ends, and ends as finished."""
    several = engine(folder, num_pages=512)
    asked = [request(f"{kind.kind}-{seed}", kind, seed=seed) for seed in range(6) for kind in KINDS]
    free = [request(f"free-{seed}", None, seed=seed, max_tokens=20) for seed in range(4)]
    several.run([(0, ev.Arrived(one)) for one in [*asked, *free]])
    for one in asked:
        assert one.sampling.constraint is not None
        assert (several.records[one.id].kind, several.records[one.id].reason) == ("finished", "stop")
        assert conforms(text(several.answers[one.id]), one.sampling.constraint)
    assert all(several.records[one.id].kind == "finished" for one in free)


def alone(folder: Path, one: Request) -> list[int]:
    """Its answer, when nobody else is there."""
    by_itself = engine(folder)
    by_itself.run([(0, ev.Arrived(one))])
    return by_itself.answers[one.id]


def test_what_is_computed_again_goes_on_as_it_had_begun(folder: Path) -> None:
    """There are too few pages for all: some lose theirs in mid-answer."""
    asked = [request(f"json-{seed}", JSON, seed=seed) for seed in range(8)]
    asked += [request(f"regex-{seed}", PATTERN, seed=seed) for seed in range(4)]
    crowded = engine(folder, num_pages=26, page_tokens=4)
    crowded.run([(0, ev.Arrived(one)) for one in asked])
    assert crowded.scheduler.counters["recomputes"] > 0
    assert crowded.answers == {one.id: alone(folder, one) for one in asked}


@pytest.mark.parametrize("stop", [60, 120, 200])
def test_who_gives_way_and_who_goes_before_are_both_held(folder: Path, stop: int) -> None:
    """A long prompt is suspended for one that cannot wait, while others are in the midst of their answers."""
    long = request("long", JSON, num_prompt=150)
    urgent = request("urgent", PATTERN, num_prompt=5, slo=SLO(ttft_s=6.2))
    beside = [request(f"beside-{seed}", JSON, seed=seed) for seed in range(2)]
    several = engine(folder)
    several.run([(0, ev.Arrived(long)), (stop, ev.Arrived(urgent)), *((stop + 5, ev.Arrived(one)) for one in beside)])
    assert several.records["long"].num_preemptions > 0
    assert several.answers == {one.id: alone(folder, one) for one in (long, urgent, *beside)}


def test_what_a_step_that_was_given_up_had_drawn_is_taken_back() -> None:
    """Redrawn from any position on, by the same logits, an answer is the same."""
    generator = torch.Generator().manual_seed(1)
    logits_RV = torch.randn(400, TOKENIZER.vocab_size, generator=generator)
    for seed in range(5):
        sampler = Sampler(TOKENIZER.vocab_size, COMPILER.matcher)
        sampler.open(one := request("a", JSON, seed=seed))
        first = len(one.prompt)
        drawn = []
        for place in range(400):
            (commit,) = sampler.draw(logits_RV[place : place + 1], ["a"], [first + place])
            drawn.append(commit)
            if commit.complete:
                break
        assert drawn[-1].complete
        for start in (len(drawn) - 1, len(drawn) // 2, 0):
            again = [
                sampler.draw(logits_RV[place : place + 1], ["a"], [first + place])[0]
                for place in range(start, len(drawn))
            ]
            assert again == drawn[start:]


def test_logprobs_are_those_of_the_raw_logits(folder: Path) -> None:
    several = engine(folder)
    one = request("a", EITHER, num_logprobs=2)
    told = []
    tell = several._tell

    def listen(effect: ev.Admit | ev.Deliver | ev.End) -> None:
        if isinstance(effect, ev.Deliver):
            told.extend(effect.commit.logprobs)
        tell(effect)

    several._tell = listen  # type: ignore[method-assign]
    several.run([(0, ev.Arrived(one))])
    assert len(told) == len(several.answers["a"])
    for logits_V, token, about in zip(several.sampler.logits["a"], several.answers["a"], told, strict=True):
        expected = torch.log_softmax(logits_V.double(), 0)
        assert math.isclose(about.logprob, float(expected[token]), abs_tol=1e-4)
        assert [token for token, _ in about.top] == expected.topk(2).indices.tolist()


def test_the_end_comes_with_the_last_token_and_only_then(folder: Path) -> None:
    """Whatever `ignore_eos` (no stop ids) and min_tokens would have: nothing may follow. max_tokens cuts; an end that
    comes with the last token allowed is an end, not a cut."""
    several = engine(folder)
    exact = Constraint("regex", "abc")
    num_tokens = 3  # a, b, c, or fewer
    asked = {
        "no-stop": request("no-stop", exact, stop_ids=()),
        "longer": request("longer", exact, min_tokens=50),
        "fitting": request("fitting", Constraint("regex", "a"), max_tokens=1),
        "cut": request("cut", Constraint("regex", "[ab]{100}"), max_tokens=7),
        "open-end": request("open-end", Constraint("regex", "a{2,300}"), min_tokens=9),
    }
    several.run([(0, ev.Arrived(one)) for one in asked.values()])
    reasons = {name: several.records[name].reason for name in asked}
    assert reasons | {"open-end": ""} == dict.fromkeys(asked, "stop") | {"cut": "length", "open-end": ""}
    for name in ("no-stop", "longer"):
        assert text(several.answers[name]) == "abc"
        assert len(several.answers[name]) <= num_tokens
    assert len(several.answers["cut"]) == 7
    assert len(several.answers["open-end"]) >= 9


def test_greedy_answers_conform_too(folder: Path) -> None:
    several = engine(folder)
    asked = [
        Request(f"g-{kind.kind}", (5, 6, 7), 200, 0.0, sampling=Sampling(temperature=0, constraint=kind))
        for kind in KINDS
    ]
    several.run([(0, ev.Arrived(one)) for one in asked])
    finished = [one for one in asked if several.records[one.id].reason == "stop"]
    assert len(finished) >= 2
    assert all(conforms(text(several.answers[one.id]), one.sampling.constraint or JSON) for one in finished)


def test_a_constraint_that_cannot_go_on_costs_nobody_but_its_own_request(folder: Path) -> None:
    """Broken source, a grammar that no token can begin, and one that grows too costly; their neighbours go on."""
    several = engine(folder)
    costly = Constraint("regex", "[ab]*a[ab]{30}c")
    bad = {"broken": Constraint("regex", "("), "costly": costly}
    asked = [request(name, constraint, max_tokens=480) for name, constraint in bad.items()]
    several.run([(0, ev.Arrived(one)) for one in [*asked, request("good", EITHER), request("free", None)]])
    assert (several.records["broken"].kind, several.records["broken"].reason) == ("failed", "constraint_failed")
    assert "unclosed group" in several.records["broken"].message
    assert several.records["costly"].reason in ("constraint_failed", "length", "stop")
    assert several.records["good"].reason == "stop"
    assert several.records["free"].kind == "finished"


def test_an_engine_without_the_extra_says_so(folder: Path) -> None:
    without = Assembled(folder)
    without.run([(0, ev.Arrived(request("a", EITHER))), (0, ev.Arrived(request("b", None, max_tokens=5)))])
    assert without.records["a"].reason == "constraint_failed"
    assert "install headway[grammar]" in without.records["a"].message
    assert without.records["b"].kind == "finished"


class Stuck:
    """Allows nothing after its first token, or finds that it has become too costly."""

    def __init__(self, complaint: str = "") -> None:
        self.is_complete = False
        self.num_accepted = 0
        self._complaint = complaint

    def allowed(self) -> Any:
        if self.num_accepted and self._complaint:
            raise ConstraintError(self._complaint)
        return torch.full((TOKENIZER.vocab_size,), not self.num_accepted).numpy()

    def accept(self, token: int) -> None:
        self.num_accepted += 1

    def rollback(self, num_tokens: int) -> None:
        self.num_accepted -= num_tokens


@pytest.mark.parametrize(
    ("complaint", "words"), [("", "Nothing that the constraint allows"), ("Too costly.", "Too costly.")]
)
def test_in_the_midst_of_an_answer_it_fails_with_its_own_reason(folder: Path, complaint: str, words: str) -> None:
    several = Assembled(folder, make_matcher=lambda constraint: Stuck(complaint))
    several.run([(0, ev.Arrived(request("a", EITHER))), (0, ev.Arrived(request("b", None, max_tokens=5)))])
    assert (several.records["a"].kind, several.records["a"].reason) == ("failed", "constraint_failed")
    assert words in several.records["a"].message
    assert len(several.answers["a"]) == 1
    assert several.records["b"].kind == "finished"
