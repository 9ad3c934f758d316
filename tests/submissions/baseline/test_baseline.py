"""The plain transformer: one small run through its whole life, its score counted again, its refusals."""

from __future__ import annotations

import itertools
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from common.artifact.container import encode_artifact
from common.errors import ArtifactError, ConfigError
from common.text.shards import write_shard
from submissions.baseline import train_gpt
from submissions.baseline.train_gpt import (
    Config,
    Transformer,
    check_config,
    load,
    main,
    parse_command,
    scoring_windows,
    stream_nll,
)

CPU = torch.device("cpu")
TINY = {
    "device": "cpu", "tokenizer": "byte", "vocab_size": 256, "model_dim": 16, "num_layers": 3, "num_heads": 4,
    "num_kv_heads": 2, "train_seq_len": 16, "train_batch_tokens": 128, "micro_batch_tokens": 64, "iterations": 12,
    "max_wallclock_seconds": 0.0, "train_log_every": 1, "val_batch_tokens": 64, "muon_momentum_warmup_steps": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, size in (("train", 4000), ("val", 301)):
        text = np.random.default_rng(size).choice(np.frombuffer(b"the cat sat", np.uint8), size)
        write_shard(folder / f"tiny_{split}_000000.bin", text.astype(np.uint16))
    return folder


def flags(data: Path, runs: Path, **changes: object) -> list[str]:
    return [f"--{k}={v}" for k, v in {**TINY, "data_path": data, "runs_dir": runs, **changes}.items()]


def test_a_run_from_shards_to_score(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(data, tmp_path, run_id="a")) == 0
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5
    assert (summary["steps"], summary["tokens"], summary["val_tokens"], summary["val_bytes"]) == (12, 1536, 300, 300)
    assert summary["val_bpb"] == pytest.approx(summary["val_loss"] / math.log(2))
    assert 0 < abs(summary["quantization_gap_bpb"]) < 0.05
    assert summary["artifact_bytes"] == (tmp_path / "a/model.artifact").stat().st_size < 1.1 * summary["params"]
    capsys.readouterr()
    score = ["--score", str(tmp_path / "a/model.artifact"), "--val", str(data / "*_val_*.bin"), "--device=cpu"]
    # In batches of the run's size: some processors' products add up those of another size in another order.
    assert main([*score, f"--val_batch_tokens={TINY['val_batch_tokens']}"]) == 0
    assert json.loads(capsys.readouterr().out)["val_bpb"] == summary["val_bpb"]
    # the same seed is the same run, another one is not, a finished run stays
    assert main(flags(data, tmp_path, run_id="b")) == 0
    assert main(flags(data, tmp_path, run_id="c", seed=7)) == 0
    again, other = (json.loads((tmp_path / f"{run}/summary.json").read_text())["val_bpb"] for run in "bc")
    assert again == summary["val_bpb"] != other
    assert main(flags(data, tmp_path, run_id="a")) == 2
    assert "is finished" in capsys.readouterr().err


def test_compiling_learns_nothing_and_may_be_impossible(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    said, shapes = {}, []

    def compiled(loss):
        return lambda x, y: shapes.append(tuple(x.shape)) or loss(x, y)

    monkeypatch.setattr(torch, "compile", compiled)
    for run, obstacle in (("plain", ""), ("compiled", ""), ("impossible", "no compiler")):
        monkeypatch.setattr(train_gpt, "compile_obstacle", lambda device, obstacle=obstacle: obstacle)
        assert main(flags(data, tmp_path, run_id=run, compile_model=int(run != "plain"))) == 0
        said[run] = json.loads((tmp_path / run / "summary.json").read_text())["artifact_sha256"]
    assert set(said.values()) == {said["plain"]}
    assert shapes == [(4, 16)] * (1 + 12 * 2)  # once before the clock, then every micro-batch
    assert "loss not compiled: no compiler" in capsys.readouterr().out


def test_clock_stops_the_run_and_reaches_the_end_of_the_schedule(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(train_gpt.time, "process_time", lambda: next(ticks) / 32)  # a reading a step
    options = {"run_id": "t", "clock": "cpu", "max_wallclock_seconds": 0.5, "iterations": 100000}
    assert main(flags(data, tmp_path, **options)) == 0
    summary = json.loads((tmp_path / "t/summary.json").read_text())
    last = json.loads((tmp_path / "t/log.jsonl").read_text().splitlines()[-1])
    # A sixteenth step could end at 0.5, with no time to spare.
    assert (summary["steps"], summary["train_s"]) == (15, 15 / 32)
    assert last["lr_scale"] == pytest.approx((1 - 14 / 16) / Config().warmdown_fraction)


def test_windows_score_every_target_once() -> None:
    for targets, length, stride in ((50, 16, 0), (50, 16, 4), (16, 16, 4), (7, 16, 0), (33, 16, 16)):
        scored = [t for _, end, first in scoring_windows(targets, length, stride) for t in range(first, end)]
        assert scored == list(range(targets))


def test_later_tokens_change_nothing_earlier_and_a_stride_gives_context() -> None:
    torch.manual_seed(0)
    config = Config(**{k: v for k, v in TINY.items() if k != "run_id"})  # pyright: ignore[reportArgumentType]
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = np.random.default_rng(0).integers(0, 256, 60).astype(np.uint16)
    changed = tokens.copy()
    changed[40:] = 3
    before, after = (stream_nll(model, t, config, CPU) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:39], after[:39])
    assert before[39] != after[39]
    strided = stream_nll(model, tokens, Config(**{**TINY, "eval_stride": 4}), CPU)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(strided[:16], before[:16], atol=1e-5)
    assert not np.allclose(strided[16:20], before[16:20])


def test_presets_are_valid_and_mini_fits_its_track() -> None:
    for preset in ("mini", "full"):
        _, config = parse_command(["--preset", preset])
        assert config.num_layers == 9
    _, mini = parse_command(["--preset", "mini"])
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(mini).parameters()) < 500_000


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_heads": 3}, "even multiple"), ({"num_kv_heads": 3}, "num_kv_heads must divide"),
        ({"model_dim": 0}, "must be at least 1"), ({"clock": "sun"}, "clock is wall or cpu"),
        ({"eval_stride": 17}, "eval_stride"), ({"model_dim": "x"}, "expected int"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_config(Config(**{**TINY, **options}))  # pyright: ignore[reportArgumentType]


def test_damaged_and_foreign_artifacts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.artifact"
    good = zlib.compress(encode_artifact({"w": np.zeros(3, np.float32)}, {"entry": "other"}, ("raw",)))
    for data, error, says in (
        (b"no", ArtifactError, "not zlib"), (good[:-3], ArtifactError, "truncated"),
        (good + b"x", ArtifactError, "extended"), (good, ConfigError, "not an artifact of this entry"),
    ):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(error, match=says):
            load(path, CPU)
