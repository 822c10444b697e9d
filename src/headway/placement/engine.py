"""Puts one engine together in this process: weights, pool, stage, scheduler, and the facts it resolved."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from headway.config import ConfigError, EngineSettings
from headway.core import event as ev
from headway.core.clock import Clock
from headway.core.cost import CostModel
from headway.core.pages import PageTable
from headway.core.scheduler import Scheduler, SchedulerSettings
from headway.kv.pool import KVPool, PoolShape
from headway.models import presets, weights
from headway.models.config import DecoderConfig, read_config
from headway.models.decoder import Decoder
from headway.models.locate import locate
from headway.placement.calibrate import fit_cost, measure_rates
from headway.placement.driver import Driver, Mailbox
from headway.placement.wire import EngineFacts
from headway.stages.language import LanguageStage
from headway.stages.sample import Sampler
from headway.stages.tiling import Tiling

SATURATION = 1.25  # a pack may grow until the weights are read this many times over in arithmetic
FIRST_FAULTED_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine, ready to be driven."""

    settings: EngineSettings
    facts: EngineFacts
    scheduler: Scheduler
    stage: LanguageStage
    pool: KVPool

    def driver(self, clock: Clock, mailbox: Mailbox, tell: Callable[[ev.Deliver | ev.End], None]) -> Driver:
        return Driver(self.scheduler, {"language": self.stage}, clock, mailbox, tell)


class MonotonicClock:
    """Seconds since the host's start: the same for every process on it."""

    now = staticmethod(time.monotonic)


def build_engine(settings: EngineSettings) -> Engine:
    """Load, allocate, measure. Raises ConfigError or ModelError with one sentence that says what to do."""
    begun = time.monotonic()
    device = _device(settings.device)
    num_threads = settings.num_threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(num_threads)
    model, name, dtype_reason = _load_model(settings, device)
    pool, max_model_len = _make_pool(settings, model.config, model.dtype, device)
    pool.fault_in(FIRST_FAULTED_BYTES)
    with torch.inference_mode():
        rates = measure_rates(model, pool)
        sampler = Sampler(model.config.vocab_size)
        stage = LanguageStage(model, pool, Tiling(rates, settings.max_tile_ms / 1e3), sampler)
        fit = fit_cost(stage, rates, max_model_len)
    scheduler = Scheduler(
        SchedulerSettings(
            max_model_len=max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_num_queued=settings.max_num_queued_reqs,
            pack_tokens=max(16, int(SATURATION * fit.stream_s / fit.token_s)),
            tile_s=settings.max_tile_ms / 1e3,
            max_num_parked=settings.max_num_parked,
            max_parked_s=settings.max_parked_s,
            prefix_caching=settings.enable_prefix_caching,
        ),
        CostModel(fit),
        PageTable(pool.shape.num_pages, pool.shape.page_tokens),
    )
    facts = EngineFacts(
        model_name=name,
        device=_device_name(device),
        dtype=str(model.dtype).removeprefix("torch."),
        dtype_reason=dtype_reason,
        num_parameters=model.config.num_parameters,
        max_model_len=max_model_len,
        max_num_seqs=settings.max_num_seqs,
        page_tokens=pool.shape.page_tokens,
        num_pages=pool.shape.num_pages,
        pool_bytes=pool.shape.pool_bytes,
        num_threads=num_threads,
        max_tile_ms=settings.max_tile_ms,
        load_s=time.monotonic() - begun,
    )
    return Engine(settings, facts, scheduler, stage, pool)


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda was asked for, but torch sees no CUDA device: use --device cpu, "
            "or install a CUDA build of torch and a driver that fits it."
        )
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _load_model(settings: EngineSettings, device: torch.device) -> tuple[Decoder, str, str]:
    """The decoder, its name, and why it has the dtype that it has."""
    preset = presets.parse(settings.model)
    folder = None if preset else locate(settings.model)
    config = preset or read_config(folder or Path())
    if settings.dtype == "auto":
        dtype, reason = weights.choose_dtype(config.dtype, device)
    else:
        dtype, reason = getattr(torch, settings.dtype), "as asked"
    if folder is None:
        return weights.random_decoder(config, settings.seed, dtype, device), str(settings.model), reason
    name = folder.name if settings.model is None else str(settings.model).rstrip("/")
    return weights.load(folder, dtype, device), name, reason


def _make_pool(
    settings: EngineSettings, config: DecoderConfig, dtype: torch.dtype, device: torch.device
) -> tuple[KVPool, int]:
    """The pool and the longest request it is for."""
    max_model_len = settings.max_model_len or config.max_positions
    if max_model_len > config.max_positions:
        raise ConfigError(
            f"--max-model-len {max_model_len} is more than the {config.max_positions} positions this model was made "
            f"for: give {config.max_positions} or less."
        )
    shape = PoolShape(1, config.num_layers, settings.block_size, config.num_kv_heads, config.head_size, dtype)
    pages_per_request = -(-max_model_len // settings.block_size)
    free_bytes = _free_bytes(device)
    budget = settings.kv_cache_memory_bytes
    if budget is not None and budget > free_bytes:
        raise ConfigError(
            f"--kv-cache-memory-bytes {budget} is more than the {free_bytes} bytes that are free: "
            f"give {free_bytes // 2} or less."
        )
    if budget is None:
        budget = min(free_bytes // 2, settings.max_num_seqs * pages_per_request * shape.page_bytes)
    num_pages = budget // shape.page_bytes
    if num_pages < pages_per_request:
        fitting = num_pages * settings.block_size
        advice = f"give --max-model-len {fitting} or less" if fitting >= 2 else "free some memory"
        if settings.kv_cache_memory_bytes is not None:
            advice += f" or --kv-cache-memory-bytes {pages_per_request * shape.page_bytes} or more"
        raise ConfigError(
            f"A context of {max_model_len} tokens needs {pages_per_request * shape.page_bytes / 2**30:.2f} GiB of "
            f"key-value memory, but there are {budget / 2**30:.2f} GiB for it: {advice}."
        )
    shape = PoolShape(num_pages, config.num_layers, settings.block_size, config.num_kv_heads, config.head_size, dtype)
    return KVPool(shape, device), max_model_len


def _free_bytes(device: torch.device) -> int:
    """Memory that this process may still take, within its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return available if limit == "max" else min(available, int(limit) - used)
    except (OSError, ValueError):
        return available
