"""What a trained decoder can do: its loss on held-out text, and text it writes. Knows no training.

Plain and slow on purpose (`forward` over the whole sequence for every token), so that it needs no engine and can be
the judge of one.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from headway.models.decoder import Decoder, forward
from headway.train.data import Document
from headway.train.infill import Cut, in_fim_order, plain
from headway.train.vocabulary import sentinels_of


class HeldOutLoss(NamedTuple):
    num_tokens: int
    num_bytes: int  # of the text in UTF-8: what makes vocabularies comparable
    nats: float  # summed over all tokens

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.num_tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.num_bytes / 0.6931471805599453


@torch.no_grad()
def nats_per_target(model: Decoder, tokens: Sequence[int]) -> Tensor:
    """The surprise of every token but the first, float32. Longer texts are taken in windows of the model's context.

    Windows overlap by the one token that is both a target and an input, so that each token is a target once.
    """
    window = model.config.max_positions
    found = []
    for start in range(0, len(tokens) - 1, window):
        row = torch.tensor([tokens[start : start + window + 1]])
        logits = model.head(forward(model, row[:, :-1])).float()
        found.append(F.cross_entropy(logits[0], row[0, 1:], reduction="none"))
    return torch.cat(found)


def plain_loss(model: Decoder, tokenizer: Tokenizer, documents: Sequence[Document]) -> HeldOutLoss:
    """The loss of documents as they stand, their ends included."""
    end = sentinels_of(tokenizer).end
    nats = [nats_per_target(model, [end, *tokens]) for tokens in plain(documents, tokenizer)]
    return _summed(nats, (document.text for document in documents))


def middle_loss(model: Decoder, tokenizer: Tokenizer, cuts: Sequence[Cut], *, see_suffix: bool) -> HeldOutLoss:
    """The loss of the middles alone, after prefix and suffix in FIM order, or as plain text after the prefix.

    The difference is what knowing the suffix is worth.
    """
    at = sentinels_of(tokenizer)
    nats = []
    for tokens in in_fim_order(cuts, tokenizer):
        suffix, middle = tokens.index(at.suffix), tokens.index(at.middle)
        before = tokens[: middle + 1] if see_suffix else tokens[1:suffix]
        nats.append(nats_per_target(model, [at.end, *before, *tokens[middle + 1 : -1]])[len(before) :])
    return _summed(nats, (each.middle for each in cuts))


def _summed(nats: Sequence[Tensor], texts: Iterable[str]) -> HeldOutLoss:
    return HeldOutLoss(
        num_tokens=sum(len(each) for each in nats),
        num_bytes=sum(len(text.encode()) for text in texts),
        nats=float(torch.cat(list(nats)).double().sum()),
    )


@torch.no_grad()
def continuation(
    model: Decoder, tokenizer: Tokenizer, prompt: str, *, max_tokens: int, temperature: float = 0.0, seed: int = 0
) -> str:
    """What the model writes after a prompt, which may hold sentinels. Temperature 0 is greedy."""
    end = sentinels_of(tokenizer).end
    generator = torch.Generator().manual_seed(seed)
    tokens = tokenizer.encode(prompt).ids
    num_prompt = len(tokens)
    for _ in range(max_tokens):
        context = torch.tensor([tokens[-model.config.max_positions :]])
        logits = model.head(forward(model, context)[0, -1]).float()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        if token == end:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[num_prompt:], skip_special_tokens=False)
