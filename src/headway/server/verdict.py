"""What a request asked for in time and what it got, read off the ledger's record."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from headway.config import UNNAMED_CLASSES
from headway.core.ledger import Cause, Record
from headway.core.request import SLO

TARGETS = ("ttft", "tpot", "total")


class Verdict(NamedTuple):
    """One target: what was asked, what was measured (None: never came), and why it was missed (None: it was met)."""

    target: str
    target_s: float
    measured_s: float | None
    cause: Cause | None

    @property
    def met(self) -> bool:
        return self.cause is None


class SloReport(msgspec.Struct):
    """A verdict as callers read it."""

    target_ms: float
    measured_ms: float | None
    met: bool
    cause: str | None


def verdicts(record: Record) -> list[Verdict]:
    """One per target that was asked for, of a record that is closed. A target that does not apply (one token has no
    gaps) is left out."""
    if record.kind is None:
        return []
    ended = None if record.ended is None or record.kind != "finished" else record.ended - record.arrival
    measured = (
        ("ttft", record.slo.ttft_s, record.ttft_s),
        ("tpot", record.slo.tpot_s, record.tpot_s),
        ("total", record.slo.total_s, ended),
    )
    return [
        Verdict(target, target_s, taken_s, record.missed.get(target))
        for target, target_s, taken_s in measured
        if target_s is not None and (taken_s is not None or target in record.missed)
    ]


def worst(records: Sequence[Record]) -> list[Verdict]:
    """One verdict per target over all answers of a call: a missed one before a met one, then the slowest."""
    by_target: dict[str, Verdict] = {}
    for record in records:
        for verdict in verdicts(record):
            known = by_target.get(verdict.target)
            if known is None or _badness(verdict) > _badness(known):
                by_target[verdict.target] = verdict
    return list(by_target.values())


def _badness(verdict: Verdict) -> tuple[bool, float]:
    return not verdict.met, float("inf") if verdict.measured_s is None else verdict.measured_s


def reports(records: Sequence[Record]) -> dict[str, SloReport]:
    """Target -> the worst verdict over all answers."""
    return {
        verdict.target: SloReport(
            milliseconds(verdict.target_s) or 0.0, milliseconds(verdict.measured_s), verdict.met, verdict.cause
        )
        for verdict in worst(records)
    }


def targets_met(records: Sequence[Record]) -> bool | None:
    """Whether all of them were. None: nothing to judge, or not yet."""
    found = worst(records)
    if any(not verdict.met for verdict in found):
        return False
    return True if found and all(record.kind is not None for record in records) else None


def class_counted(slo_class: str, slo: SLO) -> str:
    """The name under which a request is counted: its class; without one, whether it brought targets of its own."""
    none, custom = UNNAMED_CLASSES
    return slo_class or (none if slo == SLO() else custom)


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
