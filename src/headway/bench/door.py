"""What the door costs: `python -m headway.bench.door`.

The door runs as it does in service, in a process of its own; the engine at the other end of its socket is this process,
which answers on the spot: each stream's next token is sent at its instant, and nothing is computed. This process is the
client as well, so one clock says when a token was handed to the door and when its event came out. Streams start
staggered. Measured are the time between the two, and the processor time of the door's process per token.
"""

import argparse
import asyncio
import contextlib
import random
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

import msgspec
import psutil
import uvloop
from rich.progress import Progress

from headway.bench import report
from headway.bench.score import quantile
from headway.config import DoorSettings, EngineSettings
from headway.core.ledger import Record, settle
from headway.core.lifecycle import State
from headway.core.work import Commit
from headway.placement import wire
from headway.placement.supervise import Line, Supervisor

COMMAND = "python -m headway.bench.door"
MODULE = "headway.bench.door"
MAX_CPU_US, MAX_ADDED_MS = 40.0, 5.0
BEAT_S = 1.0
CONTEXT = 8192
FIRST_PROMPT_ID = 1000  # a stream is known by its prompt: two ids of the vocabulary
WARM_S = 2.0  # of streaming before it counts


class Inherited(Supervisor):
    """The door's side of an engine that runs already: the one at the other end of this socket."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(EngineSettings())
        self._connection = connection

    async def _launch(self) -> Line:
        return await self._connect(self._connection)

    async def _describe_death(self) -> str:
        return "The other end has hung up."


def serve(engine_fd: int, listener_fd: int) -> int:
    """The door's process."""
    from headway.server import run

    listener, engine = socket.socket(fileno=listener_fd), socket.socket(fileno=engine_fd)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run.serve(None, DoorSettings(), Inherited(engine), listener, lambda facts, name: None))


@dataclass(slots=True)
class Stream:
    """One caller: instants at which its tokens were handed over, and at which their events came."""

    number: int
    num_tokens: int
    sent_at: list[float] = field(default_factory=list)
    heard_at: list[float] = field(default_factory=list)
    asked_at: float = 0.0
    submitted_at: float = 0.0


class Instant:
    """An engine that answers on the spot, at a steady rate."""

    def __init__(self, streams: Sequence[Stream], token: int, gap_s: float) -> None:
        self._streams, self._token, self._gap_s = streams, token, gap_s
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, connection: socket.socket) -> None:
        reader, self._writer = await asyncio.open_connection(sock=connection)
        self._say(wire.Ready(_facts()))
        self._start(self._beat())
        frames = wire.Frames(bytearray())
        while data := await reader.read(1 << 16):
            for body in frames.feed(data):
                message = wire.to_engine_decoder.decode(body)
                if isinstance(message, wire.Submit):
                    self._start(self._answer(message))

    async def _answer(self, message: wire.Submit) -> None:
        request = message.request
        record = Record.open(request)
        self._say(wire.Admitted(request.id, 0.0))
        stream = self._streams[request.prompt[0] - FIRST_PROMPT_ID]
        begun = stream.submitted_at = time.monotonic()
        for number in range(request.max_tokens):
            await asyncio.sleep(max(0.0, begun + number * self._gap_s - time.monotonic()))
            record.num_output_tokens += 1
            stream.sent_at.append(time.monotonic())
            self._say(wire.Delivered(Commit(request.id, (self._token,))))
        record.first_scheduled, record.first_token, record.last_token = begun, stream.sent_at[0], stream.sent_at[-1]
        settle(record, State.FINISHED, "length", time.monotonic())
        self._say(wire.Ended(record))

    async def _beat(self) -> None:
        while True:
            self._say(wire.Beat(time.monotonic(), 0, 0, 0, {"free": 1, "held": 0, "parked": 0, "cached": 0}, {}))
            await asyncio.sleep(BEAT_S)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _say(self, message: wire.FromEngine) -> None:
        assert self._writer is not None
        self._writer.write(wire.frame(message))


def _facts() -> wire.EngineFacts:
    return wire.EngineFacts(
        model_name="instant", device="cpu", dtype="float32", dtype_reason="nothing is computed", num_parameters=0,
        max_model_len=CONTEXT, max_num_seqs=1024, page_tokens=16, num_pages=1, pool_bytes=0, num_threads=1,
        max_tile_ms=10.0, load_s=0.0,
    )  # fmt: skip


class Listening(asyncio.Protocol):
    """Sends one call and notes when each event comes; parses nothing, so that little of what is measured is its own."""

    def __init__(self, stream: Stream, body: bytes, done: "asyncio.Future[None]") -> None:
        self._stream, self._body, self._done = stream, body, done
        self._head = b"POST /v1/completions HTTP/1.1\r\nhost: door\r\ncontent-type: application/json\r\n"
        self._tail = b""
        self._answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._stream.asked_at = time.monotonic()
        length = f"content-length: {len(self._body)}\r\nconnection: close\r\n\r\n".encode()
        cast(asyncio.WriteTransport, transport).write(self._head + length + self._body)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if not self._answered:
            self._answered = True
            if b" 200 " not in data[:20] and not self._done.done():
                self._done.set_exception(RuntimeError(f"The door answers {data[-300:].decode(errors='replace')}"))
        text = self._tail + data
        whole, _, self._tail = text.rpartition(b"\n\n")  # the last event may not have come to its end
        self._stream.heard_at += [now] * (whole.count(b'"text":"') - whole.count(b'"text":""'))

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._done.set_result(None)


class Measured(NamedTuple):
    """Seconds added to each token; from the call to the engine's having it; of the door's processor per token."""

    added_s: list[float]
    to_engine_s: list[float]
    cpu_s: float
    num_lost: int


async def measure(num_streams: int, rate: float, duration_s: float, seed: int) -> Measured:
    """So many streams of so many tokens a second, each begun at a random instant of the first token's gap."""
    gap_s = 1 / rate
    num_tokens = int((WARM_S + duration_s) * rate)
    if num_tokens >= CONTEXT:
        raise ValueError(
            f"--seconds and --rate make {num_tokens} tokens of a stream: at most {CONTEXT - 1} are served."
        )
    streams = [Stream(number, num_tokens) for number in range(num_streams)]
    engine = Instant(streams, _token(), gap_s)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    command = [sys.executable, "-P", "-m", MODULE, "--door", str(theirs.fileno()), str(listener.fileno())]
    door = subprocess.Popen(command, pass_fds=[theirs.fileno(), listener.fileno()])
    theirs.close()
    listener.close()
    running = asyncio.ensure_future(engine.run(ours))
    try:
        await _until_ready(port, door)
        process = psutil.Process(door.pid)
        rng, calls = random.Random(seed), []
        loop = asyncio.get_running_loop()

        async def call(stream: Stream) -> None:
            await asyncio.sleep(rng.random() * gap_s * 20)
            body = {
                "prompt": [FIRST_PROMPT_ID + stream.number, 5], "max_tokens": num_tokens,
                "stream": True, "ignore_eos": True,
            }  # fmt: skip
            done: asyncio.Future[None] = loop.create_future()
            await loop.create_connection(lambda: Listening(stream, msgspec.json.encode(body), done), "127.0.0.1", port)
            await done

        calls = [asyncio.ensure_future(call(stream)) for stream in streams]
        await asyncio.sleep(WARM_S)
        before, sent = process.cpu_times(), sum(len(stream.sent_at) for stream in streams)
        with Progress(transient=True) as progress:
            task = progress.add_task(f"{num_streams} streams", total=duration_s)
            while (left := duration_s - (progress.tasks[task].completed or 0)) > 0.6:
                await asyncio.sleep(min(0.5, left))
                progress.advance(task, 0.5)
        after = process.cpu_times()
        counted = sum(len(stream.sent_at) for stream in streams) - sent
        await asyncio.gather(*calls)
    finally:
        running.cancel()
        door.terminate()
        await asyncio.gather(running, return_exceptions=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            door.wait(10)
        door.kill()
    added = [
        heard - sent_at
        for stream in streams
        for sent_at, heard in zip(stream.sent_at, stream.heard_at, strict=False)
        if sent_at - stream.submitted_at > WARM_S
    ]
    lost = sum(abs(len(stream.sent_at) - len(stream.heard_at)) for stream in streams)
    spent = after.user + after.system - before.user - before.system
    return Measured(added, [s.submitted_at - s.asked_at for s in streams], spent / max(1, counted), lost)


async def _until_ready(port: int, door: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        if door.poll() is not None:
            raise ValueError("The door has ended before it was ready: its own words are above.")
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /ready HTTP/1.1\r\nhost: door\r\nconnection: close\r\n\r\n")
            answer = await reader.read()
            writer.close()
            if b" 200 " in answer[:20]:
                return
        await asyncio.sleep(0.1)
    raise ValueError("The door was not ready within a minute.")


def _token() -> int:
    """An id that is a word of its own, so that every token makes an event."""
    from headway.models.tokenizer import open_model_text

    (token, *_) = open_model_text(None).tokenizer.encode(" a")
    return int(token)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--rate", type=float, default=20.0, help="tokens a second of each stream")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a round, beyond the warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=report.RESULTS, help="where the page is written")
    parser.add_argument(
        "--door", nargs=2, type=int, metavar="FD", help=argparse.SUPPRESS
    )  # the process that is measured
    options = parser.parse_args(arguments)
    if options.door:
        sys.exit(serve(*options.door))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    rows, cpus, tails = [], [], []
    for number in range(options.rounds):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(measure(options.streams, options.rate, options.seconds, number))
        cpus.append(found.cpu_s * 1e6)
        tails.append(1e3 * quantile(found.added_s, 0.99))
        rows.append(
            [
                number + 1,
                len(found.added_s),
                found.num_lost,
                f"{cpus[-1]:.1f}",
                *(f"{1e3 * quantile(found.added_s, share):.2f}" for share in (0.5, 0.99, 1.0)),
                *(f"{1e3 * quantile(found.to_engine_s, share):.2f}" for share in (0.5, 1.0)),
            ]
        )
    header = ["round", "tokens", "lost", "door's processor, µs a token", "added p50 ms", "p99 ms", "longest ms",
              "call to engine p50 ms", "longest ms"]  # fmt: skip
    cpu, tail = statistics.median(cpus), statistics.median(tails)
    verdicts = (
        f"processor time per token: {_verdict(cpu, MAX_CPU_US, 'µs')}; "
        f"p99 of the added time: {_verdict(tail, MAX_ADDED_MS, 'ms')} (medians of the rounds)."
    )
    body = (
        f"{options.streams} streams of {options.rate:g} tokens a second each, begun staggered, completions over HTTP; "
        f"the engine answers on the spot, from the measuring process, which is the client too: what it takes itself is "
        f"in the added times.\n\n{report.table(header, rows)}\n\n{verdicts}"
    )
    report.write("door", "What the door costs", report.command(COMMAND, arguments), body, options.folder)


def _verdict(found: float, most: float, unit: str) -> str:
    return f"{'reached' if found <= most else 'not reached'}, {found:.3g} {unit} against {most:g}"


if __name__ == "__main__":
    main()
