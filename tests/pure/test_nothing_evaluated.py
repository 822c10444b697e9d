"""Nothing that comes from a socket or a file is ever unpickled or run: no module has the means to."""

import ast
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "src").rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "code", "codeop", "runpy"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {
    *(("yaml", name) for name in ("load", "unsafe_load", "full_load")),
    *((module, "load") for module in ("torch", "np", "numpy")),
    *(("os", name) for name in ("system", "popen")),
}


def faults(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in CALLS:
                found.append(function.id)
            if (
                isinstance(function, ast.Attribute)
                and isinstance(function.value, ast.Name)
                and (function.value.id, function.attr) in METHODS
            ):
                found.append(f"{function.value.id}.{function.attr}")
            if any(keyword.arg in ("shell", "allow_pickle", "trust_remote_code") for keyword in node.keywords):
                found.append("a keyword that lets others' code run")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_module_has_the_means(path: Path) -> None:
    assert faults(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from marshal import loads", "eval(x)", "torch.load(f)", "yaml.load(f)", "run(x, shell=True)"],
)
def test_they_would_be_found(source: str) -> None:
    assert faults(ast.parse(source))
