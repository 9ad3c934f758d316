"""Write the result tables of README.md from run folders: `make readme RUNS='runs/demo runs/coinrun-cpu'`.

`docs/results.json` collects one record a run (copied out of `summary.json` and `demo.json`, or of a world model's
`evaluation.json`), so the tables can be rendered anew, and checked, without the run folders. A later run of the same
name replaces its record. The overview film of a world model is copied to `docs/RUN.gif`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common.errors import DataError, GolfError
from common.files import write_atomically

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
WORLD_COLUMNS = {
    "run": "run",
    "tokenizer_psnr_db": "tokenizer, dB",
    "above_copy_last_db_at_1": "rollout over copy-last, 1 frame, dB",
    "above_copy_last_db_at_4": "4 frames",
    "above_copy_last_db_at_8": "8 frames",
    "delta_psnr_db": "Δ₄PSNR, dB",
    "latent_delta_psnr_db": "Δ₄PSNR, latent actions",
    "latent_actions_used": "latent actions in use",
    "frames_per_s": "frames/s, batch 1",
    "artifact_bytes": "artifact bytes",
    "minutes": "minutes in all",
    "clips": "validation clips",
}
FROM_SUMMARY = ("val_bpb", "float_val_bpb", "artifact_bytes", "total_bytes", "params", "tokens", "train_s", "val_bytes")
FROM_DEMO = ("xz_bpb", "brotli_bpb")
# Marker in README.md (and key in docs/results.json) -> columns.
TABLES = {"results": COLUMNS, "worlds": WORLD_COLUMNS}


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


def read_world_record(run: Path) -> dict[str, Any]:
    """One finished run of `worldmodel coinrun` -> its record; intervals are kept as [value, low, high].

    Raises DataError if evaluation.json lacks a field.
    """
    path = run / "evaluation.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    try:
        recorded, latent = document["dynamics"]["artifact"], document["dynamics_latent"]["artifact"]
        record: dict[str, Any] = {
            "run": run.name,
            "tokenizer_psnr_db": _interval(recorded["tokenizer_psnr_db"]),
            "delta_psnr_db": _interval(recorded["delta_psnr_db"]),
            "latent_delta_psnr_db": _interval(latent["delta_psnr_db"]),
            "latent_actions_used": f"{latent['action_codes']['used']} of {latent['action_codes']['of']}",
            "frames_per_s": recorded["speed"]["frames_per_s"],
            "artifact_bytes": document["dynamics"]["artifact_bytes"],
            "minutes": document["seconds_total"] / 60,
            "clips": recorded["data"]["clips"],
        }
        for horizon in ("1", "4", "8"):
            entry = recorded["horizons"][horizon]["above_copy_last_db"]
            record[f"above_copy_last_db_at_{horizon}"] = _interval(entry)
    except KeyError as error:
        raise DataError(f"{path} has no {error}; expected the evaluation.json of `make coinrun`") from error
    return record


def _interval(entry: dict[str, float]) -> list[float]:
    return [entry["value"], entry["low"], entry["high"]]


def cell(value: Any, decimals: int = 4) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{decimals}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def render(records: list[dict[str, Any]], columns: dict[str, str]) -> str:
    if not records:
        return "No run is recorded yet: `make demo` or `make coinrun`, then `make readme RUNS=runs/NAME`."
    lines = [f"| {' | '.join(columns.values())} |", f"|{' --- |' * len(columns)}"]
    for record in records:
        cells = (cell(record.get(name), 1 if name == "minutes" else 4) for name in columns)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def replace_between(text: str, name: str, body: str) -> str:
    """The text with what stands between `<!-- NAME:begin ... -->` and `<!-- NAME:end -->` replaced."""
    begin, end = text.find(f"<!-- {name}:begin"), text.find(f"<!-- {name}:end -->")
    if begin < 0 or end < begin:
        raise DataError(f"no <!-- {name}:begin --> ... <!-- {name}:end --> in the text; put the two markers back")
    begin = text.index("-->", begin) + len("-->")
    return f"{text[:begin]}\n{body}\n{text[end:]}"


def update(root: Path, runs: list[Path]) -> str:
    """Add the runs to docs/results.json, write README.md's tables, and return them."""
    store, readme = root / "docs" / "results.json", root / "README.md"
    tables: dict[str, list[dict[str, Any]]] = json.loads(store.read_text(encoding="utf-8"))
    for run in runs:
        is_world = (run / "evaluation.json").is_file()
        record = read_world_record(run) if is_world else read_record(run)
        name = "worlds" if is_world else "results"
        others = [other for other in tables[name] if other["run"] != record["run"]]
        tables[name] = sorted([*others, record], key=lambda record: record["run"])
        film = run / "rollouts" / "overview.gif"
        if is_world and film.is_file():
            write_atomically(root / "docs" / f"{run.name}.gif", film.read_bytes())
    text = readme.read_text(encoding="utf-8")
    rendered = {name: render(tables[name], columns) for name, columns in TABLES.items()}
    for name, table in rendered.items():
        text = replace_between(text, name, table)
    write_atomically(store, (json.dumps(tables, indent=2) + "\n").encode())
    write_atomically(readme, text.encode())
    return "\n\n".join(rendered.values())


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
