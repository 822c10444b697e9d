"""From what a user types to a folder: the embedded model, a folder, the hub, or a sentence on what is accepted."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from headway.models.config import ModelError, read_config
from headway.models.locate import locate


def test_nothing_is_the_embedded_model():
    assert read_config(locate(None)).num_parameters < 20_000_000


def test_an_existing_folder_is_itself(tmp_path, monkeypatch):
    assert locate(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert locate(f"~/{tmp_path.name}") == tmp_path


def test_a_folder_wins_over_a_hub_id_of_the_same_name(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("org/name") == Path("org/name")


@pytest.mark.parametrize(
    "model", ["", "nowhere", "./org/name", "/no/such/folder", "a/b/c", "org/", "../x", "~nobody/x", "x\0", "x" * 5000]
)
def test_what_is_neither_is_answered_with_what_is_accepted(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="an existing folder, a hub id such as org/name, or random:PRESET"):
        locate(model)


def test_a_file_is_not_a_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="is a file: give the folder"):
        locate(str(tmp_path / "model.safetensors"))


def test_a_hub_id_without_the_hub_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match=r'pip install "headway\[hub\]"'):
        locate("org/name")


def test_the_hub_is_asked_for_no_code_and_no_pickles(monkeypatch, tmp_path):
    """The patterns are applied by the hub's own filter to a repository that holds everything."""
    filtered = pytest.importorskip("huggingface_hub.utils").filter_repo_objects
    fetched = []

    def snapshot_download(hub_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
        files += ["tokenizer.model", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
        unwanted = ["modeling.py", "tokenizer.py", "pytorch_model.bin", "tokenizer.bin", "consolidated.safetensors"]
        unwanted += ["original/params.json", "consolidated.00.pth", "README.md", "model.gguf"]
        kept = filtered(files + unwanted, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        fetched.append((hub_id, set(kept), set(files)))
        return str(tmp_path)

    fake = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert locate("org/name") == tmp_path
    ((hub_id, kept, wanted),) = fetched
    assert hub_id == "org/name"
    assert kept == wanted


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    def snapshot_download(hub_id: str, **_: object) -> str:
        raise ConnectionError("no route to host.\n\nA long explanation over\nmany lines")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(ModelError, match=r"^org/name .* \(no route to host\): check the name.*network\.$"):
        locate("org/name")
