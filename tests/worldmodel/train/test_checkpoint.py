"""Checkpoints: checksums under any layout, damage that is passed over, what is skipped, what a kill leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from common.console import TrainingConsole
from common.errors import CheckpointError, ConfigError, StorageError, TrainingError
from tests.worldmodel.small import MemorySource, train_config
from worldmodel.config import read_json
from worldmodel.runs import RunFolder, RunLog
from worldmodel.train import objectives
from worldmodel.train.checkpoint import Checkpoints, checksum, checksums, seal, unseal
from worldmodel.train.loop import train

CONFIG = {"seed": 0}


def small_state() -> dict:
    rng = np.random.default_rng(0)
    return {"w": jnp.asarray(rng.standard_normal((40, 30)), jnp.float32), "opt": ({"n": jnp.zeros((), jnp.int32)},)}


def write(run: Path, *steps: int, keep: int = 4) -> None:
    checkpoints = Checkpoints(run, keep=keep)
    for step in steps:
        state = {**small_state(), "opt": ({"n": jnp.asarray(step, jnp.int32)},)}
        checkpoints.save(step, state, config=CONFIG, loader_state={"given": step})
    checkpoints.close()


def test_a_checksum_is_the_same_under_any_layout_and_sees_any_bit() -> None:
    x = np.random.default_rng(0).standard_normal((16, 8, 3)).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    for spec in (P(), P("a"), P("b", "a"), P(None, ("a", "b")), P("a", None)):
        assert checksum(jax.device_put(x, NamedSharding(mesh, spec))) == checksum(x)
    rng = np.random.default_rng(1)
    for _ in range(50):
        other = x.copy()
        other.view(np.uint32).reshape(-1)[rng.integers(x.size)] ^= np.uint32(1 << rng.integers(32))
        assert checksum(other) != checksum(x)
    assert checksum(x[::-1]) != checksum(x)
    assert checksums({"a": x}) != checksums({"a": x.reshape(8, 16, 3)})
    for value in (np.float32(3), jnp.ones(3, jnp.bfloat16), np.ones(3, bool), np.zeros(0)):
        assert checksum(value) == checksum(jnp.asarray(value))


def test_sealed_values_are_what_was_sealed() -> None:
    sealed = seal({"a": [1, None, "é"]})
    assert unseal(json.loads(json.dumps(sealed)), "x") == {"a": [1, None, "é"]}
    for damaged in ({**sealed, "sealed": sealed["sealed"].replace("1", "2")}, {}, None, {**sealed, "blake2b": 1}):
        with pytest.raises(CheckpointError, match=r"x: .*damaged"):
            unseal(damaged, "x")


@pytest.mark.parametrize("kind", ["cut", "flip", "gone"])
def test_a_damaged_step_is_passed_over_said_and_set_aside(tmp_path: Path, kind: str) -> None:
    write(tmp_path, 1, 2)
    step = tmp_path / "checkpoints" / "2"
    largest = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    if kind == "cut":
        largest.write_bytes(data[: len(data) // 2])
    elif kind == "flip":
        data[len(data) // 2] ^= 16
        largest.write_bytes(data)
    else:
        largest.unlink()
    checkpoints = Checkpoints(tmp_path, keep=4)
    restored, state, loader_state = checkpoints.restore(small_state(), config=CONFIG)
    assert (restored, int(state["opt"][0]["n"]), loader_state) == (1, 1, {"given": 1})
    assert len(checkpoints.passed_over) == 1
    assert "/2" in checkpoints.passed_over[0]
    assert "trying the one before it" in checkpoints.passed_over[0]
    checkpoints.save(2, small_state(), config=CONFIG, loader_state={})  # the step can be written anew
    checkpoints.close()
    assert [p.name for p in (tmp_path / "checkpoints-damaged").iterdir()] == ["2-0"]


@pytest.mark.parametrize(("field", "value"), [("metrics", 5.5), ("custom_metadata", 7), ("init_timestamp_nsecs", [])])
def test_damaged_metadata_of_a_step_keep_nothing_from_being_read(tmp_path: Path, field: str, value: object) -> None:
    write(tmp_path, 1, 2, 3)
    for step in (1, 2):
        path = tmp_path / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    checkpoints = Checkpoints(tmp_path, keep=2)
    step, state, _ = checkpoints.restore(small_state(), config=CONFIG)
    assert (step, checkpoints.passed_over) == (3, [])
    checkpoints.save(4, state, config=CONFIG, loader_state={"given": 4})
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]  # old ones go all the same

    write(tmp_path / "b", 1, 2)
    path = tmp_path / "b/checkpoints/1/_CHECKPOINT_METADATA"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    next((tmp_path / "b/checkpoints/2/extra").glob("metadata")).write_text("{}")
    checkpoints = Checkpoints(tmp_path / "b", keep=2)
    with pytest.raises(CheckpointError, match="start the same command again"):
        checkpoints.restore(small_state(), config=CONFIG)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "b", keep=2)
    assert checkpoints.restore(small_state(), config=CONFIG)[0] == 1
    checkpoints.close()


def test_no_sound_step_and_another_configuration_are_named(tmp_path: Path) -> None:
    write(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, keep=4)
    with pytest.raises(CheckpointError, match="another configuration: seed: saved 0, now 1"):
        checkpoints.restore(small_state(), config={"seed": 1})
    for path in (tmp_path / "checkpoints" / "1").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"checkpoints/1.*none is left: delete them"):
        checkpoints.restore(small_state(), config=CONFIG)
    checkpoints.close()


def test_a_checkpoint_that_does_not_read_back_is_an_error_before_the_next(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=4)
    checkpoints.save(1, small_state(), config=CONFIG, loader_state={})
    assert checkpoints._unverified is not None
    step, abstract, sums = checkpoints._unverified
    checkpoints._unverified = (step, abstract, dict.fromkeys(sums, "0"))  # the disk kept something else
    with pytest.raises(StorageError, match=r"checkpoints/1: not saved .*read back otherwise"):
        checkpoints.save(2, small_state(), config=CONFIG, loader_state={})
    checkpoints.close()
    assert not (tmp_path / "checkpoints" / "2").exists()


def poison(monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...]) -> None:
    """Every loss of a batch whose first clip begins with these numbers' actions is not a number."""
    loss = objectives.TokenizerObjective.loss

    def poisoned(self, model, frozen, batch, key):
        value, rest = loss(self, model, frozen, batch, key)
        bad = jnp.isin(batch["frames_BTHWC"][0, 0, 0, 0, 0], jnp.asarray(steps, jnp.uint8))
        return value * jnp.where(bad, jnp.nan, 1.0), rest

    monkeypatch.setattr(objectives.TokenizerObjective, "loss", poisoned)


class NumberedSource(MemorySource):
    """The first pixel of a batch is its number."""

    def loader(self, *, with_frames: bool):
        loader = super().loader(with_frames=with_frames)
        plain = type(loader).__next__

        class Numbered(type(loader)):
            def __next__(self):
                batch = plain(self)
                batch["frames_BTHWC"][0, 0, 0, 0, 0] = self._given
                return batch

        loader.__class__ = Numbered
        return loader


def test_a_clock_that_jumps_while_a_checkpoint_is_written_ends_nothing(tmp_path: Path, monkeypatch) -> None:
    real, state = time.time, {"w": jnp.ones((256, 256))}
    # A third of a year on and back every 5 ms: longer than Orbax waits for a write by default.
    monkeypatch.setattr(time, "time", lambda: real() + 1e7 * (int(time.monotonic() / 0.005) % 2))
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        checkpoints.save(step, state, config={}, loader_state={})
    checkpoints.close()
    assert checkpoints.latest == 5


def test_steps_that_are_not_finite_change_nothing_but_the_count(tmp_path: Path, monkeypatch) -> None:
    poison(monkeypatch, (3, 6))
    config = train_config("tokenizer", str(tmp_path / "run"), log_every=1)
    summary = train(config, source=NumberedSource(config))
    assert summary["status"] == "finished"
    entries = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [e["skipped"] for e in entries] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [e["loss"] is None for e in entries] == [step in (3, 6) for step in range(1, 9)]


def test_too_many_of_them_stop_the_run_with_the_batch_saved(tmp_path: Path, monkeypatch) -> None:
    poison(monkeypatch, (3, 6))
    config = train_config("tokenizer", str(tmp_path / "run"), log_every=1, nonfinite_limit=1)
    with pytest.raises(TrainingError, match=r"2 steps had .* the last was step 6, its batch is in .*process0\.npz"):
        train(config, source=NumberedSource(config))
    with np.load(tmp_path / "run/nonfinite_process0.npz", allow_pickle=False) as batch:
        assert batch["frames_BTHWC"][0, 0, 0, 0, 0] == batch["step"] == 6
    more = dataclasses.replace(config, nonfinite_limit=2)
    assert train(more, source=NumberedSource(more))["status"] == "finished"


def test_a_signal_before_the_first_step_ends_at_once(tmp_path: Path) -> None:
    config = train_config("tokenizer", str(tmp_path / "run"))

    class Preempted(MemorySource):
        def validation_clips(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().validation_clips()

    summary = train(config, source=Preempted(config))
    assert (summary["status"], summary["steps"]) == ("stopped", 0)
    assert train(config, source=MemorySource(config))["status"] == "finished"


def test_what_a_kill_leaves_in_a_fresh_folder_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".config.json.123.tmp").write_text("{")
    RunFolder(tmp_path, {"a": 1})
    assert {p.name for p in tmp_path.iterdir()} == {"config.json"}


def test_damaged_logs_are_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, {})
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n{"st\xffep": \n{"step": 2}\n{"ste')
    with pytest.raises(CheckpointError, match=r"log\.jsonl: the line .* is damaged"):
        RunLog(run, TrainingConsole(), step=2, steps=3, tensorboard=False, wandb=False, hardware="none")


def test_json_nested_too_deep_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="not JSON"):
        read_json(tmp_path / "x.json", what="a config")
