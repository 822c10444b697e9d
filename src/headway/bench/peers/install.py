"""Environments for the peers, made once from pinned requirements, and how large each of them is."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import headway
from headway.bench.peers.engines import Venv


class PeerFailed(RuntimeError):
    """A peer that cannot be installed, converted for or run: one sentence, for the page."""


class OwnFailed(PeerFailed):
    """It was not a peer: without our own figures there is nothing to compare."""


def python_of(root: Path, venv: Venv) -> Path:
    return root / venv.name / "bin" / "python"


def installed(root: Path, venv: Venv) -> Path:
    """The environment's interpreter; made now if it is not there, or if its requirements changed. Raises PeerFailed."""
    folder, python = root / venv.name, python_of(root, venv)
    wanted = venv.requirements.read_text(encoding="utf8")
    mark = folder / ".installed"
    if mark.is_file() and mark.read_text(encoding="utf8") == wanted:
        return python
    if venv.needs_compiler and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise PeerFailed(f"{venv.name} is compiled here and there is no C++ compiler: install g++.")
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(folder)], f"the environment of {venv.name}")
    pip = [str(python), "-m", "pip"]
    run([*pip, "install", "--quiet", "--requirement", str(venv.requirements)], f"pip install of {venv.name}")
    if venv.without:
        run([*pip, "uninstall", "--quiet", "--yes", *venv.without], f"pip uninstall in {venv.name}")
    mark.write_text(wanted, encoding="utf8")
    return python


def run(command: list[str], what: str, cwd: Path | None = None) -> None:
    """Raises PeerFailed with the last thing that was said about an error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    except OSError as error:
        raise PeerFailed(f"{what} failed: {error.strerror}.") from error
    if done.returncode != 0:
        raise PeerFailed(f"{what} failed: {last_words(done.stderr or done.stdout)}")


def last_words(text: str) -> str:
    """The last line that names an error, else the last line; at most 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"error", line, re.IGNORECASE)]
    return (named or lines or ["it said nothing"])[-1][:300]


def size_bytes(folder: Path) -> int:
    """Of all files, as `du --apparent-size` counts them."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def own_bytes() -> int:
    """What `pip install` of this package brings: itself and every distribution that it requires."""
    waiting, seen, total = ["headway"], set[str](), 0
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # of another platform
            continue
        files = [Path(str(file.locate())) for file in found.files or ()]
        total += sum(file.stat().st_size for file in files if file.is_file())
        waiting += [re.split(r"[^\w.-]", line)[0] for line in found.requires or () if "extra ==" not in line]
    package = Path(headway.__file__).parent
    is_editable = not any(str(file) == "headway/__init__.py" for file in distribution("headway").files or ())
    return total + (size_bytes(package) if is_editable else 0)
