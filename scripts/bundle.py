"""The entry as the challenge counts it: `make bundle` writes dist/jepa_mamba/ with one train_gpt.py and its papers.

The single file is the entry with every module of `common` that it needs, in order of dependency, word for word: their
imports of each other are dropped (the names are now in the same file), all other imports are gathered on top, and
`BUNDLED_PRESET` becomes the chosen preset. Modules that the entry does not need stay out. What makes this safe is
checked here again, whatever tests/test_imports.py said: no name means two things, nothing shadows a builtin, nothing of
ours is imported inside a block, no cycle.

`--check` trains and scores a tiny model twice, by the readable entry and by the bundled file in a folder of its own
where `common` cannot be imported, and compares configuration, every logged loss, the artifact's bytes and the scores,
bit for bit.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import datetime
import hashlib
import json
import os
import pprint
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.artifact.budget import CHALLENGE_BUDGET_BYTES, check_budget
from common.errors import ConfigError, DataError, GolfError
from common.files import write_atomically
from common.text.shards import write_shard
from common.text.tokenizer import load_tokenizer
from scripts.pack import pack_source
from submissions.jepa_mamba.train_gpt import RESUME_FREE_FIELDS, Config, read_preset

ROOT = Path(__file__).resolve().parents[1]
ENTRY = "submissions/jepa_mamba/train_gpt.py"
PRESET_NAME = "BUNDLED_PRESET"
# Import name -> name in the package index, where they differ; the rest is looked up with `_` and `-` taken as equal.
PACKAGE_OF = {"PIL": "pillow"}
# Imported inside functions, only where they are installed: listed, but not required.
OPTIONAL_IMPORTS = ("mamba_ssm", "causal_conv1d", "triton", "pyarrow", "huggingface_hub")
# Options in which the runs of one submission may differ.
FREE_FIELDS = RESUME_FREE_FIELDS | {"seed", "run_id"}
# What submission.json tells of each run.
RUN_FIELDS = (
    "run", "val_loss", "val_bpb", "val_tokens", "val_bytes", "eval_mode", "artifact_bytes", "steps", "tokens",
    "train_s", "eval_s", "world_size", "val_sha256", "tokenizer_sha256",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# One file out of many
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """One module on its way into the bundle."""

    path: str  # relative to the repository
    lines: list[str]
    tree: ast.Module
    needs: list[str] = field(default_factory=list)  # paths of modules of ours, in order of import


@dataclass(frozen=True)
class Bundle:
    """The single file and what is in it."""

    source: str
    modules: tuple[str, ...]
    imports: tuple[str, ...]  # root modules of third parties that it imports anywhere
    form: str = "plain"  # of `counted`: "plain", or "packed": comments and docstrings out, compressed (scripts/pack.py)

    @property
    def counted(self) -> str:
        """The text of train_gpt.py, whose bytes count."""
        return self.source if self.form == "plain" else pack_source(self.source)

    @property
    def code_bytes(self) -> int:
        return len(self.counted.encode())

    def in_form(self, form: str) -> Bundle:
        """The bundle in "plain", "packed", or whichever is "smallest"."""
        forms = [replace(self, form=name) for name in (("plain", "packed") if form == "smallest" else (form,))]
        return min(forms, key=lambda bundle: bundle.code_bytes)


def module_path(root: Path, dotted: str, importer: str, line: int) -> str:
    path = dotted.replace(".", "/") + ".py"
    if not (root / path).is_file():
        raise ConfigError(f"{importer}:{line}: {dotted} is not a file of {root}; write `from common.x.y import name`")
    return path


def is_ours(name: str | None) -> bool:
    return (name or "").split(".")[0] in ("common", "submissions", "worldmodel", "scripts", "tests")


def read_part(root: Path, path: str) -> Part:
    """Parse one module and find what it needs. Raises ConfigError for an import that cannot be inlined."""
    text = (root / path).read_text(encoding="utf-8")
    part = Part(path, text.splitlines(), ast.parse(text, filename=path))
    for node in ast.walk(part.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_ours(alias.name):
                    raise ConfigError(f"{path}:{node.lineno}: `import {alias.name}`; write `from ... import name`")
        elif isinstance(node, ast.ImportFrom) and (node.level or is_ours(node.module)):
            where = f"{path}:{node.lineno}"
            if node.level:
                raise ConfigError(f"{where}: relative import; write `from common.x.y import name`")
            if node not in part.tree.body:
                raise ConfigError(f"{where}: {node.module} is imported inside a block; imports of ours go on top")
            if any(alias.name == "*" or alias.asname for alias in node.names):
                raise ConfigError(f"{where}: star or alias; names keep their name when {node.module} is inlined")
            needed = module_path(root, node.module or "", path, node.lineno)
            if needed not in part.needs:
                part.needs.append(needed)
    return part


def in_order(root: Path, entry: str) -> list[Part]:
    """The entry's modules, each after what it needs, the entry last. Raises ConfigError for a cycle."""
    ordered: dict[str, Part] = {}

    def visit(path: str, trail: tuple[str, ...]) -> None:
        if path in trail:
            raise ConfigError(f"import cycle: {' -> '.join([*trail[trail.index(path) :], path])}")
        if path in ordered:
            return
        part = read_part(root, path)
        for needed in part.needs:
            visit(needed, (*trail, path))
        ordered[path] = part

    visit(entry, ())
    return list(ordered.values())


def defined_names(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Names that statements bind at the top level of a module, imports excepted, also inside if, try, for and with."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield statement.name
            continue
        if isinstance(statement, (ast.If, ast.For, ast.While, ast.With, ast.Try)):
            for inner in ("body", "orelse", "finalbody"):
                yield from defined_names(getattr(statement, inner, []))
            for handler in getattr(statement, "handlers", []):
                yield from defined_names(handler.body)
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, (ast.AnnAssign, ast.AugAssign, ast.For)):
            targets = [statement.target]
        elif isinstance(statement, ast.With):
            targets = [item.optional_vars for item in statement.items if item.optional_vars]
        for target in targets:
            for node in ast.walk(target):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.id


def gather_imports(parts: Sequence[Part]) -> list[str]:
    """The imports of all parts that are not of ours, each once: standard library first, then third parties.

    Raises ConfigError if a name would mean two things in one file, or hide a builtin.
    """
    meaning: dict[str, tuple[str, str]] = {}
    plain: set[str] = set()
    members: dict[str, set[str]] = {}

    def claim(name: str, what: str, path: str) -> None:
        known = meaning.setdefault(name, (what, path))
        if known[0] != what:
            raise ConfigError(f"`{name}` is {what} in {path} but {known[0]} in {known[1]}; rename one of them")

    for part in parts:
        for name in defined_names(part.tree.body):
            if hasattr(builtins, name):
                raise ConfigError(f"{part.path} defines `{name}`, a builtin that other inlined modules use; rename it")
            claim(name, f"defined in {part.path}", part.path)
        for node in part.tree.body:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    line = alias.name + (f" as {alias.asname}" if alias.asname else "")
                    bound = alias.asname or alias.name.split(".")[0]
                    claim(bound, f"module {alias.name if alias.asname else bound}", part.path)
                    plain.add(line)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if is_ours(node.module):
                        path = (node.module or "").replace(".", "/") + ".py"
                        claim(alias.name, f"defined in {path}", part.path)
                        continue
                    if node.module == "__future__":
                        continue
                    claim(alias.asname or alias.name, f"{node.module}.{alias.name}", part.path)
                    line = alias.name + (f" as {alias.asname}" if alias.asname else "")
                    members.setdefault(node.module or "", set()).add(line)
    lines = [(name.split(" ")[0], f"import {name}") for name in plain]
    lines += [(module, f"from {module} import {', '.join(sorted(names))}") for module, names in members.items()]

    def rank(item: tuple[str, str]) -> tuple[bool, bool, str]:
        return item[0].split(".")[0] not in sys.stdlib_module_names, item[1].startswith("from"), item[1]

    ranked = sorted(lines, key=rank)
    standard = [line for item in ranked if not rank(item)[0] for line in wrap_import(item[1])]
    others = [line for item in ranked if rank(item)[0] for line in wrap_import(item[1])]
    return [*standard, "", *others] if standard and others else standard + others


def wrap_import(line: str) -> list[str]:
    if len(line) <= 120:
        return [line]
    head, names = line.split(" import ")
    return [f"{head} import (", *(f"    {name}," for name in names.split(", ")), ")"]


def body_of(part: Part, preset: dict[str, Any] | None, *, is_entry: bool) -> list[str]:
    """The lines of a module without its docstring and top-level imports; in the entry the preset is put in."""
    dropped: set[int] = set()
    kept: set[int] = set()
    replaced: dict[int, list[str]] = {}
    for index, node in enumerate(part.tree.body):
        first, last = node.lineno, node.end_lineno or node.lineno
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.decorator_list:
            first = min(decorator.lineno for decorator in node.decorator_list)
        span = range(first, last + 1)
        is_docstring = index == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, (ast.Import, ast.ImportFrom)) or is_docstring:
            if kept & set(span):
                raise ConfigError(f"{part.path}:{first}: an import shares its line with another statement; split them")
            dropped |= set(span)
            continue
        if dropped & set(span):
            raise ConfigError(f"{part.path}:{first}: an import shares its line with another statement; split them")
        kept |= set(span)
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        if is_entry and isinstance(target, ast.Name) and target.id == PRESET_NAME:
            literal = pprint.pformat(preset, indent=4, width=100, sort_dicts=False, compact=False)
            literal = re.sub(r"^\{ {3}", "{\n    ", literal).removesuffix("}") + ",\n}" if preset else "None"
            replaced[first] = f"{PRESET_NAME}: dict[str, Any] | None = {literal}".splitlines()
            dropped |= set(span) - {first}
    if is_entry and len(replaced) != 1:
        raise ConfigError(f"{part.path}: expected one top-level assignment of {PRESET_NAME}, found {len(replaced)}")
    lines: list[str] = []
    for number, line in enumerate(part.lines, start=1):
        if number in replaced:
            lines += replaced[number]
        elif number in dropped:
            continue
        elif line.strip() or number in kept:
            lines.append(line)
        elif lines and lines[-2:] != ["", ""]:  # at most two blank lines between statements
            lines.append("")
    while lines and not lines[-1]:
        lines.pop()
    return lines


def banner(part: Part) -> list[str]:
    """A module's path and docstring, as comments."""
    rule = f"# {'=' * 20} {part.path} {'=' * (96 - len(part.path))}"
    return [rule, *(f"# {line}".rstrip() for line in (ast.get_docstring(part.tree) or "").splitlines())]


def make_bundle(root: Path, entry: str, preset: dict[str, Any] | None) -> Bundle:
    """Inline what the entry needs. Deterministic: a function of the files and the preset. Raises ConfigError."""
    parts = in_order(root, entry)
    first = parts[-1].tree.body[0]
    lines = []
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        lines += parts[-1].lines[first.lineno - 1 : first.end_lineno]
    lines += ["", "from __future__ import annotations", "", *gather_imports(parts), ""]
    for part in parts:
        lines += ["", *(banner(part) if part is not parts[-1] else banner(part)[:1]), "", ""]
        lines += body_of(part, preset, is_entry=part is parts[-1])
        lines.append("")
    source = "\n".join(lines)
    try:
        tree = ast.parse(source)
        compile(source, "train_gpt.py", "exec")
    except SyntaxError as error:
        raise ConfigError(f"the bundle of {entry} does not compile: line {error.lineno}: {error.msg}") from error
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    assert not any(map(is_ours, roots)), "an import of ours is left in the bundle"
    third = tuple(sorted(roots - set(sys.stdlib_module_names)))
    return Bundle(source, tuple(part.path for part in parts), third)


def requirements(root: Path, imports: Sequence[str]) -> str:
    """Pins of what the bundle imports, out of pyproject.toml. Raises ConfigError for an import without a pin."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = {}
    for extra in ("gpu", "lm"):
        for pin in project["optional-dependencies"][extra]:
            pins[re.split(r"[=\[]", pin)[0].lower().replace("_", "-")] = pin
    required, optional = [], []
    for name in imports:
        package = PACKAGE_OF.get(name, name).lower().replace("_", "-")
        if package not in pins:
            raise ConfigError(f"the bundle imports {name}, which no pin of the extras lm and gpu provides; add it")
        (optional if name in OPTIONAL_IMPORTS else required).append(pins[package])
    note = ["# Used where they are installed; the file runs without them:"] if optional else []
    return "\n".join([*required, *note, *(f"# {pin}" for pin in optional)]) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Papers
# ---------------------------------------------------------------------------------------------------------------------


def read_runs(paths: Sequence[Path], preset_name: str, preset: dict[str, Any]) -> list[dict[str, Any]]:
    """Summaries of finished runs of this preset, one a seed. Raises DataError."""
    summaries: list[dict[str, Any]] = []
    expected = asdict(Config()) | preset
    for path in paths:
        for name in ("summary.json", "train.log"):
            if not (path / name).is_file():
                raise DataError(f"{path / name} is missing; give folders of finished runs")
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        other = [
            f"{name} is {value!r}, not {expected.get(name)!r}"
            for name, value in summary["config"].items()
            if name not in FREE_FIELDS and value != expected.get(name)
        ]
        if other:
            raise DataError(f"{path} is not a run of the preset {preset_name}: {'; '.join(other)}")
        if summary["seed"] in [known["seed"] for known in summaries]:
            raise DataError(f"{path}: seed {summary['seed']} was given twice; each run needs its own seed")
        finished = datetime.datetime.fromtimestamp((path / "summary.json").stat().st_mtime, datetime.UTC)
        summaries.append(summary | {"run": path.name, "folder": path, "date": finished.date().isoformat()})
    return sorted(summaries, key=lambda summary: summary["seed"])


def submission_record(about: dict[str, Any], runs: Sequence[dict[str, Any]], code_bytes: int) -> dict[str, Any]:
    """The fields of submission.json. Scores are means over the runs; bytes_total takes the largest artifact."""
    record = about | {
        "date": about["date"] or max((run["date"] for run in runs), default=None),
        "val_loss": None,
        "val_bpb": None,
        "bytes_total": None,
        "bytes_code": code_bytes,
        "seeds": [run["seed"] for run in runs],
        "seed_results": {},
    }
    if not runs:
        return record | {"note": "no run was given to scripts/bundle.py (--runs), so there is no score yet"}
    record["val_loss"] = sum(run["val_loss"] for run in runs) / len(runs)
    record["val_bpb"] = sum(run["val_bpb"] for run in runs) / len(runs)
    record["bytes_total"] = code_bytes + max(run["artifact_bytes"] for run in runs)
    for run in runs:
        record["seed_results"][str(run["seed"])] = {name: run.get(name) for name in RUN_FIELDS}
    return record


def readme_text(root: Path, entry: str, preset_name: str, bundle: Bundle, record: dict[str, Any]) -> str:
    named = root / Path(entry).parent / "presets" / f"{preset_name}.py"
    preset_file = Path(preset_name) if Path(preset_name).suffix else named
    about = ast.get_docstring(ast.parse(preset_file.read_text(encoding="utf-8"))) or ""
    lines = [f"# {record['name']}", "", record["blurb"], "", f"Preset `{preset_name}`:", "", about, ""]
    lines += ["## Run", "", "```", "pip install -r requirements.txt"]
    lines += ["torchrun --standalone --nproc_per_node=8 train_gpt.py --data_path DATA"]
    lines += ["python train_gpt.py --score ARTIFACT --val 'DATA/*_val_*.bin'", "```", ""]
    if bundle.form == "packed":
        lines += ["`train_gpt.py` is packed: it runs the program that it holds, whose source lies in a temporary"]
        lines += ["folder meanwhile. Nothing uses `plain_train_gpt.py`, the same program with its comments.", ""]
    lines += ["The program is made of these files, inlined unchanged by `scripts/bundle.py`:", ""]
    lines += [f"- `{path}`" for path in bundle.modules]
    lines += ["", "## Results", "", f"Code: {bundle.code_bytes:,} bytes."]
    if record["seed_results"]:
        head = "| seed | val_bpb | val_loss | artifact bytes | with code | steps | training s | scoring s |"
        lines += ["", head, "|" + " --- |" * 8]
        for seed, run in record["seed_results"].items():
            size = f"{run['artifact_bytes']:,} | {run['artifact_bytes'] + bundle.code_bytes:,} | {run['steps']:,}"
            times = f"{run['train_s']:.1f} | {run['eval_s']:.1f}"
            lines.append(f"| {seed} | {run['val_bpb']:.5f} | {run['val_loss']:.5f} | {size} | {times} |")
        lines += ["", f"Mean val_bpb {record['val_bpb']:.5f}, read back from the artifacts."]
    else:
        lines += ["", f"There is no score yet: {record['note']}."]
    own = root / Path(entry).parent / "README.md"
    if own.is_file():
        lines += ["", "---", "", own.read_text(encoding="utf-8").rstrip()]
    return "\n".join(lines) + "\n"


def write_dist(
    out: Path,
    preset_name: str,
    run_paths: Sequence[Path],
    about: dict[str, Any],
    root: Path = ROOT,
    form: str = "plain",
) -> tuple[Bundle, dict[str, Any]]:
    """Write dist/jepa_mamba/ anew. Raises GolfError, before anything is replaced, if something does not fit."""
    preset = read_preset(preset_name)
    bundle = make_bundle(root, ENTRY, preset).in_form(form)
    runs = read_runs(run_paths, preset_name, preset)
    record = submission_record(about, runs, bundle.code_bytes)
    files = {
        "train_gpt.py": bundle.counted.encode(),
        "README.md": readme_text(root, ENTRY, preset_name, bundle, record).encode(),
        "submission.json": (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode(),
        "requirements.txt": requirements(root, bundle.imports).encode(),
    }
    if bundle.form != "plain":
        files["plain_train_gpt.py"] = bundle.source.encode()
    files |= {f"train_seed{run['seed']}.log": (run["folder"] / "train.log").read_bytes() for run in runs}
    out.mkdir(parents=True, exist_ok=True)
    for old in out.iterdir():  # an old log beside new scores would be a lie
        if old.is_file() and old.name not in files:
            old.unlink()
    for name, data in files.items():
        write_atomically(out / name, data)
    return bundle, record


# ---------------------------------------------------------------------------------------------------------------------
# Is the bundle the entry?
# ---------------------------------------------------------------------------------------------------------------------

# A model and a run that take seconds, laid over any preset; they touch training, validation, export and every scorer.
TINY = {
    "tokenizer": "byte", "vocab_size": 256, "model_dim": 32, "num_layers": 2, "headdim": 16, "d_state": 8,
    "chunk_size": 16, "embed_dim": 16, "attn_layers": "", "train_seq_len": 32, "train_batch_tokens": 128,
    "micro_batch_tokens": 64, "iterations": 4, "warmup_steps": 1, "max_wallclock_seconds": 0, "warmdown_by": "steps",
    "sigreg_num_proj": 8, "sigreg_timesteps": 8, "val_loss_every": 2, "val_max_tokens": 0, "val_batch_size": 256,
    "eval_modes": "standard,sliding,carried", "sliding_eval_stride": 16, "temp_calib_tokens": 128, "train_log_every": 1,
    "checkpoint_every": 2, "device": "cpu", "kernels": "torch", "compile_model": 0, "budget_bytes": 0,
}  # fmt: skip
TIMES = (
    *("elapsed_s", "tokens_per_s", "eta_s", "train_s", "eval_s", "seconds", "memory_bytes"),
    *("artifact", "code_bytes", "total_bytes"),
)


def timeless(value: Any) -> Any:
    """A JSON value without what differs from run to run by nature: times, places, the size of the code."""
    if isinstance(value, dict):
        return {name: timeless(inner) for name, inner in value.items() if name not in TIMES}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def run_entry(script: Path, cwd: Path, arguments: Sequence[str]) -> str:
    """Run a train_gpt.py in its own process and return what it printed. Raises GolfError if it fails."""
    kept = ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR", "SYSTEMROOT", "VIRTUAL_ENV")
    environment = {name: os.environ[name] for name in kept if name in os.environ} | {"OMP_NUM_THREADS": "1"}
    if cwd == ROOT:
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, str(script), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise GolfError(f"{script} {' '.join(arguments)} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def observe(script: Path, cwd: Path, work: Path, preset_name: str | None) -> dict[str, Any]:
    """Train and score the tiny run; everything that must not depend on how the code is packed."""
    flags = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
    flags += ["--data_path", str(work / "data"), "--runs_dir", str(work / "runs"), "--run_id", "check"]
    run_entry(script, cwd, (["--preset", preset_name] if preset_name else []) + flags)
    run = work / "runs" / "check"
    artifact = run / "model.artifact"
    val = str(work / "data" / "*_val_*.bin")
    score = run_entry(script, cwd, ["--score", str(artifact), "--val", val, "--device", "cpu", "--kernels", "torch"])
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    config = {name: value for name, value in summary["config"].items() if name not in ("data_path", "runs_dir")}
    names = ("val_bpb", "val_loss", "val_tokens", "val_bytes", "float_val_bpb", "params", "steps", "temperature")
    return {
        "config": config,
        "log": [timeless(json.loads(line)) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()],
        "summary": timeless({name: summary[name] for name in names}),
        "artifact_sha256": hashlib.sha256(artifact.read_bytes()).hexdigest(),
        "score": timeless(json.loads(score.splitlines()[-1])),
    }


def differences(readable: Any, bundled: Any, where: str = "") -> list[str]:
    """Paths at which two JSON values differ, with both values."""
    if isinstance(readable, dict) and isinstance(bundled, dict):
        keys = sorted(set(readable) | set(bundled))
        return [d for key in keys for d in differences(readable.get(key), bundled.get(key), f"{where}.{key}")]
    if isinstance(readable, list) and isinstance(bundled, list) and len(readable) == len(bundled):
        return [d for i, pair in enumerate(zip(readable, bundled)) for d in differences(*pair, f"{where}[{i}]")]
    return [] if readable == bundled else [f"{where.lstrip('.')}: {readable!r} readable, {bundled!r} bundled"]


def write_tiny_data(folder: Path) -> None:
    """Byte shards of this script's own text, as documents, two for validation."""
    tokenizer = load_tokenizer("byte")
    text = Path(__file__).read_text(encoding="utf-8")
    begin = np.full(1, tokenizer.bos_id, dtype=np.uint16)
    documents = [np.concatenate([begin, tokenizer.encode(part)]) for part in text.split("\n\n\n")]
    folder.mkdir(parents=True)
    write_shard(folder / "check_val_000000.bin", np.concatenate(documents[:2]))
    write_shard(folder / "check_train_000000.bin", np.concatenate(documents[2:]))


def observe_readable(preset_name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bundle-check-") as name:
        write_tiny_data(Path(name) / "data")
        return observe(ROOT / ENTRY, ROOT, Path(name), preset_name)


def observe_bundled(train_gpt: Path) -> dict[str, Any]:
    """The same of a bundled file, in a folder of its own where no room of ours can be imported."""
    with tempfile.TemporaryDirectory(prefix="bundle-check-") as name:
        write_tiny_data(Path(name) / "data")
        alone = Path(name) / "alone"
        alone.mkdir()
        shutil.copy(train_gpt, alone / "train_gpt.py")
        for room in ("common", "submissions", "scripts", "worldmodel"):  # found before any installed room
            stop = f"raise ImportError('the bundle must not import {room}')\n"
            (alone / f"{room}.py").write_text(stop, encoding="utf-8")
        return observe(alone / "train_gpt.py", alone, Path(name), None)


def compare(readable: dict[str, Any], bundled: dict[str, Any]) -> None:
    """Raises GolfError where the two forms differ, or if there was nothing to compare."""
    found = differences(readable, bundled)
    if found:
        raise GolfError("the bundled file is not the readable entry:\n  " + "\n  ".join(found[:20]))
    if not any(event.get("event") == "step" for event in readable["log"]):
        raise GolfError("the check saw no training step; its tiny run no longer trains")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the entry as one file, with its papers.")
    parser.add_argument("--preset", default="seed_bpe", help="preset that the file is made for (default seed_bpe)")
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="folders of finished runs, one a seed")
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "jepa_mamba", help="folder to write")
    forms = ("smallest", "plain", "packed")
    parser.add_argument("--form", choices=forms, default="smallest", help="of train_gpt.py (default %(default)s)")
    parser.add_argument("--check", action="store_true", help="train both forms for a few steps and compare bit for bit")
    parser.add_argument("--name", default="JEPA + Mamba-2", help="name in submission.json")
    parser.add_argument("--author", default=None, help="author in submission.json")
    parser.add_argument("--github_id", default=None, help="github_id in submission.json")
    parser.add_argument("--track", default="track_non_record_16mb", help="track in submission.json")
    parser.add_argument("--date", default=None, help="date in submission.json (default: of the newest run)")
    blurb = "Mamba-2 language model; JEPA and SIGReg in training only; weights trained on their grid."
    parser.add_argument("--blurb", default=blurb, help="blurb in submission.json")
    arguments = parser.parse_args(argv)
    about = {name: getattr(arguments, name) for name in ("name", "author", "github_id", "blurb", "date", "track")}
    try:
        bundle, record = write_dist(arguments.out, arguments.preset, arguments.runs, about, form=arguments.form)
        print(f"{arguments.out}: {bundle.code_bytes:,} bytes of {bundle.form} code from {len(bundle.modules)} files")
        print(", ".join(f"{form} {bundle.in_form(form).code_bytes:,} bytes" for form in ("plain", "packed")))
        print(f"room for weights: {CHALLENGE_BUDGET_BYTES - bundle.code_bytes:,} of {CHALLENGE_BUDGET_BYTES:,} bytes")
        if record["bytes_total"] is None:
            print("submission.json has no score: name finished runs with --runs (make bundle RUNS='runs/a runs/b')")
        else:
            print(
                f"val_bpb {record['val_bpb']:.5f} over seeds {record['seeds']}; {record['bytes_total']:,} bytes in all"
            )
            check_budget(record["bytes_total"])
        if arguments.check:
            seen = observe_readable(arguments.preset)
            for form in ("plain", "packed"):
                with tempfile.TemporaryDirectory(prefix="bundle-form-") as name:
                    (Path(name) / "train_gpt.py").write_text(bundle.in_form(form).counted, encoding="utf-8")
                    compare(seen, observe_bundled(Path(name) / "train_gpt.py"))
            steps = sum(event.get("event") == "step" for event in seen["log"])
            print(f"check: {steps} steps, artifact and scores of all forms (readable, plain, packed) are bitwise equal")
    except GolfError as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
