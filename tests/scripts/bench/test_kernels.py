"""scripts/bench kernels: tables, bars, what a crashing or hanging worker leaves, the command in miniature."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to measure")

from scripts.bench.catalogue import OPERATIONS, OpCase, Work, cases_of
from scripts.bench.kernels import (
    STEP_VARIANTS,
    bars_of,
    check_case,
    drive,
    errors_of,
    form_cell,
    markdown,
    merge,
    parts_of,
    roofline_ms,
)

ROOT = Path(__file__).resolve().parents[3]
LIMITS = {"copy_bytes_per_s": 4e12, "bfloat16_flops_per_s": 8e14}


def test_roofline_is_the_slower_of_both_a_pass():
    assert roofline_ms([Work(4 * 10**9)], LIMITS) == pytest.approx(1.0)
    assert roofline_ms([Work(4 * 10**9, 16 * 10**11), Work(8 * 10**9)], LIMITS) == pytest.approx(2.0 + 2.0)


def test_wrong_kernel_is_found():
    def inputs(device):
        return {"x": torch.linspace(-1, 1, 50, device=device).requires_grad_()}

    def case(form):
        return OpCase("c", inputs, form, lambda x: x.sin(), ("x",), Work(0), Work(0))

    device = torch.device("cpu")
    assert check_case(case(lambda x: x.sin()), device, inputs(device))["right"]
    assert not check_case(case(lambda x: x.sin() + 1e-3), device, inputs(device))["right"]
    assert not check_case(case(lambda x: x.sin() + 0 * x.detach() + (x - x.detach())), device, inputs(device))["right"]
    assert not check_case(case(lambda x: x / 0), device, inputs(device))["right"]
    with pytest.raises(ValueError, match="1 results"):
        errors_of([torch.ones(1)], [torch.ones(1), torch.ones(1)])


def test_every_case_has_a_miniature_and_names_its_operation():
    for name in OPERATIONS:
        cases = cases_of([name])
        assert cases, f"scripts/bench/cases/{name}.py is empty"
        assert any(case.miniature for case in cases)
        assert all("/" in case.name for case in cases)
        for chosen in (choice for case in cases for choice in case.choices.values()):
            with chosen():  # what it changes is there
                pass
        assert all(case.forward.bytes > 0 and bool(case.backward) == bool(case.gradients) for case in cases)


def test_parts_in_their_order():
    parts = parts_of(["seed_bpe"], [])
    chosen = [part for part in parts if part.startswith("choices:")]
    assert "choices:ssd" in chosen
    assert len(parts) == 2 * len(OPERATIONS) + len(STEP_VARIANTS) + len(chosen)
    assert parts[0] == "operation:ssd"
    assert parts[-1] == chosen[-1]
    assert parts_of(["a", "b"], ["step:b:tor"]) == ["step:b:torch"]


def test_bars_take_the_best_of_our_variants():
    steps = [
        {"preset": "seed_bpe", "kernels": "triton", "jepa": True, "step_ms": 40.0, "of_matmul_ceiling": 0.5},
        {"preset": "seed_bpe", "kernels": "triton", "jepa": True, "step_ms": 34.0, "of_matmul_ceiling": 0.4},
        {"preset": "seed_bpe", "kernels": "torch", "jepa": True, "step_ms": 1.0},
        {"preset": "seed_bpe", "variant": "x", "failure": {"error": "y"}},
    ]
    found = [(bar["value"], bar["holds"]) for bar in bars_of(steps)]
    assert found == [(34.0, True), (None, None), (0.5, True), (None, None)]


def test_report_tells_missing_from_failed():
    report = {
        "machine": {"device": "d", "torch": "t"}, "date": "2026-01-02", "command": "c", "ceilings": LIMITS,
        "operations": [], "choices": [], "steps": [], "bars": bars_of([]),
        "failures": [{"part": "p", "reason": "a\nb"}],
    }  # fmt: skip
    record = {
        "case": "op/a", "check": {"right": False}, "roofline_forward_ms": 1.0, "roofline_both_ms": 3.0,
        "forms": {
            "ours": {"forward_ms": 2.0, "both_ms": 4.0}, "plain": {"error": "E"},
            "mamba-ssm": {"missing": "mamba_ssm is not installed"},
        },
    }  # fmt: skip
    merge(report, {"part": "operation:op", "record": record})
    merge(report, {"part": "compiled:op", "record": {"case": "op/a", "forms": {"torch.compile": {"forward_ms": 9.0}}}})
    merge(report, {"part": "step:s:v", "record": {"preset": "s", "variant": "v", "failure": {"missing": "m"}}})
    choices = {"wide": {"forward_ms": 1.0, "both_ms": 6.0}, "narrow": {"error": "E"}}
    merge(report, {"part": "choices:op", "record": {"case": "op/a", "choices": choices}})
    text = markdown(report)
    assert "| op/a | wide | 1.000 / 6.000 | 0.50 / 1.50 |" in text
    assert "| op/a | narrow | failed | – |" in text
    row = next(line for line in text.splitlines() if line.startswith("| op/a"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["op/a", "NO", "2.000 / 4.000", "1.000 / 3.000", "0.50 / 0.75", "failed", "missing", "9.000"]
    assert "| s | v | missing" in text
    assert "- p: b" in text
    assert form_cell(None) == "–"


WORKER = """
import json, sys, time
for part in sys.argv[sys.argv.index("--worker") + 1 :]:
    print(json.dumps({"begins": part}), flush=True)
    print("noise", flush=True)
    if part == "crash":
        sys.exit("planted")
    if part == "hang":
        time.sleep(60)
    print(json.dumps({"part": part, "record": {}}), flush=True)
    print(json.dumps({"ends": part}), flush=True)
"""


def test_a_crash_or_a_hang_costs_one_part_only():
    kept: list[str] = []
    command = [sys.executable, "-c", WORKER]
    failures = drive(["a", "crash", "b", "hang", "c"], command, 120.0, 10.0, lambda said: kept.append(said["part"]))
    assert kept == ["a", "b", "c"]
    assert [failure["part"] for failure in failures] == ["crash", "hang"]
    assert "status 1" in failures[0]["reason"]
    assert "planted" in failures[0]["reason"]
    assert failures[1]["reason"] == "took too long"


def test_out_of_time_is_said_for_every_part_left():
    failures = drive(["hang", "b"], [sys.executable, "-c", WORKER], 2.0, 60.0, lambda said: None)
    assert [failure["part"] for failure in failures] == ["hang", "b"]
    assert all("out of time" in failure["reason"] for failure in failures)


def bench(*arguments: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`python scripts/bench ...`, on demand on an image where packages are missing."""
    code = f"""
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv[:] = sys.argv[1:]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", code, str(ROOT / "scripts" / "bench" / "__main__.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False, env=environment)


def test_steps_are_timed_on_a_bare_image():
    tiny = [
        "model_dim=16", "num_layers=1", "headdim=16", "d_state=8", "embed_dim=16", "attn_layers=", "vocab_size=32",
        "train_seq_len=16", "train_batch_tokens=64", "micro_batch_tokens=64", "sigreg_timesteps=4",
    ]  # fmt: skip
    bare = ("brotli", "zstandard", "sentencepiece", "safetensors", "rich", "matplotlib", "pyarrow")
    options = ["--preset", "demo", "--device", "cpu", "--steps", "2", "--operations", "--set", *tiny]
    done = bench("step", *options, blocked=bare)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout[done.stdout.index("{") :])
    phases = report["breakdown_ms"]
    assert sum(value for name, value in phases.items() if name != "step") == pytest.approx(phases["step"])
    assert all(phases[name] > 0 for name in ("forward", "backward", "muon", "adam", "publish"))
    assert sum(row["ms"] for row in report["operations"]) > 0


def test_steps_of_an_old_checkout_need_its_entry_only():
    """`serve` runs this file among the modules of another checkout, which need not have those that came later."""
    tree = ast.parse((ROOT / "scripts" / "bench" / "step.py").read_text(encoding="utf-8"))
    imported = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    ours = [name for name in imported if name.split(".")[0] in ("common", "scripts", "submissions")]
    assert ours == ["submissions.jepa_mamba"]


def miniature(folder: Path, *parts: str) -> tuple[int, dict, str]:
    options = ["--miniature", "--output", str(folder), "--budget-s", "1300", "--part-limit-s", "600"]
    done = bench("kernels", *options, *(["--parts", *parts] if parts else []))
    [path] = folder.glob("*.json")
    assert path.with_suffix(".md").read_text(encoding="utf-8") in done.stdout
    return done.returncode, json.loads(path.read_text(encoding="utf-8")), done.stdout + done.stderr


def test_the_command_in_miniature(tmp_path):
    parts = ("operation:gated_norm", "step:seed_bpe:torch", "step:seed_bpe:mamba_ssm")
    status, report, output = miniature(tmp_path, *parts)
    assert status == 0, output
    assert report["failures"] == []
    assert report["operations"]
    assert all(record["check"]["right"] for record in report["operations"]), report["operations"]
    assert all(record["forms"]["ours"]["forward_ms"] > 0 for record in report["operations"])
    assert all(record["roofline_both_ms"] > 0 for record in report["operations"])
    by_variant = {step["variant"]: step for step in report["steps"]}
    assert by_variant["torch"]["step_ms"] > 0
    assert by_variant["torch"]["matmul_flops"] > 0
    assert "missing" in by_variant["mamba_ssm"]["failure"]
    assert report["ceilings"]["copy_bytes_per_s"] > 0


@pytest.mark.slow
def test_all_of_the_command_in_miniature(tmp_path):
    status, report, output = miniature(tmp_path)
    assert status == 0, output
    assert {case.name.split("/")[0] for case in cases_of() if case.miniature} == {
        record["case"].split("/")[0] for record in report["operations"]
    }
    assert {step["variant"] for step in report["steps"]} == set(STEP_VARIANTS)


def test_flops_of_a_step_are_those_of_its_matrices():
    from scripts.bench.step import matmul_flops
    from submissions.jepa_mamba.train_gpt import read_preset

    options = {**read_preset("seed_bpe"), "jepa_weight": 0.0, "sigreg_lambda": 0.0}
    one, two = (matmul_flops(options | {"train_seq_len": 256}, tokens) for tokens in (512, 1024))
    per_token = (two - one) / 512
    # 6 FLOPs a weight and token: in_proj, out_proj, half of the blocks' feed-forward, embedding projections, head; the
    # scan comes on top.
    weights = 10 * (1418 * 640 + 640 * 640) + 5 * 2 * 4 * 640 * 640 + 2 * 336 * 640 + 336 * 8192
    assert 6 * weights < per_token < 1.2 * 6 * weights
