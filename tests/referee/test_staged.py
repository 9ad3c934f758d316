"""The staged run on a small program without a framework: what it does is seen, what it asks for is refused."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import pytest

from common.errors import DataError
from referee.case import Case, observe, verify
from referee.data import read_data
from referee.folder import read_submission
from referee.model import Row, Verdict
from referee.stage import Stage

FAMILIES = ("staged", "score", "causality")


def judged(toy: Path, families=FAMILIES, limit_s: float = 100.0) -> dict[str, Row]:
    case = Case(read_submission(toy / "submission"), read_data(toy / "data"))
    return {row.check.name: row for row in verify(case, families, limit_s, threads=1)}


def failed_checks(rows: dict[str, Row]) -> set[str]:
    return {name for name, row in rows.items() if row.verdict == Verdict.FAILED}


def change(toy: Path, old: str, new: str) -> None:
    path = toy / "submission" / "train_gpt.py"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def tree(root: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()}


def test_good_program_passes_and_nothing_given_is_touched(toy):
    before = tree(toy)
    rows = judged(toy)
    assert failed_checks(rows) == set()
    for name in ("staged.smoke", "staged.network", "staged.readonly", "staged.outside", "staged.training_data"):
        assert rows[name].verdict == Verdict.PASSED, rows[name]
    for name in ("score.own", "score.bytes", "score.coverage"):
        assert rows[name].verdict == Verdict.PASSED, rows[name]
    assert all(row.verdict == Verdict.PASSED for name, row in rows.items() if name.startswith("causality."))
    assert rows["score.rescored"].verdict == Verdict.NOT_CHECKABLE  # nothing is claimed
    assert tree(toy) == before


SCORE = "    tokens = np.concatenate("


@pytest.mark.parametrize(
    ("statement", "check"),
    [
        ("import socket\n    try: socket.create_connection(('192.0.2.1', 9))\n    except OSError: pass", "network"),
        ("import socket\n    try: socket.getaddrinfo('example.org', 80)\n    except OSError: pass", "network"),
        ("open(__file__ + '.cache', 'w').close()", "readonly"),
        ("open({stash!r}).close()", "outside"),
        ("import subprocess; subprocess.run(['ls'], stdout=2)", "outside"),
        ("open(pattern.replace('val_*', 'train_000000')).close()", "training_data"),
    ],
)
def test_what_scoring_may_not_do_is_seen(statement, check, toy):
    stash = toy / "stash"
    stash.write_text("hidden", encoding="utf-8")
    change(toy, SCORE, f"    {statement.format(stash=str(stash))}\n{SCORE}")
    assert failed_checks(judged(toy, ("staged",))) == {f"staged.{check}"}


@pytest.mark.parametrize("quoted", ["", "  # " + "Gpu" * 400], ids=["short line", "line of a packed program"])
def test_program_that_breaks_is_named(quoted, toy):
    change(toy, 'print("trained"', f'raise ValueError("no luck"){quoted}\n        print("trained"')
    row = judged(toy, ("staged",))["staged.smoke"]
    assert row.verdict == Verdict.FAILED
    assert "no luck" in row.findings[0].found
    assert row.findings[0].where.startswith("train_gpt.py:")


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("import no_such_package_here", "lacks the package no_such_package_here"),
        ("raise RuntimeError('CUDA is required')", "needs a GPU"),
        ("import time; time.sleep(60)", "did not end within"),
    ],
)
def test_what_this_machine_cannot_show_is_not_a_failure(statement, words, toy):
    change(toy, '        print("trained"', f'        {statement}\n        print("trained"')
    case = Case(read_submission(toy / "submission"), read_data(toy / "data"))
    with Stage(case.submission, case.data, 1) as stage:
        case.observed.smoke = stage.smoke(20.0 if "sleep" not in statement else 1.0)
    from referee.staged import check_smoke

    (finding,) = check_smoke(case)
    assert finding.verdict == Verdict.NOT_CHECKABLE
    assert words in finding.found


def test_program_without_interfaces_is_not_checkable(toy):
    change(toy, "def referee_hook", "def another_hook")
    change(toy, '"--score"', '"--evaluate"')
    change(toy, "arguments.score", "arguments.evaluate")
    rows = judged(toy)
    assert failed_checks(rows) == set()
    assert "referee_hook" in rows["causality.future"].findings[0].found
    assert "--score" in rows["score.rescored"].findings[0].found


def test_hook_that_breaks_is_not_checkable_and_says_why(toy):
    change(toy, "def referee_hook(artifact):\n", "def referee_hook(artifact):\n    raise ValueError('no model')\n")
    row = judged(toy, ("causality",))["causality.future"]
    assert row.verdict == Verdict.NOT_CHECKABLE
    assert "no model" in row.findings[0].found


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ("    return out\n", "    out[:-1] += 1e-9 * out[1:]\n    return out\n", "causality.future"),
        ("    return out\n", "    return 0.98 * out\n", "causality.normalised"),
        ("        if x == BOS:\n", "        if i == 0:\n", "causality.isolated"),
        ("    return out\n", "    out *= 1 - 0.001 * SEEN.setdefault(tokens.tobytes(), 0)\n"
         "    SEEN[tokens.tobytes()] += 1\n    return out\n\n\nSEEN = {}\n", "causality.once"),
        ('    loss = float', '    nats = nats * 0.99\n    loss = float', "score.own"),
        ("(tokens[1:] != BOS).sum())", "(tokens[1:] != BOS).sum()) + 1", "score.bytes"),
        ("    return out\n", "    out[-1] = 0.0\n    return out\n", "score.coverage"),
    ],
)  # fmt: skip
def test_dishonest_scores_are_seen(old, new, check, toy):
    change(toy, old, new)
    assert check in failed_checks(judged(toy, ("score", "causality")))


TRAINER = """
class Optimizer:  # what torch.optim.optimizer offers to the referee
    hooks = []


def register_optimizer_step_pre_hook(hook):
    Optimizer.hooks.append(hook)


import types
sys.modules["torch"] = types.ModuleType("torch")
sys.modules["torch.optim"] = types.ModuleType("torch.optim")
sys.modules["torch.optim.optimizer"] = types.ModuleType("torch.optim.optimizer")
sys.modules["torch.optim.optimizer"].register_optimizer_step_pre_hook = register_optimizer_step_pre_hook
"""


@pytest.mark.parametrize(
    ("declared", "reports", "verdict"),
    [
        (True, "on_scored(i, i + 1)", Verdict.PASSED),
        (True, "None if i == 0 else on_scored(i, i + 1)", Verdict.FAILED),
        (True, "on_scored(0, i + 1)", Verdict.FAILED),
        (True, "None", Verdict.FAILED),
        (False, "None", Verdict.FAILED),
    ],
)
def test_order_of_scoring_and_learning(declared, reports, verdict, toy):
    change(toy, "V, BOS = 256, 255\n", f"V, BOS = 256, 255\n{TRAINER}")
    step = (
        f"        {reports}\n        [hook(None, (), {{}}) for hook in Optimizer.hooks]\n        counts[x, y] += 1.0\n"
    )
    change(toy, "        counts[x, y] += 1.0\n", step)
    change(toy, '"learns_while_scoring": False', f'"learns_while_scoring": {declared}')
    assert judged(toy, ("causality",))["causality.score_first"].verdict == verdict


def test_stage_is_removed_also_after_an_error(toy):
    submission, data = read_submission(toy / "submission"), read_data(toy / "data")
    stage = Stage(submission, data)

    def fails() -> None:
        with stage:
            assert stage.root.is_dir()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not stage.root.exists()


def test_killed_program_leaves_an_answer(toy):
    change(toy, '    return {"nll"', f'    os.kill(os.getpid(), {int(signal.SIGKILL)})\n    return {{"nll"')
    row = judged(toy, ("causality",))["causality.once"]
    assert row.verdict == Verdict.NOT_CHECKABLE


def test_without_data_or_program_nothing_runs(toy):
    case = Case(read_submission(toy / "submission"))
    observe(case)
    assert case.observed.smoke is None
    assert "--data" in case.observed.why_no_smoke
    os.remove(toy / "submission" / "train_gpt.py")
    case = Case(read_submission(toy / "submission"), read_data(toy / "data"))
    observe(case)
    assert case.observed.dialogue is None


def test_folders_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        read_submission(tmp_path / "none")
    with pytest.raises(DataError, match="holds no"):
        read_data(tmp_path)
