"""The trainer: resuming bit for bit, foreign objectives, checkpoints and the log."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headway.models.config import DecoderConfig, parse_config
from headway.models.decoder import Decoder, forward
from headway.train.checkpoint import load_checkpoint, save_checkpoint
from headway.train.loop import Account, Plan, learning_rate_factor, train
from headway.train.objective import Loss, Objective, cross_entropy, next_token
from headway.train.optimize import Rates, muon_and_adamw
from headway.train.parameters import initial_decoder, named_tensors

PLAN = Plan(num_steps=8, warmup_steps=2, seed=3)


def tiny_config(family: str = "LlamaForCausalLM", *, tied: bool = True) -> DecoderConfig:
    return parse_config(
        {
            "architectures": [family],
            "vocab_size": 40,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "tie_word_embeddings": tied,
        }
    )


def counting_batches(step: int) -> Tensor:
    """Sequences that count upwards modulo 40 from a start that depends on the step: easy to learn."""
    starts = torch.randint(0, 40, (4, 1), generator=torch.Generator().manual_seed(step))
    return (starts + torch.arange(17)) % 40


def run(folder: Path, objective_of: object = next_token, stop_after: int | None = None, plan: Plan = PLAN) -> Decoder:
    model = initial_decoder(tiny_config(), seed=5)
    parameters = named_tensors(model)
    objective: Objective = objective_of(model)  # type: ignore[operator]
    optimizers = muon_and_adamw(parameters, Rates())
    train(
        plan, parameters, optimizers, objective, counting_batches, folder,
        save_every=3, stop_after=stop_after, show_progress=False,
    )  # fmt: skip
    return model


def same_bits(first: Decoder, second: Decoder) -> bool:
    pairs = zip(named_tensors(first).values(), named_tensors(second).values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def log_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "cpu_s"} for line in lines]


@pytest.mark.parametrize("stop_after", range(1, 8))
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, stop_after: int) -> None:
    """The machine is switched off after any step, and the command is given again: weights and log do not differ."""
    whole = run(tmp_path / "whole")
    run(tmp_path / "halved", stop_after=stop_after)
    halved = run(tmp_path / "halved")
    assert same_bits(whole, halved)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "halved")


def test_a_crash_between_checkpoints_repeats_the_lost_steps(tmp_path: Path) -> None:
    """Killed within step 5 with a checkpoint after 3: the log's lines of the lost steps are replaced, not doubled."""
    whole = run(tmp_path / "whole")

    class Killed(Exception): ...

    def dies_at_step_5(model: Decoder) -> Objective:
        steps = 0
        inner = next_token(model)

        def objective(batch: Tensor, generator: torch.Generator) -> Loss:
            nonlocal steps
            steps += 1
            if steps == 5:
                raise Killed
            return inner(batch, generator)

        return objective

    with pytest.raises(Killed):
        run(tmp_path / "killed", dies_at_step_5)
    assert len(log_of(tmp_path / "killed")) == 4
    assert same_bits(whole, run(tmp_path / "killed"))
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")


def test_randomness_of_an_objective_survives_resuming(tmp_path: Path) -> None:
    """An objective that masks tokens at random, as denoising does: the random stream belongs to the step."""

    def masked(model: Decoder) -> Objective:
        def objective(batch: Tensor, generator: torch.Generator) -> Loss:
            kept = torch.rand(batch.shape, generator=generator) > 0.3
            return Loss(cross_entropy(model, batch * kept), {"kept": float(kept.float().mean())})

        return objective

    whole = run(tmp_path / "whole", masked)
    run(tmp_path / "halved", masked, stop_after=4)
    assert same_bits(whole, run(tmp_path / "halved", masked))
    kept = [line["kept"] for line in log_of(tmp_path / "whole")]
    assert len(set(kept)) > 4


def test_the_loop_knows_no_model(tmp_path: Path) -> None:
    """A new objective with weights of its own: two named vectors are pulled together, nothing else is needed."""
    parameters = {"a": torch.zeros(3, requires_grad=True), "b": torch.ones(3, requires_grad=True)}

    def distance(batch: Tensor, generator: torch.Generator) -> Loss:
        return Loss((parameters["a"] - parameters["b"]).square().sum())

    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    plan = Plan(num_steps=30, warmup_steps=1, seed=0)
    account = train(plan, parameters, [optimizer], distance, counting_batches, tmp_path, show_progress=False)
    lines = log_of(tmp_path)
    assert lines[-1]["loss"] < 0.05 * lines[0]["loss"]
    assert (account.num_steps, account.num_tokens) == (30, 30 * 4 * 16)


def test_counting_is_learned(tmp_path: Path) -> None:
    """Sixty steps on sequences that count upwards: the next token is nearly certain."""
    run(tmp_path, plan=Plan(num_steps=60, warmup_steps=5, seed=0))
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert losses[0] > 3.5  # ln 40 = 3.7: knows nothing
    assert losses[-1] < 0.5


def test_cpu_time_adds_up_over_sittings(tmp_path: Path) -> None:
    """The card states what the whole run cost, however often it was stopped."""
    run(tmp_path, stop_after=4)
    account = json.loads((tmp_path / "checkpoint/progress.json").read_text())["account"]
    run(tmp_path)
    later = json.loads((tmp_path / "checkpoint/progress.json").read_text())["account"]
    assert later["num_steps"] == 8
    assert 0 < account["cpu_s"] < later["cpu_s"]


def test_another_plan_is_refused_by_name(tmp_path: Path) -> None:
    """The warm-up was edited between two sittings: half a run of each would be no run at all."""
    run(tmp_path, stop_after=2)
    with pytest.raises(ValueError, match=r"made with warmup_steps=2, not 3"):
        run(tmp_path, plan=Plan(num_steps=8, warmup_steps=3, seed=3))


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    """A checkpoint of a tied model is offered to an untied one."""
    run(tmp_path, stop_after=1)
    parameters = named_tensors(initial_decoder(tiny_config(tied=False), seed=5))
    with pytest.raises(ValueError, match=r"'head.weight' is on one side only"):
        load_checkpoint(tmp_path / "checkpoint", parameters, [])


def test_a_crash_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    """The old checkpoint has been moved away and the new one not yet in: the old one is read."""
    run(tmp_path, stop_after=3)
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    resumed = run(tmp_path)
    assert same_bits(resumed, run(tmp_path / "whole", stop_after=8))


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    """What is on disk: two safetensors files and one of JSON."""
    parameters = {"a": torch.ones(2, requires_grad=True)}
    optimizer = torch.optim.AdamW(parameters.values())
    parameters["a"].sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "checkpoint", parameters, [optimizer], {"account": Account(1, 2, 3.0, 4.0)._asdict()})
    files = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert files == ["optimizers.safetensors", "parameters.safetensors", "progress.json"]


def test_the_rate_rises_then_falls_to_almost_nothing() -> None:
    """Four steps up, then down in a line; the last step still moves."""
    plan = Plan(num_steps=20, warmup_steps=4, seed=0)
    factors = [learning_rate_factor(plan, step) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[-1] == pytest.approx(1 / 16)


def test_every_weight_is_stepped_by_exactly_one_optimizer() -> None:
    """Tied and untied: matrices between layers go to Muon, what is looked up or a vector to AdamW."""
    for tied in (True, False):
        parameters = named_tensors(initial_decoder(tiny_config("Qwen3ForCausalLM", tied=tied), seed=0))
        muon, adamw = muon_and_adamw(parameters, Rates())
        by_muon, by_adamw = (
            [id(p) for group in optimizer.param_groups for p in group["params"]] for optimizer in (muon, adamw)
        )
        assert sorted(by_muon + by_adamw) == sorted(map(id, parameters.values()))
        assert len(by_muon) == 4 * 2


def test_given_tokens_are_read_but_never_predicted() -> None:
    """A sentinel that only prompts set: the mean is over all other targets, and gradients never pull towards it."""
    model = initial_decoder(tiny_config(), seed=5)
    marked = counting_batches(0)
    marked[:, 8] = 39
    nats = F.cross_entropy(
        model.head(forward(model, marked[:, :-1])).flatten(0, 1), marked[:, 1:].flatten(), reduction="none"
    )
    expected = nats[marked[:, 1:].flatten() != 39].mean()
    taught = next_token(model)(marked, torch.Generator()).value
    given = next_token(model, given=(39,))(marked, torch.Generator()).value
    torch.testing.assert_close(given, expected)
    assert not torch.equal(given, taught)


def test_one_plan_may_be_run_in_parts_with_changing_objectives(tmp_path: Path) -> None:
    """A recipe changes the objective half-way with the same optimizers: their rates are as they were given."""
    whole = run(tmp_path / "whole")
    model = initial_decoder(tiny_config(), seed=5)
    parameters = named_tensors(model)
    optimizers = muon_and_adamw(parameters, Rates())
    for stop in (3, 8):
        train(
            PLAN, parameters, optimizers, next_token(model), counting_batches, tmp_path / "parts",
            stop_after=stop, show_progress=False,
        )  # fmt: skip
        assert [group["lr"] for optimizer in optimizers for group in optimizer.param_groups] == [0.02, 0.008]
    assert same_bits(whole, model)
