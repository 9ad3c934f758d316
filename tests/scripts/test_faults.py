"""The fault campaign: its short version, and that it sees what is lost."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from scripts import faults
from scripts.fault_runs import Learner, differing_bytes
from scripts.faults import Campaign, Outcome, damage, errors_of, main, render


def campaign(tmp_path: Path, *options: str) -> list[Outcome]:
    out = tmp_path / "faults.json"
    status = main([*options, "--json", str(out), "--scratch", str(tmp_path)])
    outcomes = [Outcome(**values) for values in json.loads(out.read_text(encoding="utf-8"))["outcomes"]]
    failures = [failure for outcome in outcomes for failure in outcome.failures]
    assert (status, failures) == (0, [])
    assert all(o.survived == o.injected and o.bytes_lost == 0 for o in outcomes)
    return outcomes


def test_the_language_model_loses_nothing_to_kills_and_a_full_disk(tmp_path: Path) -> None:
    outcomes = campaign(tmp_path, "--only", "lm", "--kills", "2", "--cases", "kill,full")
    assert [o.injected for o in outcomes if "kill" in o.fault] == [1, 1]
    assert "disk full" in {o.fault for o in outcomes}


@pytest.mark.slow  # a minute of compilation; tests/worldmodel/train has kills and damage in one process
def test_the_world_model_loses_nothing_to_kills_and_damage(tmp_path: Path) -> None:
    outcomes = campaign(tmp_path, "--only", "world", "--kills", "2", "--cases", "kill,damaged")
    assert {o.fault for o in outcomes} >= {"kill -9 of every process", "newest checkpoint truncated"}


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["lm", "world"])
def test_the_whole_campaign(tmp_path: Path, learner: str) -> None:
    outcomes = campaign(tmp_path, "--only", learner, "--kills", "50")
    assert sum(o.injected for o in outcomes if o.fault.startswith("kill -9")) >= 45


def test_lost_bytes_are_counted() -> None:
    whole = {"log": b"abc", "weights": np.arange(4).tobytes()}
    assert differing_bytes(whole, dict(whole)) == 0
    assert differing_bytes(whole, {**whole, "log": b"abd"}) == 1
    assert differing_bytes(whole, {**whole, "log": b"ab"}) == 3
    assert differing_bytes(whole, {"log": b"abc"}) == 32
    assert differing_bytes({"log": b"abc"}, whole) == 32


class ForgetfulLearner(Learner):
    """Says that its runs end otherwise than the undisturbed one."""

    def __init__(self) -> None:
        self.name, self.processes = "lm", 1


def test_a_run_that_ends_otherwise_or_not_at_all_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    tested = Campaign.__new__(Campaign)
    tested.learner, tested.expected, tested.outcomes = ForgetfulLearner(), {"weights": b"1234"}, []

    class Started:
        def __init__(self, codes: list[int]) -> None:
            self.codes = codes

        def end(self, grace_s: float) -> object:
            return faults.Ended(self.codes, "output", 1.0, 0.5)

    for codes, result, problem in (
        ([0], b"1234", ""),
        ([0], b"1235", "1 bytes differ"),
        ([1], b"1234", "resumed run ended, status"),
    ):
        monkeypatch.setattr(tested.learner, "start", lambda run, codes=codes: Started(codes), raising=False)
        monkeypatch.setattr(tested.learner, "result", lambda run, result=result: {"weights": result}, raising=False)
        outcome = tested.outcome("test")
        tested.finish(outcome, Path("run"), "it")
        assert outcome.injected == 1
        assert outcome.survived == (not problem)
        assert all(problem in failure for failure in outcome.failures)
        assert len(outcome.failures) == bool(problem)
    shown = render(tested.outcomes)
    assert "| **all** |  | 3 | 1 | 1 | 0.50 |" in shown
    assert "**failed**: it: resumed run ended, status [1]: output" in shown


def test_a_named_error_is_one_line_with_status_2() -> None:
    def ended(codes: list[int], output: str) -> faults.Ended:
        return faults.Ended(codes, output, 1.0, None)

    assert errors_of(ended([2, 2], "step 1\nStorageError: x: cannot be written")) == {"StorageError"}
    assert errors_of(ended([1, 1], "StorageError: x: cannot be written")) == set()
    assert errors_of(ended([2, 0], "TrainingError: a\nStorageError: b\n")) == {"StorageError", "TrainingError"}
    assert errors_of(ended([2, 1], "Traceback (most recent call last):\nOSError: no")) == set()


def test_damage_is_done(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step_1"
    path.parent.mkdir()
    for kind in ("truncated", "bit-flipped", "emptied"):
        path.write_bytes(bytes(100))
        assert kind in damage(path, kind, random.Random(1))
        assert path.read_bytes() != bytes(100)
