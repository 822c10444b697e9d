"""Published model shapes, for `random:PRESET`: real sizes with seeded random weights, no download.

Owns the numbers, written as the fields of each model's `config.json`; knows no weight and no tokenizer.
"""

from typing import Any

from headway.models.config import DecoderConfig, ModelError, parse_config

PREFIX = "random:"


def parse(model: str | None) -> DecoderConfig | None:
    """The shape that `random:PRESET` names; None for any other model. Raises ModelError for an unknown preset."""
    if model is None or not model.startswith(PREFIX):
        return None
    return preset(model.removeprefix(PREFIX))


def preset(name: str) -> DecoderConfig:
    """The shape called `name`. Raises ModelError, listing all names, when there is none."""
    return parse_config(fields(name))


def fields(name: str) -> dict[str, Any]:
    """The same as the fields of a `config.json`. Raises ModelError likewise."""
    if name.lower() not in _FIELDS:
        raise ModelError(f"There is no preset {name!r}: choose from {', '.join(names())}.")
    return dict(_FIELDS[name.lower()])


def names() -> tuple[str, ...]:
    return tuple(sorted(_FIELDS))


def _fields(architecture: str, hidden: int, intermediate: int, layers: int, heads: tuple[int, int], **rest: Any) -> Any:
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "dtype": "bfloat16",
        **rest,
    }


def _llama3(rope_factor: float, **rest: Any) -> dict[str, Any]:
    """What Llama 3.1 and 3.2 have in common."""
    return {
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        **rest,
    }


def _qwen(vocab: int, positions: int, tied: bool, **rest: Any) -> dict[str, Any]:
    """What Qwen 2.5 and Qwen 3 have in common."""
    return {
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        **rest,
    }


_SMOLLM2 = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_MISTRAL = {  # version 0.1, the one with a sliding window
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_FIELDS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _fields("Llama", 576, 1536, 30, (9, 3), **_SMOLLM2),
    "llama-3.2-1b": _fields("Llama", 2048, 8192, 16, (32, 8), **_llama3(32.0, head_dim=64, tie_word_embeddings=True)),
    "llama-3.2-3b": _fields("Llama", 3072, 8192, 28, (24, 8), **_llama3(32.0, head_dim=128, tie_word_embeddings=True)),
    "llama-3.1-8b": _fields("Llama", 4096, 14336, 32, (32, 8), **_llama3(8.0)),
    "mistral-7b": _fields("Mistral", 4096, 14336, 32, (32, 8), **_MISTRAL),
    "qwen2.5-0.5b": _fields("Qwen2", 896, 4864, 24, (14, 2), **_qwen(151936, 32768, tied=True)),
    "qwen2.5-1.5b": _fields("Qwen2", 1536, 8960, 28, (12, 2), **_qwen(151936, 32768, tied=True)),
    "qwen2.5-7b": _fields("Qwen2", 3584, 18944, 28, (28, 4), **_qwen(152064, 32768, tied=False)),
    "qwen3-0.6b": _fields("Qwen3", 1024, 3072, 28, (16, 8), **_qwen(151936, 40960, tied=True, head_dim=128)),
    "qwen3-1.7b": _fields("Qwen3", 2048, 6144, 28, (16, 8), **_qwen(151936, 40960, tied=True, head_dim=128)),
}
