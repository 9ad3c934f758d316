"""Write the result table of README.md from run folders: `make readme RUNS='runs/demo runs/other'`.

`docs/results.json` collects one record a run (copied out of `summary.json`, and of `demo.json` where a run has one), so
the table can be rendered anew, and checked, without the run folders. A later run of the same name replaces its record.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from common.errors import DataError, GolfError

ROOT = Path(__file__).resolve().parents[1]
# Record field -> heading; the order is the table's.
COLUMNS = {
    "run": "run",
    "val_bpb": "bpb, from the artifact",
    "float_val_bpb": "bpb, float weights",
    "xz_bpb": "xz -9",
    "brotli_bpb": "brotli -11",
    "artifact_bytes": "artifact bytes",
    "total_bytes": "with code",
    "params": "parameters",
    "tokens": "training tokens",
    "train_s": "training s",
    "val_bytes": "scored bytes",
}
FROM_SUMMARY = ("val_bpb", "float_val_bpb", "artifact_bytes", "total_bytes", "params", "tokens", "train_s", "val_bytes")
FROM_DEMO = ("xz_bpb", "brotli_bpb")


def read_record(run: Path) -> dict[str, Any]:
    """One run folder -> its record. Raises DataError if summary.json is missing or lacks a field."""
    path = run / "summary.json"
    if not path.is_file():
        raise DataError(f"{path} is missing; a finished run writes it: give the folder of a run that has ended")
    summary = json.loads(path.read_text(encoding="utf-8"))
    missing = [name for name in FROM_SUMMARY if name not in summary]
    if missing:
        raise DataError(f"{path} has no {', '.join(missing)}; expected the summary.json of train_gpt.py")
    record: dict[str, Any] = {"run": run.name} | {name: summary[name] for name in FROM_SUMMARY}
    demo = run / "demo.json"
    if demo.is_file():
        values = json.loads(demo.read_text(encoding="utf-8"))
        record |= {name: values[name] for name in FROM_DEMO}
    return record


def cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def render(records: list[dict[str, Any]]) -> str:
    if not records:
        return "No run is recorded yet: `make demo`, then `make readme RUNS=runs/demo`."
    head = [f"| {' | '.join(COLUMNS.values())} |", f"|{' --- |' * len(COLUMNS)}"]
    return "\n".join(head + [f"| {' | '.join(cell(record.get(name)) for name in COLUMNS)} |" for record in records])


def replace_between(text: str, name: str, body: str) -> str:
    """The text with what stands between `<!-- NAME:begin ... -->` and `<!-- NAME:end -->` replaced."""
    begin, end = text.find(f"<!-- {name}:begin"), text.find(f"<!-- {name}:end -->")
    if begin < 0 or end < begin:
        raise DataError(f"no <!-- {name}:begin --> ... <!-- {name}:end --> in the text; put the two markers back")
    begin = text.index("-->", begin) + len("-->")
    return f"{text[:begin]}\n{body}\n{text[end:]}"


def write_text_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def update(root: Path, runs: list[Path]) -> str:
    """Add the runs to docs/results.json, write README.md's table, and return the table."""
    store, readme = root / "docs" / "results.json", root / "README.md"
    records = {record["run"]: record for record in json.loads(store.read_text(encoding="utf-8"))}
    for run in runs:
        record = read_record(run)
        records[record["run"]] = record
    ordered = [records[name] for name in sorted(records)]
    table = render(ordered)
    write_text_atomically(store, json.dumps(ordered, indent=2) + "\n")
    write_text_atomically(readme, replace_between(readme.read_text(encoding="utf-8"), "results", table))
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the generated tables of README.md.")
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="run folders whose results are added")
    arguments = parser.parse_args(argv)
    try:
        print(update(ROOT, arguments.runs))
    except GolfError as error:
        print(f"readme_tables: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
