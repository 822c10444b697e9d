"""The life of a server: listen, load, serve, drain, leave. Owns signals, the socket and the order of things.

The engine loads in its own process while this one imports and builds everything else. From the first moment the port
answers: /health says live, /ready says starting.
"""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from headway.config import ConfigError, DoorSettings
from headway.placement.link import EngineLink
from headway.placement.wire import EngineFacts

log = logging.getLogger("headway.run")

BACKLOG = 2048
WATCH_S = 0.2


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError with what to change."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        # What is accepted inherits it. asyncio leaves it out for a socket that names no protocol: then a token waits
        # until what was written before it has been acknowledged.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (socket.gaierror, UnicodeError) as error:  # the latter: no name at all
        raise ConfigError(f"--host {host} is not an address of this machine: try 127.0.0.1 or 0.0.0.0.") from error
    except PermissionError as error:
        raise ConfigError(f"Port {port} needs more rights than this user has: choose one above 1023.") from error
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {host}:{port} ({os.strerror(error.errno or 0)}): stop what uses it, or choose another "
            "with --port."
        ) from error


def allow_many_files() -> None:
    """As many open connections as the system lets this process have: the usual first limit is 1024."""
    try:
        import resource
    except ImportError:  # this system has no such limits
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:  # some systems name a hard limit that they do not grant
        log.debug("At most %d files can be open: %s", soft, error)


def address(listener: socket.socket, scheme: str = "http") -> str:
    """Where a browser on this machine finds it."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


async def serve(
    model: str | None,
    settings: DoorSettings,
    link: EngineLink,
    listener: socket.socket,
    announce: Callable[[EngineFacts, str], None],
) -> int:
    """Until told to leave; returns the exit code. `announce` is called once, when requests are admitted.

    Raises ModelError, or what the link raises when its engine cannot start.
    """
    allow_many_files()
    leave, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: (hurry if leave.is_set() else leave).set())
    starting = asyncio.create_task(link.start())
    await asyncio.sleep(0)  # the engine's process is on its way; what follows needs this one
    http = door = None
    try:
        from headway.models.tokenizer import open_model_text
        from headway.server.app import Door
        from headway.server.http import Http
        from headway.server.tls import tls_options

        text = await asyncio.to_thread(open_model_text, model, settings.chat_template)
        door = Door(text, link, settings)
        http = Http(door.app(), listener, tls_options(settings))
        await _first(starting, leave.wait())
        if not leave.is_set():
            assert link.facts is not None
            announce(link.facts, door.names[0])
            for one in settings.slo_classes:
                log.info("Class %s", one)
            await _first(_watch(link), leave.wait())
        if not leave.is_set():
            log.error("The engine is gone for good; leaving. The lines above say why.")
            return 1
        log.info("Finishing open requests, for up to %g s. Ctrl-C again leaves at once.", settings.shutdown_timeout)
        await _first(link.drain(settings.shutdown_timeout), hurry.wait())
        return 130 if hurry.is_set() else 0
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await link.close()
        if http is not None:
            await http.close(patient=not hurry.is_set())
        if door is not None:
            await asyncio.to_thread(door.close)
        listener.close()


async def _watch(link: EngineLink) -> None:
    while link.state != "down":
        await asyncio.sleep(WATCH_S)


async def _first(*works: Awaitable[Any]) -> None:
    """Until one of them is done; the others are cancelled. Raises what that one raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
