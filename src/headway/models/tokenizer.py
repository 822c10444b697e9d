"""From text to token ids and back, for a model's folder or for `random:PRESET` on the embedded tokenizer.

Owns the files that concern text: tokenizer.json, tokenizer_config.json, special_tokens_map.json, the chat template and
the sampling defaults of generation_config.json. Knows no tensor and no request.

Decoding is a table from id to bytes and one UTF-8 decoder, so that text can be handed out while it grows: a character
whose bytes are spread over several tokens appears when its last byte does, and what the pieces add up to is the text of
the whole. In this it differs from the `tokenizers` library in one place: where a byte-fallback vocabulary yields bytes
that are not UTF-8, a � stands for each broken character, not for each byte around it.
"""

import codecs
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import tokenizers

from headway.models import presets
from headway.models.config import ModelError, read_config
from headway.models.locate import locate

if TYPE_CHECKING:
    from headway.models.chat_template import ChatTemplate

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SAMPLING_DEFAULTS = {  # name -> least, most
    "temperature": (0, 100),
    "top_p": (1e-6, 1),
    "top_k": (-1, 2**31),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "max_new_tokens": (1, 2**31),
}
LONG_CHARACTERS = 8192  # about a millisecond's work
_APART = "☺"  # joins no token with what follows it
_utf8 = codecs.getincrementaldecoder("utf-8")


class _Bytes(dict[int, bytes]):
    """Token id -> its bytes, worked out when first asked for: a vocabulary of 150,000 costs nothing at the start."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of

    def __missing__(self, token: int) -> bytes:
        found = self[token] = self._bytes_of(token)
        return found


class Detokenizer:
    """The text of one answer while it grows. Never hands out half a character."""

    def __init__(self, table: Mapping[int, bytes]) -> None:
        self._table = table
        self._decoder = _utf8("replace")
        self._holds = False  # the beginning of a character

    def feed(self, tokens: Iterable[int]) -> str:
        """The text that these tokens complete, possibly none."""
        spelled = b"".join(map(self._table.__getitem__, tokens))
        if not self._holds:
            try:
                return spelled.decode()
            except UnicodeDecodeError:
                pass
        text = self._decoder.decode(spelled)
        self._holds = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """What is left when no token follows: � for a character that stayed incomplete."""
        return self._decoder.decode(b"", final=True)


class Tokenizer:
    """Text to ids and back. `vocab_size` is the model's: ids from `num_known` on print as placeholders `<|id|>`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        decoder: dict[str, Any] | None,
        *,
        special_tokens: Mapping[str, str] | None = None,
        vocab_size: int | None = None,
        eos_ids: Sequence[int] = (),
    ) -> None:
        self.special_tokens = dict(special_tokens or {})  # name -> text, e.g. bos_token -> <s>
        self.num_known = backend.get_vocab_size()
        self.vocab_size = vocab_size or self.num_known
        self.eos_ids = tuple(eos_ids)
        self._backend = backend
        self._how = _Decoding.parse(decoder)
        added = backend.get_added_tokens_decoder()
        self.added_tokens = {entry.content: token for token, entry in added.items() if not entry.special}
        self._special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self._table = _Bytes(self._bytes_of)
        self._shown = _Bytes(lambda token: b"" if token in self._special_ids else self._table[token])

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The ids of `text`; with what the model wants around it (a rendered chat template brings its own)."""
        if len(text) > LONG_CHARACTERS:  # only the call for batches lets other threads run while it works
            (encoding,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        else:
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """What the model wants before any text, such as a mark for its beginning."""
        bare, whole = self.encode("a", add_special_tokens=False), self.encode("a")
        starts = (at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare)
        return whole[: next(starts, 0)]

    def encode_rest(self, text: str) -> tuple[int, ...]:
        """The ids of a text in the midst of another: without what a first word gets, be it a space or a mark."""
        if not self._how.leading_space:
            return self.encode(text, add_special_tokens=False)
        before = self.encode(_APART, add_special_tokens=False)
        ids = self.encode(_APART + text, add_special_tokens=False)
        return ids[len(before) :] if ids[: len(before)] == before else self.encode(text, add_special_tokens=False)

    def literal(self, texts: Iterable[str] = ()) -> "Tokenizer":
        """The same vocabulary for strangers' text: where it spells a special token, or one of these, it stays text."""
        also = frozenset(texts)
        content = msgspec.json.decode(self._backend.to_str())
        for entry in content["added_tokens"]:
            entry["special"] = entry["special"] or entry["content"] in also
        backend = tokenizers.Tokenizer.from_buffer(msgspec.json.encode(content))
        backend.encode_special_tokens = True
        return Tokenizer(
            backend,
            content["decoder"],
            special_tokens=self.special_tokens,
            vocab_size=self.vocab_size,
            eos_ids=self.eos_ids,
        )

    def decode(self, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole. A detokenizer's pieces add up to it, but for the space that starts a text."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        text = detokenizer.feed(tokens) + detokenizer.flush()
        return text.removeprefix(" ") if self._how.leading_space else text

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """For tokens that continue a text: a space before the first word is kept."""
        return Detokenizer(self._shown if skip_special_tokens else self._table)

    @property
    def source(self) -> str:
        """The text of a tokenizer.json that says the same."""
        return str(self._backend.to_str())

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text of k characters has at least k / longest_token tokens."""
        return max(len(text) for text in self._backend.get_vocab())

    def token_bytes(self, token: int) -> bytes:
        return self._table[token]

    def token_text(self, token: int) -> str:
        """One token in print. Bytes that are no text by themselves are spelled out, so that different tokens differ."""
        spelled = self._table[token]
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def token_piece(self, token: int) -> str:
        """One token as the vocabulary has it, where a space may be a Ġ."""
        spelled: str | None = self._backend.id_to_token(token)
        return f"<|{token}|>" if spelled is None else spelled

    def token_id(self, text: str) -> int | None:
        """The id of exactly this token, such as a sentinel; None if the vocabulary lacks it."""
        found: int | None = self._backend.token_to_id(text)
        return found

    def _bytes_of(self, token: int) -> bytes:
        spelled = self._backend.id_to_token(token) if 0 <= token < 2**32 else None
        return f"<|{token}|>".encode() if spelled is None else self._how.token_bytes(spelled)


@dataclass(frozen=True, slots=True)
class ModelText:
    """Everything of a model that concerns text. `name` is what it is served as if nothing else is asked."""

    name: str
    tokenizer: Tokenizer
    chat_template: "ChatTemplate | None"
    sampling_defaults: Mapping[str, float]  # from generation_config.json, by its names


def open_model_text(model: str | None, chat_template: str | None = None, *, chats: bool = True) -> ModelText:
    """The text side of `model` (as in `EngineSettings.model`). Raises ModelError with a sentence that says what to do.

    `chat_template` is a file or the template itself, and goes before the model's own. Whoever renders no `chats` is
    spared it, and a tenth of a second for the library that does.
    """
    preset = presets.parse(model)
    folder = locate(None if preset else model)
    config = preset or read_config(folder)
    fields = _read_json(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(fields, _read_json(folder / "special_tokens_map.json"))
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder} holds no tokenizer.json: give a model with a fast tokenizer.")
    try:
        content = path.read_bytes()
        backend = tokenizers.Tokenizer.from_buffer(content)
        decoder = msgspec.json.decode(content, type=_TokenizerFile).decoder
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{path} cannot be read ({_brief(error)}): download the model again.") from error
    _prepare(backend, special_tokens)
    own_eos = None if preset else backend.token_to_id(special_tokens.get("eos_token", ""))
    tokenizer = Tokenizer(
        backend,
        decoder,
        special_tokens=special_tokens,
        vocab_size=config.vocab_size,
        eos_ids=tuple(dict.fromkeys((*config.eos_ids, *(() if own_eos is None else (own_eos,))))),
    )
    defaults = {} if preset else _sampling_defaults(folder / "generation_config.json")
    name = folder.name if model is None else model.rstrip("/")
    source = (chat_template or _find_template(folder, fields)) if chats else None
    return ModelText(name, tokenizer, _parse_template(source, special_tokens) if source else None, defaults)


class _TokenizerFile(msgspec.Struct):
    decoder: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class _Decoding:
    """How a vocabulary spells bytes."""

    byte_level: bool = False  # every character stands for a byte
    byte_fallback: bool = False  # <0x0A> is a byte
    replacements: tuple[tuple[str, str], ...] = ()
    leading_space: bool = False  # a text's first token begins with a space that is not part of it

    @classmethod
    def parse(cls, decoder: dict[str, Any] | None) -> "_Decoding":
        """Understand the decoder of a tokenizer.json. Raises ModelError for a kind that is not supported."""
        found: dict[str, Any] = {}
        replacements: list[tuple[str, str]] = []
        for step in _steps(decoder):
            match step:
                case {"type": "ByteLevel"}:
                    found["byte_level"] = True
                case {"type": "ByteFallback"}:
                    found["byte_fallback"] = True
                case {"type": "Fuse"}:
                    pass
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                    replacements.append((old, new))
                case {"type": "Metaspace", "replacement": str(old)}:
                    replacements.append((old, " "))
                    found["leading_space"] = step.get("prepend_scheme", "always") != "never"
                case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                    found["leading_space"] = bool(start)
                case {"type": kind}:
                    raise ModelError(f"Its tokenizer.json has a decoder step {kind!r} that is not supported.")
        return cls(replacements=tuple(replacements), **found)

    def token_bytes(self, spelled: str) -> bytes:
        if self.byte_level:
            try:
                return bytes([_BYTE_OF[character] for character in spelled])
            except KeyError:  # an added token with a character that stands for no byte
                return spelled.encode()
        if self.byte_fallback and len(spelled) == 6 and spelled.startswith("<0x") and spelled.endswith(">"):
            try:
                return bytes([int(spelled[3:5], 16)])
            except ValueError:
                pass
        for old, new in self.replacements:
            spelled = spelled.replace(old, new)
        return spelled.encode()


def _byte_characters() -> dict[str, int]:
    """The printable stand-ins of a byte-level vocabulary: Latin-1 where it prints, U+0100 and up in order elsewhere."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        raise ModelError("Its tokenizer.json names no decoder: give a model with a complete tokenizer.")
    return list(decoder["decoders"]) if decoder.get("type") == "Sequence" else [decoder]


def _prepare(backend: tokenizers.Tokenizer, special_tokens: dict[str, str]) -> None:
    """A prompt is never cut or padded behind our back, and a token that is named as special is special.

    What goes around a prompt is the post-processor's alone to say: `add_bos_token` and its like in
    tokenizer_config.json are for building a tokenizer.json, not for reading one.
    """
    backend.no_truncation()
    backend.no_padding()
    backend.add_special_tokens([text for text in special_tokens.values() if backend.token_to_id(text) is not None])


def _special_tokens(*sources: dict[str, Any]) -> dict[str, str]:
    """The named special tokens; the first source that names one decides."""
    found: dict[str, str] = {}
    for source in sources:
        for name in _NAMED:
            value = source.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found.setdefault(name, text)
    return found


def _find_template(folder: Path, fields: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf8")
    template = fields.get("chat_template")
    if isinstance(template, list):  # several, by name
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None


def _parse_template(source: str, special_tokens: Mapping[str, str]) -> "ChatTemplate":
    from headway.models.chat_template import ChatTemplate

    return ChatTemplate.parse(source, special_tokens)


def _sampling_defaults(path: Path) -> dict[str, float]:
    """Raises ModelError for a value that no request could ask for: it would fail each of them."""
    fields = _read_json(path)
    found: dict[str, float] = {}
    for name, (least, most) in _SAMPLING_DEFAULTS.items():
        value = fields.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if not least <= value <= most:
            raise ModelError(f"{path} says {name} {value}: correct it to {least:g} to {most:g}, or remove the line.")
        found[name] = value
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({_brief(error)}): download the model again.") from error
    return fields if isinstance(fields, dict) else {}


def _brief(error: Exception) -> str:
    return str(error).partition("\n")[0][:200].rstrip(".")
