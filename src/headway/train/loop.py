"""The trainer: fetch a batch, ask the objective, step the optimizers, account. It can stop and resume at any step.

A resumed run continues bit for bit, since a step is a function of (parameters, optimizer state, step number) alone:
batches and random streams are derived from the step, and learning rates are set anew at each. Knows no model, no text
and no objective: the parameters are named tensors and the objective is a function.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from headway.train.checkpoint import load_checkpoint, save_checkpoint
from headway.train.data import Batches
from headway.train.objective import Objective


@dataclass(frozen=True, slots=True)
class Plan:
    """What makes a run the same run. A checkpoint resumes only under the plan that made it."""

    num_steps: int
    warmup_steps: int
    seed: int
    clip_norm: float = 1.0


class Account(NamedTuple):
    """What a run has done so far, over all its sittings."""

    num_steps: int
    num_tokens: int
    cpu_s: float  # user and system time of this process
    wall_s: float

    def plus(self, other: "Account") -> "Account":
        """Of two runs, one after the other."""
        return Account(
            num_steps=self.num_steps + other.num_steps,
            num_tokens=self.num_tokens + other.num_tokens,
            cpu_s=self.cpu_s + other.cpu_s,
            wall_s=self.wall_s + other.wall_s,
        )


def train(
    plan: Plan,
    parameters: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    objective: Objective,
    batches: Batches,
    folder: Path,
    *,
    save_every: int = 100,
    stop_after: int | None = None,
    show_progress: bool = True,
) -> Account:
    """Run the plan to its end, or to step `stop_after`, resuming from the checkpoint in `folder` if there is one.

    Writes `folder/checkpoint` every `save_every` steps and at the end, and a line of JSON per step to
    `folder/log.jsonl`. The optimizers' learning rates are the peaks of the schedule, and are left so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    peaks = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]
    account = _resume(plan, parameters, optimizers, folder)
    last_step = plan.num_steps if stop_after is None else min(stop_after, plan.num_steps)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        disable=not show_progress or account.num_steps >= last_step,
    )  # fmt: skip
    with bar, (folder / "log.jsonl").open("a", encoding="utf8") as log:
        task = bar.add_task("training", total=last_step, completed=account.num_steps)
        while account.num_steps < last_step:
            started = time.process_time(), time.perf_counter()
            step = account.num_steps
            factor = learning_rate_factor(plan, step)
            _set_learning_rates(optimizers, peaks, factor)
            batch = batches(step)
            figures = _step(plan, step, batch, parameters, optimizers, objective)
            account = Account(
                num_steps=step + 1,
                num_tokens=account.num_tokens + batch[:, 1:].numel(),
                cpu_s=account.cpu_s + time.process_time() - started[0],
                wall_s=account.wall_s + time.perf_counter() - started[1],
            )
            _write_line(log, step, figures, factor, account)
            bar.update(task, completed=account.num_steps, description=f"loss {figures['loss']:.3f}")
            if account.num_steps % save_every == 0 or account.num_steps == last_step:
                progress = {"plan": asdict(plan), "account": account._asdict()}
                save_checkpoint(folder / "checkpoint", parameters, optimizers, progress)
    _set_learning_rates(optimizers, peaks, 1.0)
    return account


def learning_rate_factor(plan: Plan, step: int) -> float:
    """The share of the peak rate at a step: a linear rise, then a linear fall that ends just above zero."""
    rise = (step + 1) / max(plan.warmup_steps, 1)
    fall = (plan.num_steps - step) / max(plan.num_steps - plan.warmup_steps, 1)
    return min(rise, fall, 1.0)


def _step(
    plan: Plan,
    step: int,
    batch: Tensor,
    parameters: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    objective: Objective,
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
    loss = objective(batch, generator)
    loss.value.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), plan.clip_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"loss": float(loss.value.detach()), "gradient_norm": float(norm), **loss.figures}


def _set_learning_rates(
    optimizers: Sequence[torch.optim.Optimizer], peaks: Sequence[Sequence[float]], factor: float
) -> None:
    for optimizer, rates in zip(optimizers, peaks, strict=True):
        for group, peak in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = peak * factor


def _resume(
    plan: Plan, parameters: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer], folder: Path
) -> Account:
    progress = load_checkpoint(folder / "checkpoint", parameters, optimizers)
    if progress is None:
        (folder / "log.jsonl").unlink(missing_ok=True)
        return Account(0, 0, 0.0, 0.0)
    for name, value in asdict(plan).items():
        if progress["plan"].get(name) != value:
            raise ValueError(
                f"The checkpoint in {folder} was made with {name}={progress['plan'].get(name)}, not {value}: "
                "restore that setting or train into an empty folder."
            )
    account = Account(**progress["account"])
    _forget_lines_after(folder / "log.jsonl", account.num_steps)
    return account


def _write_line(log: TextIO, step: int, figures: Mapping[str, float], factor: float, account: Account) -> None:
    line: dict[str, Any] = {"step": step, **figures, "rate_factor": factor, "num_tokens": account.num_tokens}
    line["cpu_s"] = round(account.cpu_s, 3)
    log.write(json.dumps(line) + "\n")
    log.flush()


def _forget_lines_after(path: Path, num_steps: int) -> None:
    """Drop the lines of steps that a crash undid: they will be run again."""
    if path.is_file():
        lines = path.read_text(encoding="utf8").splitlines()[:num_steps]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf8")
