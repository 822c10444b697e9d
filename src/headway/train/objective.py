"""What a run minimizes: a function of a batch. Other objectives live in their own files and plug in the same way.

An objective closes over whatever it needs (the model, a teacher, a schedule of noise); the loop knows none of it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.models.decoder import Decoder, forward

_NO_TARGET = -100


class Loss(NamedTuple):
    """`value` is a scalar to differentiate; `figures` are further numbers for the log, already detached."""

    value: Tensor
    figures: Mapping[str, float] = {}


Objective = Callable[[Tensor, torch.Generator], Loss]
"""(batch, random stream of this step) -> loss. All randomness must come from the stream, or resuming changes bits."""


def next_token(
    model: Decoder, *, dtype: torch.dtype = torch.float32, compiled: bool = False, given: Sequence[int] = ()
) -> Objective:
    """Mean cross-entropy, in nats, of each token after those before it.

    Matrices are multiplied in `dtype`; weights and the loss itself stay float32. `compiled` needs a C++ compiler and
    fuses the element-wise operators. `given` are tokens that only a prompt sets: they are read, never predicted.
    """
    loss_of = torch.compile(cross_entropy, dynamic=False) if compiled else cross_entropy

    def objective(batch_BS: Tensor, generator: torch.Generator) -> Loss:
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            return Loss(loss_of(model, batch_BS, tuple(given)))

    return objective


def cross_entropy(model: Decoder, batch_BS: Tensor, given: tuple[int, ...] = ()) -> Tensor:
    """Mean nats per token of sequences (B, T + 1); every token but the first and the given ones is a target."""
    hidden = forward(model, batch_BS[:, :-1])
    logits = model.head(hidden).flatten(0, 1).float()
    targets = batch_BS[:, 1:].flatten()
    for token in given:
        targets = targets.masked_fill(targets == token, _NO_TARGET)
    return F.cross_entropy(logits, targets, ignore_index=_NO_TARGET)
