"""Fill in the middle, in the words that a model was trained on: its sentinels, found in its vocabulary.

The order is prefix, suffix, middle; what the model writes next is the middle. Texts are only ever read as text: one
that spells a sentinel does not become one. Knows no request.
"""

from collections.abc import Mapping
from typing import NamedTuple, Self

from headway.models.tokenizer import Tokenizer


class Spelling(NamedTuple):
    """What stands before each part, and what else ends a middle besides these three."""

    prefix: str
    suffix: str
    middle: str
    ends: tuple[str, ...]


SPELLINGS = (
    # Qwen coders, CodeGemma, the embedded model
    Spelling(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"),
    ),
    # StarCoder, Granite
    Spelling(
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        ("<|endoftext|>", "<fim_pad>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>"),
    ),
    # SantaCoder
    Spelling("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ("<|endoftext|>", "<fim-pad>")),
    # DeepSeek coders
    Spelling("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ("<｜end▁of▁sentence｜>", "<|EOT|>")),
    # Code Llama
    Spelling("▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",)),
)


class Infill:
    """Asks one model for what stands between two texts. `end_ids` end its answer, beside the model's own."""

    def __init__(self, tokenizer: Tokenizer, spelling: Spelling, ids: Mapping[str, int]) -> None:
        """`ids` of what is spelled, as far as the vocabulary has it."""
        self.end_ids = tuple(dict.fromkeys(ids.values()))
        self._prefix, self._suffix, self._middle = (ids[text] for text in spelling[:3])
        self._opening = tokenizer.opening
        self._tokenizer = tokenizer.literal(ids)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self | None:
        """None if the model has no sentinels. Copies the vocabulary: for a large one that takes a second."""
        for spelling in SPELLINGS:
            found = {text: tokenizer.token_id(text) for text in (*spelling[:3], *spelling.ends)}
            ids = {text: token for text, token in found.items() if token is not None}
            if all(text in ids for text in spelling[:3]):
                return cls(tokenizer, spelling, ids)
        return None

    def prompt(self, prefix: str, suffix: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The ids after which the model writes the middle."""
        opening = self._opening if add_special_tokens else ()
        first = self._tokenizer.encode(prefix, add_special_tokens=False)
        return (*opening, self._prefix, *first, self._suffix, *self._tokenizer.encode_rest(suffix), self._middle)
