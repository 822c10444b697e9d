"""Tiny models of every supported family, with random weights: transformers' own, and the folders they save.

`family` runs a test once per family. `tiny(family, **overrides)` is the transformers model, `tiny_folder(family,
**overrides)` where it was saved. Their weights are large enough, and their biases and norms random enough, that no
part of the model can be left out unnoticed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

_SHAPE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {  # of the eight frequencies of a head some are kept, some blended, some divided
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama2": (LlamaConfig, {"num_key_value_heads": 4}),
    "llama3-scaled": (LlamaConfig, {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "llama-linear": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-biased": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": 8}),
    "qwen2": (
        Qwen2Config,
        {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "qwen2-windows": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen2-yarn": (Qwen2Config, {"rope_parameters": _YARN}),
    "qwen3": (Qwen3Config, {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-biased": (Qwen3Config, {"head_dim": 16, "attention_bias": True}),
}

Tiny = Callable[..., PreTrainedModel]
TinyFolder = Callable[..., Path]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    made: dict[str, PreTrainedModel] = {}

    def tiny(family: str, **overrides: Any) -> PreTrainedModel:
        key = f"{family} {sorted(overrides.items())}"
        if key not in made:
            made[key] = _make(family, overrides)
        return made[key]

    return tiny


@pytest.fixture(scope="session")
def tiny_folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    """Saved once; not to be changed. `shard` is transformers' max_shard_size."""
    saved: dict[str, Path] = {}

    def tiny_folder(family: str, shard: str = "1GB", **overrides: Any) -> Path:
        key = f"{family} {shard} {sorted(overrides.items())}"
        if key not in saved:
            saved[key] = tmp_path_factory.mktemp(family)
            tiny(family, **overrides).save_pretrained(saved[key], max_shard_size=shard)
        return saved[key]

    return tiny_folder


def _make(family: str, overrides: dict[str, Any]) -> PreTrainedModel:
    config_class, fields = FAMILIES[family]
    config = config_class(**_SHAPE | fields | overrides)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(len(family))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, std = (1.0, 0.2) if "norm" in name else (0.0, 0.15)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)
    return model


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors are computed fastest by one thread."""
    torch.set_num_threads(1)
