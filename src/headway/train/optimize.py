"""Which optimizer steps which weight: Muon the matrices between layers, AdamW the embedding, the head and vectors.

Muon (Jordan et al., 2024) makes a matrix's update orthogonal, which suits maps from activations to activations; rows
of an embedding are looked up one by one and keep Adam's per-element scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_LOOKED_UP = ("embedding.", "head.")


@dataclass(frozen=True, slots=True)
class Rates:
    """Peak learning rates and the decay of Muon's matrices."""

    matrices: float = 0.02
    rest: float = 0.008
    weight_decay: float = 0.02


def muon_and_adamw(parameters: Mapping[str, Tensor], rates: Rates) -> list[torch.optim.Optimizer]:
    """Optimizers that together own every parameter once."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in parameters.items():
        hidden = parameter.ndim == 2 and not name.startswith(_LOOKED_UP)
        (matrices if hidden else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=rates.matrices, weight_decay=rates.weight_decay, momentum=0.95),
        torch.optim.AdamW(rest, lr=rates.rest, betas=(0.9, 0.95), weight_decay=0.0),
    ]
