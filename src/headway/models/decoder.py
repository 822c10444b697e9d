"""A Llama-shaped decoder, one plain function per operator. Knows no page, no request, no scheduler.

`stages/language.py` runs these over tiles of rows; `forward` strings them together over whole sequences, which is
what training uses. Shape legend: B sequences, T positions, N rows (tokens, flattened), H query heads,
K key-value heads, D head size, E hidden size, I intermediate size, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.models.config import DecoderConfig
from headway.models.layers import rms_norm, rotate, silu_mul


class Linear(NamedTuple):
    """y = x @ weight.T + bias, weight of shape (out, in)."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @property
    def size(self) -> tuple[int, int]:
        """(in, out)"""
        return self.weight.shape[1], self.weight.shape[0]


class Layer(NamedTuple):
    """q, k and v stand in one matrix in that order; gate and up in another."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder(NamedTuple):
    """All weights of one model. With tied embeddings `head.weight` is the embedding itself."""

    config: DecoderConfig
    embedding_VE: Tensor
    layers: tuple[Layer, ...]
    final_norm: Tensor
    head: Linear
    rope: Tensor  # layers.rope_table

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding_VE.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding_VE.device


def split_qkv(config: DecoderConfig, qkv_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, H·D + 2·K·D) -> q (N, H, D), k (N, K, D), v (N, K, D), all views."""
    q, k, v = qkv_N.split((config.q_size, config.kv_size, config.kv_size), dim=-1)
    n = qkv_N.shape[0]
    return (
        q.view(n, config.num_heads, config.head_size),
        k.view(n, config.num_kv_heads, config.head_size),
        v.view(n, config.num_kv_heads, config.head_size),
    )


def position_qk(
    config: DecoderConfig, layer: Layer, q_NHD: Tensor, k_NKD: Tensor, cos_ND: Tensor, sin_ND: Tensor
) -> tuple[Tensor, Tensor]:
    """Norm q and k where the model has it, then rotate them. Returns float32."""
    if layer.q_norm is not None and layer.k_norm is not None:
        q_NHD = rms_norm(q_NHD, layer.q_norm, config.norm_eps)
        k_NKD = rms_norm(k_NKD, layer.k_norm, config.norm_eps)
    return rotate(q_NHD, cos_ND, sin_ND), rotate(k_NKD, cos_ND, sin_ND)


def forward(model: Decoder, tokens_BT: Tensor) -> Tensor:
    """Final hidden states (B, T, E) after the last norm, of whole sequences that start at position 0.

    No cache, no tiles, differentiable: for training, and as the plainest statement of the model.
    """
    config = model.config
    batch, length = tokens_BT.shape
    cos, sin = model.rope[:length].to(tokens_BT.device).unbind(1)
    cos_ND, sin_ND = cos.repeat(batch, 1), sin.repeat(batch, 1)
    x_NE = F.embedding(tokens_BT.reshape(-1), model.embedding_VE)
    for layer, window in zip(model.layers, config.windows, strict=True):
        qkv = layer.qkv(rms_norm(x_NE, layer.input_norm, config.norm_eps))
        q, k, v = split_qkv(config, qkv)
        q, k = position_qk(config, layer, q, k, cos_ND, sin_ND)
        heads = [t.to(v.dtype).view(batch, length, -1, config.head_size).transpose(1, 2) for t in (q, k, v)]
        y = _causal_attention(heads[0], heads[1], heads[2], window)
        x_NE = x_NE + layer.o(y.transpose(1, 2).reshape(batch * length, -1))
        middle = silu_mul(layer.gate_up(rms_norm(x_NE, layer.post_norm, config.norm_eps)))
        x_NE = x_NE + layer.down(middle)
    return rms_norm(x_NE, model.final_norm, config.norm_eps).view(batch, length, -1)


def _causal_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, window: int | None) -> Tensor:
    length = q_BHTD.shape[2]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(q_BHTD, k_BKTD, v_BKTD, is_causal=True, enable_gqa=True)
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length).unsqueeze(0)
    mask = ((distance >= 0) & (distance < window)).to(q_BHTD.device)
    return F.scaled_dot_product_attention(q_BHTD, k_BKTD, v_BKTD, attn_mask=mask, enable_gqa=True)
