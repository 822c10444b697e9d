"""The table of legal moves, and the picture of it that the documents show."""

import re
from pathlib import Path

import pytest

from headway.core.lifecycle import ENDED, MOVES, State, check_move, diagram

ARCHITECTURE = Path(__file__).parents[2] / "ARCHITECTURE.md"


def test_every_state_is_in_the_table() -> None:
    """Nobody can be in a state whose moves are not written down."""
    assert set(MOVES) == set(State)


def test_an_ending_is_for_good() -> None:
    """From finished, refused, cancelled and failed there is no way on, not even to the same state."""
    assert {State.FINISHED, State.REFUSED, State.CANCELLED, State.FAILED} == ENDED
    for ended in ENDED:
        for to in State:
            with pytest.raises(AssertionError, match="not a legal move"):
                check_move("r", ended, to)


@pytest.mark.parametrize("state", [state for state in State if state not in ENDED])
def test_from_everywhere_there_is_a_way_to_be_cancelled_and_to_fail(state: State) -> None:
    """A caller may leave, and an engine may die, at any moment of a request's life."""
    check_move("r", state, State.CANCELLED)
    check_move("r", state, State.FAILED)


def test_every_state_is_reached_from_the_start() -> None:
    """No state is there for nothing."""
    reached = {State.QUEUED}
    while further := {to for state in reached for to in MOVES[state]} - reached:
        reached |= further
    assert reached == set(State)


def test_a_refusal_comes_before_any_work() -> None:
    """Only what still waits is refused: what has begun is finished, cancelled or failed."""
    assert {state for state in State if State.REFUSED in MOVES[state]} == {State.QUEUED}


def test_a_request_that_leaves_only_ends() -> None:
    """Once on its way out of a step it never runs again."""
    assert MOVES[State.LEAVING] <= ENDED


def test_the_diagram_says_what_the_table_says() -> None:
    """Read the picture back: the same moves, one beginning, and an end mark at each ending."""
    arrows = re.findall(r"^    (\S+) --> (\S+)$", diagram(), flags=re.MULTILINE)
    moves = {(State(start), State(end)) for start, end in arrows if "[*]" not in (start, end)}
    assert moves == {(state, to) for state in State for to in MOVES[state]}
    assert [end for start, end in arrows if start == "[*]"] == ["queued"]
    assert {State(start) for start, end in arrows if end == "[*]"} == ENDED
    assert len(arrows) == len(set(arrows))


def test_the_architecture_shows_the_diagram_of_today() -> None:
    """The picture in ARCHITECTURE.md is generated: after a change of the table, paste `diagram()` there again."""
    blocks = re.findall(r"```mermaid\n(stateDiagram.*?)\n```", ARCHITECTURE.read_text(encoding="utf8"), flags=re.DOTALL)
    assert blocks == [diagram()]
