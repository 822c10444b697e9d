"""An objective against the small model's disease: text that falls into a loop and never leaves it.

Half of a batch's sequences are spoiled: here and there the last few tokens are said again several times, and then the
text goes on as it was. The model is taught what comes after, and that a third saying is unlikely (the unlikelihood
loss of Welleck et al., arXiv 1908.04319, on loops that are made rather than sampled). Knows no text and no loop.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.models.decoder import Decoder, forward
from headway.train.objective import Loss, Objective

_MAX_PHRASE_TOKENS = 12
_MIN_COPIES, _MAX_COPIES = 2, 6
_MIN_RUN_TOKENS, _MAX_RUN_TOKENS = 8, 64  # of undisturbed text between loops

TAUGHT, IGNORED, UNWANTED = 0, 1, 2
"""What a token is as a target: to be predicted, neither, or to be made unlikely."""


class Spoiled(NamedTuple):
    tokens: list[int]
    roles: list[int]


def spoil(tokens: Sequence[int], given: Sequence[int], generator: torch.Generator) -> Spoiled:
    """A sequence of the same length with loops in it: a phrase's second saying is ignored, further ones unwanted.

    No phrase holds a given token: a sentinel said twice would be no loop but nonsense.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    made: list[int] = []
    roles: list[int] = []
    position = 0
    while len(made) < len(tokens):
        run = list(tokens[position : position + draw(_MIN_RUN_TOKENS, _MAX_RUN_TOKENS)])
        position += len(run)
        made += run
        roles += [TAUGHT] * len(run)
        phrase = run[-draw(1, _MAX_PHRASE_TOKENS) :]
        if not set(phrase) & set(given):
            unwanted = len(phrase) * (draw(_MIN_COPIES, _MAX_COPIES) - 1)
            made += phrase * (1 + unwanted // len(phrase))
            roles += [IGNORED] * len(phrase) + [UNWANTED] * unwanted
    return Spoiled(made[: len(tokens)], roles[: len(tokens)])


def leave_loops(model: Decoder, *, given: Sequence[int], dtype: torch.dtype = torch.float32) -> Objective:
    """Next-token loss plus, for each unwanted token, the negative log of the chance that it is not said."""

    def objective(batch_BS: Tensor, generator: torch.Generator) -> Loss:
        half = len(batch_BS) // 2
        spoiled = [spoil(row, given, generator) for row in batch_BS[:half].tolist()]
        tokens = torch.cat((torch.tensor([each.tokens for each in spoiled]), batch_BS[half:]))
        roles = torch.full_like(tokens, TAUGHT)
        roles[:half] = torch.tensor([each.roles for each in spoiled])
        for token in given:
            roles[tokens == token] = IGNORED
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            return _loss(model, tokens, roles[:, 1:].flatten())

    return objective


def _loss(model: Decoder, tokens_BS: Tensor, roles: Tensor) -> Loss:
    logits = model.head(forward(model, tokens_BS[:, :-1])).flatten(0, 1).float()
    nats = F.cross_entropy(logits, tokens_BS[:, 1:].flatten(), reduction="none")
    taught, unwanted = roles == TAUGHT, roles == UNWANTED
    chance = torch.exp(-nats[unwanted]).clamp(max=1 - 1e-5)
    value = (nats[taught].sum() - torch.log1p(-chance).sum()) / taught.sum()
    figures = {"taught_nats": nats[taught].mean(), "unwanted_chance": chance.mean()}
    return Loss(value, {name: float(figure.detach()) for name, figure in figures.items()})
