"""scripts/report.py: a page for a run of either kind, and for several over one another."""

import dataclasses
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import tyro

from common.artifact.container import save_artifact
from common.errors import DataError
from common.quant.grid import GridSpec, quantize
from scripts.report import RunRecord, command_of, main, make_page, write_run_report
from worldmodel.cli import _command_type
from worldmodel.config import to_dict
from worldmodel.configs import cpu


def lm_run(folder: Path, bpb: float) -> Path:
    folder.mkdir(parents=True)
    steps = [{"event": "step", "step": s, "train_bpb": 5.0 - s, "tokens_per_s": 7.0} for s in (1, 2, 3)]
    (folder / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "summary.json").write_text(json.dumps({"val_bpb": bpb, "steps": 3, "preset": "demo", "config": {}}))
    options = {"seed": 7, "data_path": "a b", "compile_model": False, "tokenizer_path": ""}
    (folder / "config.json").write_text(json.dumps({"preset": "demo", "config": options}))
    (folder / "demo.json").write_text(json.dumps({"xz_bpb": 1.5, "sample": "def <f>():"}))
    (folder / "train.log").write_text("# python 3.11\nprint('source')\n# packages numpy==2\n")
    values = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    tensors = {"layer.weight": quantize(values, GridSpec("int", 8, "row", "f32", None), "w")}
    save_artifact(folder / "model.artifact", tensors, {})
    return folder


def world_run(folder: Path) -> Path:
    (folder / "dynamics").mkdir(parents=True)
    log = "".join(json.dumps({"step": s, "loss": 2.0 / s, "frames_per_s": 5.0}) + "\n" for s in (1, 2))
    (folder / "dynamics" / "log.jsonl").write_text(log)
    (folder / "config.json").write_text(json.dumps({"profile": "cpu"}))
    return folder


def test_a_language_model_run_on_one_page(tmp_path):
    page = write_run_report([lm_run(tmp_path / "runs" / "one", 1.25)]).read_text(encoding="utf-8")
    assert "<td>val_bpb</td><td>1.25</td>" in page
    assert "<td>xz_bpb</td><td>1.5</td>" in page
    assert "def &lt;f&gt;():" in page
    assert "layer.weight" in page
    assert page.index(">train_bpb<") < page.index(">tokens_per_s<")  # what matters first
    assert "--data_path &#x27;a b&#x27; --compile_model 0" in page
    assert "# packages numpy==2" in page
    assert "print(" not in page.partition("Versions")[2].partition("</pre>")[0]


def test_runs_lie_over_one_another(tmp_path):
    runs = [lm_run(tmp_path / "a" / "run", 1.5), lm_run(tmp_path / "b" / "run", 1.25), world_run(tmp_path / "world")]
    page = make_page(runs)
    assert "<td>val_bpb</td><td>1.5</td><td>1.25</td><td>–</td>" in page
    chart = page.partition('aria-label="train_bpb"')[2].partition("</svg>")[0]
    assert chart.count("<polyline") == 2
    assert str(tmp_path / "a" / "run") in page  # folders of one name are told apart
    assert "dynamics: loss" in page
    with pytest.raises(DataError, match="name the page with --out"):
        write_run_report(runs)
    assert main([*map(str, runs), "--out", str(tmp_path / "new" / "all.html")]) == 0
    assert (tmp_path / "new" / "all.html").read_text(encoding="utf-8") == page


def test_a_run_that_is_not_finished_has_a_page_too(tmp_path):
    run = world_run(tmp_path / "w")
    assert "no summary yet" in make_page([run])


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no log.jsonl" in capsys.readouterr().err
    run = lm_run(tmp_path / "x", 1.0)
    (run / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"summary\.json: not JSON"):
        make_page([run])


def kept(config: dict) -> RunRecord:
    record = RunRecord.__new__(RunRecord)
    record.config = config
    return record


def test_the_command_of_a_whole_case_study():
    assert command_of(kept({"profile": "gpu"})) == "python -m worldmodel coinrun --profile gpu"


def test_the_command_of_a_stage_gives_its_configuration_back():
    optim = dataclasses.replace(cpu.PROFILE.dynamics.optim, decay_steps=7, learning_rate=0.5)
    changed = dataclasses.replace(
        cpu.PROFILE.dynamics_latent, steps=12, tensorboard=False, optim=optim, run_dir="runs/a b", token_dir="data/t",
        dynamics=dataclasses.replace(cpu.PROFILE.dynamics_latent.dynamics, tie_codebook=False),
    )  # fmt: skip
    words = shlex.split(command_of(kept(to_dict(changed))))
    assert words[:5] == ["python", "-m", "worldmodel", "train", "cpu-dynamics-latent"]
    assert len(words) < 20  # only what differs from the preset
    command = tyro.cli(_command_type(), args=words[3:])
    assert command.config == changed
