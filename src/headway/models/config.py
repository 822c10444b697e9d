"""The shape of a decoder, read from a Hugging Face `config.json`.

Owns which architectures are supported and every name that Hugging Face gives a field; knows no tensor.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
    attention_factor: float | None = None  # yarn
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
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * (attention + mlp) + embeddings

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        return self.num_layers * 2 * self.kv_size * element_bytes


# architecture -> (bias on q, k, v always?, q/k norm?)
_FAMILIES = {
    "LlamaForCausalLM": (False, False),
    "MistralForCausalLM": (False, False),
    "Qwen2ForCausalLM": (True, False),
    "Qwen3ForCausalLM": (False, True),
}


def read_config(folder: Path) -> DecoderConfig:
    """Read `folder/config.json`. Raises ModelError when it is missing, broken or of an unsupported model."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} holds no config.json: give the folder of a Hugging Face model.")
    try:
        fields = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}): download the model again.") from error
    return parse_config(fields)


def parse_config(fields: dict[str, Any]) -> DecoderConfig:
    """Turn the fields of a `config.json` into a DecoderConfig. Raises ModelError for what is not supported."""
    architecture = (fields.get("architectures") or ["(none named)"])[0]
    if architecture not in _FAMILIES:
        supported = ", ".join(name.removesuffix("ForCausalLM") for name in _FAMILIES)
        raise ModelError(f"{architecture} is not supported: Headway serves {supported} models.")
    if fields.get("quantization_config"):
        raise ModelError("The weights are quantized: give the folder of the original float32, float16 or bfloat16 model.")
    if fields.get("hidden_act", "silu") != "silu":
        raise ModelError(f"The activation {fields['hidden_act']!r} is not supported: only silu is.")
    try:
        return _from_fields(architecture, fields)
    except KeyError as error:
        raise ModelError(f"config.json lacks the field {error}: download the model again.") from error


def _from_fields(architecture: str, fields: dict[str, Any]) -> DecoderConfig:
    qkv_bias, qk_norm = _FAMILIES[architecture]
    attention_bias = bool(fields.get("attention_bias", False))
    num_heads = fields["num_attention_heads"]
    num_layers = fields["num_hidden_layers"]
    # transformers 5 keeps the rotary settings in one dict, earlier versions in two fields
    rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    theta = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    eos = fields.get("eos_token_id")
    return DecoderConfig(
        architecture=architecture,
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.get("num_key_value_heads") or num_heads,
        head_size=fields.get("head_dim") or fields["hidden_size"] // num_heads,
        intermediate_size=fields["intermediate_size"],
        max_positions=fields["max_position_embeddings"],
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope_theta=float(theta),
        rope_scaling=_rope_scaling(rope, fields["max_position_embeddings"]),
        windows=_windows(architecture, fields, num_layers),
        qkv_bias=qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=bool(fields.get("mlp_bias", False)),
        qk_norm=qk_norm,
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        dtype=str(fields.get("dtype") or fields.get("torch_dtype") or "float32").removeprefix("torch."),
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        bos_id=fields.get("bos_token_id"),
    )


def _rope_scaling(rope: dict[str, Any], max_positions: int) -> RopeScaling:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ModelError(f"The rope scaling {kind!r} is not supported: default, linear, llama3 and yarn are.")
    original = int(rope.get("original_max_position_embeddings") or max_positions)
    if kind == "yarn" and "attention_factor" not in rope and "mscale" in rope:
        raise ModelError("yarn with mscale is not supported: remove mscale or set attention_factor in config.json.")
    return RopeScaling(
        kind=kind,
        factor=float(rope.get("factor") or (max_positions / original)),
        original_max_positions=original,
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        attention_factor=rope.get("attention_factor"),
        truncate=bool(rope.get("truncate", True)),
    )


def _windows(architecture: str, fields: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    window = fields.get("sliding_window")
    kinds = fields.get("layer_types")
    if architecture.startswith("Qwen"):
        if not fields.get("use_sliding_window", False):
            return (None,) * num_layers
        if not kinds:
            first = fields.get("max_window_layers", num_layers)
            return tuple(window if layer >= first else None for layer in range(num_layers))
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return (window if architecture == "MistralForCausalLM" else None,) * num_layers


def yarn_attention_factor(scaling: RopeScaling) -> float:
    """The factor on cos and sin (Peng et al., YaRN, arXiv 2309.00071, section 3.4)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1.0 if scaling.factor <= 1 else 0.1 * math.log(scaling.factor) + 1.0
