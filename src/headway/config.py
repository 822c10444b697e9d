"""Every setting of an engine and its door: frozen records, made once, never changed later.

The same names are the flags of `headway serve` (dashes for underscores), the keys of a `--config` file and the
keyword arguments of `headway.LLM`. Imports no torch, so that the door and the command stay light.
"""

import difflib
import importlib.util
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

MAX_CLASSES = 32  # each is a label of many series
UNNAMED_CLASSES = ("none", "custom")  # under which /metrics counts requests that name no class
CPU_TILE_S, GPU_TILE_S = 0.010, 0.001
OPENTELEMETRY = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")  # what headway[otel] brings
_CLASS_NAME = re.compile(r"[\w.-]{1,32}", re.ASCII)


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
    quantization: Literal["none", "int8"] = setting(
        "none", "model", "int8: matrices as integers with a scale for each output, made at load; rows likewise"
    )
    seed: int = setting(0, "model", "of the weights of random:PRESET")
    max_model_len: int | None = setting(
        None, "memory", "tokens of a prompt and its answer; default: what the model was made for"
    )
    max_num_seqs: int = setting(64, "memory", "requests that may hold pages at once")
    block_size: int = setting(16, "memory", "tokens per page")
    kv_cache_memory_bytes: int | None = setting(None, "memory", "for keys and values; default: what is needed and free")
    enable_prefix_caching: bool = setting(True, "memory", "share the pages of equal beginnings of prompts")
    max_tile_ms: float | None = setting(
        None,
        "scheduling",
        "no piece of work is planned to run longer: the bound on how long an urgent request waits; default: 10 on a "
        "CPU, 1 on a GPU",
    )
    num_threads: int | None = setting(
        None, "scheduling", "compute threads; default: the cores that this process may use"
    )
    cost_cache: bool = setting(
        True, "scheduling", "keep what steps cost for later starts, in HEADWAY_CACHE_DIR or ~/.cache/headway"
    )
    order: Literal["slack", "deadline", "fcfs", "shortest"] = setting(
        "slack", "scheduling", "who goes first; all but slack are there to compare with"
    )
    preempt: Literal["operator", "layer", "chunk", "none"] = setting(
        "operator", "scheduling", "where running work may be suspended; all but operator are there to compare with"
    )
    chunk_tokens: int = setting(512, "scheduling", "tokens of a step with --preempt chunk, decoding included")
    pack: bool = setting(True, "scheduling", "read several short prompts in one step")
    lanes: Literal["turns", "mixed", "split", "auto"] = setting(
        "mixed",
        "scheduling",
        "how prompts and tokens share the device: in turns, tokens riding along with as much of the prompts as leaves "
        "them in time (mixed), side by side on half of the cores each (split), or as is predicted to be in time (auto)",
    )
    refuse_unattainable: bool = setting(
        True, "scheduling", "refuse at once (429) what is predicted to miss its TTFT or TPOT target; else serve it late"
    )
    max_num_queued_reqs: int = setting(
        1024,
        "scheduling",
        "requests that may wait, and of constrained ones as many again while that is built; more are refused",
    )
    max_num_parked: int = setting(8, "scheduling", "prefills that may be suspended at once")
    max_parked_s: float = setting(30.0, "scheduling", "a suspended prefill is resumed after this, come what may")

    def __post_init__(self) -> None:
        _at_least(
            self, max_num_seqs=1, block_size=1, max_num_queued_reqs=1, max_num_parked=0, max_parked_s=0, chunk_tokens=1
        )
        for name in ("order", "preempt", "lanes"):
            choices = get_args(value_type(EngineSettings, name))
            if getattr(self, name) not in choices:
                raise ConfigError(f"--{name} {getattr(self, name)} is unknown: choose {', '.join(choices)}.")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"--dtype {self.dtype} is not served: choose auto, float32 or bfloat16.")
        if self.quantization not in ("none", "int8"):
            raise ConfigError(f"--quantization {self.quantization} is not served: choose none or int8.")
        if self.quantization == "int8" and self.dtype == "float32":
            raise ConfigError("--quantization int8 is made from bfloat16: leave --dtype float32 out.")
        if self.lanes in ("split", "auto") and self.preempt in ("chunk", "none"):
            raise ConfigError(
                f"--lanes {self.lanes} needs steps that can be suspended: leave --preempt {self.preempt} out."
            )
        if self.device != "cpu" and self.device.split(":")[0] != "cuda":
            raise ConfigError(f"--device {self.device} is not served: choose cpu or cuda.")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"--max-model-len {self.max_model_len} is too short: give at least 2.")
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"--num-threads {self.num_threads} is too few: give at least 1.")
        if self.max_tile_ms is not None and not 0.1 <= self.max_tile_ms <= 10_000:
            raise ConfigError(f"--max-tile-ms {self.max_tile_ms} is out of range: give 0.1 to 10000.")

    @property
    def tile_s(self) -> float:
        """The bound on a tile, B, of this device unless told otherwise."""
        if self.max_tile_ms is not None:
            return self.max_tile_ms / 1e3
        return CPU_TILE_S if self.device == "cpu" else GPU_TILE_S


@dataclass(frozen=True, slots=True)
class SloClass:
    """A name under which requests ask for targets, in milliseconds; without any target it is best effort."""

    name: str
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    total_ms: float | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        if not _CLASS_NAME.fullmatch(self.name):
            raise ConfigError(
                f"--slo-classes has the name {self.name[:40]!r}: give 1 to 32 letters, digits, dots, dashes or "
                "underscores."
            )
        if self.name in UNNAMED_CLASSES:
            raise ConfigError(f"--slo-classes may not name {self.name}, which counts requests without a class.")
        for target in ("ttft", "tpot", "total"):
            value = getattr(self, f"{target}_ms")
            if value is not None and not 0 < value <= 1e9:
                raise ConfigError(
                    f"--slo-classes gives {self.name} the {target} {value:g}: give a positive number of milliseconds."
                )
        if not -(2**63) <= self.priority < 2**63:
            raise ConfigError(f"--slo-classes gives {self.name} a priority of more than 64 bits: give a smaller one.")

    def __str__(self) -> str:
        """As the flag has it."""
        said = {"ttft": self.ttft_ms, "tpot": self.tpot_ms, "total": self.total_ms, "priority": self.priority}
        terms = [f"{key}:{value:.15g}" for key, value in said.items() if value]
        return f"{self.name}={','.join(terms)}" if terms else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorSettings:
    """What the door is."""

    host: str = setting("127.0.0.1", "server", "address to listen on; 0.0.0.0 for all")
    port: int = setting(8000, "server", "0 takes any free one")
    served_model_name: tuple[str, ...] = setting((), "server", "names to answer to; default: the model's own")
    api_key: tuple[str, ...] = setting(
        (), "server", "keys of which a caller must show one; also from HEADWAY_API_KEY", secret=True
    )
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "server",
        "names under which callers may know a server that listens on this machine alone and asks for no key",
    )
    pooling: Literal["last", "mean"] = setting("last", "server", "how embeddings are made of hidden states")
    chat_template: str | None = setting(None, "server", "a file, or the template itself; default: the model's own")
    slo_classes: tuple[SloClass, ...] = setting(
        (), "server", "names that requests may ask for, such as chat=ttft:250,tpot:100,priority:-1 batch; in ms"
    )
    shutdown_timeout: float = setting(30.0, "server", "seconds that open requests get after Ctrl-C")
    sse_keep_alive_interval: float = setting(15.0, "server", "seconds of silence before a stream says so; 0: never")
    max_body_bytes: int = setting(8 * 1024 * 1024, "server", "of one request")
    ssl_certfile: str | None = setting(None, "server", "PEM certificate, with those that vouch for it: serves HTTPS")
    ssl_keyfile: str | None = setting(None, "server", "PEM key of the certificate; default: in the same file")
    ssl_ca_certs: str | None = setting(None, "server", "PEM certificates by which callers' own are checked")
    ssl_cert_reqs: int = setting(0, "server", "callers' certificates: 0 not asked for, 1 checked if shown, 2 required")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "server", "how much is logged")
    log_format: Literal["text", "json"] = setting("text", "server", "lines for people, or a JSON object a line")
    otlp_traces_endpoint: str | None = setting(
        None, "server", "a collector of OpenTelemetry spans, such as http://localhost:4318/v1/traces"
    )
    access_log: bool = setting(False, "server", "a line for every call: path, status, time, bytes, request id")

    def __post_init__(self) -> None:
        _at_least(self, shutdown_timeout=0, sse_keep_alive_interval=0, max_body_bytes=1024)
        if self.log_format not in ("text", "json"):
            raise ConfigError(f"--log-format {self.log_format} is unknown: choose text or json.")
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise ConfigError(f"--ssl-cert-reqs {self.ssl_cert_reqs} is unknown: give 0, 1 or 2.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port} is out of range: give 0 to 65535.")
        if not all(key.strip() and key.isprintable() and key.isascii() for key in self.api_key):
            raise ConfigError("--api-key must be printable ASCII and not empty: give such a key, or none.")
        if not all(self.served_model_name):
            raise ConfigError("--served-model-name is empty: give a name, or leave the flag out.")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError(f"--log-level {self.log_level} is unknown: choose debug, info, warning or error.")
        if self.otlp_traces_endpoint and not self.otlp_traces_endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"--otlp-traces-endpoint {self.otlp_traces_endpoint} is no address: give http://HOST:4318/v1/traces."
            )
        if self.otlp_traces_endpoint and not all(map(_is_installed, OPENTELEMETRY)):
            raise ConfigError("--otlp-traces-endpoint needs OpenTelemetry: install headway[otel].")
        if self.pooling not in ("last", "mean"):
            raise ConfigError(f"--pooling {self.pooling} is unknown: choose last or mean.")
        names = [one.name for one in self.slo_classes]
        if len(names) > MAX_CLASSES:
            raise ConfigError(f"--slo-classes has {len(names)} names: give at most {MAX_CLASSES}.")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"--slo-classes has {twice} twice: give each name once.")


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
    known = {f.name: options[f.name] for f in fields(kind) if f.name in options}
    if "slo_classes" in known:
        known["slo_classes"] = tuple(_class_from_text(o) if isinstance(o, str) else o for o in known["slo_classes"])
    return kind(**known)


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
            raise ConfigError(f"--config {path} has the key {str(key)!r}, which is no setting: {_meant(name, known)}")
        options[name] = _fit(value, value_type(known[name][0], name), f"{key} in {path}")
    return options


def _meant(name: str, known: Iterable[str]) -> str:
    """What somebody who wrote this may have had in mind."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0].replace('_', '-')!r}?" if near else "see --help."


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def _fit(value: Any, wanted: Any, where: str) -> Any:
    """A YAML value as the type that a setting wants."""
    if wanted == tuple[SloClass, ...] and isinstance(value, dict):
        return tuple(_class_from_mapping(str(name), terms, where) for name, terms in value.items())
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


# Classes, in the two forms that they may be written in

_TERMS: dict[str, type] = {"ttft": float, "tpot": float, "total": float, "priority": int}  # of a class, on the command


def _class_from_text(text: str) -> SloClass:
    """`chat=ttft:250,tpot:100`, or a name alone."""
    name, _, rest = text.partition("=")
    terms: dict[str, Any] = {}
    for term in rest.split(",") if rest else ():
        key, _, value = term.partition(":")
        if key not in _TERMS or key in terms:
            raise ConfigError(
                f"--slo-classes has {term[:40]!r} in {text[:80]!r}: give each of {', '.join(_TERMS)} at most once, "
                "as in chat=ttft:250,tpot:100."
            )
        try:
            terms[key] = _TERMS[key](value)
        except ValueError as error:
            kind = _NAMES[_TERMS[key]]
            raise ConfigError(f"--slo-classes has {term[:40]!r} in {text[:80]!r}: give a {kind}.") from error
    return SloClass(name, **{key if key == "priority" else f"{key}_ms": value for key, value in terms.items()})


def _class_from_mapping(name: str, terms: Any, where: str) -> SloClass:
    """`{ttft-ms: 250, tpot-ms: 100}`, or nothing."""
    if terms is not None and not isinstance(terms, dict):
        raise ConfigError(f"{where}: {name} is {terms!r}: give targets such as {{ttft-ms: 250}}, or {{}} for none.")
    known = {f.name: f for f in fields(SloClass) if f.name != "name"}
    fitted = {}
    for key, value in (terms or {}).items():
        field_name = str(key).replace("-", "_")
        if field_name not in known:
            choices = ", ".join(one.replace("_", "-") for one in known)
            raise ConfigError(f"{where}: {name} has the key {str(key)!r}: choose from {choices}.")
        fitted[field_name] = _fit(value, value_type(SloClass, field_name), f"{key} of {name} of {where}")
    return SloClass(name, **fitted)


def _at_least(settings: object, **bounds: int) -> None:
    for name, least in bounds.items():
        if not getattr(settings, name) >= least:
            raise ConfigError(f"{flag(name)} {getattr(settings, name)} is too small: give at least {least}.")
