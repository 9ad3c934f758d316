"""What a container runs: `docker run IMAGE COMMAND [ARGUMENTS]`. It also runs outside, from a checkout.

The standard library only, and no shell: every command but `score` replaces this process by the program that it names,
so signals reach the training loop and exit statuses come back unchanged. `score` prints exactly one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENTRY = "submissions/jepa_mamba/train_gpt.py"
IMAGE_MANIFEST = "image.manifest"  # written when an image is built, by containers/manifest.py; absent from a checkout

# Commands, the packages that each needs, and what it does.
COMMANDS = {
    "train": ("torch", "train, export and score the language model: train_gpt.py ARGUMENTS"),
    "torchrun": ("torch", "the same in several processes: torchrun OPTIONS -- ARGUMENTS of train"),
    "score": ("torch", "score an artifact (/in) on validation shards (/val); prints one JSON object"),
    "verify": ("torch", "check a submission: verify_submission.py ARGUMENTS"),
    "demo": ("torch", "text, training, export, scores, curves, in minutes on a CPU; writes to the working folder"),
    "coinrun": ("jax", "the world model's case study: python -m worldmodel coinrun ARGUMENTS"),
    "worldmodel": ("jax", "any command of the world model: python -m worldmodel ARGUMENTS"),
    "test": ("pytest", "the tests whose framework is in this image: pytest ARGUMENTS"),
}
SCORED_PACKAGES = ("torch", "triton", "numpy", "sentencepiece", "brotli", "zstandard", "mamba-ssm", "causal-conv1d")


class UsageError(Exception):
    """The command line, an input path or the image itself does not allow what was asked."""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "usage: COMMAND [ARGUMENTS]; --help as an argument lists a command's own\n\n" + "\n".join(lines)


def test_paths(installed: frozenset[str]) -> list[str]:
    """Folders under tests/ that can be collected with these frameworks."""
    if {"torch", "jax"} <= installed:
        return ["tests"]
    if "torch" in installed:
        return ["tests/common", "tests/submissions", "tests/containers"]
    return ["tests/worldmodel"]


def command_line(name: str, arguments: Sequence[str], root: Path, python: str, installed: frozenset[str]) -> list[str]:
    """The process that a command stands for.

    Args:
        name: a command other than `score`.
        arguments: passed on.
        root: the repository.
        python: interpreter.
        installed: which of torch, jax, pytest can be imported.

    Raises:
        UsageError: there is no such command, or this image lacks its framework.
    """
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}\n{usage()}")
    needs = COMMANDS[name][0]
    if needs not in installed:
        raise UsageError(f"{name} needs {needs}, which this image has not; see containers/README.md")
    entry = str(root / ENTRY)
    if name == "train":
        return [python, entry, *arguments]
    if name == "torchrun":
        cut = arguments.index("--") if "--" in arguments else len(arguments)
        return [python, "-m", "torch.distributed.run", *arguments[:cut], entry, *arguments[cut + 1 :]]
    if name == "verify":
        return [python, str(root / "scripts" / "verify_submission.py"), *arguments]
    if name == "demo":
        where = ["--data", "data/stdlib-bpe1024", "--runs", "runs"]
        return [python, str(root / "scripts" / "demo.py"), *where, *arguments]
    if name in ("coinrun", "worldmodel"):
        return [python, "-m", "worldmodel", *(["coinrun"] if name == "coinrun" else []), *arguments]
    if name == "test":
        quick = ["-m", "not slow and not gpu and not container"]
        named = any(not word.startswith("-") and (root / word.split("::")[0]).exists() for word in arguments)
        paths = [] if named else test_paths(installed)
        return [python, "-m", "pytest", "--rootdir", str(root), "-p", "no:cacheprovider", *quick, *arguments, *paths]
    raise UsageError(f"{name} is no process of its own")


def code_sha256(root: Path) -> str:
    """Digest of the Python sources that scoring can run: `sha256  path` lines of common, the entries and this file."""
    paths = [*(root / "common").rglob("*.py"), *(root / "submissions").rglob("*.py"), root / "containers/entrypoint.py"]
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(root).as_posix()}\n" for path in paths
    ]
    return hashlib.sha256("".join(sorted(lines, key=lambda line: line.split("  ")[1])).encode()).hexdigest()


def find_artifact(given: Path) -> Path:
    """The file itself, or the one `*.artifact` of a folder. Raises UsageError when there is none, or more than one."""
    if given.exists() and not os.access(given, os.R_OK | (os.X_OK if given.is_dir() else 0)):
        raise UsageError(f"{given}: user {os.getuid()} may not read it; give it to everyone (chmod) or add --user")
    if given.is_file():
        return given
    found = sorted(given.glob("*.artifact")) if given.is_dir() else []
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UsageError(f"{given}: found {names}, expected an artifact or a folder with one *.artifact")
    return found[0]


def hardware() -> dict[str, Any]:
    """CPU model, usable cores, the thread setting, and the GPUs that the driver lists."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    gpus: list[str] = []
    if shutil.which("nvidia-smi") is not None:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
        gpus = listed.stdout.splitlines() if listed.returncode == 0 else []
    threads = os.environ.get("OMP_NUM_THREADS")
    return {"cpu": model, "cpus": len(os.sched_getaffinity(0)), "omp_num_threads": threads, "gpus": gpus}


def versions() -> dict[str, str]:
    """Python, kernel and the packages that take part in scoring, as installed here."""
    found = {"python": platform.python_version(), "linux": platform.release()}
    for name in SCORED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # triton, mamba-ssm and causal-conv1d are in the CUDA image only
    return found


def report(scored: Mapping[str, Any], root: Path, seconds: float) -> dict[str, Any]:
    """The JSON object of `score`, from the one that train_gpt.py --score prints.

    Returns:
        bpb (bits per byte of original text), loss (nats a token), tokens, bytes (of original text), the sha256 of
        code, artifact, tokenizer, data and image (null outside one), hardware, versions, seconds, and every score.
    """
    manifest = root / IMAGE_MANIFEST
    return {
        "bpb": scored["val_bpb"],
        "loss": scored["val_loss"],
        "tokens": scored["val_tokens"],
        "bytes": scored["val_bytes"],
        "byte_source": scored["byte_source"],
        "eval_mode": scored["eval_mode"],
        "temperature": scored["temperature"],
        "artifact_bytes": scored["artifact_bytes"],
        "scores": {
            mode: {key: value for key, value in score.items() if key != "seconds"}
            for mode, score in scored["scores"].items()
        },
        "sha256": {
            "code": code_sha256(root),
            "artifact": scored["artifact_sha256"],
            "tokenizer": scored["tokenizer_sha256"],
            "data": scored["val_sha256"],
            "image": hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.exists() else None,
        },
        "hardware": hardware(),
        "versions": versions(),
        "seconds": seconds,
    }


def score(arguments: Sequence[str], root: Path) -> dict[str, Any]:
    """Score an artifact in a process of its own. Raises UsageError; a failed scorer's own message is on stderr."""
    parser = argparse.ArgumentParser(prog="score", allow_abbrev=False, description=COMMANDS["score"][1])
    parser.add_argument("--artifact", type=Path, default=Path("/in"), help="file, or folder with one *.artifact")
    parser.add_argument("--val", type=Path, default=Path("/val"), help="folder of *_val_*.bin and tokenizer.model")
    given, more = parser.parse_known_args(arguments)
    artifact = find_artifact(given.artifact)
    started_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(root / ENTRY), "--score", str(artifact), "--val", str(given.val / "*_val_*.bin"), *more],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise UsageError(f"scoring {artifact} ended with status {done.returncode}; its message is above")
    return report(json.loads(done.stdout.splitlines()[-1]), root, time.perf_counter() - started_s)


def main(argv: Sequence[str] | None = None) -> int:
    name, *arguments = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    installed = frozenset(name for name in ("torch", "jax", "pytest") if importlib.util.find_spec(name) is not None)
    try:
        if name == "score" and "torch" in installed:
            print(json.dumps(score(arguments, ROOT)))
            return 0
        line = command_line(name, arguments, ROOT, sys.executable, installed)
    except UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    sys.stdout.flush()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.execve(line[0], line, {**os.environ, "PYTHONPATH": os.pathsep.join(paths)})


if __name__ == "__main__":
    sys.exit(main())
