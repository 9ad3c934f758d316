"""Bits per byte against bytes, from what `scripts/bench bytes --out` wrote: `python scripts/plot_bytes.py JSON`.

One model on every grid, each point a whole artifact that was written, read back and scored. The picture carries the
SHA-256 of its figures, so that a test can tell whether it is current.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from common.errors import DataError, GolfError
from common.files import write_atomically
from scripts.plot_run import BLUE, INK, ORANGE, SOFT, STYLE

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "benchmarks" / "bytes-demo-2026-11-23.json"
PICTURE = ROOT / "docs" / "bytes.png"
SOURCE_KEY = "Source SHA-256"


def read_figures(path: Path) -> dict[str, Any]:
    """The document. Raises DataError where it is not one of `scripts/bench bytes`."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        rows = [(row["row"], int(row["bytes"]), float(row["loss_bpb"])) for row in document["rows"]]
        float(document["float_bpb"])
    except FileNotFoundError as error:
        command = f"python scripts/bench bytes --run RUN --out {path}"
        raise DataError(f"{path} is missing; write it with `{command}`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a document of `scripts/bench bytes` ({error!r})") from error
    if not rows:
        raise DataError(f"{path}: no rows to draw")
    return document


def draw_bytes(document: dict[str, Any]) -> Figure:
    """The figure: our budgets as a curve, every other row as a point with its name, the float weights as a line."""
    floor = document["float_bpb"]
    ours = sorted((row["bytes"], floor + row["loss_bpb"]) for row in document["rows"] if row["row"].startswith("ours"))
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(floor, color=SOFT, linewidth=1, linestyle=(0, (5, 3)))
        axes.annotate(
            f"float weights, {document['weights']:,} of them: {floor:.4f}", (0.01, floor),
            xycoords=("axes fraction", "data"), xytext=(0, 4), textcoords="offset points", color=SOFT, fontsize=9,
        )  # fmt: skip
        curve = tuple(zip(*ours, strict=True))
        axes.plot(*curve, "o-", color=BLUE, linewidth=1.8, markersize=5, label="ours, fitted to a budget")
        for row in document["rows"]:
            if not row["row"].startswith("ours"):
                at = (row["bytes"], floor + row["loss_bpb"])
                axes.plot(*at, "D", color=ORANGE, markersize=6)
                axes.annotate(row["row"].replace(", brotli", "\n+ brotli"), at, xytext=(8, 0), fontsize=9, color=INK,
                              textcoords="offset points", va="center")  # fmt: skip
        least = min(row["bytes"] for row in document["rows"])
        most = max(row["bytes"] for row in document["rows"])
        axes.set_xlim(least - 0.04 * (most - least), most + 0.3 * (most - least))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e3:.0f} kB")
        axes.set(xlabel="artifact", ylabel="bits per byte", title="One model on every grid: fewer bytes, or fewer bits")
        axes.legend(loc="upper right")
    return figure


def plot_bytes(source: Path, out: Path) -> Path:
    """Draw a document into a PNG and return its path. Raises DataError."""
    figure, picture = draw_bytes(read_figures(source)), io.BytesIO()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    figure.savefig(picture, format="png", dpi=130, metadata={"Software": None, SOURCE_KEY: digest})
    write_atomically(out, picture.getvalue())
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 2 for a document that cannot be drawn."""
    parser = argparse.ArgumentParser(description="Bits per byte against bytes as a PNG.")
    parser.add_argument("figures", type=Path, nargs="?", default=FIGURES, help="JSON of `scripts/bench bytes --out`")
    parser.add_argument("--out", type=Path, default=PICTURE, help="PNG to write (default: docs/bytes.png)")
    arguments = parser.parse_args(argv)
    try:
        print(plot_bytes(arguments.figures, arguments.out))
    except GolfError as error:
        print(f"plot_bytes: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
