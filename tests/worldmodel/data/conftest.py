"""A small synthetic data set whose every frame says which episode and which time it is of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldmodel.data.records import END_TERMINAL, RecordLayout, RecordWriter, encode_episode, write_manifest

HEIGHT, WIDTH = 6, 10
NUM_ACTIONS = 5


def frame_of(episode: int, time: int) -> np.ndarray:
    """The (6, 10, 3) frame of an episode at a time: unlike any other, and without symmetry."""
    y, x, c = np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), np.arange(3), indexing="ij")
    frame_HWC = (7 * y + 31 * x + 83 * c + 13 * time).astype(np.uint8)
    frame_HWC[0, 0] = (episode, time % 256, time // 256)
    return frame_HWC


def action_of(episode: int, time: int) -> int:
    return (3 * episode + time) % NUM_ACTIONS


def reward_of(episode: int, time: int) -> float:
    return episode + time / 4


def episode_arrays(episode: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    frames = np.stack([frame_of(episode, t) for t in range(length)])
    actions = np.asarray([action_of(episode, t) for t in range(length)])
    return frames, actions, np.asarray([reward_of(episode, t) for t in range(length)], np.float32)


def write_set(data_dir: Path, lengths_by_split: dict[str, list[list[int]]], **layout_options: Any) -> Path:
    """Write a data set; `lengths_by_split[split]` is a list of files, each a list of episode lengths."""
    data_dir.mkdir(parents=True, exist_ok=True)
    layout = RecordLayout((HEIGHT, WIDTH, 3), num_actions=NUM_ACTIONS, **{"group_frames": 4, **layout_options})
    splits: dict[str, Any] = {}
    for split, files in lengths_by_split.items():
        entries, episode = [], 0
        for number, lengths in enumerate(files):
            with RecordWriter(data_dir / f"{split}-{number:05d}.array_record", layout) as writer:
                for length in lengths:
                    frames, actions, rewards = episode_arrays(episode, length)
                    writer.write(
                        encode_episode(layout, frames, actions, rewards, level_seed=100 + episode, end=END_TERMINAL)
                    )
                    episode += 1
            assert writer.summary is not None
            entries.append(dataclasses.asdict(writer.summary))
        splits[split] = {"files": entries}
    manifest = {
        "kind": "frames",
        "name": "synthetic",
        "item_shape": list(layout.item_shape),
        "dtype": layout.dtype,
        "group_frames": layout.group_frames,
        "num_actions": NUM_ACTIONS,
        "action_names": [f"a{i}" for i in range(NUM_ACTIONS)],
        "fps": 15,
        "complete": True,
        "splits": splits,
    }
    write_manifest(data_dir, manifest)
    return data_dir


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., Path]:
    def make(lengths: dict[str, list[list[int]]] | None = None, name: str = "set", **options: Any) -> Path:
        lengths = lengths or {"train": [[9, 3, 17], [1, 8]], "val": [[12, 5]]}
        return write_set(tmp_path / name, lengths, **options)

    return make


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """The definitions above, for tests that compare with them."""

    frame_of: Callable[[int, int], np.ndarray] = frame_of
    action_of: Callable[[int, int], int] = action_of
    episode_arrays: Callable[[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = episode_arrays


@pytest.fixture
def synthetic() -> Synthetic:
    return Synthetic()
