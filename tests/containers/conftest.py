"""A tiny run of the entry on a few kilobytes of bytes, for tests of what containers print and compute."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.text.shards import write_shard
from tests.submissions.jepa_mamba.conftest import flags, run_entry


@dataclass(frozen=True)
class TinyRun:
    data: Path
    folder: Path
    summary: dict[str, Any]

    @property
    def artifact(self) -> Path:
        return self.folder / "model.artifact"


def write_byte_shards(folder: Path) -> Path:
    """Training and validation shards of words over a small vocabulary, 0xFF before each document."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(5)
    words = [bytes(generator.integers(97, 123, generator.integers(2, 8))) for _ in range(40)]
    for split, documents in (("train", 100), ("val", 6)):
        text = b"".join(
            b"\xff" + b" ".join(words[i] for i in generator.zipf(1.5, 50) % len(words)) for _ in range(documents)
        )
        write_shard(folder / f"tiny_{split}_000000.bin", np.frombuffer(text, dtype=np.uint8).astype(np.uint16))
    return folder


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Data, run folder and summary of 20 steps on the CPU, with one thread."""
    base = tmp_path_factory.mktemp("tiny")
    data = write_byte_shards(base / "data")
    run_entry(*flags(), f"--data_path={data}", f"--runs_dir={base}", "--run_id=run")
    summary = json.loads((base / "run" / "summary.json").read_text(encoding="utf-8"))
    return TinyRun(data, base / "run", summary)
