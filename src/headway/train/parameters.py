"""A decoder's weights as named tensors, and a fresh decoder to start training from.

Knows no optimizer and no file. Names follow the fields of `Decoder` ("layers.0.qkv.weight"), not Hugging Face.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from headway.models.config import DecoderConfig
from headway.models.decoder import Decoder, Layer, Linear
from headway.models.layers import rope_table

_LINEARS = ("qkv", "o", "gate_up", "down")
_NORMS = ("input_norm", "q_norm", "k_norm", "post_norm")


def initial_decoder(config: DecoderConfig, seed: int) -> Decoder:
    """Seeded float32 weights that ask for gradients. What a layer adds starts at zero, so depth costs no stability."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * scale

    def linear(inputs: int, outputs: int, bias: bool, scale: float) -> Linear:
        weight = normal(outputs, inputs, scale / math.sqrt(inputs))
        return Linear(weight, torch.zeros(outputs) if bias else None)

    hidden, middle = config.hidden_size, config.intermediate_size
    head_norm = config.head_size if config.qk_norm else None
    layers = tuple(
        Layer(
            input_norm=torch.ones(hidden),
            qkv=linear(hidden, config.q_size + 2 * config.kv_size, config.qkv_bias, 1.0),
            q_norm=None if head_norm is None else torch.ones(head_norm),
            k_norm=None if head_norm is None else torch.ones(head_norm),
            o=linear(config.q_size, hidden, config.o_bias, 0.0),
            post_norm=torch.ones(hidden),
            gate_up=linear(hidden, 2 * middle, config.mlp_bias, 1.0),
            down=linear(middle, hidden, config.mlp_bias, 0.0),
        )
        for _ in range(config.num_layers)
    )
    embedding = normal(config.vocab_size, hidden, 0.02)
    head = embedding if config.tie_embeddings else normal(config.vocab_size, hidden, 0.02)
    rope = rope_table(config, config.max_positions)
    decoder = Decoder(config, embedding, layers, torch.ones(hidden), Linear(head), rope)
    for tensor in named_tensors(decoder).values():
        tensor.requires_grad_()
    return decoder


def named_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """Every weight once, by name. Tied embeddings have no `head.weight`."""
    named = {"embedding.weight": decoder.embedding_VE, "final_norm.weight": decoder.final_norm}
    for number, layer in enumerate(decoder.layers):
        for name in _NORMS:
            norm: Tensor | None = getattr(layer, name)
            if norm is not None:
                named[f"layers.{number}.{name}.weight"] = norm
        for name in _LINEARS:
            named |= _named_linear(f"layers.{number}.{name}", getattr(layer, name))
    if not decoder.config.tie_embeddings:
        named |= _named_linear("head", decoder.head)
    return named


def _named_linear(name: str, linear: Linear) -> dict[str, Tensor]:
    bias = {} if linear.bias is None else {f"{name}.bias": linear.bias}
    return {f"{name}.weight": linear.weight, **bias}


def copy_into(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Overwrite parameters in place. Raises ValueError when names or shapes differ."""
    for name in sorted(parameters.keys() ^ values.keys()):
        raise ValueError(f"{name!r} is on one side only: the weights were saved from a model of another shape.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != values[name].shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(values[name].shape)} in the file and {tuple(parameter.shape)} "
                    "in the model: the weights were saved from a model of another shape."
                )
            parameter.copy_(values[name])
