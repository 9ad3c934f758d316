"""Least time of every operation at its real shapes on an H200 and an H100, by arithmetic alone.

    python scripts/bench roofline [--write]

Bytes and FLOPs are those that the catalogue states, the same that `kernels` holds its measured times against. With
`--write` the tables go into the README of each operation, between markers.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.files import write_atomically
from scripts.bench.catalogue import OPERATIONS, Work, cases_of, roofline_ms

ROOT = Path(__file__).resolve().parents[2]
# bf16 products and copy of the H200 as measured there; the H100 has the same processors and memory of 3.35/4.8 of that.
DEVICES: dict[str, Mapping[str, float]] = {
    "H200": {"copy_bytes_per_s": 4.3e12, "bfloat16_flops_per_s": 790e12},
    "H100": {"copy_bytes_per_s": 3.0e12, "bfloat16_flops_per_s": 790e12},
}
# Folder of common/ whose README holds an operation's table; the others are named alike.
FOLDERS = {"ffn": "relu2_ffn", "muon": "optim", "fake_quantize": "quant"}
BEGIN = "<!-- roofline:begin (written by `python scripts/bench roofline --write`) -->"
END = "<!-- roofline:end -->"


def bound(work: Work, limits: Mapping[str, float]) -> str:
    """What a pass waits for at least."""
    memory = work.bytes / limits["copy_bytes_per_s"] >= work.flops / limits["bfloat16_flops_per_s"]
    return "memory" if memory else "products"


def table(operation: str) -> str:
    """The table of one operation in Markdown."""
    head = ["case of `scripts/bench`", "pass", "MB at least", "GFLOP", *(f"{name}, µs" for name in DEVICES), "bound by"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for case in cases_of([operation]):
        for direction, work in (("forward", case.forward), ("backward", case.backward)):
            if work is None:
                continue
            row = [case.name.partition("/")[2], direction, f"{work.bytes / 1e6:,.1f}", f"{work.flops / 1e9:,.1f}"]
            row += [f"{1e3 * roofline_ms([work], limits):,.1f}" for limits in DEVICES.values()]
            row.append(" / ".join(dict.fromkeys(bound(work, limits) for limits in DEVICES.values())))
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def readme_of(operation: str) -> Path:
    return ROOT / "common" / FOLDERS.get(operation, operation) / "README.md"


def with_table(text: str, operation: str) -> str:
    """A README with its table as the catalogue has it now. Raises ValueError without the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme_of(operation)} lacks the lines {BEGIN!r} and {END!r}, once each; put them in")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table(operation)}\n{END}{rest.partition(END)[2]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print every table, or write them."""
    parser = argparse.ArgumentParser(
        "python scripts/bench roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into the READMEs instead")
    arguments = parser.parse_args(argv)
    for operation in OPERATIONS:
        path = readme_of(operation)
        if arguments.write:
            write_atomically(path, with_table(path.read_text(encoding="utf-8"), operation).encode())
        else:
            print(f"{operation}\n\n{table(operation)}\n")
    return 0
