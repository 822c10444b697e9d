"""Segments laid out in rows, and the lists of pages that are kept from token to token."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from headway.core.work import Segment
from headway.stages.batch import PageLists, make_batch


def segment(pages: tuple[int, ...], name: str = "r") -> Segment:
    return Segment(name, (1,), 0, 0, pages, (0,))


@given(st.lists(st.lists(st.integers(0, 9999), max_size=12).map(tuple), min_size=1, max_size=12))
def test_a_page_list_is_always_that_of_the_segment(histories):
    """Grown, shortened, or replaced by other pages of the same number, as after a prompt was read again."""
    lists = PageLists()
    for pages in histories:
        assert lists.of(segment(pages)).tolist() == list(pages)


def test_growing_by_a_page_and_being_replaced():
    lists = PageLists()
    assert lists.of(segment((7, 8))).tolist() == [7, 8]
    assert lists.of(segment((7, 8, 3))).tolist() == [7, 8, 3]
    assert lists.of(segment((7, 5, 3))).tolist() == [7, 5, 3]
    lists.forget("r")
    assert lists.of(segment((1,))).tolist() == [1]


def test_rows_positions_pages_and_slots():
    """A prompt of three tokens, a token at position 9 of another, a chunk of two in the middle of a third."""
    segments = [
        Segment("a", (11, 12, 13), 0, 0, (4,), (2,)),
        Segment("b", (21,), 9, 9, (6, 2, 8), (0,)),
        Segment("c", (31, 32), 3, 3, (5, 1), ()),
    ]
    batch = make_batch(segments, PageLists(), 4, torch.device("cpu"))
    assert batch.tokens_N.tolist() == [11, 12, 13, 21, 31, 32]
    assert batch.positions_N.tolist() == [0, 1, 2, 9, 3, 4]
    assert batch.pages_N.tolist() == [4, 4, 4, 8, 5, 1]
    assert batch.slots_N.tolist() == [0, 1, 2, 1, 3, 0]
    assert [table.tolist() for table in batch.tables] == [[4], [6, 2, 8], [5, 1]]
    assert batch.asked_rows.tolist() == [2, 3]
    assert (batch.asked_by, batch.asked_for) == (["a", "b"], [3, 10])
    assert all(np.diff([row.start for row in batch.rows]) > 0)
