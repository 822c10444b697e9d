"""Stands before every route: who may enter, under which id, and what they are told when something goes wrong."""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headway.config import DoorSettings
from headway.server.errors import ApiError, internal
from headway.server.intake import request_id
from headway.server.logs import tell_access
from headway.server.metrics import Metrics
from headway.server.transport import WRITE_NOW, CallerLeft

log = logging.getLogger("headway.door")

OPEN_PATHS = frozenset({"/health"})  # a probe holds no key
LOOPBACK = ("127.0.0.1", "::1", "localhost")
_PORT = re.compile(r":\d*$")


class Keys:
    """Compares keys by their hashes, in constant time."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def admit(self, authorization: str) -> bool:
        """Bearer KEY; or Basic, whatever the user, with KEY as the password, which is how a browser asks its person."""
        if not self._digests:
            return True
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() == "basic":
            given = _password(given)
        elif scheme.lower() != "bearer":
            given = ""
        digest = hashlib.sha256(given.strip().encode()).digest()
        found = False
        for known in self._digests:  # all of them, so that the time says nothing about which one it was
            found |= hmac.compare_digest(digest, known)
        return found


class Hosts:
    """By which names the server may be called. One that listens on this machine alone and asks for no key trusts
    whoever is on it; but a page of a stranger, whose name suddenly means this machine (DNS rebinding), is no such one.
    Addresses and names without a dot belong to nobody's domain.
    """

    def __init__(self, settings: DoorSettings) -> None:
        is_private = settings.host in LOOPBACK and not settings.api_key
        self._names = frozenset(name.lower() for name in settings.allowed_hosts) if is_private else None

    def admit(self, host: str) -> bool:
        """`host` as in the header: a name or an address, perhaps with a port."""
        if self._names is None:
            return True
        name = _PORT.sub("", host).rstrip(".").lower()
        return "." not in name or name in self._names or name.endswith(".localhost") or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _password(credentials: str) -> str:
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


class Guard:
    """ASGI middleware around the routes. Every answer carries X-Request-Id; every error has the one shape."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        hosts: Hosts,
        metrics: Metrics,
        known_paths: frozenset[str],
        tells_access: bool = False,
    ) -> None:
        self._app = app
        self._keys = keys
        self._hosts = hosts
        self._metrics = metrics
        self._known_paths = known_paths
        self._tells_access = tells_access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        call_id = scope["headway.call_id"] = request_id(headers)
        begun, status, num_bytes, at = False, 499, 0, time.monotonic()  # 499: nobody waited for the answer

        async def answer(message: Message) -> None:
            nonlocal begun, status, num_bytes
            num_bytes += len(message.get("body", b""))
            if message["type"] == "http.response.start":
                begun, status = True, message["status"]
                MutableHeaders(scope=message)["x-request-id"] = call_id
                path = scope["path"] if scope["path"] in self._known_paths else "other"
                self._metrics.answered(scope["method"], path, message["status"])
            await send(message)

        if self._tells_access and (write_now := scope.get("extensions", {}).get(WRITE_NOW)) is not None:

            def write(content: bytes) -> bool:
                nonlocal num_bytes
                taken: bool = write_now(content)
                num_bytes += len(content) if taken else 0
                return taken

            scope["extensions"][WRITE_NOW] = write
        try:
            if scope["path"] not in OPEN_PATHS and not self._keys.admit(headers.get("authorization", "")):
                raise _unauthorized(scope["path"])
            if scope["path"] not in OPEN_PATHS and not self._hosts.admit(headers.get("host", "")):
                raise _unknown_host(headers["host"])
            await self._app(scope, receive, answer)
        except CallerLeft:
            log.debug("%s: the caller left", call_id)
        except ApiError as error:
            await _tell(error, scope, receive, answer)
        except Exception:
            log.exception("%s %r failed", scope["method"], scope["path"])  # %r: a path may hold line breaks
            if begun:
                raise  # the server closes the connection, so that half an answer is not taken for a whole one
            await _tell(internal(), scope, receive, answer)
        finally:
            if self._tells_access:
                seconds = time.monotonic() - at
                tell_access(scope["method"], scope["path"], status, seconds, num_bytes, call_id)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """What the router has to say (no such path, no such method), in our shape."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    headers = dict(error.headers or {})
    message = f"There is no {request.method} {request.url.path[:200]} here"
    allowed = headers.get("Allow")
    message += f": use {' or '.join(allowed.split(', '))}." if allowed else "."
    shown = ApiError(error.status_code, code, message, headers=headers)
    return Response(shown.body, shown.status, shown.headers)


async def _tell(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    await Response(error.body, error.status, error.headers)(scope, receive, send)


def _unauthorized(path: str) -> ApiError:
    challenge = 'Basic realm="Headway: leave the user empty, the password is the API key"' if path == "/" else "Bearer"
    return ApiError(
        401,
        "invalid_api_key",
        "The API key is missing or wrong: send it as the header Authorization: Bearer KEY.",
        headers={"www-authenticate": challenge},
    )


def _unknown_host(host: str) -> ApiError:
    return ApiError(
        403,
        "unknown_host",
        f"This server does not answer as {host[:100]!r}: call it by its address, or start it with --allowed-hosts NAME "
        "or with --api-key.",
    )
