"""Whether a constraint can be followed, found out where it can do no harm: in processes that are killed if need be.

Verdicts are remembered, a bounded number of them. Knows no HTTP; `worker` is the other side.
"""

import os
import queue
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from hashlib import blake2b

import msgspec

from headway.core.request import Constraint
from headway.grammar.frames import Verdict, Vocabulary, receive, send
from headway.grammar.limits import NAMES, ConstraintError, check_source

NUM_WORKERS = 2  # so that one bomb does not make everybody wait
LIMIT_S = 5.0  # of one check, by the clock
START_S = 60.0
MAX_WAITING = 64
MAX_REMEMBERED = 1024


class CheckerBusy(Exception):
    """Too many constraints wait to be checked."""


class Checker:
    """Checks for one vocabulary. Any thread may ask; processes are started when first needed."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        """`vocabulary` is asked for once, when the first process is started, in a thread of its own."""
        self._workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        once = cache(vocabulary)
        workers = [_Worker(once) for _ in range(NUM_WORKERS)]
        for worker in workers:
            self._workers.put(worker)
        self._pool = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="checker")
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()
        self._num_waiting = 0
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, _end, self._pool, workers)

    def check(self, constraint: Constraint) -> Future[None]:
        """Done when it is known, with a ConstraintError if it cannot be followed. Raises CheckerBusy."""
        done: Future[None] = Future()
        known = self._remembered(constraint)
        if known is not None:
            _settle(done, known)
            return done
        with self._lock:
            if self._num_waiting >= MAX_WAITING:
                raise CheckerBusy
            self._num_waiting += 1
        asked = self._pool.submit(self._ask, constraint)
        asked.add_done_callback(lambda asked: self._no_longer_waits())  # also if it is cancelled before it begins
        return asked

    def close(self) -> None:
        """End the processes; there will be no more verdicts."""
        self._end()

    def _ask(self, constraint: Constraint) -> None:
        worker = self._workers.get()
        try:
            check_source(constraint)
            complaint = worker.ask(constraint)
        except ConstraintError as error:
            complaint = str(error)
        finally:
            self._workers.put(worker)
        with self._lock:
            self._verdicts[_digest(constraint)] = complaint
            if len(self._verdicts) > MAX_REMEMBERED:
                self._verdicts.popitem(last=False)
        if complaint:
            raise ConstraintError(complaint)

    def _no_longer_waits(self) -> None:
        with self._lock:
            self._num_waiting -= 1

    def _remembered(self, constraint: Constraint) -> str | None:
        with self._lock:
            return self._verdicts.get(_digest(constraint))


class _Worker:
    """One process, or none: after a bomb, the next question starts another."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None

    def ask(self, constraint: Constraint) -> str:
        """What is wrong with it, or nothing."""
        connection = self._connection or self._start()
        name = NAMES[constraint.kind]
        begun = time.monotonic()
        try:
            connection.settimeout(LIMIT_S)
            send(connection, constraint)
            content = receive(connection)
        except TimeoutError:
            content = None
        except (OSError, ValueError):
            self.end()
            raise
        if content is None:
            self.end()
            why = "takes too long" if time.monotonic() - begun >= 1 else "takes too much memory"
            return f"The {name} {why} to be understood: make it simpler."
        return msgspec.msgpack.decode(content, type=Verdict).complaint

    def end(self) -> None:
        connection, process = self._connection, self._process
        self._connection = self._process = None
        if connection is not None:
            connection.close()
        if process is not None:
            process.kill()
            process.wait()

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        # -P: a file in the current directory that is named like a module must not become one
        command = [sys.executable, "-P", "-m", "headway.grammar.worker", str(theirs.fileno())]
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # it would reserve memory for every core
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what a stranger's grammar makes it say is not for our log
                process_group=0,  # what is sent to our group (Ctrl-C) is for the door alone
            )
        self._connection = ours
        try:
            ours.settimeout(START_S)
            send(ours, self._vocabulary())
            ready = receive(ours)
        except OSError:
            self.end()
            raise
        if ready is None:
            self.end()
            raise RuntimeError("The process that checks constraints cannot start.")
        complaint = msgspec.msgpack.decode(ready, type=Verdict).complaint
        if complaint:
            self.end()
            raise ConstraintError(complaint)
        return ours


def _end(pool: ThreadPoolExecutor, workers: list[_Worker]) -> None:
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.end()


def _settle(future: Future[None], complaint: str) -> None:
    if complaint:
        future.set_exception(ConstraintError(complaint))
    else:
        future.set_result(None)


def _digest(constraint: Constraint) -> bytes:
    return blake2b(f"{constraint.kind}\0{constraint.text}".encode(), digest_size=16).digest()
