"""Folders of other shapes than ours: what is found in them, and what is counted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from referee.case import Case, verify
from referee.folder import read_submission
from referee.lint import declares, required_names
from referee.model import Row, Verdict
from referee.weigh import siblings_used, weight_bytes

PROGRAM = "import torch\n\n\ndef train(loss):\n    loss.backward()\n" + "# padding\n" * 10


def write(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def rows(root: Path, *families: str) -> dict[str, Row]:
    return {row.check.name: row for row in verify(Case(read_submission(root)), families)}


def test_other_names_are_found_and_named(tmp_path):
    record = {"name": "n", "author": "a", "github_id": "g", "date": "d", "val_bpb": 1.5}
    files = {"train_x.py": PROGRAM, "helper.py": "x = 1", "submission_x.json": json.dumps(record), "readme.md": "x"}
    submission = read_submission(write(tmp_path, files | {"train_log_a.txt": "final val_loss:3.0 val_bpb:1.5\n"}))
    assert submission.entry == "train_x.py"
    assert [log.name for log in submission.logs] == ["train_log_a.txt"]
    said = rows(tmp_path, "evidence")
    assert {f.found for f in said["evidence.papers"].findings} == {
        "the program is called train_x.py",
        "the record is called submission_x.json",
    }
    assert said["evidence.numbers"].verdict == Verdict.PASSED


def test_seeds_may_be_a_list_with_results_or_a_map(tmp_path):
    one = {"val_bpb": 1.5}
    for record in ({"seeds": [1], "seed_results": {"1": one}}, {"seeds": {"1": one}}):
        write(tmp_path, {"submission.json": json.dumps(record)})
        claims = read_submission(tmp_path).claims
        assert claims is not None
        assert claims.seeds == {"1": one}


@pytest.mark.parametrize(
    ("program", "files", "used"),
    [
        (PROGRAM, {"helper.py": "x"}, []),
        ("import helper\n" + PROGRAM, {"helper.py": "x = 1"}, ["helper.py"]),
        ("from pack.deep import f\n" + PROGRAM, {"pack/deep.py": "f = 1"}, ["pack/deep.py"]),
        ("def f():\n    import helper\n" + PROGRAM, {"helper.py": "import second", "second.py": "x = 1"},
         ["helper.py", "second.py"]),
        ("x = __import__('helper')\n" + PROGRAM, {"helper.py": "x = 1"}, ["helper.py"]),
        ("import importlib\nx = importlib.import_module('pack.deep')\n" + PROGRAM, {"pack/deep.py": "f = 1"},
         ["pack/deep.py"]),
        ("text = open('notes.md').read()\n" + PROGRAM, {"notes.md": "x"}, ["notes.md"]),
        ("KERNEL = HERE / 'csrc' / 'k.cu'\n" + PROGRAM, {"csrc/k.cu": "x"}, ["csrc/k.cu"]),
        ("'''Reads k.cu and writes notes.md.'''\n" + PROGRAM, {"k.cu": "x", "notes.md": "x"}, []),
        ("LOG = 'notes.md'\n" + PROGRAM, {"notes.md": "x"}, []),  # a name that it may write
    ],
)  # fmt: skip
def test_files_that_the_program_uses(program, files, used, tmp_path):
    submission = read_submission(write(tmp_path, {"train_gpt.py": program} | files))
    assert [use.file.path for use in siblings_used(submission)] == used


def test_weights_are_those_of_the_seed_or_else_of_the_log(tmp_path):
    files = {"train_gpt.py": PROGRAM, "final_seed7.ptz": bytes(1000), "final_seed8.ptz": bytes(3000)}
    (counted,) = rows(write(tmp_path, files), "bytes")["bytes.counted"].findings
    assert f"{len(PROGRAM) + 3000:,} of" in counted.found
    log = "Serialized model int8+zlib: 15999999 bytes\n"
    (tmp_path / "final_seed7.ptz").unlink()
    (tmp_path / "final_seed8.ptz").unlink()
    assert rows(write(tmp_path, {"train.log": log}), "bytes")["bytes.counted"].verdict == Verdict.FAILED


def test_weights_beside_the_runs_own_go_with_every_run(tmp_path):
    files = {"train_gpt.py": PROGRAM, "final_seed7.ptz": bytes(1000), "final_seed8.ptz": bytes(3000)}
    root = write(tmp_path / "submission", files | {"table.npz": bytes(500), "other.pt": bytes(70)})
    (counted,) = rows(root, "bytes")["bytes.counted"].findings
    assert f"{len(PROGRAM) + 3570:,} of" in counted.found
    assert "table.npz" in counted.found
    given = write(tmp_path / "given", {"a.artifact": bytes(9000), "b.artifact": bytes(8000)})
    submission = read_submission(root, weights=[given / "a.artifact", given / "b.artifact"])
    assert weight_bytes(submission) == (9000, str(given / "a.artifact"))


@pytest.mark.parametrize(
    ("statement", "program"),
    [
        ("os.execv(sys.executable, [sys.executable])", "a program whose name is computed"),
        ("os.posix_spawn('/bin/tool', [], {})", "tool"),
        ("os.spawnv(os.P_WAIT, '/bin/tool', [])", "tool"),
        ("subprocess.getoutput('tool --all')", "tool"),
    ],
)
def test_programs_started_are_named(statement, program, tmp_path):
    write(tmp_path, {"train_gpt.py": f"import os, subprocess, sys\n{statement}\n" + PROGRAM})
    (finding,) = rows(tmp_path, "lint")["lint.binaries"].findings
    assert finding.found == f"starts {program}"


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("libc = ctypes.CDLL(None)\nlibc.mallopt(-1, 5)\nprint(platform.system())", None),
        ("libc = ctypes.CDLL('kernel.so')", "ctypes.CDLL loads native code"),
        ("libc = ctypes.CDLL(None)\nlibc.system(b'tool')", "calls the C library's system"),
        ("ctypes.CDLL(None).dlopen(b'kernel.so', 2)", "calls the C library's dlopen"),
    ],
)
def test_the_c_library_of_the_process_is_no_native_code_of_the_program(statement, found, tmp_path):
    write(tmp_path, {"train_gpt.py": f"import ctypes, platform\n{statement}\n" + PROGRAM})
    (finding,) = rows(tmp_path, "lint")["lint.binaries"].findings
    assert (finding.verdict == Verdict.PASSED) == (found is None)
    assert found is None or finding.found == found


def test_a_track_decides_what_is_asked(tmp_path):
    log = "stopping_early: wallclock_cap train_time:700000ms step:5/9\n"
    for track, verdict in (("10min_16mb", Verdict.FAILED), ("non_record_16mb", Verdict.NOT_CHECKABLE)):
        write(tmp_path, {"train_gpt.py": PROGRAM, "train.log": log, "submission.json": json.dumps({"track": track})})
        said = rows(tmp_path, "time", "evidence")
        assert said["time.train"].verdict == verdict
        assert said["evidence.seeds"].verdict == verdict


def test_requirements_are_read_as_packages():
    text = "torch==2.9.1+cu128\nFlash-Attn>=3 ; x\n# zstandard==0.25\nnumpy\n# a comment about nothing\n-r other\n"
    assert required_names(text) == {"torch", "flash_attn", "zstandard", "numpy"}
    assert declares("pip install --no-deps flash_attn_3 --find-links x", ["flash_attn_3"])
    assert not declares("flash_attn_3 is fast", ["flash_attn_3"])
    assert not declares("pip install brotlicffi", ["brotli"])


def test_an_empty_folder_is_judged_not_broken(tmp_path):
    said = rows(tmp_path, "bytes", "staged", "score", "causality", "lineage", "time", "evidence", "lint")
    assert said["evidence.papers"].verdict == Verdict.FAILED
    assert {row.verdict for name, row in said.items() if name != "evidence.papers"} <= {
        Verdict.NOT_CHECKABLE,
        Verdict.PASSED,
    }
