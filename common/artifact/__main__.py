"""Look into an artifact: python -m common.artifact inspect FILE."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from common.artifact.budget import SizeReport, format_size_table, format_text_table
from common.artifact.container import read_artifact
from common.errors import ArtifactError


def _tensor_table(report: SizeReport) -> str:
    rows = [["tensor", "shape", "grid", "bits/weight", "bytes"]]
    for tensor in report.tensors:
        shape = "x".join(str(length) for length in tensor.shape) or "scalar"
        bits = f"{tensor.bits_per_weight:.3f}" if tensor.n_weights else "-"
        rows.append([tensor.name, shape, tensor.grid, bits, f"{tensor.total_bytes:,}"])
    return format_text_table(rows, left_columns=3)


def _stream_table(report: SizeReport) -> str:
    rows = [["stream", "layout", "codec", "raw bytes", "bytes"]]
    for index, stream in enumerate(report.streams):
        rows.append([str(index), stream.layout, stream.codec, f"{stream.raw_bytes:,}", f"{stream.stored_bytes:,}"])
    return format_text_table(rows, left_columns=3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 2 for a file that cannot be read as an artifact."""
    parser = argparse.ArgumentParser(prog="python -m common.artifact", description="Look into a model artifact.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect_command = commands.add_parser("inspect", help="print every tensor with its grid and its bytes, then totals")
    inspect_command.add_argument("file", metavar="FILE", help="the artifact")
    options = parser.parse_args(arguments)
    try:
        _, meta, report = read_artifact(options.file)
    except ArtifactError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_tensor_table(report))
    print()
    print(_stream_table(report))
    print()
    print(format_size_table(report))
    print()
    print("meta", json.dumps(meta, indent=2))  # ASCII: nothing in it can steer a terminal
    return 0


if __name__ == "__main__":
    sys.exit(main())
