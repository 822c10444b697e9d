"""Puts one engine together in this process: weights, pool, stage, scheduler, and the facts it resolved."""

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from headway.config import ConfigError, EngineSettings
from headway.core import event as ev
from headway.core.clock import Clock
from headway.core.cost import CostModel
from headway.core.pages import PageTable
from headway.core.scheduler import Scheduler
from headway.core.settings import SchedulerSettings
from headway.grammar.matcher import Compiler
from headway.grammar.notation import is_available
from headway.kv.pool import KVPool, PoolShape
from headway.models import presets, weights
from headway.models.config import DecoderConfig, ModelError, read_config
from headway.models.decoder import Decoder
from headway.models.locate import locate
from headway.models.tokenizer import open_model_text
from headway.placement.calibrate import Calibration
from headway.placement.dividing import measure_roofline, slowest
from headway.placement.driver import Driver, Mailbox
from headway.placement.fitting import LONGEST_PROBES, saturation
from headway.placement.memory import (
    free_bytes,
    give_back_freed_memory,
    keep_freed_memory,
    num_cores,
    return_freed_memory,
)
from headway.placement.multiplex import Cores
from headway.placement.prices import Prices, Subject, settle
from headway.placement.wire import EngineFacts
from headway.stages.device import WITHOUT_TRITON, check_device, operators_for, uses_triton
from headway.stages.language import LanguageStage
from headway.stages.matrices import Matrices, packed, packs
from headway.stages.native import suits
from headway.stages.panels import panels_for
from headway.stages.sample import Sampler, no_matcher
from headway.stages.tiling import Tiling

log = logging.getLogger("headway.engine")

FIRST_FAULTED_BYTES = 32 << 20  # of the pool, touched before the first request
MEASURED_BYTES = 256 << 20  # of it, where rates are measured: more than caches hold


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine, ready to be driven."""

    settings: EngineSettings
    facts: EngineFacts
    scheduler: Scheduler
    stage: LanguageStage
    pool: KVPool
    compiler: Compiler | None  # of constraints, where the extra is installed

    def driver(self, clock: Clock, mailbox: Mailbox, tell: Callable[[ev.Admit | ev.Deliver | ev.End], None]) -> Driver:
        return Driver(self.scheduler, {"language": self.stage}, clock, mailbox, tell, devote=Cores().devote)


class MonotonicClock:
    """Seconds since the host's start: the same for every process on it."""

    now = staticmethod(time.monotonic)


def build_engine(settings: EngineSettings) -> Engine:
    """Load, allocate, measure. Raises ConfigError or ModelError with one sentence that says what to do."""
    begun = time.monotonic()
    device = _device(settings.device)
    num_threads = settings.num_threads or num_cores()
    torch.set_num_threads(num_threads)
    return_freed_memory()
    source = _find(settings, device)
    max_model_len = _context(settings, source.config)
    shape = _pool_shape(settings, source, max_model_len, free_bytes(device))  # refuse before reading gigabytes
    with _within_memory():
        model = _load(source, settings, device, max_model_len)
        pool = KVPool(shape, device)
        pool.fault_in(FIRST_FAULTED_BYTES)
    with _within_memory(), torch.inference_mode():
        model, matrices = packed(model, integers=settings.quantization == "int8")
        give_back_freed_memory()
        keep_freed_memory()
        prices, cost_source = _prices(settings, model, matrices, pool, num_threads, max_model_len)
        compiler = _compiler(settings)
        sampler = Sampler(model.config.vocab_size, no_matcher if compiler is None else compiler.matcher)
        stage = LanguageStage(model, pool, Tiling(prices.rates, settings.tile_s), sampler, matrices)
        stage.record(settings.max_num_seqs)
        roofline = None
        if settings.lanes in ("split", "auto") and device.type == "cpu" and num_threads > 1:
            _touch(pool)
            roofline = measure_roofline(stage, num_threads, _num_measured(pool))
            stage.tiling = Tiling(slowest(prices.rates, roofline), settings.tile_s)
    pack_tokens = saturation(prices.fit)
    scheduler = Scheduler(
        _rules(settings, max_model_len, pack_tokens, shape.pool_bytes // 4 // stage.bytes_per_token),
        CostModel(prices.fit),
        PageTable(pool.shape.num_pages, pool.shape.page_tokens),
        roofline,
    )
    facts = EngineFacts(
        model_name=source.name,
        device=_device_name(device),
        dtype=str(model.dtype).removeprefix("torch."),
        dtype_reason=source.dtype_reason,
        num_parameters=model.config.num_parameters,
        max_model_len=max_model_len,
        max_num_seqs=settings.max_num_seqs,
        page_tokens=pool.shape.page_tokens,
        num_pages=pool.shape.num_pages,
        pool_bytes=pool.shape.pool_bytes,
        num_threads=num_threads,
        max_tile_ms=1e3 * settings.tile_s,
        load_s=time.monotonic() - begun,
        cost_fit=prices.fit,
        cost_error=prices.error,
        cost_source=cost_source,
        pack_tokens=pack_tokens,
        hidden_size=model.config.hidden_size,
        linear=matrices.head.name,
        operators=stage.operators.name,
    )
    return Engine(settings, facts, scheduler, stage, pool, compiler)


def _rules(settings: EngineSettings, max_model_len: int, pack_tokens: int, max_parked_tokens: int) -> SchedulerSettings:
    return SchedulerSettings(
        max_model_len=max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_queued=settings.max_num_queued_reqs,
        pack_tokens=pack_tokens,
        tile_s=settings.tile_s,
        max_num_parked=settings.max_num_parked,
        max_parked_tokens=max_parked_tokens,
        max_parked_s=settings.max_parked_s,
        prefix_caching=settings.enable_prefix_caching,
        order=settings.order,
        preempt=settings.preempt,
        chunk_tokens=settings.chunk_tokens,
        pack=settings.pack,
        refuse_unattainable=settings.refuse_unattainable,
        lanes=settings.lanes,
    )


def _compiler(settings: EngineSettings) -> Compiler | None:
    """Made before the first request: for a large vocabulary it takes a second, in which nothing else would run."""
    if not is_available():
        return None
    try:
        tokenizer = open_model_text(settings.model, chats=False).tokenizer
        return Compiler(tokenizer.source, tokenizer.vocab_size, tokenizer.eos_ids)
    except (ModelError, ValueError):  # ids can be served without text, and text without forms: the door refuses them
        return None


def _prices(
    settings: EngineSettings, model: Decoder, matrices: Matrices, pool: KVPool, num_threads: int, max_model_len: int
) -> tuple[Prices, str]:
    """By which operators are cut and steps are predicted, and where that is from.

    Triton compiles its kernels when they are first run, which is here: where it cannot, torch's operators are measured
    instead.
    """
    try:
        return _settled(settings, model, matrices, pool, num_threads, max_model_len)
    except Exception as error:
        if isinstance(error, ConfigError) or _is_lack_of_memory(error) or not uses_triton(model):
            raise
        check_device(model.device)
        log.warning(
            "Triton's kernels cannot be used here (%s): torch's operators are, which are slower.", _first_line(error)
        )
        WITHOUT_TRITON.set()
    return _settled(settings, model, matrices, pool, num_threads, max_model_len)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".:")


def _settled(
    settings: EngineSettings, model: Decoder, matrices: Matrices, pool: KVPool, num_threads: int, max_model_len: int
) -> tuple[Prices, str]:
    shape = pool.shape
    calibration = Calibration(model, pool, _num_measured(pool), settings.tile_s, max_model_len, matrices)
    subject = Subject(
        config=model.config,
        dtype=str(model.dtype),
        device=_device_name(model.device),
        num_threads=num_threads,
        page_tokens=shape.page_tokens,
        max_tile_ms=1e3 * settings.tile_s,
        longest_probe=min(max_model_len, LONGEST_PROBES[model.device.type]),
        operators=f"{operators_for(model, pool).name}, {matrices.head.name}",
    )

    def measure() -> Prices:
        _touch(pool)
        return calibration.measure()

    return settle(subject.path if settings.cost_cache else None, measure, calibration.check)


def _num_measured(pool: KVPool) -> int:
    """Pages where rates are measured."""
    return min(pool.shape.num_pages, MEASURED_BYTES // pool.shape.page_bytes)


def _touch(pool: KVPool) -> None:
    """Bring those into memory, so that it is not their coming there that is measured."""
    if (missing := MEASURED_BYTES - pool.num_faulted_bytes) > 0:
        pool.fault_in(missing)


@contextmanager
def _within_memory() -> Iterator[None]:
    """Says in one sentence that there is not enough memory, whoever finds out: torch, the system or the interpreter."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        raise ConfigError(
            "There is not enough memory for the model and its key-value pages: choose a smaller model, --dtype "
            "bfloat16 or a smaller --max-model-len, or allow this process more memory."
        ) from error


def _is_lack_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOMEM, errno.ENOSPC)
    # torch says it in a subclass of RuntimeError on a device, and in the text of a plain one on a CPU; Triton in a text
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error) for words in ("allocate memory", "out of memory")
    )


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda was asked for, but torch sees no CUDA device: use --device cpu, "
            "or install a CUDA build of torch and a driver that fits it."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name} was asked for, but there are {torch.cuda.device_count()} CUDA devices.")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # kernels and events go to the current one
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@dataclass(frozen=True, slots=True)
class _Source:
    """Which model, from where (None: random weights), in which dtype and why."""

    name: str
    config: DecoderConfig
    folder: Path | None
    dtype: torch.dtype
    dtype_reason: str
    is_packed: bool = False  # its matrices will be

    @property
    def weight_bytes(self) -> int:
        """While they are loaded; a head that is tied to the embedding is packed a second time on a CPU."""
        tied = self.config.vocab_size * self.config.hidden_size if self.config.tie_embeddings else 0
        return (self.config.num_parameters + (tied if self.is_packed else 0)) * self.dtype.itemsize


def _find(settings: EngineSettings, device: torch.device) -> _Source:
    preset = presets.parse(settings.model)
    folder = None if preset else locate(settings.model)
    config = preset or read_config(folder or Path())
    if settings.quantization == "int8":
        if panels_for(torch.bfloat16, device, integers=True) is None:
            raise ConfigError(
                "--quantization int8 needs a CPU and the operators that are compiled for it: leave it out, or install "
                "a C++ compiler and Headway again."
            )
        dtype, reason = torch.bfloat16, "bfloat16, for int8 matrices"
    elif settings.dtype == "auto":
        found = panels_for(torch.bfloat16, device)
        is_compiled = found is not None and suits(found, config, torch.bfloat16, device)
        dtype, reason = weights.choose_dtype(config.dtype, device, is_compiled=is_compiled)
    else:
        dtype, reason = getattr(torch, settings.dtype), "as asked"
    name = str(settings.model or "embedded").rstrip("/")
    return _Source(name, config, folder, dtype, reason, packs(dtype, device, integers=settings.quantization == "int8"))


def _load(source: _Source, settings: EngineSettings, device: torch.device, num_positions: int) -> Decoder:
    if source.folder is None:
        return weights.random_decoder(source.config, settings.seed, source.dtype, device, num_positions)
    return weights.load(source.folder, source.dtype, device, num_positions)


def _context(settings: EngineSettings, config: DecoderConfig) -> int:
    """The longest request, in tokens."""
    asked = settings.max_model_len or config.max_positions
    if asked > config.max_positions:
        raise ConfigError(
            f"--max-model-len {asked} is more than the {config.max_positions} positions this model was made for: "
            f"give {config.max_positions} or less."
        )
    return asked


def _pool_shape(settings: EngineSettings, source: _Source, max_model_len: int, free_bytes: int) -> PoolShape:
    """As many pages as were asked for, or half of what the weights leave free, or as all requests could ever use."""
    config = source.config
    left_bytes = free_bytes - source.weight_bytes
    if left_bytes <= 0:
        raise ConfigError(
            f"The weights need {_gib(source.weight_bytes)} of memory and {_gib(free_bytes)} are free: choose a "
            "smaller model or --dtype bfloat16, or free some memory."
        )
    page = PoolShape(1, config.num_layers, settings.block_size, config.num_kv_heads, config.head_size, source.dtype)
    pages_per_request = -(-max_model_len // settings.block_size)
    budget = settings.kv_cache_memory_bytes
    if budget is not None and budget > left_bytes:
        raise ConfigError(
            f"--kv-cache-memory-bytes {budget} is more than the {left_bytes} bytes that the weights leave free: "
            f"give {left_bytes // 2} or less."
        )
    if budget is None:
        budget = min(left_bytes // 2, settings.max_num_seqs * pages_per_request * page.page_bytes)
    num_pages = budget // page.page_bytes
    if num_pages < pages_per_request:
        needed_bytes = pages_per_request * page.page_bytes
        fitting = num_pages * settings.block_size
        advice = f"give --max-model-len {fitting} or less" if fitting >= 2 else "free some memory"
        if settings.kv_cache_memory_bytes is not None:
            advice += f" or --kv-cache-memory-bytes {needed_bytes} or more"
        raise ConfigError(
            f"A context of {max_model_len} tokens needs {_gib(needed_bytes)} of key-value memory, but there are "
            f"{_gib(budget)} for it: {advice}."
        )
    return replace(page, num_pages=num_pages)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
