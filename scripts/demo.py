"""What `make demo` runs: real text in, a trained, exported and scored language model out, in minutes on two CPU cores.

1. The standard library's own source text becomes shards with a 1024-token lossless tokenizer trained on it.
2. The `demo` preset trains on them (a progress bar on a terminal, lines elsewhere) and exports an artifact.
3. A fresh process scores that artifact on the validation text; another one writes a sample.
4. `xz -9` and `brotli -11` compress every validation document by itself: the yardstick.
5. The curves go to a PNG in the run folder, the numbers to `demo.json`, everything to one page, `report.html`.

Every number comes out of a process or a file, none is typed in. The byte counts of three independent sources must
agree: the documents decoded from the shards, the manifest, and the score.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import lzma
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import brotli
import numpy as np

from common.artifact.budget import CHALLENGE_BUDGET_BYTES, format_text_table
from common.errors import DataError, GolfError
from common.files import write_atomically
from common.text.shards import list_shards, open_shard
from common.text.tokenizer import load_tokenizer
from scripts.plot_run import plot_run
from scripts.report import write_run_report

ROOT = Path(__file__).resolve().parents[1]
ENTRY = ROOT / "submissions" / "jepa_mamba" / "train_gpt.py"
PREPARE = ROOT / "scripts" / "prepare_text.py"
# What the command line tools do at these levels: .xz with a CRC64, and brotli with its largest ordinary window.
BROTLI_WINDOW_BITS = 24
SAMPLE_PROMPT = "def read_lines(path):\n"
SAMPLE_TOKENS = 160


def validation_documents(data: Path) -> list[bytes]:
    """The validation text as it was before tokenization, one UTF-8 string a document.

    Raises:
        DataError: the tokenizer is lossy, or the decoded bytes are not what the manifest counts.
    """
    tokenizer = load_tokenizer(data / "tokenizer.model")
    if not tokenizer.lossless or tokenizer.bos_id is None:
        raise DataError(f"{data}/tokenizer.model is lossy or marks no documents; prepare it with --tokenizer bpe")
    shards = [
        open_shard(path, vocab_size=tokenizer.vocab_size, deep=True) for path in list_shards(data / "*_val_*.bin")
    ]
    tokens = np.concatenate(shards)
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    documents = [tokenizer.decode(part[1:]).encode() for part in np.split(tokens, starts)[1:]]
    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))["splits"]["val"]
    counted = (len(documents), sum(map(len, documents)))
    expected = (manifest["documents"], manifest["original_bytes"])
    if counted != expected:
        raise DataError(
            f"{data}: validation decodes to {counted[0]} documents of {counted[1]} bytes, but the manifest has "
            f"{expected[0]} of {expected[1]}; prepare the folder anew (scripts/prepare_text.py --overwrite)"
        )
    return documents


def compressed_bpb(documents: Sequence[bytes]) -> dict[str, float]:
    """Bits per byte of xz -9 and brotli -11, each document compressed by itself."""

    def sizes(document: bytes) -> tuple[int, int]:
        with_xz = lzma.compress(document, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9)
        return len(with_xz), len(brotli.compress(document, quality=11, lgwin=BROTLI_WINDOW_BITS))

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        xz, brotli_11 = map(sum, zip(*pool.map(sizes, documents), strict=True))
    total = sum(map(len, documents))
    return {"xz_bpb": 8 * xz / total, "brotli_bpb": 8 * brotli_11 / total}


def run_script(script: Path, *arguments: str, capture: bool = False) -> str:
    """Run one of our scripts in its own process, its output on ours unless captured. Raises GolfError if it fails."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # ours, also where nothing is installed
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE if capture else None,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise GolfError(f"{script.name} ended with status {done.returncode}; its message is above")
    return done.stdout or ""


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def results_table(result: dict[str, Any]) -> str:
    """The demo's last lines, from demo.json."""
    text, artifact = f"{result['val_bytes']:,}", result["artifact_bytes"]
    rows = [["", "bits per byte", "of text bytes", "bytes"]]
    rows.append(["this model, from its artifact", f"{result['val_bpb']:.4f}", text, f"{artifact:,}"])
    rows.append(["  its float weights", f"{result['float_val_bpb']:.4f}", text, ""])
    for name, label in (("xz_bpb", "xz -9, per document"), ("brotli_bpb", "brotli -11, per document")):
        rows.append([label, f"{result[name]:.4f}", text, f"{round(result[name] * result['val_bytes'] / 8):,}"])
    rows.append(["code + artifact", "", "", f"{result['total_bytes']:,}"])
    rows.append(["the challenge's limit", "", "", f"{CHALLENGE_BUDGET_BYTES:,}"])
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result["seconds"].items())
    return f"{format_text_table(rows, left_columns=1)}\n\ntime: {times}, in all {sum(result['seconds'].values()):.0f} s"


def run_demo(
    data: Path, runs: Path, run_id: str, vocab_size: int, more: Sequence[str] = (), source: str = "stdlib"
) -> dict[str, Any]:
    """The five steps above; returns what is in demo.json. `more` goes to the training command. Raises GolfError."""
    seconds: dict[str, float] = {}
    marks = [time.perf_counter()]

    def lap(name: str) -> None:
        marks.append(time.perf_counter())
        seconds[name] = marks[-1] - marks[-2]

    heading(f"text: {source}")
    bpe = ("--tokenizer", "bpe", "--vocab-size", str(vocab_size))
    run_script(PREPARE, "--source", source, "--out", str(data), *bpe)
    lap("text")

    heading("train, export")
    run = runs / run_id
    again = ["--overwrite"] if (run / "summary.json").exists() else []
    where = ("--data_path", str(data), "--runs_dir", str(runs), "--run_id", run_id)
    run_script(ENTRY, "--preset", "demo", *where, "--vocab_size", str(vocab_size), *again, *more)
    lap("training")

    heading("score the artifact in a fresh process")
    artifact = run / "model.artifact"
    printed = run_script(ENTRY, "--score", str(artifact), "--val", str(data / "*_val_*.bin"), capture=True)
    score = json.loads(printed.splitlines()[-1])
    print(f"val_bpb {score['val_bpb']:.4f} over {score['val_tokens']:,} tokens, {score['val_bytes']:,} bytes of text")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    if score["val_bpb"] != summary["val_bpb"]:
        raise GolfError(f"the fresh process scores {score['val_bpb']}, the run's summary says {summary['val_bpb']}")
    lap("scoring")

    heading("xz and brotli on the same documents")
    documents = validation_documents(data)
    text_bytes = sum(map(len, documents))
    if score["val_bytes"] != text_bytes:
        raise GolfError(f"the score counts {score['val_bytes']} bytes of text, the documents hold {text_bytes}")
    baselines = compressed_bpb(documents)
    print(f"{len(documents)} documents, {text_bytes:,} bytes")
    lap("yardsticks")

    heading("sample")
    where = ("--data_path", str(data), "--prompt", SAMPLE_PROMPT, "--tokens", str(SAMPLE_TOKENS))
    sample = run_script(ENTRY, "--generate", str(artifact), *where, capture=True)
    print(sample)
    lap("sample")

    kept = ("val_bpb", "float_val_bpb", "val_bytes", "val_tokens", "artifact_bytes", "total_bytes", "params", "tokens")
    result = {name: summary[name] for name in kept}
    result |= {"documents": len(documents), "sample": sample, "seconds": seconds} | baselines
    write_atomically(run / "demo.json", (json.dumps(result, indent=1) + "\n").encode())
    picture = plot_run(run)
    heading("result")
    print(results_table(result))
    print(f"\ncurves: {picture}\nreport: {write_run_report([run])}\nrun:    {run}")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train, export and score a small model on the standard library's text."
    )
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "stdlib-bpe1024", help="folder for the shards")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of run folders")
    parser.add_argument("--run_id", default="demo", help="name of the run folder; a finished one is replaced")
    parser.add_argument("--vocab_size", type=int, default=1024, help="entries of the tokenizer")
    arguments, more = parser.parse_known_args(argv)
    try:
        # Absolute: its programs run in the repository, the paths are meant from here.
        run_demo(arguments.data.resolve(), arguments.runs.resolve(), arguments.run_id, arguments.vocab_size, more)
    except GolfError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
