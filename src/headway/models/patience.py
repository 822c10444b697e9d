"""A limit on how long a piece of Python may take that somebody else wrote: it is interrupted wherever it is.

CPython can raise an exception in another thread between two of its instructions. What it cannot interrupt is one long
call into C, which whoever uses this must bound otherwise.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfTime(Exception):
    """Raised in the thread that has taken too long."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime within the block, in this thread, if it takes longer; never after it."""
    thread, lock = threading.get_ident(), threading.Lock()
    is_over = False

    def fire() -> None:
        with lock:
            if not is_over:
                _send(thread, OutOfTime)

    timer = threading.Timer(seconds, fire)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            with lock:
                is_over = True
            timer.cancel()
            _send(thread, None)  # what may still be on its way is called back
    except OutOfTime:
        with lock:  # it may have come before the line above was reached
            is_over = True
        raise


def _send(thread: int, error: type[Exception] | None) -> None:
    """None calls back what was sent and has not come."""
    sent = ctypes.py_object(error) if error is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), sent)
