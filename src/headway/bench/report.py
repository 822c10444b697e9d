"""Result pages: what a command measured, on which machine, at which commit, with which versions."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

RESULTS = Path("docs/results")
VERSIONS = ("torch", "numpy", "tokenizers", "msgspec")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def command(module: str, arguments: Sequence[str] | None) -> str:
    """`module` with the arguments it was given, those of the program if None; without where its files are kept."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for flag in ("--folder", "--root"):
        if flag in given:
            at = given.index(flag)
            del given[at : at + 2]
    return f"{module} {shlex.join(given)}".strip()


def write(name: str, title: str, command: str, body: str, folder: Path = RESULTS) -> Path:
    """Write `docs/results/<name>.md`, print it, and return where it is."""
    page = f"# {title}\n\nPrinted by `{command}`.\n\n{body.strip()}\n\n{provenance()}\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.md"
    replace(path, page.encode())
    print(page)
    return path


def replace(path: Path, content: bytes) -> None:
    """Write a file so that whoever is broken off meanwhile leaves the old one."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    beside.replace(path)


def provenance() -> str:
    """Machine, commit, versions, and how busy the machine was."""
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"Machine: {_cpu_name()}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}. "
        f"Python {platform.python_version()}, {versions}. Commit {_commit()}, "
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, load average at the end {load}."
    )


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def _commit() -> str:
    if told := os.environ.get("HEADWAY_COMMIT"):  # of a copy without its history, by whoever made it
        return told

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

    changed = " with local changes" if git("status", "--porcelain", "--", "src") else ""
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + changed
