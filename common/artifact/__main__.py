"""python -m common.artifact inspect FILE, budget WEIGHTS STATISTICS, budget --predict LAYOUT, measure FILE...

`inspect` draws its tables with rich where standard output is a terminal and rich is installed, and prints plain aligned
text elsewhere: for files, pipes and machines without it.
"""

from __future__ import annotations

import argparse
import html
import importlib.util
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.artifact.budget import (
    CHALLENGE_BUDGET_BYTES,
    SizeReport,
    check_budget,
    format_size_table,
    format_text_table,
    tensor_group,
)
from common.artifact.container import decode_artifact, encode_artifact, load_artifact, read_artifact, save_artifact
from common.artifact.predict import (
    leave_one_out,
    measure_artifact,
    predict_size,
    read_layout,
    read_measured,
    write_measured,
)
from common.errors import ArtifactError, GolfError
from common.files import write_atomically
from common.quant.gptq import LayerStatistics
from common.quant.grid import grid_rows, parse_grid_spec, rms_sigma
from common.quant.plan import ModelPlan, fit_model, plan_model
from common.report import folded, html_page, html_table, treemap_svg

Rows = list[list[str]]
SHARE_CELLS = 14


def _tensor_rows(report: SizeReport) -> Rows:
    rows = [["tensor", "shape", "grid", "bits/weight", "bytes"]]
    for tensor in report.tensors:
        shape = "x".join(str(length) for length in tensor.shape) or "scalar"
        bits = f"{tensor.bits_per_weight:.3f}" if tensor.n_weights else "-"
        rows.append([tensor.name, shape, tensor.grid, bits, f"{tensor.total_bytes:,}"])
    return rows


def _stream_rows(report: SizeReport) -> Rows:
    rows = [["stream", "layout", "codec", "raw bytes", "bytes"]]
    for index, stream in enumerate(report.streams):
        rows.append([str(index), stream.layout, stream.codec, f"{stream.raw_bytes:,}", f"{stream.stored_bytes:,}"])
    return rows


def _shares(report: SizeReport) -> list[float]:
    """Of the file's bytes, for each tensor."""
    return [tensor.total_bytes / report.file_bytes for tensor in report.tensors]


def split_place(name: str) -> tuple[str, str]:
    """A tensor's name as (where, what): up to its last numbered part ("blocks.3."), or to its first part."""
    found = re.match(r".*\d[^./]*[./]", name) or re.match(r"[^./]*[./]", name)
    return (found[0], name[found.end() :]) if found else ("", name)


def _rich_tables(path: str, meta: dict[str, Any], report: SizeReport) -> None:
    from rich.bar import Bar
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def table(title: str, rows: Rows, left_columns: int) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None)
        for column, name in enumerate(rows[0]):
            made.add_column(name, justify="left" if column < left_columns else "right", no_wrap=True)
        return made

    console = Console()
    rows = _tensor_rows(report)
    tensors = table(f"{Path(path).name}: {report.file_bytes:,} bytes", rows, 3)
    tensors.add_column("share", min_width=4, max_width=SHARE_CELLS)
    most, before = max(_shares(report), default=1.0), ""
    for row, share in zip(rows[1:], _shares(report), strict=True):
        place, name = split_place(row[0])
        if place != before:
            tensors.add_row(Text(place, "bold"))
        before = place
        bar = Bar(most, 0, share, color="cyan")
        tensors.add_row(*map(Text, [f"  {name}" if place else name, *row[1:]]), bar)
    console.print(tensors)
    rows = _stream_rows(report)
    streams = table("Streams", rows, 3)
    for row in rows[1:]:
        streams.add_row(*map(Text, row))
    console.print("", streams, "")
    print(format_size_table(report))
    print("\nmeta", json.dumps(meta, indent=2))


def inspect_file(path: str, page: str = "") -> None:
    """Print every tensor, stream and total of an artifact, and its meta data.

    Args:
        path: the artifact.
        page: HTML file to write, with a treemap of the bytes; "" for none.

    Raises:
        ArtifactError: the file is damaged.
        OSError: the page cannot be written.
    """
    _, meta, report = read_artifact(path)
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        _rich_tables(path, meta, report)
    else:
        print(format_text_table(_tensor_rows(report), left_columns=3))
        print()
        print(format_text_table(_stream_rows(report), left_columns=3))
        print()
        print(format_size_table(report))
        print()
        print("meta", json.dumps(meta, indent=2))  # ASCII: nothing in it can steer a terminal
    if page:
        write_atomically(page, artifact_page(path, meta, report).encode())
        print(f"page: {page}")


def artifact_page(path: str, meta: dict[str, Any], report: SizeReport) -> str:
    """A self-contained HTML page: a treemap by group of tensors, one by tensor, the tables, the meta data."""
    groups: dict[str, int] = {}
    for tensor in report.tensors:
        groups[tensor_group(tensor.name)] = groups.get(tensor_group(tensor.name), 0) + tensor.total_bytes
    rest = ("header, checksum", report.overhead_bytes)
    rows, streams = _tensor_rows(report), _stream_rows(report)
    with_share = [[*row, f"{share:.1%}"] for row, share in zip(rows[1:], _shares(report), strict=True)]
    bits = 8 * report.file_bytes / report.n_weights if report.n_weights else 0.0
    parts = [
        f"<p>{report.file_bytes:,} bytes for {report.n_weights:,} weights: {bits:.3f} bits a weight in all.</p>",
        "<h2>Where the bytes are</h2>",
        treemap_svg([*groups.items(), rest], "Bytes by place, the same place of all layers taken together"),
        treemap_svg([*((t.name, t.total_bytes) for t in report.tensors), rest], "Bytes by tensor"),
        "<h2>Tensors</h2>",
        html_table([*rows[0], "of the file"], with_share),
        "<h2>Streams</h2>",
        html_table(streams[0], streams[1:]),
        folded("Sizes by group, as text", format_size_table(report)),
        folded("Meta data", json.dumps(meta, indent=2)),
        "<h2>To make it again</h2>",
        f"<pre>python -m common.artifact inspect {html.escape(path)} --html PAGE</pre>",
    ]
    return html_page(f"Artifact: {Path(path).name}", parts)


def load_statistics(path: str) -> dict[str, LayerStatistics]:
    """Layer statistics of an artifact that holds NAME/hessian and NAME/sensitivity for each matrix NAME.

    Raises ArtifactError.
    """
    arrays, _ = load_artifact(path)
    names = sorted({name.rsplit("/", 1)[0] for name in arrays})
    wanted = {f"{name}/{part}" for name in names for part in ("hessian", "sensitivity")}
    if set(arrays) != wanted:
        stray = sorted(set(arrays) ^ wanted)[0]
        raise ArtifactError(f"{path}: {stray!r} has no partner among NAME/hessian and NAME/sensitivity")
    found = {}
    for name in names:
        hessian, sensitivity = (arrays[f"{name}/{part}"].astype(np.float64) for part in ("hessian", "sensitivity"))
        if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or sensitivity.ndim != 1:
            raise ArtifactError(f"{path}: {name} has statistics of shapes {hessian.shape} and {sensitivity.shape}")
        found[name] = LayerStatistics(hessian, sensitivity)
    return found


def _plan_table(plan: ModelPlan, weights: dict[str, np.ndarray], report: SizeReport) -> str:
    rows = [["tensor", "grid", "step/sigma", "bits/weight", "bytes", "expected loss, nats"]]
    for tensor in report.tensors:
        q = plan.tensors[tensor.name]
        ratio = "-"
        if tensor.name in plan.expected_nats:
            n_rows, _ = grid_rows(q.shape)
            sigma_R = np.maximum(rms_sigma(weights[tensor.name]), np.float32(1e-30))
            ratio = f"{float(np.median(q.scales[:n_rows] / sigma_R) * np.median(q.scales[n_rows:])):.3f}"
        expected = f"{plan.expected_nats[tensor.name]:.2e}" if tensor.name in plan.expected_nats else "-"
        bits = f"{tensor.bits_per_weight:.3f}" if tensor.n_weights else "-"
        rows.append([tensor.name, tensor.grid, ratio, bits, f"{tensor.total_bytes:,}", expected])
    return format_text_table(rows, left_columns=2)


def fit_file(options: argparse.Namespace) -> None:
    """Print the plan that fills the budget and the curve bytes <-> expected bpb; write the artifact if asked.

    Raises GolfError.
    """
    weights, meta = load_artifact(options.weights)
    statistics = load_statistics(options.statistics)
    strangers = sorted(set(statistics) - set(weights))
    if strangers:
        raise ArtifactError(f"{options.statistics}: {strangers[0]!r} is no tensor of {options.weights}")
    rest = parse_grid_spec(options.rest)
    specs = dict.fromkeys(weights, rest)
    budget_bytes = options.bytes - options.code_bytes

    def size_of(plan: ModelPlan) -> int:
        return len(encode_artifact(plan.tensors, meta))

    plan, points = fit_model(
        weights, statistics, specs, size_of, budget_bytes, rate=options.rate, start_nats=options.start,
        trellis=options.trellis,
    )  # fmt: skip
    for factor in [2.0**power for power in range(-options.points, options.points + 1) if power]:
        other = plan_model(
            weights, statistics, specs, plan.loss_nats * factor, options.rate, trellis=options.trellis
        )
        points.append((other.loss_nats, size_of(other), sum(other.expected_nats.values())))
    data = encode_artifact(plan.tensors, meta)
    check_budget(len(data) + options.code_bytes, options.bytes)
    report = save_artifact(options.out, plan.tensors, meta) if options.out else decode_artifact(data)[2]
    print(_plan_table(plan, weights, report))
    print()
    print(format_size_table(report, options.code_bytes, options.bytes))
    print()
    rows = [["bytes", "of the budget", "loss a weight, nats", "expected loss, nats", "expected bpb"]]
    for loss_nats, size, expected in sorted(set(points), key=lambda point: -point[1]):
        bpb = f"+{expected / math.log(2) / options.bytes_per_token:.5f}" if options.bytes_per_token else "-"
        rows.append([f"{size:,}", f"{size / budget_bytes:.2%}", f"{loss_nats:.3e}", f"{expected:.5f}", bpb])
    print(format_text_table(rows, left_columns=0))


def predict_file(options: argparse.Namespace) -> None:
    """Print what a model of a layout will weigh once it is trained. Raises GolfError, also over the budget."""
    report = predict_size(read_layout(options.predict), read_measured(options.measured))
    print("predicted, not measured:")
    print(format_size_table(report, options.code_bytes, options.bytes))
    check_budget(report.file_bytes + options.code_bytes, options.bytes)


def measure_files(paths: Sequence[str], earlier: str | None, out: str | None) -> None:
    """Print how well each artifact is predicted from all others; write what predictions need. Raises ArtifactError.

    The others are those given and, of a file that an earlier call wrote, those measured then.
    """
    reports = {path: read_artifact(path)[2] for path in paths}
    known = [one for one in read_measured(earlier) if one.label not in reports] if earlier else []
    if len(reports) + len(known) < 2:
        raise ArtifactError("give at least two artifacts of trained models: each is predicted from all others")
    rows = [["artifact", "weights", "bytes", "predicted from the others", "off by"]]
    for label, predicted in leave_one_out(reports, known).items():
        size = reports[label].file_bytes
        off = f"{predicted.file_bytes / size - 1:+.2%}"
        rows.append([label, f"{predicted.n_weights:,}", f"{size:,}", f"{predicted.file_bytes:,}", off])
    print(format_text_table(rows, left_columns=1))
    if out:
        measured = [measure_artifact(label, report) for label, report in reports.items()]
        write_atomically(out, write_measured([*known, *measured]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 2 for a file that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m common.artifact", description="Look into a model artifact.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect_command = commands.add_parser("inspect", help="print every tensor with its grid and its bytes, then totals")
    inspect_command.add_argument("file", metavar="FILE", help="the artifact")
    inspect_command.add_argument("--html", default="", metavar="PAGE", help="also write a page with a treemap of bytes")
    budget = commands.add_parser("budget", help="choose every step to fill a budget; print plan and curve")
    budget.add_argument("weights", metavar="WEIGHTS", nargs="?", help="artifact of float weights")
    budget.add_argument("statistics", metavar="STATISTICS", nargs="?", help="its NAME/hessian and NAME/sensitivity")
    budget.add_argument("--predict", metavar="LAYOUT", help="instead: JSON of shapes and grids of an untrained model")
    budget.add_argument("--measured", metavar="FILE", help="with --predict: what `measure` wrote of trained artifacts")
    budget.add_argument("--bytes", type=int, default=CHALLENGE_BUDGET_BYTES, help="for code and weights (%(default)s)")
    budget.add_argument("--code-bytes", type=int, default=0, help="of the code that is counted with them")
    budget.add_argument("--rest", default="bf16", help="grid of tensors without statistics (%(default)s)")
    budget.add_argument("--rate", type=float, default=0.25, help="weight of the coder's cost in rounding (%(default)s)")
    budget.add_argument("--trellis", action="store_true", help="on two interleaved grids: less loss, takes longer")
    budget.add_argument("--start", type=float, default=1e-9, help="loss a weight to begin with, nats (%(default)s)")
    budget.add_argument("--points", type=int, default=0, help="halvings and doublings of the loss to add to the curve")
    budget.add_argument("--bytes-per-token", type=float, default=0.0, help="of the text, for expected bpb")
    budget.add_argument("--out", metavar="FILE", help="write the artifact")
    measure = commands.add_parser("measure", help="what --predict needs of trained artifacts, and how well it does")
    measure.add_argument("files", metavar="FILE", nargs="+", help="artifacts of trained models")
    measure.add_argument("--with", dest="earlier", metavar="FILE", help="JSON of an earlier call: those artifacts, too")
    measure.add_argument("--out", metavar="FILE", help="JSON to write")
    options = parser.parse_args(arguments)
    if options.command == "budget" and (
        not options.measured or options.weights if options.predict else not (options.weights and options.statistics)
    ):
        parser.error("budget takes WEIGHTS and STATISTICS, or --predict LAYOUT and --measured FILE")
    try:
        if options.command == "inspect":
            inspect_file(options.file, options.html)
        elif options.command == "measure":
            measure_files(options.files, options.earlier, options.out)
        elif options.predict:
            predict_file(options)
        else:
            fit_file(options)
    except (GolfError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
