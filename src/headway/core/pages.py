"""Counts the KV pages of one group of layers: who holds each, which are cached, which may be reused.

Owns the numbers, not the tensors (`kv/pool.py` has those). A page is in exactly one state:

    free    nobody's, content worthless
    held    at least one request that may run uses it
    parked  used only by requests whose step is suspended
    cached  nobody uses it, but its prefix key is known: reused on a hit, evicted (oldest first) when space is short

Sharing copies nothing: a page has a count of users. Later states (arriving, offloaded) join the same table.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from enum import Enum


class PageState(Enum):
    FREE = "free"
    HELD = "held"
    PARKED = "parked"
    CACHED = "cached"


class PageTable:
    """The pages 0 … num_pages - 1 of `page_tokens` tokens each."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.num_evictions = 0
        self._users = [0] * num_pages
        self._parked_users = [0] * num_pages
        self._keys: list[bytes | None] = [None] * num_pages
        self._by_key: dict[bytes, int] = {}
        self._free = list(range(num_pages - 1, -1, -1))  # low pages first: they are the ones touched at start
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._num_parked = 0

    # What there is

    @property
    def num_available(self) -> int:
        """Pages that `take` could give right now."""
        return len(self._free) + len(self._cached)

    def counts(self) -> dict[str, int]:
        """State -> number of pages; the numbers sum to `num_pages`."""
        used = self.num_pages - len(self._free) - len(self._cached)
        return {
            PageState.FREE.value: len(self._free),
            PageState.HELD.value: used - self._num_parked,
            PageState.PARKED.value: self._num_parked,
            PageState.CACHED.value: len(self._cached),
        }

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_tokens)

    # Taking and giving back

    def take(self, count: int) -> list[int] | None:
        """`count` pages with one user each, or None (and nothing changed) if there are not enough."""
        if count > self.num_available:
            return None
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._users[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more user for each of these held, parked or cached pages."""
        for page in pages:
            if self._users[page] == 0:
                del self._cached[page]
            elif self._is_parked(page):
                self._num_parked -= 1
            self._users[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """One user fewer for each page. The last one leaves it cached if its key is known, else free."""
        for page in pages:
            assert self._users[page] > self._parked_users[page], f"page {page} given back more often than taken"
            self._users[page] -= 1
            if self._users[page] == 0:
                if self._keys[page] is None:
                    self._free.append(page)
                else:
                    self._cached[page] = None
            elif self._is_parked(page):
                self._num_parked += 1

    def park(self, pages: Iterable[int]) -> None:
        """One user of each page is suspended."""
        for page in pages:
            self._parked_users[page] += 1
            assert self._parked_users[page] <= self._users[page]
            self._num_parked += self._is_parked(page)

    def unpark(self, pages: Iterable[int]) -> None:
        """One suspended user of each page goes on."""
        for page in pages:
            assert self._parked_users[page] > 0
            self._num_parked -= self._is_parked(page)
            self._parked_users[page] -= 1

    # Prefixes

    def publish(self, page: int, key: bytes) -> None:
        """The page is full and holds what `key` stands for. A second page of the same content stays private."""
        if self._keys[page] is None and key not in self._by_key:
            self._keys[page] = key
            self._by_key[key] = page

    def knows(self, key: bytes) -> bool:
        """Whether a page holds what the key stands for."""
        return key in self._by_key

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest known run of keys, from the first on. Changes nothing: `share` them to use them."""
        pages = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_cached(self, pages: Iterable[int]) -> int:
        """How many of these pages `take` could give away as long as nobody shares them."""
        return sum(self._users[page] == 0 for page in pages)

    # Inside

    def _is_parked(self, page: int) -> bool:
        return 0 < self._users[page] == self._parked_users[page]

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        key = self._keys[page]
        assert key is not None
        del self._by_key[key]
        self._keys[page] = None
        self.num_evictions += 1
        return page

    def check_integrity(self, expected_users: Iterable[Sequence[int]] | None = None) -> None:
        """Assert that every page is in one state and all counts agree; with the users' page lists, that none leaks."""
        states: Counter[str] = Counter()
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a page is free twice"
        for page in range(self.num_pages):
            users, key = self._users[page], self._keys[page]
            assert 0 <= self._parked_users[page] <= users
            assert (page in free) == (users == 0 and key is None), f"page {page}: free list disagrees"
            assert (page in cached) == (users == 0 and key is not None), f"page {page}: cached list disagrees"
            if key is not None:
                assert self._by_key[key] == page
            in_use = PageState.PARKED if self._is_parked(page) else PageState.HELD
            states[(PageState.FREE if page in free else PageState.CACHED if page in cached else in_use).value] += 1
        assert len(self._by_key) == sum(key is not None for key in self._keys)
        assert {**states} == {state: n for state, n in self.counts().items() if n}, (states, self.counts())
        if expected_users is not None:
            users_now = Counter(page for pages in expected_users for page in pages)
            assert users_now == Counter({page: n for page, n in enumerate(self._users) if n}), "pages leaked"
