"""Scoring and rolling out need no network: they run where opening a socket ends the process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from common.text.shards import write_shard

ROOT = Path(__file__).resolve().parents[1]
# Sockets of the internet; JAX and torch may still talk to themselves through pipes.
WITHOUT_SOCKETS = """
import runpy, sys
def audit(event, arguments):
    if event.startswith("socket."):
        print("socket used:", event, arguments, file=sys.stderr, flush=True)
        import os
        os._exit(97)
sys.addaudithook(audit)
sys.argv = sys.argv[1:]
sys.path.insert(0, "")
name = sys.argv[0]
sys.exit(runpy.run_path(name, run_name="__main__").get("status", 0))
"""


def run_closed(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_SOCKETS, *map(str, (program, *arguments))]
    environ = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)


def test_the_trap_works(tmp_path: Path) -> None:
    script = tmp_path / "calls.py"
    script.write_text("import socket\nsocket.socket()\n", encoding="utf-8")
    assert run_closed(script).returncode == 97


def test_training_and_scoring_a_language_model_open_no_socket(tmp_path: Path) -> None:
    from tests.submissions.jepa_mamba.conftest import ENTRY, flags

    rng = np.random.default_rng(0)
    for split, count in (("train", 4000), ("val", 600)):
        write_shard(tmp_path / f"x_{split}_000000.bin", rng.integers(97, 123, count).astype(np.uint16))
    options = flags(data_path=tmp_path, runs_dir=tmp_path, run_id="run", iterations=2, jepa_diagnostics=0)
    done = run_closed(ENTRY, *options)
    assert done.returncode == 0, done.stderr
    scored = run_closed(
        ENTRY, "--score", tmp_path / "run/model.artifact", "--val", tmp_path / "*_val_*.bin", "--device=cpu"
    )
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["val_bpb"] > 0


def test_a_rollout_of_a_world_opens_no_socket(tmp_path: Path) -> None:
    script = tmp_path / "dream.py"
    script.write_text(
        "import jax\n"
        "from worldmodel.config import RolloutConfig\n"
        "from worldmodel.data.records import open_dataset\n"
        "from worldmodel.export import load_exported\n"
        "world = load_exported('worldmodel/play/coinrun.artifact')\n"
        "clips = open_dataset('worldmodel/play/clips', 'val').fixed_windows(1, 4)\n"
        "frames, actions = clips['frames_BTHWC'], world.actions_of(clips['frames_BTHWC'], clips['actions_BT'])\n"
        "rollout = RolloutConfig(prompt_frames=2, horizon=2)\n"
        "print(world.frames_after(frames, actions, rollout, jax.random.key(0)).shape)\n",
        encoding="utf-8",
    )
    done = run_closed(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(1, 2, 64, 64, 3)")
