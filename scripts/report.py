"""One self-contained HTML page for a run folder of either learner, or for several, laid over one another.

    python scripts/report.py runs/demo                    # runs/demo/report.html
    python scripts/report.py runs/a runs/b --out ab.html  # curves of both in one picture, numbers side by side
"""

from __future__ import annotations

import argparse
import html
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import DataError, GolfError
from common.files import write_atomically
from common.report import (
    REPORT_COLOURS,
    Curve,
    chart_svg,
    embedded_picture,
    folded,
    html_page,
    html_table,
    log_points,
    read_log_events,
)
from worldmodel.report import artifact_section, world_sections

# (name in the log, what it is over). Other numbers of a log follow in order of their names.
FIRST_CURVES = ("train_bpb", "val_bpb", "loss", "tokens_per_s", "frames_per_s")
NOT_CURVES = {"step", "elapsed_s", "eta_s", "tokens", "trained_tokens", "val_tokens", "val_bytes"}
STAGE_FOLDERS = ("tokenizer", "lam", "dynamics", "dynamics_latent")


class RunRecord:
    """What a run folder says about itself."""

    def __init__(self, folder: Path, label: str, colour: str) -> None:
        """Raises DataError: there is neither a log nor a stage with one."""
        self.folder, self.label, self.colour = folder, label, colour
        self.summary, self.config = _read(folder / "summary.json"), _read(folder / "config.json")
        self.demo, self.evaluation = _read(folder / "demo.json"), _read(folder / "evaluation.json")
        self.logs = {"": folder / "log.jsonl"} if (folder / "log.jsonl").is_file() else {}
        self.logs |= {
            f"{stage}: ": folder / stage / "log.jsonl"
            for stage in STAGE_FOLDERS
            if (folder / stage / "log.jsonl").is_file()
        }
        if not self.logs:
            raise DataError(f"{folder} has no log.jsonl, nor has a stage in it; give a run folder, such as runs/demo")
        self.events = {prefix: read_log_events(path) for prefix, path in self.logs.items()}

    def curves(self) -> dict[str, tuple[tuple[float, float], ...]]:
        """Every number of the logs over steps, by name."""
        found: dict[str, tuple[tuple[float, float], ...]] = {}
        for prefix, events in self.events.items():
            names = {name for event in events for name in event} - NOT_CURVES
            for name in names:
                points = log_points(events, name)
                if len(points) >= 2:
                    found[prefix + name] = points
        return found

    def numbers(self) -> dict[str, str]:
        """The summary's numbers, flat."""
        result = {}
        for name, value in {**self.summary, **{k: v for k, v in self.demo.items() if k.endswith("_bpb")}}.items():
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                continue
            whole = f"{value:,}" if isinstance(value, int) else str(value)
            result[name] = f"{value:.6g}" if isinstance(value, float) else whole
        for name, bar in self.evaluation.get("bars", {}).items():
            result[name] = f"{bar['value']:.3f}"
        return result


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); the run folder is damaged") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def curve_order(name: str) -> tuple[int, str]:
    """Place of a curve on the page: what matters first."""
    plain = name.rpartition(": ")[2]
    return (FIRST_CURVES.index(plain) if plain in FIRST_CURVES else len(FIRST_CURVES), name)


def command_of(record: RunRecord) -> str:
    """The command that makes a run again, from its configuration."""
    config = record.config
    if "profile" in config:
        return f"python -m worldmodel coinrun --profile {config['profile']}"
    if "stage" in config:
        return stage_command(config)
    options = config.get("config", {})
    words = ["python", "submissions/jepa_mamba/train_gpt.py", "--preset", str(config.get("preset", ""))]
    words += [part for name, value in options.items() for part in (f"--{name}", _option(value)) if value != ""]
    return shlex.join(words)


def stage_command(config: dict[str, Any]) -> str:
    """The command that trains one stage of a world model as its configuration says, from the nearest preset."""
    from worldmodel.cli import train_presets  # with JAX: seconds that other pages do not need
    from worldmodel.config import to_dict

    wanted, best, name = flat_options(config), None, ""
    for preset, command in train_presets().items():
        base = flat_options(to_dict(command.config))
        if base["stage"] == wanted["stage"]:
            changed = {option: value for option, value in wanted.items() if base.get(option) != value}
            if best is None or len(changed) < len(best):
                best, name = changed, preset
    words = ["python", "-m", "worldmodel", "train", name]
    for option, value in sorted((best or {}).items()):
        flag, _, last = f"--{option}".replace("_", "-").rpartition(".")
        flag = f"{flag}." if flag else ""
        if isinstance(value, bool):
            prefix = flag or "--"
            words.append(f"{prefix}{'' if value else 'no-'}{last.removeprefix('--')}")
        else:
            words += [flag + last, *(map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join(words)


def flat_options(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as {"a.b": value}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flat_options(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _option(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def run_sections(record: RunRecord) -> list[str]:
    """What only one run has: artifact, samples or rollouts, versions, configuration."""
    folder = record.folder
    parts = []
    if "profile" in record.evaluation:
        parts += world_sections(folder, record.evaluation)
    if "sample" in record.demo:
        parts += ["<h2>A sample</h2>", f"<pre>{html.escape(str(record.demo['sample']))}</pre>"]
    if (folder / "curves.png").is_file():
        parts.append(embedded_picture(folder / "curves.png"))
    if (folder / "model.artifact").is_file():
        parts += ["<h2>Bytes</h2>", artifact_section(folder / "model.artifact")]
    parts += ["<h2>To make it again</h2>", f"<pre>{html.escape(command_of(record))}</pre>"]
    log = folder / "train.log"
    if log.is_file():
        parts.append(folded("Versions, hardware: the lines of train.log that say so", versions_of(log)))
    return [*parts, folded("Configuration", json.dumps(record.config, indent=1))]


def versions_of(log: Path) -> str:
    """The lines of a train.log that name versions and hardware (the sources of modules are left out)."""
    wanted = ("python", "torch", "packages", "hardware", "cpu", "gpu", "started", "jax", "numpy")
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("#") or "==" in line]
    named = [line for line in lines if any(word in line.lower() for word in wanted) and len(line) < 2000]
    return "\n".join(line for line in named if "==== source" not in line)[:8000]


def make_page(folders: Sequence[Path]) -> str:
    """The document.

    Raises:
        DataError: a folder is not a run folder, or is damaged.
    """
    names = [folder.resolve().name for folder in folders]
    labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    records = [
        RunRecord(folder, label, REPORT_COLOURS[place % len(REPORT_COLOURS)])
        for place, (folder, label) in enumerate(zip(folders, labels, strict=True))
    ]
    numbers = [record.numbers() for record in records]
    order = list(dict.fromkeys(name for table in numbers for name in table))
    rows = [[name, *(table.get(name, "–") for table in numbers)] for name in order]
    parts = ["<h2>Numbers</h2>", html_table(["", *labels], rows)] if rows else ["<p>This run has no summary yet.</p>"]
    curves = [record.curves() for record in records]
    parts.append("<h2>Curves</h2>")
    for name in sorted({name for found in curves for name in found}, key=curve_order):
        pairs = zip(records, curves, strict=True)
        drawn = [Curve(record.label, found[name], record.colour) for record, found in pairs if name in found]
        parts.append(chart_svg(name, drawn, "steps"))
    for record in records:
        if len(records) > 1:
            parts.append(f'<h1 style="color:{record.colour}">{html.escape(record.label)}</h1>')
        parts += run_sections(record)
    return html_page(f"Report: {', '.join(labels)}", parts)


def write_run_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page (report.html in the folder of a single run); returns its path."""
    if out is None:
        if len(folders) != 1:
            raise DataError("several runs have no folder in common; name the page with --out")
        out = folders[0] / "report.html"
    content = make_page(folders).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, content)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 2 for a folder that is no run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, help="page to write")
    arguments = parser.parse_args(argv)
    try:
        print(f"report: {write_run_report(arguments.runs, arguments.out)}")
    except GolfError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
