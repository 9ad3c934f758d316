"""The probes, on small scorers whose faults are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from referee.causality import (
    Probe,
    first_change,
    judge_future,
    judge_isolation,
    judge_order,
    judge_repeat,
    judge_sum,
    plan,
)
from referee.model import Verdict

V, BOS, WINDOW = 37, 1, 16
FACTS = {"vocab_size": V, "bos_id": BOS, "window": WINDOW, "isolates_documents": True, "learns_while_scoring": False}
TEXT = np.random.default_rng(5).integers(2, V, 400).astype(np.uint16)
Scorer = Callable[[np.ndarray], np.ndarray]


def counting(tokens: np.ndarray, *, resets: bool = True) -> np.ndarray:
    """Bigram counts with one added, over the document so far: normalised, causal, isolated."""
    out, counts = np.zeros(len(tokens) - 1), np.ones((V, V))
    for i, (x, y) in enumerate(zip(tokens[:-1].tolist(), tokens[1:].tolist())):
        if x == BOS and resets:
            counts = np.ones((V, V))
        out[i] = -math.log(counts[x, y] / counts[x].sum())
        counts[x, y] += 1.0
    return out


def chunk_adapted(tokens: np.ndarray) -> np.ndarray:
    """Learns from each window before it scores it."""
    out = counting(tokens)
    for start in range(0, len(out), WINDOW):
        target = tokens[start + 1 : start + WINDOW + 1]
        share = np.bincount(target, minlength=V)[target] / len(target)
        out[start : start + WINDOW] = -np.log(0.9 * np.exp(-out[start : start + WINDOW]) + 0.1 * share)
    return out


def verdicts(scorer: Scorer, **changes: object) -> dict[str, Verdict]:
    facts = FACTS | changes
    probes = plan(facts, TEXT, "m", banned={0})
    answers = [scorer(probe.tokens_N) for probe in probes]
    said = {
        "future": judge_future(probes, answers),
        "sum": judge_sum(probes, answers, V),
        "isolation": judge_isolation(facts, probes, answers),
        "repeat": judge_repeat(probes, answers),
    }
    return {
        name: max((f.verdict for f in findings), key=[Verdict.PASSED, Verdict.NOT_CHECKABLE, Verdict.FAILED].index)
        for name, findings in said.items()
    }


def failing(scorer: Scorer, **changes: object) -> set[str]:
    return {name for name, verdict in verdicts(scorer, **changes).items() if verdict == Verdict.FAILED}


def test_honest_scorer_passes_everything():
    assert set(verdicts(counting).values()) == {Verdict.PASSED}


@pytest.mark.parametrize("changes", [{"isolates_documents": False}, {"bos_id": None}, {"window": 13}])
def test_candidates_one_by_one_sum_to_one_too(changes):
    said = verdicts(counting, **changes)
    assert said["sum"] == Verdict.PASSED
    assert Verdict.FAILED not in said.values()


def test_too_many_candidates_one_by_one_are_said_not_to_be_checkable():
    probes = plan(FACTS | {"vocab_size": 9000, "isolates_documents": False}, TEXT, "m", banned=set())
    assert not [probe for probe in probes if probe.kind.startswith("candidate")]
    (finding,) = judge_sum(probes, [], 9000)
    assert finding.verdict == Verdict.NOT_CHECKABLE


def test_faults_are_told_apart():
    assert failing(lambda t: counting(t) + 1e-12 * np.append(t[2:], 0)) == {"future"}
    assert failing(lambda t: 0.99 * counting(t)) == {"sum"}
    assert failing(lambda t: counting(t, resets=False)) == {"isolation", "sum"}
    assert failing(lambda t: counting(t, resets=False), isolates_documents=False) == set()
    assert failing(lambda t: np.full(len(t) - 1, math.log(V))) == {"future"}  # depends on nothing
    assert "future" in failing(chunk_adapted)
    assert "sum" in failing(lambda t: np.minimum(counting(t), 2.0))


def test_memory_of_an_earlier_pass_is_seen():
    seen: set[bytes] = set()

    def remembering(tokens: np.ndarray) -> np.ndarray:
        out = counting(tokens) * (0.999 if tokens.tobytes() in seen else 1.0)
        seen.add(tokens.tobytes())
        return out

    assert failing(remembering) == {"repeat"}


def test_a_peek_of_some_bits_at_a_window_boundary_is_seen():
    def boundary(tokens: np.ndarray) -> np.ndarray:
        out = counting(tokens)
        if len(out) > WINDOW:
            out[WINDOW - 1] += 1e-15 * tokens[WINDOW + 1]
        return out

    assert failing(boundary) == {"future"}


def test_probes_change_what_they_say_and_nothing_else():
    probes = plan(FACTS, TEXT, "m", banned={0})
    kinds = {probe.kind for probe in probes}
    assert kinds == {"base", "suffix", "token", "repeat", "isolation-base", "isolation", "candidates"}
    for probe in probes:
        assert probe.tokens_N.dtype == np.uint16
        if probe.kind in ("suffix", "token"):
            base = probes[probe.of].tokens_N
            changed = np.flatnonzero(base != probe.tokens_N)
            assert changed[0] == probe.place or base[probe.place] == BOS
            assert ((probe.tokens_N == BOS) == (base == BOS)).all()
            assert len(changed) == 1 or probe.kind == "suffix"
        if probe.kind == "candidates":
            assert sorted(probe.tokens_N[7::8].tolist()) == list(range(V))


def test_bitwise_means_bitwise():
    assert first_change(np.array([0.0, 1.0]), np.array([-0.0, 1.0])) == 0
    assert first_change(np.array([1.0]), np.array([1.0])) is None


@pytest.mark.parametrize(
    ("declared", "events", "passes"),
    [
        (False, [], True),
        (False, [["step"]], False),
        (True, [["scored", 0, 5], ["step"], ["step"], ["scored", 5, 9], ["step"]], True),
        (True, [["step"], ["scored", 0, 9]], False),  # learns first
        (True, [["scored", 0, 5], ["step"], ["scored", 4, 9]], False),  # a token twice
        (True, [["scored", 0, 5], ["step"], ["scored", 6, 9]], False),  # a token left out
        (True, [["scored", 0, 5], ["step"]], False),  # the end is never scored
    ],
)
def test_order_of_scoring_and_learning(declared, events, passes):
    probes = [Probe("base", "m", np.zeros(10, np.uint16))]
    findings = judge_order(FACTS | {"learns_while_scoring": declared}, probes, [events])
    assert all(f.verdict == Verdict.PASSED for f in findings) == passes
