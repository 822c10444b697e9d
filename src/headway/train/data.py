"""What a run learns from: documents, their split into training and held-out ones, and endless batches of tokens.

Everything here is a pure function of the documents and a seed, so that a resumed run sees the same batches as an
uninterrupted one. Knows no model, no objective and no order within a document (that is `infill.py`).
"""

import hashlib
import random
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Folders of the standard library that would teach little: tests, what pip installed, and generated tables.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "lib2to3", "encodings", "pydoc_data", "__pycache__"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

Epoch = Callable[[random.Random], Sequence[Sequence[int]]]
"""One pass over the documents: tokens of each, in an order and arrangement that the random stream decides."""

Batches = Callable[[int], Tensor]
"""The batch of a step, counted from 0, as int64 tokens (sequences, tokens + 1): inputs and targets overlap by one."""


class Document(NamedTuple):
    path: str  # relative to the corpus, with forward slashes
    text: str


class Corpus(NamedTuple):
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


class Phase(NamedTuple):
    num_steps: int
    batches: Batches


def standard_library(root: Path | None = None) -> list[Document]:
    """The Python sources of the running interpreter's standard library, without tests and tables, sorted by path."""
    root = root or Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in _SKIPPED_FOLDERS or part.startswith(_SKIPPED_PREFIXES) for part in parts):
            continue
        documents.append(Document("/".join(parts), path.read_text(encoding="utf8", errors="replace")))
    return documents


def split(documents: Iterable[Document], held_out_share: float) -> Corpus:
    """Hold out documents by a hash of their path: the choice survives new documents and another order.

    Of documents with the same text the first by path stays, and empty ones go, so that nothing is on both sides.
    """
    first_with_text: dict[str, Document] = {}
    for document in sorted(documents):
        if document.text.strip():
            first_with_text.setdefault(document.text, document)
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in first_with_text.values():
        sides[_place(document.path) < held_out_share].append(document)
    return Corpus(tuple(sides[0]), tuple(sides[1]))


def _place(path: str) -> float:
    """A fixed number in [0, 1) for a path."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64


class Stream:
    """Endless batches over epochs: documents are packed end to end, cut into sequences, and these are shuffled.

    One epoch is kept in memory. Asking for steps in order is cheap; the first step after a resume replays the earlier
    epochs' arrangement to learn where each ends.
    """

    def __init__(self, epoch: Epoch, *, sequence_tokens: int, sequences: int, seed: int) -> None:
        self._epoch, self._seed = epoch, seed
        self._sequence_tokens, self._sequences = sequence_tokens, sequences
        self._starts = [0]  # of epoch i: the step of its first batch
        self._kept: tuple[int, Tensor] | None = None

    def __call__(self, step: int) -> Tensor:
        while self._starts[-1] <= step:
            number = len(self._starts) - 1
            self._starts.append(self._starts[-1] + len(self._packed(number)) // self._sequences)
        number = next(i for i, start in enumerate(self._starts) if start > step) - 1
        first = (step - self._starts[number]) * self._sequences
        return self._packed(number)[first : first + self._sequences]

    def _packed(self, number: int) -> Tensor:
        if self._kept is None or self._kept[0] != number:
            rng = random.Random(f"{self._seed}/{number}")
            sequences = pack(self._epoch(rng), self._sequence_tokens)
            if len(sequences) < self._sequences:
                raise ValueError(
                    f"The corpus fills {len(sequences)} sequences of {self._sequence_tokens} tokens, "
                    f"fewer than a batch of {self._sequences}: give more documents or a smaller batch."
                )
            order = torch.tensor(rng.sample(range(len(sequences)), len(sequences)))
            self._kept = number, sequences[order]
        return self._kept[1]


def pack(documents: Iterable[Sequence[int]], sequence_tokens: int) -> Tensor:
    """Documents end to end, cut into rows of sequence_tokens + 1 that overlap by one token. The rest is dropped."""
    flat = np.concatenate([np.asarray(document, dtype=np.int64) for document in documents])
    num_rows = (len(flat) - 1) // sequence_tokens
    rows = np.lib.stride_tricks.sliding_window_view(flat, sequence_tokens + 1)[::sequence_tokens][:num_rows]
    return torch.from_numpy(rows.copy())


def in_phases(phases: Sequence[Phase]) -> Batches:
    """Batches of one phase after the other, each counting its own steps from 0. The last one does not end."""

    def batches(step: int) -> Tensor:
        for phase in phases[:-1]:
            if step < phase.num_steps:
                return phase.batches(step)
            step -= phase.num_steps
        return phases[-1].batches(step)

    return batches
