"""scripts/bench/worldmodel.py: the whole of it at tiny sizes."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("jax")
pytest.importorskip("procgen")

from scripts.bench.worldmodel import Shapes, Timing, main, median_ms, stage_config

TINY = {
    "dim": 8, "ffn-dim": 8, "heads": 2, "codes": 8, "latent-dim": 4, "batch-size": 2, "seq-len": 3, "patch": 32,
    "steps": 2, "clips": 2, "decode-steps": 25, "sample-layers": 1, "repeats": 1, "frames": 2560, "batches": 2,
}  # fmt: skip


def test_medians_are_milliseconds_a_piece():
    timings = [Timing(wall_s=4.0, cpu_s=1.0), Timing(wall_s=8.0, cpu_s=3.0), Timing(wall_s=6.0, cpu_s=9.0)]
    assert median_ms(timings, 10) == pytest.approx({"wall_ms": 600.0, "cpu_ms": 300.0})


def test_every_part_is_measured_and_written(tmp_path):
    path = tmp_path / "new" / "bench.json"
    sizes = [part for name, value in TINY.items() for part in (f"--{name}", str(value))]
    main([*sizes, "--stages", "tokenizer", "dynamics", "--json", str(path)])
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["train"].keys() == {"shapes", "tokenizer", "dynamics"}
    assert report["train"]["shapes"]["dim"] == TINY["dim"]
    assert report["train"]["tokenizer"]["cpu_ms"] > 0
    assert report["train"]["dynamics"]["cpu_ms"] > 0
    assert report["sample"]["cpu_ms"] > 0
    assert report["sample"]["passes"] == 4  # a frame of four tokens, whatever was asked for
    assert all(row["frames"] >= TINY["frames"] and row["bytes_per_frame"] > 0 for row in report["data"]["collect"])
    assert all(row["samples_per_s"] > 0 for row in report["data"]["loader"])


def test_sizes_make_the_published_form():
    config = stage_config("dynamics", Shapes(dim=32, patch=8, seq_len=6))
    assert config.dynamics.masking == "all"
    assert stage_config("dynamics-two-stream", Shapes()).dynamics.masking == "current"
    assert config.dynamics.blocks.temporal_window == 6
    assert config.tokenizer.frame.tokens == 64
    assert {config.dynamics.blocks.dim, config.tokenizer.encoder.dim, config.lam.decoder.dim} == {32}
