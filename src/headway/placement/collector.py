"""Python's collector of cycles, in a process that is to start soon and then to answer in time."""

import gc


def rest() -> None:
    """While everything is imported and loaded, which lives for ever: looking through it again and again would take a
    tenth of a second."""
    gc.disable()


def calm() -> None:
    """From now on. What is there is never looked at again; of what comes, cycles are rare: look seldom, and briefly."""
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)
    gc.enable()
