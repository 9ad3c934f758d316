"""The doctor: predictions follow from the configuration, and hold against a measurement of real steps."""

import dataclasses
import json

import jax
import pytest

from common.errors import ConfigError
from tests.worldmodel.small import LAM, train_config
from worldmodel.cli import DoctorCommand, main, train_presets
from worldmodel.config import BlockConfig, LamConfig
from worldmodel.doctor import TARGETS, Ceilings, examine, lines_of, random_batch, untrained_objective
from worldmodel.train.loop import initial_state

FIXED = Ceilings("a device of round numbers", 1e9, 1e9, 1 << 30)


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch):
    monkeypatch.setattr("worldmodel.doctor.ceilings_here", lambda dtype: FIXED)


def test_a_prediction_is_the_compilers_count_at_the_ceilings():
    config = train_config("lam", "unused")
    document = examine(config, num_actions=3)
    json.dumps(document)
    _, state = initial_state(config, untrained_objective(config, 3), None)
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    assert document["parameters"] == sum(x.size for x in jax.tree.leaves(state["params"]))
    assert held < document["memory_bytes"]["step"] < held + (1 << 28)
    assert document["memory_bytes"]["peak"] == max(document["memory_bytes"][name] for name in ("step", "report"))
    step_s = document["flops_per_step"] / 1e9 + document["bytes_touched_per_step"] / 1e9
    assert document["seconds_per_step"] == pytest.approx(step_s)
    assert document["frames_per_s"] == pytest.approx(8 * 4 / step_s)
    assert document["hours_for_all_steps"] == pytest.approx(8 * step_s / 3600)
    assert document["fits"] is True
    assert document["measured"] is None
    elsewhere = examine(config, num_actions=3, target="h200")
    assert elsewhere["seconds_per_step"] < step_s
    assert elsewhere["memory_bytes"]["of"] == TARGETS["h200"].memory_bytes
    larger = examine(dataclasses.replace(config, batch_size=32), num_actions=3)
    assert larger["flops_per_step"] > 3 * document["flops_per_step"]
    assert larger["memory_bytes"]["step"] - held > 2 * (document["memory_bytes"]["step"] - held)


def test_what_does_not_fit_is_said(monkeypatch):
    monkeypatch.setattr("worldmodel.doctor.ceilings_here", lambda dtype: dataclasses.replace(FIXED, memory_bytes=1000))
    document = examine(train_config("tokenizer", "unused"), num_actions=3)
    assert document["fits"] is False
    assert any("DOES NOT FIT" in line for line in lines_of(document))


@pytest.mark.parametrize("stage, changes", [
    ("tokenizer", {}),
    ("dynamics", {}),
    ("dynamics", {"token_dir": "tokens"}),
])  # fmt: skip
def test_batches_are_of_the_stage(stage, changes):
    config = train_config(stage, "unused", **changes)
    objective = untrained_objective(config, 3)
    batch = random_batch(config, objective.batch_keys, 8, 3)
    assert set(batch) == set(objective.batch_keys)
    assert all(value.shape[:2] == (8, 4) for value in batch.values())
    if "actions_BT" in batch:
        assert batch["actions_BT"].max() == 2


def test_the_command_prints_and_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        DoctorCommand, "config", lambda self: train_config("lam", "unused", batch_size=self.batch_size or 8)
    )
    out = tmp_path / "doctor.json"
    assert main(["doctor", "cpu-lam", "--batch-size", "16", "--num-actions", "3", "--json", str(out)]) == 0
    assert "predicted" in capsys.readouterr().out
    assert json.loads(out.read_text())["stage"] == "lam"
    assert main(["doctor", "cpu-lam", "--json", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="did you mean 'cpu-dynamics'"):
        DoctorCommand(preset="cpu-dynamic").config()
    assert DoctorCommand(preset="cpu-lam").config() == train_presets()["cpu-lam"].config
    with pytest.raises(ConfigError, match="measure_steps -1"):
        examine(train_config("lam", "unused"), measure_steps=-1)


@pytest.mark.slow
def test_memory_is_predicted_within_a_factor_of_a_measurement():
    """Blocks wide enough that temporaries of the step, not the process, decide; never a bar on seconds."""
    blocks = BlockConfig(dim=64, ffn_dim=256, heads=4, layers=2, temporal_window=2)
    frame = dataclasses.replace(LAM.frame, height=64, width=64)
    lam = LamConfig(frame=frame, encoder=blocks, decoder=blocks, quantizer=LAM.quantizer)
    config = train_config("lam", "unused", lam=lam, batch_size=64, seq_len=8)
    document = examine(config, num_actions=3, measure_steps=3)
    predicted, measured = document["memory_bytes"]["step"], document["measured"]["memory_bytes"]
    assert predicted > 100e6
    assert predicted / 2.5 < measured < 2.5 * predicted
    assert 0 < document["measured"]["seconds_per_step"] < float("inf")
    assert any(line.startswith("measured") for line in lines_of(document))
