"""What a check is and what it may say.

A check is a pure function from a case (everything that was read or observed of a submission) to findings. Every finding
is a verdict with what was found, where, and, for a failure, how to mend it; the rule stands on the check.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

LIMIT_BYTES = 16_000_000  # code + weights, decimal
LIMIT_S = 600.0  # training, and again evaluation, on a record track
RECORD_MARGIN_NATS = 0.005
RECORD_P = 0.01
RECORD_SEEDS = 3


def many(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count:,} {noun}{'s' if count != 1 else ''}"


class Verdict(enum.StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    NOT_CHECKABLE = "not checkable"


@dataclass(frozen=True)
class Finding:
    verdict: Verdict
    found: str
    where: str = ""
    mend: str = ""


def passed(found: str, where: str = "") -> Finding:
    return Finding(Verdict.PASSED, found, where)


def failed(found: str, where: str, mend: str) -> Finding:
    return Finding(Verdict.FAILED, found, where, mend)


def not_checkable(why: str, where: str = "") -> Finding:
    return Finding(Verdict.NOT_CHECKABLE, why, where)


@dataclass(frozen=True)
class Check:
    """One named rule. `look` gets the Case and returns at least one finding."""

    name: str  # family.rule
    rule: str
    look: Callable[[Any], list[Finding]]

    @property
    def family(self) -> str:
        return self.name.split(".")[0]


@dataclass(frozen=True)
class Row:
    """A check with what it said of one submission."""

    check: Check
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        """Failed if anything failed; passed if anything could be looked at; else not checkable."""
        verdicts = {finding.verdict for finding in self.findings}
        for verdict in (Verdict.FAILED, Verdict.PASSED):
            if verdict in verdicts:
                return verdict
        return Verdict.NOT_CHECKABLE


def run_checks(checks: Sequence[Check], case: Any) -> list[Row]:
    rows = []
    for check in checks:
        findings = check.look(case)
        assert findings, f"{check.name} said nothing"
        rows.append(Row(check, tuple(findings)))
    return rows
