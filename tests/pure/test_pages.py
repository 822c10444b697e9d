"""The page table against a model so plain that it can be checked by eye, over random lives of random users."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headway.core.pages import PageTable

KEYS = [bytes([letter]) for letter in b"abcdef"]


@dataclass
class User:
    """Somebody with pages, suspended or not."""

    pages: list[int]
    parked: bool = False


class TableAndModel(RuleBasedStateMachine):
    """Every operation is done twice: by the table, and by lists that are searched from end to end."""

    @initialize(num_pages=st.integers(1, 9))
    def begin(self, num_pages: int) -> None:
        self.table = PageTable(num_pages, page_tokens=4)
        self.users: list[User] = []
        self.keys: dict[int, bytes] = {}
        self.unused: list[int] = []  # nobody's, with a key; oldest first

    def num_users(self, page: int) -> int:
        return sum(page in user.pages for user in self.users)

    def free(self) -> set[int]:
        return {page for page in range(self.table.num_pages) if not self.num_users(page) and page not in self.keys}

    @rule(count=st.integers(0, 5))
    def take(self, count: int) -> None:
        free = self.free()
        pages = self.table.take(count)
        if count > len(free) + len(self.unused):
            assert pages is None
            return
        assert pages is not None
        num_evicted = max(0, count - len(free))
        evicted, self.unused = self.unused[:num_evicted], self.unused[num_evicted:]
        assert set(pages[: count - num_evicted]) <= free, "cached pages go before free ones"
        assert pages[count - num_evicted :] == evicted, "not the oldest first"
        for page in evicted:
            del self.keys[page]
        self.users.append(User(pages))

    @rule(keys=st.lists(st.sampled_from(KEYS), unique=True, max_size=4))
    def find_and_share(self, keys: list[bytes]) -> None:
        page_of = {key: page for page, key in self.keys.items()}
        known = [page_of.get(key) for key in keys]
        run = known[: known.index(None)] if None in known else known
        pages = self.table.match(keys)
        assert pages == run
        assert self.table.num_cached(pages) == sum(page in self.unused for page in pages)
        self.table.share(pages)
        self.unused = [page for page in self.unused if page not in pages]
        self.users.append(User(pages))

    @precondition(lambda self: any(user.pages for user in self.users))
    @rule(choice=st.data(), key=st.sampled_from(KEYS))
    def publish(self, choice: st.DataObject, key: bytes) -> None:
        page = choice.draw(st.sampled_from([page for user in self.users for page in user.pages]))
        self.table.publish(page, key)
        if page not in self.keys and key not in self.keys.values():
            self.keys[page] = key

    @precondition(lambda self: any(not user.parked for user in self.users))
    @rule(choice=st.data())
    def park(self, choice: st.DataObject) -> None:
        user = choice.draw(st.sampled_from([user for user in self.users if not user.parked]))
        self.table.park(user.pages)
        user.parked = True

    @precondition(lambda self: any(user.parked for user in self.users))
    @rule(choice=st.data())
    def unpark(self, choice: st.DataObject) -> None:
        user = choice.draw(st.sampled_from([user for user in self.users if user.parked]))
        self.table.unpark(user.pages)
        user.parked = False

    @precondition(lambda self: any(not user.parked for user in self.users))
    @rule(choice=st.data())
    def give_back(self, choice: st.DataObject) -> None:
        user = choice.draw(st.sampled_from([user for user in self.users if not user.parked]))
        self.users.remove(user)
        self.table.give_back(user.pages)
        self.unused += [page for page in user.pages if not self.num_users(page) and page in self.keys]

    @invariant()
    def agree(self) -> None:
        self.table.check_integrity([user.pages for user in self.users])
        used = {page for user in self.users for page in user.pages}
        going = {page for user in self.users if not user.parked for page in user.pages}
        assert self.table.counts() == {
            "free": len(self.free()),
            "held": len(going),
            "parked": len(used - going),
            "cached": len(self.unused),
        }
        assert self.table.num_available == len(self.free()) + len(self.unused)


TableAndModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTableAndModel = TableAndModel.TestCase


def test_low_pages_are_given_first() -> None:
    """The lowest pages are the ones whose memory was touched at start."""
    table = PageTable(num_pages=4, page_tokens=16)
    assert table.take(3) == [0, 1, 2]


def test_too_many_is_none_and_changes_nothing() -> None:
    """Three of four pages are gone: two more cannot be had, and the last one is still there afterwards."""
    table = PageTable(num_pages=4, page_tokens=16)
    table.take(3)
    assert table.take(2) is None
    assert table.take(1) == [3]


def test_the_page_that_waited_longest_is_evicted_first() -> None:
    """A prefix of three pages came back end first, so its start outlives its end."""
    table = PageTable(num_pages=3, page_tokens=4)
    pages = table.take(3)
    assert pages is not None
    for page, key in zip(pages, KEYS, strict=False):
        table.publish(page, key)
    table.give_back(reversed(pages))
    assert table.take(2) == [pages[2], pages[1]]
    assert table.match(KEYS[:3]) == [pages[0]]
    assert table.num_evictions == 2


def test_a_hit_makes_a_page_young_again() -> None:
    """a was cached before b, then used once more and given back: now b is the older one."""
    table = PageTable(num_pages=2, page_tokens=4)
    a, b = table.take(2) or []
    table.publish(a, b"a")
    table.publish(b, b"b")
    table.give_back([a, b])
    table.share([a])
    table.give_back([a])
    assert table.take(1) == [b]


def test_two_pages_of_equal_content_are_not_both_hits() -> None:
    """Two prompts computed the same page side by side: the first published is the one that is found."""
    table = PageTable(num_pages=2, page_tokens=4)
    first, second = table.take(2) or []
    table.publish(first, b"same")
    table.publish(second, b"same")
    assert table.match([b"same"]) == [first]
    table.give_back([first, second])
    assert table.counts() == {"free": 1, "held": 0, "parked": 0, "cached": 1}


def test_a_shared_page_is_parked_only_when_all_its_users_are() -> None:
    """One user is suspended while the other runs on: the page is held. When both are, it is parked."""
    table = PageTable(num_pages=1, page_tokens=4)
    pages = table.take(1) or []
    table.share(pages)
    table.park(pages)
    assert table.counts()["held"] == 1
    table.give_back(pages)  # the one that runs ends
    assert table.counts()["parked"] == 1
    table.share(pages)  # a hit by somebody who runs
    assert table.counts()["held"] == 1
    table.park(pages)
    assert table.counts()["parked"] == 1


def test_giving_back_twice_is_noticed() -> None:
    """A page given back once too often would be handed to two requests."""
    table = PageTable(num_pages=2, page_tokens=4)
    pages = table.take(1) or []
    table.give_back(pages)
    with pytest.raises(AssertionError, match="more often than taken"):
        table.give_back(pages)


def test_a_leak_is_noticed() -> None:
    """A user forgot one of its pages: the audit says so."""
    table = PageTable(num_pages=2, page_tokens=4)
    pages = table.take(2) or []
    with pytest.raises(AssertionError, match="leaked"):
        table.check_integrity([pages[:1]])
