"""Arithmetic of claims: rounding, Student's t, Welch, and folders of other shapes."""

from __future__ import annotations

import base64
import json
import math
import zlib

import pytest

from common.errors import DataError
from referee.case import Case, verify
from referee.evidence import Runs, check_code, check_significance, decimals, runs_of, states, student_tail, welch
from referee.folder import read_submission
from referee.model import Row, Verdict
from scripts import verify_submission
from scripts.pack import pack_source, strip_source


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 4.0, 25.0])
def test_student_tail_against_closed_forms(t):
    assert student_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-10)
    assert student_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), rel=1e-10)
    assert student_tail(-t, 2) == pytest.approx(1 - student_tail(t, 2))
    large = 0.5 * math.erfc(t / math.sqrt(2))
    assert student_tail(t, 1e6) == pytest.approx(large, rel=2e-1 if t > 10 else 1e-4, abs=1e-12)


def test_welch_on_a_worked_example():
    ours, theirs = (2.0, 2.1, 2.2), (2.4, 2.5, 2.6)
    gain, p = welch(ours, theirs, 0.0)
    # equal spreads: t = 0.4 / sqrt(2 * 0.01 / 3) = 4.899 with 4 degrees of freedom
    assert gain == pytest.approx(0.4)
    assert p == pytest.approx(0.00402, abs=1e-4)
    assert welch(ours, theirs, 0.4)[1] == pytest.approx(0.5)
    assert welch((1.0, 1.0), (2.0, 2.0), 0.005) == (1.0, 0.0)
    assert welch((2.0, 2.0), (2.0, 2.0), 0.005) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("logged", "claimed", "agree"),
    [
        ("1.2244", 1.22436570, True),
        ("1.22436570", 1.2244, True),
        ("1.2244", 1.22446, False),
        ("1.0808", 1.08079352, True),
        ("1.0809", 1.08079352, False),
        (None, 1.0, False),
    ],
)
def test_numbers_agree_to_the_coarser_precision(logged, claimed, agree):
    assert states(logged, claimed) == agree


def test_decimals():
    assert [decimals(text) for text in ("1", "1.5", "1.22436570")] == [0, 1, 8]


def folder(tmp_path, record, logs):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "submission.json").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "train_gpt.py").write_text("import torch\n" + "x = 1\n" * 30, encoding="utf-8")
    (tmp_path / "README.md").write_text("# it\n", encoding="utf-8")
    for name, text in logs.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


LOG = "  seed: {s}\n  vocab_size: 8192\nfinal val_loss:{loss} val_bpb:{bpb} eval_time:2000ms\n"


def seeds_folder(tmp_path, losses, **record):
    bpbs = [loss / (math.log(2) * 3.72668) for loss in losses]
    results = {str(s): {"val_loss": loss, "val_bpb": bpb} for s, (loss, bpb) in enumerate(zip(losses, bpbs))}
    logs = {f"train_seed{s}.log": LOG.format(s=s, loss=a, bpb=b) for s, (a, b) in enumerate(zip(losses, bpbs))}
    base = {"val_bpb": sum(bpbs) / len(bpbs), "val_loss": sum(losses) / len(losses), "seed_results": results}
    return folder(tmp_path, {"track": "10min_16mb", "name": "SP8192 model"} | base | record, logs)


def rows(path, families=("bytes", "time", "evidence", "lint", "score")) -> dict[str, Row]:
    return {row.check.name: row for row in verify(Case(read_submission(path)), families)}


def test_log_only_folder_is_checked_as_far_as_it_goes(tmp_path):
    said = rows(seeds_folder(tmp_path, [2.8, 2.801, 2.802]))
    assert said["evidence.numbers"].verdict == Verdict.PASSED
    assert said["evidence.seeds"].verdict == Verdict.PASSED
    assert said["bytes.counted"].verdict == Verdict.NOT_CHECKABLE
    assert said["score.rescored"].verdict == Verdict.NOT_CHECKABLE


def test_significance_of_a_gain(tmp_path):
    record = runs_of(read_submission(seeds_folder(tmp_path / "old", [2.900, 2.901, 2.902])))
    better = read_submission(seeds_folder(tmp_path / "better", [2.890, 2.891, 2.892]))
    close = read_submission(seeds_folder(tmp_path / "close", [2.895, 2.896, 2.897]))
    assert check_significance(better, record)[0].verdict == Verdict.PASSED
    assert check_significance(close, record)[0].verdict == Verdict.FAILED
    assert check_significance(better, None)[0].verdict == Verdict.NOT_CHECKABLE
    other_tokens = Runs("other", tuple(2 * v for v in record.loss), record.bpb)  # half as many tokens, same text
    assert check_significance(better, other_tokens)[0].verdict == Verdict.PASSED
    assert check_significance(close, other_tokens)[0].verdict == Verdict.FAILED


@pytest.mark.parametrize("scale", [1.0, 1.01])
def test_bytes_of_fineweb_follow_from_loss_and_bpb(scale, tmp_path):
    bpb = 2.8 / (math.log(2) * 3.72668)
    log = "  vocab_size: 8192\n  datasets_dir: ./data/datasets/fineweb10B_sp8192\n"
    path = folder(tmp_path, {"name": "x", "val_loss": 2.8, "val_bpb": bpb * scale}, {"train.log": log})
    expected = Verdict.PASSED if scale == 1.0 else Verdict.FAILED
    assert rows(path)["score.invariant"].verdict == expected


def test_command_line_prints_and_writes_the_report(tmp_path, capsys):
    path = seeds_folder(tmp_path / "s", [2.8, 2.801, 2.802])
    out = tmp_path / "report.json"
    status = verify_submission.main([str(path), "--only", "evidence", "--json", str(out)])
    printed = capsys.readouterr().out
    report = json.loads(out.read_text(encoding="utf-8"))
    assert status == 1  # no author
    assert report["verdict"] == "failed"
    (papers,) = [c for c in report["checks"] if c["name"] == "evidence.papers"]
    (finding,) = papers["findings"]
    assert all(finding[key] for key in ("found", "where", "mend"))
    for text in (finding["found"], papers["rule"], "evidence.significance"):
        assert text.split()[0] in printed
    assert sum(report["count"].values()) == len(report["checks"]) == 6


def test_command_line_refuses_what_is_no_folder(tmp_path, capsys):
    assert verify_submission.main([str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"model\.artifact"):
        read_submission(tmp_path, runs=[tmp_path])


DOCUMENTED = '"""The program."""\n\nimport os\n\n\ndef step(x):\n    """Doc."""\n    return x + 1\n\n\n' + (
    'def only():\n    """Nothing else."""\n\n\nclass Known(Exception):\n    """Doc."""\n\n\nRATE = 0.5\n'
)
REPACKED = base64.b64encode(zlib.compress(strip_source(DOCUMENTED).encode())).decode()
FORMS = {
    "plain": DOCUMENTED,
    "packed": pack_source(DOCUMENTED),
    "other packer": f"import zlib,base64\nexec(zlib.decompress(base64.b64decode('{REPACKED}')))\n",
}


@pytest.mark.parametrize("logged", FORMS)
@pytest.mark.parametrize("shipped", FORMS)
@pytest.mark.parametrize("change", [("", ""), ("x + 1", "x + 2")], ids=["same", "changed"])
def test_program_and_log_agree_whatever_form_each_is_in(shipped, logged, change, tmp_path):
    source = FORMS[logged] if not change[0] else pack_source(DOCUMENTED.replace(*change))
    text = f"{'=' * 40} train_gpt.py\n{source}\n" + '{"python": "3.12"}\ntrained 3 steps in 1.00 s\n'
    (tmp_path / "train_gpt.py").write_text(FORMS[shipped], encoding="utf-8")
    (tmp_path / "train.log").write_text(text, encoding="utf-8")
    (finding,) = check_code(read_submission(tmp_path))
    assert finding.verdict == (Verdict.FAILED if change[0] else Verdict.PASSED), finding.found
    if change[0]:
        assert "`step`" in finding.found


def test_evaluation_seconds_may_not_be_claimed_shorter_than_logged(tmp_path):
    text = "  seed: 1\nfinal val_loss:2.8 val_bpb:1.1 eval_time:2000ms\ncompile time: 90 s\n"
    for claimed, verdict in ((2.0, Verdict.PASSED), (2.5, Verdict.PASSED), (1.9, Verdict.FAILED)):
        record = {"name": "x", "seed_results": {"1": {"eval_s": claimed}}}
        path = folder(tmp_path, record, {"train_seed1.log": text})
        assert rows(path, ("time",))["time.claimed"].verdict == verdict
