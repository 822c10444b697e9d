"""The routes of the door. Each is short: read, understand, submit, tell."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headway import __version__
from headway.config import DoorSettings
from headway.models.infill import Infill
from headway.models.tokenizer import ModelText
from headway.placement.link import EngineLink
from headway.placement.wire import EngineFacts
from headway.server import schema
from headway.server.chat_shapes import ChatShape
from headway.server.embeddings import (
    EmbeddingBody,
    ScoreBody,
    Vector,
    check_dimensions,
    embeddings_of,
    pooled,
    renamed,
    scores_of,
    vectors,
)
from headway.server.errors import ApiError, not_ready
from headway.server.guard import Guard, Hosts, Keys, on_http_exception
from headway.server.intake import Ask, Intake
from headway.server.life import Call
from headway.server.live import Live, Visit
from headway.server.metrics import CONTENT_TYPE, Metrics
from headway.server.openapi import document
from headway.server.responses import ResponsesBody
from headway.server.responses_shapes import ResponsesShape
from headway.server.shapes import CompletionShape, Shape, Usage, usage_of
from headway.server.stream import Finish, Update, converse, shown_answers
from headway.server.terms import tenant_of
from headway.server.timeline import MAX_CALLS, Timelines, shown
from headway.server.tokens import Tokens
from headway.server.traces import Traces
from headway.server.transport import UNNAMED, EventStream, Framing, read_body, unless_gone
from headway.server.verdict import SloReport, class_counted, reports

log = logging.getLogger("headway.door")

PAGE = {  # path -> file, media type
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/playground.js": ("playground.js", "text/javascript"),
    "/past.js": ("past.js", "text/javascript"),
    "/live.js": ("live.js", "text/javascript"),
    "/device.js": ("device.js", "text/javascript"),
    "/curves.js": ("curves.js", "text/javascript"),
    "/show.js": ("show.js", "text/javascript"),
    "/vendor/uPlot.js": ("vendor/uPlot.iife.min.js", "text/javascript"),
    "/vendor/uPlot.css": ("vendor/uPlot.min.css", "text/css"),
}
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Door:
    """One model's HTTP face. Everything it needs is passed in; between calls it keeps what they were like, no more."""

    def __init__(self, text: ModelText, link: EngineLink, settings: DoorSettings) -> None:
        self.names = settings.served_model_name or (text.name,)
        self.metrics = Metrics(link, self.names[0])
        self._tokenizer = text.tokenizer
        self._intake = Intake(text, self.names, settings.slo_classes)
        self._tokens = Tokens(text, self._intake)
        self._timelines = Timelines()
        self._live = Live(link, self.metrics.judged)
        self._fills_in_middle = Infill.of(text.tokenizer) is not None
        self._link = link
        self._settings = settings
        self._traces = Traces(settings.otlp_traces_endpoint) if settings.otlp_traces_endpoint else None
        self._created = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/responses", self.responses, methods=["POST"]),
            Route("/v1/responses/{id}", self.kept_response, methods=["GET", "DELETE"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/v1/score", self.score, methods=["POST"]),
            Route("/score", self.score, methods=["POST"]),
            Route("/v1/requests/{id}/timeline", self.timeline, methods=["GET"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/ready", self.ready, methods=["GET"]),
            Route("/metrics", self.prometheus, methods=["GET"]),
            Route("/state", self.state, methods=["GET"]),
            Route("/live", self.live, methods=["GET"]),
            Route("/version", self.version, methods=["GET"]),
            Route("/openapi.json", self.openapi, methods=["GET"]),
            *(Route(path, _page(*page), methods=["GET"]) for path, page in PAGE.items()),
        ]
        known_paths = frozenset(route.path for route in routes)
        keys = Keys(self._settings.api_key)
        hosts = Hosts(self._settings)
        guard = Middleware(Guard, keys, hosts, self.metrics, known_paths, self._settings.access_log)
        app = Starlette(routes=routes, middleware=[guard], exception_handlers={HTTPException: on_http_exception})
        app.router.redirect_slashes = False  # it would send callers to whatever host their Host header names
        return app

    def close(self) -> None:
        """Send what has been noted to the collector."""
        if self._traces is not None:
            self._traces.close()

    # Answers

    async def completions(self, request: Request) -> Response | EventStream:
        content = await read_body(request, self._settings.max_body_bytes)
        arrival = time.monotonic()
        body = schema.decode(content, schema.CompletionBody)
        room = self._loaded().max_model_len
        ask = await self._intake.completion(body, request.headers, request.scope["headway.call_id"], arrival, room)
        return await self._answer(request, ask, CompletionShape(ask, self._tokenizer))

    async def chat_completions(self, request: Request) -> Response | EventStream:
        content = await read_body(request, self._settings.max_body_bytes)
        arrival = time.monotonic()
        body = schema.decode(content, schema.ChatBody)
        room = self._loaded().max_model_len
        ask = await self._intake.chat(body, request.headers, request.scope["headway.call_id"], arrival, room)
        return await self._answer(request, ask, ChatShape(ask, self._tokenizer))

    async def responses(self, request: Request) -> Response | EventStream:
        content = await read_body(request, self._settings.max_body_bytes)
        arrival = time.monotonic()
        body = schema.decode(content, ResponsesBody)
        room = self._loaded().max_model_len
        ask = await self._intake.response(body, request.headers, request.scope["headway.call_id"], arrival, room)
        shape = ResponsesShape(ask, body, self._tokenizer)
        return await self._answer(request, ask, shape, shape.framing)

    async def embeddings(self, request: Request) -> Response:
        content = await read_body(request, self._settings.max_body_bytes)
        arrival = time.monotonic()
        body = schema.decode(content, EmbeddingBody)
        check_dimensions(body, self._loaded().hidden_size)
        ask = await self._texts(request, body, "embd", "input", arrival)
        return await self._condensed(request, ask, lambda made, usage: embeddings_of(body, ask, made, usage))

    async def score(self, request: Request) -> Response:
        content = await read_body(request, self._settings.max_body_bytes)
        arrival = time.monotonic()
        body = schema.decode(content, ScoreBody)
        body.check()
        ask = await self._texts(request, body, "score", "text_1", arrival)
        created = int(time.time())
        return await self._condensed(request, ask, lambda made, usage: scores_of(body, ask, made, usage, created))

    async def _texts(
        self,
        request: Request,
        body: EmbeddingBody | ScoreBody,
        prefix: str,
        param: str,
        arrival: float,
    ) -> Ask:
        room, call_id = self._loaded().max_model_len, request.scope["headway.call_id"]
        try:
            ask = await self._intake.completion(body.as_completion(), request.headers, call_id, arrival, room)
        except ApiError as error:
            raise renamed(error, param) from error
        return pooled(ask, body.pooling or self._settings.pooling, f"{prefix}-{call_id}")

    async def _condensed(
        self, request: Request, ask: Ask, shape: Callable[[list[Vector], Usage], msgspec.Struct]
    ) -> Response:
        call = self._call(request, ask)
        self._live.expect(call)
        with _telling(call):
            made, finishes = await unless_gone(request.receive, vectors(self._link, ask, call))
        return _json(shape(made, self._account(ask, dict(enumerate(finishes)))), headers=call.headers())

    async def kept_response(self, request: Request) -> Response:
        raise ApiError(404, "response_not_found", "No response is kept here: keep the answer that you got.", param="id")

    async def _answer(
        self, request: Request, ask: Ask, shape: Shape, framing: Framing = UNNAMED
    ) -> Response | EventStream:
        call = self._call(request, ask)
        self._live.expect(call)
        if ask.stream:
            keep_alive_s = self._settings.sse_keep_alive_interval
            return EventStream(partial(self._stream, ask, call, shape), keep_alive_s, call.headers, framing)
        whole = await unless_gone(request.receive, self._collect(ask, call, shape))
        return Response(whole, headers=call.headers(), media_type="application/json")

    def _call(self, request: Request, ask: Ask) -> Call:
        """One that is kept for its timeline, and told to the collector if there is one."""
        told = None if self._traces is None else partial(self._traces.tell, headers=request.headers)
        call = Call(ask, self.metrics, told)
        self._timelines.keep(call)
        return call

    async def _stream(self, ask: Ask, call: Call, shape: Shape, stream: EventStream) -> None:
        finishes: dict[int, Finish] = {}

        def tell(update: Update) -> None:
            if update.finish is not None:
                finishes[update.choice] = update.finish
            stream.put(shape.chunks(update))

        with _telling(call):
            await converse(self._link, ask, self._tokenizer, call, tell)
        usage = self._account(ask, finishes)
        if ask.include_usage:
            stream.put([shape.usage_chunk(usage)])

    async def _collect(self, ask: Ask, call: Call, shape: Shape) -> bytes:
        answers: list[list[Update]] = [[] for _ in ask.requests]
        with _telling(call):
            await converse(self._link, ask, self._tokenizer, call, lambda update: answers[update.choice].append(update))
        finishes = {place: updates[-1].finish for place, updates in enumerate(answers) if updates[-1].finish}
        chosen, usage = shown_answers(ask, answers), self._account(ask, finishes)
        if ask.scores_prompts:  # a large answer, which others need not wait for
            return await asyncio.to_thread(shape.whole, chosen, usage)
        return shape.whole(chosen, usage)

    def _account(self, ask: Ask, finishes: dict[int, Finish]) -> Usage:
        usage = usage_of(ask, [finishes[choice] for choice in range(len(ask.requests))])
        timing, asked = usage.headway, ask.requests[0]
        log.info(
            "%s: %d + %d tokens, first after %s ms, then one per %s ms, class %s, slo %s",
            *(ask.id, usage.prompt_tokens, usage.completion_tokens, timing.ttft_ms, timing.tpot_ms),
            *(class_counted(asked.slo_class, asked.slo), _verdict_in_words(timing.slo)),
        )
        return usage

    def _loaded(self) -> EngineFacts:
        """The engine's facts, once it has been ready. Whether a request may enter then is the link's to say, so that a
        refusal is counted like any other."""
        facts = self._link.facts
        if facts is None:
            raise not_ready("starting", "The model is still being loaded: try again in a moment.")
        return facts

    async def timeline(self, request: Request) -> Response:
        """What became of a call, and when. To a caller of another tenant it is as unknown as one that never was."""
        name = request.path_params["id"]
        call = self._timelines.find(name, tenant_of(request.headers))
        if call is None:
            raise ApiError(
                404,
                "request_not_found",
                f"No request {name[:200]!r} is remembered for you: give the id of one of the last {MAX_CALLS} answers, "
                "or its X-Request-Id, and the tenant that it was sent with.",
                param="id",
            )
        return _json(shown(call), headers={"cache-control": "no-store"})

    # Text and ids

    async def tokenize(self, request: Request) -> Response:
        body = schema.decode(await read_body(request, self._settings.max_body_bytes), schema.TokenizeBody)
        return _json(await self._tokens.tokenize(body, self._loaded().max_model_len))

    async def detokenize(self, request: Request) -> Response:
        body = schema.decode(await read_body(request, self._settings.max_body_bytes), schema.DetokenizeBody)
        return _json(await self._tokens.detokenize(body))

    async def tokenizer_info(self, request: Request) -> Response:
        return _json(self._tokens.info())

    # The model, and how the server does

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._card(name) for name in self.names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.names:
            raise ApiError(404, "model_not_found", f"The model {name[:100]!r} is not served here.", param="model")
        return _json(self._card(name))

    def _card(self, name: str) -> dict[str, object]:
        facts = self._link.facts
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "headway",
            "root": self.names[0],
            "parent": None,
            "max_model_len": None if facts is None else facts.max_model_len,
        }

    async def health(self, request: Request) -> Response:
        """Whether this process is worth keeping."""
        down = self._link.state == "down"
        return _json({"status": "down" if down else "live"}, 503 if down else 200)

    async def ready(self, request: Request) -> Response:
        """Whether to send requests here."""
        state = self._link.state
        if state == "ready":
            return _json({"status": "ready"})
        return _json({"status": state}, 503, {"retry-after": "1"})

    async def prometheus(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def state(self, request: Request) -> Response:
        """What the page shows beside the answers."""
        link = self._link
        return _json(
            {
                "state": link.state,
                "models": self.names,
                "restarts": link.num_restarts,
                "facts": link.facts,
                "fills_in_middle": self._fills_in_middle,
                "beat": link.beat,
                "classes": self.metrics.judged,
            }
        )

    async def live(self, request: Request) -> Visit:
        """The same as it happens."""
        return self._live.reader(self._settings.sse_keep_alive_interval)

    async def openapi(self, request: Request) -> Response:
        return _json(document(__version__, with_keys=bool(self._settings.api_key)))

    async def version(self, request: Request) -> Response:
        return _json({"version": __version__})


@contextmanager
def _telling(call: Call) -> Iterator[None]:
    """A call that ends with an error tells what is known of it, to its caller and to the log."""
    try:
        yield
    except ApiError as error:
        error.carry(call.headers())
        name, slo = class_counted(call.slo_class, call.slo), _verdict_in_words(reports(call.records))
        log.info("%s: no answer (%s), class %s, slo %s", call.id, error.code, name, slo)
        raise


def _verdict_in_words(slo: dict[str, SloReport]) -> str:
    missed = ", ".join(f"{target}: {report.cause}" for target, report in slo.items() if not report.met)
    return f"missed ({missed})" if missed else "met" if slo else "none"


def _json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def _page(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = (files("headway.server") / "page" / name).read_bytes()

    async def show(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return show
