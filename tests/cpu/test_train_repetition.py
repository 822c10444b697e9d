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


def counting_batches(step: int) -> Tensor:
    """Texts that count upwards from somewhere: inside a loop, too, each token but the first of a phrase is expected."""
    starts = torch.randint(0, 40, (8, 1), generator=torch.Generator().manual_seed(step))
    return (starts + torch.arange(97)) % 40


def test_a_model_learns_to_leave_a_loop(tmp_path: Path) -> None:
    """One model is trained on the text alone and one against loops: only the second notices that it is in one."""
    chances = {}
    for name in ("alone", "against"):
        model = initial_decoder(CONFIG, seed=5)
        parameters = named_tensors(model)
        against = leave_loops(model, given=())
        objective = next_token(model) if name == "alone" else against
        plan = Plan(num_steps=100, warmup_steps=5, seed=0)
        optimizers = muon_and_adamw(parameters, Rates())
        train(plan, parameters, optimizers, objective, counting_batches, tmp_path / name, show_progress=False)
        with torch.no_grad():
            figures = against(counting_batches(1000), torch.Generator().manual_seed(1000)).figures
        chances[name] = figures["unwanted_chance"]
        assert nats_per_target(model, list(range(5, 35))).mean() < 0.5  # both can count
    assert chances["alone"] > 0.5
    assert chances["against"] < 0.7 * chances["alone"], chances
