"""`headway.LLM` as a script uses it: the embedded model, options, streams, errors."""

import gc
import json
import os
import re
import threading

import jsonschema
import pytest

from headway import LLM, SamplingParams, StructuredOutputsParams
from headway.config import ConfigError
from headway.core.request import SLO
from headway.models.config import ModelError
from headway.server.errors import ApiError
from headway.server.schema import CompletionBody, decode

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def llm():
    return LLM(num_threads=1, dtype="float32", max_model_len=512)


def test_answers_come_in_the_order_of_the_prompts(llm):
    prompts = ["import os\n", "def main():\n", "class A:\n    def __init__(self"]
    together = llm.generate(prompts, GREEDY)
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in prompts]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert all(answer.record.kind == "finished" for answer in together)


def test_a_stream_adds_up_to_the_whole_answer(llm):
    (whole,) = llm.generate("def read(self, ", GREEDY)
    pieces = list(llm.stream("def read(self, ", GREEDY))
    assert "".join(pieces) == whole.text
    assert len(pieces) > 1


def test_a_seed_repeats_an_answer_whatever_runs_beside_it(llm):
    drawn = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=24, seed=7)
    (alone,) = llm.generate("for line in ", drawn)
    beside = llm.generate(["x = 1\n", "for line in ", "y = 2\n"], drawn)
    assert beside[1].token_ids == alone.token_ids
    (other,) = llm.generate("for line in ", SamplingParams(temperature=1.0, top_p=0.95, max_tokens=24, seed=8))
    assert other.token_ids != alone.token_ids


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(llm):
    (whole,) = llm.generate("def read(self):\n", SamplingParams(temperature=0.0, max_tokens=48))
    middle = whole.text[len(whole.text) // 2 : len(whole.text) // 2 + 3]
    cut = whole.text.index(middle)
    params = SamplingParams(temperature=0.0, max_tokens=48, stop=(middle,))
    (stopped,) = llm.generate("def read(self):\n", params)
    assert stopped.text == whole.text[:cut]
    assert stopped.finish_reason == "stop"
    assert stopped.record.kind == "finished"
    assert "".join(llm.stream("def read(self):\n", params)) == whole.text[:cut]


def test_a_stream_left_early_gives_its_pages_back(llm):
    for _ in llm.stream("while True:", SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)):
        break
    _assert_nothing_held(llm)


def test_targets_are_accounted_for(llm):
    """One that cannot fail and one that cannot be met."""
    easy = SamplingParams(temperature=0.0, max_tokens=4, slo=SLO(ttft_s=60.0))
    hard = SamplingParams(temperature=0.0, max_tokens=4, slo=SLO(ttft_s=1e-9))
    assert llm.generate("a = ", easy)[0].record.missed == {}
    assert set(llm.generate("b = ", hard)[0].record.missed) == {"ttft"}


def test_errors_are_one_sentence(llm):
    with pytest.raises(ValueError, match="maximum context length is 512 tokens"):
        llm.generate([list(range(600))], GREEDY)
    with pytest.raises(ValueError, match="not in the vocabulary"):
        llm.generate([[10**9]], GREEDY)
    with pytest.raises(ConfigError, match="Unknown option 'max_len'"):
        LLM(max_len=5)
    with pytest.raises(ConfigError, match="give 2048 or less"):
        LLM(max_model_len=10**6)
    with pytest.raises(ConfigError, match="--max-model-len"):
        LLM(kv_cache_memory_bytes=1 << 16)
    with pytest.raises(ModelError, match="no model 'nowhere'"):
        LLM("nowhere")
    with pytest.raises(ModelError, match=r"qwen2\.5-0\.5b"):
        LLM("random:no-such-preset")


def test_logprobs_are_those_of_the_tokens_delivered(llm):
    (answer,) = llm.generate("import ", SamplingParams(temperature=0.0, max_tokens=6, logprobs=3))
    assert len(answer.logprobs) == len(answer.token_ids)
    for token, logprob in zip(answer.token_ids, answer.logprobs, strict=True):
        assert logprob.top[0] == (token, logprob.logprob)
        assert len(logprob.top) == 3


def test_a_prompts_own_tokens_are_scored(llm):
    """Beside an answer, and as a whole equal to what the model says when the same text is its answer."""
    text = "def read(self):\n    return self.value\n"
    (scored,) = llm.generate(text, SamplingParams(temperature=0.0, max_tokens=2, logprobs=0, prompt_logprobs=2))
    assert len(scored.prompt_logprobs) == len(scored.prompt_tokens) - 1
    assert all(len(score.top) == 2 for score in scored.prompt_logprobs)
    longer = (*scored.prompt_tokens, scored.token_ids[0])
    (again,) = llm.generate([longer], SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))
    assert again.prompt_logprobs[-1].logprob == pytest.approx(scored.logprobs[0].logprob, abs=1e-4)
    (plain,) = llm.generate(text, GREEDY)
    assert plain.prompt_logprobs == []


def test_an_interrupt_leaves_nothing_behind(llm, monkeypatch):
    """Ctrl-C in the middle of a step of two: it reaches the caller, no page is held, and the next answer is right."""
    (expected,) = llm.generate("import ", GREEDY)
    draw = llm._engine.stage.sampler.draw

    def interrupted(logits, request_ids, positions):
        monkeypatch.undo()
        raise KeyboardInterrupt

    for ask in (lambda: llm.generate(["def f(", "def g("], GREEDY), lambda: list(llm.stream("def f(", GREEDY))):
        monkeypatch.setattr(llm._engine.stage.sampler, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask()
        assert llm._engine.stage.sampler.draw == draw
        _assert_nothing_held(llm)
        assert llm.generate("import ", GREEDY)[0].token_ids == expected.token_ids


def test_an_interrupt_while_many_are_open_leaves_nothing_behind(llm, monkeypatch):
    """It comes with the first piece: those between two steps, in the queue and not yet asked are gone as well."""
    tell = llm._driver.tell

    def interrupted(effect):
        monkeypatch.undo()
        tell(effect)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm._driver, "tell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([f"x{number} = " for number in range(80)], GREEDY)
    _assert_nothing_held(llm)


def test_two_threads_each_get_their_own_answers(llm):
    """One generates, the other streams, at the same time and over and over: the same as alone."""
    prompts = ["def read(self, ", "import os\n", "class A:\n"]
    alone = {prompt: llm.generate(prompt, GREEDY)[0].text for prompt in prompts}
    got: list[tuple[str, str]] = []

    def generate(order):
        for _ in range(3):
            answers = llm.generate(order, GREEDY)
            got.extend((prompt, answer.text) for prompt, answer in zip(order, answers, strict=True))

    def stream(order):
        got.extend((prompt, "".join(llm.stream(prompt, GREEDY))) for prompt in order * 3)

    threads = [
        threading.Thread(target=work, args=(order,), daemon=True)
        for work, order in ((generate, prompts), (generate, prompts[::-1]), (stream, prompts))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(got) == 27
    assert all(text == alone[prompt] for prompt, text in got)
    _assert_nothing_held(llm)


def test_more_prompts_than_may_wait_are_all_answered():
    """Nine prompts where four may be open at once, and one of the four is a stream that is read later."""
    one = SamplingParams(temperature=0.0, max_tokens=2)
    with LLM(num_threads=1, dtype="float32", max_model_len=64, max_num_queued_reqs=4) as llm:
        prompts = [f"x{number} = " for number in range(9)]
        running = llm.stream("import ", GREEDY)
        pieces = [next(running)]
        answers = llm.generate(prompts, one)
        assert [answer.record.kind for answer in answers] == ["finished"] * 9
        alone = [llm.generate(prompt, one)[0] for prompt in prompts]
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]
        pieces += running
        assert "".join(pieces) == llm.generate("import ", GREEDY)[0].text


def test_one_prompt_that_cannot_be_answered_costs_no_work(llm):
    """It is the last of three: the error comes before anything was begun."""
    events = llm._engine.scheduler.counters["events"]
    for wrong, advice in ((list(range(512)), "shorten it so that at least one more fits"), ([], "at least one token")):
        with pytest.raises(ValueError, match=advice):
            llm.generate(["a = ", "b = ", wrong], GREEDY)
    assert llm._engine.scheduler.counters["events"] == events


def test_an_llm_that_is_closed_or_dropped_leaves_no_file_behind():
    """Two are closed, one by its block, and one is only forgotten: their pages' files are gone."""
    gc.collect()
    before = _num_pool_files()
    options = {"num_threads": 1, "dtype": "float32", "max_model_len": 64, "kv_cache_memory_bytes": 4 << 20}
    with LLM(**options) as first:
        assert _num_pool_files() > before
        begun = first.stream("x = ", GREEDY)
        next(begun)
    second, third = LLM(**options), LLM(**options)
    second.close()
    second.close()
    for closed in (first, second):
        with pytest.raises(RuntimeError, match="closed: make a new one"):
            closed.generate("x = ", GREEDY)
    del third
    gc.collect()
    assert _num_pool_files() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 1e-42),
        ("repetition_penalty", 101.0),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("logprobs", 21),
        ("prompt_logprobs", 21),
        ("seed", 2**63),
        ("stop", ("a", "b", "c", "d", "e")),
        ("stop", ("",)),
        ("stop", ("x" * 257,)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (1,) * 1025),
        ("logit_bias", {3: 100.5}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
    ],
)
def test_what_the_server_refuses_is_an_error_here_as_well(name, value):
    with pytest.raises(ValueError, match=f"^{name} .* give .*[.]$"):
        SamplingParams(**{name: value})
    with pytest.raises(ApiError, match=name):
        decode(json.dumps({"prompt": "x", name: value}).encode(), CompletionBody)


@pytest.mark.parametrize("target", ["ttft_s", "tpot_s", "total_s"])
@pytest.mark.parametrize("seconds", [0, -1.0, 1e7, float("inf"), float("nan")])
def test_a_target_is_a_time_that_can_come(target, seconds):
    with pytest.raises(ValueError, match=f"^slo has a {target} of .* give .*[.]$"):
        SamplingParams(slo=SLO(**{target: seconds}))


def test_not_a_number_is_no_setting():
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"):
        with pytest.raises(ValueError, match=f"{name} is nan"):
            SamplingParams(**{name: float("nan")})


def _assert_nothing_held(llm: LLM) -> None:
    assert llm._engine.scheduler.num_open == llm._driver.num_open_steps == len(llm._open) == 0
    counts = llm._engine.scheduler.pages.counts()
    assert counts["held"] == counts["parked"] == 0
    llm._engine.scheduler.check_integrity()


def _num_pool_files() -> int:
    names = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return sum("headway-kv" in os.readlink(name) for name in names if os.path.islink(name))


ITEM = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("asked", "fits"),
    [
        ({"json": ITEM}, lambda text: jsonschema.validate(json.loads(text), ITEM) is None),
        ({"json": json.dumps(ITEM)}, lambda text: isinstance(json.loads(text)["a"], int)),
        ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
        ({"regex": r"[0-9]{3}-[a-f]{2}"}, re.compile(r"[0-9]{3}-[a-f]{2}").fullmatch),
        ({"choice": ["yes", "no", "perhaps"]}, {"yes", "no", "perhaps"}.__contains__),
        ({"grammar": 'start: "x" ("," "x")*'}, re.compile("x(,x)*").fullmatch),
    ],
)
def test_an_answer_looks_as_asked(llm, asked, fits):
    """As with the server's `structured_outputs`; a temperature keeps the model from doing so by itself."""
    pytest.importorskip("llguidance")
    params = SamplingParams(
        temperature=1.0, seed=3, max_tokens=200, structured_outputs=StructuredOutputsParams(**asked)
    )
    (answer,) = llm.generate("import os\n", params)
    assert answer.finish_reason == "stop" or (asked.get("json_object") or "grammar" in asked)
    if answer.finish_reason == "stop":
        assert fits(answer.text)


def test_what_cannot_be_followed_is_said_before_any_work(llm):
    pytest.importorskip("llguidance")
    with pytest.raises(ValueError, match="takes one of json, regex"):
        StructuredOutputsParams()
    with pytest.raises(ValueError, match="takes one of json, regex"):
        StructuredOutputsParams(regex="a", choice=["a"])
    with pytest.raises(ValueError, match="one text or more"):
        StructuredOutputsParams(choice=[])
    with pytest.raises(ValueError, match="regular expression"):
        llm.generate("x", SamplingParams(structured_outputs=StructuredOutputsParams(regex="(")))
