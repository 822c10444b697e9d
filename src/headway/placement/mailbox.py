"""The mailbox of a real engine: other threads put letters in, the driver takes them out."""

import threading
import time
from collections import deque

from headway.core import event as ev


class Letters:
    """A mailbox that another thread fills."""

    def __init__(self) -> None:
        self._letters: deque[ev.Event] = deque()
        self._arrived = threading.Event()

    def put(self, letter: ev.Event) -> None:
        self._letters.append(letter)
        self._arrived.set()

    def has_mail(self) -> bool:
        return bool(self._letters)

    def take(self) -> list[ev.Event]:
        self._arrived.clear()
        taken = []
        while self._letters:
            taken.append(self._letters.popleft())
        return taken

    def wait(self, until: float | None) -> None:
        if not self._letters:
            self._arrived.wait(None if until is None else max(0.0, until - time.monotonic()))

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)
