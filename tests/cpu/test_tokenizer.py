"""Text to ids and back, for both ways in which published vocabularies spell bytes."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from headway.models.config import ModelError
from headway.models.tokenizer import LONG_CHARACTERS, Tokenizer, open_model_text

SENTENCES = ["def f(x): return x", "the quick brown fox", "naïve café", "你好，世界", "a😀b"] * 3
EMBEDDED = open_model_text(None).tokenizer


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3 and Qwen spell bytes: every byte has a printable stand-in."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral spell bytes: pieces of text with ▁ for a space, and <0x0A> for what has no piece."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(["the quick brown fox", "def f(x): return x"], trainer)
    backend = _with_bytes(backend)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _with_bytes(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The trainer makes no byte pieces: add them as a sentencepiece model has them."""
    content = json.loads(backend.to_str())
    vocabulary = content["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    return tokenizers.Tokenizer.from_str(json.dumps(content))


BACKENDS = {"byte level": byte_level(), "byte fallback": byte_fallback()}
TOKENIZERS = {name: Tokenizer(b, json.loads(b.to_str())["decoder"]) for name, b in BACKENDS.items()}

kinds = pytest.mark.parametrize("kind", list(TOKENIZERS))


@kinds
@given(text=st.text(max_size=40))
def test_what_is_fed_token_by_token_adds_up_to_the_text(kind: str, text: str) -> None:
    """However a text falls into tokens, the pieces are always a beginning of it, and in the end all of it."""
    tokenizer = TOKENIZERS[kind]
    detokenizer = tokenizer.detokenizer()
    space = " " if kind == "byte fallback" and text else ""
    grown = ""
    for token in tokenizer.encode(text):
        grown += detokenizer.feed((token,))
        assert (space + text).startswith(grown)
    assert grown + detokenizer.flush() == space + text
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(ids=st.lists(st.integers(0, BACKENDS["byte level"].get_vocab_size() - 1), max_size=30))
def test_any_ids_decode_as_the_library_decodes_them(ids: list[int]) -> None:
    """A sampled answer may be no text at all: broken characters come out as they do from the library."""
    tokenizer, backend = TOKENIZERS["byte level"], BACKENDS["byte level"]
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.feed((token,)) for token in ids]
    assert "".join(pieces) + detokenizer.flush() == backend.decode(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == backend.decode(ids, skip_special_tokens=False)


@kinds
@given(text=st.text(alphabet="the quickdfx():é你😀\n", max_size=30))
def test_decoding_agrees_with_the_library(kind: str, text: str) -> None:
    ids = BACKENDS[kind].encode(text).ids
    assert TOKENIZERS[kind].decode(ids) == BACKENDS[kind].decode(ids)


def test_a_character_appears_with_its_last_byte() -> None:
    """An emoji of four tokens: three times nothing, then all of it."""
    ids = EMBEDDED.encode("😀")
    assert len(ids) > 1
    detokenizer = EMBEDDED.detokenizer()
    assert [detokenizer.feed((token,)) for token in ids] == [""] * (len(ids) - 1) + ["😀"]


def test_an_answer_cut_inside_a_character_shows_that_something_is_missing() -> None:
    detokenizer = EMBEDDED.detokenizer()
    assert detokenizer.feed(EMBEDDED.encode("x😀")[:-1]) == "x"
    assert detokenizer.flush() == "�"


def test_tokens_in_print_for_logprobs() -> None:
    """A token that is no text by itself is spelled in bytes, so that two such tokens never look alike."""
    first, *_ = EMBEDDED.encode("😀")
    assert EMBEDDED.token_text(first) == "bytes:\\xf0"
    assert EMBEDDED.token_bytes(first) == b"\xf0"
    (word,) = EMBEDDED.encode(" return")
    assert (EMBEDDED.token_text(word), EMBEDDED.token_bytes(word)) == (" return", b" return")


def test_special_tokens_are_hidden_unless_asked_for() -> None:
    end = EMBEDDED.token_id("<|endoftext|>")
    assert end is not None
    assert end in EMBEDDED.eos_ids
    ids = (*EMBEDDED.encode("x"), end)
    assert EMBEDDED.decode(ids) == "x"
    assert EMBEDDED.decode(ids, skip_special_tokens=False) == "x<|endoftext|>"
    assert EMBEDDED.token_id("<|no such token|>") is None


def test_a_random_preset_prints_placeholders_for_what_the_embedded_vocabulary_lacks() -> None:
    """random:PRESET keeps the shape's vocabulary and end tokens, and borrows the embedded tokenizer."""
    text = open_model_text("random:qwen2.5-0.5b")
    tokenizer = text.tokenizer
    assert tokenizer.vocab_size == 151936
    assert tokenizer.eos_ids == (151645,)
    assert text.sampling_defaults == {}
    ids = (*tokenizer.encode("def "), 151000)
    assert tokenizer.decode(ids) == "def <|151000|>"
    assert tokenizer.token_text(151935) == "<|151935|>"
    assert text.name == "random:qwen2.5-0.5b"


# A model's folder


@kinds
def test_a_long_text_has_the_ids_that_the_library_gives_it(kind: str) -> None:
    """It takes another way there, one on which the event loop goes on meanwhile."""
    text = "the quick brown fox 😀 " * (LONG_CHARACTERS // 10)
    assert list(TOKENIZERS[kind].encode(text)) == BACKENDS[kind].encode(text).ids


def make_folder(path: Path, backend: tokenizers.Tokenizer, **files: object) -> Path:
    backend.save(str(path / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": backend.get_vocab_size(),
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 64,
        "eos_token_id": 1,
    }
    (path / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


END = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False, "normalized": False}
NAMED = {"bos_token": "<s>", "eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize("wishes", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("has_template", [False, True])
def test_special_tokens_around_a_prompt_are_those_that_transformers_adds(
    tmp_path: Path, wishes: dict[str, bool], has_template: bool
) -> None:
    from transformers import AutoTokenizer

    backend = byte_level()
    if has_template:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = make_folder(tmp_path, backend, tokenizer_config=NAMED | wishes)
    theirs = AutoTokenizer.from_pretrained(str(folder))
    ours = open_model_text(str(folder)).tokenizer
    assert list(ours.encode("the fox")) == theirs("the fox").input_ids
    assert (
        list(ours.encode("the fox", add_special_tokens=False)) == theirs("the fox", add_special_tokens=False).input_ids
    )


def test_a_folder_brings_its_defaults_its_name_and_all_its_ends(tmp_path: Path) -> None:
    """Ends come from config.json, generation_config.json and the tokenizer; defaults are those that sampling has."""
    generation = {"eos_token_id": [5, 6], "temperature": 0.3, "top_k": 20, "num_beams": 4}
    folder = make_folder(tmp_path, byte_level(), tokenizer_config={"eos_token": "<s>"}, generation_config=generation)
    text = open_model_text(str(folder) + "/")
    assert set(text.tokenizer.eos_ids) == {0, 1, 5, 6}
    assert text.sampling_defaults == {"temperature": 0.3, "top_k": 20}
    assert text.name == str(folder)
    assert text.chat_template is None


@pytest.mark.parametrize(
    "wish", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": float("inf")}, {"max_new_tokens": 0}]
)
def test_defaults_that_no_request_could_ask_for_are_found_at_the_start(tmp_path: Path, wish: dict[str, float]) -> None:
    """And not by every request for itself."""
    folder = make_folder(tmp_path, byte_level(), generation_config=wish)
    with pytest.raises(ModelError, match=rf"generation_config\.json says {next(iter(wish))} .*remove the line"):
        open_model_text(str(folder))


def test_a_prompt_is_never_cut_because_a_file_says_so(tmp_path: Path) -> None:
    """Some published tokenizer.json files carry the truncation of their training."""
    backend = byte_level()
    backend.enable_truncation(4)
    tokenizer = open_model_text(str(make_folder(tmp_path, backend))).tokenizer
    assert len(tokenizer.encode("quick " * 20)) > 4


def test_folders_that_cannot_be_used_say_so_in_one_sentence(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, byte_level())
    (folder / "tokenizer.json").write_text("{ not json")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        open_model_text(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"holds no tokenizer\.json"):
        open_model_text(str(folder))


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##"}])
def test_an_unknown_way_to_spell_is_refused_rather_than_guessed(decoder: dict[str, str] | None) -> None:
    with pytest.raises(ModelError, match="decoder"):
        Tokenizer(byte_level(), decoder)


@kinds
@given(text=st.text(alphabet="the quickdfx():é你😀\n ", max_size=20))
def test_a_text_in_the_midst_of_another_gets_no_space_of_its_own(kind: str, text: str) -> None:
    """As the text behind a cursor: its tokens spell it and nothing else."""
    tokenizer = TOKENIZERS[kind]
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.feed(tokenizer.encode_rest(text)) + detokenizer.flush() == text


def test_strangers_text_can_be_read_without_special_tokens() -> None:
    """What spells one is spelled out, and comes back as it was; the tokenizer itself is as before."""
    literal = EMBEDDED.literal()
    text = "a<|endoftext|>b<|fim_middle|>"
    ids = literal.encode(text)
    assert not set(ids) & {EMBEDDED.token_id("<|endoftext|>"), EMBEDDED.token_id("<|fim_middle|>")}
    assert EMBEDDED.decode(ids) == literal.decode(ids) == text
    assert EMBEDDED.token_id("<|endoftext|>") in EMBEDDED.encode(text)
    assert literal.encode("def f(x):") == EMBEDDED.encode("def f(x):")


def test_what_a_model_wants_before_a_text() -> None:
    backend = tokenizers.Tokenizer.from_str(BACKENDS["byte level"].to_str())
    begin, end = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    for form, expected in (("$A", ()), ("<s> $A", (begin,)), ("<s> $A </s>", (begin,)), ("$A </s>", ())):
        backend.post_processor = processors.TemplateProcessing(
            single=form, special_tokens=[("<s>", begin), ("</s>", end)]
        )
        assert Tokenizer(backend, json.loads(backend.to_str())["decoder"]).opening == expected
