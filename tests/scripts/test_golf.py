"""Tracks: their rules, their tables, `make golf-mini` with a stand-in for the entry and, slow, with the entry."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError, DataError, GolfError
from scripts import golf, leaderboard
from scripts.leaderboard import TRACKS, broken_rules, page, ranked, read_run, read_store, update

MINI = TRACKS["mini"]
SUMMARY = {
    "val_bpb": 1.7, "val_loss": 3.0, "float_val_bpb": 1.69, "val_bytes": 1000, "val_sha256": "a" * 64,
    "tokenizer_sha256": "b", "tokenizer_lossless": True, "eval_mode": "carried", "artifact_bytes": 450_000,
    "artifact_sha256": "c", "total_bytes": 700_000, "params": 1_000_000, "steps": 900, "tokens": 9, "train_s": 599.5,
    "clock": "wall", "seed": 1, "code_sha256": "d", "config": {"vocab_size": 1024},
    "environment": {"threads": 2, "gpus": []},
}  # fmt: skip


def some_text(folder: Path) -> Path:
    """Documents of many words, enough for a vocabulary of 1,024."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, size))) for size in rng.integers(3, 9, 600)]
    for i in range(60):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 300)))
    return folder


def run_folder(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(SUMMARY | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"artifact_bytes": 500_001}, "artifact_bytes is 500,001, at most 500,000"),
        ({"train_s": 600.2}, "600.20 s"), ({"clock": "cpu"}, "clock was 'cpu'"),
        ({"tokenizer_lossless": False}, "lossy"), ({"config": {"vocab_size": 8192}}, "8192 entries"),
        ({"environment": {"threads": 4, "gpus": []}}, "4 threads"),
        ({"environment": {"threads": 1, "gpus": ["NVIDIA H200"]}}, "H200"),
    ],
)  # fmt: skip
def test_a_run_that_breaks_a_rule_does_not_enter(tmp_path: Path, changes: dict, says: str) -> None:
    assert broken_rules(SUMMARY, MINI) == []
    with pytest.raises(DataError, match=says):
        read_run(run_folder(tmp_path / "r", **changes), MINI)


def test_gpu_tracks_ask_for_their_machine() -> None:
    on_h200 = SUMMARY | {"environment": {"gpus": ["NVIDIA H200"]}, "config": {"vocab_size": 8192}}
    assert broken_rules(on_h200, TRACKS["h200"]) == []
    assert "8 x H100" in broken_rules(on_h200, TRACKS["full"])[0]
    assert "total_bytes" in broken_rules(on_h200 | {"total_bytes": 16_000_001}, TRACKS["h200"])[0]


def test_the_table_ranks_means_and_never_mixes_texts(tmp_path: Path) -> None:
    runs = [
        run_folder(tmp_path / "mini-good-seed1", val_bpb=1.60),
        run_folder(tmp_path / "mini-good-seed2", seed=2, val_bpb=1.64),
        run_folder(tmp_path / "mini-bad-seed1", val_bpb=1.63),
        run_folder(tmp_path / "else-seed1", val_sha256="e" * 64),
    ]
    texts = {"a" * 64: {"name": "docs", "yardsticks": {"brotli": 1.625}}}
    update(MINI, runs[:2], texts, tmp_path / "boards")
    store = update(MINI, runs[2:], {}, tmp_path / "boards")
    assert store == read_store(MINI, tmp_path / "boards")
    rows = ranked([r for r in store["runs"] if r["val_sha256"] == "a" * 64])
    assert [(r["recipe"], r["seeds"]) for r in rows] == [("mini-good", 2), ("mini-bad", 1)]
    assert rows[0]["val_bpb"] == pytest.approx(1.62)
    assert rows[0]["sd"] == pytest.approx(0.0282843, abs=1e-6)
    text = (tmp_path / "boards/mini.md").read_text()
    assert text == page(MINI, store)
    lines = [line for line in text.splitlines() if line.startswith("| ") and "place" not in line and "---" not in line]
    named = [line.split(" | ")[:2] for line in lines[:3]]
    assert named == [["| 1", "mini-good"], ["| –", "brotli"], ["| 2", "mini-bad"]]
    assert text.count("## ") == 2
    again = update(MINI, [run_folder(tmp_path / "mini-bad-seed1", val_bpb=1.5)], {}, tmp_path / "boards")
    assert len(again["runs"]) == 4  # replaced, not added


def test_committed_tables_are_what_the_program_writes() -> None:
    for track in TRACKS.values():
        text = (leaderboard.FOLDER / f"{track.name}.md").read_text(encoding="utf-8")
        assert text == page(track, read_store(track)), f"{track.name}.md was edited by hand: make leaderboard"


def test_corpora(tmp_path: Path) -> None:
    assert golf.corpus_arguments("") == ("stdlib", ["--source", "stdlib"])
    assert golf.corpus_arguments(str(tmp_path)) == (tmp_path.stem, ["--source", str(tmp_path)])
    (tmp_path / "docs.train.jsonl.xz").touch()
    with pytest.raises(ConfigError, match=r"1 \*\.train\.jsonl\* and 0"):
        golf.corpus_arguments(str(tmp_path))
    (tmp_path / "docs.val.jsonl.xz").touch()
    name, sources = golf.corpus_arguments(str(tmp_path))
    assert (name, sources[2]) == ("docs", "--val-source")
    with pytest.raises(ConfigError, match="does not exist"):
        golf.corpus_arguments(str(tmp_path / "nothing"))


def test_text_is_prepared_once_and_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = some_text(tmp_path / "text")
    monkeypatch.setattr(golf, "ROOT", tmp_path)
    track = dataclasses.replace(MINI, vocab_size=400)
    folder = golf.prepare(track, str(source), None)
    assert folder == tmp_path / "data" / "text-bpe400"
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert "yardsticks.json" in before
    assert golf.prepare(track, str(source), None) == folder
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/yardsticks.json").write_text(json.dumps({"a" * 64: {"name": "t", "yardsticks": {"xz": 2.3}}}))
    return tmp_path / "data"


def test_a_second_run_repeats_the_first_and_must_equal_it(tmp_path: Path, data: Path, monkeypatch, capsys) -> None:
    commands, outcome = [], {"val_bpb": 1.7}

    def fake(script: Path, *arguments: str) -> str:
        commands.append([str(script), *arguments])
        options = dict(zip(arguments[::2], arguments[1::2]))
        run_folder(Path(options["--runs_dir"]) / options["--run_id"], **outcome)
        return ""

    monkeypatch.setattr(golf, "run_script", fake)
    monkeypatch.setattr(golf, "FOLDER", tmp_path / "boards")
    rest = (MINI, data, tmp_path / "runs", 1, "jepa_mamba", "best_mini")
    golf.golf(*rest, fresh=False)
    assert "--clock_from" not in commands[0]
    assert commands[0][commands[0].index("--max_wallclock_seconds") + 1] == "600"
    assert commands[0][commands[0].index("--compile_model") + 1] == "1"
    assert "place 1 of 1: mini-best_mini, 1.7000 bpb" in capsys.readouterr().out
    golf.golf(*rest, fresh=False)
    assert commands[1][commands[1].index("--clock_from") + 1].endswith("runs/mini-best_mini-seed1")
    assert "equal bit for bit" in capsys.readouterr().out
    outcome["val_bpb"] = 1.7 + 1e-12
    with pytest.raises(GolfError, match=r"not .* bit for bit"):
        golf.golf(*rest, fresh=False)
    outcome["artifact_bytes"] = 600_000
    with pytest.raises(DataError, match="breaks the rules"):
        golf.golf(*rest, fresh=True)


@pytest.mark.slow
def test_golf_with_the_entry_is_the_same_bit_for_bit(tmp_path: Path, capfd, monkeypatch) -> None:
    source = some_text(tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    small = {"model_dim": 32, "num_layers": 2, "attn_layers": 1, "attn_headdim": 16, "headdim": 16, "chunk_size": 16}
    small |= {"train_seq_len": 64, "train_batch_tokens": 512, "max_wallclock_seconds": 6}
    where = ["mini", "--corpus", str(source), "--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs")]
    for _ in range(2):
        assert golf.main([*where, *(f"--{name}={value}" for name, value in small.items())]) == 0, capfd.readouterr()
    told = capfd.readouterr().out
    assert "equal bit for bit" in told
    assert "place 1 of 1" in told
    assert "xz -9, per document" in told
