"""Where a model's files lie: the embedded model, a folder, or a hub id fetched into the hub's own cache.

Knows no tensor and reads no file. Only configuration, weights and tokenizer are ever fetched: no code, no pickles.
"""

import os
import re
from pathlib import Path

from headway.models.config import ModelError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = ["*.json", "*.safetensors", "tokenizer*", "chat_template*"]
_UNWANTED = ["consolidated*", "*/*", "*.py", "*.bin", "*.pt", "*.pth", "*.pkl"]  # copies of the weights, code, pickles


def locate(model: str | None) -> Path:
    """The folder that holds `model`; None is the embedded one. Raises ModelError, with what is accepted, otherwise."""
    if model is None:
        return _embedded()
    folder = os.path.expanduser(model)  # of os.path, whose questions are answered no rather than with an error
    if os.path.isdir(folder):
        return Path(folder)
    if os.path.exists(folder):
        raise ModelError(f"{model} is a file: give the folder of a Hugging Face model.")
    if _HUB_ID.fullmatch(model):
        return _fetch(model)
    raise ModelError(
        f"There is no model {model!r}: give nothing for the embedded model, an existing folder, "
        "a hub id such as org/name, or random:PRESET."
    )


def _embedded() -> Path:
    folder = Path(__file__).parents[1] / "assets" / "embedded"
    if not (folder / "config.json").is_file():
        raise ModelError("This installation lacks the embedded model: install Headway again, or name a model.")
    return folder


def _fetch(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelError(
            f"There is no folder {hub_id}, and fetching it from the hub needs more: "
            'pip install "headway[hub]", or give an existing folder.'
        ) from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as error:  # unknown, gated, offline, cut short: the hub's errors have no common ancestor below it
        first_line = str(error).strip().partition("\n")[0].rstrip(".:")
        raise ModelError(
            f"{hub_id} is no folder here and cannot be fetched from the hub ({first_line}): "
            "check the name, your access to it and the network."
        ) from error
