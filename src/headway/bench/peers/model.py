"""The model that every engine reads: seeded random weights of a published shape as a Hugging Face folder.

Owns the files and what they are called in other engines' formats; how those are made is `convert`'s.
"""

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from headway.models import presets, weights
from headway.models.config import parse_config
from headway.train.export import tensors_by_name

SEED = 0
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json")


def write(folder: Path, fields: dict[str, Any], seed: int = SEED) -> None:
    """A model of the shape that these fields of a `config.json` give, in bfloat16. Overwrites.

    The tokenizer is the embedded model's, whose ids are fewer than the shape's: engines are asked with ids, not text.
    """
    config = parse_config(fields)
    folder.mkdir(parents=True, exist_ok=True)
    decoder = weights.random_decoder(config, seed, torch.bfloat16)
    # what is split out of a fused matrix shares its memory, which safetensors refuses
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors_by_name(decoder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors lets the owner alone read it
    embedded = resources.files("headway.assets") / "embedded"
    for name in TEXT_FILES:
        with resources.as_file(embedded / name) as path:
            shutil.copyfile(path, folder / name)
    # last: a folder with a config.json is whole
    (folder / "config.json").write_text(json.dumps(config_fields(fields), indent=1) + "\n", encoding="utf8")


def config_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """With what other engines ask for beside the shape."""
    architecture = fields["architectures"][0].removesuffix("ForCausalLM").lower()
    return {"model_type": architecture, "hidden_act": "silu", "use_cache": True, **fields}


def written(root: Path, name: str) -> Path:
    """The folder of a preset's model below `root`, written now if it is not there. Raises ModelError for no preset."""
    folder = root / name / "safetensors"
    if not (folder / "config.json").is_file():
        write(folder, presets.fields(name))
    return folder
