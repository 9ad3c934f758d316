"""Baselines, leaderboard and ablation: every configuration is valid, tables say what the documents say, runs resume."""

import dataclasses
import json

import numpy as np
import pytest

from common.errors import ConfigError
from tests.worldmodel.data.conftest import HEIGHT, WIDTH, write_set
from worldmodel import ablate, baselines
from worldmodel.ablate import (
    VARIANTS,
    AblateConfig,
    ablation_lines,
    changed,
    interval_over_seeds,
    run_key,
    summarised,
    with_references,
)
from worldmodel.baselines import BaselinesConfig, placed, wanted
from worldmodel.coinrun import load_profile
from worldmodel.config import BlockConfig, FrameConfig, Profile, RolloutConfig, TrainConfig, from_dict, to_dict
from worldmodel.configs.baselines import baselines as all_baselines
from worldmodel.configs.baselines import shortened
from worldmodel.leaderboard import cell, write_leaderboard


@pytest.mark.parametrize("name", ["cpu", "gpu", "paper"])
def test_every_baseline_and_variant_of_every_profile_is_a_valid_stage(name, tmp_path):
    known = all_baselines(load_profile(name))
    for each, baseline in known.items():
        stage = placed(baseline, tmp_path, each, "data", "tokens", 0.1)
        assert from_dict(TrainConfig, to_dict(stage)) == stage
        assert stage.optim.warmup_steps + stage.optim.decay_steps <= stage.steps <= 0.1 * baseline.train.steps + 2
        if baseline.tokenizer:  # the loader refuses a tokenizer of another configuration
            assert stage.tokenizer == known[baseline.tokenizer].train.tokenizer
            assert stage.tokenizer_run == str(tmp_path / baseline.tokenizer)
        if baseline.lam:
            assert stage.lam == known[baseline.lam].train.lam
    for variant in VARIANTS.values():
        stage = changed(known[variant.base].train, variant.changes)
        for field, value in variant.changes.items():
            node = to_dict(stage)
            for part in field.split("."):
                node = node[part]
            assert node == value
        assert variant.reference in VARIANTS


def test_what_a_baseline_needs_comes_first_and_wrong_names_are_named():
    known = all_baselines(load_profile("cpu"))
    assert list(wanted(known, ("maskgit-lam", "shortcut"))) == ["vqvae", "mae", "lam", "maskgit-lam", "shortcut"]
    assert list(wanted(known, ())) == list(known)
    with pytest.raises(ConfigError, match="no baseline 'maskgan'; there are vqvae, mae"):
        wanted(known, ("maskgan",))
    with pytest.raises(ConfigError, match="no field"):
        changed(known["maskgit"].train, {"dynamic.masking": "all"})
    with pytest.raises(ConfigError, match="unknown key 'maskin'"):
        changed(known["maskgit"].train, {"dynamics.maskin": "all"})
    with pytest.raises(ConfigError, match="needs 2 to"):
        AblateConfig(seeds=1)
    with pytest.raises(ConfigError, match="at most 1"):
        BaselinesConfig(step_share=1.5)
    whole = known["maskgit"].train
    assert shortened(whole, 1.0) == whole
    assert run_key(VARIANTS["passes-8"]) == run_key(VARIANTS["maskgit"])  # sampled otherwise, trained once
    assert run_key(VARIANTS["add"]) != run_key(VARIANTS["maskgit"])


def entry(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 1, "high": value + 1}


def world_document(name: str, psnr: float, bits: float | None = 50.0, **changes) -> dict:
    horizons = {h: {"rollout_psnr_db": entry(psnr), "above_copy_last_db": entry(3), "rollout_ssim": entry(0.5)}
                for h in ("1", "4", "15")}  # fmt: skip
    return {
        "baseline": {"name": name, "title": name.title(), "profile": "cpu", "step_share": 0.1, "steps": 1200,
                     "parameters": 650_000, "seconds": 3.0, "hardware": "1 x cpu"},
        "stage": "dynamics", "config": {"rollout": {"decode_steps": 2}}, "horizons": horizons,
        "delta_psnr_db": entry(2), "tokenizer_psnr_db": entry(27), "action_map": None, "artifact_bytes": 1_500_000,
        "teacher_forced_bits_per_frame": None if bits is None else entry(bits), "speed": {"p50_ms": 4.2},
        "data": {"clips": 8, "frames_per_clip": 19, "split": "val", "sha256": "ab" * 32}, "parameters": 650_000,
        **changes,
    }  # fmt: skip


def test_the_leaderboard_holds_the_documents_and_nothing_else(tmp_path):
    for document in (world_document("maskgit", 20.25), world_document("shortcut", 21.5, bits=None)):
        folder = tmp_path / document["baseline"]["name"]
        folder.mkdir()
        (folder / "evaluation.json").write_text(json.dumps(document))
    text = write_leaderboard([tmp_path], tmp_path / "out" / "LEADERBOARD.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| Maskgit", "| Shortcut"))]
    assert "20.25 [19.25, 21.25]" in rows[0]
    assert "50.0 [49.0, 51.0]" in rows[0]
    assert "| – |" in rows[1]
    assert "Tokenizers" not in text
    # Nobody takes a tenth of the steps for the preset.
    assert "## Profile cpu, 10% of its steps" in text
    assert "### Worlds at 10% of the preset's steps" in text
    assert "Not the full preset" in text
    for document in (world_document("maskgit", 20.25), world_document("shortcut", 21.5)):
        document["baseline"]["step_share"] = 1.0
        (tmp_path / document["baseline"]["name"] / "evaluation.json").write_text(json.dumps(document))
    full = write_leaderboard([tmp_path], tmp_path / "out" / "FULL.md").read_text()
    assert "## Profile cpu, all of its steps" in full
    assert "Not the full preset" not in full
    assert cell(None) == "–"
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    with pytest.raises(ConfigError, match=r"no evaluation\.json"):
        write_leaderboard([tmp_path / "out"], tmp_path / "x.md")


def test_ablation_rows_are_paired_by_seed():
    reference = [world_document("maskgit", psnr) for psnr in (20.0, 22.0, 24.0)]
    better = [world_document("add", psnr) for psnr in (21.0, 23.0, 25.0)]
    tables = {"coinrun": summarised({"maskgit": reference, "add": better})}
    kept = {"profile": "cpu", "step_share": 0.1, "seeds": 3, "tables": tables}
    lines = ablation_lines(json.loads(json.dumps(kept)))
    row = next(line for line in lines if line.startswith("| action added (against maskgit)"))
    assert "23.00 ± 4.97 (**+1.00 ± 0.00**)" in row
    assert any("10% of the preset's steps only" in line for line in lines)
    claim = next(line for line in lines if line.startswith("- coinrun, MaskGIT: prepended"))
    assert claim.endswith("changes PSNR at 15 by +1.00 ± 0.00 dB: **refuted**.")
    tables["coinrun"]["variants"]["add"]["scores"]["PSNR at 15, dB"] = [19.0, 22.0, 24.5]
    claims = [line for line in ablation_lines(kept) if line.startswith("- ")]
    assert claims[0].endswith("by -0.17 ± 1.90 dB: **not shown, the interval holds 0**.")
    tables["coinrun"]["variants"]["add"]["scores"]["PSNR at 15, dB"] = [19.0, 21.0, 23.0]
    assert any(line.endswith("**confirmed**.") for line in ablation_lines(kept))
    mean, half = interval_over_seeds(np.asarray([1.0, 2.0, 3.0]))
    assert mean == 2.0
    assert half == pytest.approx(4.303 / np.sqrt(3))


def test_variants_bring_what_they_are_compared_with():
    assert with_references(["masking-all-add"]) == ["maskgit", "masking-all", "masking-all-add"]
    assert with_references(VARIANTS) == list(VARIANTS)
    with pytest.raises(ConfigError, match="no variant 'x'"):
        with_references(["x"])
    with pytest.raises(ConfigError, match="must differ"):
        AblateConfig(data_dirs=("a/puck", "b/puck"))


def tiny_profile() -> Profile:
    """The cpu profile at the size of the synthetic data set."""
    profile = load_profile("cpu")
    frame = FrameConfig(HEIGHT, WIDTH, 3, patch=2)
    blocks = BlockConfig(dim=16, ffn_dim=32, heads=2, layers=1, temporal_window=4)
    still, pair = dataclasses.replace(blocks, temporal=False), dataclasses.replace(blocks, temporal_window=2)

    def small(stage: TrainConfig) -> TrainConfig:
        quantizer = dataclasses.replace(stage.tokenizer.quantizer, codes=16, latent_dim=4)
        lam_codes = dataclasses.replace(stage.lam.quantizer, latent_dim=4)
        return dataclasses.replace(
            stage,
            tokenizer=dataclasses.replace(
                stage.tokenizer, frame=frame, encoder=still, decoder=still, quantizer=quantizer
            ),
            lam=dataclasses.replace(stage.lam, frame=frame, encoder=pair, decoder=pair, quantizer=lam_codes),
            dynamics=dataclasses.replace(stage.dynamics, blocks=blocks),
            optim=dataclasses.replace(stage.optim, warmup_steps=1, decay_steps=1),
            steps=3, batch_size=4, seq_len=min(stage.seq_len, 4), log_every=3, eval_every=3, eval_clips=4,
            checkpoint_every=3, init_clips=8, loader_threads=0,
        )  # fmt: skip

    evaluate = dataclasses.replace(
        profile.evaluate, clips=4, batch_size=4, horizons=(1, 4), delta_horizon=1, bootstrap_samples=10,
        rollout=RolloutConfig(prompt_frames=2, horizon=4, decode_steps=2), speed_frames=2,
    )  # fmt: skip
    return dataclasses.replace(
        profile, tokenizer=small(profile.tokenizer), dynamics=small(profile.dynamics),
        dynamics_latent=small(profile.dynamics_latent), evaluate=evaluate,
    )  # fmt: skip


@pytest.mark.slow
def test_all_baselines_and_an_ablation_run_and_resume(tmp_path, monkeypatch):
    data = write_set(tmp_path / "data", {"train": [[20, 30]], "val": [[20, 20]]})
    monkeypatch.setattr(baselines, "load_profile", lambda name: tiny_profile())
    monkeypatch.setattr("worldmodel.evaluate.suite.MATMUL_SIZE", 64)
    # Frames of 6 x 10 pixels are smaller than the window of SSIM.
    monkeypatch.setattr("worldmodel.evaluate.metrics.SSIM_WINDOW", 3)
    config = BaselinesConfig(run_dir=str(tmp_path / "runs"), data_dir=str(data))
    text = baselines.run_baselines(config).read_text()
    for baseline in all_baselines(tiny_profile()).values():
        assert f"| {baseline.title} |" in text
    monkeypatch.setattr(baselines, "score_run", lambda *_, **__: pytest.fail("scored again"))
    assert baselines.run_baselines(config).read_text() == text

    monkeypatch.setattr(ablate, "load_profile", lambda name: tiny_profile())
    monkeypatch.setattr(ablate, "METRICS", tuple(m for m in ablate.METRICS if "15" not in m[0]))
    table = ablate.run_ablate(
        AblateConfig(run_dir=str(tmp_path / "ablate"), data_dirs=(str(data),), only=("mamba2", "shortcut-1"), seeds=2)
    ).read_text()
    for name in ("maskgit", "mamba2", "shortcut", "shortcut-1"):
        assert f"| {VARIANTS[name].title} " in table
    assert "## data" in table
