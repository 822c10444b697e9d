"""The small operators that every decoder shares, differentiable, as plain functions.

Shape legend: N rows (tokens, flattened), H heads, D head size, E hidden size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.models.config import DecoderConfig, RopeScaling


def rms_norm(x_NE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, arXiv 1910.07467)."""
    return F.rms_norm(x_NE, (x_NE.shape[-1],), weight_E, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's middle: silu of the first half of the last dimension times the second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rope_table(config: DecoderConfig, num_positions: int, device: torch.device | str = "cpu") -> Tensor:
    """cos and sin of every position, float32, shape (num_positions, 2, head_size / 2)."""
    half = config.head_size // 2
    exponents = torch.arange(0, half, dtype=torch.float32) * 2 / config.head_size
    frequencies = 1.0 / (config.rope_theta**exponents)
    frequencies, factor = _scaled(frequencies, config.rope_scaling, config)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos() * factor, angles.sin() * factor), dim=1).to(device)


def _scaled(frequencies: Tensor, scaling: RopeScaling, config: DecoderConfig) -> tuple[Tensor, float]:
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(frequencies, scaling, config), scaling.attention_factor
    return frequencies, 1.0


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, the band between is blended."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_positions / wavelengths
    share_kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share_kept = share_kept.clamp(0, 1)
    return frequencies * share_kept + frequencies / scaling.factor * (1 - share_kept)


def _yarn(frequencies: Tensor, scaling: RopeScaling, config: DecoderConfig) -> Tensor:
    """YaRN (arXiv 2309.00071): a ramp over dimensions between kept and interpolated frequencies."""

    def dimension_of(num_turns: float) -> float:
        wavelength = scaling.original_max_positions / (num_turns * 2 * math.pi)
        return config.head_size * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_size - 1)
    steps = torch.arange(len(frequencies), dtype=torch.float32)
    share_interpolated = ((steps - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies * (1 - share_interpolated) + frequencies / scaling.factor * share_interpolated


def rotate(x_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Llama; cos and sin are (N, head_size / 2). Returns float32."""
    cos, sin = cos_ND.unsqueeze(1), sin_ND.unsqueeze(1)
    first, second = x_NHD.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
