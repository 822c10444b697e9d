"""A step is suspended for a reason, and for a reason only: the challengers together, seen from the running step."""

from collections.abc import Iterator

from headway.core.policy import MAX_LOOKED_AT, RESCUE_SHARE, SMALL_SHARE, Candidate, whom_to_switch_to

TILE_S = 0.01


def candidate(
    key: int, target_s: float | None, total_s: float, *, priority: int = 0, keeps_up: bool = False
) -> Candidate:
    """One that has arrived just now."""
    return Candidate(
        key=key,
        arrival=0.0,
        priority=priority,
        deadline=target_s,
        rescue_s=RESCUE_SHARE * (target_s or 0.0),
        total_s=total_s,
        remaining_s=total_s,
        ripe_at=float("-inf"),
        keeps_up=keeps_up,
    )


def chosen(running: Candidate, *challengers: Candidate) -> int | None:
    taken = whom_to_switch_to(running, challengers, 0.0, TILE_S)
    return None if taken is None else taken.key


def test_each_could_wait_but_not_all_of_them() -> None:
    """A prompt without a target has a second to go. Each of three newcomers could start after it; but the third would
    start after the first two as well, and that is too late. So the first one starts now."""
    running = candidate(0, None, 1.0)
    three = [candidate(key, 1.5 + 0.01 * key, 0.2) for key in (1, 2, 3)]
    for one in three:
        assert chosen(running, one) is None
    assert chosen(running, *three[:2]) is None
    assert chosen(running, *three) == 1


def test_two_targets_are_worth_one() -> None:
    """The running step has no time to give: for one newcomer it goes on, since that would trade a miss for a miss; for
    two that would both be late it gives way."""
    running = candidate(0, 1.1, 1.0)
    first, second = candidate(1, 0.9, 0.3), candidate(2, 0.95, 0.3)
    assert chosen(running, first) is None
    assert chosen(running, second) is None
    assert chosen(running, first, second) == 1


def test_one_with_slack_gives_it() -> None:
    """The running step can wait for 0.5 s: a newcomer of 0.4 s may pass, one of 0.6 s may not."""
    running = candidate(0, 1.5, 1.0)
    assert chosen(running, candidate(1, 0.9, 0.4)) == 1
    assert chosen(running, candidate(1, 0.9, 0.6)) is None


def test_what_goes_in_front_is_counted_against_the_running_step() -> None:
    """The second in line is late and small by itself, but starts behind the first: together they are not small, yet
    they are two."""
    running = candidate(0, 1.05, 1.0)
    patient = candidate(1, 1.03, 0.02)
    late = candidate(2, 1.04, SMALL_SHARE * 0.9)
    assert chosen(running, late) == 2
    assert chosen(running, patient, late) == 1


def test_a_better_priority_behind_one_that_can_wait() -> None:
    """Those in front can wait; the one behind them is late and its caller said it matters more than what runs."""
    running = candidate(0, 1.1, 1.0)
    assert chosen(running, candidate(1, 9.0, 0.01, priority=-2), candidate(2, 1.05, 0.9, priority=-1)) == 1


def test_who_goes_behind_is_not_asked() -> None:
    """The second one is hopelessly late, but goes after what runs."""
    running = candidate(0, 2.0, 1.0)
    assert chosen(running, candidate(1, 3.0, 2.9), candidate(2, 4.0, 4.0)) is None


def test_only_the_first_few_are_looked_at() -> None:
    """Forty wait, and only the last would be late: it is looked at when it has come forward. One among the first would
    have been seen. And nobody behind that is even fetched from the queue."""
    running = candidate(0, None, 1.0)
    fetched = []

    def crowd(late: int) -> Iterator[Candidate]:
        for key in range(1, 200):
            fetched.append(key)
            yield candidate(key, 1.1 if key == late else 60.0 + key, 1e-4 if key != late else 0.5, priority=-1)

    assert whom_to_switch_to(running, crowd(MAX_LOOKED_AT), 0.0, TILE_S) is not None
    fetched.clear()
    assert whom_to_switch_to(running, crowd(MAX_LOOKED_AT + 8), 0.0, TILE_S) is None
    assert len(fetched) == MAX_LOOKED_AT + 1


def test_a_token_passes_a_starved_prompt() -> None:
    """What callers read goes on although a prompt that has waited far too long has the device: it takes little and
    comes in bounded numbers. A prompt as small has to wait."""
    starved = candidate(0, None, 1.0)._replace(starved_at=0.0)
    assert chosen(starved, candidate(1, 0.03, 0.02, keeps_up=True)) == 1
    assert chosen(starved, candidate(1, 0.03, 0.02)) is None
    assert chosen(starved, candidate(1, 0.13, 0.12, keeps_up=True)) is None
