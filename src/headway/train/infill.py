"""Fill in the middle: documents rearranged so that a left-to-right model learns to write what stands between.

The order is prefix, suffix, middle (Bavarian et al., arXiv 2207.14255):
`<|fim_prefix|> P <|fim_suffix|> S <|fim_middle|> M <|endoftext|>`. Cuts fall between any two characters, since
an editor's cursor does not respect tokens. Knows no model and no batch.
"""

import random
from collections.abc import Sequence
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
    end = sentinels_of(tokenizer).end
    return [[*tokens, end] for tokens in encode_texts(tokenizer, [document.text for document in documents])]


def mixed_epoch(
    documents: Sequence[Document], tokenizer: Tokenizer, *, fim_share: float, piece_characters: int
) -> Epoch:
    """An epoch in which each document comes in FIM order with probability `fim_share`, else as it stands.

    A FIM document is taken in pieces that fit a training sequence: a suffix that lies beyond the context teaches
    nothing.
    """

    def epoch(rng: random.Random) -> list[list[int]]:
        infilled = [rng.random() < fim_share for _ in documents]
        cuts = [
            cut(piece, rng)
            for document, fim in zip(documents, infilled, strict=True)
            if fim
            for piece in pieces(document.text, piece_characters)
        ]
        whole = [document for document, fim in zip(documents, infilled, strict=True) if not fim]
        rows = in_fim_order(cuts, tokenizer) + plain(whole, tokenizer)
        rng.shuffle(rows)
        return rows

    return epoch
