"""The objective that teaches a model to leave loops."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from headway.models.config import parse_config
from headway.train.loop import Plan, train
from headway.train.measure import nats_per_target
from headway.train.objective import next_token
from headway.train.optimize import Rates, muon_and_adamw
from headway.train.parameters import initial_decoder, named_tensors
from headway.train.repetition import IGNORED, TAUGHT, UNWANTED, leave_loops, spoil

CONFIG = parse_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 40,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
)


@pytest.mark.parametrize("seed", range(20))
def test_without_its_loops_a_spoiled_text_is_the_text(seed: int) -> None:
    """What is taught is the text in its order, and every copy repeats the tokens right before it."""
    text = list(range(300))
    spoiled = spoil(text, [], torch.Generator().manual_seed(seed))
    taught = [token for token, role in zip(*spoiled, strict=True) if role == TAUGHT]
    assert len(spoiled.tokens) == len(spoiled.roles) == 300
    assert taught == text[: len(taught)]
    assert len(taught) < 300
    previous = TAUGHT
    for place, (token, role) in enumerate(zip(*spoiled, strict=True)):
        if role != TAUGHT:
            assert token in spoiled.tokens[max(0, place - 12) : place]
        if role == UNWANTED:
            assert previous in (IGNORED, UNWANTED)
        previous = role


def test_sentinels_are_never_repeated() -> None:
    """Every third token is a given one: only phrases between them are said again."""
    text = [0 if place % 3 == 0 else place for place in range(300)]
    tokens, roles = spoil(text, [0], torch.Generator().manual_seed(1))
    assert not any(token == 0 and role != TAUGHT for token, role in zip(tokens, roles, strict=True))
    assert UNWANTED in roles


def stuttering_batches(step: int) -> Tensor:
    """Random tokens, each said one to three times: a model of these likes to say a token again."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, 40, (8 * 97,), generator=generator)
    return tokens.repeat_interleave(torch.randint(1, 4, tokens.shape, generator=generator))[: 8 * 97].view(8, 97)


def test_a_model_learns_to_leave_a_loop(tmp_path: Path) -> None:
    """One model is trained on the text alone and one against loops: in a loop, only the second looks for a way out."""
    surprise = {}
    for name in ("alone", "against"):
        model = initial_decoder(CONFIG, seed=5)
        parameters = named_tensors(model)
        objective = next_token(model) if name == "alone" else leave_loops(model, given=(0,))
        plan = Plan(num_steps=80, warmup_steps=5, seed=0)
        optimizers = muon_and_adamw(parameters, Rates())
        train(plan, parameters, optimizers, objective, stuttering_batches, tmp_path / name, show_progress=False)
        surprise[name] = nats_per_target(model, [3, 3, 9, 5, 5, 5, 21, 8, 8, *[7] * 12])[-8:].mean()
    assert surprise["alone"] < 1.5
    assert surprise["against"] > surprise["alone"] + 1
