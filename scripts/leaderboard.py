"""Leaderboards of the tracks, from run folders: `make leaderboard TRACK=mini RUNS='runs/a runs/b'`.

A track fixes text, machine, seconds of training and bytes. `submissions/leaderboards/TRACK.json` collects one record a
run (copied out of `summary.json`, after it was checked against the rules), TRACK.md is rendered from it: one table a
validation text, one row a recipe, the mean over its seeds. Scores on different texts never share a table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.artifact.budget import CHALLENGE_BUDGET_BYTES
from common.errors import ConfigError, DataError, GolfError
from common.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "submissions" / "leaderboards"


@dataclass(frozen=True)
class Track:
    """The rules of a track.

    Args:
        preset: the entry's own candidate.
        vocab_size: entries of its tokenizer.
        train_s: seconds of training by the wall clock.
        bytes_field: what the budget counts, a field of summary.json.
        budget_bytes: how much of it there may be.
        threads: CPU threads at most; 0 where a GPU trains.
        gpu: part of the name that every GPU of the machine must have; "" for none.
        gpus: how many of them.
        max_train_bytes: training text that is prepared, more than anyone can see in the time; 0 for all.
    """

    name: str
    about: str
    preset: str
    vocab_size: int
    train_s: float
    bytes_field: str
    budget_bytes: int
    threads: int
    gpu: str
    gpus: int
    max_train_bytes: int


TRACKS = {
    track.name: track
    for track in (
        Track(
            "mini", "two CPU cores, 600 s of training, 500,000 bytes of artifact (code is free), lossless BPE 1024",
            "best_mini", 1024, 600.0, "artifact_bytes", 500_000, 2, "", 0, 60_000_000,
        ),
        Track(
            "h200", "one H200, 600 s of training, 16,000,000 bytes of code and artifact, lossless BPE 8192",
            "best_h200", 8192, 600.0, "total_bytes", CHALLENGE_BUDGET_BYTES, 0, "H200", 1, 0,
        ),
        Track(
            "full", "8 x H100, 600 s of training, 16,000,000 bytes of code and artifact, FineWeb sp8192",
            "best_bpe", 8192, 600.0, "total_bytes", CHALLENGE_BUDGET_BYTES, 0, "H100", 8, 0,
        ),
    )
}  # fmt: skip
# What the table needs of a run; `machine` is made from its environment.
FIELDS = (
    "val_bpb", "float_val_bpb", "val_bytes", "val_sha256", "tokenizer_sha256", "eval_mode", "artifact_bytes", "params",
    "steps", "tokens", "train_s", "clock", "seed", "code_sha256",
)  # fmt: skip


def track_named(name: str) -> Track:
    if name not in TRACKS:
        raise ConfigError(f"there is no track {name!r}; tracks: {', '.join(TRACKS)}")
    return TRACKS[name]


def broken_rules(summary: Mapping[str, Any], track: Track) -> list[str]:
    """What keeps a finished run out of a track's table; empty if nothing does."""
    machine, found = summary.get("environment", {}), []
    counted = summary.get(track.bytes_field, math.inf)
    if counted > track.budget_bytes:
        found.append(f"{track.bytes_field} is {counted:,}, at most {track.budget_bytes:,} are allowed")
    if summary.get("clock") != "wall":
        found.append(f"its clock was {summary.get('clock')!r}; a track counts seconds of the wall clock")
    if summary["train_s"] > track.train_s:
        found.append(f"it trained for {summary['train_s']:.2f} s, at most {track.train_s:g} are allowed")
    if not summary.get("tokenizer_lossless") and track.name != "full":
        found.append("its tokenizer is lossy: bits per byte of the original text cannot be told")
    if summary["config"]["vocab_size"] != track.vocab_size:
        found.append(f"its vocabulary has {summary['config']['vocab_size']} entries, not {track.vocab_size}")
    gpus = machine.get("gpus", [])
    if track.threads and (gpus or machine.get("threads", math.inf) > track.threads):
        found.append(f"it ran on {machine.get('threads')} threads, GPUs {gpus}; {track.threads} threads are allowed")
    if track.gpu and not (len(gpus) == track.gpus and all(track.gpu in gpu for gpu in gpus)):
        found.append(f"it ran on {gpus or 'no GPU'}; the track's machine is {track.gpus} x {track.gpu}")
    return found


def read_run(run: Path, track: Track) -> dict[str, Any]:
    """One run folder -> its record. Raises DataError for an unfinished run or one that breaks a rule."""
    path = run / "summary.json"
    if not path.is_file():
        raise DataError(f"{path} is missing; a finished run writes it")
    summary = json.loads(path.read_text(encoding="utf-8"))
    missing = [name for name in FIELDS if name not in summary]
    if missing:
        raise DataError(f"{path} has no {', '.join(missing)}; expected the summary.json of an entry")
    broken = broken_rules(summary, track)
    if broken:
        raise DataError(f"{run} cannot enter track {track.name}: {'; '.join(broken)}")
    record = {name: summary[name] for name in FIELDS}
    return record | {"recipe": recipe_of(run.name, summary), "counted_bytes": summary[track.bytes_field]}


def recipe_of(run: str, summary: Mapping[str, Any]) -> str:
    """What runs of one recipe have in common: the run's name without its seed."""
    name = run.removesuffix("-again")
    return name.removesuffix(f"-seed{summary['seed']}").removesuffix(f"-{summary['seed']}")


def ranked(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one table: recipes by mean bits per byte over their seeds, best first."""
    by_recipe: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in records:
        by_recipe.setdefault(record["recipe"], {})[record["seed"]] = record
    rows = []
    for recipe, seeds in by_recipe.items():
        runs = list(seeds.values())
        means = {
            name: math.fsum(run[name] for run in runs) / len(runs)
            for name in ("val_bpb", "float_val_bpb", "counted_bytes", "params", "steps", "train_s")
        }
        spread = math.sqrt(math.fsum((r["val_bpb"] - means["val_bpb"]) ** 2 for r in runs) / max(len(runs) - 1, 1))
        row = {"recipe": recipe, "seeds": len(runs), "sd": spread if len(runs) > 1 else None}
        rows.append(row | means | {"eval_mode": runs[0]["eval_mode"]})
    return sorted(rows, key=lambda row: row["val_bpb"])


def table(records: Sequence[Mapping[str, Any]], yardsticks: Mapping[str, float], mark: str = "") -> str:
    """Markdown; `mark` is the recipe that is printed bold."""
    head = ("place", "recipe", "seeds", "bpb, artifact", "sd", "bpb, float", "bytes", "parameters", "steps", "train s")
    head = (*head, "scored")
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    place = 0
    rows = [*ranked(records), *({"recipe": name, "val_bpb": bpb} for name, bpb in yardsticks.items())]
    for row in sorted(rows, key=lambda row: row["val_bpb"]):
        if "seeds" not in row:
            lines.append(f"| – | {row['recipe']} | – | {row['val_bpb']:.4f} |{' – |' * 7}")
            continue
        place += 1
        name = f"**{row['recipe']}**" if row["recipe"] == mark else row["recipe"]
        sd = "–" if row["sd"] is None else f"{row['sd']:.4f}"
        numbers = (row["counted_bytes"], row["params"], row["steps"], row["train_s"])
        cells = [f"{number:,.0f}" for number in numbers]
        cells = [f"{row['val_bpb']:.4f}", sd, f"{row['float_val_bpb']:.4f}", *cells, row["eval_mode"]]
        lines.append(f"| {place} | {name} | {row['seeds']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_store(track: Track, folder: Path = FOLDER) -> dict[str, Any]:
    path = folder / f"{track.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": [], "texts": {}}


def add_runs(store: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Stored records with new ones in place of those of the same recipe, seed and text."""

    def key(record: Mapping[str, Any]) -> tuple[str, int, str]:
        return record["recipe"], record["seed"], record["val_sha256"]

    merged = {key(record): dict(record) for record in (*store["runs"], *records)}
    return [merged[name] for name in sorted(merged)]


def page(track: Track, store: Mapping[str, Any]) -> str:
    """TRACK.md."""
    parts = [f"# Track `{track.name}`", f"{track.about[0].upper()}{track.about[1:]}."]
    parts.append(
        "Written by `make leaderboard`; a bpb is of the artifact read back from disk, over the whole validation text, "
        "the mean over seeds."
    )
    texts = sorted({record["val_sha256"] for record in store["runs"]})
    if not texts:
        parts.append(f"No runs yet; `make leaderboard TRACK={track.name} RUNS=runs/NAME` adds one.")
    for text in texts:
        records = [record for record in store["runs"] if record["val_sha256"] == text]
        about = store["texts"].get(text, {})
        name = about.get("name", "text")
        parts.append(f"## {name}: {records[0]['val_bytes']:,} bytes, shards {text[:12]}")
        parts.append(table(records, about.get("yardsticks", {})))
    return "\n\n".join(parts) + "\n"


def update(track: Track, runs: Sequence[Path], texts: Mapping[str, Any], folder: Path = FOLDER) -> dict[str, Any]:
    """Add run folders to the track's store and write both files; returns the store. Raises DataError."""
    store = read_store(track, folder)
    records = add_runs(store, [read_run(run, track) for run in runs])
    store = {"runs": records, "texts": {**store["texts"], **texts}}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{track.name}.json", (json.dumps(store, indent=1) + "\n").encode())
    write_atomically(folder / f"{track.name}.md", page(track, store).encode())
    return store


def read_texts(data: Sequence[Path]) -> dict[str, Any]:
    """What `scripts/golf.py` has noted about prepared texts: names and yardsticks by the hash of their shards."""
    found = {}
    for folder in data:
        path = folder / "yardsticks.json"
        if not path.is_file():
            raise DataError(f"{path} is missing; `make golf-mini` writes it into the folder of shards")
        found |= json.loads(path.read_text(encoding="utf-8"))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a track's leaderboard from run folders.")
    parser.add_argument("track", help=f"one of {', '.join(TRACKS)}")
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="run folders that are added")
    parser.add_argument("--data", nargs="*", type=Path, default=[], help="folders of shards, for names and yardsticks")
    arguments = parser.parse_args(argv)
    try:
        track = track_named(arguments.track)
        print(page(track, update(track, arguments.runs, read_texts(arguments.data))))
    except GolfError as error:
        print(f"leaderboard: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
