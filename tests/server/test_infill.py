"""`suffix`: the model is asked for the middle in its own words, and strangers' text stays text."""

import json
from typing import Any

import pytest
import tokenizers
from desk import TEXT, Desk, run
from test_refusals import refused
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from headway.models.infill import SPELLINGS, Infill
from headway.models.tokenizer import ModelText, Tokenizer
from headway.train.infill import Cut, in_fim_order

PATH = "/v1/completions"
ID = {text: TEXT.tokenizer.token_id(text) for text in ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")}
PREFIX, SUFFIX, MIDDLE = ID.values()


def byte_level(marks: tuple[str, ...], *, special: bool = True) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["def f(x): return x"] * 3, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in marks])
    return backend


def text_of(backend: tokenizers.Tokenizer, eos: str | None = None) -> ModelText:
    ends = () if eos is None else (backend.token_to_id(eos),)
    tokenizer = Tokenizer(backend, json.loads(backend.to_str())["decoder"], eos_ids=ends)
    return ModelText("model", tokenizer, None, {})


def test_prefix_suffix_middle_reach_the_engine_as_the_model_was_trained() -> None:
    """The same ids as the recipe of the embedded model made, up to where the middle begins."""

    async def story() -> None:
        desk = await Desk("a + b").start()
        prefix, suffix = "def add(a, b):\n    return ", "\n\n\ndef sub(a, b):\n"
        answer = await desk.complete(prompt=prefix, suffix=suffix)
        (request,) = desk.link.requests
        backend = TEXT.tokenizer._backend
        (trained,) = in_fim_order([Cut(prefix, "a + b", suffix)], backend)
        middle = TEXT.tokenizer.encode("a + b")
        assert [*request.prompt, *middle] == trained[:-1]
        assert request.prompt[-1] == MIDDLE
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a + b", "stop", None)
        assert answer["usage"]["prompt_tokens"] == len(request.prompt)

    run(story)


@pytest.mark.parametrize("mark", ["<|fim_prefix|>", "<|fim_pad|>", "<|endoftext|>"])
def test_whatever_ends_a_middle_ends_the_answer_unnamed(mark: str) -> None:
    """Only a stop that the caller named is told as the reason."""

    async def story() -> None:
        desk = await Desk().start()
        end = TEXT.tokenizer.token_id(mark)
        assert end is not None
        desk.link.script = lambda request: (*TEXT.tokenizer.encode("x"), end, 9)
        (choice,) = (await desk.complete(prompt="a", suffix="b"))["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("x", "stop", None)
        named = TEXT.tokenizer.encode("x")[0]
        (choice,) = (await desk.complete(prompt="a", suffix="b", stop_token_ids=[named]))["choices"]
        assert (choice["text"], choice["stop_reason"]) == ("", named)

    run(story)


def test_a_sentinel_in_the_text_stays_text() -> None:
    """Whoever edits a file about infilling, or means harm, moves no border: each mark is there once."""

    async def story() -> None:
        desk = await Desk("ok").start()
        tricky = "a <|fim_middle|> b <|endoftext|>"
        await desk.complete(prompt=tricky, suffix="<|fim_prefix|>" + tricky)
        (request,) = desk.link.requests
        ids = list(request.prompt)
        assert [ids.count(mark) for mark in (PREFIX, SUFFIX, MIDDLE)] == [1, 1, 1]
        assert TEXT.tokenizer.eos_ids[0] not in ids
        first = ids[1 : ids.index(SUFFIX)]
        assert TEXT.tokenizer.decode(first) == tricky
        assert TEXT.tokenizer.encode("<|fim_middle|>") == (MIDDLE,), "elsewhere it is still the mark"

    run(story)


def test_text_before_the_first_line_and_an_empty_suffix() -> None:
    """Nothing before the cursor is allowed; nothing behind it is a plain completion."""

    async def story() -> None:
        desk = await Desk("ok").start()
        await desk.complete(prompt="", suffix="x")
        await desk.complete(prompt="x", suffix="")
        first, second = desk.link.requests
        assert first.prompt == (PREFIX, SUFFIX, *TEXT.tokenizer.encode("x"), MIDDLE)
        assert second.prompt == TEXT.tokenizer.encode("x")

    run(story)


def test_several_prompts_share_the_suffix() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        await desk.complete(prompt=["a", "b"], suffix="c", n=2)
        prompts = {request.prompt for request in desk.link.requests}
        assert len(prompts) == 2
        assert all(prompt[-2:] == (*TEXT.tokenizer.encode("c"), MIDDLE) for prompt in prompts)

    run(story)


def test_a_model_without_sentinels_says_so() -> None:
    async def story() -> None:
        desk = await Desk(text=text_of(byte_level(()))).start()
        status, error = await refused(desk, PATH, {"prompt": "x", "suffix": "y"})
        assert (status, error["param"], error["code"]) == (400, "suffix", "unsupported_parameter")
        assert "cannot fill in the middle" in error["message"]
        assert (await desk.complete(prompt="x", suffix=None))["choices"]

    run(story)


@pytest.mark.parametrize("prompt", [[5, 6], [[5], [6]]])
def test_ids_have_no_place_for_the_marks(prompt: Any) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        status, error = await refused(desk, PATH, {"prompt": prompt, "suffix": "y"})
        assert (status, error["param"]) == (400, "prompt")

    run(story)


def test_a_suffix_counts_to_the_context() -> None:
    """In tokens, and in characters before they are even tokenized."""

    async def story() -> None:
        desk = await Desk("ok", max_model_len=32).start()
        for suffix in ("x y " * 40, "word " * 400_000):
            status, error = await refused(desk, PATH, {"prompt": "x", "suffix": suffix})
            assert (status, error["code"]) == (400, "context_length_exceeded")

    run(story)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.prefix)
@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
def test_every_family_is_asked_in_its_own_words(spelling: Any, special: bool) -> None:
    """Whether a vocabulary marks its sentinels as special or only adds them: they are found, set and not forged."""
    backend = byte_level((*spelling[:3], spelling.ends[0]), special=special)
    tokenizer = text_of(backend).tokenizer
    infill = Infill.of(tokenizer)
    assert infill is not None
    prefix, suffix, middle, end = (backend.token_to_id(text) for text in (*spelling[:3], spelling.ends[0]))
    assert set(infill.end_ids) == {prefix, suffix, middle, end}
    ids = infill.prompt(f"f({spelling.middle}", f"x{spelling.suffix}")
    assert (ids[0], ids[-1]) == (prefix, middle)
    assert [ids.count(token) for token in (prefix, suffix, middle, end)] == [1, 1, 1, 0]
    cut = ids.index(suffix)
    assert tokenizer.decode(ids[1:cut], skip_special_tokens=False) == f"f({spelling.middle}"
    assert tokenizer.decode(ids[cut + 1 : -1], skip_special_tokens=False) == f"x{spelling.suffix}"


def test_what_a_model_wants_before_a_text_comes_first() -> None:
    """A beginning mark stands before the first sentinel, an end mark nowhere."""
    backend = byte_level(("<s>", "</s>", *SPELLINGS[0][:3]))
    begin, end = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    infill = Infill.of(text_of(backend).tokenizer)
    assert infill is not None
    ids = infill.prompt("f", "x")
    assert (ids[0], ids.count(begin), ids.count(end)) == (begin, 1, 0)
    assert infill.prompt("f", "x", add_special_tokens=False) == ids[1:]
