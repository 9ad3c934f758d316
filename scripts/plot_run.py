"""Curves of a run folder as a PNG: `.venv/bin/python scripts/plot_run.py runs/NAME`.

Left: bits per byte of the training batches and of validation over the tokens seen, the score of the artifact, and,
where `demo.json` has them, what xz and brotli reach on the same text. Right: the objectives, and the schedule with the
gradient norm.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # a file, never a window

from matplotlib.figure import Figure

from common.errors import DataError, GolfError

INK, SOFT, GRID = "#22272e", "#6b7480", "#e3e6ea"
BLUE, ORANGE, GREEN, RED, PURPLE = "#2f6fb3", "#d9772b", "#3a8f5c", "#c04a4a", "#7a5ea8"
OBJECTIVES = {"ce": ("cross-entropy", BLUE), "jepa": ("latent prediction", ORANGE), "sigreg": ("SIGReg", GREEN)}
STYLE: Any = {
    "font.size": 10, "axes.edgecolor": SOFT, "axes.labelcolor": INK, "axes.titlelocation": "left",
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": GRID, "text.color": INK, "xtick.color": SOFT, "ytick.color": SOFT,
    "legend.frameon": False, "figure.facecolor": "white",
}  # fmt: skip


def read_events(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Events of log.jsonl by kind. Raises DataError if it is missing, broken, or holds no step."""
    path = run / "log.jsonl"
    if not path.is_file():
        raise DataError(f"{path} is missing; give a run folder, such as runs/demo")
    events: dict[str, list[dict[str, Any]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not a JSON object ({error}); is the run still writing?") from None
        events.setdefault(event.get("event", ""), []).append(event)
    if not events.get("step"):
        raise DataError(f"{path} holds no training step; the run logs one every train_log_every steps")
    return events


def column(events: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([event.get(name, math.nan) for event in events], dtype=np.float64)


def smoothed(values: np.ndarray, span: int) -> np.ndarray:
    """Centred mean over about `span` values, narrower at both ends, so that it has no lag."""
    half = max(span // 2, 0)
    windows = (values[max(i - half, 0) : i + half + 1] for i in range(len(values)))
    return np.array(
        [window[np.isfinite(window)].mean() if np.isfinite(window).any() else math.nan for window in windows]
    )


def compact(number: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def draw_run(run: Path) -> Figure:
    """The figure of a run folder, finished or not. Raises DataError."""
    events = read_events(run)
    steps, validations = events["step"], events.get("validation", [])
    summary, demo = read_json(run / "summary.json"), read_json(run / "demo.json")
    tokens = column(steps, "tokens")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 5.6), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(1.7, 1))
        main, objectives, schedule = (
            figure.add_subplot(grid[:, 0]),
            *map(figure.add_subplot, (grid[0, 1], grid[1, 1])),
        )

        train_bpb = column(steps, "train_bpb")
        main.plot(tokens, train_bpb, color=BLUE, alpha=0.25, linewidth=1)
        trend = smoothed(train_bpb, len(train_bpb) // 25)
        main.plot(tokens, trend, color=BLUE, linewidth=1.8, label="training batches")
        if validations:
            at, bpb = column(validations, "trained_tokens"), column(validations, "val_bpb")
            main.plot(
                at, bpb, "o-", color=ORANGE, markersize=4, linewidth=1.4, label="validation, weights that would ship"
            )
        heights = [*trend[np.isfinite(trend)]]
        if summary:
            final = summary["val_bpb"]
            heights.append(final)
            main.plot(
                [tokens[-1]],
                [final],
                "*",
                color=RED,
                markersize=15,
                zorder=5,
                label=f"artifact, read back: {final:.3f}",
            )
        for name, label in (("xz_bpb", "xz -9"), ("brotli_bpb", "brotli -11")):
            if name in demo:
                heights.append(demo[name])
                main.axhline(demo[name], color=SOFT, linewidth=1, linestyle=(0, (5, 3)))
                main.annotate(
                    f"{label} per document: {demo[name]:.2f}", (0.995, demo[name]), xycoords=("axes fraction", "data"),
                    xytext=(0, 3), textcoords="offset points", ha="right", color=SOFT, fontsize=9,
                )  # fmt: skip
        if heights:
            # The first steps start at 8 bits a byte or so; what matters happens below.
            floor, top = min(heights), float(np.percentile(heights, 95))
            main.set_ylim(floor - 0.08 * (top - floor) - 0.02, top + 0.05 * (top - floor) + 0.02)
        main.set_xlim(0, tokens[-1] * 1.02)
        main.xaxis.set_major_formatter(lambda value, _: compact(value))
        main.set(xlabel="training tokens", ylabel="bits per byte", title="Bits per byte")
        main.legend(loc="upper right")

        for name, (label, color) in OBJECTIVES.items():
            values = column(steps, name)
            if np.isfinite(values).any():
                objectives.plot(tokens, smoothed(values, len(values) // 50), color=color, linewidth=1.5, label=label)
        objectives.set_yscale("log")
        objectives.set_title("Objectives (nats)")
        objectives.legend(loc="best", ncols=3, fontsize=9)

        schedule.plot(tokens, column(steps, "lr_scale"), color=PURPLE, linewidth=1.6, label="learning rate, relative")
        schedule.set_ylim(0, 1.08)
        schedule.set_title("Schedule and gradient norm")
        norm = schedule.twinx()
        norm.plot(
            tokens, column(steps, "grad_norm"), color=GREEN, alpha=0.55, linewidth=1, label="gradient norm (right)"
        )
        norm.set_yscale("log")
        norm.grid(False)
        handles = [*schedule.get_legend_handles_labels()[0], *norm.get_legend_handles_labels()[0]]
        schedule.legend(handles=handles, loc="lower left", fontsize=9)
        schedule.set_xlabel("training tokens")
        for axes in (objectives, schedule):
            axes.xaxis.set_major_formatter(lambda value, _: compact(value))

        speed = float(np.nanmedian(column(steps, "tokens_per_s")))
        facts = [
            run.name,
            f"{compact(float(tokens[-1]))} tokens in {steps[-1]['elapsed_s']:.0f} s",
            f"{speed:,.0f} tokens/s",
        ]
        if summary:
            facts += [f"{summary['params']:,} parameters", f"artifact {summary['artifact_bytes']:,} bytes"]
        figure.suptitle("   ·   ".join(facts), x=0.01, ha="left", color=SOFT, fontsize=10)
    return figure


def plot_run(run: Path, out: Path | None = None) -> Path:
    """Draw a run into a PNG (default: curves.png in the run folder) and return its path. Raises DataError."""
    out = out or run / "curves.png"
    figure = draw_run(run)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, out)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Curves of a run folder as a PNG.")
    parser.add_argument("run", type=Path, help="run folder, such as runs/demo")
    parser.add_argument("--out", type=Path, default=None, help="PNG to write (default: curves.png in the run folder)")
    arguments = parser.parse_args(argv)
    try:
        print(plot_run(arguments.run, arguments.out))
    except GolfError as error:
        print(f"plot_run: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
