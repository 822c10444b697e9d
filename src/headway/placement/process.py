"""The engine as a process of its own: one socket in, one socket out, and a plain loop that owns the device.

Three threads. The loop runs operators and touches no socket; a reader turns messages into events; a writer turns
effects into messages and says once a second that the engine is alive. None of them ever holds the interpreter lock
for long: operators let go of it while they compute.
"""

import argparse
import ctypes
import gc
import os
import queue
import signal
import socket
import sys
import threading
import time

import msgspec
import torch

from headway.config import ConfigError, EngineSettings
from headway.core import event as ev
from headway.models.config import ModelError
from headway.placement import wire
from headway.placement.engine import Engine, MonotonicClock, build_engine
from headway.placement.mailbox import Letters

BEAT_S = 1.0  # at least so often the door hears from us
FAULT_BYTES = 2 << 20  # of the pool, touched at a time when there is nothing else to do
SNAPSHOT_S = 0.1


class Mouth:
    """Writes messages from a thread of its own, so that a slow door never holds up the device."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._queue: queue.SimpleQueue[wire.FromEngine | None] = queue.SimpleQueue()
        self.beat: wire.Beat | None = None  # replaced by the loop, sent by this thread
        self._thread = threading.Thread(target=self._write, name="writer", daemon=True)
        self._thread.start()

    def say(self, message: wire.FromEngine) -> None:
        self._queue.put(message)

    def tell(self, effect: ev.Deliver | ev.End) -> None:
        if isinstance(effect, ev.Deliver):
            self.say(wire.Delivered(effect.commit))
        else:
            self.say(wire.Ended(effect.record))

    def close(self) -> None:
        """After everything said so far is written."""
        self._queue.put(None)
        self._thread.join()

    def _write(self) -> None:
        sent: wire.Beat | None = None
        sent_at = 0.0
        try:
            while True:
                try:
                    message = self._queue.get(timeout=BEAT_S / 4)
                    if message is None:
                        return
                    self._connection.sendall(wire.frame(message))
                except queue.Empty:
                    pass
                beat, now = self.beat, time.monotonic()
                fresh = beat is not sent and now - sent_at >= SNAPSHOT_S
                if beat is not None and (fresh or now - sent_at >= BEAT_S):
                    self._connection.sendall(wire.frame(beat))
                    sent, sent_at = beat, now
        except OSError:
            os._exit(1)  # the door is gone: nobody is left to answer to


def read_messages(connection: socket.socket, letters: Letters) -> None:
    """Turn the door's messages into events, until it hangs up. An engine that cannot hear must not live on."""
    frames = wire.Frames(bytearray())
    try:
        while data := connection.recv(1 << 16):
            for body in frames.feed(data):
                letters.put(_event(wire.to_engine_decoder.decode(body)))
    except (OSError, ValueError, msgspec.MsgspecError) as error:
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
    threading.Thread(target=read_messages, args=(connection, letters), name="reader", daemon=True).start()
    mouth.say(wire.Ready(engine.facts))
    _calm_the_collector()
    faulting = True
    snapshot_at = 0.0
    with torch.inference_mode():
        while True:
            busy = driver.turn()
            now = time.monotonic()
            if not busy or now - snapshot_at >= SNAPSHOT_S:
                mouth.beat, snapshot_at = _beat(engine, driver.num_tiles, now), now
            if busy:
                continue
            if engine.scheduler.draining and engine.scheduler.num_open == 0:
                break
            if faulting and not letters.has_mail():
                faulting = engine.pool.fault_in(FAULT_BYTES)
            else:
                driver.wait()
    mouth.beat = _beat(engine, driver.num_tiles, time.monotonic())
    mouth.close()


def _beat(engine: Engine, num_tiles: int, now: float) -> wire.Beat:
    scheduler = engine.scheduler
    num_running, num_waiting, num_parked = scheduler.loads()
    counters = {name: float(count) for name, count in scheduler.counters.items()} | {"tiles": float(num_tiles)}
    return wire.Beat(now, num_running, num_waiting, num_parked, scheduler.pages.counts(), counters)


def _calm_the_collector() -> None:
    """What was made at the start lives for ever; of what comes later, cycles are rare: look seldom, and briefly."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


def _keep_memory() -> None:
    """Tell the C library to keep freed blocks: a fresh mapping for every large tensor costs a page fault per 4 KiB."""
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(ctypes.c_int(mmap_threshold), ctypes.c_int(1 << 30))
    libc.mallopt(ctypes.c_int(trim_threshold), ctypes.c_int((1 << 31) - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description="One Headway engine; started by the door, not by hand.")
    parser.add_argument("--socket", type=int, required=True, help="the inherited end of a socket pair")
    parser.add_argument("--settings", required=True, help="EngineSettings as JSON")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the door's: it tells us to drain
    connection = socket.socket(fileno=arguments.socket)
    settings = msgspec.json.decode(arguments.settings, type=EngineSettings)
    _keep_memory()
    try:
        engine = build_engine(settings)
    except (ConfigError, ModelError) as error:
        connection.sendall(wire.frame(wire.StartFailed(str(error))))
        sys.exit(1)
    except (MemoryError, torch.OutOfMemoryError):
        sentence = "The model does not fit the memory: choose a smaller one, or --dtype bfloat16."
        connection.sendall(wire.frame(wire.StartFailed(sentence)))
        sys.exit(1)
    serve(engine, connection)


if __name__ == "__main__":
    main()
