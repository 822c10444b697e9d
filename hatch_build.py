"""Compiles csrc/ while the package is built, once for each kind of processor that the compiler knows.

Without a compiler, or where one of the kinds does not compile, nothing fails: torch's operators are used instead.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
KINDS = {  # as stages/native.py chooses among them
    "x86_64": {
        "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
        "avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
        "avx512": AVX512,
        "avx2": ["-mavx2", "-mfma"],
        "plain": [],
    },
    "aarch64": {
        "neonbf16": ["-march=armv8.2-a+dotprod+bf16"],
        "neondot": ["-march=armv8.2-a+dotprod"],
        "neon": [],
    },
}
FLAGS = ["-O3", "-falign-loops=64", "-std=c++17", "-fPIC", "-shared", "-fopenmp"]


class CompileOperators(BuildHookInterface):  # type: ignore[type-arg]
    """Puts src/headway/native/kernels-KIND.so beside the sources, and into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        built = compile_all(Path(self.root), Path(self.root) / "src" / "headway" / "native")
        if built:
            build_data["artifacts"] += [str(path.relative_to(self.root)) for path in built]
            build_data["pure_python"] = False
            build_data["infer_tag"] = True


def find_compiler() -> list[str] | None:
    """Its path and its first arguments: CXX, of one word or several (`ccache g++`), or else what systems have."""
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        words = shlex.split(name)
        if words and (found := shutil.which(words[0])) is not None:
            return [found, *words[1:]]
    return None


def compile_all(root: Path, folder: Path, extra: tuple[str, ...] = ()) -> list[Path]:
    """The libraries that could be built, in this folder."""
    compiler = find_compiler()
    built: list[Path] = []
    if compiler is None:
        return built
    folder.mkdir(parents=True, exist_ok=True)
    target = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, check=False).stdout
    for kind, flags in KINDS.get(target.partition("-")[0], {"plain": []}).items():
        path, new = folder / f"kernels-{kind}.so", folder / f"kernels-{kind}.new"
        command = [*compiler, *FLAGS, *flags, *extra, str(root / "csrc" / "kernels.cpp"), "-o", str(new)]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            new.replace(path)  # a process that runs keeps the library that it has
            built.append(path)
    return built


if __name__ == "__main__":  # into FOLDER, with more flags: to look for faults
    if not compile_all(Path(__file__).parent, Path(sys.argv[1]), tuple(sys.argv[2:])):
        sys.exit("Nothing could be compiled: install g++.")
