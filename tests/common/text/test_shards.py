"""Shards: the format byte for byte, streaming, and every way a file can be wrong."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from common.errors import ShardError
from common.text.shards import ShardWriter, check_tokens, list_shards, open_shard, sha256_of_file, write_shard


def test_format_is_the_challenges(tmp_path):
    path = tmp_path / "s.bin"
    write_shard(path, np.array([1, 2, 65535, 258]))
    expected = struct.pack("<256i", 20240520, 1, 4, *[0] * 253) + struct.pack("<4H", 1, 2, 65535, 258)
    assert path.read_bytes() == expected
    tokens = open_shard(path)
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [1, 2, 65535, 258]
    assert [p.name for p in tmp_path.iterdir()] == ["s.bin"]
    import hashlib

    assert sha256_of_file(path) == hashlib.sha256(expected).hexdigest()


@pytest.mark.parametrize("lengths", [[10], [3, 3, 3], [0, 25, 1], [7, 0, 13]])
def test_writer_rolls_over_at_the_exact_token(tmp_path, lengths):
    pieces = [np.arange(n, dtype=np.uint16) + 100 * i for i, n in enumerate(lengths)]
    with ShardWriter(lambda i: tmp_path / f"x_{i:06d}.bin", shard_tokens=5) as writer:
        for piece in pieces:
            writer.write(piece)
    everything = np.concatenate(pieces)
    paths = list_shards(tmp_path / "x_*.bin")
    assert paths == writer.paths
    shards = [open_shard(path) for path in paths]
    assert [len(s) for s in shards] == [5] * (len(everything) // 5) + [len(everything) % 5] * (len(everything) % 5 > 0)
    assert writer.counts_tokens == [len(s) for s in shards]
    assert writer.total_tokens == len(everything)
    np.testing.assert_array_equal(np.concatenate(shards), everything)


def test_failed_writer_leaves_whole_shards_only(tmp_path):
    def fail_after_seven_tokens():
        with ShardWriter(lambda i: tmp_path / f"x_{i}.bin", shard_tokens=5) as writer:
            writer.write(np.arange(7))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_after_seven_tokens()
    assert [p.name for p in tmp_path.iterdir()] == ["x_0.bin"]
    assert open_shard(tmp_path / "x_0.bin").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("tokens", "told"),
    [(np.array([1.5]), "float64"), (np.array([[1]]), r"\(1, 1\)"), (np.array([-1]), "-1"), (np.array([65536]), "65536"),
     (np.array([], dtype=np.int64), "no token")],
)  # fmt: skip
def test_writer_refuses(tmp_path, tokens, told):
    with pytest.raises(ShardError, match=told):
        write_shard(tmp_path / "s.bin", tokens)
    assert list(tmp_path.iterdir()) == []


def damaged(kind: str, good: bytes) -> bytes:
    if kind == "empty file":
        return b""
    if kind == "half a header":
        return good[:512]
    if kind == "header only":
        return good[:1024]
    if kind == "truncated by a byte":
        return good[:-1]
    if kind == "truncated by a token":
        return good[:-2]
    if kind == "oversized by a byte":
        return good + b"\0"
    if kind == "wrong magic":
        return struct.pack("<i", 20240521) + good[4:]
    if kind == "big-endian":
        return np.frombuffer(good[:1024], dtype="<i4").astype(">i4").tobytes() + good[1024:]
    if kind == "wrong version":
        return good[:4] + struct.pack("<i", 2) + good[8:]
    if kind == "no tokens":
        return good[:8] + struct.pack("<i", 0) + good[12:1024]
    assert kind == "negative count"
    return good[:8] + struct.pack("<i", -3) + good[12:]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("empty file", "0 bytes"), ("half a header", "512 bytes"), ("header only", "1024 bytes, expected 1030"),
        ("truncated by a byte", "truncated: 1029 bytes, expected 1030"),
        ("truncated by a token", "truncated: 1028 bytes, expected 1030"),
        ("oversized by a byte", "oversized: 1031 bytes, expected 1030"), ("wrong magic", "20240521, expected 20240520"),
        ("big-endian", "magic"), ("wrong version", "version 2, expected 1"), ("no tokens", "0 tokens"),
        ("negative count", "-3 tokens"),
    ],
)  # fmt: skip
def test_damaged_shards_are_named(tmp_path, kind, told):
    path = tmp_path / "bad.bin"
    write_shard(path, np.array([1, 2, 3]))
    path.write_bytes(damaged(kind, path.read_bytes()))
    with pytest.raises(ShardError, match=told) as caught:
        open_shard(path)
    assert str(path) in str(caught.value)


def test_missing_and_unmatched(tmp_path):
    with pytest.raises(ShardError, match=r"absent\.bin"):
        open_shard(tmp_path / "absent.bin")
    with pytest.raises(ShardError, match="prepare_text"):
        list_shards(tmp_path / "*_train_*.bin")


def test_deep_check_names_token_and_place(tmp_path):
    path = tmp_path / "s.bin"
    tokens = np.zeros(1000, dtype=np.uint16)
    tokens[777] = 300
    write_shard(path, tokens)
    open_shard(path)
    open_shard(path, vocab_size=301, deep=True)
    with pytest.raises(ShardError, match=r"token 300 at position 777.*vocabulary size 300"):
        open_shard(path, vocab_size=300, deep=True)
    with pytest.raises(ShardError, match="vocab_size"):
        open_shard(path, deep=True)


def test_deep_check_looks_at_every_piece(monkeypatch):
    import common.text.shards as module

    monkeypatch.setattr(module, "SHARD_CHECK_TOKENS", 4)
    tokens = np.zeros(10, dtype=np.uint16)
    for place in range(10):
        tokens[:] = 0
        tokens[place] = 9
        with pytest.raises(ShardError, match=f"position {place},"):
            check_tokens(tokens, 9, "x")
