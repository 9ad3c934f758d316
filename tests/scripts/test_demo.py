"""scripts/demo.py: its yardsticks, its byte counts, and the whole of it on a small text with a tiny model."""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path

import brotli
import pytest

from common.errors import DataError, GolfError
from scripts import demo
from scripts.demo import ROOT, compressed_bpb, results_table, run_demo, run_script, validation_documents

VOCAB_SIZE = 330
TINY = {
    "model_dim": 32, "num_layers": 2, "headdim": 16, "d_state": 8, "chunk_size": 16, "embed_dim": 16,
    "attn_layers": "", "train_seq_len": 32, "train_batch_tokens": 128, "micro_batch_tokens": 128, "iterations": 3,
    "warmup_steps": 0, "max_wallclock_seconds": 0, "warmdown_by": "steps", "sigreg_num_proj": 8,
    "sigreg_timesteps": 8, "val_loss_every": 2, "eval_modes": "standard", "temp_calib_tokens": 128,
    "train_log_every": 1, "checkpoint_every": 0, "device": "cpu", "jepa_diagnostics": 0,
}  # fmt: skip


def write_text(folder: Path, documents: int) -> Path:
    folder.mkdir(parents=True)
    words = ["the", "a", "model", "reads", "text", "and", "bytes", "Ünïcode", "→", "def", "return\n", "▁", "22"]
    for i in range(documents):
        rng = random.Random(i)
        text = " ".join(rng.choice(words) for _ in range(150 + 10 * i))
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    base = tmp_path_factory.mktemp("demo")
    arguments = ("--tokenizer", "bpe", "--vocab-size", str(VOCAB_SIZE), "--val-fraction", "0.2", "--workers", "1")
    text = write_text(base / "text", 40)
    run_script(ROOT / "scripts" / "prepare_text.py", "--source", str(text), "--out", str(base / "data"), *arguments)
    return base


def test_validation_documents_are_the_original_texts(prepared):
    documents = validation_documents(prepared / "data")
    originals = {path.read_bytes() for path in (prepared / "text").iterdir()}
    assert 2 <= len(documents) < 40
    assert set(documents) < originals


def test_wrong_manifest_is_found(prepared, tmp_path):
    for path in (prepared / "data").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    manifest["splits"]["val"]["original_bytes"] += 1
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(DataError, match="prepare the folder anew"):
        validation_documents(tmp_path)


def test_yardsticks_are_bits_over_bytes_per_document():
    documents = [b"abc" * 1000, bytes(range(256)) * 3, "ünï".encode() * 50]
    found = compressed_bpb(documents)
    total = sum(map(len, documents))
    assert found["xz_bpb"] == 8 * sum(len(lzma.compress(d, preset=9)) for d in documents) / total
    assert found["brotli_bpb"] == 8 * sum(len(brotli.compress(d, quality=11, lgwin=24)) for d in documents) / total
    assert found["xz_bpb"] > 8 * len(lzma.compress(b"".join(documents), preset=9)) / total


def test_failing_script_is_an_error(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import sys\nsys.exit(3)\n", encoding="utf-8")
    with pytest.raises(GolfError, match=r"fails\.py ended with status 3"):
        run_script(script)


def test_the_whole_demo_on_a_small_text(tmp_path, capfd):
    text = write_text(tmp_path / "text", 60)
    flags = [part for name, value in TINY.items() for part in (f"--{name}", str(value))]
    for _ in range(2):  # the second finds everything prepared, and replaces the finished run
        result = run_demo(tmp_path / "data", tmp_path / "runs", "tiny", VOCAB_SIZE, flags, str(text))
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "demo.json").read_text(encoding="utf-8")) == result
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert result["val_bpb"] == summary["val_bpb"]
    assert result["val_bytes"] == sum(map(len, validation_documents(tmp_path / "data")))
    assert result["sample"].startswith("def read_lines(path):")
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "model.artifact").stat().st_size == result["artifact_bytes"]
    printed = capfd.readouterr().out
    assert results_table(result) in printed
    assert "already prepared" in printed
    for part in ("xz -9", "brotli -11", f"{result['val_bpb']:.4f}", "16,000,000", "curves.png"):
        assert part in printed


def test_paths_are_meant_from_the_working_folder(tmp_path, monkeypatch):
    """Its programs run in the repository, which is another folder in a container."""
    given: list[object] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "run_demo", lambda *arguments: given.extend(arguments))
    assert demo.main(["--data", "text", "--runs", "out", "--iterations", "4"]) == 0
    assert given == [tmp_path / "text", tmp_path / "out", "demo", 1024, ["--iterations", "4"]]
