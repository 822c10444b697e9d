"""When an answer's next token is due, prompts being read meanwhile: by the pace that was asked for, and by what it may
owe."""

import random

import pytest

from headway.core.candidates import on_pace
from headway.core.forecast import Lengths
from headway.core.request import SLO, Request
from headway.core.ticket import Ticket


def due(num_tokens: int, last: float, *, surely: float = 0.0) -> float:
    """In targets of a second, of an answer whose first token came at 0."""
    ticket = Ticket.open(0, Request("r", (1,), 100, 0.0, SLO(tpot_s=1.0)), 1000)
    ticket.record.first_token, ticket.record.last_token = 0.0, last
    ticket.record.num_output_tokens, ticket.num_surely = num_tokens, surely
    return on_pace(ticket, 1.0)


def test_a_token_is_due_a_little_before_its_pace() -> None:
    assert due(1, 0.0) == pytest.approx(0.95)
    assert due(10, 8.7) == pytest.approx(9.5)


def test_who_is_ahead_may_wait_and_who_is_behind_may_not_though_within_bounds() -> None:
    assert due(10, 5.0) == pytest.approx(7.0), "no more than two targets after the last"
    assert due(10, 9.3) == pytest.approx(9.3 + 0.75), "no sooner than three quarters"


def test_a_long_answer_may_owe_half_a_target_and_has_paid_before_it_ends() -> None:
    """Of twenty, with two to come it is as good as it was asked for."""
    assert due(1, 0.0, surely=20) == pytest.approx(1.45)
    assert due(4, 3.0, surely=20) == pytest.approx(3.8 + 0.5)
    assert due(5, 3.8, surely=20) == pytest.approx(4.75), "from here on it catches up"
    assert due(18, 16.3, surely=20) == pytest.approx(17.1)


def test_how_long_answers_surely_become_is_learnt_from_those_that_end() -> None:
    """Nine in ten have a hundred tokens, one has five: less than that is sure. One in fifty is no reason."""
    ticket = Ticket.open(0, Request("r", (1,), 4000, 0.0), 5000)
    for share, low, high in ((0.2, 4.0, 7.0), (0.02, 60.0, 100.0)):
        lengths, rng = Lengths(), random.Random(7)
        assert lengths.surely(ticket) == 2000.0, "nothing is known yet but how long it may be"
        for _ in range(1000):
            lengths.observe(5 if rng.random() < share else 100, 4000)
            lengths.observe(3, 3)  # had no choice
        assert low < lengths.surely(ticket) <= high
    assert lengths.surely(Ticket.open(1, Request("s", (1,), 10, 0.0), 5000)) < 10
