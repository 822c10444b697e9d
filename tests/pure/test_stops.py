"""Stop strings: found wherever they fall, shown never, and nothing held back that cannot become one."""

from hypothesis import given
from hypothesis import strategies as st

from headway.models.stops import StopMatcher

words = st.text(alphabet="ab\n", min_size=1, max_size=4)
texts = st.lists(st.text(alphabet="ab\n", max_size=5), max_size=8)


def brute_force(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Read character by character; end where some stop string is complete, the longest one if there are several."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(pieces=texts, stops=st.lists(words, min_size=1, max_size=4))
def test_any_cut_into_pieces_gives_the_same_answer(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    matcher, shown, found = StopMatcher(stops), "", None
    for piece in pieces:
        passed = matcher.feed(piece)
        shown += passed.text
        assert text.startswith(shown)
        if passed.stop is not None:
            found = passed.stop
            break
    if found is None:
        shown += matcher.rest()
    assert (shown, found) == brute_force(text, stops)


@given(pieces=texts, stops=st.lists(words, min_size=1, max_size=4))
def test_no_more_is_held_back_than_may_become_a_stop(pieces: list[str], stops: list[str]) -> None:
    matcher, seen, shown = StopMatcher(stops), "", ""
    for piece in pieces:
        seen += piece
        passed = matcher.feed(piece)
        shown += passed.text
        if passed.stop is not None:
            return
        held = seen[len(shown) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_the_stop_string_itself_is_shown_on_request() -> None:
    matcher = StopMatcher(["END"], include_stop=True)
    assert matcher.feed("the E") == ("the ", None)
    assert matcher.feed("ND of it") == ("END", "END")
