"""python -m common.artifact inspect FILE."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.artifact.__main__ import main, split_place
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


def test_a_page_has_treemaps_every_tensor_and_nothing_from_outside(golden_artifact, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["inspect", str(golden_artifact), "--html", str(page)]) == 0
    assert f"page: {page}" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    report = read_artifact(golden_artifact)[2]
    assert text.count("<svg") == 2
    for tensor in report.tensors:
        assert (f"{tensor.name}: {tensor.total_bytes:,} bytes" in text) == (tensor.total_bytes > 0)  # in the treemap
        assert f"<td>{tensor.name}</td>" in text
    assert f"header, checksum: {report.overhead_bytes:,} bytes" in text
    assert not re.search(r"(?:src|href)=|url\(|<script", text)


def test_a_page_that_cannot_be_written_is_an_error(golden_artifact, tmp_path, capsys):
    assert main(["inspect", str(golden_artifact), "--html", str(tmp_path / "none" / "page.html")]) == 2
    assert "none" in capsys.readouterr().err


def test_tables_on_a_terminal_hold_the_same_cells(golden_artifact, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", str(golden_artifact)]) == 0
    output = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    report = read_artifact(golden_artifact)[2]
    for tensor in report.tensors:
        place, name = split_place(tensor.name)
        row = re.search(rf"^ *{re.escape(name)} .* {tensor.total_bytes:,} ", output, re.MULTILINE)
        assert row, tensor.name
        assert not place or re.search(rf"^ *{re.escape(place)} *$", output, re.MULTILINE), place
    assert f"{report.file_bytes:,} bytes" in output
    assert "█" in output
    assert '"d_model": 512' in output


@pytest.mark.parametrize(
    ("place", "name"),
    [("blocks.3.", "up.weight"), ("a/layer_0/", "ffn/kernel"), ("lm.", "norm.weight"), ("", "bias"), ("", "D2")],
)
def test_names_are_cut_behind_their_number(place, name):
    assert split_place(place + name) == (place, name)


def test_without_rich_the_tables_are_plain(golden_artifact, capsys, monkeypatch):
    assert main(["inspect", str(golden_artifact)]) == 0
    plain = capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["inspect", str(golden_artifact)]) == 0
    assert capsys.readouterr().out == plain
