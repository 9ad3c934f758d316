"""scripts/verify_artifact_size.py: the table adds up, the exit status says whether it fits."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from scripts.bundle import ENTRY, ROOT, make_bundle
from scripts.verify_artifact_size import (
    FULL_RUN_STEPS,
    main,
    make_artifact,
    retained_share,
    text_like_tokens,
    train_briefly,
)
from submissions.jepa_mamba.train_gpt import Config, Ranks, Trainer, read_preset, select_kernels

PRESET = '''"""Tiny."""

PRESET = {
    "vocab_size": 512, "model_dim": 64, "num_layers": 2, "headdim": 32, "d_state": 16, "embed_dim": 32, "chunk_size": 16
}
'''
SHORT = ["--steps", "2", "--batch_tokens", "64", "--seq_len", "32"]


@pytest.fixture
def preset(tmp_path) -> str:
    path = tmp_path / "tiny.py"
    path.write_text(PRESET, encoding="utf-8")
    return str(path)


def row(printed: str, name: str) -> int:
    found = re.search(rf"^{name}\b.*?([\d,-]+)$", printed, re.MULTILINE)
    assert found is not None, printed
    return int(found[1].replace(",", ""))


def test_table_adds_up_and_fits(preset, capsys):
    assert main(["--preset", preset, *SHORT]) == 0
    printed = capsys.readouterr().out
    code_bytes = make_bundle(ROOT, ENTRY, read_preset(preset)).code_bytes
    assert row(printed, "code") == code_bytes
    assert row(printed, "total") == row(printed, "artifact") + code_bytes
    assert row(printed, "margin") == 16_000_000 - row(printed, "total")
    assert "int4" in printed
    assert "jepa" not in printed.split("code")[0].replace("jepa_mamba", "").replace(preset, "")


def test_over_budget_is_status_1_and_says_by_how_much(preset, capsys):
    assert main(["--preset", preset, *SHORT, "--budget_bytes", "1000"]) == 1
    captured = capsys.readouterr()
    over = row(captured.out, "total") - 1000
    assert f"{over:,} over the budget of 1,000" in captured.err


def test_given_artifact_is_weighed(preset, tmp_path, capsys):
    path = tmp_path / "some.artifact"
    report = make_artifact(preset, 1, 64, 32, path)
    assert main(["--preset", preset, "--artifact", str(path)]) == 0
    assert row(capsys.readouterr().out, "artifact") == report.file_bytes == path.stat().st_size


def test_bad_input_is_status_2(preset, tmp_path, capsys):
    assert main(["--artifact", str(tmp_path / "none"), "--preset", preset]) == 2
    assert main(["--preset", "no_such_preset"]) == 2
    assert main(["--preset", preset, "--steps", "0"]) == 2
    assert main(["--preset", preset, "--batch_tokens", "65", "--seq_len", "32"]) == 2
    (tmp_path / "bad").write_bytes(b"not an artifact")
    assert main(["--artifact", str(tmp_path / "bad"), "--preset", preset]) == 2
    assert len(capsys.readouterr().err.splitlines()) >= 5


def test_matrices_are_sums_of_updates_and_the_rest_is_as_trained(preset):
    config = replace(Config(), **read_preset(preset))
    device = torch.device("cpu")
    fresh = Trainer(replace(config, kernels="torch"), select_kernels("torch", device), Ranks(0, 1, device))
    made = train_briefly(config, 2, 64, 32)
    share = retained_share(config, config.matrix_lr, config.muon_wd, FULL_RUN_STEPS)
    assert 0 < share < 0.05
    for name in made.masters.groups()["muon"]:
        before, after = fresh.masters.master[name].detach(), made.masters.master[name].detach()
        assert float(after.std()) > 0, name
        if float(before.std()) > 0:  # some start at zero
            correlation = float(torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1])
            assert abs(correlation) < 0.5, name
    embedding = "lm.token_embed.weight"
    assert embedding in made.masters.groups()["embed"]
    moved = (made.masters.master[embedding] - fresh.masters.master[embedding]).detach()
    assert 0 < float(moved.abs().max()) <= 2.1 * config.embed_lr


def test_retained_share_is_the_product_over_the_schedule():
    flat = replace(Config(), warmdown_fraction=0.0)
    assert retained_share(flat, 0.02, 0.04, 1000) == pytest.approx((1 - 0.0008) ** 1000)
    falling = replace(Config(), warmdown_fraction=1.0)
    assert retained_share(falling, 0.02, 0.04, 1000) == pytest.approx((1 - 0.0004) ** 1000, rel=0.02)
    assert retained_share(flat, 0.02, 0.0, 10) == 1.0


def test_tokens_are_skewed_and_repeat():
    tokens = text_like_tokens(20_000, 1000, seed=1)
    assert tokens.min() >= 0
    assert tokens.max() < 1000
    counts = np.sort(np.bincount(tokens, minlength=1000))[::-1]
    assert counts[:10].sum() > 0.15 * len(tokens) > 10 * 10 / 1000 * len(tokens)
    pairs = tokens[:-1] * 1000 + tokens[1:]
    assert len(np.unique(pairs)) < 0.75 * len(pairs)
    assert np.array_equal(tokens, text_like_tokens(20_000, 1000, seed=1))
    assert not np.array_equal(tokens, text_like_tokens(20_000, 1000, seed=2))
