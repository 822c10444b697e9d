"""The byte-level vocabulary: trained on documents, able to spell any text, with the sentinels of infilling in it.

Knows no model. The sentinels have the lowest ids, in the order of `SENTINELS`.
"""

from collections.abc import Iterable
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SENTINELS = ("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>")


class Sentinels(NamedTuple):
    """Token ids that stand between texts."""

    end: int
    prefix: int
    middle: int
    suffix: int
    pad: int


def train_vocabulary(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding over bytes (all 256 are in the vocabulary); digits stay single."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SENTINELS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def sentinels_of(tokenizer: Tokenizer) -> Sentinels:
    """The ids of the sentinels. Raises ValueError when the vocabulary lacks one."""
    return Sentinels(*(id_of(tokenizer, name) for name in SENTINELS))


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the vocabulary must have. Raises ValueError when it does not."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"The vocabulary lacks {token}: train it with headway.train.vocabulary.")
    return number


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Tokens of plain texts: a sentinel's name inside a text is spelled out, never taken for the sentinel."""
    tokenizer.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        tokenizer.encode_special_tokens = False
