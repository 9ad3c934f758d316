"""Evidence: do logs, program, configuration and claims belong together, and do they carry the claim?"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from referee.folder import Submission
from referee.logs import Log, Result
from referee.model import (
    RECORD_MARGIN_NATS,
    RECORD_P,
    RECORD_SEEDS,
    Check,
    Finding,
    failed,
    many,
    not_checkable,
    passed,
)  # fmt: skip
from referee.unpack import unpack

REQUIRED_FIELDS = ("name", "author", "github_id", "date", "val_bpb")
# Options that may differ between the runs of one configuration: names, places, machines, and what is only speed.
FREE_OPTIONS = frozenset(
    {
        *("seed", "run_id", "runs_dir", "logfile", "artifact_dir", "model_path", "quantized_model_path"),
        *("data_path", "data_dir", "datasets_dir", "tokenizer_path", "train_files", "val_files"),
        *("device", "kernels", "compile_model", "local_rank", "rank", "world_size", "distributed", "is_main_process"),
        *("micro_batch_tokens", "val_batch_size", "eval_lanes", "warmup_steps", "train_log_every"),
        *("checkpoint_every", "checkpoint_keep"),
    }
)
PRESET_NAME = "BUNDLED_PRESET"
OPTIONS_CLASS = "Config"
STATED_LOSS = re.compile(r"loss[:=]? ?\d")


@dataclass(frozen=True)
class Runs:
    """Scores of one submission's seeds, for the significance test."""

    name: str
    loss: tuple[float, ...]  # nats a token; empty if not given for every seed
    bpb: tuple[float, ...]


def check_papers(submission: Submission) -> list[Finding]:
    names = {fact.path for fact in submission.files}
    findings = [failed(fault, str(submission.root), "write it with a JSON library") for fault in submission.faults]
    if submission.entry is None:
        mend = "ship the program as train_gpt.py"
        findings.append(failed("there is no program that trains", str(submission.root), mend))
    elif submission.entry != "train_gpt.py":
        findings.append(failed(f"the program is called {submission.entry}", submission.entry, "call it train_gpt.py"))
    if not any(name.lower() == "readme.md" for name in names):
        findings.append(failed("README.md is missing", str(submission.root), "say what was done and how to run it"))
    if not submission.logs:
        findings.append(failed("there is no log", str(submission.root), "add the log of every seed"))
    if submission.claims is None:
        if not submission.faults:
            mend = f"write it with {', '.join(REQUIRED_FIELDS)}"
            findings.append(failed("submission.json is missing", str(submission.root), mend))
        return findings
    if submission.claims.path != "submission.json":
        found = f"the record is called {submission.claims.path}"
        findings.append(failed(found, submission.claims.path, "call it submission.json"))
    lacking = [name for name in REQUIRED_FIELDS if submission.claims.raw.get(name) in (None, "", {}, [])]
    if lacking:
        mend = "fill them in (ours: make bundle ARGS='--author A --github_id G')"
        findings.append(failed(f"{', '.join(lacking)} not given", submission.claims.path, mend))
    return findings or [passed(f"program, README.md, {many(len(submission.logs), 'log')} and submission.json are here")]


@lru_cache(maxsize=128)
def statements(text: str) -> Counter[str]:
    """Top-level statements of a program as their syntax, without docstrings, imports and the bundled preset.

    Of a packed program, those of what is packed. Raises SyntaxError if it cannot be read.
    """
    layers = unpack(text.encode(), "source").layers
    if not layers:
        raise SyntaxError("no Python program")
    out: Counter[str] = Counter()
    for node in without_docstrings(ast.parse(layers[-1].text)).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id == PRESET_NAME:
            continue
        out[ast.dump(node)] += 1
    return out


def without_docstrings(tree: ast.Module) -> ast.Module:
    """The tree, changed: packers leave docstrings out, and a body of nothing else gets `pass`."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return tree


def first_difference(one: Counter[str], other: Counter[str]) -> str:
    for text in (one - other) | (other - one):
        for mark in ("name='", "id='"):
            if mark in text:
                return text.split(mark, 1)[1].split("'")[0]
        return text[:60]
    return ""


def check_code(submission: Submission) -> list[Finding]:
    findings: list[Finding] = []
    mend = "train again with this program, or submit the program that made the logs"
    if not submission.layers:
        return [not_checkable("no program that can be read")]
    texts = [layer.text.strip() for layer in submission.layers]
    own_bytes = {(submission.root / submission.entry).stat().st_size} if submission.entry else set()
    folder_statements: Counter[str] | None = None
    for log in submission.logs:
        if log.sources:
            if len(log.sources) == 1 and next(iter(log.sources.values())).strip() in texts:
                findings.append(passed("the log opens with this very program", log.name))
                continue
            try:
                logged = sum((statements(text) for text in log.sources.values()), Counter())
            except SyntaxError as error:
                findings.append(failed(f"the log's sources do not parse ({error})", log.name, mend))
                continue
            if folder_statements is None:
                folder_statements = statements(submission.layers[-1].text)
            if logged == folder_statements:
                found = f"the sources in the log ({len(log.sources)}) are this program, statement by statement"
                findings.append(passed(found, log.name))
            else:
                differing = sum(((logged - folder_statements) + (folder_statements - logged)).values())
                where = first_difference(folder_statements, logged)
                found = f"{differing} statements differ between log and program, one of them `{where}`"
                findings.append(failed(found, log.name, mend))
        elif log.code_bytes is not None:
            found = f"the log says {log.code_bytes:,} bytes of code, {submission.entry} has {max(own_bytes):,}"
            sizes = own_bytes | {layer.size_bytes for layer in submission.layers}
            findings.append(passed(found, log.name) if log.code_bytes in sizes else failed(found, log.name, mend))
        else:
            findings.append(not_checkable("the log holds neither the program nor its size", log.name))
    return findings or [not_checkable("there is no log")]


def declared_options(submission: Submission) -> dict[str, Any]:
    """The options of a program that carries its preset: literal defaults of its Config, then the preset over them.

    Empty if the program carries none: then its options are whatever its command line said.
    """
    preset: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for layer in submission.layers:
        for node in layer.tree.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == PRESET_NAME:
                value = literal(node.value)
                preset = value if isinstance(value, dict) else {}
            if isinstance(node, ast.ClassDef) and node.name == OPTIONS_CLASS:
                for field in node.body:
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                        value = field.value
                        first = value.args[0] if isinstance(value, ast.Call) and value.args else value
                        if (default := literal(first)) is not None:
                            defaults[field.target.id] = default
    return defaults | preset if preset else {}


def literal(node: ast.AST | None) -> Any:
    """The value of a literal; None for anything else."""
    try:
        return ast.literal_eval(node) if isinstance(node, ast.expr) else None
    except (ValueError, TypeError, SyntaxError):
        return None


def check_config(submission: Submission) -> list[Finding]:
    findings: list[Finding] = []
    preset = declared_options(submission)
    logs = [log for log in submission.logs if log.config]
    for log in logs:
        other = [k for k, v in preset.items() if k not in FREE_OPTIONS and log.config.get(k) != v]
        if other:
            shown = "; ".join(f"{k} is {log.config.get(k)!r}, the program's {preset[k]!r}" for k in other[:4])
            findings.append(failed(shown, log.name, "bundle with the preset that was run, or run again"))
        elif preset:
            findings.append(passed("the run's options are the program's", log.name))
    for log in logs[1:]:
        names = (set(log.config) | set(logs[0].config)) - FREE_OPTIONS
        other = sorted(k for k in names if log.config.get(k) != logs[0].config.get(k))
        if other:
            shown = "; ".join(f"{k} is {log.config.get(k)!r} and {logs[0].config.get(k)!r}" for k in other[:4])
            found = f"not one configuration with {logs[0].name}: {shown}"
            findings.append(failed(found, log.name, "run all seeds with equal options"))
        else:
            findings.append(passed(f"same options as {logs[0].name}", log.name))
    return findings or [not_checkable("no log states its options, or there is one log and the program names none")]


def check_seeds(submission: Submission) -> list[Finding]:
    findings: list[Finding] = []
    claimed = list(submission.claims.seeds) if submission.claims else []
    logged = [log.seed for log in submission.logs if log.seed is not None]
    if any(log.seed is not None for log in submission.logs):
        for seed in claimed:
            if seed not in logged:
                found = f"seed {seed} is claimed but no log is of it (logs: {', '.join(logged) or 'none'})"
                findings.append(failed(found, submission.claims.path if submission.claims else "", "add its log"))
    of_losses: dict[str, Log] = {}
    for log in submission.logs:
        losses = "\n".join(line for line in log.text.splitlines() if STATED_LOSS.search(line))
        first = of_losses.setdefault(losses, log)
        if losses and first.seed != log.seed:
            found = (
                f"{first.name} (seed {first.seed}) and {log.name} (seed {log.seed}) state the same losses throughout"
            )
            findings.append(failed(found, log.name, "give the log of each run"))
    count = len(set(claimed) or set(logged))
    if not count and len(submission.logs) > 1:
        findings.append(not_checkable(f"{len(submission.logs)} logs, none of which names its seed"))
    elif count >= RECORD_SEEDS:
        findings.append(passed(f"{count} seeds"))
    elif submission.record_track:
        found = f"{count} seed{'s' if count != 1 else ''}; a record needs {RECORD_SEEDS} of one configuration"
        findings.append(failed(found, str(submission.root), "run more seeds"))
    else:
        findings.append(not_checkable(f"{count} of {RECORD_SEEDS} seeds: the noise between runs is not known"))
    return findings


def decimals(text: str) -> int:
    return len(text.partition(".")[2])


def states(logged: str | None, claimed: float) -> bool:
    """Whether a number as written in a log is the claimed one, to the coarser precision of the two."""
    if logged is None:
        return False
    digits = min(decimals(logged), decimals(repr(float(claimed))) if "e" not in repr(float(claimed)) else 12)
    return abs(float(logged) - claimed) <= 0.5001 * 10.0**-digits


def final_results(log: Log) -> list[Result]:
    finals = [result for result in log.results if not result.periodic]
    return finals or list(log.results[-1:])


def check_numbers(submission: Submission) -> list[Finding]:
    claims = submission.claims
    if claims is None:
        return [not_checkable("no readable submission.json")]
    findings: list[Finding] = []
    mend = "write submission.json from the logs, with a program"

    def hold(label: str, one: dict[str, Any], log: Log) -> None:
        for key in ("val_bpb", "val_loss"):
            value = one.get(key)
            if not isinstance(value, (int, float)):
                continue
            written = [r.bpb if key == "val_bpb" else r.loss for r in final_results(log)]
            if not any(written):
                continue  # this log does not state this number
            if any(states(text, value) for text in written):
                findings.append(passed(f"{label}{key} {value} is in the log", log.name))
            else:
                last = next((text for text in reversed(written) if text), "nothing")
                found = f"{label}{key} is {value}, the log's results are {', '.join(t for t in written if t)[-60:]}"
                findings.append(failed(found, f"{claims.path} and {log.name}", f"{mend} (last result: {last})"))
        steps = one.get("steps")
        if isinstance(steps, int) and log.steps is not None:
            found = f"{label}{steps:,} steps claimed, {log.steps:,} logged"
            findings.append(passed(found, log.name) if steps == log.steps else failed(found, log.name, mend))
        tokens, batch = one.get("tokens"), log.config.get("train_batch_tokens")
        if isinstance(tokens, int) and isinstance(batch, int) and log.steps is not None and tokens != batch * log.steps:
            found = (
                f"{label}{tokens:,} training tokens claimed; {log.steps:,} steps of {batch:,} are {batch * log.steps:,}"
            )
            findings.append(failed(found, log.name, mend))

    for seed, one in claims.seeds.items():
        log = submission.log_of(seed)
        if log is not None:
            hold(f"seed {seed}: ", one, log)
    for key in ("val_bpb", "val_loss"):
        top = claims.raw.get(key)
        if not isinstance(top, (int, float)):
            continue
        values = [one[key] for one in claims.seeds.values() if isinstance(one.get(key), (int, float))]
        if values:
            mean = sum(values) / len(values)
            digits = min(12, max(4, decimals(repr(float(top)))))
            right = abs(mean - top) <= 0.51 * 10.0**-digits
            found = f"{key} {top} against the mean {mean:.{min(digits, 8)}f} of {len(values)} seeds"
            findings.append(passed(found) if right else failed(found, claims.path, "claim the mean over the seeds"))
        elif submission.logs:
            written = [r.bpb if key == "val_bpb" else r.loss for log in submission.logs for r in final_results(log)]
            if any(written):
                right = any(states(text, top) for text in written)
                found = f"{key} {top}" + (" is in a log" if right else " is in no log as a final result")
                findings.append(passed(found) if right else failed(found, claims.path, mend))
    return findings or [not_checkable("no claimed score has a log that states one")]


def student_tail(t: float, freedom: float) -> float:
    """P(T > t) of Student's t by the continued fraction of the incomplete beta function (Abramowitz & Stegun
    26.5.8)."""
    x = freedom / (freedom + t * t)
    a, b = freedom / 2.0, 0.5
    if x >= 1.0:
        return 0.5

    def fraction(a: float, b: float, x: float) -> float:
        tiny, c, d = 1e-300, 1.0, 1.0 - (a + b) * x / (a + 1.0)
        d = 1.0 / (d if abs(d) > tiny else tiny)
        out = d
        for m in range(1, 400):
            for numerator in (
                m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
                -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
            ):
                d = 1.0 + numerator * d
                d = 1.0 / (d if abs(d) > tiny else tiny)
                c = 1.0 + numerator / c
                c = c if abs(c) > tiny else tiny
                out *= c * d
            if abs(c * d - 1.0) < 1e-15:
                break
        return out

    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tail = front * fraction(a, b, x) / a if x < (a + 1) / (a + b + 2) else 1.0 - front * fraction(b, a, 1.0 - x) / b
    return tail / 2.0 if t > 0 else 1.0 - tail / 2.0


def welch(ours: tuple[float, ...], theirs: tuple[float, ...], margin: float) -> tuple[float, float]:
    """(mean improvement, one-sided p) of Welch's test that `theirs` is above `ours` by more than `margin`.

    Source: Welch 1947; degrees of freedom by Satterthwaite. Two equal samples without spread give p 0 or 1.
    """
    means = [sum(values) / len(values) for values in (ours, theirs)]
    spread = [
        sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)
        for values, mean in zip((ours, theirs), means)
    ]
    gain = means[1] - means[0]
    if sum(spread) == 0.0:
        return gain, 0.0 if gain > margin else 1.0
    freedom = sum(spread) ** 2 / sum(s**2 / (len(v) - 1) for s, v in zip(spread, (ours, theirs)))
    return gain, student_tail((gain - margin) / math.sqrt(sum(spread)), freedom)


def runs_of(submission: Submission) -> Runs:
    """Per-seed scores that a submission claims, or else the last final results of its logs."""
    claims = submission.claims
    values: dict[str, list[float]] = {"val_loss": [], "val_bpb": []}
    seeds = list(claims.seeds.values()) if claims else []
    for key, found in values.items():
        found += [one[key] for one in seeds if isinstance(one.get(key), (int, float))]
        if len(found) < len(seeds):
            found.clear()
    if not seeds:
        for log in submission.logs:
            finals = final_results(log)
            if finals:
                values["val_bpb"].append(float(finals[-1].bpb))
                if finals[-1].loss is not None:
                    values["val_loss"].append(float(finals[-1].loss))
    return Runs(submission.root.name, tuple(values["val_loss"]), tuple(values["val_bpb"]))


def check_significance(submission: Submission, against: Runs | None) -> list[Finding]:
    if against is None:
        why = "give the record to beat with --against FOLDER" if submission.record_track else "no record is claimed"
        return [not_checkable(why)]
    ours = runs_of(submission)
    if min(len(ours.bpb), len(against.bpb)) < 2:
        why = f"{len(ours.bpb)} and {len(against.bpb)} scores; the test needs at least two on each side"
        return [failed(why, str(submission.root), "run and log more seeds")]
    theirs = against.loss
    if len(ours.loss) < 2:
        return [not_checkable("no val_loss per seed: nats are not known")]
    per_bpb = sum(ours.loss) / sum(ours.bpb) if len(ours.loss) == len(ours.bpb) else 0.0
    other = sum(theirs) / sum(against.bpb) if len(theirs) == len(against.bpb) else 0.0
    converted = ""
    if not other or (per_bpb and abs(per_bpb / other - 1.0) > 1e-3):  # other tokens: compare in nats of our tokens
        theirs, converted = tuple(value * per_bpb for value in against.bpb), ", in nats of our tokens"
    gain, p = welch(ours.loss, theirs, RECORD_MARGIN_NATS)
    found = (
        f"{gain:+.5f} nats better than {against.name}{converted} ({len(ours.loss)} and {len(theirs)} seeds); "
        f"p = {p:.2g} that the gain is at most {RECORD_MARGIN_NATS}"
    )
    if p < RECORD_P:
        return [passed(found)]
    mend = "more seeds narrow the interval; a smaller gain is no record"
    return [failed(found, submission.claims.path if submission.claims else "", mend)]


CHECKS = (
    Check("evidence.papers", "train_gpt.py, README.md, logs and a complete submission.json are there", check_papers),
    Check("evidence.code", "the program in the folder is the one that wrote the logs", check_code),
    Check("evidence.config", "the logs are of the program's configuration, and all of one", check_config),
    Check("evidence.seeds", f"a record has at least {RECORD_SEEDS} seeds, each with its own log", check_seeds),
    Check("evidence.numbers", "every number in submission.json is in the logs", check_numbers),
)
SIGNIFICANCE = Check(
    "evidence.significance",
    f"a record is at least {RECORD_MARGIN_NATS} nats better than the last at p < {RECORD_P} (Welch)",
    lambda case: check_significance(case.submission, case.against),
)
