"""A trained decoder as a Hugging Face folder that any engine loads. Knows no training.

The fused matrices are split again and the names are Hugging Face's, so that `transformers` and this project's own
loader read the same file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from headway.models.config import DecoderConfig
from headway.models.decoder import Decoder, Linear
from headway.train.vocabulary import id_of

# A base model has no roles: the messages are one text.
_BASE_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def save_folder(
    folder: Path,
    decoder: Decoder,
    tokenizer: Tokenizer,
    *,
    end_of_text: str,
    pad: str | None = None,
    generation: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write config.json, model.safetensors, the tokenizer's files and generation_config.json. Overwrites."""
    folder.mkdir(parents=True, exist_ok=True)
    end_id = id_of(tokenizer, end_of_text)
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors_by_name(decoder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors lets the owner alone read it
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", config_fields(decoder.config, end_id, dtype))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": decoder.config.max_positions,
            "eos_token": end_of_text,
            "pad_token": pad or end_of_text,
            "clean_up_tokenization_spaces": False,
            "chat_template": _BASE_CHAT_TEMPLATE,
        },
    )
    _write_json(folder / "generation_config.json", {"eos_token_id": end_id, **(generation or {})})


def config_fields(config: DecoderConfig, end_id: int, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of `config.json`. Raises ValueError for what this project does not train."""
    mistral = config.architecture == "MistralForCausalLM"
    if config.rope_scaling.kind != "default":
        raise ValueError("A model with rope scaling cannot be saved: train one without.")
    if len(set(config.windows)) > 1 or (any(config.windows) and not mistral):
        raise ValueError("Only Mistral's sliding window, the same in all layers, can be saved: train a model without.")
    return {
        **({"sliding_window": config.windows[0]} if mistral else {}),  # left out, it would mean 4096
        "architectures": [config.architecture],
        "model_type": config.architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": end_id,
    }


def tensors_by_name(decoder: Decoder) -> dict[str, Tensor]:
    """Every weight under the name that Hugging Face gives it; q, k, v and gate, up apart."""
    config = decoder.config
    named = {"model.embed_tokens.weight": decoder.embedding_VE, "model.norm.weight": decoder.final_norm}
    for number, layer in enumerate(decoder.layers):
        at = f"model.layers.{number}"
        named[f"{at}.input_layernorm.weight"] = layer.input_norm
        named[f"{at}.post_attention_layernorm.weight"] = layer.post_norm
        if layer.q_norm is not None and layer.k_norm is not None:
            named[f"{at}.self_attn.q_norm.weight"] = layer.q_norm
            named[f"{at}.self_attn.k_norm.weight"] = layer.k_norm
        heads = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
        named |= _parts(f"{at}.self_attn", layer.qkv, heads)
        named |= _parts(f"{at}.self_attn", layer.o, {"o_proj": config.hidden_size})
        middle = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        named |= _parts(f"{at}.mlp", layer.gate_up, middle)
        named |= _parts(f"{at}.mlp", layer.down, {"down_proj": config.hidden_size})
    if not config.tie_embeddings:
        named["lm_head.weight"] = decoder.head.weight
    return named


def _parts(at: str, linear: Linear, rows: Mapping[str, int]) -> dict[str, Tensor]:
    named = {f"{at}.{name}.weight": part for name, part in _split(linear.weight, rows).items()}
    if linear.bias is not None:
        named |= {f"{at}.{name}.bias": part for name, part in _split(linear.bias, rows).items()}
    return named


def _split(tensor: Tensor, rows: Mapping[str, int]) -> dict[str, Tensor]:
    return dict(zip(rows, torch.split(tensor, list(rows.values())), strict=True))


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
