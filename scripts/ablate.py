"""Paired ablations: `make ablate SPEC=scripts/ablations/NAME.toml DATA=FOLDER`.

    python scripts/ablate.py SPEC --data FOLDER [--out FOLDER] [--jobs N] [--budgets B ...] [--only ARM ...]
    python scripts/ablate.py SPEC --data FOLDER --report          # runs nothing, reports what is finished

A spec (TOML) names arms, seeds and budgets; every arm runs once for every seed and budget, in a process of its own.

  * Paired: runs of one seed share initialisation, data order and random draws (an entry draws everything from (seed,
    step), and modules that only one arm has draw from generators of their own). What is compared is the difference to
    the reference arm, seed by seed. The report checks it: "starts alike" says whether the cross-entropy of the very
    first batch is bit for bit the reference's, as it must be for arms with the same model.
  * Resumable: a finished run is kept, a killed one goes on from its checkpoint (the baseline starts over), and runs of
    another configuration are an error. The same command does all of it. With `--keep FILE` that holds for the runs in
    FILE too, so a study goes on in another clone, which has the file and not the folders. On another machine it goes on
    by whole seeds: one that was begun on a processor or GPU that rounds otherwise is refused (0.0007 bpb between AVX2
    and AVX-512 on `mini`), for what is paired must differ in its options alone.
  * Queued on what is there: GPUs, one run each; else CPU cores, `threads` of them a run, pinned.
  * Equal steps and equal time are two budgets of one spec. On a shared machine a time budget says `clock = "cpu"`: a
    second is one of processor time of that process, all threads together, so that other work costs no arm its steps.
    (It can still cost cache and clock rate; runs of one seed therefore run one after the other, not arm by arm.)
    A time budget that says `priced_by = "steps"` needs no clock: once that budget is finished, an arm gets the steps it
    can make while the reference makes `iterations`. The price of a step is the median over seeds of the arm's
    processor seconds a step over the reference's of the same seed. Such runs are the same on any machine, and one that
    is a run of the other budget once more is not made again.
  * A placebo arm, identical to the reference, must come out null; without a clock its difference is exactly 0. If it
    does not, the report says so on top and the status is 1.

Intervals and p-values are of the paired t test over seeds (two-sided, 95%); p is also given as adjusted for the number
of arms (Holm). A verdict is *better* or *worse* if the interval excludes 0 and the mean reaches `minimum_effect_bpb`,
*null* if the interval lies within that effect on both sides, and *undecided* otherwise.

Writes report.json, report.md, report.png and runs/BUDGET/ARM-seedN/ (into runs/ablations/NAME). `--keep FILE` writes
the JSON there too after every run, for the repository; it holds the hash of the spec, so that a later change of a
preregistered file shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import io
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, never a window

from matplotlib.figure import Figure

from common.cpu import processor_name
from common.errors import ConfigError, DataError, GolfError
from common.files import write_atomically
from referee.evidence import student_tail
from scripts.plot_run import STYLE
from submissions.baseline import train_gpt as baseline
from submissions.jepa_mamba import train_gpt as jepa_mamba

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = ("jepa_mamba", "baseline")
# What may differ between a finished run and its spec: where it lies and how it ran, not what it computed.
FREE = jepa_mamba.RESUME_FREE_FIELDS | {"runs_dir", "run_id", "data_path", "device", "val_batch_tokens"}
METRICS = {"val_bpb": "artifact", "float_val_bpb": "float weights"}
CONFIDENCE = 0.95


# ---------------------------------------------------------------------------------------------------------------------
# Spec and plan
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """What to run. Tables are option -> value; `entry` and `preset` are taken out of an arm's options."""

    name: str
    about: str
    reference: str
    placebo: str  # "" for none
    seeds: tuple[int, ...]
    threads: int
    minimum_effect_bpb: float
    options: dict[str, dict[str, Any]]  # of every arm of an entry
    budgets: dict[str, dict[str, Any]]
    arms: dict[str, dict[str, Any]]
    sha256: str  # of the file


def read_spec(path: Path) -> Spec:
    """Raises ConfigError for a key, arm or entry that cannot be."""
    try:
        data = path.read_bytes()
        raw = tomllib.loads(data.decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"spec {path}: {error}; expected a TOML file such as scripts/ablations/*.toml") from error
    known = {f.name for f in dataclasses.fields(Spec)} - {"sha256"}
    wrong = sorted(set(raw) - known)
    missing = sorted({"name", "reference", "seeds", "budgets", "arms"} - set(raw))
    if wrong or missing:
        raise ConfigError(f"spec {path}: unknown keys {wrong}, missing keys {missing}; known are {sorted(known)}")
    spec = Spec(
        name=raw["name"], about=raw.get("about", "").strip(), reference=raw["reference"],
        placebo=raw.get("placebo", ""), seeds=tuple(raw["seeds"]), threads=raw.get("threads", 1),
        options=raw.get("options", {}),
        minimum_effect_bpb=raw.get("minimum_effect_bpb", 0.002), budgets=raw["budgets"], arms=raw["arms"],
        sha256=hashlib.sha256(data).hexdigest(),
    )  # fmt: skip
    rules = {
        "reference must be one of the arms": spec.reference in spec.arms,
        "placebo must be one of the arms and not the reference":
            spec.placebo == "" or (spec.placebo in spec.arms and spec.placebo != spec.reference),
        "seeds are different integers, at least one":
            bool(spec.seeds) and all(type(s) is int for s in spec.seeds) and len(set(spec.seeds)) == len(spec.seeds),
        "at least one budget": bool(spec.budgets),
        "threads is at least 1": type(spec.threads) is int and spec.threads >= 1,
        f"entries are {', '.join(ENTRIES)}":
            {arm.get("entry", ENTRIES[0]) for arm in spec.arms.values()} | set(spec.options) <= {*ENTRIES},
        "a budget with priced_by has iterations and no clock that ends it, and names such a one with the cpu clock":
            all(_counts_steps(b) and _prices(spec, b["priced_by"]) for b in spec.budgets.values() if "priced_by" in b),
        "names of arms and budgets are letters, digits, - and _": all(
            name.replace("-", "").replace("_", "").isalnum() for name in (*spec.arms, *spec.budgets, spec.name)
        ),
    }  # fmt: skip
    for rule, holds in rules.items():
        if not holds:
            raise ConfigError(f"spec {path}: {rule}")
    return spec


def _counts_steps(limits: Mapping[str, Any]) -> bool:
    return type(limits.get("iterations")) is int and limits.get("max_wallclock_seconds") == 0


def _prices(spec: Spec, name: Any) -> bool:
    limits = spec.budgets.get(name, {})
    return _counts_steps(limits) and limits.get("clock") == "cpu" and "priced_by" not in limits


@dataclass(frozen=True)
class PlannedRun:
    """One process: its command line after `python`, its folder, and the configuration that it must have."""

    budget: str
    arm: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    config: dict[str, Any]
    waits_for: str = ""  # a budget whose runs will say how many steps this one has; until then it has those of the spec

    @property
    def summary(self) -> Path:
        return self.folder / "summary.json"

    @property
    def label(self) -> str:
        return f"{self.budget}/{self.arm}-seed{self.seed}"

    @property
    def meant(self) -> dict[str, Any]:
        """What the run computes: its configuration without what it is free to have otherwise."""
        return {name: value for name, value in self.config.items() if name not in FREE}

    def config_sha256(self, fields: Iterable[str] | None = None) -> str:
        """Of what the run computes; given the fields that there were, without those that came later and are at rest."""
        meant, known = self.meant, None if fields is None else set(fields)
        if known is not None:
            meant = {n: v for n, v in meant.items() if n in known or v != default_of(self.config["entry"], n)}
        return hashlib.sha256(json.dumps(meant, sort_keys=True, default=str).encode()).hexdigest()

    def command(self) -> str:
        return shlex.join(["python", *self.arguments])


def default_of(entry: str, name: str) -> Any:
    """Of an option; one that came after a run was off in it, which is what defaults of new options are."""
    return getattr((baseline if entry == "baseline" else jepa_mamba).Config(), name, None)


def shown(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def step_prices(spec: Spec, budget: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Processor seconds of an arm's step over the reference's, for the arms that have finished every seed of a budget.

    The median over seeds of ratios within a seed: what else the machine did at that time is in both parts of most.
    """
    seconds = {(r["arm"], r["seed"]): r["train_s"] / r["steps"] for r in rows if r["budget"] == budget}
    prices = {
        arm: statistics.median(seconds[arm, seed] / seconds[spec.reference, seed] for seed in spec.seeds)
        for arm in spec.arms
        if all((name, seed) in seconds for name in (arm, spec.reference) for seed in spec.seeds)
    }
    same = {spec.placebo} & prices.keys()  # the same configuration: what its own measurement adds is noise
    return prices | dict.fromkeys(same, 1.0)


def measured(spec: Spec, budget: str, out: Path, kept: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What `step_prices` needs of the finished runs of a budget: in their folders, or else kept."""
    rows = {(row["arm"], row["seed"]): row for row in kept if row["budget"] == budget}
    for arm in spec.arms:
        for seed in spec.seeds:
            path = out / "runs" / budget / f"{arm}-seed{seed}" / "summary.json"
            if path.is_file():
                summary = json.loads(path.read_text(encoding="utf-8"))
                known = {"budget": budget, "arm": arm, "seed": seed}
                rows[arm, seed] = known | {name: summary[name] for name in ("train_s", "steps")}
    return list(rows.values())


def plan_runs(spec: Spec, data: Path, out: Path, kept: Sequence[Mapping[str, Any]] = ()) -> list[PlannedRun]:
    """Every run, in an order in which the runs of one seed follow each other. Raises ConfigError for a bad option."""
    runs = []
    prices = {name: step_prices(spec, name, measured(spec, name, out, kept)) for name in priced_budgets(spec).values()}
    for seed in spec.seeds:
        for budget, limits in spec.budgets.items():
            for arm, changes in spec.arms.items():
                entry = changes.get("entry", ENTRIES[0])
                options = {**spec.options.get(entry, {}), **limits, **changes}
                options.pop("entry", None)
                preset = options.pop("preset", None)
                priced_by = options.pop("priced_by", "")
                price = prices[priced_by].get(arm) if priced_by else None
                if price is not None:
                    options["iterations"] = max(1, int(options["iterations"] / price))
                folder = out / "runs" / budget / f"{arm}-seed{seed}"
                options |= {"seed": seed, "data_path": data, "runs_dir": folder.parent, "run_id": folder.name}
                flags = [word for name, value in options.items() for word in (f"--{name}", shown(value))]
                flags = [*(["--preset", preset] if preset else []), *flags]
                try:
                    if entry == "baseline":
                        config = dataclasses.asdict(baseline.parse_command(flags)[1])
                    else:
                        config = dataclasses.asdict(jepa_mamba.parse_command(flags, {}).config)
                except SystemExit:
                    raise ConfigError(f"arm {arm}: {entry} refused {shlex.join(flags)}; its message is above") from None
                except ConfigError as error:
                    raise ConfigError(f"arm {arm}, budget {budget}: {error}") from error
                path = f"submissions/{entry}/train_gpt.py"
                waits_for = priced_by if price is None else ""
                config["entry"] = entry
                runs.append(PlannedRun(budget, arm, seed, folder, (path, *flags), config, waits_for))
    if spec.placebo:
        both = {name: [r.config_sha256() for r in runs if r.arm == name] for name in (spec.placebo, spec.reference)}
        if both[spec.placebo] != both[spec.reference]:
            raise ConfigError(f"placebo {spec.placebo} is not identical to {spec.reference}; give it the same options")
    return runs


def priced_budgets(spec: Spec) -> dict[str, str]:
    """Budgets whose steps have a price, with the budget that tells it."""
    return {budget: limits["priced_by"] for budget, limits in spec.budgets.items() if "priced_by" in limits}


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


def finished_summary(run: PlannedRun) -> dict[str, Any] | None:
    """summary.json of a finished run, None for another. Raises DataError if it ran with another configuration."""
    if not run.summary.is_file():
        return None
    summary = json.loads(run.summary.read_text(encoding="utf-8"))
    wanted = run.meant
    entry, held = wanted.pop("entry"), summary["config"]
    changed = {name: (held.get(name, default_of(entry, name)), value) for name, value in wanted.items()}
    changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
    if changed:
        listing = ", ".join(f"{name} was {before!r}, is {now!r}" for name, (before, now) in changed.items())
        raise DataError(f"{run.folder}: finished with other options ({listing}); remove it or give another --out")
    return summary


def slots_of(spec: Spec, jobs: int) -> list[dict[str, Any]]:
    """Where runs can go side by side: a GPU each, or `threads` cores each. Raises ConfigError for too few cores."""
    on_cpu = all(options.get("device") == "cpu" for options in spec.options.values()) and bool(spec.options)
    if not on_cpu and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines()
        names = [line.partition(": ")[2].partition(" (UUID")[0] for line in listed if line.startswith("GPU ")]
        gpus = [{"gpu": i, "rounding": [name]} for i, name in enumerate(names)]
        if gpus:
            return gpus[: jobs or len(gpus)]
    cores = sorted(os.sched_getaffinity(0))
    if spec.threads > len(cores):
        raise ConfigError(f"spec {spec.name} wants {spec.threads} cores a run, this process may use {len(cores)}")
    groups = [cores[i : i + spec.threads] for i in range(0, len(cores) - spec.threads + 1, spec.threads)]
    here = [processor_name()]
    return [{"cores": group, "rounding": here} for group in groups[: jobs or len(groups)]]


def start_run(run: PlannedRun, slot: dict[str, Any], threads: int) -> subprocess.Popen[bytes]:
    """The entry in a process of its own, pinned; its output goes beside its folder."""
    options = {f.name.upper() for f in dataclasses.fields(jepa_mamba.Config)} | {"PRESET"}
    environ = {name: value for name, value in os.environ.items() if name not in options}
    paths = [str(ROOT), *filter(None, [environ.get("PYTHONPATH")])]
    environ |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if "gpu" in slot:
        environ["CUDA_VISIBLE_DEVICES"] = str(slot["gpu"])
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(run.folder.with_suffix(".out"), "ab") as output:
        # Its own session: an interrupt at the keyboard reaches this program, which then asks each run to save and end.
        process = subprocess.Popen(
            [sys.executable, *run.arguments], cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    if "cores" in slot:
        os.sched_setaffinity(process.pid, slot["cores"])
    return process


def execute(
    spec: Spec,
    runs: Sequence[PlannedRun],
    slots: list[dict[str, Any]],
    finished: Mapping[str, Mapping[str, Any]],
    save: Callable[[], Any],
) -> list[str]:
    """Run what is not `finished` (rows by label), calling `save` after each; returns what failed.

    Raises KeyboardInterrupt after the runs in flight have saved.
    """
    waiting = [run for run in runs if run.label not in finished]
    here, begun = slots[0]["rounding"], {(row["budget"], row["seed"]): rounding(row) for row in finished.values()}
    for run in waiting:
        other = begun.get((run.budget, run.seed))
        if other is not None and other != here:
            raise ConfigError(
                f"{run.label}: this seed was begun on {', '.join(other)} and would go on here on {', '.join(here)}, "
                "which rounds otherwise: go on there, leave the seed out with --seeds, or give another --keep and --out"
            )
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished; {len(slots)} at a time", flush=True)
    free, failed, done = list(slots), [], 0
    busy: list[tuple[PlannedRun, dict[str, Any], subprocess.Popen[bytes]]] = []

    def stop(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        while waiting or busy:
            while waiting and free:
                run, slot = waiting.pop(0), free.pop(0)
                busy.append((run, slot, start_run(run, slot, spec.threads)))
            for item in [item for item in busy if item[2].poll() is not None]:
                busy.remove(item)
                run, slot, process = item
                free.append(slot)
                done += 1
                summary = finished_summary(run)
                if summary is None:
                    failed.append(f"{run.label}: status {process.returncode}, see {run.folder.with_suffix('.out')}")
                    print(f"FAILED {failed[-1]}", flush=True)
                else:
                    print(f"{run.label}: {summary['val_bpb']:.4f} bpb, {summary['steps']} steps", flush=True)
                    save()
            time.sleep(0.2)
    finally:
        for _, _, process in busy:
            process.terminate()
        for _, _, process in busy:
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return failed


# ---------------------------------------------------------------------------------------------------------------------
# Analysis
# ---------------------------------------------------------------------------------------------------------------------


def student_quantile(confidence: float, freedom: float) -> float:
    """t with P(|T| < t) = confidence."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if 2 * student_tail(middle, freedom) > 1 - confidence else (low, middle)
    return high


def paired(differences: Sequence[float]) -> dict[str, Any]:
    """Mean of paired differences, 95% interval and two-sided p of the paired t test; without them for one pair."""
    n = len(differences)
    mean = math.fsum(differences) / n
    out: dict[str, Any] = {"n": n, "mean": mean, "low": None, "high": None, "p": None, "sd": None}
    if n < 2:
        return out
    sd = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    error = sd / math.sqrt(n)
    half = student_quantile(CONFIDENCE, n - 1) * error
    p = (1.0 if mean == 0 else 0.0) if error == 0 else min(1.0, 2 * student_tail(abs(mean) / error, n - 1))
    return out | {"sd": sd, "low": mean - half, "high": mean + half, "p": p}


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment (1979) for as many tests as there are p-values."""
    out, worst = {}, 0.0
    for i, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        worst = max(worst, min(1.0, (len(p_values) - i) * p))
        out[name] = worst
    return out


def verdict_of(difference: Mapping[str, Any], minimum: float) -> str:
    """better, worse, null or undecided: see the top of this file."""
    low, high, mean = difference["low"], difference["high"], difference["mean"]
    if low is None:
        return "one seed"
    if high < 0 and mean <= -minimum:
        return "better"
    if low > 0 and mean >= minimum:
        return "worse"
    return "null" if -minimum <= low and high <= minimum else "undecided"


def first_loss(folder: Path) -> float | None:
    """Cross-entropy of the first batch, before anything was learned; None if its line is not in the log."""
    with open(folder / "log.jsonl", encoding="utf-8") as log:
        events = [json.loads(line) for line in log]
    return next((e["ce"] for e in events if e.get("event") == "step" and e["step"] == 1 and "ce" in e), None)


def latents_of(folder: Path) -> dict[str, float] | None:
    """Last measurement of the latent objectives in a run's log."""
    with open(folder / "log.jsonl", encoding="utf-8") as log:
        events = [e for e in map(json.loads, log) if e.get("event") == "latents"]
    return {k: v for k, v in events[-1].items() if k not in ("event", "step")} if events else None


def row_of(run: PlannedRun) -> dict[str, Any] | None:
    """What the report needs of a finished run; None for another."""
    summary = finished_summary(run)
    if summary is None:
        return None
    names = (
        *METRICS, "steps", "tokens", "train_s", "artifact_bytes", "params", "clock", "eval_mode", "val_sha256",
        "tokenizer_sha256", "code_sha256",
    )  # fmt: skip
    row = {"budget": run.budget, "arm": run.arm, "seed": run.seed, "entry": run.config["entry"]}
    row |= {"config_sha256": run.config_sha256()} | {name: summary.get(name) for name in names}
    row |= {"git": summary.get("git"), "machine": summary["environment"], "first_ce": first_loss(run.folder)}
    return row | {"latents": latents_of(run.folder)}


def read_kept(path: Path | None) -> list[dict[str, Any]]:
    """Rows of an earlier report, one a run, each with the fields that its entry had then; none without such a file.

    Raises DataError for anything else.
    """
    if path is None or not path.exists():
        return []
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        rows = [row | {"fields": report["fields"][row["entry"]]} for row in report["rows"]]
        missing = {"budget", "arm", "seed", "train_s", "steps", "machine"}.difference(*rows[:1])
        if missing:
            raise KeyError(*sorted(missing))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: {error!r}; expected a report that --keep wrote; give another file") from error
    return [row for row in rows if "same_as" not in row]


def rounding(row: Mapping[str, Any]) -> list[str]:
    """What runs of one code and configuration must share to be equal bit for bit: GPUs, else the processor."""
    machine = row["machine"]  # of reports before 2026-11-29 only the instructions are known
    return machine.get("gpus") or [machine.get("processor") or machine.get("cpu_capability", "an unknown processor")]


def collect(
    runs: Sequence[PlannedRun], kept: Sequence[dict[str, Any]] = (), here: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Rows of the finished runs by label: from their folders, else kept, else those of another budget's equal run.

    The last only if it rounds as the other runs of its budget and seed, and as those to be made `here` (None: none).

    Raises DataError for runs of other options than planned, or if they were not scored on the same text.
    """
    planned = {run.label: run for run in runs if not run.waits_for}
    found = {label: row_of(run) for label, run in planned.items()}
    rows = {label: row for label, row in found.items() if row is not None}
    for row in kept:
        label = f"{row['budget']}/{row['arm']}-seed{row['seed']}"
        run, fields = planned.get(label), row["fields"]
        if run is None or row.get("config_sha256") != run.config_sha256(fields):
            raise DataError(f"--keep has {label} of other options than the spec's now; give another file or remove it")
        row = row | {"config_sha256": run.config_sha256()}
        row.pop("fields")
        rows.setdefault(label, row)
    known = {(row["arm"], row["seed"], row["config_sha256"]): row for row in rows.values()}
    beside = {(row["budget"], row["seed"]): rounding(row) for row in rows.values()}
    for label, run in planned.items():
        twin = known.get((run.arm, run.seed, run.config_sha256()))
        if label not in rows and twin is not None:
            alike = beside.get((run.budget, run.seed), here)
            if alike is None or alike == rounding(twin):
                rows[label] = {**twin, "budget": run.budget, "same_as": twin["budget"]}
    for name in ("val_sha256", "tokenizer_sha256"):
        if len({row[name] for row in rows.values()}) > 1:
            raise DataError(f"the runs do not share one {name}; they cannot be compared: start over with one --data")
    return {label: rows[label] for label in planned if label in rows}


def analyse(spec: Spec, rows: Sequence[dict[str, Any]], planned: int) -> dict[str, Any]:
    """Means of arms, paired differences to the reference, verdicts; for every budget."""
    budgets: dict[str, Any] = {}
    for budget, limits in spec.budgets.items():
        by_arm = {arm: {r["seed"]: r for r in rows if (r["budget"], r["arm"]) == (budget, arm)} for arm in spec.arms}
        reference, arms = by_arm[spec.reference], {}
        for arm, own in by_arm.items():
            if not own:
                continue
            entry: dict[str, Any] = {"seeds": sorted(own), "options": spec.arms[arm]}
            for name in (*METRICS, "steps", "tokens", "train_s", "artifact_bytes", "params"):
                values = [row[name] for row in own.values() if row[name] is not None]
                entry[name] = math.fsum(values) / len(values) if values else None
            shared = sorted(own.keys() & reference.keys())
            if arm != spec.reference and shared:
                for name in METRICS:
                    entry[f"{name}_difference"] = paired([own[s][name] - reference[s][name] for s in shared])
                alike = [own[s]["first_ce"] == reference[s]["first_ce"] for s in shared]
                entry["starts_alike"] = all(alike)
                entry["verdict"] = verdict_of(entry["val_bpb_difference"], spec.minimum_effect_bpb)
            arms[arm] = entry
        tested = {arm: e["val_bpb_difference"]["p"] for arm, e in arms.items() if "val_bpb_difference" in e}
        for arm, p in holm({a: p for a, p in tested.items() if p is not None and a != spec.placebo}).items():
            arms[arm]["p_holm"] = p
        budgets[budget] = {"limits": limits, "arms": arms, "placebo": placebo_state(spec, arms)}
    for budget, priced_by in priced_budgets(spec).items():
        budgets[budget]["prices"] = step_prices(spec, priced_by, rows)
    return {
        "name": spec.name, "about": spec.about, "spec_sha256": spec.sha256, "reference": spec.reference,
        "placebo": spec.placebo,
        "minimum_effect_bpb": spec.minimum_effect_bpb, "seeds": list(spec.seeds), "planned_runs": planned,
        "finished_runs": len(rows), "options": spec.options, "arms": spec.arms, "budgets": budgets,
        "code": {
            entry: sorted({row["code_sha256"] for row in rows if row["entry"] == entry}) for entry in ENTRIES
        },
        "rows": list(rows),
    }  # fmt: skip


def placebo_state(spec: Spec, arms: Mapping[str, Any]) -> str:
    """none, waiting, null or broken: an identical arm may not differ by more than the paired interval allows."""
    if not spec.placebo:
        return "none"
    if "val_bpb_difference" not in arms.get(spec.placebo, {}):
        return "waiting"
    difference = arms[spec.placebo]["val_bpb_difference"]
    if difference["mean"] == 0:
        return "null"
    low, high = difference["low"], difference["high"]
    small = abs(difference["mean"]) <= spec.minimum_effect_bpb
    return "null" if (low is None and small) or (low is not None and low <= 0 <= high) else "broken"


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def interval_text(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return "–"
    interval = "" if difference["low"] is None else f" [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    return f"{difference['mean']:+.4f}{interval}"


def arm_table(result: Mapping[str, Any], budget: str) -> str:
    """Markdown table of one budget: the reference first, then the others by their difference."""
    arms = result["budgets"][budget]["arms"]
    if not arms:
        return "No run is finished."
    head = (
        "arm", "seeds", "bpb, artifact", "difference", "p", "p (Holm)", "bpb, float", "difference, float", "steps",
        "train s", "artifact bytes", "starts alike", "verdict",
    )  # fmt: skip

    def place(item: tuple[str, Any]) -> tuple[bool, float]:
        return item[0] != result["reference"], item[1].get("val_bpb_difference", {"mean": 0.0})["mean"]

    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for arm, e in sorted(arms.items(), key=place):
        difference = e.get("val_bpb_difference")
        p = difference["p"] if difference else None
        cells = [
            f"{arm} (reference)" if arm == result["reference"] else arm, str(len(e["seeds"])), f"{e['val_bpb']:.4f}",
            interval_text(difference), "–" if p is None else f"{p:.2g}",
            f"{e['p_holm']:.2g}" if "p_holm" in e else "–", f"{e['float_val_bpb']:.4f}",
            interval_text(e.get("float_val_bpb_difference")), f"{e['steps']:,.0f}", f"{e['train_s']:,.0f}",
            f"{e['artifact_bytes']:,.0f}", {True: "yes", False: "no"}.get(e.get("starts_alike"), "–"),
            e.get("verdict", "–"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def limits_text(limits: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {shown(value) or '(empty)'}" for name, value in limits.items())


def prices_text(part: Mapping[str, Any]) -> str:
    """What a step of each arm costs, for a budget that goes by it; empty for others."""
    if "prices" not in part:
        return ""
    prices = ", ".join(f"{arm} {price:.3f}" for arm, price in part["prices"].items())
    return f"Price of a step over the reference's, of `{part['limits']['priced_by']}`: {prices or 'not known yet'}."


def markdown(result: Mapping[str, Any], runs: Sequence[PlannedRun], command: str) -> str:
    """The report, written by this program."""
    broken = [name for name, part in result["budgets"].items() if part["placebo"] == "broken"]
    parts = [f"# {result['name']}", result["about"]]
    if broken:
        parts.append(f"**The placebo is not null under {', '.join(broken)}: no difference below is to be trusted.**")
    for entry, versions in result["code"].items():
        if len(versions) > 1:
            parts.append(f"**The runs of {entry} were made by {len(versions)} versions of its code (report.json).**")
    parts.append(
        f"{result['finished_runs']} of {result['planned_runs']} runs finished. Differences are to "
        f"`{result['reference']}`, paired by seed, in bits per byte; brackets are 95% intervals of the paired t test. "
        f"Smallest effect of interest: {result['minimum_effect_bpb']} bpb."
    )
    for budget, part in result["budgets"].items():
        placebo = {"none": "no placebo arm"}.get(part["placebo"], f"placebo: {part['placebo']}")
        parts += [f"## {budget}: {limits_text(part['limits'])}", f"{placebo}.", prices_text(part)]
        parts.append(arm_table(result, budget))
    parts += ["## Commands", f"```\n{command}\n```", "One run each:"]
    parts.append("```\n" + "\n".join(run.command() for run in runs if not run.waits_for) + "\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(result: Mapping[str, Any]) -> bytes:
    """Paired differences with their intervals, a panel a budget, as PNG."""
    budgets = result["budgets"]
    others = [arm for arm in result["arms"] if arm != result["reference"]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4 + 3.5 * len(budgets), 1.6 + 0.32 * len(others)), layout="constrained")
        panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
        for axes, (budget, part) in zip(panels, budgets.items(), strict=True):
            effect = result["minimum_effect_bpb"]
            axes.axvspan(-effect, effect, color="#e3e6ea", zorder=0)
            axes.axvline(0, color="#6b7480", linewidth=1)
            for place, arm in enumerate(others):
                difference = part["arms"].get(arm, {}).get("val_bpb_difference")
                if difference is None:
                    continue
                color = {"better": "#3a8f5c", "worse": "#c04a4a"}.get(part["arms"][arm]["verdict"], "#2f6fb3")
                if difference["low"] is not None:
                    axes.plot([difference["low"], difference["high"]], [place, place], color=color, linewidth=2)
                axes.plot([difference["mean"]], [place], "o", color=color, markersize=6)
            axes.set_yticks(range(len(others)), others)
            axes.set_ylim(len(others) - 0.5, -0.5)
            axes.set_title(budget)
            axes.set_xlabel(f"bpb over {result['reference']} (artifact)")
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()


@dataclass(frozen=True)
class Study:
    """A spec with its places: what is planned now, what is finished, and the report of it."""

    spec: Spec
    data: Path
    out: Path
    keep: Path | None
    kept: list[dict[str, Any]]  # rows that the file of `keep` had at the start
    command: str

    def plan(self) -> list[PlannedRun]:
        return plan_runs(self.spec, self.data, self.out, self.kept)

    def result(self, runs: Sequence[PlannedRun]) -> dict[str, Any]:
        """What is finished, analysed."""
        fields = {run.config["entry"]: sorted(run.meant) for run in runs}
        rows = list(collect(runs, self.kept).values())
        return analyse(self.spec, rows, len(runs)) | {"fields": fields, "command": self.command}

    def save(self) -> None:
        """Write the file to keep, if there is one: what a killed study does not lose."""
        if self.keep is not None:
            self.keep.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.keep, (json.dumps(self.result(self.plan()), indent=1) + "\n").encode())

    def report(self) -> dict[str, Any]:
        """Write the three files, and the one to keep."""
        runs = self.plan()
        result = self.result(runs)
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out / "report.json", (json.dumps(result, indent=1) + "\n").encode())
        write_atomically(self.out / "report.md", markdown(result, runs, self.command).encode())
        write_atomically(self.out / "report.png", draw(result))
        self.save()
        return result


def portable(word: str) -> str:
    """A word of the command line for a report that is kept: no path of this machine, but the end of it."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 for failed runs, an interruption or a placebo that is not null; 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(description="Run a paired ablation and report it.")
    parser.add_argument("spec", type=Path, help="TOML file, such as scripts/ablations/recipe_mini.toml")
    parser.add_argument("--data", type=Path, required=True, help="folder of shards, of scripts/prepare_text.py")
    parser.add_argument("--out", type=Path, default=None, help="folder of runs and report (runs/ablations/NAME)")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time at most (default: what there is room for)")
    parser.add_argument("--only", nargs="*", default=[], metavar="ARM", help="run these arms and the reference")
    parser.add_argument("--budgets", nargs="*", default=[], metavar="BUDGET", help="run these budgets")
    parser.add_argument("--keep", type=Path, default=None, metavar="FILE", help="write report.json there too")
    parser.add_argument("--seeds", nargs="*", type=int, default=[], help="run these seeds of the spec")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is finished")
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(words)
    try:
        spec = read_spec(arguments.spec)
        asked = ((arguments.only, spec.arms), (arguments.seeds, spec.seeds), (arguments.budgets, spec.budgets))
        unknown = [str(name) for names, known in asked for name in names if name not in known]
        if unknown:
            raise ConfigError(f"{', '.join(unknown)}: no arm, seed or budget of {arguments.spec}")
        out = (arguments.out or ROOT / "runs" / "ablations" / spec.name).resolve()
        command = shlex.join(["python", "scripts/ablate.py", *map(portable, words)])
        data, keep = arguments.data.resolve(), arguments.keep
        study = Study(spec, data, out, keep, read_kept(keep), command)
        collect(study.plan(), study.kept)  # refuses a bad spec or file before there is a folder
        failed: list[str] = []
        if not arguments.report:
            out.mkdir(parents=True, exist_ok=True)
            with open(out / "lock", "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ConfigError(f"{out}: another ablation is running there; wait or give another --out") from None
                slots = slots_of(spec, arguments.jobs)
                # Twice where steps have a price: those whose number of steps the others have told come after them.
                for _ in range(2 if priced_budgets(spec) else 1):
                    runs = study.plan()
                    chosen = [
                        run for run in runs
                        if (not arguments.only or run.arm in (*arguments.only, spec.reference))
                        and (not arguments.seeds or run.seed in arguments.seeds)
                        and (not arguments.budgets or run.budget in arguments.budgets)
                        and not run.waits_for
                    ]  # fmt: skip
                    failed = failed or execute(
                        spec, chosen, slots, collect(runs, study.kept, slots[0]["rounding"]), study.save
                    )
        result = study.report()
        for budget in spec.budgets:
            print(f"\n{budget}: {limits_text(spec.budgets[budget])}\n{arm_table(result, budget)}")
        print(f"\nreport: {out / 'report.md'}, {out / 'report.png'}")
        broken = [budget for budget, part in result["budgets"].items() if part["placebo"] == "broken"]
        for line in [*failed, *(f"placebo is not null under {budget}" for budget in broken)]:
            print(f"ablate: {line}", file=sys.stderr)
    except GolfError as error:
        print(f"ablate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ablate: interrupted; the same command goes on from here", file=sys.stderr)
        return 1
    return 1 if failed or broken else 0


if __name__ == "__main__":
    sys.exit(main())
