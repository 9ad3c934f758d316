"""The staged run: the folder copied to an empty place, its program run there without network, watched.

Layout of a stage: `source/` the folder without logs and weights, made read-only and hashed before and after; `data/`
links to the shards given (for the smoke run, a few thousand tokens of them); `weights/`; `work/` the current
directory; `home/`, `tmp/`; `guard/` the watcher. Everything is removed afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from referee.data import HEADER, MAGIC, VERSION, Data
from referee.folder import Submission

KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")
SMOKE_TOKENS = {"train": 20_000, "val": 1_500}
# The challenge's scripts and latent-golf's entries take their options from the environment.
SMOKE_OPTIONS = {
    "ITERATIONS": "2", "MAX_WALLCLOCK_SECONDS": "60", "WARMUP_STEPS": "0", "TRAIN_SEQ_LEN": "64", "VAL_LOSS_EVERY": "0",
    "TRAIN_BATCH_TOKENS": "256", "RUN_ID": "smoke", "TEMP_CALIB_TOKENS": "256", "JEPA_DIAGNOSTICS": "0",
    "TRAIN_LOG_EVERY": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """One process that ended. `status` is None if it was stopped for taking too long."""

    what: str
    status: int | None
    seconds: float
    stdout: str
    stderr: str
    events: tuple[dict[str, Any], ...]
    changed: tuple[str, ...]  # files of the source tree that it changed, added or removed
    stage: str

    @property
    def complaint(self) -> str:
        """The last line of standard error that says something."""
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"


@dataclass
class Dialogue:
    """What the program's referee_hook offered and answered."""

    facts: dict[str, Any] = field(default_factory=dict)
    why_not: str = ""
    mode: str = ""
    validation_nats: np.ndarray | None = None  # float64 (N - 1,) of the validation stream
    answers: list[np.ndarray] = field(default_factory=list)  # one per probe, in order
    events: list[list[list[Any]]] = field(default_factory=list)
    ran: Ran | None = None


def network_wrapper() -> list[str]:
    """A prefix that takes the network away, if this system allows one; else none (the guard still refuses sockets)."""
    for prefix in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which(prefix[0]) is None:
            return []
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return prefix
    return []


def hashes_of(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def write_small_shard(path: Path, tokens_N: np.ndarray) -> None:
    header = HEADER.pack(MAGIC, VERSION, len(tokens_N), *[0] * 253)
    path.write_bytes(header + np.asarray(tokens_N, dtype="<u2").tobytes())


class Stage:
    """An empty place with a copy of the submission. Use as a context manager."""

    def __init__(self, submission: Submission, data: Data | None, threads: int = 2) -> None:
        self.submission, self.data, self.threads = submission, data, threads

    def __enter__(self) -> Stage:
        self.root = Path(tempfile.mkdtemp(prefix="referee-"))
        for name in ("source", "data", "smoke", "weights", "work", "home", "tmp", "guard"):
            (self.root / name).mkdir()
        here = Path(__file__).parent
        packages = [sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev"]
        packages.append(str(self.root / "guard"))
        quiet = [str(self.root / name) for name in ("tmp", "work", "home", "weights")]
        self.report = self.root / "guard" / "events.jsonl"
        guard = (here / "guard.py").read_text(encoding="utf-8")
        call = f"\n\ninstall_guard({str(self.report)!r}, {packages!r}, {quiet!r})\n"
        (self.root / "guard" / "sitecustomize.py").write_text(guard + call, encoding="utf-8")
        shutil.copy(here / "driver.py", self.root / "guard" / "driver.py")
        skipped = {log.name for log in self.submission.logs}
        for fact in self.submission.files:
            if fact.kind != "weights" and fact.path not in skipped:
                target = self.root / "source" / fact.path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.submission.root / fact.path, target)
        self.hashes = hashes_of(self.root / "source")
        for path in [self.root / "source", *(self.root / "source").rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        if self.data is not None:
            self._lay_data(self.data)
        self.wrapper = network_wrapper()
        return self

    def __exit__(self, *_: object) -> None:
        for path in [self.root / "source", *(self.root / "source").rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(self.root)

    def _lay_data(self, data: Data) -> None:
        links = {shard.path.name: shard.path for shard in (*data.train, *data.val)}
        if data.tokenizer is not None:
            links["tokenizer.model"] = data.tokenizer
        if data.manifest is not None:
            links["manifest.json"] = data.root / "manifest.json"
        for name, path in links.items():
            (self.root / "data" / name).symlink_to(path.resolve())
        if data.tokenizer is not None:
            (self.root / "smoke" / "tokenizer.model").symlink_to(data.tokenizer.resolve())
        for split, shards in (("train", data.train or data.val), ("val", data.val)):
            tokens_N = shards[0].tokens_N()[: SMOKE_TOKENS[split]]
            if len(tokens_N):
                write_small_shard(self.root / "smoke" / f"smoke_{split}_000000.bin", tokens_N)

    @property
    def program(self) -> Path:
        return self.root / "source" / str(self.submission.entry)

    def environment(self, extra: dict[str, str]) -> dict[str, str]:
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        return {
            **kept,
            "HOME": str(self.root / "home"),
            "TMPDIR": str(self.root / "tmp"),
            "PYTHONPATH": str(self.root / "guard"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": str(self.threads),
            "CUDA_VISIBLE_DEVICES": "",
            **extra,
        }

    def _command(self, arguments: list[str]) -> list[str]:
        return [*self.wrapper, sys.executable, "-s", "-B", *arguments]

    def _start(
        self, arguments: list[str], extra: dict[str, str], stdin: int, out: IO, err: IO
    ) -> subprocess.Popen[str]:
        if self.report.exists():
            self.report.unlink()
        return subprocess.Popen(
            self._command(arguments), cwd=self.root / "work", env=self.environment(extra), stdin=stdin, stdout=out,
            stderr=err, text=True,
        )  # fmt: skip

    def _finished(self, what: str, status: int | None, started_s: float, out: str, err: str) -> Ran:
        lines = self.report.read_text(encoding="utf-8").splitlines() if self.report.exists() else []
        now = hashes_of(self.root / "source")
        changed = sorted(name for name in now.keys() | self.hashes.keys() if now.get(name) != self.hashes.get(name))
        events = tuple(json.loads(line) for line in lines)
        seconds = time.monotonic() - started_s
        return Ran(what, status, seconds, out, err, events, tuple(changed), str(self.root))

    def run(self, what: str, arguments: list[str], extra: dict[str, str], limit_s: float) -> Ran:
        """Run the program to its end, or stop it after `limit_s`."""
        started_s = time.monotonic()
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self._start([str(self.program), *arguments], extra, subprocess.DEVNULL, out, err)
            try:
                status: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                status = None
            out.seek(0)
            err.seek(0)
            return self._finished(what, status, started_s, out.read(), err.read())

    def smoke(self, limit_s: float) -> Ran:
        """Two training steps on a few thousand tokens, on the CPU, options by environment."""
        extra = SMOKE_OPTIONS | {"DATA_PATH": str(self.root / "smoke")}
        if self.data is not None and self.data.tokenizer is not None:
            extra["TOKENIZER_PATH"] = str(self.root / "smoke" / "tokenizer.model")
        return self.run("smoke", [], extra, limit_s)

    def place_weights(self, path: Path) -> Path:
        target = self.root / "weights" / "model.artifact"
        shutil.copyfile(path, target)
        return target

    def score(self, weights: Path, limit_s: float) -> Ran:
        """`--score ARTIFACT --val SHARDS` of the program, in a fresh process."""
        val = str(self.root / "data" / "*_val_*.bin")
        arguments = ["--score", str(self.place_weights(weights)), "--val", val, "--device", "cpu"]
        return self.run("score", arguments, {}, limit_s)

    def ask(self, weights: Path, make_request: Any, limit_s: float) -> Dialogue:
        """Import the program, hand the hook's facts to `make_request`, and have its streams scored.

        Args:
            make_request: facts -> list of (mode, tokens uint16 (N,)); the first is the validation stream or empty.
        """
        dialogue, started_s = Dialogue(), time.monotonic()
        artifact = self.place_weights(weights)
        work = self.root / "tmp"
        with tempfile.TemporaryFile("w+") as err:
            arguments = [str(self.root / "guard" / "driver.py"), str(self.program), str(artifact), str(work)]
            process = self._start(arguments, {}, subprocess.PIPE, subprocess.PIPE, err)  # pyright: ignore[reportArgumentType]
            stopper = threading.Timer(limit_s, process.kill)
            stopper.start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                line = process.stdout.readline()
                if line:
                    dialogue.facts = json.loads(line)
                if "missing" in dialogue.facts:
                    dialogue.why_not = dialogue.facts["missing"]
                elif dialogue.facts:
                    streams = make_request(dialogue.facts)
                    request = {"streams": [(mode, len(tokens_N)) for mode, tokens_N in streams]}
                    request["limit_s"] = max(1.0, 0.8 * limit_s)  # pyright: ignore[reportArgumentType]
                    tokens = np.concatenate([np.asarray(tokens_N, dtype="<u2") for _, tokens_N in streams])
                    (work / "request.u16").write_bytes(tokens.tobytes())
                    (work / "request.json").write_text(json.dumps(request), encoding="utf-8")
                    process.stdin.write("go\n")
                    process.stdin.flush()
                    said = process.stdout.readline()
                    if said:
                        told = json.loads(said)
                        dialogue.events = told["events"]
                        nats = np.fromfile(work / "answer.f64", dtype="<f8")
                        lengths = [len(tokens_N) - 1 for _, tokens_N in streams[: told["answered"]]]
                        dialogue.answers = np.split(nats, np.cumsum(lengths)[:-1]) if lengths else []
                process.stdin.close()
                status: int | None = process.wait()
            finally:
                stopper.cancel()
                if process.poll() is None:
                    process.kill()
                    process.wait()
                process.stdout.close()
            err.seek(0)
            dialogue.ran = self._finished("hook", status, started_s, "", err.read())
        if not dialogue.why_not and not dialogue.answers:
            dialogue.why_not = f"referee_hook gave no answer: {dialogue.ran.complaint}"
        return dialogue
