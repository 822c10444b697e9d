"""The memory behind the pages: what is written is read back, one page is one piece, another process can map it."""

import gc
import mmap
import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kv.pool import KVPool, PoolShape

SHAPE = PoolShape(num_pages=12, num_layers=3, page_tokens=4, num_kv_heads=2, head_size=8, dtype=torch.float32)


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(12)), st.integers(1, 48), st.integers(0, 2), st.integers(0, 2**31))
def test_what_is_written_is_read_back_through_any_page_table(pages, length, layer, seed):
    """Rows go to scattered pages in one write, and come back in order, all heads or one."""
    pool = KVPool(SHAPE)
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(length, 2, 8, generator=generator) for _ in range(2))
    positions = torch.arange(length)
    table = torch.tensor(pages[: -(-length // 4)])
    pool.write(layer, table[positions // 4], positions % 4, k, v)
    read_k, read_v = pool.read(layer, table)
    assert torch.equal(read_k[:, :length].transpose(0, 1), k)
    assert torch.equal(read_v[:, :length].transpose(0, 1), v)
    one_k, _ = pool.read(layer, table, slice(1, 2))
    assert torch.equal(one_k[0, :length], k[:, 1])
    others = [number for number in range(3) if number != layer]
    assert not pool.blocks_PL2KSD[:, others].any(), "another layer was touched"
    pool.close()


def test_a_page_is_one_contiguous_piece_of_memory():
    """All layers' keys and values of a page lie together: a hand-off of a page is one copy."""
    pool = KVPool(SHAPE)
    page = pool.page(5)
    assert page.is_contiguous()
    assert page.nbytes == SHAPE.page_bytes == 3 * 2 * 2 * 4 * 8 * 4
    assert page.data_ptr() - pool.blocks_PL2KSD.data_ptr() == 5 * SHAPE.page_bytes
    pool.close()


def test_another_mapping_of_the_file_sees_the_same_bytes():
    """That is what lets a process on the same host take a request over by reference."""
    pool = KVPool(SHAPE)
    pool.page(7).fill_(2.5)
    with mmap.mmap(pool.file, SHAPE.pool_bytes, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        start = 7 * SHAPE.page_bytes
        other = torch.frombuffer(bytearray(mapped[start : start + SHAPE.page_bytes]), dtype=torch.float32)
    assert (other == 2.5).all()
    pool.close()


def test_touching_memory_beforehand_changes_nothing_in_it():
    shape = PoolShape(64, 2, 16, 2, 64, torch.float32)
    pool = KVPool(shape)
    pool.page(40).fill_(1.0)
    rounds = 0
    while pool.fault_in(1 << 20):
        rounds += 1
        assert rounds < 1000
    assert (pool.page(40) == 1.0).all()
    assert not pool.page(41).any()
    assert pool.fault_in(1 << 20) is False
    pool.close()


def test_a_pool_gives_its_file_back_closed_or_forgotten():
    """One is closed (twice), one is merely dropped: no file of either stays open, and nobody else's is closed."""
    gc.collect()
    before = _num_open_files()
    closed, dropped = KVPool(SHAPE), KVPool(SHAPE)
    of_each = (_num_open_files() - before) // 2
    assert of_each > 0
    closed.close()
    assert _num_open_files() == before + of_each
    other = os.memfd_create("of-somebody-else")  # may get the number that was just given back
    closed.close()
    assert closed.fault_in(1 << 20) is False
    del closed, dropped
    gc.collect()
    assert _num_open_files() == before + 1
    os.close(other)


def _num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
