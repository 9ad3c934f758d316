"""scripts/plot_run.py draws what the run folder says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from scripts.plot_run import compact, draw_run, plot_run, read_events, smoothed


def write_run(folder: Path, *, finished: bool) -> Path:
    folder.mkdir()
    events = []
    for step in range(1, 41):
        fall = math.exp(-step / 10)
        events.append({
            "event": "step", "step": step, "elapsed_s": 2.0 * step, "tokens": 1000 * step, "tokens_per_s": 500.0,
            "lr_scale": min(1.0, (40 - step) / 20), "grad_norm": 1 + fall, "ce": 2 + fall, "sigreg": fall,
            "train_bpb": 1.5 + 4 * fall,
        })  # fmt: skip
        if step % 10 == 0:
            validation = {"event": "validation", "step": step, "trained_tokens": 1000 * step, "val_bpb": 1.6 + 4 * fall}
            events.append(validation)
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    if finished:
        summary = {"val_bpb": 1.75, "params": 1234567, "artifact_bytes": 345678}
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        (folder / "demo.json").write_text(json.dumps({"xz_bpb": 1.59, "brotli_bpb": 1.44}), encoding="utf-8")
    return folder


def texts(figure) -> str:
    axes = figure.axes
    words = [t.get_text() for a in axes for t in [*a.texts, *(a.get_legend().get_texts() if a.get_legend() else [])]]
    return "\n".join([figure.get_suptitle(), *words])


def test_curves_are_those_of_the_log(tmp_path):
    figure = draw_run(write_run(tmp_path / "run", finished=True))
    main, objectives = figure.axes[0], figure.axes[1]
    curves = {line.get_label(): line.get_xydata() for line in main.lines}
    assert np.allclose(curves["validation, weights that would ship"][:, 0], [10_000, 20_000, 30_000, 40_000])
    assert np.allclose(curves["validation, weights that would ship"][-1, 1], 1.6 + 4 * math.exp(-4))
    assert curves["artifact, read back: 1.750"].tolist() == [[40_000, 1.75]]
    low, high = main.get_ylim()
    assert low < 1.44 < 1.75 < high
    assert [line.get_label() for line in objectives.lines] == ["cross-entropy", "SIGReg"]
    shown = texts(figure)
    for expected in ("run", "40k tokens in 80 s", "500 tokens/s", "1,234,567 parameters", "345,678 bytes"):
        assert expected in shown
    assert "xz -9 per document: 1.59" in shown
    assert "brotli -11 per document: 1.44" in shown


def test_unfinished_run_and_png(tmp_path):
    run = write_run(tmp_path / "run", finished=False)
    assert "artifact" not in texts(draw_run(run))
    out = plot_run(run)
    assert out == run / "curves.png"
    data = out.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 20_000
    assert plot_run(run, tmp_path / "again.png").read_bytes() == data
    assert sorted(path.name for path in run.iterdir()) == ["curves.png", "log.jsonl"]


def test_run_without_cross_entropy_still_draws(tmp_path):
    run = write_run(tmp_path / "run", finished=False)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [event | {"train_bpb": math.nan} for event in lines if event["event"] == "step"]
    (run / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")
    assert plot_run(run).stat().st_size > 10_000


def test_bad_run_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"log\.jsonl is missing"):
        read_events(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"event": "validation"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="no training step"):
        read_events(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"event": "step"}\n{"eve', encoding="utf-8")
    with pytest.raises(DataError, match=r"log\.jsonl:2: not a JSON object"):
        read_events(tmp_path)


def test_smoothing_has_no_lag_and_compact_numbers():
    values = np.arange(20.0)
    assert np.allclose(smoothed(values, 6)[3:-3], values[3:-3])
    assert np.allclose(smoothed(values, 1), values)
    assert np.isnan(smoothed(np.array([math.nan, 1.0]), 0)[0])
    assert [compact(x) for x in (0, 950, 1_500, 2_000_000, 3.25e9)] == ["0", "950", "1.5k", "2M", "3.25B"]
