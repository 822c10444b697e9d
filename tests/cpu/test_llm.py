"""`headway.LLM` as a script uses it: the embedded model, options, streams, errors."""

import pytest

from headway import LLM, SamplingParams
from headway.config import ConfigError
from headway.core.request import SLO
from headway.models.config import ModelError

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
    counts = llm._engine.scheduler.pages.counts()
    assert counts["held"] == counts["parked"] == 0
    llm._engine.scheduler.check_integrity()


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
