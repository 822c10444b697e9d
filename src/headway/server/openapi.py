"""The document that describes the routes, made from the types that the door itself reads and writes.

Owns the list of what is described; the routes are `app`'s, and a test keeps the two lists equal.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import msgspec

from headway.placement.wire import Beat, EngineFacts
from headway.server.chat_shapes import ChatChoice
from headway.server.embeddings import EmbeddingBody, Embeddings, ScoreBody, Scores
from headway.server.metrics import CONTENT_TYPE, Judged
from headway.server.responses import ResponsesBody
from headway.server.responses_events import ResponseObject
from headway.server.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from headway.server.shapes import CompletionChoice, Envelope, Usage
from headway.server.terms import CLASS_HEADER, TENANT_HEADERS
from headway.server.timeline import Shown
from headway.server.tokens import Detokenized, Tokenized, TokenizerInfo
from headway.server.verdict import TARGETS

_REF = "#/components/schemas/{name}"


# Answers whose types are put together here only


class Completion(Envelope, kw_only=True):
    """The answers to one or several prompts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class ChatCompletion(Envelope, kw_only=True):
    """The next message of a conversation, once or several times."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ErrorObject(msgspec.Struct):
    """What is wrong: a sentence for a person, a word for a program, and the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class Error(msgspec.Struct):
    error: ErrorObject


class ModelCard(msgspec.Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int | None


class ModelList(msgspec.Struct):
    object: Literal["list"]
    data: list[ModelCard]


class Status(msgspec.Struct):
    status: str


class State(msgspec.Struct):
    """The engine's facts, its last sign of life, and what became of requests by class."""

    state: str
    models: list[str]
    restarts: int
    facts: EngineFacts | None
    beat: Beat | None
    classes: dict[str, Judged]
    fills_in_middle: bool


class Version(msgspec.Struct):
    version: str


# The routes


class Operation(NamedTuple):
    """One method of one path. `answer` is a type, a media type if it is no JSON, or None. `errors` are told
    as an Error, besides those that any call may get; `otherwise` is a status whose answer has the same type."""

    method: str
    path: str
    summary: str
    answer: Any
    body: Any = None
    streams: bool = False
    generates: bool = False  # on terms that headers may set, and with what that may lead to
    errors: tuple[int, ...] = ()
    otherwise: int | None = None
    is_open: bool = False  # to callers without a key


_READING = (400, 404, 408, 413)  # of a body
_GENERATING = (*_READING, 429, 503)

OPERATIONS = (
    Operation(
        "post",
        "/v1/completions",
        "Continue a text, fill in its middle, or score it",
        Completion,
        CompletionBody,
        streams=True,
        generates=True,
        errors=_GENERATING,
    ),
    Operation(
        "post",
        "/v1/chat/completions",
        "Answer a conversation",
        ChatCompletion,
        ChatBody,
        streams=True,
        generates=True,
        errors=_GENERATING,
    ),
    Operation(
        "post",
        "/v1/responses",
        "Answer a conversation, in the newer shape",
        ResponseObject,
        ResponsesBody,
        streams=True,
        generates=True,
        errors=_GENERATING,
    ),
    Operation(
        "post",
        "/v1/embeddings",
        "Vectors of texts",
        Embeddings,
        EmbeddingBody,
        generates=True,
        errors=_GENERATING,
    ),
    Operation("post", "/v1/score", "How alike texts are", Scores, ScoreBody, generates=True, errors=_GENERATING),
    Operation("post", "/score", "The same", Scores, ScoreBody, generates=True, errors=_GENERATING),
    Operation("get", "/v1/responses/{id}", "Nothing is kept: always 404", None, errors=(404,)),
    Operation("delete", "/v1/responses/{id}", "Nothing is kept: always 404", None, errors=(404,)),
    Operation("get", "/v1/requests/{id}/timeline", "What became of a call, and when", Shown, errors=(400, 404)),
    Operation("get", "/v1/models", "The models served here", ModelList),
    Operation("get", "/v1/models/{name}", "One of them", ModelCard, errors=(404,)),
    Operation(
        "post", "/tokenize", "The ids of a text or a conversation", Tokenized, TokenizeBody, errors=(*_READING, 503)
    ),
    Operation("post", "/detokenize", "The text of ids", Detokenized, DetokenizeBody, errors=_READING),
    Operation("get", "/tokenizer_info", "What a remote tokenizer needs to know", TokenizerInfo),
    Operation("get", "/health", "Whether the process is worth keeping", Status, otherwise=503, is_open=True),
    Operation("get", "/ready", "Whether to send requests here", Status, otherwise=503),
    Operation("get", "/metrics", "Prometheus metrics", CONTENT_TYPE),
    Operation("get", "/state", "How the engine does", State),
    Operation("get", "/live", "The same as it happens, in events", "text/event-stream", errors=(503,)),
    Operation("get", "/version", "The server's version", Version),
    Operation("get", "/openapi.json", "This document", dict[str, Any]),
)


@lru_cache(maxsize=2)
def document(version: str, *, with_keys: bool) -> dict[str, Any]:
    """OpenAPI 3.1. `with_keys`: callers need one."""
    types = list(_types())
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    schema_of = dict(zip(map(str, types), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation, schema_of, with_keys=with_keys)
    keys = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Headway",
            "version": version,
            "description": "An OpenAI-compatible inference server with deadlines.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": components} | ({"securitySchemes": keys} if with_keys else {}),
    } | ({"security": [{"key": []}]} if with_keys else {})


def _types() -> Iterator[Any]:
    """Everything that is read or written, once."""
    found: dict[str, Any] = {str(Error): Error}
    for operation in OPERATIONS:
        for kind in (operation.answer, operation.body):
            if kind is not None and not isinstance(kind, str):
                found[str(kind)] = kind
    yield from found.values()


def _described(operation: Operation, schema_of: dict[str, Any], *, with_keys: bool) -> dict[str, Any]:
    error = _json(schema_of[str(Error)])
    answers: dict[str, Any] = {}
    if operation.answer is not None:
        answers["200"] = {"description": "The answer", "content": _content(operation, schema_of)}
    if operation.otherwise is not None:
        answers[str(operation.otherwise)] = {"description": "Not now", "content": _content(operation, schema_of)}
    refusals = [*operation.errors, 500]
    if not operation.is_open:
        refusals += [401, 403] if with_keys else [403]
    for status in sorted(refusals):
        answers[str(status)] = {"description": _REASONS[status], "content": error}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": _name(operation),
        "parameters": [*_in_path(operation.path), *(_HEADERS if operation.generates else ())],
        "responses": answers,
    }
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": _json(schema_of[str(operation.body)])}
    if operation.is_open and with_keys:
        described["security"] = []
    return described


def _content(operation: Operation, schema_of: dict[str, Any]) -> dict[str, Any]:
    if isinstance(operation.answer, str):
        return {operation.answer: {"schema": {"type": "string"}}}
    stream = {"text/event-stream": {"schema": {"type": "string"}}} if operation.streams else {}
    return _json(schema_of[str(operation.answer)]) | stream


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _name(operation: Operation) -> str:
    words = operation.path.replace("{", "").replace("}", "").replace(".", "/").split("/")
    return "_".join([operation.method, *filter(None, words)])


def _in_path(path: str) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]


_REASONS = {
    400: "Something in the request is wrong",
    401: "The key is missing or wrong",
    403: "The server is called by a name that it does not have",
    404: "There is no such thing here",
    408: "The body did not come in time",
    413: "The body is too large",
    429: "It cannot be done in the time asked for",
    500: "The server failed",
    503: "Not now: Retry-After says when",
}


def _header(name: str, description: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


_HEADERS = (
    *(
        _header(f"x-slo-{target}-ms", f"The target for {target}, in milliseconds", type="number", exclusiveMinimum=0)
        for target in TARGETS
    ),
    _header(CLASS_HEADER, "A class that the operator configured", type="string"),
    _header("x-vllm-priority", "Lower is earlier", type="integer", minimum=-(2**63), maximum=2**63 - 1),
    *(_header(name, "On whose account", type="string", pattern="^[!-~]{1,128}$") for name in TENANT_HEADERS),
)
