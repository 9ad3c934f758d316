"""Tiny configurations, tiny data, and the entry run as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.text.shards import write_shard
from submissions.jepa_mamba import train_gpt

ENTRY = Path(train_gpt.__file__)
TINY = {
    "device": "cpu",
    "tokenizer": "byte",
    "vocab_size": 256,
    "model_dim": 32,
    "num_layers": 3,
    "d_state": 8,
    "headdim": 16,
    "embed_dim": 24,
    "mlp_mult": 2,
    "attn_headdim": 16,
    "chunk_size": 16,
    "train_seq_len": 32,
    "train_batch_tokens": 256,
    "micro_batch_tokens": 128,
    "iterations": 20,
    "warmup_steps": 0,
    "max_wallclock_seconds": 0.0,
    "train_log_every": 1,
    "val_loss_every": 0,
    "val_batch_size": 256,
    "checkpoint_every": 5,
    "temp_calib_tokens": 256,
    "sigreg_timesteps": 8,
    "eval_modes": "carried",
    "budget_bytes": 0,
}


def tiny(**changes: object) -> train_gpt.Config:
    return train_gpt.Config(**{**TINY, **changes})  # pyright: ignore[reportArgumentType]


def flags(**changes: object) -> list[str]:
    return [f"--{name}={int(v) if isinstance(v, bool) else v}" for name, v in {**TINY, **changes}.items()]


def run_entry(*arguments: str, ranks: int = 1, check: bool = True, **environ: str) -> subprocess.CompletedProcess[str]:
    """`python train_gpt.py ...`, or under torchrun with more than one rank."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ENTRY.parents[2]), **environ}
    done = subprocess.run([*launcher, str(ENTRY), *arguments], capture_output=True, text=True, env=environment)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def losses_of(run: Path) -> dict[int, float]:
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {e["step"]: e["loss"] for e in events if e["event"] == "step"}


@pytest.fixture(scope="session")
def byte_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of byte shards: documents of words drawn from a small vocabulary, 0xFF before each."""
    folder = tmp_path_factory.mktemp("bytes")
    generator = np.random.default_rng(0)
    words = [bytes(generator.integers(97, 123, generator.integers(2, 8))) for _ in range(50)]
    for split, documents in (("train", 120), ("val", 6)):
        text = [
            bytes([255]) + b" ".join(words[i] for i in generator.zipf(1.5, generator.integers(20, 60)) % 50)
            for _ in range(documents)
        ]
        write_shard(
            folder / f"tiny_{split}_000000.bin", np.frombuffer(b"".join(text), dtype=np.uint8).astype(np.uint16)
        )
    return folder
