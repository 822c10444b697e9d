"""Fill in the middle: documents rearranged so that a left-to-right model learns to write what stands between.

The order is prefix, suffix, middle (Bavarian et al., arXiv 2207.14255):
`<|fim_prefix|> P <|fim_suffix|> S <|fim_middle|> M <|endoftext|>`. Cuts fall between any two characters, since
an editor's cursor does not respect tokens. Knows no model and no batch.
"""

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from tokenizers import Tokenizer

from headway.train.data import Document, Epoch
from headway.train.vocabulary import Sentinels, encode_texts, sentinels_of


class Cut(NamedTuple):
    prefix: str
    middle: str
    suffix: str


def cut(text: str, rng: random.Random) -> Cut:
    """Cut a text at two random places, any of which may be its ends."""
    first, second = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
    return Cut(text[:first], text[first:second], text[second:])


def in_fim_order(cuts: Sequence[Cut], tokenizer: Tokenizer) -> list[list[int]]:
    """Tokens of each cut in the order prefix, suffix, middle; the three parts are tokenized apart."""
    sentinels = sentinels_of(tokenizer)
    encoded = iter(encode_texts(tokenizer, [part for each in cuts for part in each]))
    return [_arrange(next(encoded), next(encoded), next(encoded), sentinels) for _ in cuts]


def _arrange(prefix: list[int], middle: list[int], suffix: list[int], at: Sentinels) -> list[int]:
    return [at.prefix, *prefix, at.suffix, *suffix, at.middle, *middle, at.end]


def restore(tokens: Sequence[int], tokenizer: Tokenizer) -> Cut:
    """The cut whose tokens in FIM order these are: the way back of `in_fim_order`."""
    at = sentinels_of(tokenizer)
    suffix, middle = tokens.index(at.suffix), tokens.index(at.middle)
    parts = tokens[1:suffix], tokens[middle + 1 : -1], tokens[suffix + 1 : middle]
    return Cut(*(tokenizer.decode(list(part), skip_special_tokens=False) for part in parts))


def pieces(text: str, max_characters: int) -> list[str]:
    """A text in pieces of at most max_characters, cut after a line where one ends in time."""
    found, start = [], 0
    while start < len(text):
        stop = min(start + max_characters, len(text))
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        found.append(text[start:stop])
        start = stop
    return found


def plain(documents: Sequence[Document], tokenizer: Tokenizer) -> list[list[int]]:
    """Tokens of each document as it stands, ended by the end of text."""
    return _in_stretches([[document.text] for document in documents], tokenizer)


def stretches(text: str, mean_characters: int, rng: random.Random) -> list[str]:
    """A text cut about every mean_characters: half the cuts fall after a line, the others between any characters.

    Tokenized one by one, they teach a model to go on from a prompt that ends where a token would not: after a line
    end, say, which is otherwise one token with the indentation behind it.
    """
    cuts = {0, len(text)}
    for _ in range(len(text) // mean_characters):
        place = rng.randrange(len(text))
        cuts.add(text.find("\n", place) + 1 or place if rng.random() < 0.5 else place)
    places = sorted(cuts)
    return [text[start:stop] for start, stop in pairwise(places)]


def _in_stretches(texts: Sequence[Sequence[str]], tokenizer: Tokenizer) -> list[list[int]]:
    end = sentinels_of(tokenizer).end
    encoded = iter(encode_texts(tokenizer, [part for parts in texts for part in parts]))
    return [[*(token for _ in parts for token in next(encoded)), end] for parts in texts]


def mixed_epoch(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    fim_share: float,
    piece_characters: int,
    stretch_characters: int | None = None,
) -> Epoch:
    """An epoch in which each document comes in FIM order with probability `fim_share`, else as it stands.

    A FIM document is taken in pieces that fit a training sequence: a suffix that lies beyond the context teaches
    nothing. The others are tokenized whole, or in `stretches` of about `stretch_characters`.
    """

    def epoch(rng: random.Random) -> list[list[int]]:
        infilled = [rng.random() < fim_share for _ in documents]
        fim = [document.text for document, chosen in zip(documents, infilled, strict=True) if chosen]
        rest = [document.text for document, chosen in zip(documents, infilled, strict=True) if not chosen]
        cuts = [cut(piece, rng) for text in fim for piece in pieces(text, piece_characters)]
        parts = [stretches(text, stretch_characters, rng) if stretch_characters else [text] for text in rest]
        rows = in_fim_order(cuts, tokenizer) + _in_stretches(parts, tokenizer)
        rng.shuffle(rows)
        return rows

    return epoch
