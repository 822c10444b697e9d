"""Vectors instead of tokens: /v1/embeddings, and the likeness of two texts by them, /v1/score.

A text's vector is pooled from the hidden states of the model that is served and has length one. What is asked goes the
road of every prompt, with its terms, and its first token is the vector.
"""

import base64
import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from headway.placement.link import EngineLink, Reply
from headway.placement.wire import Admitted, Ended
from headway.server.errors import ApiError, bad_request, from_record
from headway.server.intake import Ask
from headway.server.schema import CompletionBody, Int64, Targets, TokenId
from headway.server.shapes import Usage
from headway.server.stream import Finish, Meter, hear_out

MAX_TEXTS = 256  # of one call
Pooled = Literal["last", "mean"]
Vector = tuple[float, ...]


class Terms(msgspec.Struct, kw_only=True):
    """What both kinds of bodies may say besides their texts."""

    model: str | None = None
    pooling: Pooled | None = None
    add_special_tokens: bool | None = None
    user: str | None = None
    priority: Int64 | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    slo: Targets | None = None


class EmbeddingBody(Terms, kw_only=True):
    """POST /v1/embeddings"""

    input: str | list[str | TokenId | list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=2**20)] | None = None

    def as_completion(self) -> CompletionBody:
        return _completion(self, self.input)


class ScoreBody(Terms, kw_only=True):
    """POST /v1/score: one text against each of others, or texts pair by pair."""

    text_1: str | list[str]
    text_2: str | list[str]

    @property
    def numbers(self) -> tuple[int, int]:
        """How many texts each field holds."""
        first, second = (1 if isinstance(text, str) else len(text) for text in (self.text_1, self.text_2))
        return first, second

    def check(self) -> None:
        """Raises ApiError 400."""
        first, second = self.numbers
        if not first or not second:
            raise bad_request("`text_1` and `text_2` must each hold at least one text.", "text_1")
        if first not in (1, second):
            raise bad_request(
                f"`text_1` holds {first} texts and `text_2` {second}: give one for all, or as many.", "text_1"
            )

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Places in the list of all texts, those of `text_1` first."""
        first, second = self.numbers
        return [(place if first > 1 else 0, first + place) for place in range(second)]

    def as_completion(self) -> CompletionBody:
        texts = [[text] if isinstance(text, str) else text for text in (self.text_1, self.text_2)]
        return _completion(self, [*texts[0], *texts[1]])


def _completion(terms: Terms, texts: str | list[str | TokenId | list[TokenId]] | list[str]) -> CompletionBody:
    """The completion of nothing that reads the same texts on the same terms. Raises ApiError 400."""
    if isinstance(texts, list) and len(texts) > MAX_TEXTS and not isinstance(texts[0], int):
        raise bad_request(f"A call may hold at most {MAX_TEXTS} texts, not {len(texts)}: send them in parts.", "prompt")
    return CompletionBody(
        model=terms.model,
        prompt=list(texts) if isinstance(texts, list) else texts,
        max_tokens=0,
        add_special_tokens=terms.add_special_tokens,
        user=terms.user,
        priority=terms.priority,
        cache_salt=terms.cache_salt,
        slo=terms.slo,
    )


def pooled(ask: Ask, pooling: Pooled, name: str) -> Ask:
    """The same call, asking for vectors, under a name of its own."""
    return replace(ask, id=name, requests=tuple(replace(each, pooling=pooling) for each in ask.requests))


async def vectors(link: EngineLink, ask: Ask, meter: Meter) -> tuple[list[Vector], list[Finish]]:
    """One for each request, in their order. Raises ApiError, and leaves nothing running at the engine."""
    found: dict[int, Vector] = {}
    finishes: dict[int, Finish] = {}
    open_requests = dict(enumerate(ask.requests))

    def hear(place: int, reply: Reply) -> None:
        if isinstance(reply, Ended):
            meter.ended(open_requests.pop(place), reply.record)
            if reply.record.kind != "finished":
                raise from_record(reply.record)
            finishes[place] = Finish("length", None, 0, reply.record)
        elif isinstance(reply, Admitted):
            meter.admitted(ask.requests[place], reply.predicted_ttft_s)
        else:
            found[place] = reply.commit.vector

    try:
        await hear_out(link, ask.requests, hear)
    finally:
        for request in open_requests.values():
            meter.abandoned(request)
    return [found[place] for place in range(len(ask.requests))], [finishes[place] for place in range(len(finishes))]


class Embedding(msgspec.Struct):
    index: int
    embedding: list[float] | str  # base64 of float32, little endian
    object: Literal["embedding"] = "embedding"


class Embeddings(msgspec.Struct):
    data: list[Embedding]
    model: str
    usage: Usage
    object: Literal["list"] = "list"


class Score(msgspec.Struct):
    index: int
    score: float
    object: Literal["score"] = "score"


class Scores(msgspec.Struct):
    id: str
    created: int
    data: list[Score]
    model: str
    usage: Usage
    object: Literal["list"] = "list"


def check_dimensions(body: EmbeddingBody, hidden_size: int) -> None:
    """Raises ApiError 400."""
    if body.dimensions is not None and body.dimensions > hidden_size:
        raise bad_request(
            f"`dimensions` is {body.dimensions}, and this model's vectors have {hidden_size}: ask for no more.",
            "dimensions",
        )


def embeddings_of(body: EmbeddingBody, ask: Ask, made: Sequence[Vector], usage: Usage) -> Embeddings:
    data = []
    for index, vector in enumerate(made):
        shown = vector if body.dimensions is None else shortened(vector, body.dimensions)
        told = list(shown) if body.encoding_format != "base64" else _base64(shown)
        data.append(Embedding(index, told))
    return Embeddings(data, ask.model, usage)


def scores_of(body: ScoreBody, ask: Ask, made: Sequence[Vector], usage: Usage, created: int) -> Scores:
    data = [Score(index, likeness(made[a], made[b])) for index, (a, b) in enumerate(body.pairs)]
    return Scores(ask.id, created, data, ask.model, usage)


def shortened(vector: Vector, num: int) -> Vector:
    """The first so many, of length one again."""
    part = vector[:num]
    length = math.sqrt(math.fsum(x * x for x in part))
    return tuple(x / length for x in part) if length else part


def likeness(a: Vector, b: Vector) -> float:
    """The cosine of two vectors of length one."""
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _base64(vector: Vector) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def renamed(error: ApiError, name: str) -> ApiError:
    """A complaint about a prompt, for a caller who knows it by another name."""
    if error.param == "prompt":
        error.param = name
        error.message = error.message.replace("`prompt`", f"`{name}`").replace("The prompt", f"A text of `{name}`")
    return error
