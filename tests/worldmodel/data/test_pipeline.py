"""The Grain pipeline: uniform over windows, the same for any number of processes and threads, resumable bitwise."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import CheckpointError, ConfigError, DataError
from worldmodel.data.pipeline import make_loader
from worldmodel.data.records import open_dataset
from worldmodel.data.tokens import TokenizerInfo, write_token_set

MakeSet = Callable[..., Path]


def loader(data_dir: Path, **options: Any):
    defaults = {"split": "train", "seq_len": 4, "batch_size": 6, "seed": 0, "num_threads": 0}
    return make_loader(data_dir, **{**defaults, **options})


def starts(batch: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    """(episode, time) of each row, which the synthetic frames carry in their first pixel."""
    return [(int(row[0, 0, 0, 0]), int(row[0, 0, 0, 1])) for row in batch["frames_BTHWC"]]


def equal(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_batches_hold_aligned_windows(make_set: MakeSet, synthetic: Any) -> None:
    batches = loader(make_set())
    for _ in range(10):
        batch = next(batches)
        assert batch["frames_BTHWC"].dtype == np.uint8
        assert batch["frames_BTHWC"].shape == (6, 4, 6, 10, 3)
        assert batch["actions_BT"].dtype == np.int32
        for row, (episode, time) in enumerate(starts(batch)):
            for t in range(4):
                assert np.array_equal(batch["frames_BTHWC"][row, t], synthetic.frame_of(episode, time + t))
                assert batch["actions_BT"][row, t] == synthetic.action_of(episode, time + t)


def test_an_epoch_draws_every_window_once_whatever_the_record_sizes(make_set: MakeSet) -> None:
    data_dir = make_set({"train": [[40, 4], [5, 17]]})
    windows = open_dataset(data_dir, "train").num_windows(4)
    assert windows == 37 + 1 + 2 + 14
    batches = loader(data_dir, batch_size=windows)
    epochs = [starts(next(batches)) for _ in range(3)]
    for epoch in epochs:
        assert set(Counter(epoch).values()) == {1}
        assert len(epoch) == windows
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])
    assert loader(data_dir, batch_size=9).batches_per_epoch == windows / 9


def test_unshuffled_windows_come_in_order(make_set: MakeSet) -> None:
    batch = next(loader(make_set(), shuffle=False))
    assert starts(batch) == [(0, t) for t in range(6)]


def test_order_depends_on_the_seed_alone(make_set: MakeSet) -> None:
    data_dir = make_set()
    first = next(loader(data_dir))
    assert equal(first, next(loader(data_dir)))
    assert not equal(first, next(loader(data_dir, seed=1)))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_do_not_change_the_batches(make_set: MakeSet, num_threads: int) -> None:
    data_dir = make_set()
    plain, threaded = loader(data_dir), loader(data_dir, num_threads=num_threads)
    for _ in range(20):
        assert equal(next(plain), next(threaded))
    threaded.close()


@pytest.mark.parametrize("count", [2, 3])
def test_processes_split_the_rows_of_the_same_global_batch(make_set: MakeSet, count: int) -> None:
    data_dir = make_set()
    whole = loader(data_dir)
    parts = [loader(data_dir, process_index=i, process_count=count) for i in range(count)]
    for _ in range(5):
        batch, shares = next(whole), [next(part) for part in parts]
        joined = {name: np.concatenate([share[name] for share in shares]) for name in batch}
        assert equal(batch, joined)
        assert all(len(share["actions_BT"]) == 6 // count for share in shares)


@pytest.mark.parametrize("threads", [0, 2])
def test_resume_is_bitwise(make_set: MakeSet, threads: int) -> None:
    data_dir = make_set()
    through = loader(data_dir, num_threads=threads)
    batches = [next(through) for _ in range(12)]
    stopped = loader(data_dir, num_threads=threads)
    for _ in range(7):
        next(stopped)
    state = json.loads(json.dumps(stopped.state()))
    stopped.close()
    resumed = loader(data_dir, num_threads=threads)
    next(resumed)
    resumed.restore(state)
    for batch in batches[7:]:
        assert equal(batch, next(resumed))
    # The position is global: two processes go on where one stopped.
    halves = [loader(data_dir, process_index=i, process_count=2) for i in range(2)]
    for half in halves:
        half.restore(state)
    shares = [next(half) for half in halves]
    assert equal(batches[7], {name: np.concatenate([share[name] for share in shares]) for name in shares[0]})
    for each in (through, resumed):
        each.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 5}, "seed"),
        ({"seq_len": 5}, "seq_len"),
        ({"batch_size": 12}, "batch_size"),
        ({"split": "val"}, "content"),
    ],
)
def test_a_state_of_another_run_is_refused(make_set: MakeSet, options: dict[str, Any], message: str) -> None:
    data_dir = make_set()
    state = loader(data_dir).state()
    with pytest.raises(CheckpointError, match=f"loader state has {message}"):
        loader(data_dir, **options).restore(state)
    with pytest.raises(CheckpointError, match="loader state"):
        loader(data_dir).restore({"next_index": 3})


def test_bad_options_are_refused(make_set: MakeSet) -> None:
    data_dir = make_set()
    with pytest.raises(ConfigError, match="global batch of 6 rows for 4 processes"):
        loader(data_dir, process_count=4)
    with pytest.raises(ConfigError, match="process 2 of 2"):
        loader(data_dir, process_index=2, process_count=2)
    with pytest.raises(ConfigError, match="with_frames"):
        loader(data_dir, with_frames=False)
    with pytest.raises(DataError, match="no episode has 18 frames"):
        loader(data_dir, seq_len=18)


def encode(frames_BTHWC: np.ndarray) -> np.ndarray:
    """A stand-in tokenizer: episode, time and a pixel."""
    return frames_BTHWC[:, :, 0, :2].reshape(*frames_BTHWC.shape[:2], -1)[..., [0, 1, 3]].astype(np.int32)


def test_tokens_come_with_their_frames(make_set: MakeSet, tmp_path: Path) -> None:
    data_dir = make_set()
    write_token_set(data_dir, tmp_path / "tokens", encode, TokenizerInfo("t", 256, 3), quiet=True)
    both = loader(data_dir, with_tokens=tmp_path / "tokens")
    only = loader(data_dir, with_tokens=tmp_path / "tokens", with_frames=False)
    for _ in range(5):
        batch, tokens = next(both), next(only)
        assert batch["tokens_BTN"].dtype == np.int32
        assert np.array_equal(batch["tokens_BTN"], encode(batch["frames_BTHWC"]))
        assert tokens.keys() == {"tokens_BTN", "actions_BT"}
        assert np.array_equal(tokens["tokens_BTN"], batch["tokens_BTN"])
        assert np.array_equal(tokens["actions_BT"], batch["actions_BT"])


def test_tokens_of_other_frames_are_refused(make_set: MakeSet, tmp_path: Path) -> None:
    data_dir, other = make_set(), make_set({"train": [[9, 3, 17], [1, 9]], "val": [[9]]}, name="other")
    write_token_set(other, tmp_path / "tokens", encode, TokenizerInfo("t", 256, 3), quiet=True)
    with pytest.raises(DataError, match=r"tokens, split 'train': made from data .* tokenize"):
        loader(data_dir, with_tokens=tmp_path / "tokens")
    with pytest.raises(DataError, match="holds frames, not tokens"):
        loader(data_dir, with_tokens=other)
    with pytest.raises(DataError, match="holds tokens, not frames"):
        loader(tmp_path / "tokens")


def test_damage_surfaces_through_the_loader(make_set: MakeSet) -> None:
    data_dir = make_set({"train": [[40]]})
    path = data_dir / "train-00000.array_record"
    content = bytearray(path.read_bytes())
    content[content.index(b"WMG1") + 60] ^= 1
    path.write_bytes(content)
    batches = loader(data_dir, batch_size=37, num_threads=1)
    with pytest.raises(DataError, match=r"train-00000.array_record, record 0"):
        next(batches)
