"""A submission folder, read once: files, program, claims, logs, weights.

Nothing of the folder is executed here. JSON that cannot be read, a missing file or a binary in a text's clothes are
facts of the folder and end in findings, not in exceptions.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import DataError
from referee.logs import Log, parse_log
from referee.unpack import Layer, Unpacked, unpack

ENTRY_NAMES = ("train_gpt.py",)
WEIGHT_SUFFIXES = (
    ".artifact",
    ".ptz",
    ".pt",
    ".pth",
    ".safetensors",
    ".npz",
    ".br",
    ".xz",
    ".lzma",
    ".zst",
    ".bin",
    ".gz",
)
PAPER_SUFFIXES = (".md", ".txt", ".log", ".json", ".jsonl", ".tsv", ".csv", ".toml", ".yaml", ".yml", ".ipynb")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".svg", ".gif", ".pdf")
CODE_SUFFIXES = (".py", ".sh", ".cpp", ".cc", ".cu", ".cuh", ".h", ".c", ".rs", ".so", ".pyc", ".pyx")
TOKENIZER_SUFFIXES = (".model", ".vocab")
TEXT_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class FileFact:
    path: str  # relative to the folder, with forward slashes
    size_bytes: int
    is_text: bool

    @property
    def name(self) -> str:
        return self.path.split("/")[-1]

    @property
    def kind(self) -> str:
        """program, weights, tokenizer, paper, picture, code or blob, by name; text in a binary's place is a blob."""
        suffix = Path(self.name).suffix.lower()
        if suffix in CODE_SUFFIXES:
            return "code"
        if suffix in TOKENIZER_SUFFIXES or (suffix == ".json" and "tokenizer" in self.name):
            return "tokenizer"
        if suffix in PICTURE_SUFFIXES:
            return "picture"
        if suffix in WEIGHT_SUFFIXES:
            return "weights"
        if suffix in PAPER_SUFFIXES or self.name.upper() in ("LICENSE", "README", ".GITIGNORE"):
            return "paper" if self.is_text else "blob"
        return "paper" if self.is_text and self.size_bytes < TEXT_SAMPLE_BYTES else "blob"


@dataclass(frozen=True)
class Claims:
    """submission.json in one shape: `seeds` maps a seed to what is claimed of its run."""

    path: str
    raw: dict[str, Any]
    seeds: dict[str, dict[str, Any]]

    def number(self, *names: str) -> float | None:
        for name in names:
            value = self.raw.get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return value
        return None

    @property
    def track(self) -> str:
        return str(self.raw.get("track") or "")


@dataclass(frozen=True)
class Weights:
    """One file of weights; `seed` is None where its name tells none."""

    path: Path
    label: str
    size_bytes: int
    seed: str | None


@dataclass(frozen=True)
class Submission:
    root: Path
    files: tuple[FileFact, ...]
    entry: str | None  # name of the program
    layers: tuple[Layer, ...]
    closed: tuple[str, ...]  # packed expressions that could not be opened statically
    unparsed: tuple[str, ...]  # program text for another version of Python
    claims: Claims | None
    faults: tuple[str, ...]  # of reading
    logs: tuple[Log, ...]
    weights: tuple[Weights, ...]
    requirements: str | None
    record_track: bool

    @property
    def entry_path(self) -> Path | None:
        return self.root / self.entry if self.entry else None

    def sha256_of_entry(self) -> str:
        return hashlib.sha256(self.entry_path.read_bytes()).hexdigest() if self.entry_path else ""

    def log_of(self, seed: str) -> Log | None:
        return next((log for log in self.logs if log.seed == seed), None)

    def weights_of(self, seed: str) -> Weights | None:
        own = [w for w in self.weights if w.seed == seed]
        return own[0] if own else next((w for w in self.weights if w.seed is None), None)


def is_text_file(path: Path) -> bool:
    """Whether a file's first bytes are UTF-8 without NULs (a character cut at the sample's end is forgiven)."""
    with open(path, "rb") as file:
        sample = file.read(TEXT_SAMPLE_BYTES)
    if b"\0" in sample:
        return False
    try:
        sample.decode("utf-8")
    except UnicodeDecodeError as error:
        return len(sample) == TEXT_SAMPLE_BYTES and error.start > len(sample) - 4
    return True


def read_claims(path: Path, name: str) -> tuple[Claims | None, list[str]]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        return None, [f"{name} is no JSON ({error})"]
    if not isinstance(raw, dict):
        return None, [f"{name} is no JSON object"]
    results = raw.get("seed_results")
    if not isinstance(results, dict) and isinstance(raw.get("seeds"), dict):
        results = raw["seeds"]
    seeds = {str(seed): one for seed, one in (results or {}).items() if isinstance(one, dict)}
    return Claims(name, raw, seeds), []


def choose_entry(files: tuple[FileFact, ...], root: Path) -> str | None:
    """train_gpt.py, or the one Python file that trains (the largest that says `backward`)."""
    names = [fact.path for fact in files if fact.path.endswith(".py") and "/" not in fact.path]
    for name in ENTRY_NAMES:
        if name in names:
            return name
    trains = [name for name in names if "train" in name or ".backward(" in (root / name).read_text(errors="replace")]
    return max(trains, key=lambda name: (root / name).stat().st_size, default=None)


def seed_in_name(name: str) -> str | None:
    match = re.search(r"seed[_-]?(\d+)", name)
    return match.group(1) if match else None


def read_submission(
    root: Path, weights: list[Path] | None = None, runs: list[Path] | None = None, track: str | None = None
) -> Submission:
    """Read a folder, and weights and run folders that lie elsewhere. Raises DataError if there is no folder."""
    if not root.is_dir():
        raise DataError(f"{root} is no folder; give the folder of a submission (train_gpt.py, submission.json, logs)")
    paths = sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    files = tuple(
        FileFact(path.relative_to(root).as_posix(), path.stat().st_size, is_text_file(path)) for path in paths
    )
    faults: list[str] = []
    records = [f.path for f in files if re.fullmatch(r"submission.*\.json", f.path)]
    claims = None
    if records:
        chosen = "submission.json" if "submission.json" in records else records[0]
        claims, faults = read_claims(root / chosen, chosen)
    entry = choose_entry(files, root)
    unpacked = unpack((root / entry).read_bytes(), entry) if entry is not None else Unpacked((), (), ())
    is_log = re.compile(r"(.*log.*\.(txt|log|out)|train.*\.(txt|log)|.*\.log)$", re.IGNORECASE)
    logs = [
        parse_log(f.path, (root / f.path).read_text(encoding="utf-8", errors="replace"))
        for f in files
        if is_log.match(f.path) and f.is_text
    ]
    found = [Weights(root / f.path, f.path, f.size_bytes, seed_in_name(f.name)) for f in files if f.kind == "weights"]
    for path in weights or []:
        if not path.is_file():
            raise DataError(f"{path} is no file of weights; give the artifact that was scored")
        found.append(Weights(path, str(path), path.stat().st_size, seed_in_name(path.name)))
    for run in runs or []:
        artifact, config = run / "model.artifact", run / "config.json"
        if not artifact.is_file() or not config.is_file():
            raise DataError(f"{run}: model.artifact or config.json is missing; give folders of finished runs")
        seed = str(json.loads(config.read_text(encoding="utf-8"))["config"]["seed"])
        found.append(Weights(artifact, str(artifact), artifact.stat().st_size, seed))
    needs = root / "requirements.txt"
    named = track if track is not None else (claims.track if claims else "") or root.resolve().parent.name
    lowered = named.lower().replace("-", "_")
    return Submission(
        root=root,
        files=files,
        entry=entry,
        layers=unpacked.layers,
        closed=unpacked.closed,
        unparsed=unpacked.unparsed,
        claims=claims,
        faults=tuple(faults),
        logs=tuple(logs),
        weights=tuple(found),
        requirements=needs.read_text(encoding="utf-8", errors="replace") if needs.is_file() else None,
        record_track="10min" in lowered and "non_record" not in lowered,
    )
