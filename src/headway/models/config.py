"""The shape of a decoder, read from a Hugging Face `config.json`.

Owns which architectures are supported and every name that Hugging Face gives a field; knows no tensor.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple


class ModelError(ValueError):
    """The model cannot be served as asked. The message is one sentence that says what to do."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched. `kind` is one of default, linear, llama3, yarn."""

    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: on cos and sin
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Everything a pass needs to know of a Llama-shaped decoder. `windows[i]` is layer i's sliding window or None."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    windows: tuple[int | None, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    dtype: str  # of the stored weights: float32, bfloat16 or float16
    eos_ids: tuple[int, ...]
    bos_id: int | None

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_size

    @property
    def num_parameters(self) -> int:
        attention = self.hidden_size * (2 * self.q_size + 2 * self.kv_size)
        mlp = 3 * self.hidden_size * self.intermediate_size
        biases = self.qkv_bias * (self.q_size + 2 * self.kv_size) + self.o_bias * self.hidden_size
        biases += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        norms = 2 * self.hidden_size + self.qk_norm * 2 * self.head_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * (attention + mlp + biases + norms) + self.hidden_size + embeddings


class _Family(NamedTuple):
    """What an architecture is beyond the fields of its config.json."""

    qkv_bias: bool = False  # always, whatever attention_bias says
    reads_biases: bool = False  # attention_bias and mlp_bias mean something
    qk_norm: bool = False
    head_size: int | None = None  # when config.json names none; else hidden_size / heads
    window: int | None = None  # when config.json names none
    window_is_opt_in: bool = False  # by use_sliding_window


_FAMILIES = {
    "LlamaForCausalLM": _Family(reads_biases=True),
    "MistralForCausalLM": _Family(window=4096),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, window=4096, window_is_opt_in=True),
    "Qwen3ForCausalLM": _Family(reads_biases=True, qk_norm=True, head_size=128, window=4096, window_is_opt_in=True),
}


def read_config(folder: Path) -> DecoderConfig:
    """Read `folder/config.json`, and the end-of-sequence ids of generation_config.json where there is one.

    Raises ModelError when a file is missing, broken or of an unsupported model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} holds no config.json: give the folder of a Hugging Face model.")
    config = parse_config(_read_fields(path))
    generation = folder / "generation_config.json"
    if not generation.is_file():
        return config
    try:
        more_ids = _ids(_read_fields(generation).get("eos_token_id"))
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"{generation} cannot be understood ({error}): download the model again.") from error
    return replace(config, eos_ids=tuple(dict.fromkeys((*config.eos_ids, *more_ids))))


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}): download the model again.") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path} is not a JSON object: download the model again.")
    return fields


def parse_config(fields: dict[str, Any]) -> DecoderConfig:
    """Turn the fields of a `config.json` into a DecoderConfig. Raises ModelError for what is not supported."""
    named = fields.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "A model that names no architecture"
    if architecture not in _FAMILIES:
        supported = ", ".join(name.removesuffix("ForCausalLM") for name in _FAMILIES)
        raise ModelError(f"{architecture} is not supported: Headway serves {supported} models.")
    if fields.get("quantization_config"):
        raise ModelError("The weights are quantized: give the original float32, float16 or bfloat16 model.")
    if fields.get("hidden_act", "silu") != "silu":
        raise ModelError(f"The activation {fields['hidden_act']!r} is not supported: only silu is.")
    try:
        config = _from_fields(architecture, fields)
    except ModelError:
        raise
    except KeyError as error:
        raise ModelError(f"config.json lacks the field {error}: download the model again.") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"config.json holds a field of the wrong type ({error}): download the model again.") from error
    _check(config)
    return config


def _from_fields(architecture: str, fields: dict[str, Any]) -> DecoderConfig:
    family = _FAMILIES[architecture]
    num_heads = fields["num_attention_heads"]
    max_positions = fields["max_position_embeddings"]
    attention_bias = family.reads_biases and bool(fields.get("attention_bias"))
    # transformers 5 keeps the rotary settings in one dict, earlier versions in two fields
    rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    if float(rope.get("partial_rotary_factor", fields.get("partial_rotary_factor") or 1)) != 1:
        raise ModelError("A partial_rotary_factor other than 1 is not supported: choose another model.")
    scaling = _rope_scaling(rope, max_positions)
    if scaling.kind == "yarn":  # whose max_position_embeddings may be those before the stretch
        max_positions = max(max_positions, int(scaling.factor * scaling.original_max_positions))
    return DecoderConfig(
        architecture=architecture,
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=fields.get("num_key_value_heads") or num_heads,
        head_size=fields.get("head_dim") or family.head_size or fields["hidden_size"] // num_heads,
        intermediate_size=fields["intermediate_size"],
        max_positions=max_positions,
        norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", fields.get("rope_theta", 10000.0))),
        rope_scaling=scaling,
        windows=_windows(family, fields),
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family.reads_biases and bool(fields.get("mlp_bias")),
        qk_norm=family.qk_norm,
        tie_embeddings=bool(fields.get("tie_word_embeddings")),
        dtype=str(fields.get("dtype") or fields.get("torch_dtype") or "float32").removeprefix("torch."),
        eos_ids=_ids(fields.get("eos_token_id")),
        bos_id=fields.get("bos_token_id"),
    )


def _check(config: DecoderConfig) -> None:
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
    }
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ModelError(f"config.json gives {name} as {size!r}, not as a positive number: download it again.")
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"{config.num_heads} attention heads cannot share {config.num_kv_heads} key-value heads evenly: "
            "correct config.json."
        )
    if config.head_size % 2:
        raise ModelError(f"A head_dim of {config.head_size} cannot be rotated: it must be even; correct config.json.")
    if any(window is not None and (type(window) is not int or window < 1) for window in config.windows):
        raise ModelError(
            "config.json gives a sliding_window that is not a positive number: correct it, or make it null."
        )


def _ids(value: Any) -> tuple[int, ...]:
    """One id, a list of ids, or none, as Hugging Face writes them."""
    return tuple(int(token) for token in value) if isinstance(value, list) else () if value is None else (int(value),)


def _rope_scaling(rope: dict[str, Any], max_positions: int) -> RopeScaling:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ModelError(f"The rope scaling {kind!r} is not supported: default, linear, llama3 and yarn are.")
    if kind in ("linear", "llama3"):
        _require(rope, kind, "factor")
    if kind == "llama3":
        _require(rope, kind, "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    original = int(rope.get("original_max_position_embeddings") or max_positions)
    factor = float(rope.get("factor") or max_positions / original)
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_max_positions=original,
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        attention_factor=_yarn_attention_factor(rope, factor) if kind == "yarn" else 1.0,
        truncate=bool(rope.get("truncate", True)),
    )


def _require(rope: dict[str, Any], kind: str, *names: str) -> None:
    for name in names:
        if rope.get(name) is None:
            raise KeyError(f"{name} of the {kind} rope scaling")


def _yarn_attention_factor(rope: dict[str, Any], factor: float) -> float:
    """The factor on cos and sin (Peng et al., YaRN, arXiv 2309.00071, section 3.4), and DeepSeek's way to set it."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def grown(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return grown(float(rope["mscale"])) / grown(float(rope["mscale_all_dim"]))
    return grown(1.0)


def _windows(family: _Family, fields: dict[str, Any]) -> tuple[int | None, ...]:
    """Layer by layer: everywhere, from one layer on, or where layer_types says."""
    num_layers: int = fields["num_hidden_layers"]
    window: int | None = fields.get("sliding_window", family.window)
    if family.window is None or (family.window_is_opt_in and not fields.get("use_sliding_window")):
        return (None,) * num_layers
    kinds: list[str] | None = fields.get("layer_types")
    if kinds is None:
        first = fields.get("max_window_layers", 28) if family.window_is_opt_in else 0
        kinds = ["full_attention" if layer < first else "sliding_attention" for layer in range(num_layers)]
    if len(kinds) != num_layers or not {"full_attention", "sliding_attention"}.issuperset(kinds):
        raise ModelError(
            "layer_types must say full_attention or sliding_attention for every layer: correct config.json."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
