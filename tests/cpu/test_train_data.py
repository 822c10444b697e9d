"""Documents, their split and the batches made of them."""

import random
from pathlib import Path

import pytest
import torch

from headway.train.data import Document, Phase, Stream, in_phases, pack, split, standard_library


def documents(count: int) -> list[Document]:
    return [Document(f"package/module_{number}.py", f"x = {number}\n") for number in range(count)]


def test_no_document_is_on_both_sides_and_none_is_lost() -> None:
    """Two thousand files are split: every text is on exactly one side, and about the asked share is held out."""
    corpus = split(documents(2000), held_out_share=0.1)
    train, held_out = {d.text for d in corpus.train}, {d.text for d in corpus.held_out}
    assert not train & held_out
    assert train | held_out == {d.text for d in documents(2000)}
    assert 0.07 < len(held_out) / 2000 < 0.13


def test_a_copy_under_another_name_cannot_leak() -> None:
    """Vendored copies of one file: whichever side the first lands on, the text stands only once."""
    copies = [Document(f"vendor_{number}/six.py", "same = True\n") for number in range(50)]
    corpus = split(copies + documents(50), held_out_share=0.5)
    assert [d.path for d in corpus.train + corpus.held_out if d.text == "same = True\n"] == ["vendor_0/six.py"]


def test_the_split_survives_new_documents_and_another_order() -> None:
    """A later interpreter adds files: what was held out stays held out, so that results stay comparable."""
    before = split(documents(300), held_out_share=0.2)
    shuffled = documents(600)
    random.Random(0).shuffle(shuffled)
    after = split(shuffled, held_out_share=0.2)
    assert set(before.held_out) <= set(after.held_out)
    assert set(before.train) <= set(after.train)


def test_the_standard_library_comes_without_tests_and_installed_packages() -> None:
    """The running interpreter's own library: known modules are there, test folders and site-packages are not."""
    paths = {document.path for document in standard_library()}
    assert {"argparse.py", "json/decoder.py"} <= paths
    assert not any("test" in path.split("/")[:-1] or "site-packages" in path for path in paths)


def test_unreadable_bytes_do_not_stop_a_run(tmp_path: Path) -> None:
    """One file is Latin-1: it is read with replacement characters instead of ending the run."""
    (tmp_path / "latin.py").write_bytes(b"name = 'caf\xe9'\n")
    assert standard_library(tmp_path) == [Document("latin.py", "name = 'caf�'\n")]


def test_packed_rows_overlap_by_the_one_token_that_is_both_target_and_input() -> None:
    """Three documents of ten tokens in all fill two rows of four targets; the rest is dropped."""
    rows = pack([[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]], sequence_tokens=4)
    assert rows.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]


def numbered_epoch(rng: random.Random) -> list[list[int]]:
    """Twelve rows of four tokens and the overlap, in an order that depends on the epoch."""
    start = rng.randrange(1000) * 100
    return [list(range(start, start + 49))]


def test_an_epoch_shows_every_sequence_once_before_the_next_begins() -> None:
    """Twelve sequences in batches of three: four steps show each once, and the fifth is of a new epoch."""
    stream = Stream(numbered_epoch, sequence_tokens=4, sequences=3, seed=1)
    first = torch.cat([stream(step) for step in range(4)])
    start = int(first.min())
    assert sorted(first[:, 0].tolist()) == list(range(start, start + 48, 4))
    assert not set(stream(4).flatten().tolist()) & set(first.flatten().tolist())


def test_a_batch_depends_on_its_step_alone() -> None:
    """A resumed run asks for step 13 first, an uninterrupted one comes by it: both see the same tokens."""
    walked = Stream(numbered_epoch, sequence_tokens=4, sequences=3, seed=1)
    batches = [walked(step) for step in range(14)]
    resumed = Stream(numbered_epoch, sequence_tokens=4, sequences=3, seed=1)
    assert torch.equal(resumed(13), batches[13])
    assert torch.equal(resumed(2), batches[2])
    other_seed = Stream(numbered_epoch, sequence_tokens=4, sequences=3, seed=2)
    assert not torch.equal(other_seed(2), batches[2])


def test_a_corpus_smaller_than_a_batch_is_refused() -> None:
    """Twelve sequences cannot fill a batch of thirteen: the message says what to change."""
    stream = Stream(numbered_epoch, sequence_tokens=4, sequences=13, seed=1)
    with pytest.raises(ValueError, match="give more documents or a smaller batch"):
        stream(0)


def test_phases_follow_each_other_and_count_from_zero() -> None:
    """Two steps of short sequences, then long ones without end."""
    batches = in_phases([
        Phase(2, lambda step: torch.tensor([[10 + step]])),
        Phase(1, lambda step: torch.tensor([[20 + step]])),
    ])  # fmt: skip
    assert [batches(step).item() for step in range(5)] == [10, 11, 20, 21, 22]
