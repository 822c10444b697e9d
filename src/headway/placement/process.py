"""The engine as a process of its own: one socket in, one socket out, and a plain loop that owns the device.

Three threads. The loop runs operators and touches no socket; a reader turns messages into events; a writer turns
effects into messages and says once a second that the engine is alive, unless the loop hangs. There is one more where
forms are compiled (`vestibule`), and one for a lane of tokens (`multiplex`). None of them ever holds the interpreter
lock for long: operators let go of it while they compute.
"""

import argparse
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

import msgspec
import torch

from headway.config import ConfigError, EngineSettings
from headway.core import event as ev
from headway.models.config import ModelError
from headway.placement import collector, wire
from headway.placement.driver import Driver
from headway.placement.engine import Engine, MonotonicClock, build_engine
from headway.placement.mailbox import Letters
from headway.placement.multiplex import lanes_of
from headway.placement.spans import Span, Spans
from headway.placement.vestibule import Vestibule

BEAT_S = 1.0  # at least so often the door hears from us
FAULT_BYTES = 2 << 20  # of the pool, touched at a time when there is nothing else to do
SNAPSHOT_S = 0.1
STUCK_S = 30.0  # a tile takes milliseconds: one that takes so long never ends


class Mouth:
    """Writes messages from a thread of its own, so that a slow door never holds up the device.

    `beat`, `working` and `spans` are set by the loop and read by this thread. Beats stop when the loop is working and
    no tile has been finished for STUCK_S, which is how the door comes to know. A step may take minutes; a tile may not.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.beat: wire.Beat | None = None
        self.working = False
        self.spans = Spans()
        self._connection = connection
        self._queue: queue.SimpleQueue[wire.FromEngine | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def open(self, num_tiles: Callable[[], int]) -> None:
        """Begin to write. `num_tiles` reads how many tiles the loop has finished."""
        self._thread = threading.Thread(target=self._run, args=(num_tiles,), name="writer", daemon=True)
        self._thread.start()

    def say(self, message: wire.FromEngine) -> None:
        self._queue.put(message)

    def tell(self, effect: ev.Admit | ev.Deliver | ev.End) -> None:
        match effect:
            case ev.Admit(request, predicted_ttft_s):
                self.say(wire.Admitted(request.id, predicted_ttft_s))
            case ev.Deliver(commit):
                self.say(wire.Delivered(commit))
            case ev.End(record):
                self.say(wire.Ended(record))

    def close(self) -> None:
        """After everything said so far is written."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self, num_tiles: Callable[[], int]) -> None:
        try:
            self._write(num_tiles)
        except OSError:
            os._exit(1)  # the door is gone: nobody is left to answer to
        except BaseException:  # an engine that cannot speak must not live on
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def _write(self, num_tiles: Callable[[], int]) -> None:
        sent: wire.Beat | None = None
        sent_at = 0.0
        num_seen, moved_at = -1, 0.0
        running, ran_at = self.spans.running, 0.0
        is_open = True
        while is_open:
            frames, is_open = self._take()
            if frames:
                self._connection.sendall(frames)
            beat, now = self.beat, time.monotonic()
            if not self.working or num_tiles() != num_seen:
                num_seen, moved_at = num_tiles(), now
            due = now - sent_at >= (BEAT_S if beat is sent else SNAPSHOT_S)
            if beat is not None and due and now - moved_at < STUCK_S:
                self._connection.sendall(wire.frame(beat))
                sent, sent_at = beat, now
            if now - ran_at >= SNAPSHOT_S and (ran := self._ran(running)):
                self._connection.sendall(wire.frame(ran))
                running, ran_at = ran.running, now

    def _ran(self, told: tuple[Span, ...]) -> wire.Ran | None:
        """What the device did since, if anything; `told` are the steps that were last said to have it."""
        spans, running = self.spans.take(), self.spans.running
        return wire.Ran(spans, running) if spans or running != told else None

    def _take(self) -> tuple[bytes, bool]:
        """Everything said by now, waiting a little for the first of it; whether more may come."""
        frames = []
        try:
            message = self._queue.get(timeout=BEAT_S / 4)
            while message is not None:
                frames.append(wire.frame(message))
                message = self._queue.get_nowait()
        except queue.Empty:
            return b"".join(frames), True
        return b"".join(frames), False


def read_messages(connection: socket.socket, put: Callable[[ev.Event], None]) -> None:
    """Turn the door's messages into events, until it hangs up. An engine that cannot hear must not live on."""
    frames = wire.Frames(bytearray())
    try:
        while data := connection.recv(1 << 16):
            for body in frames.feed(data):
                put(_event(wire.to_engine_decoder.decode(body)))
    except Exception as error:
        print(f"The engine cannot understand the door: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def _event(message: wire.ToEngine) -> ev.Event:
    match message:
        case wire.Submit(request):
            return ev.Arrived(request)
        case wire.Cancel(request_id):
            return ev.Cancelled(request_id)
        case wire.Stop(request_id):
            return ev.Stopped(request_id)
        case wire.Drain():
            return ev.Draining()


def serve(engine: Engine, connection: socket.socket) -> None:
    """Drive the engine until it is told to drain and has nothing left."""
    letters, mouth = Letters(), Mouth(connection)
    driver = engine.driver(MonotonicClock(), letters, mouth.tell)
    mouth.spans = driver.spans
    mouth.open(lambda: driver.num_tiles)
    put: Callable[[ev.Event], None] = letters.put
    if engine.compiler is not None:
        put = Vestibule(engine.compiler, letters.put, engine.settings.max_num_queued_reqs).put
    threading.Thread(target=read_messages, args=(connection, put), name="reader", daemon=True).start()
    mouth.say(wire.Ready(engine.facts))
    collector.calm()
    faulting = True
    snapshot_at = 0.0
    with torch.inference_mode(), lanes_of(driver):
        while True:
            mouth.working = True
            busy = driver.turn()
            mouth.working = busy or driver.other_listens()
            now = time.monotonic()
            if not busy or now - snapshot_at >= SNAPSHOT_S:
                with driver.still:  # another lane's thread may be at work
                    mouth.beat, snapshot_at = _beat(engine, driver, now), now
            if busy:
                continue
            if engine.scheduler.draining and engine.scheduler.num_open == 0:
                break
            if faulting and not letters.has_mail():
                faulting = engine.pool.fault_in(FAULT_BYTES)
            else:
                driver.wait()
    mouth.beat = _beat(engine, driver, time.monotonic())
    mouth.close()


def _beat(engine: Engine, driver: Driver, now: float) -> wire.Beat:
    scheduler = engine.scheduler
    num_running, num_waiting, num_parked = scheduler.loads()
    counters = {name: float(count) for name, count in scheduler.counters.items()} | {
        "tiles": float(driver.num_tiles),
        "decision_seconds": driver.decisions_s,
        "page_evictions": float(scheduler.pages.num_evictions),
        "backlog_s": scheduler.backlog_s,
        "step_prediction_error_ratio": scheduler.cost.mean_error,
        "step_slowdown_ratio": scheduler.cost.correction,
    }
    pages, step_sizes = scheduler.pages.counts(), dict(scheduler.step_sizes)
    return wire.Beat(now, num_running, num_waiting, num_parked, pages, counters, step_sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description="One Headway engine; started by the door, not by hand.")
    parser.add_argument("--socket", type=int, required=True, help="the inherited end of a socket pair")
    parser.add_argument("--settings", required=True, help="EngineSettings as JSON")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # both are the door's: it tells us to drain, or hangs up
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=arguments.socket)
    settings = msgspec.json.decode(arguments.settings, type=EngineSettings)
    try:
        engine = build_engine(settings)
    except (ConfigError, ModelError) as error:
        connection.sendall(wire.frame(wire.StartFailed(str(error))))
        sys.exit(1)
    serve(engine, connection)
