"""scripts/verify_artifact_size.py: the table adds up, the status says whether it fits, `common.artifact` agrees."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.artifact.__main__ import main as artifact_main
from common.artifact.container import save_artifact
from common.quant.grid import quantize
from scripts.bundle import ENTRY, ROOT, make_bundle
from scripts.verify_artifact_size import MEASURED, main, preset_layout
from submissions.jepa_mamba.train_gpt import (
    Config,
    Masters,
    TrainingModel,
    compute_dtype,
    read_preset,
    select_kernels,
)

PRESET = '''"""Tiny."""

PRESET = {
    "vocab_size": 512, "model_dim": 64, "num_layers": 2, "headdim": 32, "d_state": 16, "embed_dim": 32, "chunk_size": 16
}
'''


@pytest.fixture
def preset(tmp_path) -> str:
    path = tmp_path / "tiny.py"
    path.write_text(PRESET, encoding="utf-8")
    return str(path)


def row(printed: str, name: str) -> int:
    found = re.search(rf"^{name}\b.*?([\d,-]+)$", printed, re.MULTILINE)
    assert found is not None, printed
    return int(found[1].replace(",", ""))


def test_table_adds_up_and_fits_and_the_other_command_agrees(preset, tmp_path, capsys):
    layout = tmp_path / "layout.json"
    assert main(["--preset", preset, "--layout", str(layout)]) == 0
    printed = capsys.readouterr().out
    code_bytes = make_bundle(ROOT, ENTRY, read_preset(preset)).code_bytes
    assert row(printed, "code") == code_bytes
    assert row(printed, "total") == row(printed, "artifact") + code_bytes
    assert row(printed, "margin") == 16_000_000 - row(printed, "total")
    assert "int4" in printed
    assert "jepa" not in printed.split("code")[0].replace("jepa_mamba", "").replace(preset, "")
    options = ["--predict", str(layout), "--measured", str(MEASURED), "--code-bytes", str(code_bytes)]
    assert artifact_main(["budget", *options]) == 0
    assert row(capsys.readouterr().out, "artifact") == row(printed, "artifact")


def test_a_layout_is_what_training_ships(preset):
    config = replace(Config(), **read_preset(preset))
    model = TrainingModel(config, select_kernels("torch", torch.device("cpu")))
    shipped = Masters(model, config, compute_dtype(model.lm.token_embed.weight.device)).quantized()
    assert preset_layout(preset) == {name: (q.shape, q.spec) for name, q in shipped.items()}


def test_over_budget_is_status_1_and_says_by_how_much(preset, capsys):
    assert main(["--preset", preset, "--budget_bytes", "1000"]) == 1
    captured = capsys.readouterr()
    over = row(captured.out, "total") - 1000
    assert f"{over:,} over the budget of 1,000" in captured.err


def test_given_artifact_is_weighed(preset, tmp_path, capsys):
    path = tmp_path / "some.artifact"
    rng = np.random.default_rng(0)
    layout = preset_layout(preset)
    state = {name: rng.standard_normal(shape).astype(np.float32) for name, (shape, _) in layout.items()}
    report = save_artifact(path, {name: quantize(w, layout[name][1], name) for name, w in state.items()}, {})
    assert main(["--preset", preset, "--artifact", str(path)]) == 0
    assert row(capsys.readouterr().out, "artifact") == report.file_bytes == path.stat().st_size


def test_bad_input_is_status_2(preset, tmp_path, capsys):
    assert main(["--artifact", str(tmp_path / "none"), "--preset", preset]) == 2
    assert main(["--preset", "no_such_preset"]) == 2
    assert main(["--preset", preset, "--measured", str(tmp_path / "none")]) == 2
    (tmp_path / "bad").write_bytes(b"not an artifact")
    assert main(["--artifact", str(tmp_path / "bad"), "--preset", preset]) == 2
    (tmp_path / "sizes").write_text(json.dumps([{"label": "x"}]), encoding="utf-8")
    assert main(["--preset", preset, "--measured", str(tmp_path / "sizes")]) == 2
    (tmp_path / "free.py").write_text(PRESET.replace('{\n', '{"free_steps": True,\n'), encoding="utf-8")
    assert main(["--preset", str(tmp_path / "free.py")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) >= 6
    assert "nothing to predict" in errors[-1]
