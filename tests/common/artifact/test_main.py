"""python -m common.artifact inspect FILE."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.artifact.__main__ import main
from common.artifact.container import read_artifact

ROOT = Path(__file__).resolve().parents[3]


def test_every_tensor_has_its_line_and_totals_follow(golden_artifact, capsys):
    assert main(["inspect", str(golden_artifact)]) == 0
    output = capsys.readouterr().out
    report = read_artifact(golden_artifact)[2]
    for tensor in report.tensors:
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        bits = f"{tensor.bits_per_weight:.3f}" if tensor.n_weights else "-"
        row = rf"^{re.escape(tensor.name)} +{shape} +{re.escape(tensor.grid)} +{bits} +{tensor.total_bytes:,}$"
        assert re.search(row, output, re.MULTILINE), row
    assert re.search(rf"^artifact .* {report.file_bytes:,}$", output, re.MULTILINE)
    assert '"d_model": 512' in output


def test_as_a_command(golden_artifact):
    command = [sys.executable, "-m", "common.artifact", "inspect"]
    done = subprocess.run([*command, str(golden_artifact)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize("content", [b"", b"\x93GOLF", b"%PDF-1.7\n" * 10])
def test_a_bad_file_is_one_line_and_status_2(tmp_path, capsys, content):
    path = tmp_path / "bad.artifact"
    path.write_bytes(content)
    assert main(["inspect", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {path}: ")
    assert captured.err.count("\n") == 1


def test_a_missing_file(capsys, tmp_path):
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_usage():
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == 2
