"""Measurements of this repository on this machine.

    python scripts/bench aot [OPERATION ...]       registers, spills and shared memory of every kernel on sm_90 (no GPU)
    python scripts/bench worldmodel                data, training steps and sampling of the world model

`--help` after a command lists its options. Only what a command needs is imported.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("aot", "worldmodel")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    parser = argparse.ArgumentParser(
        "python scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    parsed = parser.parse_args(argv)
    command = importlib.import_module(f"scripts.bench.{parsed.command}")
    return command.main(parsed.arguments)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder: the rooms are importable even where the project is not installed
    sys.exit(main())
