"""Every setting of an engine and its door: one frozen record, made once, never changed later.

The same names are the flags of `headway serve` (dashes for underscores), the keys of a `--config` file and the
keyword arguments of `headway.LLM`. Imports no torch, so that the door and the command stay light.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal


class ConfigError(ValueError):
    """A setting that cannot be: one sentence that says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What an engine is. Zero or None means: measured or derived at start, and printed."""

    model: str | None = None  # None: the embedded model; a folder; a hub id; random:PRESET
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    max_model_len: int | None = None  # tokens; default: what the model was made for
    max_num_seqs: int = 64  # requests that may hold pages at once
    block_size: int = 16  # tokens per page
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    max_tile_ms: float = 10.0  # no tile may run longer: the bound B on how long an urgent request waits
    num_threads: int | None = None  # compute threads; default: the cores this process may use
    max_num_queued_reqs: int = 1024
    max_num_parked: int = 8  # suspended prefills
    max_parked_s: float = 30.0  # a suspended prefill is resumed after this, come what may

    def __post_init__(self) -> None:
        _at_least(self, max_num_seqs=1, block_size=1, max_num_queued_reqs=1, max_num_parked=0)
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"--dtype {self.dtype} is not served: choose auto, float32 or bfloat16.")
        if self.device != "cpu" and self.device.split(":")[0] != "cuda":
            raise ConfigError(f"--device {self.device} is not served: choose cpu or cuda.")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"--max-model-len {self.max_model_len} is too short: give at least 2.")
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"--num-threads {self.num_threads} is too few: give at least 1.")
        if not 0.1 <= self.max_tile_ms <= 10_000:
            raise ConfigError(f"--max-tile-ms {self.max_tile_ms} is out of range: give 0.1 to 10000.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorSettings:
    """What the door is."""

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()  # default: the model's own name
    api_key: tuple[str, ...] = field(default=(), repr=False)
    chat_template: str | None = None  # a file, or the template itself
    shutdown_timeout: float = 30.0  # seconds that open requests get after Ctrl-C
    max_body_bytes: int = 8 * 1024 * 1024
    log_level: str = "info"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port} is out of range: give 0 to 65535.")


def _at_least(settings: object, **bounds: int) -> None:
    for name, least in bounds.items():
        if getattr(settings, name) < least:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} {getattr(settings, name)} is too small: give at least {least}.")


def engine_settings(**options: Any) -> EngineSettings:
    """EngineSettings from loose options, as `headway.LLM` takes them. Unknown names are a ConfigError."""
    known = {f.name for f in fields(EngineSettings)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ConfigError(f"Unknown option {unknown[0]!r}: choose from {', '.join(sorted(known))}.")
    return EngineSettings(**options)
