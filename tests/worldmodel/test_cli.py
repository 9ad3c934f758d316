"""The command line: refusals in one line, and the whole case study in miniature on the real game."""

import dataclasses
import json

import pytest

from worldmodel import coinrun
from worldmodel.cli import BAD_INPUT_STATUS, main
from worldmodel.config import BlockConfig, Profile, TrainConfig
from worldmodel.configs import cpu


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["evaluate"], "ConfigError: name one source of weights"),
        (["evaluate", "--run", "a", "--from-artifact", "b"], "ConfigError: name one source of weights"),
        (["rollout", "--run", "/nowhere/run"], "/nowhere/run/config.json: no such file"),
        (["train", "cpu-tokenizer", "--data-dir", "/nowhere/data"], "DataError: /nowhere/data"),
        (["train", "cpu-dynamics", "--seq-len", "1"], "seq_len >= 2"),
        (["export", "--run", "/nowhere/run", "--out", "x"], "/nowhere/run/config.json: no such file"),
    ],
)
def test_bad_input_is_one_named_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == BAD_INPUT_STATUS
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_unknown_flags_suggest_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "cpu-tokenizer", "--stepz", "3"])
    assert stop.value.code == 2
    assert "--steps" in capsys.readouterr().err


def tiny(base: TrainConfig, **changes) -> TrainConfig:
    blocks = BlockConfig(dim=16, ffn_dim=32, heads=2, layers=2, temporal_window=4)
    still = dataclasses.replace(blocks, temporal=False, layers=1)
    pair = dataclasses.replace(blocks, temporal_window=2)
    quantizer = dataclasses.replace(base.tokenizer.quantizer, codes=32)
    return dataclasses.replace(
        base,
        tokenizer=dataclasses.replace(base.tokenizer, encoder=still, decoder=still, quantizer=quantizer),
        lam=dataclasses.replace(base.lam, encoder=pair, decoder=pair),
        dynamics=dataclasses.replace(base.dynamics, blocks=blocks),
        optim=dataclasses.replace(base.optim, warmup_steps=2, decay_steps=2),
        steps=6,
        batch_size=4,
        log_every=2,
        eval_every=6,
        eval_clips=8,
        checkpoint_every=6,
        init_clips=16,
        **changes,
    )


@pytest.mark.slow
def test_coinrun_in_miniature_and_again(tmp_path, monkeypatch):
    pytest.importorskip("procgen")
    base = cpu.PROFILE
    profile = Profile(
        collect=dataclasses.replace(
            base.collect, train_frames=1600, val_frames=800, num_envs=4, shard_steps=200, quiet=True
        ),
        tokenizer=tiny(base.tokenizer),
        dynamics=tiny(base.dynamics, seq_len=4),
        dynamics_latent=tiny(base.dynamics_latent, seq_len=4),
        evaluate=dataclasses.replace(base.evaluate, clips=12, batch_size=8, bootstrap_samples=20, speed_frames=3),
        rollout_clips=1,
    )
    monkeypatch.setattr(coinrun, "load_profile", lambda name: profile)
    arguments = ["coinrun", "--run-dir", str(tmp_path / "run")]
    assert main(arguments) == 0
    document = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert set(document["bars"]) >= {"tokenizer_psnr_db", "above_copy_last_db_at_8", "latent_actions_used"}
    assert document["dynamics"]["artifact"]["weights"].startswith("artifact")
    assert document["dynamics_latent"]["artifact"]["action_codes"]["of"] == 6
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/gif;base64,") == 1
    assert page.count("<polyline") >= 6
    assert 'src="http' not in page
    for name in ("config.json", "train.log", "model.artifact", "summary.json", "tokenizer/log.jsonl"):
        assert (tmp_path / "run" / name).exists(), name
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.array_record*")}
    scores = (tmp_path / "run" / "evaluation_dynamics.json").read_bytes()
    assert main(arguments) == 0
    assert (tmp_path / "run" / "evaluation_dynamics.json").read_bytes() == scores
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.array_record*")}
    clip = ["--out-dir", str(tmp_path / "clips"), "--clips", "1", "--formats", "png", "--rollout.horizon", "3"]
    artifact = ["--from-artifact", str(tmp_path / "run" / "model.artifact")]
    assert main(["rollout", *artifact, *clip]) == 0
    assert (tmp_path / "clips" / "clip_0.png").exists()
    assert main(["rollout", *artifact, *clip]) == BAD_INPUT_STATUS  # nothing is overwritten without --overwrite
