"""The vocabulary with its sentinels, and documents in FIM order."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from headway.train.data import Document
from headway.train.infill import Cut, cut, in_fim_order, mixed_epoch, pieces, plain, restore, stretches
from headway.train.vocabulary import SENTINELS, encode_texts, sentinels_of, train_vocabulary

TOKENIZER = train_vocabulary(["def add(a, b):\n    return a + b\n", "class Tree:\n    def walk(self): ..."], 300)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    """Chinese, emoji, control characters, a lone sentinel's name: bytes spell them all."""
    [tokens] = encode_texts(TOKENIZER, [text])
    assert TOKENIZER.decode(tokens, skip_special_tokens=False) == text


def test_a_sentinels_name_in_a_document_is_not_the_sentinel() -> None:
    """A file on tokenizers quotes <|endoftext|>: its tokens must not end the document."""
    [tokens] = encode_texts(TOKENIZER, ["print('<|endoftext|>')"])
    assert not set(tokens) & set(sentinels_of(TOKENIZER))
    assert TOKENIZER.encode("<|endoftext|>").ids == [sentinels_of(TOKENIZER).end]  # in a prompt it is


def test_sentinels_have_the_lowest_ids() -> None:
    """Code that infills looks the sentinels up by name, and ids stay where they are when the vocabulary grows."""
    assert [TOKENIZER.token_to_id(name) for name in SENTINELS] == [0, 1, 2, 3, 4]


def test_a_vocabulary_without_sentinels_is_refused() -> None:
    """Somebody passes another model's tokenizer: the message names what it lacks."""
    with pytest.raises(ValueError, match=r"lacks <\|endoftext\|>"):
        sentinels_of(Tokenizer(models.BPE()))


@settings(max_examples=100, deadline=None)
@given(st.text(), st.integers(0, 2**32))
def test_fim_order_loses_nothing(text: str, seed: int) -> None:
    """Any text, cut anywhere: the three parts come back from the tokens and join to the text."""
    whole = cut(text, random.Random(seed))
    [tokens] = in_fim_order([whole], TOKENIZER)
    assert restore(tokens, TOKENIZER) == whole
    assert whole.prefix + whole.middle + whole.suffix == text


def test_fim_order_is_prefix_suffix_middle() -> None:
    """The tokens that a model sees, sentinel by sentinel."""
    [tokens] = in_fim_order([Cut("def ", "add", "(a, b)")], TOKENIZER)
    assert TOKENIZER.decode(tokens, skip_special_tokens=False) == (
        "<|fim_prefix|>def <|fim_suffix|>(a, b)<|fim_middle|>add<|endoftext|>"
    )


def test_pieces_end_with_a_line_where_they_can() -> None:
    """Short lines stay whole; a line longer than a piece is cut where it must be."""
    assert pieces("one\ntwo\nthree\n", 9) == ["one\ntwo\n", "three\n"]
    assert pieces("abcdefgh", 3) == ["abc", "def", "gh"]
    assert pieces("", 3) == []


def test_an_epoch_holds_every_text_once_and_about_half_in_fim_order() -> None:
    """Two hundred documents: each text is there once, whole or as FIM pieces, and both kinds are common."""
    documents = [Document(f"{number}.py", f"value = {number}\n" * 3) for number in range(200)]
    epoch = mixed_epoch(documents, TOKENIZER, fim_share=0.5, piece_characters=1000)
    rows = epoch(random.Random(1))
    infilled = [row for row in rows if row[0] == sentinels_of(TOKENIZER).prefix]
    texts = ["".join((c := restore(row, TOKENIZER), c.prefix + c.middle + c.suffix)[1]) for row in infilled]
    texts += [TOKENIZER.decode(row[:-1]) for row in rows if row not in infilled]
    assert sorted(texts) == sorted(document.text for document in documents)
    assert 70 < len(infilled) < 130
    assert rows == epoch(random.Random(1))
    assert rows != epoch(random.Random(2))


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab \n", max_size=300), st.integers(0, 2**32))
def test_stretches_lose_nothing(text: str, seed: int) -> None:
    """However a text is cut, its stretches join to it."""
    assert "".join(stretches(text, 10, random.Random(seed))) == text


def test_half_of_the_stretches_begin_a_line() -> None:
    """A long text: cuts after line ends and within lines are about as many, at about the asked distance."""
    text = "0123456789\n" * 2000
    found = stretches(text, 50, random.Random(1))
    assert 400 < len(found) < 450
    assert 0.45 < sum(each.startswith("0") for each in found) / len(found) < 0.62


def test_a_document_in_stretches_is_the_same_text_in_other_tokens() -> None:
    """The model sees a line end without the indentation that usually shares its token."""
    documents = [Document("a.py", "def add(a, b):\n    return a + b\n" * 20)]
    epoch = mixed_epoch(documents, TOKENIZER, fim_share=0, piece_characters=1, stretch_characters=40)
    [tokens] = epoch(random.Random(1))
    assert TOKENIZER.decode(tokens[:-1]) == documents[0].text
    assert tokens != plain(documents, TOKENIZER)[0]


def test_plain_documents_end_with_the_end_of_text() -> None:
    """The model must learn when a file is over."""
    [tokens] = plain([Document("a.py", "return a")], TOKENIZER)
    assert tokens[-1] == sentinels_of(TOKENIZER).end
    assert TOKENIZER.decode(tokens[:-1]) == "return a"
