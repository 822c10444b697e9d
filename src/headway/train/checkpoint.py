"""A run on disk: named tensors as safetensors, all else as JSON. Nothing is ever unpickled.

A checkpoint is a folder that appears whole: it is written beside its place and renamed. Knows no model and no loop;
it can save any named parameters and any torch optimizer whose state is tensors.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headway.train.parameters import copy_into

_PARAMETERS, _OPTIMIZERS, _PROGRESS = "parameters.safetensors", "optimizers.safetensors", "progress.json"


def save_checkpoint(
    folder: Path,
    parameters: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    progress: Mapping[str, Any],
) -> None:
    """Replace the checkpoint at `folder`. A crash at any moment leaves the old one or the new one, whole."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file({name: tensor.detach() for name, tensor in parameters.items()}, fresh / _PARAMETERS)
    save_file(_optimizer_tensors(parameters, optimizers), fresh / _OPTIMIZERS)
    (fresh / _PROGRESS).write_text(json.dumps(progress, indent=1) + "\n", encoding="utf8")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    folder: Path, parameters: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any] | None:
    """Fill parameters and optimizers in place and return the progress saved with them; None without a checkpoint."""
    for place in (folder, folder.with_name(folder.name + ".old")):  # the latter: a crash between two renames
        if (place / _PROGRESS).is_file():
            break
    else:
        return None
    copy_into(parameters, load_file(place / _PARAMETERS))
    saved = load_file(place / _OPTIMIZERS)
    for number, optimizer in enumerate(optimizers):
        for name, parameter in _owned(parameters, optimizer).items():
            start = f"{number}/{name}/"
            state = {key.removeprefix(start): value for key, value in saved.items() if key.startswith(start)}
            if state:
                optimizer.state[parameter] = state
    progress: dict[str, Any] = json.loads((place / _PROGRESS).read_text(encoding="utf8"))
    return progress


def _optimizer_tensors(
    parameters: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    tensors = {}
    for number, optimizer in enumerate(optimizers):
        for name, parameter in _owned(parameters, optimizer).items():
            for key, value in optimizer.state.get(parameter, {}).items():
                assert isinstance(value, Tensor), f"{type(optimizer).__name__} keeps {key} as {type(value).__name__}"
                tensors[f"{number}/{name}/{key}"] = value
    return tensors


def _owned(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: parameter for name, parameter in parameters.items() if id(parameter) in ids}
