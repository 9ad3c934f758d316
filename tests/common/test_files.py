"""Atomic writes: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.files import write_atomically


def test_replaces_the_whole_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_bytes(b"old and longer")
    write_atomically(target, b"new")
    write_atomically(str(tmp_path / "b"), b"")
    assert target.read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch, failing: str) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
