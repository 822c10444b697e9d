"""The rows that a queue is made of: one tenant's tickets of one tier, and how they stand among those of others.

Where somebody stands in a row, and what goes before that, is found by halving it; what its first so many take is summed
up when it is asked for after a change.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heapreplace
from itertools import accumulate
from typing import NamedTuple

NEVER = float("inf")
Key = tuple[float, float, int]  # priority, due, ticket number: the place within one row


class Row:
    """Tickets in order, with their prices beside them."""

    def __init__(self) -> None:
        self.keys: list[Key] = []
        self.amortized_s: list[float] = []
        self._begun_s: list[float] | None = None  # made when it is asked for

    def add(self, key: Key, amortized_s: float) -> None:
        index = bisect_left(self.keys, key)
        self.keys.insert(index, key)
        self.amortized_s.insert(index, amortized_s)
        self._begun_s = None

    def remove(self, key: Key) -> None:
        index = bisect_left(self.keys, key)
        assert self.keys[index] == key
        del self.keys[index], self.amortized_s[index]
        self._begun_s = None

    @property
    def begun_s(self) -> list[float]:
        """What those in front of each take, and at the end what all of them take."""
        if self._begun_s is None:
            self._begun_s = list(accumulate(self.amortized_s, initial=0.0))
        return self._begun_s


class Shifted(NamedTuple):
    """A row as it stands among those of other tenants: later by its tenant's debt, and then not before now. Among the
    starved it is only later: their keys say when somebody arrived."""

    tenant: str
    row: Row
    debt_s: float = 0.0
    is_starved: bool = False

    @property
    def num(self) -> int:
        return len(self.row.keys)

    @property
    def all_s(self) -> float:
        """What all of them take."""
        return self.row.begun_s[-1]

    def first_s(self, num: int) -> float:
        """What the first so many take."""
        return self.row.begun_s[num]

    def of(self, key: Key, now: float) -> Key:
        """Where somebody with this key stands who belongs to this row, or would."""
        priority, due, number = key
        if not self.debt_s:
            return key
        return priority, (due if self.is_starved else max(due, now)) + self.debt_s, number

    def num_before(self, key: Key, now: float) -> int:
        """How many stand before somebody with this key in the order of all."""
        priority, due, number = key
        if self.debt_s:
            due -= self.debt_s
            if due < now and not self.is_starved:  # not even those who are due at once
                due, number = NEVER * -1, -1
        return bisect_left(self.row.keys, (priority, due, number))

    def num_before_in_turn(self, key: Key, now: float, served_s: float) -> int:
        """The same of another tenant, whose debt grows with each that is served: it makes the next one due later.
        `served_s`: so much of it goes before these."""
        num = self.num_before(key, now)
        if not num:
            return 0
        keys, begun_s = self.row.keys, self.row.begun_s
        priority, due, _ = key
        since_s = self.debt_s + served_s

        def comes_later(place: int) -> bool:
            other_priority, other_due, _ = keys[place]
            after_s = begun_s[place]
            later = max(other_due, now) + since_s + after_s > due
            return later and other_priority == priority and served_s + after_s > 0

        return bisect_left(range(num), True, key=comes_later) if comes_later(num - 1) else num


def merged(rows: Iterable[Shifted], now: float) -> Iterator[tuple[int, float]]:
    """All that stand in these rows, in order: ticket number and debt."""
    heads = [(shifted.of(shifted.row.keys[0], now), 0, shifted) for shifted in rows]
    heapify(heads)
    while heads:
        key, place, shifted = heads[0]
        yield key[2], shifted.debt_s
        keys, place = shifted.row.keys, place + 1
        if place < len(keys):
            heapreplace(heads, (shifted.of(keys[place], now), place, shifted))
        else:
            heappop(heads)
