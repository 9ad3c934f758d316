"""A case: everything read or observed of one submission, and the list of all checks."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from referee import causality, clock, evidence, lineage, lint, score, staged, weigh
from referee.causality import Probe, plan
from referee.data import Data, pieces_of
from referee.evidence import Runs
from referee.folder import Submission, Weights
from referee.model import Check, Finding, Row, run_checks
from referee.stage import Dialogue, Ran, Stage

FAMILIES = ("bytes", "staged", "score", "causality", "lineage", "time", "evidence", "lint")
RUN_LIMIT_S = 600.0


@dataclass(frozen=True)
class Rescored:
    """One `--score` run: what it printed, or why there is no result."""

    weights: Weights
    ran: Ran
    result: dict[str, Any] | None
    why_not: str


@dataclass
class Observed:
    smoke: Ran | None = None
    why_no_smoke: str = "not asked for"
    scores: list[Rescored] = field(default_factory=list)
    why_no_scores: str = "not asked for"
    dialogue: Dialogue | None = None
    why_no_dialogue: str = "not asked for"
    probes: list[Probe] = field(default_factory=list)
    asked: Weights | None = None


@dataclass
class Case:
    submission: Submission
    data: Data | None = None
    against: Runs | None = None
    observed: Observed = field(default_factory=Observed)


def of_submission(check: Check) -> Check:
    """A check that looks at the submission alone, as one of the case."""
    return Check(check.name, check.rule, lambda case: check.look(case.submission))


STATIC = (*weigh.CHECKS, *clock.CHECKS, *evidence.CHECKS, *lint.CHECKS, *lint.STAGED)
CHECKS: tuple[Check, ...] = tuple(
    of_submission(check) if check in STATIC else check
    for check in (
        *weigh.CHECKS, *staged.CHECKS, *score.CHECKS, *causality.CHECKS, *lineage.CHECKS, *clock.CHECKS,
        *evidence.CHECKS, evidence.SIGNIFICANCE, *lint.CHECKS,
    )
)  # fmt: skip


def defines(submission: Submission, name: str) -> bool:
    """Whether any readable layer has the text; a packed program that cannot be read is asked rather than refused."""
    return bool(submission.unparsed) or any(name in layer.text for layer in submission.layers)


def last_json(text: str) -> dict[str, Any] | None:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                value = json.loads(line)
            except ValueError:
                return None
            return value if isinstance(value, dict) else None
    return None


def rescore(stage: Stage, weights: Weights, limit_s: float) -> Rescored:
    ran = stage.score(weights.path, limit_s)
    result = last_json(ran.stdout) if ran.status == 0 else None
    if result is not None and {"val_bpb", "val_loss", "val_tokens", "val_bytes"} <= set(result):
        return Rescored(weights, ran, result, "")
    ended = "did not end in time" if ran.status is None else f"ended with status {ran.status}"
    return Rescored(weights, ran, None, f"--score {ended}: {ran.complaint}")


def silent_ids(data: Data | None) -> set[int]:
    return set() if data is None else {int(token) for token in np.flatnonzero(pieces_of(data).silent_V)}


def observe(case: Case, families: Collection[str] = FAMILIES, limit_s: float = RUN_LIMIT_S, threads: int = 2) -> None:
    """Run what the asked families need, in one stage, and write it into the case. Never runs what they do not need."""
    submission, data, observed = case.submission, case.data, case.observed
    if submission.entry is None or not {"staged", "score", "causality"} & set(families):
        return
    usable = data is not None and not any(shard.fault for shard in (*data.train, *data.val))
    seeds = [w for w in submission.weights if w.seed is not None] or list(submission.weights)
    no_data = "no data here; give --data FOLDER" if data is None else "the shards are faulty; see lineage.shards"
    with Stage(submission, data if usable else None, threads) as stage:
        if "staged" in families:
            observed.why_no_smoke = no_data
            if usable:
                observed.smoke = stage.smoke(limit_s)
        if {"staged", "score"} & set(families):
            observed.why_no_scores = "no weights here; give --weights or --runs" if not seeds else no_data
            if seeds and usable and not defines(submission, '"--score"'):
                observed.why_no_scores = "the program has no --score ARTIFACT --val SHARDS"
            elif seeds and usable:
                observed.scores = [rescore(stage, weights, limit_s) for weights in seeds]
        if {"causality", "score"} & set(families):
            observed.why_no_dialogue = "no weights here; give --weights or --runs"
            if not defines(submission, "referee_hook"):
                observed.why_no_dialogue = "the program has no referee_hook (docs/VERIFIER.md)"
            elif seeds:
                converse(case, stage, seeds[0], data if usable else None, families, limit_s)


def converse(
    case: Case, stage: Stage, weights: Weights, data: Data | None, families: Collection[str], limit_s: float
) -> None:
    observed = case.observed

    def make_request(facts: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
        mode = str(facts["modes"][0])
        text_N = data.val_N if data is not None else np.zeros(0, dtype=np.uint16)
        streams: list[tuple[str, np.ndarray]] = []
        if "score" in families and data is not None:
            streams.append((mode, text_N))
        if "causality" in families:
            for mode in facts["modes"]:
                offset = len(observed.probes)
                probes = plan(facts, text_N, str(mode), silent_ids(data))
                observed.probes += [
                    replace(probe, of=probe.of + offset) if probe.of >= 0 else probe for probe in probes
                ]
        return streams + [(probe.mode, probe.tokens_N) for probe in observed.probes]

    observed.asked = weights
    dialogue = observed.dialogue = stage.ask(weights.path, make_request, limit_s)
    if dialogue.facts and not dialogue.why_not:
        dialogue.mode = str(dialogue.facts["modes"][0])
        if "score" in families and data is not None:
            dialogue.validation_nats, dialogue.answers = dialogue.answers[0], dialogue.answers[1:]
            dialogue.events = dialogue.events[1:]


def verify(
    case: Case, families: Collection[str] = FAMILIES, limit_s: float = RUN_LIMIT_S, threads: int = 2
) -> list[Row]:
    """Observe and judge: one row per check of the asked families."""
    observe(case, families, limit_s, threads)
    return run_checks([check for check in CHECKS if check.family in families], case)


def failures(rows: list[Row]) -> list[tuple[str, Finding]]:
    return [(row.check.name, f) for row in rows for f in row.findings if f.verdict == "failed"]
