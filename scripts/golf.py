"""One run on a track: `make golf-mini` prepares text, trains by the track's rules, and prints its place in the table.

    python scripts/golf.py mini [--corpus PATH] [--seed N] [--preset NAME | --entry baseline] [--fresh]

The first run lets the clock decide how many steps there are, and its log records every reading. Where that run is
finished, the same command repeats it by those readings (`--clock_from`): the same steps at the same learning rates, so
the score must be the same to the last bit, and is compared. `--fresh` throws the run away and starts over.

CORPUS is the standard library's text, a file or folder that scripts/prepare_text.py reads, or a folder that holds
`*.train.jsonl*` and `*.val.jsonl*`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import ConfigError, DataError, GolfError
from common.files import write_atomically
from common.text.shards import list_shards
from scripts.demo import PREPARE, compressed_bpb, heading, run_script, validation_documents
from scripts.leaderboard import FOLDER, Track, add_runs, broken_rules, ranked, read_run, read_store, table, track_named

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = {name: ROOT / "submissions" / name / "train_gpt.py" for name in ("jepa_mamba", "baseline")}


def corpus_arguments(corpus: str) -> tuple[str, list[str]]:
    """CORPUS -> the name of its data folder and the sources for prepare_text. Raises ConfigError."""
    if corpus in ("", "stdlib"):
        return "stdlib", ["--source", "stdlib"]
    path = Path(corpus)
    if not path.exists():
        raise ConfigError(f"corpus {corpus} does not exist; give a file, a folder, or nothing for the standard library")
    pairs = [sorted(path.glob(f"*.{split}.jsonl*")) for split in ("train", "val")] if path.is_dir() else [[], []]
    if all(len(found) == 1 for found in pairs):
        name = pairs[0][0].name.split(".train.")[0]
        return name, ["--source", str(pairs[0][0]), "--val-source", str(pairs[1][0])]
    if any(pairs):
        counts = f"{len(pairs[0])} *.train.jsonl* and {len(pairs[1])} *.val.jsonl*"
        raise ConfigError(f"corpus {corpus} holds {counts}; expected one of each, or neither")
    return path.stem, ["--source", str(path)]


def prepare(track: Track, corpus: str, data: Path | None) -> Path:
    """Shards of the corpus with the track's tokenizer, made once; yardsticks beside them. Raises GolfError."""
    name, sources = corpus_arguments(corpus)
    folder = data or ROOT / "data" / f"{name}-bpe{track.vocab_size}"
    if data is None or not (data / "manifest.json").is_file():
        limit = ["--max-train-bytes", str(track.max_train_bytes)] if track.max_train_bytes else []
        bpe = ("--tokenizer", "bpe", "--vocab-size", str(track.vocab_size))
        run_script(PREPARE, *sources, "--out", str(folder), *bpe, *limit)
    digest = hashlib.sha256()
    for shard in list_shards(str(folder / "*_val_*.bin")):
        digest.update(Path(shard).read_bytes())
    notes = folder / "yardsticks.json"
    if not notes.is_file() or digest.hexdigest() not in json.loads(notes.read_text(encoding="utf-8")):
        bpb = compressed_bpb(validation_documents(folder))
        yardsticks = {"brotli -11, per document": bpb["brotli_bpb"], "xz -9, per document": bpb["xz_bpb"]}
        about = {digest.hexdigest(): {"name": name, "yardsticks": yardsticks}}
        write_atomically(notes, (json.dumps(about, indent=1) + "\n").encode())
    return folder


def limit_machine(track: Track) -> dict[str, str]:
    """Pin this process, and so the runs that it starts, to the track's cores; the variables that go with it."""
    if not track.threads:
        return {}
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < track.threads:
        print(f"golf: {len(cores)} core(s) here, the track has {track.threads}: fewer steps than there could be")
    os.sched_setaffinity(0, cores[: track.threads])
    count = str(min(track.threads, len(cores)))
    return {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}


def train_command(track: Track, entry: str, preset: str, seed: int, data: Path, runs: Path, run_id: str) -> list[str]:
    where = ["--data_path", str(data), "--runs_dir", str(runs), "--run_id", run_id, "--seed", str(seed)]
    rules = ["--max_wallclock_seconds", f"{track.train_s:g}", "--vocab_size", str(track.vocab_size), "--clock", "wall"]
    if track.threads:
        rules += ["--device", "cpu", "--compile_model", "1"]  # before the clock starts; `more` may take it back
    if entry == "jepa_mamba" and track.bytes_field == "artifact_bytes":
        rules += ["--budget_bytes", "0"]  # code is free; the artifact is weighed here
    return [str(ENTRIES[entry]), "--preset", preset, *where, *rules]


def read_summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def golf(
    track: Track, data: Path, runs: Path, seed: int, entry: str, preset: str, fresh: bool, more: Sequence[str] = ()
) -> dict[str, Any]:
    """Train (or repeat), check the rules, print the table. `more` goes to the entry. Raises GolfError."""
    recipe = entry if entry == "baseline" else preset
    first = runs / f"{track.name}-{recipe}-seed{seed}"
    repeating = (first / "summary.json").is_file() and not fresh
    if repeating and entry == "baseline":
        raise ConfigError(f"{first} is finished and the baseline keeps no readings of its clock; --fresh starts over")
    run = runs / f"{first.name}-again" if repeating else first
    command = train_command(track, entry, preset, seed, data, runs, run.name)
    command += [*(["--clock_from", str(first)] if repeating else []), *more]
    if (run / "summary.json").is_file():
        command.append("--overwrite")
    heading(f"train: {run.name}" + (f", by the clock of {first.name}" if repeating else ""))
    run_script(Path(command[0]), *command[1:])
    summary = read_summary(run)
    if repeating:
        before = read_summary(first)
        same = all(summary[name] == before[name] for name in ("val_bpb", "val_loss", "artifact_sha256", "steps"))
        heading("repetition")
        print(f"{before['val_bpb']!r} bpb before, {summary['val_bpb']!r} now, {summary['steps']} steps")
        if not same:
            raise GolfError(f"{run} is not {first} bit for bit; compare their summary.json and train.log")
        print("equal bit for bit")
    broken = broken_rules(summary, track)
    if broken and not repeating:  # a repetition may be slower than the run that it repeats
        raise DataError(f"{run} breaks the rules of track {track.name}: {'; '.join(broken)}")
    store, own = read_store(track, FOLDER), read_run(first, track)
    rivals = [r for r in add_runs(store, [own]) if r["val_sha256"] == own["val_sha256"]]
    place = 1 + [row["recipe"] for row in ranked(rivals)].index(own["recipe"])
    about = json.loads((data / "yardsticks.json").read_text(encoding="utf-8"))
    heading(f"track {track.name}: {track.about}")
    print(table(rivals, about.get(own["val_sha256"], {}).get("yardsticks", {}), mark=own["recipe"]))
    print(f"\nplace {place} of {len(ranked(rivals))}: {own['recipe']}, {own['val_bpb']:.4f} bpb; run: {first}")
    print(f"to keep it: make leaderboard TRACK={track.name} RUNS={first} DATA={data}")
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One run on a track, and its place in the table.")
    parser.add_argument("track", help="mini, h200")
    parser.add_argument("--corpus", default=os.environ.get("CORPUS", ""), help="text (default: CORPUS, else stdlib)")
    parser.add_argument("--data", type=Path, default=None, help="folder of shards (default: data/NAME-bpeN)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of run folders")
    parser.add_argument("--seed", type=int, default=42, help="seed of the run")
    parser.add_argument("--entry", default="jepa_mamba", choices=sorted(ENTRIES), help="whose train_gpt.py")
    parser.add_argument("--preset", default="", help="its preset (default: the track's)")
    parser.add_argument("--fresh", action="store_true", help="replace a finished run instead of repeating it")
    arguments, more = parser.parse_known_args(argv)
    try:
        track = track_named(arguments.track)
        preset = arguments.preset or (track.preset if arguments.entry == "jepa_mamba" else track.name)
        os.environ.update(limit_machine(track))
        data = prepare(track, arguments.corpus, arguments.data)
        golf(track, data, arguments.runs, arguments.seed, arguments.entry, preset, arguments.fresh, more)
    except GolfError as error:
        print(f"golf: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
