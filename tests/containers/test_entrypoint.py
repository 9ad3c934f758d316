"""containers/entrypoint.py: what each command runs, what it refuses, and the score of a checkout."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from containers.entrypoint import (
    COMMANDS,
    UsageError,
    code_sha256,
    command_line,
    find_artifact,
    hardware,
    main,
    report,
    usage,
    versions,
)

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "containers" / "entrypoint.py"
ALL = frozenset({"torch", "jax", "pytest"})
SCORED = {
    "val_bpb": 1.5, "val_loss": 2.0, "val_tokens": 10, "val_bytes": 20, "byte_source": "tokens",
    "eval_mode": "standard", "temperature": 1.0, "artifact_bytes": 5,
    "artifact_sha256": "a", "tokenizer_sha256": "t", "val_sha256": "v",
    "scores": {"standard": {"bpb": 1.5, "seconds": 3.25}},
}  # fmt: skip


def line(*words: str, installed: frozenset[str] = ALL) -> list[str]:
    return command_line(words[0], words[1:], ROOT, "PY", installed)


def test_commands_run_what_they_name():
    entry = str(ROOT / "submissions/jepa_mamba/train_gpt.py")
    assert line("train", "--preset", "demo") == ["PY", entry, "--preset", "demo"]
    many = line("torchrun", "--nproc_per_node=8", "--", "--preset", "seed_bpe")
    assert many == ["PY", "-m", "torch.distributed.run", "--nproc_per_node=8", entry, "--preset", "seed_bpe"]
    assert line("verify", "x") == ["PY", str(ROOT / "scripts/verify_submission.py"), "x"]
    assert line("demo")[1:] == [str(ROOT / "scripts/demo.py"), "--data", "data/stdlib-bpe1024", "--runs", "runs"]
    assert line("coinrun", "--profile", "cpu") == ["PY", "-m", "worldmodel", "coinrun", "--profile", "cpu"]
    assert line("worldmodel", "train") == ["PY", "-m", "worldmodel", "train"]


@pytest.mark.parametrize("name", ["train", "verify", "demo"])
def test_programs_of_commands_are_there(name):
    assert Path(line(name)[1]).is_file()


def test_test_command_collects_what_the_image_can():
    assert line("test")[-1] == "tests"
    assert "tests/worldmodel" not in line("test", installed=frozenset({"torch", "pytest"}))
    assert line("test", installed=frozenset({"jax", "pytest"}))[-1] == "tests/worldmodel"
    named = line("test", "tests/common/quant", "-k", "grid")
    assert named[-3:] == ["tests/common/quant", "-k", "grid"]
    assert all((ROOT / path).is_dir() for path in line("test", installed=frozenset({"torch", "pytest"}))[-3:])


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_command_without_its_framework_says_so(name):
    with pytest.raises(UsageError, match=rf"{name} needs \w+, which this image has not"):
        line(name, installed=frozenset())


def test_unknown_command_lists_the_known():
    with pytest.raises(UsageError, match="unknown command 'sh'") as caught:
        line("sh")
    assert all(name in str(caught.value) for name in COMMANDS)


def test_help_and_errors(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out == usage() + "\n"
    assert main(["bash", "-c", "true"]) == 2
    assert "unknown command 'bash'" in capsys.readouterr().err


def test_find_artifact(tmp_path):
    with pytest.raises(UsageError, match="found none"):
        find_artifact(tmp_path / "absent")
    with pytest.raises(UsageError, match="found none"):
        find_artifact(tmp_path)
    one = tmp_path / "model.artifact"
    one.touch()
    assert find_artifact(tmp_path) == find_artifact(one) == one
    (tmp_path / "other.artifact").touch()
    with pytest.raises(UsageError, match=r"model\.artifact, other\.artifact"):
        find_artifact(tmp_path)


def _tree(root: Path) -> Path:
    for name in ("common/a.py", "submissions/x/train_gpt.py", "containers/entrypoint.py"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(name, encoding="utf-8")
    return root


def test_code_digest_changes_with_code_only(tmp_path):
    root = _tree(tmp_path / "a")
    before = code_sha256(root)
    assert code_sha256(_tree(tmp_path / "b")) == before
    (root / "common" / "__pycache__").mkdir()
    (root / "common" / "__pycache__" / "a.cpython-311.pyc").touch()
    (root / "notes.txt").touch()
    assert code_sha256(root) == before
    (root / "common" / "a.py").write_text("changed", encoding="utf-8")
    assert code_sha256(root) != before


def test_report_has_what_was_scored_and_no_time_but_its_own(tmp_path):
    root = _tree(tmp_path)
    made = report(SCORED, root, 1.25)
    assert made["sha256"] == {"code": code_sha256(root), "artifact": "a", "tokenizer": "t", "data": "v", "image": None}
    assert (made["bpb"], made["tokens"], made["bytes"], made["seconds"]) == (1.5, 10, 20, 1.25)
    assert made["scores"] == {"standard": {"bpb": 1.5}}
    (root / "image.manifest").write_bytes(b"files")
    assert report(SCORED, root, 1.25)["sha256"]["image"] == hashlib.sha256(b"files").hexdigest()
    assert report(SCORED, root, 9.0) == report(SCORED, root, 1.25) | {"seconds": 9.0}
    json.dumps(made)


def test_hardware_and_versions_are_of_this_machine():
    assert hardware()["cpus"] == len(os.sched_getaffinity(0))
    assert versions()["python"] == ".".join(map(str, sys.version_info[:3]))
    assert re.match(r"\d+\.\d+", versions()["torch"])


def test_score_prints_one_object_equal_to_the_entry_twice_and_without_a_shell(tiny_run, capfd):
    arguments = ["score", "--artifact", str(tiny_run.artifact), "--val", str(tiny_run.data)]
    assert main(arguments) == 0
    captured = capfd.readouterr()
    printed = json.loads(captured.out)  # one JSON document, nothing else
    assert captured.out.count("\n") == 1
    assert printed["bpb"] == tiny_run.summary["val_bpb"]
    assert printed["tokens"] == tiny_run.summary["val_tokens"]
    assert printed["bytes"] == tiny_run.summary["val_bytes"]
    assert printed["sha256"]["artifact"] == hashlib.sha256(tiny_run.artifact.read_bytes()).hexdigest()
    # Again, as a container does it and with an empty PATH: no program is looked for by name, so no shell either.
    again = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"PATH": str(tiny_run.folder)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) | {"seconds": 0} == printed | {"seconds": 0}


def test_score_of_a_damaged_artifact_is_an_error(tiny_run, tmp_path, capfd):
    bad = tmp_path / "bad.artifact"
    bad.write_bytes(tiny_run.artifact.read_bytes()[:-1])
    assert main(["score", "--artifact", str(bad), "--val", str(tiny_run.data)]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "ArtifactError" in captured.err


def test_other_commands_become_the_program_and_keep_its_status(tmp_path):
    """`train` in a fresh process: the entry's own message and status, from any folder, with nothing installed."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "train", "--no_such_option", "1"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "--no_such_option" in done.stderr
    assert "ConfigError" in done.stderr
