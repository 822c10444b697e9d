"""/v1/completions, whole: shapes, endings, and what reaches the engine."""

import dataclasses
import json
import time

import pytest
import tokenizers
from desk import TEXT, Desk, run
from tokenizers import processors

from headway.core.request import SLO
from headway.models.tokenizer import Tokenizer


def test_a_whole_answer_has_openais_shape() -> None:
    """The model says its line and ends; the end token is counted, not shown."""

    async def story() -> None:
        desk = await Desk("return 1").start()
        answer = await desk.complete(prompt="def f():", model="embedded")
        assert answer["object"] == "text_completion"
        assert answer["model"] == "embedded"
        assert answer["id"].startswith("cmpl-")
        assert answer["choices"] == [
            {"index": 0, "text": "return 1", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
        ]
        usage = answer["usage"]
        num_prompt, num_answer = len(TEXT.tokenizer.encode("def f():")), len(desk.ids) + 1
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (num_prompt, num_answer)
        assert usage["total_tokens"] == num_prompt + num_answer
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
        timing = usage["headway"]
        assert timing["slo_met"] is None
        assert 0 <= timing["queue_ms"] <= timing["ttft_ms"] <= timing["total_ms"]
        assert (timing["preemptions"], timing["cached_tokens"]) == (0, 0)

    run(story)


def test_max_tokens_ends_with_length_and_defaults_to_sixteen() -> None:
    async def story() -> None:
        desk = await Desk().start()
        answer = await desk.complete(max_tokens=3)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 3
        await desk.post("/v1/completions", {"prompt": "x"})
        assert desk.link.requests[-1].max_tokens == 16

    run(story)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("x y", [TEXT.tokenizer.encode("x y")]),
        (["x", "y z"], [TEXT.tokenizer.encode("x"), TEXT.tokenizer.encode("y z")]),
        ([5, 6, 7], [(5, 6, 7)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
    ],
)
def test_a_prompt_may_be_text_or_ids_one_or_several(prompt: object, expected: list[tuple[int, ...]]) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        answer = await desk.complete(prompt=prompt)
        assert [request.prompt for request in desk.link.requests] == expected
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))

    run(story)


def test_n_answers_differ_by_their_seed_alone_and_a_prompt_is_counted_once() -> None:
    """Two prompts, three samples each: choices 0 to 2 are of the first. Each prompt is answered as if it were alone."""

    async def story() -> None:
        desk = await Desk("ok").start()
        answer = await desk.complete(prompt=[[5], [6, 7]], n=3, seed=100)
        requests = sorted((request.prompt, request.sampling.seed) for request in desk.link.requests)
        assert requests == [((5,), 100), ((5,), 101), ((5,), 102), ((6, 7), 100), ((6, 7), 101), ((6, 7), 102)]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
        assert answer["usage"]["prompt_tokens"] == 3
        assert answer["usage"]["completion_tokens"] == 6 * (len(desk.ids) + 1)

    run(story)


def test_a_caller_may_leave_out_what_the_model_wants_around_a_prompt() -> None:
    """A model whose prompts begin with a mark, as Llama's do: it is there unless the caller says otherwise."""
    tokenizer = TEXT.tokenizer
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    end = tokenizer.eos_ids[0]
    mark = tokenizer.token_text(end)
    backend.post_processor = processors.TemplateProcessing(single=f"{mark} $A", special_tokens=[(mark, end)])
    decoder = json.loads(backend.to_str())["decoder"]
    text = dataclasses.replace(TEXT, tokenizer=Tokenizer(backend, decoder, eos_ids=tokenizer.eos_ids))

    async def story() -> None:
        desk = await Desk("ok", text=text).start()
        for said in (None, True, False):
            await desk.complete(prompt="x", add_special_tokens=said)
        begun = [request.prompt[0] == end for request in desk.link.requests]
        assert begun == [True, True, False]

    run(story)


def test_without_a_seed_every_answer_is_drawn_anew() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        await desk.complete()
        await desk.complete(prompt=["x", "x"], n=2)
        seeds = {request.sampling.seed for request in desk.link.requests}
        assert len(seeds) == 5
        assert all(0 <= seed < 2**63 for seed in seeds)

    run(story)


def test_everything_that_can_be_said_reaches_the_engine() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        await desk.complete(
            temperature=0.5,
            top_p=0.9,
            top_k=7,
            min_p=0.1,
            presence_penalty=0.2,
            frequency_penalty=-0.3,
            repetition_penalty=1.1,
            logit_bias={"5": -100, "6": 1.5},
            seed=-1,
            stop_token_ids=[9],
            min_tokens=2,
            priority=-4,
            cache_salt="pepper",
            user="somebody",
            logprobs=3,
        )
        (request,) = desk.link.requests
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.2, -0.3)
        assert sampling.repetition_penalty == 1.1
        assert sampling.logit_bias == ((5, -100.0), (6, 1.5))
        assert sampling.seed == 2**63 - 1
        assert sampling.num_logprobs == 3
        assert request.stop_ids == (*TEXT.tokenizer.eos_ids, 9)
        assert (request.min_tokens, request.priority, request.cache_salt) == (2, -4, "pepper")
        assert request.tenant == "", "`user` tells persons apart, not accounts"

    run(story)


def test_what_is_not_said_is_taken_from_the_model() -> None:
    """generation_config.json speaks for the model; top_k -1 and 0 both mean off."""

    async def story() -> None:
        desk = await Desk("ok").start()
        await desk.complete(top_k=-1, ignore_eos=True, max_tokens=4)
        (request,) = desk.link.requests
        assert request.sampling.temperature == TEXT.sampling_defaults["temperature"]
        assert request.sampling.top_p == TEXT.sampling_defaults["top_p"]
        assert request.sampling.top_k == 0
        assert request.stop_ids == ()

    run(story)


def test_targets_come_by_header_or_body_and_the_header_goes_first() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        body = {"prompt": "x", "slo": {"ttft_ms": 500, "total_ms": 9000}}
        await desk.post("/v1/completions", body, x_slo_ttft_ms="250", x_slo_tpot_ms="12.5")
        assert desk.link.requests[0].slo == SLO(ttft_s=0.25, tpot_s=0.0125, total_s=9.0)

    run(story)


def test_what_was_asked_of_a_target_and_what_it_got_comes_back() -> None:
    """A target of a microsecond is missed, one of an hour is met; the cause stands beside the miss."""

    async def story() -> None:
        desk = await Desk("ok and more").start()
        answer = await desk.complete(slo={"ttft_ms": 0.001, "tpot_ms": 3_600_000})
        timing = answer["usage"]["headway"]
        assert timing["slo_met"] is False
        ttft, tpot = timing["slo"]["ttft"], timing["slo"]["tpot"]
        assert (ttft["target_ms"], ttft["met"], ttft["measured_ms"]) == (0.001, False, timing["ttft_ms"])
        assert ttft["cause"] in ("queued_behind", "predicted_wrong", "parked")
        assert (tpot["target_ms"], tpot["met"], tpot["cause"]) == (3_600_000, True, None)
        assert "total" not in timing["slo"]

    run(story)


def test_arrival_is_when_the_body_was_there_on_the_hosts_clock() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        before = time.monotonic()
        await desk.complete()
        assert before <= desk.link.requests[0].arrival <= time.monotonic()

    run(story)


@pytest.mark.parametrize("stops", ["\n\n", ["zzz", "\n\n"]])
def test_a_stop_string_ends_the_answer_wherever_tokens_begin(stops: object) -> None:
    """The stop string straddles tokens; neither it nor what follows is shown, and the engine is told to stop."""

    async def story() -> None:
        desk = await Desk("a = 1\n\nb = 2").start()
        answer = await desk.complete(stop=stops)
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a = 1", "stop", "\n\n")
        assert desk.link.stopped == {desk.link.requests[0].id}
        assert desk.link.cancelled == set()

    run(story)


def test_a_stop_string_cut_out_of_the_middle_of_a_token() -> None:
    async def story() -> None:
        desk = await Desk("return value").start()
        (choice,) = (await desk.complete(stop="etur"))["choices"]
        assert choice["text"] == "r"
        (choice,) = (await desk.complete(stop="etur", include_stop_str_in_output=True))["choices"]
        assert choice["text"] == "retur"

    run(story)


def test_what_only_began_like_a_stop_string_is_shown_in_the_end() -> None:
    async def story() -> None:
        desk = await Desk("x = 1 EN").start()
        (choice,) = (await desk.complete(stop="END"))["choices"]
        assert (choice["text"], choice["stop_reason"]) == ("x = 1 EN", None)

    run(story)


def test_stop_strings_count_from_min_tokens_on() -> None:
    async def story() -> None:
        desk = await Desk("a b a b").start()
        (choice,) = (await desk.complete(stop=" b", min_tokens=2))["choices"]
        assert choice["text"] == "a b a"

    run(story)


def test_a_stop_id_named_by_the_caller_is_named_in_the_answer() -> None:
    async def story() -> None:
        desk = await Desk("return 1").start()
        last = desk.ids[-1]
        (choice,) = (await desk.complete(stop_token_ids=[last]))["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["stop_reason"] == last
        assert choice["text"] == TEXT.tokenizer.decode(desk.ids[:-1])

    run(story)


def test_logprobs_line_up_with_the_text() -> None:
    """Offsets point into the text; each token carries its own logprob and the best ones besides."""

    async def story() -> None:
        desk = await Desk("return value").start()
        (choice,) = (await desk.complete(logprobs=2))["choices"]
        logprobs = choice["logprobs"]
        assert "".join(logprobs["tokens"]) == choice["text"] == "return value"
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert choice["text"][offset:].startswith(token)
        assert logprobs["token_logprobs"] == [-token / 1000 for token in desk.ids]
        first = logprobs["top_logprobs"][0]
        spell = TEXT.tokenizer.token_text
        likeliest, second = desk.ids[0], desk.ids[0] + 1
        assert list(first.items()) == [(spell(likeliest), -likeliest / 1000), (spell(second), -second / 1000)]

    run(story)


def test_logprobs_zero_asks_for_the_chosen_tokens_only() -> None:
    async def story() -> None:
        desk = await Desk("return").start()
        (choice,) = (await desk.complete(logprobs=0))["choices"]
        assert choice["logprobs"]["top_logprobs"] == [{"return": -desk.ids[0] / 1000}]

    run(story)


def test_logprobs_of_a_character_spread_over_tokens() -> None:
    """The four tokens of an emoji all start where it starts, and are spelled in bytes."""

    async def story() -> None:
        desk = await Desk("x😀y").start()
        (choice,) = (await desk.complete(logprobs=0))["choices"]
        assert choice["text"] == "x😀y"
        tokens = choice["logprobs"]["tokens"]
        assert (tokens[0], tokens[-1]) == ("x", "y")
        assert all(token.startswith("bytes:\\x") for token in tokens[1:-1])
        assert choice["logprobs"]["text_offset"] == [0, *[1] * (len(tokens) - 2), 2]

    run(story)


def test_logprobs_end_where_the_text_ends() -> None:
    async def story() -> None:
        desk = await Desk("a = 1\n\nb = 2").start()
        (choice,) = (await desk.complete(stop=" 1", logprobs=0))["choices"]
        assert choice["text"] == "a ="
        assert choice["logprobs"]["tokens"] == ["a", " ="]

    run(story)


def test_fields_that_nobody_knows_are_accepted() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        answer = await desk.complete(best_of=1, echo=False, suffix=None, some_vendors_extra={"deep": [1]})
        assert answer["choices"][0]["text"] == "ok"

    run(story)
