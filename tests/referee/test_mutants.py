"""Every check catches what is planted for it, and nothing is found in a good submission."""

from __future__ import annotations

import shutil

import pytest

from referee.case import CHECKS
from scripts import verifier_mutants
from scripts.verifier_mutants import MUTANTS, STATIC, TABLE, alarms_of, check_table, put_between, try_mutant

# One static mutant a check is tried in the fast tests, the others in the slow ones.
FAST = {mutant.check: mutant.name for mutant in reversed(MUTANTS) if not mutant.runs}.values()


def test_every_check_has_a_mutant_and_there_are_at_least_forty():
    assert {mutant.check for mutant in MUTANTS} == {check.name for check in CHECKS}
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 40
    known = {check.name for check in CHECKS}
    assert all(set(mutant.also) <= known for mutant in MUTANTS)


def test_every_check_has_a_mutant_that_it_alone_catches():
    assert {mutant.check for mutant in MUTANTS if not mutant.also} == {check.name for check in CHECKS}


def test_every_fault_can_be_planted(bench, tmp_path, monkeypatch):
    """The text that a mutant replaces is there: the slow tests are not the first to see an edit of the entry."""
    monkeypatch.setattr(verifier_mutants, "claims_follow", lambda b: None)  # runs the program
    monkeypatch.setattr(verifier_mutants, "pack_source", str)  # a second each
    for mutant in MUTANTS:
        copy = bench.copy(tmp_path / mutant.name)
        mutant.plant(copy)
        shutil.rmtree(copy.root)


@pytest.mark.parametrize("form", ["plain", "packed"])
def test_good_submission_raises_no_alarm(form, bench, tmp_path):
    assert alarms_of(bench, form, tmp_path, STATIC) == []


def held(bench, mutant, tmp_path):
    """The named check fails, and of the others only those that the mutant names."""
    outcome = try_mutant(bench, mutant, tmp_path)
    assert mutant.check in outcome.failed
    assert set(outcome.failed) - {mutant.check} <= set(mutant.also)


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name in FAST], ids=lambda m: m.name)
def test_mutant_is_killed(mutant, bench, tmp_path):
    held(bench, mutant, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name not in FAST], ids=lambda m: m.name)
def test_other_mutant_is_killed(mutant, bench, tmp_path):
    held(bench, mutant, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "packed"])
def test_good_submission_raises_no_alarm_when_run(form, bench, tmp_path):
    assert alarms_of(bench, form, tmp_path) == []


def test_document_lists_the_checks_and_mutants_as_they_are():
    text = TABLE.read_text(encoding="utf-8")
    assert put_between(text, "checks", check_table()) == text, "run scripts/verifier_mutants.py"
    rows = [line.split(" | ") for line in text.split("<!-- mutants:begin")[1].splitlines() if line.startswith("| ")]
    listed = [(row[0].strip("| "), row[1], row[2]) for row in rows[2:]]
    assert listed == [(m.name, m.what, f"`{m.check}`") for m in MUTANTS], "run scripts/verifier_mutants.py"
