"""Loader: every window once an epoch, the same batches for every number of processes, exact resume."""

from __future__ import annotations

import json
import mmap

import numpy as np
import pytest

from common.errors import CheckpointError, ConfigError, ShardError
from common.text.loader import TokenLoader, window_order
from common.text.shards import write_shard

SEQ = 5
LENGTHS = (43, 6, 5, 101, 3)  # windows of 5+1: 8, 1, 0, 20, 0


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    paths = []
    for number, length in enumerate(LENGTHS):
        paths.append(folder / f"t_{number}.bin")
        write_shard(paths[-1], 1000 * (number + 1) + np.arange(length))
    return paths


def loader(paths, **options):
    return TokenLoader(paths, **{"seq_len": SEQ, "batch_sequences": 4, "seed": 3, "vocab_size": 10000} | options)


def test_each_epoch_visits_every_window_once(shards):
    it = loader(shards)
    assert it.windows == 29
    assert it.total_tokens == sum(LENGTHS)
    rows = []
    for _ in range(29):  # 29 batches of 4 are exactly 4 epochs
        batch = it.next_batch()
        np.testing.assert_array_equal(batch.y_BT, batch.x_BT + 1)  # a window never spans two shards
        rows += batch.x_BT[:, 0].tolist()
    expected = sorted(
        1000 * (n + 1) + SEQ * w for n, length in enumerate(LENGTHS) for w in range(max(0, (length - 1) // SEQ))
    )
    epochs = [rows[i : i + 29] for i in range(0, 116, 29)]
    for epoch in epochs:
        assert sorted(epoch) == expected
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert it.epochs_done == 4.0
    assert it.batches_done == 29


def test_types_and_shapes(shards):
    batch = loader(shards, world_size=2, rank=1).next_batch()
    assert batch.x_BT.shape == batch.y_BT.shape == batch.document_ids_BT.shape == (2, SEQ)
    assert (batch.x_BT.dtype, batch.y_BT.dtype, batch.document_ids_BT.dtype) == (np.int64, np.int64, np.int32)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_batches_do_not_depend_on_the_number_of_processes(shards, world_size):
    whole = loader(shards, batch_sequences=6)
    parts = [loader(shards, batch_sequences=6, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(12):
        batch = whole.next_batch()
        pieces = [part.next_batch() for part in parts]
        np.testing.assert_array_equal(np.concatenate([p.x_BT for p in pieces]), batch.x_BT)
        np.testing.assert_array_equal(np.concatenate([p.y_BT for p in pieces]), batch.y_BT)
    states = [part.state() for part in parts]
    assert all(state == whole.state() for state in states)


def test_resume_is_exact_also_with_another_number_of_processes(shards):
    it = loader(shards)
    for stop in range(20):
        state = json.loads(json.dumps(it.state()))
        again = loader(shards)
        again.restore(state)
        halves = [loader(shards, rank=r, world_size=2) for r in (0, 1)]
        for half in halves:
            half.restore(state)
        probe = loader(shards)
        probe.restore(state)
        for _ in range(3):
            expected = probe.next_batch()
            np.testing.assert_array_equal(again.next_batch().x_BT, expected.x_BT)
            np.testing.assert_array_equal(
                np.concatenate([half.next_batch().y_BT for half in halves]), expected.y_BT, err_msg=str(stop)
            )
        it.next_batch()
    run = loader(shards)
    batches = [run.next_batch().x_BT for _ in range(20)]
    resumed = loader(shards)
    resumed.restore({**resumed.state(), "batch": 13})
    np.testing.assert_array_equal(resumed.next_batch().x_BT, batches[13])


@pytest.mark.parametrize("rank", [0, 1])
def test_pages_of_the_next_batch_are_asked_for(tmp_path, monkeypatch, rank):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{name}.bin" for name in "ab"]
    for path in paths:
        write_shard(path, rng.integers(0, 9999, 90_000).astype(np.uint16))
    reader = TokenLoader(paths, seq_len=3000, batch_sequences=4, rank=rank, world_size=2, seed=0)
    asked = []

    class Watched:
        def __init__(self, path):
            self.data = path.read_bytes()

        def madvise(self, option, start, length):
            assert option == mmap.MADV_WILLNEED
            assert start % mmap.PAGESIZE == 0
            assert 0 <= start < start + length <= len(self.data)
            asked.append(self.data[start : start + length])

    monkeypatch.setattr(reader, "_maps", [Watched(path) for path in paths])
    for _ in range(20):  # more than one epoch
        asked.clear()
        reader.next_batch()
        ahead = list(asked)
        batch = reader.next_batch()
        rows = np.concatenate([batch.x_BT, batch.y_BT[:, -1:]], axis=1).astype("<u2")
        assert len(ahead) == len(rows)
        for row, pages in zip(rows, ahead, strict=True):
            assert row.tobytes() in pages


def test_seed_changes_the_order_and_nothing_else_does(shards):
    first = [loader(shards, seed=s).next_batch().x_BT.tolist() for s in (3, 3, 4)]
    assert first[0] == first[1] != first[2]


def test_order_is_a_fixed_permutation():
    for windows in (1, 2, 1000, 65537):
        assert np.array_equal(np.sort(window_order(windows, 5, 2)), np.arange(windows))
    # Pinned: a checkpoint must resume on another machine and another NumPy.
    assert window_order(10, 0, 0).tolist() == [8, 1, 4, 2, 6, 0, 7, 3, 5, 9]
    order = window_order(20000, 1, 0).astype(np.int64)
    assert abs(np.corrcoef(order, np.arange(20000))[0, 1]) < 0.03
    assert abs(np.corrcoef(order, window_order(20000, 1, 1))[0, 1]) < 0.03
    assert abs(np.corrcoef(order, window_order(20000, 2, 0))[0, 1]) < 0.03


def test_document_ids_count_beginnings(tmp_path):
    path = tmp_path / "d.bin"
    write_shard(path, np.array([1, 7, 7, 1, 8, 8, 8, 1, 1, 9, 7, 7, 7]))
    it = TokenLoader([path], seq_len=4, batch_sequences=3, bos_id=1, vocab_size=10)
    batch = it.next_batch()
    expected = {(1, 7, 7, 1): [1, 1, 1, 2], (8, 8, 8, 1): [0, 0, 0, 1], (1, 9, 7, 7): [1, 1, 1, 1]}
    assert {tuple(row) for row in batch.x_BT.tolist()} == set(expected)
    for row, ids in zip(batch.x_BT.tolist(), batch.document_ids_BT.tolist(), strict=True):
        assert ids == expected[tuple(row)]
    without = TokenLoader([path], seq_len=4, batch_sequences=3, bos_id=None, vocab_size=10).next_batch()
    assert not without.document_ids_BT.any()


def test_bad_sizes(shards):
    with pytest.raises(ConfigError, match=r"batch_sequences 4 with world_size 3.*6"):
        loader(shards, world_size=3)
    with pytest.raises(ConfigError, match="rank 2"):
        loader(shards, world_size=2, rank=2)
    with pytest.raises(ConfigError, match="seq_len 0"):
        loader(shards, seq_len=0)
    with pytest.raises(ShardError, match=r"29 windows of 5.*batch of 30"):
        loader(shards, batch_sequences=30)
    with pytest.raises(ShardError, match="no shard"):
        loader([])
    assert loader(shards, batch_sequences=29).next_batch().x_BT.shape == (29, SEQ)


def test_token_outside_the_vocabulary(shards):
    it = loader(shards, batch_sequences=29, vocab_size=4100)
    with pytest.raises(ShardError, match=r"t_3\.bin: token 4100"):
        it.next_batch()
    assert it.batches_done == 0


def test_damaged_shard_is_found_at_the_start(shards, tmp_path):
    bad = tmp_path / "bad.bin"
    bad.write_bytes(shards[0].read_bytes()[:-2])
    with pytest.raises(ShardError, match="truncated"):
        loader([shards[1], bad])


@pytest.mark.parametrize(
    "change",
    [{"seed": 9}, {"windows": 28}, {"shards_sha256": "0"}, {"batch": -1}, {"batch": True}, {"batch": 1.0}, {"new": 1}],
)
def test_foreign_state_is_refused(shards, change):
    it = loader(shards)
    with pytest.raises(CheckpointError, match=next(iter(change))):
        it.restore({**it.state(), **change})
    assert it.batches_done == 0


def test_foreign_sizes_are_refused(shards):
    for options in ({"seq_len": 4}, {"batch_sequences": 2}):
        with pytest.raises(CheckpointError, match=next(iter(options))):
            loader(shards).restore(loader(shards, **options).state())
    with pytest.raises(CheckpointError, match="shards"):
        loader(shards).restore(loader(shards[:4]).state())
