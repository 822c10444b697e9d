"""What a run minimizes: a function of a batch. Other objectives live in their own files and plug in the same way.

An objective closes over whatever it needs (the model, a teacher, a schedule of noise); the loop knows none of it.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.models.decoder import Decoder, forward


class Loss(NamedTuple):
    """`value` is a scalar to differentiate; `figures` are further numbers for the log, already detached."""

    value: Tensor
    figures: Mapping[str, float] = {}


Objective = Callable[[Tensor, torch.Generator], Loss]
"""(batch, random stream of this step) -> loss. All randomness must come from the stream, or resuming changes bits."""


def next_token(model: Decoder, *, dtype: torch.dtype = torch.float32, compiled: bool = False) -> Objective:
    """Mean cross-entropy, in nats, of each token after those before it.

    Matrices are multiplied in `dtype`; weights and the loss itself stay float32. `compiled` needs a C++ compiler and
    fuses the element-wise operators.
    """
    loss_of = torch.compile(cross_entropy, dynamic=False) if compiled else cross_entropy

    def objective(batch_BS: Tensor, generator: torch.Generator) -> Loss:
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            return Loss(loss_of(model, batch_BS))

    return objective


def cross_entropy(model: Decoder, batch_BS: Tensor) -> Tensor:
    """Mean nats per token of sequences (B, T + 1); every token but the first is a target."""
    hidden = forward(model, batch_BS[:, :-1])
    logits = model.head(hidden).flatten(0, 1).float()
    return F.cross_entropy(logits, batch_BS[:, 1:].flatten())
