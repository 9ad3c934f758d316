"""README.md says what is true: its file list is the tree, its table is what the program writes, its targets exist."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from common.errors import DataError
from scripts.readme_tables import (
    COLUMNS,
    WORLD_COLUMNS,
    read_record,
    read_world_record,
    render,
    replace_between,
    update,
)

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("common", "submissions", "worldmodel", "referee", "scripts")


def listed_paths(readme: str) -> list[str]:
    """Paths of the fenced tree under "File structure": two spaces a level, folders end in a slash."""
    block = re.search(r"## File structure\n\n```\n(.*?)\n```", readme, re.DOTALL)
    assert block is not None, "README.md has no fenced tree under '## File structure'"
    folders: list[str] = []
    paths = []
    for line in block.group(1).splitlines():
        depth = (len(line) - len(line.lstrip(" "))) // 2
        name = line.split()[0]
        folders = folders[:depth]
        paths.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return paths


def problems(root: Path) -> list[str]:
    paths = listed_paths((root / "README.md").read_text(encoding="utf-8"))
    found = [f"{path} is listed but does not exist" for path in paths if not (root / path).exists()]
    for room in ROOMS:
        for path in sorted((root / room).rglob("*")):
            rel = path.relative_to(root).as_posix()
            if path.suffix in (".py", ".sh", ".md") and path.name != "__init__.py" and rel not in paths:
                found.append(f"{rel} exists but is not listed")
    return found + [f"{path} is listed twice" for path in sorted({path for path in paths if paths.count(path) > 1})]


def test_file_structure_is_the_tree():
    assert problems(ROOT) == []


def test_file_structure_faults_are_found(tmp_path):
    (tmp_path / "common" / "x").mkdir(parents=True)
    (tmp_path / "common" / "x" / "__init__.py").touch()
    (tmp_path / "common" / "x" / "new.py").touch()
    tree = "## File structure\n\n```\ncommon/   parts\n  x/   one\n    gone.py   was here\n```\n"
    (tmp_path / "README.md").write_text(tree, encoding="utf-8")
    assert problems(tmp_path) == [
        "common/x/gone.py is listed but does not exist",
        "common/x/new.py exists but is not listed",
    ]


def test_every_named_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set()
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for words in re.findall(r"(?:^|`)make((?: [a-z-]+)+)", text, re.MULTILINE):
            named |= set(words.split())
    assert {"demo", "test", "bundle", "lint"} <= named
    assert named - targets == set()


def test_table_is_what_the_program_writes(tmp_path):
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "results.json", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    update(tmp_path, [])
    for name in ("README.md", "docs/results.json"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes(), f"{name} was edited by hand: make readme"


SUMMARY = {
    "val_bpb": 1.98768, "float_val_bpb": 1.98, "artifact_bytes": 812345, "total_bytes": 900000, "params": 3_000_000,
    "tokens": 1_048_576, "train_s": 241.7, "val_bytes": 1_234_567, "seed": 42,
}  # fmt: skip


def _run(folder: Path, summary: dict, demo: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    if demo is not None:
        (folder / "demo.json").write_text(json.dumps(demo), encoding="utf-8")
    return folder


def test_update_adds_and_replaces_runs(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.json").write_text('{"results": [], "worlds": []}', encoding="utf-8")
    text = "a\n<!-- results:begin (x) -->\nold\n<!-- results:end -->\n<!-- worlds:begin --><!-- worlds:end -->\nz"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    run = _run(tmp_path / "runs" / "demo", SUMMARY, {"xz_bpb": 1.59, "brotli_bpb": 1.44})
    update(tmp_path, [run])
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"val_bpb": 1.5}), encoding="utf-8")
    update(tmp_path, [run, _run(tmp_path / "runs" / "a", SUMMARY)])
    lines = (tmp_path / "README.md").read_text(encoding="utf-8").splitlines()
    assert (lines[0], lines[-1]) == ("a", "z")
    assert "old" not in lines
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert rows[0] == list(COLUMNS.values())
    sizes = ["812,345", "900,000", "3,000,000", "1,048,576", "242", "1,234,567"]
    assert rows[2] == ["a", "1.9877", "1.9800", "–", "–", *sizes]
    assert rows[3] == ["demo", "1.5000", "1.9800", "1.5900", "1.4400", *sizes]
    assert len(rows) == 4


def _entry(value: float) -> dict:
    return {"value": value, "low": value - 0.5, "high": value + 0.25}


def test_update_adds_world_models_with_their_film(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.json").write_text('{"results": [], "worlds": []}', encoding="utf-8")
    text = "<!-- results:begin --><!-- results:end -->\n<!-- worlds:begin --><!-- worlds:end -->"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    run = tmp_path / "runs" / "coinrun-cpu"
    (run / "rollouts").mkdir(parents=True)
    (run / "rollouts" / "overview.gif").write_bytes(b"film")
    scores = {
        "tokenizer_psnr_db": _entry(27), "delta_psnr_db": _entry(4), "speed": {"frames_per_s": 201.0},
        "data": {"clips": 1024}, "action_codes": {"used": 6, "of": 6},
        "horizons": {h: {"above_copy_last_db": _entry(int(h))} for h in ("1", "4", "8")},
    }  # fmt: skip
    world = {"artifact": scores, "artifact_bytes": 1_273_238}
    document = {"dynamics": world, "dynamics_latent": world, "seconds_total": 90.0}
    (run / "evaluation.json").write_text(json.dumps(document), encoding="utf-8")
    update(tmp_path, [run])
    assert (tmp_path / "docs" / "coinrun-cpu.gif").read_bytes() == b"film"
    row = (tmp_path / "README.md").read_text(encoding="utf-8").splitlines()[-2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert dict(zip(WORLD_COLUMNS, cells, strict=True)) == {
        "run": "coinrun-cpu", "tokenizer_psnr_db": "27.00 [26.50, 27.25]",
        "above_copy_last_db_at_1": "1.00 [0.50, 1.25]", "above_copy_last_db_at_4": "4.00 [3.50, 4.25]",
        "above_copy_last_db_at_8": "8.00 [7.50, 8.25]", "delta_psnr_db": "4.00 [3.50, 4.25]",
        "latent_delta_psnr_db": "4.00 [3.50, 4.25]", "latent_actions_used": "6 of 6", "frames_per_s": "201",
        "artifact_bytes": "1,273,238", "minutes": "1.5", "clips": "1,024",
    }  # fmt: skip
    del document["dynamics_latent"]
    (run / "evaluation.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(DataError, match=r"evaluation\.json has no 'dynamics_latent'"):
        read_world_record(run)


def test_bad_run_folders_and_texts_are_named(tmp_path):
    with pytest.raises(DataError, match=r"summary\.json is missing"):
        read_record(tmp_path)
    with pytest.raises(DataError, match="has no val_bpb"):
        read_record(_run(tmp_path / "x", {name: 1 for name in SUMMARY if name != "val_bpb"}))
    for text in ("nothing", "<!-- results:end --> <!-- results:begin -->"):
        with pytest.raises(DataError, match="markers"):
            replace_between(text, "results", "new")
    assert "No run" in render([], COLUMNS)
