"""scripts/ablate.py: specs, pairing, statistics, resumption, and one real ablation (slow)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from common.cpu import processor_name
from common.errors import ConfigError, DataError
from scripts import ablate
from scripts.ablate import analyse, holm, paired, plan_runs, read_spec, student_quantile, verdict_of

SPEC = """
name = "try"
reference = "base"
placebo = "same"
seeds = [1, 2, 3]
threads = 1
[options.jepa_mamba]
device = "cpu"
model_dim = 64
attn_layers = "1"
document_reset = true
[options.baseline]
preset = "mini"
device = "cpu"
[budgets.steps]
iterations = 5
max_wallclock_seconds = 0
[budgets.time]
clock = "cpu"
max_wallclock_seconds = 2
[arms.base]
[arms.same]
[arms.smaller]
d_state = 8
[arms.plain]
entry = "baseline"
"""

# Stands for an entry: notes that it ran, and writes what a finished run leaves. "broken" ends without a summary.
FAKE = """
import json, pathlib, sys, time
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
options = {k.removeprefix("--"): v for k, v in options.items()}
folder = pathlib.Path(options["runs_dir"]) / options["run_id"]
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "started", "a") as file:
    file.write("x")
arm, seed = folder.name.rsplit("-seed", 1)
bpb = 2.0 + 0.1 * int(seed) + {"base": 0, "same": 0, "smaller": 0.01, "plain": 0.3}[arm] + 0.001 * (seed == "2")
if arm == "smaller":
    bpb += 0.0005 * int(seed)
log = {"event": "step", "step": 1, "ce": 5.5 if arm != "plain" else 6.5}
(folder / "log.jsonl").write_text(json.dumps(log) + "\\n")
summary = {"val_bpb": bpb, "float_val_bpb": bpb - 0.01, "steps": 5, "tokens": 9, "train_s": 1.0, "artifact_bytes": 7,
           "params": 3, "clock": "cpu", "eval_mode": "carried", "val_sha256": "a", "tokenizer_sha256": "b",
           "code_sha256": sys.argv[1], "environment": {"processor": "PROCESSOR"},
           "config": json.loads(sys.stdin.read())}
if not (folder / "break").exists():
    (folder / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "try.toml"
    path.write_text(SPEC)
    return path


@pytest.fixture
def fake_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "fake.py"
    program.write_text(FAKE.replace("PROCESSOR", processor_name()))

    def start(run, slot, threads):
        process = subprocess.Popen([sys.executable, "-S", str(program), *run.arguments], stdin=subprocess.PIPE)
        assert process.stdin is not None
        process.stdin.write(json.dumps(run.config).encode())
        process.stdin.close()
        return process

    monkeypatch.setattr(ablate, "start_run", start)


def test_plan_is_paired_and_ordered(spec_file: Path, tmp_path: Path) -> None:
    spec = read_spec(spec_file)
    runs = plan_runs(spec, tmp_path / "data", tmp_path / "out")
    assert len(runs) == 3 * 2 * 4
    assert [run.label for run in runs[:4]] == [f"steps/{arm}-seed1" for arm in ("base", "same", "smaller", "plain")]
    base, same, smaller, plain = runs[:4]
    assert base.config["seed"] == same.config["seed"] == plain.config["seed"] == 1
    assert {k for k in base.config if base.config[k] != smaller.config[k]} == {"d_state", "run_id"}
    assert base.config["document_reset"] is True
    assert base.config["iterations"] == plain.config["iterations"] == 5
    assert plain.arguments[0] == "submissions/baseline/train_gpt.py"
    assert plain.config["model_dim"] == 80  # its preset, not the options of the other entry
    assert "--document_reset 1" in base.command()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('reference = "base"', 'reference = "bass"', "reference must be one of the arms"),
        ("seeds = [1, 2, 3]", "seeds = [1, 1]", "seeds are different"),
        ("d_state = 8", "d_stat = 8", "arm smaller.*did you mean --d_state"),
        ("d_state = 8", "d_state = 0", "arm smaller.*at least 1"),
        ("[arms.same]", "[arms.same]\nd_conv = 3", "placebo same is not identical"),
        ('entry = "baseline"', 'entry = "mine"', "entries are"),
        ('name = "try"', 'name = "try"\nnotes = 1', "unknown keys"),
        ("[arms.same]", "[arms.same", "expected a TOML file"),
        ('clock = "cpu"', 'priced_by = "steps"', "a budget with priced_by has iterations and no clock"),
    ],
)  # fmt: skip
def test_bad_specs_are_refused_before_anything_runs(spec_file: Path, tmp_path: Path, old: str, new: str, says: str):
    spec_file.write_text(SPEC.replace(old, new))
    with pytest.raises(ConfigError, match=says):
        plan_runs(read_spec(spec_file), tmp_path, tmp_path)


def test_paired_t_against_worked_figures() -> None:
    # scipy.stats.ttest_1samp gives t = 3.137858, p = 0.0349197; stats.t.ppf(0.975, 4) = 2.7764451
    difference = paired([0.01, 0.02, 0.03, 0.02, 0.00])
    assert difference["mean"] == pytest.approx(0.016)
    assert student_quantile(0.95, 4) == pytest.approx(2.7764451, abs=1e-6)
    error = math.sqrt(0.00052 / 4 / 5)  # squared deviations of the five sum up to 0.00052
    assert difference["high"] - difference["mean"] == pytest.approx(2.7764451 * error)
    assert difference["p"] == pytest.approx(0.0349197, abs=1e-6)
    assert paired([0.0, 0.0])["p"] == 1.0
    assert paired([0.5])["low"] is None
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


@pytest.mark.parametrize(
    ("low", "mean", "high", "verdict"),
    [
        (-0.02, -0.01, -0.001, "better"), (0.001, 0.01, 0.02, "worse"), (-0.001, 0.0, 0.001, "null"),
        (-0.01, 0.0, 0.01, "undecided"), (-0.0015, -0.001, -0.0005, "null"), (None, 0.1, None, "one seed"),
    ],
)  # fmt: skip
def test_verdicts(low, mean, high, verdict) -> None:
    assert verdict_of({"low": low, "mean": mean, "high": high}, 0.002) == verdict


def test_runs_once_resumes_and_reports(spec_file: Path, tmp_path: Path, fake_entry: None, capsys) -> None:
    out, where = tmp_path / "out", [str(spec_file), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    spoiled = out / "runs/time/plain-seed3"
    spoiled.mkdir(parents=True)
    (spoiled / "break").touch()
    assert ablate.main([*where, "--jobs", "2"]) == 1
    assert "time/plain-seed3: status 0, see" in capsys.readouterr().err
    (spoiled / "break").unlink()
    kept = tmp_path / "new" / "kept.json"
    assert ablate.main([*where, "--keep", str(kept)]) == 0
    assert kept.read_bytes() == (out / "report.json").read_bytes()
    capsys.readouterr()
    started = {p.parent.name: p.read_text() for p in out.glob("runs/*/*/started") if p.parent.parent.name == "time"}
    assert started == {f"{a}-seed{s}": "xx" if (a, s) == ("plain", 3) else "x" for a in
                       ("base", "same", "smaller", "plain") for s in (1, 2, 3)}  # fmt: skip
    result = json.loads((out / "report.json").read_text())
    assert (result["finished_runs"], result["planned_runs"]) == (24, 24)
    steps = result["budgets"]["steps"]
    assert steps["placebo"] == "null"
    smaller, plain = steps["arms"]["smaller"], steps["arms"]["plain"]
    assert smaller["val_bpb_difference"]["mean"] == pytest.approx(0.011)
    assert smaller["float_val_bpb_difference"]["mean"] == pytest.approx(0.011)
    assert (smaller["verdict"], plain["verdict"]) == ("worse", "worse")
    assert (smaller["starts_alike"], plain["starts_alike"]) == (True, False)
    text = (out / "report.md").read_text()
    assert "python submissions/baseline/train_gpt.py --preset mini --device cpu" in text
    assert "+0.0110 [+0.0098, +0.0122]" in text
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_goes_on_from_the_kept_file_alone(spec_file: Path, tmp_path: Path, fake_entry: None) -> None:
    first, rest = SPEC.index("[budgets.steps]"), SPEC.index("[arms.base]")
    spec_file.write_text(SPEC[:first] + PRICED + SPEC[rest:])
    kept = tmp_path / "kept.json"

    def run(out: str, *words: str) -> dict:
        where = [str(spec_file), "--data", str(tmp_path), "--out", str(tmp_path / out), "--keep", str(kept)]
        assert ablate.main([*where, *words]) == 0
        assert kept.read_bytes() == (tmp_path / out / "report.json").read_bytes()
        return json.loads(kept.read_text())

    assert run("here", "--seeds", "1")["finished_runs"] == 4
    assert run("there")["finished_runs"] == 24  # another machine: no folder of the first seed
    assert sorted(p.parent.name for p in (tmp_path / "there").glob("runs/steps/*/started")) == sorted(
        f"{arm}-seed{seed}" for arm in ("base", "same", "smaller", "plain") for seed in (2, 3)
    )
    whole = run("nowhere", "--report")
    assert not (tmp_path / "nowhere/runs").exists()
    run("whole", "--only", "same")  # nothing is left to do
    assert not (tmp_path / "whole/runs").exists()
    assert ablate.main([str(spec_file), "--data", str(tmp_path), "--out", str(tmp_path / "alone")]) == 0
    alone = json.loads((tmp_path / "alone/report.json").read_text())
    assert alone["rows"] == whole["rows"]
    assert alone["budgets"] == whole["budgets"]


def test_no_seed_is_shared_by_processors_that_round_otherwise(
    spec_file: Path, tmp_path: Path, fake_entry: None, capsys: pytest.CaptureFixture[str]
) -> None:
    first, rest = SPEC.index("[budgets.steps]"), SPEC.index("[arms.base]")
    spec_file.write_text(SPEC[:first] + PRICED + SPEC[rest:])
    kept = tmp_path / "kept.json"
    where = [str(spec_file), "--data", str(tmp_path), "--keep", str(kept)]

    def started(out: str) -> set[str]:
        return {p.parent.name for p in (tmp_path / out).glob("runs/*/*/started")}

    assert ablate.main([*where, "--out", str(tmp_path / "here"), "--seeds", "1"]) == 0
    result = json.loads(kept.read_text())
    whole = [row | {"machine": {"processor": "another"}} for row in result["rows"]]
    kept.write_text(json.dumps(result | {"rows": whole[:-1]}))
    before = kept.read_bytes()
    assert ablate.main([*where, "--out", str(tmp_path / "there")]) == 2
    assert "steps/plain-seed1: this seed was begun on another and would go on here" in capsys.readouterr().err
    assert kept.read_bytes() == before
    assert ablate.main([*where, "--out", str(tmp_path / "there"), "--seeds", "2", "3"]) == 0
    assert started("there") == {f"{arm}-seed{s}" for arm in ("base", "same", "smaller", "plain") for s in (2, 3)}
    rows = json.loads(kept.read_text())["rows"]
    assert [row for row in rows if row["seed"] == 1 and "same_as" not in row] == whole[:-1]
    # With the whole seed of `steps` from there, `time` is made here from its first arm on: no run of it is another's.
    kept.write_text(json.dumps(result | {"rows": [*rows, whole[-1]]}))
    assert ablate.main([*where, "--out", str(tmp_path / "new")]) == 0
    assert started("new") == {f"{arm}-seed1" for arm in ("base", "same", "smaller", "plain")}
    assert not (tmp_path / "new/runs/steps").exists()


PRICED = """
[budgets.steps]
clock = "cpu"
iterations = 30
max_wallclock_seconds = 0
[budgets.time]
priced_by = "steps"
clock = "cpu"
iterations = 30
max_wallclock_seconds = 0
"""


def test_equal_time_by_the_price_of_a_step(spec_file: Path, tmp_path: Path, fake_entry: None, capsys) -> None:
    first, rest = SPEC.index("[budgets.steps]"), SPEC.index("[arms.base]")
    spec_file.write_text(SPEC[:first] + PRICED + SPEC[rest:])
    out = tmp_path / "out"
    where = [str(spec_file), "--data", str(tmp_path), "--out", str(out)]
    assert ablate.main([*where, "--only", "smaller"]) == 0
    # The fake's steps all cost the same, so nothing of `time` differs from `steps` and no run of it is made again.
    assert not (out / "runs/time").exists()
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert {(r["budget"], r["arm"]) for r in rows} == {(b, a) for b in ("steps", "time") for a in ("base", "smaller")}
    for seed, seconds in ((1, 1.2), (2, 1.25), (3, 9.0)):  # the last while the machine did something else
        path = out / f"runs/steps/smaller-seed{seed}/summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"train_s": seconds}))
    assert ablate.main(where) == 0
    runs = {run.label: run for run in plan_runs(read_spec(spec_file), tmp_path, out)}
    iterations = {arm: runs[f"time/{arm}-seed1"].config["iterations"] for arm in ("base", "same", "smaller", "plain")}
    assert iterations == {"base": 30, "same": 30, "smaller": 24, "plain": 30}
    assert sorted(p.name for p in (out / "runs/time").glob("*-seed?")) == [f"smaller-seed{s}" for s in (1, 2, 3)]
    time = json.loads((out / "report.json").read_text())["budgets"]["time"]
    assert time["prices"] == {"base": 1.0, "same": 1.0, "smaller": 1.25, "plain": 1.0}
    text = (out / "report.md").read_text()
    assert "Price of a step over the reference's, of `steps`: base 1.000, same 1.000, smaller 1.250" in text


def test_an_option_that_came_later_leaves_kept_runs_what_they_were(
    spec_file: Path, tmp_path: Path, fake_entry: None, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, out = tmp_path / "kept.json", tmp_path / "out"
    where = [str(spec_file), "--data", str(tmp_path), "--keep", str(kept)]
    assert ablate.main([*where, "--out", str(out), "--seeds", "1", "--only", "smaller"]) == 0
    before, spec = json.loads(kept.read_text()), read_spec(spec_file)
    runs = {run.label: run for run in plan_runs(spec, tmp_path, out)}
    older = json.loads(kept.read_text())
    older["fields"]["jepa_mamba"].remove("trellis")
    for row in older["rows"]:
        run = runs[f"{row['budget']}/{row['arm']}-seed1"]
        row["config_sha256"] = run.config_sha256(older["fields"]["jepa_mamba"])
        assert row["config_sha256"] != run.config_sha256()
    kept.write_text(json.dumps(older))
    for path in out.glob("runs/*/*/summary.json"):  # folders of that time too
        summary = json.loads(path.read_text())
        del summary["config"]["trellis"]
        path.write_text(json.dumps(summary))
    for folder in ("out", "elsewhere"):
        kept.write_text(json.dumps(older))
        assert ablate.main([*where, "--out", str(tmp_path / folder), "--report"]) == 0
        assert json.loads(kept.read_text())["rows"] == before["rows"]
    kept.write_text(json.dumps(older))
    spec_file.write_text(SPEC.replace("model_dim = 64", "model_dim = 64\nfree_steps = true\ntrellis = true"))
    assert ablate.main([*where, "--out", str(tmp_path / "elsewhere"), "--report"]) == 2
    assert "of other options" in capsys.readouterr().err


def test_a_kept_report_names_no_path_of_this_machine(spec_file: Path, tmp_path: Path, fake_entry: None) -> None:
    kept, inside = tmp_path / "kept.json", ablate.ROOT / "data" / "x"
    words = [str(spec_file), "--data", str(inside), "--out", str(tmp_path / "out"), "--keep", str(kept), "--report"]
    assert ablate.main(words) == 0
    command = json.loads(kept.read_text())["command"]
    assert command == "python scripts/ablate.py try.toml --data data/x --out out --keep kept.json --report"


def test_a_placebo_that_differs_is_shouted(spec_file: Path, tmp_path: Path, fake_entry: None, capsys) -> None:
    where = [str(spec_file), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert ablate.main([*where, "--only", "same"]) == 0
    for path in (tmp_path / "out").glob("runs/time/same-seed*/summary.json"):
        summary = json.loads(path.read_text())
        path.write_text(json.dumps(summary | {"val_bpb": summary["val_bpb"] + 0.004}))
    assert ablate.main([*where, "--report"]) == 1
    assert "placebo is not null under time" in capsys.readouterr().err
    assert "**The placebo is not null under time" in (tmp_path / "out/report.md").read_text()


def test_runs_of_other_options_or_text_are_an_error(
    spec_file: Path, tmp_path: Path, fake_entry: None, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [str(spec_file), "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--only", "base", "--seeds", "1"]
    assert ablate.main(where) == 0
    spec_file.write_text(SPEC.replace("model_dim = 64", "model_dim = 128"))
    assert ablate.main(where) == 2
    spec_file.write_text(SPEC)
    spec = read_spec(spec_file)
    runs = plan_runs(spec, tmp_path, tmp_path / "out")
    path = next(run.summary for run in runs if run.label == "time/base-seed1")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"val_sha256": "other"}))
    with pytest.raises(DataError, match="do not share one val_sha256"):
        ablate.collect(runs)
    kept = tmp_path / "kept.json"
    kept.write_text((tmp_path / "out/report.json").read_text())
    again = [str(spec_file), "--data", str(tmp_path), "--out", str(tmp_path / "new"), "--keep", str(kept)]
    spec_file.write_text(SPEC.replace("model_dim = 64", "model_dim = 128"))
    for text, says in ((kept.read_text(), "steps/base-seed1 of other options"), ("{}", "KeyError('rows')")):
        kept.write_text(text)
        assert ablate.main([*again, "--report"]) == 2
        assert says in capsys.readouterr().err
        assert kept.read_text() == text


def test_a_seed_that_one_arm_lacks_is_left_out_of_the_pairs(spec_file: Path) -> None:
    spec = read_spec(spec_file)
    row = {"budget": "steps", "entry": "jepa_mamba", "code_sha256": "c", "first_ce": 1.0, "float_val_bpb": 1.0,
           "steps": 1, "tokens": 1, "train_s": 1.0, "artifact_bytes": 1, "params": 1}  # fmt: skip
    rows = [row | {"arm": "base", "seed": s, "val_bpb": 1.0 + s} for s in (1, 2)]
    rows += [row | {"arm": "smaller", "seed": s, "val_bpb": 1.5 + s} for s in (2, 3)]
    arm = analyse(spec, rows, 9)["budgets"]["steps"]["arms"]["smaller"]
    assert (arm["val_bpb_difference"]["n"], arm["val_bpb_difference"]["mean"]) == (1, 0.5)


@pytest.mark.slow
def test_a_real_ablation_with_its_placebo(spec_file: Path, tmp_path: Path) -> None:
    from tests.submissions.jepa_mamba.conftest import TINY  # the smallest model there is

    data = tmp_path / "data"
    data.mkdir()
    import numpy as np

    from common.text.shards import write_shard

    for split, size in (("train", 6000), ("val", 700)):
        text = np.random.default_rng(size).choice(np.frombuffer(b"\xff the cat", np.uint8), size)
        write_shard(data / f"tiny_{split}_000000.bin", text.astype(np.uint16))
    options = "\n".join(f"{k} = {json.dumps(v)}" for k, v in TINY.items() if k not in ("iterations",))
    spec_file.write_text(
        f'name = "real"\nreference = "on"\nplacebo = "again"\nseeds = [1, 2]\n[options.jepa_mamba]\n{options}\n'
        "[budgets.steps]\niterations = 6\n[arms.on]\n[arms.again]\n[arms.off]\njepa_weight = 0.0\nsigreg_lambda = 0.0\n"
    )
    assert ablate.main([str(spec_file), "--data", str(data), "--out", str(tmp_path / "out")]) == 0
    arms = json.loads((tmp_path / "out/report.json").read_text())["budgets"]["steps"]["arms"]
    assert arms["again"]["val_bpb_difference"]["mean"] == 0.0
    assert arms["off"]["starts_alike"] is True
    assert arms["off"]["val_bpb_difference"]["mean"] != 0.0
