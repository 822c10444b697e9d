"""Text to ids and back, for callers who count or score: vLLM's /tokenize, /detokenize and /tokenizer_info."""

import asyncio

import msgspec

from headway.models.tokenizer import LONG_CHARACTERS, ModelText
from headway.server.errors import bad_request
from headway.server.intake import Intake
from headway.server.schema import DetokenizeBody, TokenizeBody


class Tokenized(msgspec.Struct):
    """`token_strs` are spelled as in the vocabulary."""

    count: int
    max_model_len: int
    tokens: tuple[int, ...]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct):
    prompt: str


class TokenizerInfo(msgspec.Struct, kw_only=True):
    """What a remote tokenizer needs to know; `tokenizer_class` is what reads the same files in transformers."""

    tokenizer_class: str = "PreTrainedTokenizerFast"
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class Tokens:
    """One model's text, as far as strangers may look at it."""

    def __init__(self, text: ModelText, intake: Intake) -> None:
        self._text = text
        self._intake = intake

    async def tokenize(self, body: TokenizeBody, max_model_len: int) -> Tokenized:
        """Raises ApiError 400 or 404."""
        self._intake.check_model(body.model)
        ids = await self._intake.tokens_of(body)
        if not body.return_token_strs:
            return Tokenized(len(ids), max_model_len, ids)
        pieces = self._pieces(ids) if len(ids) <= LONG_CHARACTERS else await asyncio.to_thread(self._pieces, ids)
        return Tokenized(len(ids), max_model_len, ids, pieces)

    def _pieces(self, ids: tuple[int, ...]) -> list[str]:
        return [self._text.tokenizer.token_piece(token) for token in ids]

    async def detokenize(self, body: DetokenizeBody) -> Detokenized:
        """Special tokens included, so that it is the way back. Raises ApiError 400 or 404."""
        self._intake.check_model(body.model)
        tokenizer = self._text.tokenizer
        wrong = next((token for token in body.tokens if token >= tokenizer.vocab_size), None)
        if wrong is not None:
            raise bad_request(f"Token id {wrong} is not in the vocabulary of {tokenizer.vocab_size}.", "tokens")
        if len(body.tokens) <= LONG_CHARACTERS:
            return Detokenized(tokenizer.decode(body.tokens, skip_special_tokens=False))
        return Detokenized(await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False))

    def info(self) -> TokenizerInfo:
        named, template = self._text.tokenizer.special_tokens, self._text.chat_template
        return TokenizerInfo(
            vocab_size=self._text.tokenizer.vocab_size,
            bos_token=named.get("bos_token"),
            eos_token=named.get("eos_token"),
            pad_token=named.get("pad_token"),
            unk_token=named.get("unk_token"),
            chat_template=None if template is None else template.source,
        )
