"""Measurements of this repository on this machine.

    python scripts/bench kernels                   every kernel and whole training steps on one GPU, beside their peers
    python scripts/bench aot [OPERATION ...]       registers, stack and instructions of every kernel on sm_90 (no GPU)
    python scripts/bench roofline                  least time of every operation on an H200 and an H100, by arithmetic
    python scripts/bench step                      training steps of one preset, or of two checkouts side by side
    python scripts/bench bytes                     one model on every grid: bytes against bits per byte
    python scripts/bench worldmodel                data, training steps and sampling of the world model
    python scripts/bench dreams                    time and memory of a dreamed frame, for every kind of dynamics
    python scripts/bench load                      text, frames and checkpoints by the gigabyte; cost on paper
    python scripts/bench play                      the player under load: many browsers for minutes

`--help` after a command lists its options. Only what a command needs is imported.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("aot", "bytes", "dreams", "kernels", "load", "play", "roofline", "step", "worldmodel")
# What the entry imports for artifacts, which no bench writes: a bare CUDA + PyTorch image does not have it.
CODECS = ("brotli", "zstandard")


class Missing(types.ModuleType):
    """Stands in for a package that is not installed; fails when it is used, not when it is imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ModuleNotFoundError(f"{self.__name__}.{name} was used, but {self.__name__} is not installed")


def stand_in(packages: Sequence[str]) -> None:
    """Let modules import those of `packages` that are not installed."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            sys.modules[name] = Missing(name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    parser = argparse.ArgumentParser(
        "python scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    parsed = parser.parse_args(argv)
    stand_in(CODECS)
    command = importlib.import_module(f"scripts.bench.{parsed.command}")
    return command.main(parsed.arguments)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder: the rooms are importable even where the project is not installed
    sys.exit(main())
