"""The hostile input campaign: its short version, a poisoned file of each kind in it, and that it sees every crash."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from scripts import hostile
from scripts.hostile import KINDS, Found, Kind, main, try_kind

QUICK = "artifact,shard,text-manifest,records,record-contents,tokens,record-manifest,config,options,message"
MODELS = "tokenizer,lm-checkpoint"
SLOW = "lm-artifact,world-artifact,world-checkpoint"


def tried(tmp_path: Path, *options: str) -> list[Found]:
    out = tmp_path / "hostile.json"
    status = main([*options, "--json", str(out), "--scratch", str(tmp_path / "scratch")])
    results = [Found(**values) for values in json.loads(out.read_text(encoding="utf-8"))["kinds"]]
    assert ([crash for found in results for crash in found.crashes], status) == ([], 0)
    assert all(found.poisoned == len(hostile.POISON) for found in results)  # pickles: refused, and nothing ran
    return results


def test_two_thousand_hostile_inputs_are_read_or_refused(tmp_path: Path) -> None:
    results = tried(tmp_path, "--inputs", "2000", "--only", QUICK)
    assert [found.kind for found in results] == QUICK.split(",")
    for found in results:
        assert found.inputs == round(2000 * KINDS[found.kind].share)
        assert 0 < found.read < found.inputs
        assert found.refusals > 3
        assert found.memory_bytes < hostile.MEMORY_LIMIT_BYTES


def test_hostile_checkpoints_and_tokenizers_are_refused(tmp_path: Path) -> None:
    for found in tried(tmp_path, "--inputs", "1500", "--only", MODELS):
        assert found.refusals > 0
        assert found.read < found.inputs


@pytest.mark.slow
def test_hostile_models_are_refused(tmp_path: Path) -> None:
    for found in tried(tmp_path, "--inputs", "3000", "--only", SLOW):
        assert found.refusals > 2 or found.inputs < 30


@pytest.mark.slow
def test_110000_hostile_inputs(tmp_path: Path) -> None:
    assert sum(found.inputs for found in tried(tmp_path)) >= 100_000


def test_kinds_share_out_the_campaign() -> None:
    assert sum(kind.share for kind in KINDS.values()) >= 1.0
    assert set(KINDS) == set(f"{QUICK},{MODELS},{SLOW}".split(","))


class Trap(Kind):
    """Reads as nobody should; the first byte says which way."""

    def seeds(self) -> list[bytes]:
        return [b"sound"]

    def mutate(self, rng, data, corpus):
        return self.ways[rng.randrange(len(self.ways))]

    ways = (b"refuse",)

    def read(self, data: bytes) -> None:
        match data:
            case b"refuse":
                raise DataError("no")
            case b"raise":
                raise KeyError("unexpected")
            case b"system":
                os.system("true")
            case b"allocate":
                np.ones(hostile.MEMORY_LIMIT_BYTES)
            case b"die":
                os.abort()


@pytest.mark.parametrize(
    ("way", "says"),
    [(b"raise", "KeyError"), (b"system", "code ran"), (b"allocate", "MemoryError"), (b"die", "ended the process with")],
)
def test_every_kind_of_crash_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: bytes, says: str) -> None:
    monkeypatch.setitem(KINDS, "trap", type("Planted", (Trap,), {"ways": (b"refuse", b"sound", way)}))
    monkeypatch.setattr(multiprocessing, "get_context", lambda name: multiprocessing.context.ForkContext())
    found = try_kind("trap", 30, 0, tmp_path)
    assert found.crashes
    assert all(says in crash for crash in found.crashes)
