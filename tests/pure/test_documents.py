"""The documents speak of the tree as it is: every file, test and constant they name is there."""

import re
from pathlib import Path

import pytest

from headway.core import admission, candidates, forecast, packing, policy
from headway.core.ledger import Cause

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "headway"
DOCUMENTS = [
    ROOT / "ARCHITECTURE.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/decisions").glob("*.md")),
]


def read(path: Path) -> str:
    return path.read_text(encoding="utf8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """A reader who follows a link within the repository arrives."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", read(document))
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    """`core/policy.py` in a text is a file of the package, `tests/pure/story.py` one of the repository."""
    named = re.findall(r"`([\w/]+\.py)`", read(document))
    assert [name for name in named if not ((PACKAGE / name).exists() or (ROOT / name).exists())] == []


def test_the_listing_is_the_tree() -> None:
    """The folders of the package, each with its modules, as ARCHITECTURE.md lists them: none missing, none invented."""
    (listing,) = re.findall(r"## Folders.*?```\n(.*?)```", read(ROOT / "ARCHITECTURE.md"), flags=re.DOTALL)
    listed: set[str] = set()
    folder = ""
    for line in listing.splitlines():
        if opened := re.match(r"([\w/]+/)\s", line):
            folder = opened.group(1)
        listed |= {folder + module for module in re.findall(r"\b\w+\.py\b", line)}
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert listed == {module for module in modules if not module.endswith("/__init__.py")}


def test_every_invariant_has_its_test() -> None:
    """The table of invariants names tests by their address; each is there."""
    addresses = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", read(ROOT / "ARCHITECTURE.md"))
    assert len(addresses) >= 7
    missing = [f"{path}::{name}" for path, name in addresses if not re.search(rf"\b{name}\b", read(ROOT / path))]
    assert missing == []


def test_the_constants_of_the_policy_are_those_in_the_text() -> None:
    """docs/slo.md states each number that the policy is made of."""
    stated = re.findall(
        r"^\| `([A-Z_]+)` \| ([\d.]+)(?: s)? \| `core/(\w+)\.py` \|$", read(ROOT / "docs/slo.md"), re.MULTILINE
    )
    assert len(stated) == 14
    modules = {
        "policy": policy,
        "candidates": candidates,
        "packing": packing,
        "admission": admission,
        "forecast": forecast,
    }
    assert {name: float(value) for name, value, _ in stated} == {
        name: getattr(modules[module], name) for name, _, module in stated
    }


def test_every_cause_of_a_miss_is_explained() -> None:
    """Whatever the ledger may answer, docs/slo.md says what it means."""
    text = read(ROOT / "docs/slo.md")
    assert [cause for cause in Cause.__args__ if f"`{cause}`" not in text] == []
