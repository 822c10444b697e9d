"""How much memory the pool gets, and what a user is told when it is not enough."""

from dataclasses import replace

import pytest

from headway.config import ConfigError, EngineSettings
from headway.models.presets import preset
from headway.placement.engine import _context, _pool_shape, _Source

GIB = 2**30


def source(name: str = "qwen2.5-0.5b") -> _Source:
    import torch

    return _Source(name, preset(name), None, torch.bfloat16, "as asked")


def test_half_of_what_the_weights_leave():
    """0.5 B parameters in bfloat16 take 0.92 GiB; of 10 GiB the pool gets half of the rest."""
    shape = _pool_shape(EngineSettings(), source(), 32768, 10 * GIB)
    assert shape.page_bytes == 24 * 2 * 2 * 16 * 64 * 2
    left = 10 * GIB - source().weight_bytes
    assert left // 2 - shape.page_bytes < shape.pool_bytes <= left // 2


def test_a_tied_head_is_there_twice_where_it_is_packed():
    """qwen2.5-0.5b's has 151,936 x 896 weights, which serve as embedding and, in another order, as head."""
    plain = source()
    assert replace(plain, is_packed=True).weight_bytes - plain.weight_bytes == 2 * 151_936 * 896
    untied = replace(plain, config=replace(plain.config, tie_embeddings=False))
    assert replace(untied, is_packed=True).weight_bytes == untied.weight_bytes


def test_never_more_than_all_requests_could_use():
    shape = _pool_shape(EngineSettings(max_num_seqs=4), source(), 1000, 100 * GIB)
    assert shape.num_pages == 4 * 63


def test_as_asked():
    shape = _pool_shape(EngineSettings(kv_cache_memory_bytes=GIB), source(), 4096, 10 * GIB)
    assert GIB - shape.page_bytes < shape.pool_bytes <= GIB


@pytest.mark.parametrize(
    ("settings", "name", "max_model_len", "free_bytes", "advice"),
    [
        (EngineSettings(), "llama-3.1-8b", 4096, 8 * GIB, "choose a smaller model"),
        (EngineSettings(), "llama-3.2-1b", 131072, 4 * GIB, r"give --max-model-len \d+ or less\."),
        (
            EngineSettings(kv_cache_memory_bytes=GIB),
            "llama-3.2-1b",
            131072,
            90 * GIB,
            "--kv-cache-memory-bytes 4294967",
        ),
        (EngineSettings(kv_cache_memory_bytes=9 * GIB), "qwen2.5-0.5b", 4096, 8 * GIB, "that the weights leave free"),
    ],
    ids=["weights", "context", "pool asked too small", "pool asked too large"],
)
def test_what_does_not_fit_is_refused_with_advice(settings, name, max_model_len, free_bytes, advice):
    with pytest.raises(ConfigError, match=advice):
        _pool_shape(settings, source(name), max_model_len, free_bytes)


def test_the_advised_context_fits():
    """Whoever follows the advice gets an engine."""
    with pytest.raises(ConfigError) as refused:
        _pool_shape(EngineSettings(), source("llama-3.2-1b"), 131072, 4 * GIB)
    advised = int(str(refused.value).split("--max-model-len ")[1].split()[0])
    assert _pool_shape(EngineSettings(), source("llama-3.2-1b"), advised, 4 * GIB).num_pages > 0


def test_a_context_beyond_the_model_is_refused():
    with pytest.raises(ConfigError, match="give 32768 or less"):
        _context(EngineSettings(max_model_len=40000), preset("qwen2.5-0.5b"))
