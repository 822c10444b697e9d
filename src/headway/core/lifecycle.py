"""The legal moves of a request, as one table. The diagram in ARCHITECTURE.md is generated from it (`diagram`)."""

from enum import StrEnum


class State(StrEnum):
    """Where a request is. The last four are the only ways to end."""

    QUEUED = "queued"
    RUNNING = "running"  # a prefill of it is on the device
    PARKED = "parked"  # a prefill of it is suspended between two tiles
    DECODING = "decoding"
    LEAVING = "leaving"  # cancelled inside a step, gone at the next layer boundary
    FINISHED = "finished"
    REFUSED = "refused"
    CANCELLED = "cancelled"
    FAILED = "failed"


ENDED = frozenset({State.FINISHED, State.REFUSED, State.CANCELLED, State.FAILED})

MOVES: dict[State, frozenset[State]] = {
    # queued -> finished: a stop string was seen in an answer whose pages had been taken away
    State.QUEUED: frozenset({State.RUNNING, State.FINISHED, State.REFUSED, State.CANCELLED, State.FAILED}),
    State.RUNNING: frozenset(
        {State.PARKED, State.DECODING, State.QUEUED, State.LEAVING, State.FINISHED, State.CANCELLED, State.FAILED}
    ),
    State.PARKED: frozenset({State.RUNNING, State.QUEUED, State.LEAVING, State.CANCELLED, State.FAILED}),
    State.DECODING: frozenset({State.QUEUED, State.LEAVING, State.FINISHED, State.CANCELLED, State.FAILED}),
    State.LEAVING: frozenset({State.FINISHED, State.CANCELLED, State.FAILED}),
    **{ended: frozenset() for ended in ENDED},
}


def check_move(request_id: str, now: State, to: State) -> None:
    """Assert that the move is in the table."""
    assert to in MOVES[now], f"request {request_id}: {now.value} -> {to.value} is not a legal move"


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> queued"]
    lines += [f"    {state.value} --> {to.value}" for state in MOVES for to in State if to in MOVES[state]]
    lines += [f"    {state.value} --> [*]" for state in State if state in ENDED]
    return "\n".join(lines)
