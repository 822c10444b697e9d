"""Triton's operators against torch's on the same device: any mixture of prompts, chunks and tokens."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headway.core.work import Segment
from headway.kv.pool import KVPool, PoolShape
from headway.models.config import DecoderConfig
from headway.models.decoder import Layer, Linear
from headway.models.layers import rope_table
from headway.models.presets import preset
from headway.stages.batch import Batch, PageLists, make_batch
from headway.stages.operators import Operators
from headway.stages.tiling import Rates, Tiling

pytestmark = pytest.mark.gpu
POSITIONS = 1500
RATES = Rates(1e12, 1e12, 1e12, 1e12, 1e12, 1e12, 1e12)
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 2e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
HEADS = [(6, 2, 64), (9, 3, 64), (4, 4, 32), (8, 1, 128)]


def shape(num_heads: int, num_kv_heads: int, head_size: int, window: int | None = None) -> DecoderConfig:
    return replace(
        preset("smollm2-135m"), num_layers=2, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size,
        windows=(window, None),
    )  # fmt: skip


def pool_of(config: DecoderConfig, dtype: torch.dtype, device: str, page_tokens: int = 16) -> KVPool:
    pages = 4 * -(-POSITIONS // page_tokens)
    pool = KVPool(PoolShape(pages, 2, page_tokens, config.num_kv_heads, config.head_size, dtype), device)
    torch.manual_seed(5)
    pool.blocks_PL2KSD.copy_(torch.randn(pool.blocks_PL2KSD.shape).to(dtype))
    return pool


def batch_of(sizes: list[tuple[int, int]], pool: KVPool, device: str) -> Batch:
    """(tokens, context) each, on scattered pages."""
    order = list(range(pool.shape.num_pages))
    random.Random(3).shuffle(order)
    segments = []
    for number, (num_tokens, context) in enumerate(sizes):
        pages = tuple(order.pop() for _ in range(-(-(context + num_tokens) // pool.shape.page_tokens)))
        segments.append(Segment(f"r{number}", tuple(range(num_tokens)), context, context, pages, ()))
    return make_batch(segments, PageLists(), pool.shape.page_tokens, torch.device(device))


def triton_operators(config: DecoderConfig, pool: KVPool) -> Operators:
    from headway.stages.gpu import TritonOperators

    return TritonOperators(config, pool, POSITIONS)


def seen(operators: Operators, batch: Batch, q: Tensor, bound_s: float) -> Tensor:
    config = operators.config
    heads = (config.num_heads, config.num_kv_heads, config.head_size)
    tiles = Tiling(RATES, bound_s).attention(batch.segments, *heads, 2, config.windows[0], gathers=operators.gathers)[0]
    y = torch.full_like(q, float("nan"))
    look = operators.looking(batch, 0, q, y)
    for glances in tiles:
        look(operators.prepare(batch, glances))
    return y


@each_dtype
@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(
    "sizes", [[(1, 0)], [(1, 300), (1, 63), (1, 64)], [(150, 0)], [(3, 70), (1, 1400), (40, 20), (2, 0)]], ids=str
)
def test_attention(
    device: str, dtype: torch.dtype, window: int | None, heads: tuple[int, int, int], sizes: list[tuple[int, int]]
) -> None:
    if device == "cpu" and dtype is torch.bfloat16:
        pytest.skip("the interpreter does not multiply bfloat16")
    config = shape(*heads, window)
    pool = pool_of(config, dtype, device)
    batch = batch_of(sizes, pool, device)
    torch.manual_seed(1)
    q = (torch.randn(batch.num_rows, heads[0], heads[2]) / heads[2] ** 0.5).to(dtype).to(device)
    with torch.inference_mode():
        found = seen(triton_operators(config, pool), batch, q, 1.0)
        torch.testing.assert_close(found, seen(Operators(config, pool), batch, q, 1.0), **CLOSE[dtype])
        torch.testing.assert_close(seen(triton_operators(config, pool), batch, q, 1e-9), found, **CLOSE[dtype])


@each_dtype
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rotation_and_pages(device: str, dtype: torch.dtype, normed: bool, heads: tuple[int, int, int]) -> None:
    config = shape(*heads)
    pools = [pool_of(config, dtype, device) for _ in range(2)]
    batch = batch_of([(5, 30), (1, 77), (20, 0)], pools[0], device)
    nothing = Linear(torch.empty(0))
    gain = torch.rand(config.head_size).to(dtype).to(device) if normed else None
    layer = Layer(torch.empty(0), nothing, gain, gain, nothing, torch.empty(0), nothing, nothing)
    rope = rope_table(config, POSITIONS, device)
    torch.manual_seed(2)
    qkv = torch.randn(batch.num_rows, config.q_size + 2 * config.kv_size).to(dtype).to(device)
    rotated = []
    with torch.inference_mode():
        for operators in (Operators(config, pools[0]), triton_operators(config, pools[1])):
            mine = qkv.clone()
            for rows in (slice(0, 7), slice(7, batch.num_rows)):
                operators.place(batch, 1, layer, rope, mine, rows)
            rotated.append(mine[:, : config.q_size])
    torch.testing.assert_close(rotated[1], rotated[0], **CLOSE[dtype])
    torch.testing.assert_close(pools[1].blocks_PL2KSD, pools[0].blocks_PL2KSD, **CLOSE[dtype])
    untouched = pool_of(config, dtype, device).blocks_PL2KSD
    assert torch.equal(pools[1].blocks_PL2KSD == untouched, pools[0].blocks_PL2KSD == untouched)


@each_dtype
def test_activation(device: str, dtype: torch.dtype) -> None:
    config = shape(*HEADS[0])
    pool = pool_of(config, dtype, device)
    torch.manual_seed(4)
    wide = (3 * torch.randn(9, 2 * 1100)).to(dtype).to(device)
    with torch.inference_mode():
        found, wanted = triton_operators(config, pool).activate(wide), Operators(config, pool).activate(wide)
    torch.testing.assert_close(found, wanted, **CLOSE[dtype])
