"""The same weights in each engine's own form, made once in the environment of whatever converts them."""

import shutil
from pathlib import Path

from headway.bench.peers import model
from headway.bench.peers.engines import HERE, TO_GGUF, TO_OPENVINO
from headway.bench.peers.install import installed, run


def converted(root: Path, name: str, form: str) -> Path:
    """Where a preset's model lies in this form; made now if it is not there. Raises PeerFailed."""
    source = model.written(root / "models", name).resolve()
    if form == "safetensors":
        return source
    made = source.parent / form
    if made.exists():
        return made
    unfinished = made.with_name(f"{form}.unfinished")
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    if form.endswith(".gguf"):
        python = installed(root, TO_GGUF).absolute()
        command = [str(python), "-m", "runners.to_gguf", str(source), str(unfinished), form.removesuffix(".gguf")]
    else:
        python = installed(root, TO_OPENVINO).absolute()
        command = [str(python), "-m", "runners.to_openvino", str(source), str(unfinished)]
        if form.endswith("int8"):
            task = ["--task", "text-generation-with-past", "--weight-format", "int8"]
            program = str(python.with_name("optimum-cli"))
            command = [program, "export", "openvino", "--model", str(source), *task, str(unfinished)]
    run(command, f"writing {form}", HERE)
    unfinished.rename(made)
    return made
