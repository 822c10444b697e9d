"""Two lanes of one engine at once on a CPU: prompts in the thread that drives, tokens in one of their own.

Both run the same stages over the same weights and pages, so a request that goes from one lane to the other moves no
byte. A lane's share is a number of cores: its operators are given as many OpenMP threads, and while both lanes are busy
each is kept on cores of its own. Operators let go of the interpreter lock, so neither waits for the other's.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from headway.core.settings import MAIN
from headway.placement.driver import DeviceLane, Driver


class Cores:
    """Gives the calling thread a share of the cores that this process may use. What OpenMP starts for it inherits
    where it may run, so that a thread is moved only where its lane is one core: there it works alone."""

    def __init__(self) -> None:
        self._cores = _cores_of_this_thread()
        self._units: dict[str, int] = {}

    def devote(self, lane: str, units: int) -> None:
        """From here on the calling thread, which is the lane's, works with so many threads."""
        if self._units.get(lane) == units:
            return
        self._units[lane] = units
        torch.get_num_threads()  # a thread that has never asked takes, with its first operator, what another set last
        torch.set_num_threads(units)
        own = slice(0, 1) if lane == MAIN else slice(-1, None)
        _run_on(self._cores[own] if units == 1 else self._cores)

    def release(self, num_threads: int) -> None:
        """The calling thread works on all of them again, with so many threads."""
        self._units.clear()
        torch.set_num_threads(num_threads)
        _run_on(self._cores)


def _cores_of_this_thread() -> list[int]:
    """Those it may run on; none where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _run_on(cores: list[int]) -> None:
    if cores:
        with suppress(OSError):  # a container may forbid it: then the system places the thread
            os.sched_setaffinity(0, cores)


@contextmanager
def lanes_of(driver: Driver) -> Iterator[None]:
    """While in it, the driver has a lane for tokens, with a thread of its own in inference mode, if its scheduler may
    divide the device. The caller goes on to turn the main lane."""
    if not driver.scheduler.sharing.divider.may_divide:
        yield
        return
    lane = driver.add_lane()
    closing = threading.Event()
    thread = threading.Thread(target=_turn, args=(driver, lane, closing), name="tokens", daemon=True)
    num_threads, cores = torch.get_num_threads(), Cores()
    thread.start()
    try:
        yield
    finally:
        closing.set()
        lane.call()
        thread.join()
        cores.release(num_threads)  # the caller's thread was the main lane's


def _turn(driver: Driver, lane: DeviceLane, closing: threading.Event) -> None:
    try:
        with torch.inference_mode():
            while not closing.is_set():
                if not driver.turn(lane):
                    driver.main.awake.set()  # nobody listens here any more
                    if closing.is_set():  # the turn may have taken back the call that came with it
                        return
                    lane.awake.wait()
    except BaseException as error:
        driver.broken = error
        driver.main.call()
