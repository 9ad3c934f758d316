"""The referee's own reading of shards and bytes, against the project's where both exist."""

from __future__ import annotations

import numpy as np
import pytest

from common.text.bpb import byte_table, token_bytes
from common.text.tokenizer import load_tokenizer
from referee.data import decoded_bytes, documents, pieces_of, read_data, read_shard_fact, table_bytes


def write(path, tokens, count=None, magic=20240520, version=1):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return read_shard_fact(path)


def test_documents_run_over_shards(tmp_path):
    shards = (
        write(tmp_path / "a", [1, 5, 6, 1, 7]),
        write(tmp_path / "b", [8, 9]),
        write(tmp_path / "c", [2, 1, 1, 4]),
    )
    found = [one.tolist() for one in documents(shards, 1)]
    assert found == [[1, 5, 6], [1, 7, 8, 9, 2], [1], [1, 4]]
    assert [one.tolist() for one in documents((write(tmp_path / "d", [5, 1, 6]),), 1)] == [[5], [1, 6]]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({}, ""),
        ({"magic": 7}, "magic 7"),
        ({"version": 2}, "version 2"),
        ({"count": 9}, "take 1,042"),
        ({"count": 1}, "take 1,026"),
        ({"count": 0}, "says 0 tokens"),
        ({"count": -3}, "says -3 tokens"),
    ],
)
def test_header_faults_are_named(options, fault, tmp_path):
    shard = write(tmp_path / "s", [1, 2, 3], **options)
    assert fault in shard.fault
    assert bool(shard.fault) == bool(fault)
    assert len(shard.tokens_N()) == (0 if fault else 3)


def test_short_files_are_named(tmp_path):
    (tmp_path / "s").write_bytes(b"")
    assert read_shard_fact(tmp_path / "s").fault == "an empty file"
    (tmp_path / "s").write_bytes(b"x" * 9)
    assert "less than a header" in read_shard_fact(tmp_path / "s").fault


def test_bytes_are_those_of_the_text_and_of_the_projects_table(bench):
    data = read_data(bench.data)
    pieces, tokens = pieces_of(data), data.val_N
    assert data.manifest is not None
    assert table_bytes(pieces, tokens) == data.manifest["splits"]["val"]["original_bytes"]
    theirs = byte_table(load_tokenizer(bench.data / "tokenizer.model"))
    assert table_bytes(pieces, tokens) == token_bytes(theirs, tokens[:-1], tokens[1:]).sum()
    assert (pieces.base_V == theirs.base_bytes_V).all()
    assert (pieces.spaced_V == theirs.has_space_V).all()
    for document in documents(data.val, data.bos_id):
        assert decoded_bytes(data, document) == table_bytes(pieces, document)
