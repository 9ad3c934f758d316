"""The reader of actions and states: alignment, its scores by hand, and what it learns of our own game."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.worldmodel.data.conftest import write_set
from tests.worldmodel.small import DYNAMICS, TOKENIZER, train_config
from worldmodel.config import EvaluateConfig, FrameConfig, RolloutConfig
from worldmodel.data import puck
from worldmodel.data.collect import CollectConfig, run_collect
from worldmodel.data.envs import EnvOptions
from worldmodel.data.records import open_dataset
from worldmodel.data.states import known_states
from worldmodel.evaluate.reader import (
    Reader,
    ReaderNet,
    fidelity_entries,
    has_train_split,
    state_entries,
    trained_reader,
)
from worldmodel.evaluate.suite import evaluate_world
from worldmodel.models.kinds import build_dynamics
from worldmodel.models.tokenizer import Tokenizer
from worldmodel.rollout.world import World


class TellingNet(ReaderNet):
    """Reads the action off the middle frame's first pixel and the state off the last one's."""

    def __call__(self, frames_BTHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        pixel_BT = frames_BTHWC[:, :, 0, 0, 0]
        return jax.nn.one_hot(pixel_BT[:, 1].astype(jnp.int32), 9), pixel_BT[:, 2:]


def test_actions_are_read_between_their_frames_and_states_at_the_later_one() -> None:
    net = TellingNet(4, 4, 1, num_actions=9, states=1, rngs=nnx.Rngs(0))
    reader = Reader(net, 0, {"x": (0,)}, np.asarray([10.0]), np.asarray([2.0]))
    frames = np.zeros((2, 5, 4, 4, 1), np.float32)
    frames[:, :, 0, 0, 0] = [[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]]
    actions, states = reader.read(jnp.asarray(frames))
    assert actions.tolist() == [[3, 1, 4, 1], [2, 7, 1, 8]]
    assert states[..., 0].tolist() == [[12, 18, 12, 20], [24, 12, 26, 14]]


BOOT = {"samples": 20, "seed": 0}


def test_fidelity_is_counted_over_known_actions() -> None:
    recorded = np.asarray([[0, 1, -1], [1, 1, 0], [-1, -1, -1]])
    read = {"dream": np.asarray([[0, 0, 2], [1, 1, 1], [0, 0, 0]]), "true_frames": np.where(recorded < 0, 0, recorded)}
    entries = fidelity_entries(read, recorded, (1, 3), **BOOT)
    assert entries is not None
    assert entries["dream"]["value"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert entries["true_frames"]["value"] == 1.0
    assert entries["most_frequent_action"]["value"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert entries["dream_below_true_frames"]["value"] == pytest.approx(1 - (1 / 2 + 2 / 3) / 2)
    assert entries["dream_at_horizon"]["1"]["value"] == 1.0
    assert entries["dream_at_horizon"]["3"]["value"] == 0.0
    assert fidelity_entries(read, np.full((3, 3), -1), (1,), **BOOT) is None


def test_state_errors_are_lengths_by_group_and_horizon() -> None:
    true = np.zeros((2, 4, 3))
    true[:, 2:, 0], true[:, 3, 2] = 3.0, 1.0  # two frames of prompt
    read = {"dream": np.zeros((2, 2, 3)), "true_frames": true[:, 2:]}
    read["dream"][:, 1, 1] = 4.0
    entries = state_entries(read, true, 2, {"place": (0, 1), "speed": (2,)}, (1, 2), **BOOT)
    assert entries["1"]["place"]["dream"]["value"] == 3.0
    assert entries["2"]["place"]["dream"]["value"] == 5.0
    assert entries["2"]["speed"]["dream"]["value"] == 1.0
    assert entries["2"]["place"]["true_frames"]["value"] == 0.0
    assert entries["2"]["place"]["copy_last"]["value"] == 3.0


def puck_set(folder: Path, frames: int, **options: Any) -> Path:
    config = CollectConfig(
        out_dir=folder, env=EnvOptions(game="puck"), policy="sticky", train_frames=frames, val_frames=frames // 4,
        test_frames=0, num_envs=8, workers=1, quiet=True, **options,
    )  # fmt: skip
    run_collect(config)
    return folder


def test_an_evaluation_on_puck_reports_fidelity_and_state_errors(tmp_path: Path) -> None:
    data = str(puck_set(tmp_path / "puck", 8 * 40))
    frame = FrameConfig(64, 64, 3, patch=16)
    tokenizer = dataclasses.replace(TOKENIZER, frame=frame)
    config = train_config("dynamics", "unused", tokenizer=tokenizer, dynamics=DYNAMICS)
    dynamics = build_dynamics(config, num_actions=5, rngs=nnx.Rngs(1))
    world = World(config, Tokenizer(tokenizer, rngs=nnx.Rngs(0)), dynamics, 5, source="untrained")
    evaluate = EvaluateConfig(
        clips=8, batch_size=4, horizons=(1, 2), delta_horizon=1, bootstrap_samples=10, speed_frames=1, reader_steps=2,
        frechet_samples=3, rollout=RolloutConfig(prompt_frames=2, horizon=2),
    )  # fmt: skip
    document = evaluate_world(world, data, evaluate)
    json.dumps(document)
    assert document["reader_steps"] == 2
    assert set(document["state_error"]["2"]) == set(puck.STATE_GROUPS)
    assert 0 <= document["action_fidelity"]["dream"]["value"] <= 1
    dataset = open_dataset(data, "val")
    clips = dataset.fixed_windows(8, 4, seed=0)
    states = known_states(dataset, clips["windows_B"], 4)
    assert states is not None
    moved = np.linalg.norm((states.values_BTK[:, 3] - states.values_BTK[:, 1])[:, :2], axis=1).mean()
    assert document["state_error"]["2"]["puck_position_px"]["copy_last"]["value"] == pytest.approx(moved, rel=1e-5)
    assert document["frechet_random_features"]["clips_each"] == 4


def test_a_set_without_a_training_split_cannot_be_read(tmp_path: Path) -> None:
    assert has_train_split(str(write_set(tmp_path / "both", {"train": [[9, 3]], "val": [[9]]})))
    assert not has_train_split(str(write_set(tmp_path / "val", {"val": [[9, 9]]})))


@pytest.mark.slow
def test_a_reader_finds_actions_and_states_of_our_game(tmp_path: Path) -> None:
    # A push moves the puck by 7/8 of a pixel: places read to a whole pixel tell 0.4 of the actions, exact ones 0.77. To
    # read parts of a pixel takes this many steps; 900 on a quarter of the frames end at 0.35.
    data = str(puck_set(tmp_path / "puck", 64_000))
    reader = trained_reader(data, open_dataset(data, "train").content_sha256, 3000, 0)
    val = open_dataset(data, "val")
    clips = val.fixed_windows(128, 6, seed=0)
    states = known_states(val, clips["windows_B"], 6)
    assert states is not None
    actions, read = reader.read(jnp.asarray(clips["frames_BTHWC"] / np.float32(255)))
    right = (actions[:, 1:] == clips["actions_BT"][:, 1:-1]).mean()
    assert right > 0.6  # guessing is right in 0.2
    for group, columns in puck.STATE_GROUPS.items():
        true = states.values_BTK[:, 2:][..., list(columns)]
        error = np.linalg.norm(read[:, 1:][..., list(columns)] - true, axis=-1).mean()
        guess = np.linalg.norm(true.mean(axis=(0, 1)) - true, axis=-1).mean()
        assert error < 0.5 * guess, group
