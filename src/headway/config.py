"""Every setting of an engine and its door: frozen records, made once, never changed later.

The same names are the flags of `headway serve` (dashes for underscores), the keys of a `--config` file and the
keyword arguments of `headway.LLM`. Imports no torch, so that the door and the command stay light.
"""

import types
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A setting that cannot be: one sentence that says what to do."""


def setting(default: Any, group: str, words: str, *, secret: bool = False) -> Any:
    """A field with its default, its place in `--help` and its words there."""
    return field(default=default, repr=not secret, metadata={"group": group, "help": words})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What an engine is. None means: measured or derived at start, and printed."""

    model: str | None = setting(
        None, "model", "nothing for the embedded model, a Hugging Face folder, a hub id, or random:PRESET"
    )
    device: str = setting("cpu", "model", "cpu or cuda")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "model", "of weights and activations")
    seed: int = setting(0, "model", "of the weights of random:PRESET")
    max_model_len: int | None = setting(
        None, "memory", "tokens of a prompt and its answer; default: what the model was made for"
    )
    max_num_seqs: int = setting(64, "memory", "requests that may hold pages at once")
    block_size: int = setting(16, "memory", "tokens per page")
    kv_cache_memory_bytes: int | None = setting(None, "memory", "for keys and values; default: what is needed and free")
    enable_prefix_caching: bool = setting(True, "memory", "share the pages of equal beginnings of prompts")
    max_tile_ms: float = setting(
        10.0, "scheduling", "no piece of work runs longer: the bound on how long an urgent request waits"
    )
    num_threads: int | None = setting(
        None, "scheduling", "compute threads; default: the cores that this process may use"
    )
    max_num_queued_reqs: int = setting(1024, "scheduling", "requests that may wait; more are refused")
    max_num_parked: int = setting(8, "scheduling", "prefills that may be suspended at once")
    max_parked_s: float = setting(30.0, "scheduling", "a suspended prefill is resumed after this, come what may")

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

    host: str = setting("127.0.0.1", "server", "address to listen on; 0.0.0.0 for all")
    port: int = setting(8000, "server", "0 takes any free one")
    served_model_name: tuple[str, ...] = setting((), "server", "names to answer to; default: the model's own")
    api_key: tuple[str, ...] = setting(
        (), "server", "keys of which a caller must show one; also from HEADWAY_API_KEY", secret=True
    )
    chat_template: str | None = setting(None, "server", "a file, or the template itself; default: the model's own")
    shutdown_timeout: float = setting(30.0, "server", "seconds that open requests get after Ctrl-C")
    sse_keep_alive_interval: float = setting(15.0, "server", "seconds of silence before a stream says so; 0: never")
    max_body_bytes: int = setting(8 * 1024 * 1024, "server", "of one request")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "server", "how much is logged")

    def __post_init__(self) -> None:
        _at_least(self, shutdown_timeout=0, sse_keep_alive_interval=0, max_body_bytes=1024)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port} is out of range: give 0 to 65535.")
        if not all(key.strip() and key.isprintable() and key.isascii() for key in self.api_key):
            raise ConfigError("--api-key must be printable ASCII and not empty: give such a key, or none.")
        if not all(self.served_model_name):
            raise ConfigError("--served-model-name is empty: give a name, or leave the flag out.")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError(f"--log-level {self.log_level} is unknown: choose debug, info, warning or error.")


Settings = TypeVar("Settings", EngineSettings, DoorSettings)


def engine_settings(**options: Any) -> EngineSettings:
    """EngineSettings from loose options, as `headway.LLM` takes them. Unknown names are a ConfigError."""
    known = {f.name for f in fields(EngineSettings)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ConfigError(f"Unknown option {unknown[0]!r}: choose from {', '.join(sorted(known))}.")
    return EngineSettings(**options)


def take(kind: type[Settings], options: Mapping[str, Any]) -> Settings:
    """A `kind` from those of the options that it knows."""
    return kind(**{f.name: options[f.name] for f in fields(kind) if f.name in options})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def value_type(kind: type, name: str) -> Any:
    """The type of a field, without its None."""
    hint = get_type_hints(kind)[name]
    if get_origin(hint) in (Union, types.UnionType):
        return next(arm for arm in get_args(hint) if arm is not type(None))
    return hint


def all_settings(*kinds: type) -> dict[str, tuple[type, Field[Any]]]:
    """Name -> the record it belongs to, and its field."""
    return {f.name: (kind, f) for kind in kinds for f in fields(kind)}


def read_config_file(path: str, *kinds: type) -> dict[str, Any]:
    """The settings in a YAML file; its keys are the long flags. Raises ConfigError that names the key."""
    import yaml  # a tenth of the command's start, and rarely needed

    try:
        with open(path, encoding="utf8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())[:200]}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold lines such as `max-model-len: 2048`.")
    known = all_settings(*kinds)
    options = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"--config {path} has the key {str(key)!r}, which is no setting: see --help.")
        options[name] = _fit(value, value_type(known[name][0], name), f"{key} in {path}")
    return options


def _fit(value: Any, wanted: Any, where: str) -> Any:
    """A YAML value as the type that a setting wants."""
    if get_origin(wanted) is tuple:
        values = value if isinstance(value, list) else [value]
        return tuple(_fit(one, str, where) for one in values)
    if get_origin(wanted) is Literal:
        choices = get_args(wanted)
        if value not in choices:
            raise ConfigError(f"{where} is {value!r}: choose from {', '.join(choices)}.")
        return value
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is str and type(value) in (int, float):
        return str(value)
    if type(value) is not wanted:
        raise ConfigError(f"{where} is {value!r}: give a {_NAMES[wanted]}.")
    return value


_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def _at_least(settings: object, **bounds: int) -> None:
    for name, least in bounds.items():
        if not getattr(settings, name) >= least:
            raise ConfigError(f"{flag(name)} {getattr(settings, name)} is too small: give at least {least}.")
