# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The operators of a decoder's step that are not linear, as Triton kernels: attention straight from pages, rotation
with page writes, activation. Launched by `gpu.py`; needs Triton, which a CUDA build of torch brings along.

Blocks and splits of keys begin at multiples of their size, whatever else is in the batch and wherever a prompt was cut.
Running maximum and sum are those of
FlashAttention (arXiv 2205.14135), splits over keys those of Flash-Decoding.

Shape legend: N rows, H query heads, K key-value heads, G = H / K, D head size. Strides are counted in elements.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def activate(wide, y, wide_stride, width, BLOCK: tl.constexpr):
    """silu(gate) · up of some columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(wide + row * wide_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(wide + row * wide_stride + width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + at, (gate / (1.0 + tl.exp(-gate)) * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def place(
    qkv, positions, pages, slots, rope, cache, scale, row_stride, page_stride, head_stride, value_offset,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate a row's queries in place, scaled, and its keys; keys and values go to their page. A row whose page is
    below zero is only there to fill up."""
    row = tl.program_id(0).to(tl.int64)
    page = tl.load(pages + row)
    if page >= 0:
        half = tl.arange(0, HALF)[None, :]
        angle = rope + tl.load(positions + row) * 2 * HALF + half
        cos, sin = tl.load(angle), tl.load(angle + HALF)
        mine = qkv + row * row_stride

        head = tl.arange(0, HEAD_BLOCK)[:, None]
        at = mine + head * 2 * HALF + half
        first = tl.load(at, mask=head < HEADS, other=0.0).to(tl.float32)
        second = tl.load(at + HALF, mask=head < HEADS, other=0.0).to(tl.float32)
        tl.store(at, ((first * cos - second * sin) * scale).to(qkv.dtype.element_ty), mask=head < HEADS)
        tl.store(at + HALF, ((second * cos + first * sin) * scale).to(qkv.dtype.element_ty), mask=head < HEADS)

        head = tl.arange(0, KV_BLOCK)[:, None]
        at = mine + (HEADS + head) * 2 * HALF + half
        to = cache + page * page_stride + head * head_stride + tl.load(slots + row) * 2 * HALF + half
        first = tl.load(at, mask=head < KV_HEADS, other=0.0).to(tl.float32)
        second = tl.load(at + HALF, mask=head < KV_HEADS, other=0.0).to(tl.float32)
        tl.store(to, (first * cos - second * sin).to(cache.dtype.element_ty), mask=head < KV_HEADS)
        tl.store(to + HALF, (second * cos + first * sin).to(cache.dtype.element_ty), mask=head < KV_HEADS)
        at += KV_HEADS * 2 * HALF
        first = tl.load(at, mask=head < KV_HEADS, other=0.0)
        second = tl.load(at + HALF, mask=head < KV_HEADS, other=0.0)
        tl.store(to + value_offset, first, mask=head < KV_HEADS)
        tl.store(to + value_offset + HALF, second, mask=head < KV_HEADS)


@triton.jit
def _look(
    q, running_max, total, mixed, key, end, last_seen, oldest_seen, table, cache, page_stride, value_offset,
    PAGE: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: the running maximum, the sum of weights and the weighted sum of values go on."""
    there = key < end
    page = tl.load(table + key // PAGE, mask=there, other=0).to(tl.int64)
    at = (cache + page * page_stride + (key % PAGE) * SIZE)[:, None] + tl.arange(0, SIZE)[None, :]
    k = tl.load(at, mask=there[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * LOG2_E
    if MASKED:
        seen = (key[None, :] <= last_seen[:, None]) & (key[None, :] >= oldest_seen[:, None]) & there[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(running_max, tl.max(scores, 1))
    safe = tl.where(highest == float("-inf"), 0.0, highest)  # a row that has seen nothing yet
    weights = tl.exp2(scores - safe[:, None])
    shrunk = tl.exp2(running_max - safe)
    v = tl.load(at + value_offset, mask=there[:, None], other=0.0)
    mixed = mixed * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return highest, total * shrunk + tl.sum(weights, 1), mixed


@triton.jit
def attend(
    q, y, cache, table, items, q_stride, y_stride, page_stride, head_stride, value_offset, window,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of a prompt's queries in one head. An item: first row, rows, position of the first, where its pages
    begin in `table`, first head, heads."""
    item = items + tl.program_id(0) * 6
    row = tl.load(item)
    num_rows, position = tl.load(item + 1).to(tl.int32), tl.load(item + 2).to(tl.int32)
    table += tl.load(item + 3)
    head = tl.load(item + 4).to(tl.int32) + tl.program_id(1)
    if tl.program_id(1) < tl.load(item + 5):
        cache += (head // GROUPS) * head_stride
        index = tl.arange(0, ROWS)
        inside = (index < num_rows)[:, None]
        column = head * SIZE + tl.arange(0, SIZE)[None, :]
        queries = tl.load(q + (row + index)[:, None] * q_stride + column, mask=inside, other=0.0)
        running_max = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        mixed = tl.zeros((ROWS, SIZE), tl.float32)
        last_seen = position + index
        oldest_seen = tl.zeros_like(last_seen)
        end = position + num_rows
        start = position * 0
        plain_end = position // KEYS * KEYS  # keys before it are seen by every row
        if WINDOWED:
            oldest_seen = last_seen - window + 1
            start = tl.maximum(position - window + 1, 0) // KEYS * KEYS
            plain_end = start
        for first in tl.range(start, plain_end, KEYS):
            running_max, total, mixed = _look(
                queries, running_max, total, mixed, first + tl.arange(0, KEYS), end, last_seen, oldest_seen, table,
                cache, page_stride, value_offset, PAGE, SIZE, False, PRECISION,
            )  # fmt: skip
        for first in tl.range(plain_end, end, KEYS):
            running_max, total, mixed = _look(
                queries, running_max, total, mixed, first + tl.arange(0, KEYS), end, last_seen, oldest_seen, table,
                cache, page_stride, value_offset, PAGE, SIZE, True, PRECISION,
            )  # fmt: skip
        to = y + (row + index)[:, None] * y_stride + column
        tl.store(to, (mixed / tl.where(total == 0.0, 1.0, total)[:, None]).to(y.dtype.element_ty), mask=inside)


@triton.jit
def attend_token(
    q, cache, table, items, positions, partial, peaks, q_stride, page_stride, head_stride, value_offset, window,
    num_splits, split_keys,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCK: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr,
    KEYS: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query and the heads that share keys, over one split of the keys it may see; `combine` joins the splits. An
    item: row, where its pages begin in `table`, first key-value head, key-value heads."""
    item = items + tl.program_id(0) * 4
    row = tl.load(item)
    kv_head = tl.load(item + 2).to(tl.int32) + tl.program_id(1)
    split = tl.program_id(2)
    end = tl.load(positions + row).to(tl.int32) + 1
    oldest = end * 0
    if WINDOWED:
        oldest = tl.maximum(end - window, 0)
    start, stop = split * split_keys, tl.minimum((split + 1) * split_keys, end)
    if (tl.program_id(1) < tl.load(item + 3)) & (start < end) & (stop > oldest):
        table += tl.load(item + 1)
        cache += kv_head * head_stride
        group = tl.arange(0, GROUP_BLOCK)
        heads = kv_head * GROUPS + group
        inside = (group < GROUPS)[:, None]
        size = tl.arange(0, SIZE)[None, :]
        queries = tl.load(q + row * q_stride + heads[:, None] * SIZE + size, mask=inside, other=0.0)
        running_max = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((GROUP_BLOCK,), tl.float32)
        mixed = tl.zeros((GROUP_BLOCK, SIZE), tl.float32)
        last_seen = tl.zeros_like(group) + end - 1
        oldest_seen = tl.zeros_like(group) + oldest
        begin = tl.maximum(start, oldest // KEYS * KEYS)
        for first in tl.range(begin, stop, KEYS):
            running_max, total, mixed = _look(
                queries, running_max, total, mixed, first + tl.arange(0, KEYS), stop, last_seen, oldest_seen, table,
                cache, page_stride, value_offset, PAGE, SIZE, True, PRECISION,
            )  # fmt: skip
        at = (tl.program_id(0) * HEADS + heads) * num_splits + split
        tl.store(partial + at[:, None] * SIZE + size, mixed, mask=inside)
        tl.store(peaks + at * 2, running_max, mask=group < GROUPS)
        tl.store(peaks + at * 2 + 1, total, mask=group < GROUPS)


@triton.jit
def combine(
    y, items, positions, partial, peaks, y_stride, window, num_splits, split_keys,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """The splits of one query head, one after another. Zeros for a row that fills up."""
    item = items + tl.program_id(0) * 4
    row = tl.load(item)
    head = tl.load(item + 2).to(tl.int32) * GROUPS + tl.program_id(1)
    if tl.program_id(1) < tl.load(item + 3) * GROUPS:
        end = tl.load(positions + row).to(tl.int32) + 1
        first = end * 0
        if WINDOWED:
            first = tl.maximum(end - window, 0) // split_keys
        size = tl.arange(0, SIZE)
        highest, total = float("-inf"), 0.0
        mixed = tl.zeros((SIZE,), tl.float32)
        for split in tl.range(first, (end + split_keys - 1) // split_keys):
            at = (tl.program_id(0) * HEADS + head) * num_splits + split
            peak, weight = tl.load(peaks + at * 2), tl.load(peaks + at * 2 + 1)
            higher = tl.maximum(highest, peak)
            kept, added = tl.exp2(highest - higher), tl.exp2(peak - higher)
            mixed = mixed * kept + tl.load(partial + at * SIZE + size) * added
            total = total * kept + weight * added
            highest = higher
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(y + row * y_stride + head * SIZE + size, (mixed / total).to(y.dtype.element_ty))
