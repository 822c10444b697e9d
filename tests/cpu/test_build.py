"""What the package's build compiles: a library for each kind of processor that the compiler's target has."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from headway.stages import native

ROOT = Path(__file__).parents[2]


def hook() -> ModuleType:
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_built_can_be_chosen() -> None:
    """And nothing is looked for that is never built."""
    assert {kind for kinds in hook().KINDS.values() for kind in kinds} == set(native.KINDS)


def compiler(folder: Path, target: str, fails_for: str, name: str = "some-c++") -> Path:
    """One that only says what it compiles for, and makes an empty library, or fails."""
    path = folder / name
    path.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = -dumpmachine ] && echo {target} && exit\n'
        f'case "$*" in *"{fails_for}"*) exit 1 ;; esac\n'
        'for last; do :; done; : > "$last"\n'
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("target", "kinds"),
    [
        ("aarch64-linux-gnu", ["neondot", "neon"]),
        ("x86_64-pc-linux-gnu", ["amx", "avx512bf16", "avx512", "avx2", "plain"]),
        ("riscv64-linux-gnu", ["plain"]),
    ],
)
def test_it_compiles_for_what_the_compiler_does(
    target: str, kinds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cross-compiler's libraries are for its target, wherever it runs; a kind that it does not know is left out."""
    monkeypatch.setenv("CXX", str(compiler(tmp_path, target, fails_for="+bf16")))
    built = hook().compile_all(ROOT, tmp_path / "libraries")
    assert [path.name for path in built] == [f"kernels-{kind}.so" for kind in kinds]
    assert all(path.exists() for path in built)
    assert len(list((tmp_path / "libraries").iterdir())) == len(kinds)


def test_a_compiler_may_have_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `ccache g++`, which make and others take as well."""
    monkeypatch.setenv("CXX", f"env SOME=thing {compiler(tmp_path, 'riscv64-linux-gnu', fails_for='nothing')}")
    assert [path.name for path in hook().compile_all(ROOT, tmp_path / "libraries")] == ["kernels-plain.so"]


@pytest.mark.parametrize("named", ["", "not-there -O2"])
def test_any_compiler_will_do(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CXX before g++, that before c++, and clang++ where there is nothing else."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", named)
    assert hook().compile_all(ROOT, tmp_path / "libraries") == []
    for name in ("clang++", "c++", "g++"):
        path = compiler(tmp_path, "riscv64-linux-gnu", fails_for="nothing", name=name)
        assert hook().find_compiler() == [str(path)]
        assert len(hook().compile_all(ROOT, tmp_path / "libraries")) == 1
    monkeypatch.setenv("CXX", "clang++ --some")
    assert hook().find_compiler() == [str(tmp_path / "clang++"), "--some"]
