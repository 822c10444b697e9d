"""How the answers of a call are drawn: what its body says, else what the model's own defaults are."""

import secrets
from collections.abc import Iterator

from headway.core.request import Constraint, Sampling
from headway.models.tokenizer import ModelText
from headway.server.errors import bad_request
from headway.server.schema import Body


def sampling_of(body: Body, text: ModelText, constraint: Constraint | None) -> Sampling:
    """Of all its answers, but for their seeds. Raises ApiError 400."""
    defaults = text.sampling_defaults
    chooses = body.num_samples > (body.n or 1)  # by the logprobs of the answers

    def chosen(said: float | None, name: str, otherwise: float) -> float:
        return defaults.get(name, otherwise) if said is None else said

    return Sampling(
        temperature=float(chosen(body.temperature, "temperature", 1.0)),
        top_p=float(chosen(body.top_p, "top_p", 1.0)),
        top_k=max(0, int(chosen(body.top_k, "top_k", 0))),
        min_p=float(chosen(body.min_p, "min_p", 0.0)),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=float(chosen(body.repetition_penalty, "repetition_penalty", 1.0)),
        logit_bias=_bias(body, text.tokenizer.vocab_size),
        num_logprobs=0 if chooses and body.num_logprobs is None else body.num_logprobs,
        num_prompt_logprobs=body.num_prompt_logprobs,
        constraint=constraint,
    )


def samples(prompts: list[tuple[int, ...]], n: int, seed: int | None) -> Iterator[tuple[tuple[int, ...], int]]:
    """Prompts with a seed each. Sample k has the seed `seed` + k, so a prompt gets the same answers among others as
    by itself; without a seed all of them differ."""
    for prompt in prompts:
        for sample in range(n):
            yield prompt, secrets.randbits(63) if seed is None else (seed + sample) % 2**63


def _bias(body: Body, vocab_size: int) -> tuple[tuple[int, float], ...]:
    bias = []
    for key, value in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
            raise bad_request(
                f"`logit_bias` has the key {key[:20]!r}, which is no token id below {vocab_size}.", "logit_bias"
            )
        bias.append((int(key), value))
    return tuple(bias)
