"""Request traces as they are published: reads a file into what was asked and when.

Owns the formats, told apart by their content and never by their name: the CSV of this project, Azure's, BurstGPT's,
ServeGen's and coding-agent sessions, and the JSON lines of Mooncake and Bailian; plain or gzip. Knows nothing of
rates, scales, classes' targets or tokens: that is `bench/load.py`.
"""

import csv
import gzip
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

MAX_ROWS = 100_000  # read by default; a trace may hold a week
MAX_LINE = 4 << 20  # characters: more is no row of a trace
MAX_TOKENS = 10_000_000  # of one prompt
MAX_BLOCKS = 1_000_000  # of one prompt

MOONCAKE_BUCKET_S = 3.0
KINDS = ("text", "image", "search", "file")


class TraceError(ValueError):
    """The file is not a trace that we know, or one row of it is wrong. Says where."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a trace. `kind` is one of KINDS, or "" if the trace has none.

    `blocks` names the prompt's beginning in blocks of `block_tokens` each: equal ids are equal tokens. `block_tokens`
    is 0 without blocks, and a fraction once a load has been scaled down.
    """

    at_s: float
    num_prompt: int
    num_output: int
    kind: str = ""
    blocks: tuple[int, ...] = ()
    block_tokens: float = 0


class Trace(NamedTuple):
    """What a file held, in the order of arrival. Not timed: the file has no arrivals, every `at_s` is 0."""

    format: str
    timed: bool
    requests: list[Asked]


def read(path: Path, *, limit: int = MAX_ROWS, seed: int = 0) -> Trace:
    """The first `limit` rows of a trace. The first arrival is at 0; `seed` is for what must be jittered."""
    try:
        with _open(path) as file:
            return _read(_Lines(path, file), limit, seed)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise TraceError(f"{path} cannot be read as a trace: {reason}.") from error


def _open(path: Path) -> IO[str]:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", encoding="utf-8-sig") if packed else path.open(encoding="utf-8-sig", newline="")


class _Lines:
    """The lines that are not empty, counted from 1."""

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.number = 0
        self._path = path
        self._file = file

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(MAX_LINE + 1):
            self.number += 1
            if len(line) > MAX_LINE:
                raise self.error(f"longer than {MAX_LINE} characters")
            if line.strip():
                yield line

    def error(self, what: str) -> TraceError:
        return TraceError(f"{self._path}, line {self.number}: {what}.")


def _read(lines: _Lines, limit: int, seed: int) -> Trace:
    rows = iter(lines)
    first = next(rows, None)
    if first is None:
        raise lines.error("the file is empty")
    format_, records = _json_lines(lines, first, rows) if first.lstrip().startswith("{") else _csv(lines, first, rows)
    requests: list[Asked] = []
    while len(requests) < limit:
        try:
            record = next(records, None)
            if record is None:
                break
            asked = format_.take(record)
        except (ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
            if isinstance(error, TraceError):
                raise
            raise lines.error(f"not a row of a {format_.name} trace ({_brief(error)})") from error
        if asked is not None:
            requests.append(asked)
    if not requests:
        raise lines.error("there is no request in it")
    return Trace(format_.name, format_.timed, _from_zero(requests, seed) if format_.timed else requests)


def _from_zero(requests: list[Asked], seed: int) -> list[Asked]:
    ordered = sorted(requests, key=lambda asked: asked.at_s)
    start = ordered[0].at_s
    shifted = [replace(asked, at_s=asked.at_s - start) for asked in ordered]
    return jittered(shifted, MOONCAKE_BUCKET_S, seed) if _is_quantised(shifted) else shifted


def _is_quantised(requests: list[Asked]) -> bool:
    """Mooncake's instants are multiples of 3 s: as they are, they would be bursts of ten that never happened."""
    return any(asked.block_tokens == 512 for asked in requests) and all(
        abs(asked.at_s - MOONCAKE_BUCKET_S * round(asked.at_s / MOONCAKE_BUCKET_S)) < 0.002 for asked in requests
    )


def jittered(requests: list[Asked], bucket_s: float, seed: int) -> list[Asked]:
    """Spread over the bucket that each instant stands for, in the same order."""
    rng = random.Random(seed)
    spread: list[Asked] = []
    for number, group in groupby(requests, key=lambda asked: round(asked.at_s / bucket_s)):
        members = list(group)
        moments = sorted((number + rng.random()) * bucket_s for _ in members)
        spread += [replace(asked, at_s=moment) for asked, moment in zip(members, moments, strict=True)]
    return [replace(asked, at_s=asked.at_s - spread[0].at_s) for asked in spread]


# Formats


class _Format(NamedTuple):
    name: str
    timed: bool
    take: Callable[[dict[str, Any]], Asked | None]  # None: a row that asked for nothing


def _json_lines(lines: _Lines, first: str, rows: Iterator[str]) -> tuple[_Format, Iterator[dict[str, Any]]]:
    def parse(line: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise lines.error("not a line of JSON") from error
        if not isinstance(row, dict):
            raise lines.error("not a JSON object")
        return row

    opening = parse(first)
    if {"chat_id", "timestamp", "input_length", "output_length"} <= opening.keys():
        format_ = _Format("bailian", True, _bailian)
    elif {"timestamp", "input_length", "output_length"} <= opening.keys():
        format_ = _Format("mooncake", True, _mooncake)
    else:
        raise lines.error(_unknown(opening))

    def records() -> Iterator[dict[str, Any]]:
        yield opening
        for line in rows:
            yield parse(line)

    return format_, records()


def _csv(lines: _Lines, first: str, rows: Iterator[str]) -> tuple[_Format, Iterator[dict[str, Any]]]:
    names = [name.strip() for name in next(csv.reader([first]))]
    known = set(names)
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= known:
        format_ = _Format("azure", True, _azure)
    elif {"Timestamp", "Request tokens", "Response tokens"} <= known:
        format_ = _Format("burstgpt", True, _burstgpt)
    elif {"session", "t_s", "prompt_tokens", "output_tokens"} <= known:
        format_ = _Format("agentic", True, _Sessions(_block_column(names)))
    elif {"text_tokens", "images", "image_tokens_each", "output_tokens"} <= known:
        format_ = _Format("servegen", "arrival_s" in known, _servegen)
    elif {"prompt_tokens", "output_tokens"} <= known:
        format_ = _Format("headway", "arrival_s" in known, _Own(_block_column(names)))
    else:
        raise lines.error(_unknown(names))

    def records() -> Iterator[dict[str, Any]]:
        for cells in csv.reader(rows):
            if len(cells) != len(names):
                raise ValueError(f"{len(cells)} cells, not {len(names)}")
            yield dict(zip(names, cells, strict=True))

    return format_, records()


def _unknown(names: Any) -> str:
    seen = ", ".join(str(name)[:30] for name in list(names)[:8])
    return (
        f"no trace format has these columns: {seen}. Known are CSV with prompt_tokens,output_tokens and perhaps "
        "arrival_s, Azure's, BurstGPT's and ServeGen's CSV, and the JSON lines of Mooncake and Bailian"
    )


def _brief(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)[:120]


class _Own:
    """arrival_s, prompt_tokens, output_tokens, type, block<N>_hash_runs: the second and third must be there."""

    def __init__(self, blocks: tuple[str, int] | None) -> None:
        self._blocks = blocks

    def __call__(self, row: dict[str, Any]) -> Asked:
        return Asked(
            _seconds(row.get("arrival_s", 0)),
            _count(row["prompt_tokens"]),
            _count(row["output_tokens"]),
            _kind(row.get("type", "")),
            *((_runs(row[self._blocks[0]]), self._blocks[1]) if self._blocks else ()),
        )


class _Sessions:
    """Sessions of a coding agent. Instants count from each session's start, ids of blocks are its own."""

    def __init__(self, blocks: tuple[str, int] | None) -> None:
        self._blocks = blocks
        self._numbers: dict[str, int] = {}

    def __call__(self, row: dict[str, Any]) -> Asked:
        own = self._numbers.setdefault(row["session"], len(self._numbers)) << 32
        asked = Asked(_seconds(row["t_s"]), _count(row["prompt_tokens"]), _count(row["output_tokens"]))
        if self._blocks is None:
            return asked
        return replace(
            asked,
            blocks=tuple(own + block for block in _runs(row[self._blocks[0]])),
            block_tokens=self._blocks[1],
        )


def _servegen(row: dict[str, Any]) -> Asked:
    images = _count(row["images"])
    num_prompt = _count(row["text_tokens"]) + sum(_count(each) for each in row["image_tokens_each"].split())
    at_s = _seconds(row.get("arrival_s", 0))
    return Asked(at_s, num_prompt, _count(row["output_tokens"]), "image" if images else "text")


def _azure(row: dict[str, Any]) -> Asked:
    # seven decimals; fromisoformat takes any number of them and keeps microseconds
    at_s = datetime.fromisoformat(row["TIMESTAMP"].strip())
    kind = "" if "NumImages" not in row else "image" if _count(row["NumImages"]) else "text"
    seconds = (at_s - datetime(2020, 1, 1, tzinfo=at_s.tzinfo)).total_seconds()
    return Asked(seconds, _count(row["ContextTokens"]), _count(row["GeneratedTokens"]), kind)


def _burstgpt(row: dict[str, Any]) -> Asked | None:
    num_output = _count(row["Response tokens"])
    if num_output == 0:  # the service failed; how long it would have answered is not known
        return None
    return Asked(_seconds(row["Timestamp"]), _count(row["Request tokens"]), num_output)


def _mooncake(row: dict[str, Any]) -> Asked:
    blocks = _ids(row.get("hash_ids") or [])
    at_s = _seconds(row["timestamp"]) / 1000
    return Asked(at_s, _count(row["input_length"]), _count(row["output_length"]), "", blocks, 512 if blocks else 0)


def _bailian(row: dict[str, Any]) -> Asked:
    blocks = _ids(row.get("hash_ids") or [])
    kind = _kind(row.get("type") or "text")
    lengths = _count(row["input_length"]), _count(row["output_length"])
    return Asked(_seconds(row["timestamp"]), *lengths, kind, blocks, 16 if blocks else 0)


# Cells


def _block_column(names: list[str]) -> tuple[str, int] | None:
    for name in names:
        if found := re.fullmatch(r"block(\d{1,5})_hash_runs", name):
            return name, int(found.group(1))
    return None


def _kind(word: Any) -> str:
    """What is no kind of ours ("thinking", "coder") is text."""
    told = str(word).strip().lower()
    return told if told in KINDS or not told else "text"


def _seconds(cell: Any) -> float:
    value = float(cell)
    if not abs(value) < 1e12:
        raise ValueError(f"{cell!r} is no instant")
    return value


def _count(cell: Any) -> int:
    try:
        value = int(cell)
    except ValueError:
        value = -1
    if isinstance(cell, float) or not 0 <= value <= MAX_TOKENS:
        raise ValueError(f"{str(cell)[:30]!r} is no number of tokens")
    return value


def _ids(numbers: list[Any]) -> tuple[int, ...]:
    if len(numbers) > MAX_BLOCKS or not all(type(number) is int and abs(number) < 1 << 62 for number in numbers):
        raise ValueError("hash_ids is no list of block ids")
    return tuple(numbers)


def _runs(cell: str) -> tuple[int, ...]:
    """ "0 14-16" is 0, 14, 15, 16."""
    blocks: list[int] = []
    for run in cell.split():
        first, _, last = run.partition("-")
        begin, end = int(first), int(last or first)
        if not 0 <= begin <= end < 1 << 31 or len(blocks) + end - begin >= MAX_BLOCKS:
            raise ValueError(f"{run[:30]!r} is no run of blocks")
        blocks.extend(range(begin, end + 1))
    return tuple(blocks)
