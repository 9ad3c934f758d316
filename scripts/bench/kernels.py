"""Every kernel and whole training steps on one GPU, beside their peers, in one command of under eight minutes.

    python scripts/bench kernels [--output FOLDER] [--budget-s 450] [--parts ...]

Correctness first: outputs and all gradients at real shapes against float64. Then medians of device time: ours (and
other launches of ours, where a machine without a GPU had to choose), the plain form, the plain form through
torch.compile, and what packages are installed. Bytes and FLOPs that an operation
must spend at least stand against this GPU's own copy and matrix-product ceilings, measured in the same run. Then
training steps of 65,536 tokens: time, share of the ceiling, peak memory, phases that add up to the step.

Work is done by a second process. If a kernel takes that process down, the fault is written down, and a new one goes on
behind it. Everything is written after each part, so that a run that is killed keeps what it has. Where a package is
missing, the row says so. `--miniature` runs all of it on a CPU in tiny shapes with interpreted kernels: a test of this
program, not a measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import gc
import importlib
import importlib.metadata
import json
import math
import os
import platform
import queue
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from common.files import write_atomically
from scripts.bench.catalogue import OPERATIONS, Form, OpCase, cases_of, roofline_ms, run_with_gradients
from scripts.bench.step import StepBench, matmul_flops, operations_ms
from submissions.jepa_mamba.train_gpt import read_preset

ROOT = Path(__file__).resolve().parents[2]
STEP_TOKENS = 65_536
NO_JEPA = {"jepa_weight": 0.0, "sigreg_lambda": 0.0}
# name: options over the preset's. Quantization-aware training is on from the first step in all of them.
STEP_VARIANTS: dict[str, dict[str, Any]] = {
    "triton": {"kernels": "triton"},
    "triton, graph": {"kernels": "triton", "cuda_graphs": True},
    "triton, graph, JEPA off": {"kernels": "triton", "cuda_graphs": True, **NO_JEPA},
    "torch": {"kernels": "torch"},
    "mamba_ssm": {"kernels": "mamba_ssm"},
    # Last: compilation may take longer than everything before it.
    "triton, compiled, graph": {"kernels": "triton", "cuda_graphs": True, "compile_model": True},
    "triton, compiled, graph, JEPA off": {"kernels": "triton", "cuda_graphs": True, "compile_model": True, **NO_JEPA},
}
# Bars of one H100 or H200: preset, JEPA on, figure, limit, and whether less is better.
BARS = (
    ("seed_bpe", True, "step_ms", 35.0, "at most"),
    ("seed_bpe", False, "step_ms", 28.0, "at most"),
    ("seed_bpe", True, "of_matmul_ceiling", 0.45, "at least"),
    ("seed_bpe", True, "peak_bytes", 12e9, "at most"),
)
MINIATURE_STEP = {
    "vocab_size": 64, "model_dim": 32, "num_layers": 2, "d_state": 16, "headdim": 16, "chunk_size": 16, "embed_dim": 16,
    "attn_layers": "", "mlp_mult": 2, "sigreg_timesteps": 4, "sigreg_knots": 3, "train_seq_len": 16,
    "micro_batch_tokens": 64, "predictor_hidden_mult": 1,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


def median_ms(call: Callable[[], Any], device: torch.device, budget_ms: float = 150.0) -> float:
    """Median time of a call: device time with a cold cache on a GPU, by replaying a CUDA graph if it can be captured.

    A graph leaves out the time that Python needs to launch, which a training step captured as a whole does not pay.
    """
    call()
    if device.type != "cuda":
        started_s = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started_s)
    replay = graph_of(call) or call
    flush = torch.empty(2**28, dtype=torch.int8, device=device)
    torch.cuda.synchronize()
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    replay()
    ended.record()
    torch.cuda.synchronize()
    repeats = max(5, min(100, int(budget_ms / max(started.elapsed_time(ended), 1e-3))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for started, ended in events:
        flush.zero_()
        started.record()
        replay()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(started.elapsed_time(ended) for started, ended in events)


def graph_of(call: Callable[[], Any]) -> Callable[[], None] | None:
    """A CUDA graph of the call, or None where it waits for the device or uses what cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:  # what it says depends on the operation; the caller times the call itself instead
        torch.cuda.synchronize()
        return None
    return graph.replay


def ceilings(device: torch.device) -> dict[str, float]:
    """What this device does at most: bytes/s of a copy (read + written), FLOP/s of bfloat16 and float32 products."""
    big, edge = (2**30, 8192) if device.type == "cuda" else (2**22, 128)
    copy_ms = median_ms(torch.zeros(big, dtype=torch.int8, device=device).clone, device)
    found = {"copy_bytes_per_s": 2 * big / 1e-3 / copy_ms}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
        product_ms = median_ms(functools.partial(torch.mm, a, b), device)
        found[f"{str(dtype).removeprefix('torch.')}_flops_per_s"] = 2 * edge**3 / 1e-3 / product_ms
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Operations
# ---------------------------------------------------------------------------------------------------------------------


def in_double(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with floating tensors in float64; lists and plans, whose operation is exact, stay."""
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def errors_of(found: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """Largest error of each tensor over the truth's largest value."""
    if len(found) != len(truth):
        raise ValueError(f"{len(found)} results, the float64 form has {len(truth)}")
    errors = []
    for f, t in zip(found, truth, strict=True):
        size = float(t.abs().max()) or 1.0
        error = float((f.double() - t).abs().max()) / size
        errors.append(error if math.isfinite(error) else math.inf)
    return errors


def check_case(case: OpCase, device: torch.device, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Errors of ours and of the plain form of the same dtype; right is at most twice the plain error, plus 1e-5."""
    truth = [t.double() for t in run_with_gradients(case.torch_form, in_double(inputs), case.gradients)]
    plain = errors_of(run_with_gradients(case.torch_form, inputs, case.gradients), truth)
    ours = errors_of(run_with_gradients(case.triton_form, inputs, case.gradients), truth)
    right = all(o <= 2 * p + 1e-5 for o, p in zip(ours, plain, strict=True))
    return {"right": right, "error": ours, "plain_error": plain}


def times_of(form: Form, case: OpCase, device: torch.device, inputs: Mapping[str, Any]) -> dict[str, float]:
    """Median milliseconds of the forward pass, and of forward and backward together where there are gradients."""
    with torch.set_grad_enabled(bool(case.gradients)):
        found = {"forward_ms": median_ms(lambda: form(**inputs), device)}
    if case.gradients:
        found["both_ms"] = median_ms(lambda: run_with_gradients(form, inputs, case.gradients), device)
    return found


def bench_choices(name: str, device: torch.device) -> Iterator[dict]:
    """A record for each case of an operation that has other launches of ours, and how long each of them takes."""
    for case in cases_of([name]):
        maker = case.inputs if device.type == "cuda" else case.miniature
        if maker is None or not case.choices:
            continue
        inputs = maker(device)
        record: dict[str, Any] = {"case": case.name, "choices": {}}
        for choice, chosen in case.choices.items():
            with attempt(record["choices"], choice), chosen():
                record["choices"][choice] = times_of(case.triton_form, case, device, inputs)
        yield record
        del inputs
        tidy(device)


def bench_operation(name: str, device: torch.device, limits: Mapping[str, float], compiled: bool) -> Iterator[dict]:
    """A record for each case of an operation: what is right, and how long each form takes."""
    for case in cases_of([name]):
        maker = case.inputs if device.type == "cuda" else case.miniature
        if maker is None:
            continue
        inputs = maker(device)
        record: dict[str, Any] = {"case": case.name, "forms": {}}
        forms: dict[str, Form] = {}
        if compiled:
            if not any(peer.startswith("torch.compile") for peer in case.peers):
                forms["torch.compile"] = torch.compile(case.torch_form, dynamic=False)
            forms |= {peer: form for peer, form in case.peers.items() if peer.startswith("torch.compile")}
        else:
            with attempt(record, "check"):
                record["check"] = check_case(case, device, inputs)
            forms = {"ours": case.triton_form, "plain": case.torch_form}
            forms |= {peer: form for peer, form in case.peers.items() if not peer.startswith("torch.compile")}
            work = [case.forward] + ([case.backward] if case.backward else [])
            record["work"] = {"bytes": [w.bytes for w in work], "flops": [w.flops for w in work]}
            record["roofline_forward_ms"] = roofline_ms(work[:1], limits)
            record["roofline_both_ms"] = roofline_ms(work, limits)
        for form_name, form in forms.items():
            with attempt(record["forms"], form_name):
                record["forms"][form_name] = times_of(form, case, device, inputs)
        yield record
        del inputs
        tidy(device)


@contextlib.contextmanager
def attempt(record: dict[str, Any], name: str) -> Iterator[None]:
    """Put what goes wrong inside under `name` instead of a figure; a device that is broken for good is raised on."""
    try:
        yield
    except ModuleNotFoundError as error:
        record[name] = {"missing": f"{error.name or error} is not installed"}
    except Exception as error:
        record[name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        if "CUDA error" in str(error) or "device-side" in str(error):
            raise


def tidy(device: torch.device) -> None:
    """Nothing of what ran before is left to what comes: no memory, no peak of it, no TF32 as the entry's steps set."""
    gc.collect()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


def bench_step(preset: str, variant: str, device: torch.device, limits: Mapping[str, float]) -> dict[str, Any]:
    """One training step of a preset in one variant."""
    if variant == "mamba_ssm":
        for package in ("mamba_ssm", "causal_conv1d"):
            importlib.import_module(package)
    options = {**read_preset(preset), "micro_batch_tokens": STEP_TOKENS, "qat_fraction": 1.0, **STEP_VARIANTS[variant]}
    tokens, steps = STEP_TOKENS, 10
    if device.type != "cuda":
        options |= {**MINIATURE_STEP, "cuda_graphs": False, "compile_model": False}
        tokens, steps = 64, 1
    flops = matmul_flops({**options, "kernels": "torch"}, tokens)
    bench = StepBench(options, device, tokens)
    losses = [float(bench.step()["loss"]) for _ in range(3 if steps > 1 else 1)]  # compiles, then captures
    step_ms = statistics.median(bench.times_ms(steps))
    record: dict[str, Any] = {
        "preset": preset,
        "variant": variant,
        "kernels": bench.kernels.name,
        "jepa": bool(bench.config.jepa_on),
        "tokens": tokens,
        "losses": losses,
        "step_ms": step_ms,
        "tokens_per_s": tokens / step_ms * 1e3,
        "matmul_flops": flops,
        "of_matmul_ceiling": flops / (step_ms / 1e3) / limits["bfloat16_flops_per_s"],
    }
    if device.type == "cuda":  # from the model's making on: replays allocate nothing that the allocator would count
        record["peak_bytes"] = torch.cuda.max_memory_allocated()
    if not bench.config.cuda_graphs and not bench.config.compile_model:
        record["phases_ms"] = bench.breakdown_ms(steps)
    record["operations_ms"] = operations_ms(bench, 3 if steps > 1 else 1)
    return record


# ---------------------------------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------------------------------


def parts_of(presets: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Names of all parts in their order: what is most wanted first."""
    names = [f"operation:{name}" for name in OPERATIONS]
    names += [f"step:{preset}:{variant}" for preset in presets for variant in STEP_VARIANTS]
    names += [f"compiled:{name}" for name in OPERATIONS]
    names += [f"choices:{name}" for name in OPERATIONS if any(case.choices for case in cases_of([name]))]
    return [name for name in names if not wanted or any(name.startswith(prefix) for prefix in wanted)]


def work_through(parts: Sequence[str], device: torch.device) -> None:
    """Worker: run parts one after another; one JSON line before each part, for each record and after each part."""

    def say(**values: Any) -> None:
        print(json.dumps(values), flush=True)

    limits: dict[str, float] = {}
    for part in parts:
        say(begins=part)
        kind, _, rest = part.partition(":")
        if kind == "ceilings" or not limits:
            limits = ceilings(device)
            tidy(device)
            say(part="ceilings", record=limits)
        if kind == "step":
            preset, _, variant = rest.partition(":")
            box: dict[str, Any] = {}
            try:
                with attempt(box, "failure"):
                    say(part=part, record=bench_step(preset, variant, device, limits))
            finally:
                if box:
                    say(part=part, record={"preset": preset, "variant": variant, **box})
            tidy(device)
        elif kind == "choices":
            for record in bench_choices(rest, device):
                say(part=part, record=record)
        elif kind in ("operation", "compiled"):
            for record in bench_operation(rest, device, limits, compiled=kind == "compiled"):
                say(part=part, record=record)
        say(ends=part)


def forward_lines(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    """Put every line, then None."""
    for line in stream:
        lines.put(line)
    lines.put(None)


def drive(
    parts: Sequence[str], command: Sequence[str], budget_s: float, part_limit_s: float, keep: Callable[[dict], None]
) -> list[dict[str, str]]:
    """Have workers run all parts; `keep` gets every record. Returns what failed or was left out, with the reason."""
    failures: list[dict[str, str]] = []
    pending = list(parts)
    deadline_s = time.monotonic() + budget_s
    while pending and time.monotonic() < deadline_s:
        worker = subprocess.Popen(
            [*command, "--worker", *pending], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        lines: queue.Queue[str | None] = queue.Queue()
        tail: deque[str] = deque(maxlen=50)
        assert worker.stdout is not None
        assert worker.stderr is not None
        readers = [
            threading.Thread(target=forward_lines, args=(worker.stdout, lines), daemon=True),
            threading.Thread(target=tail.extend, args=(worker.stderr,), daemon=True),
        ]
        for reader in readers:
            reader.start()
        running, reason = pending[0], ""
        part_ends_s = time.monotonic() + part_limit_s
        while True:
            try:
                line = lines.get(timeout=max(0.01, min(part_ends_s, deadline_s) - time.monotonic()))
            except queue.Empty:
                reason = "out of time for the whole run" if time.monotonic() >= deadline_s else "took too long"
                worker.kill()
                break
            if line is None:
                break
            if not line.startswith("{"):
                continue
            said = json.loads(line)
            if "begins" in said:
                running, part_ends_s = said["begins"], time.monotonic() + part_limit_s
            elif "ends" in said:
                pending.remove(said["ends"])
            else:
                keep(said)
        status = worker.wait()
        for reader in readers:
            reader.join(timeout=5)
        if running in pending:  # it did not end
            reason = reason or f"the process ended with status {status}: {''.join(tail)[-800:]}"
            failures.append({"part": running, "reason": reason})
            pending.remove(running)
    failures += [{"part": part, "reason": "not begun: out of time for the whole run"} for part in pending]
    return failures


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for name in ("triton", "mamba_ssm", "causal_conv1d"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def merge(report: dict[str, Any], said: Mapping[str, Any]) -> None:
    """Put one record where it belongs."""
    part, record = said["part"], said["record"]
    kind = part.partition(":")[0]
    if kind == "ceilings":
        report["ceilings"] = record
    elif kind == "step":
        report["steps"].append(record)
    elif kind == "operation":
        report["operations"].append(record)
    elif kind == "choices":
        report["choices"].append(record)
    else:
        known = next((r for r in report["operations"] if r["case"] == record["case"]), None)
        if known is None:
            report["operations"].append(record)
        else:
            known["forms"] |= record["forms"]


def bars_of(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The bars on the step, each with the best figure of our variants."""
    found = []
    for preset, jepa, figure, limit, sense in BARS:
        values = [
            s[figure]
            for s in steps
            if s.get("preset") == preset and s.get("kernels") == "triton" and s.get("jepa") is jepa and figure in s
        ]
        best = (min if sense == "at most" else max)(values) if values else None
        holds = None if best is None else (best <= limit if sense == "at most" else best >= limit)
        bar = f"{preset}, JEPA {'on' if jepa else 'off'}: {figure} {sense} {limit:g}"
        found.append({"bar": bar, "value": best, "holds": holds})
    return found


def cell(value: Any, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def form_cell(times: Mapping[str, Any] | None) -> str:
    """Milliseconds forward / forward and backward, or why there are none."""
    if not times:
        return "–"
    if "forward_ms" not in times:
        return "missing" if "missing" in times else "failed"
    return " / ".join(cell(times[key]) for key in ("forward_ms", "both_ms") if key in times)


def choices_table(report: Mapping[str, Any]) -> list[str]:
    """Other launches of ours beside the one that is used."""
    if not report["choices"]:
        return []
    lines = ["", "Other launches of ours: one that is faster than the one above should replace it.", ""]
    lines += ["| case | launch | ms | of the one above |", "| --- | --- | --- | --- |"]
    above = {record["case"]: record["forms"].get("ours", {}) for record in report["operations"]}
    for record in report["choices"]:
        usual = above.get(record["case"], {})
        for choice, times in record["choices"].items():
            both = [key for key in ("forward_ms", "both_ms") if usual.get(key) and key in times]
            ratio = " / ".join(cell(times[key] / usual[key], 2) for key in both) or "–"
            lines.append(f"| {record['case']} | {choice} | {form_cell(times)} | {ratio} |")
    return lines


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables."""
    limits = report["ceilings"]
    lines = [f"# {report['machine']['device']}, {report['date']}", "", f"`{report['command']}`", ""]
    lines += [", ".join(f"{name} {value}" for name, value in report["machine"].items() if name != "device"), ""]
    if limits:
        lines += [
            f"Ceilings measured in this run: copy {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s (read + written), "
            f"bfloat16 product {limits['bfloat16_flops_per_s'] / 1e12:.0f} TFLOP/s.",
            "",
        ]
    lines += ["Milliseconds forward / forward and backward; the share is roofline time over ours.", ""]
    peers = sorted({name for r in report["operations"] for name in r["forms"]} - {"ours", "plain"})
    head = ["case", "right", "ours", "roofline", "share", "plain", *peers]
    lines += ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for record in report["operations"]:
        check, forms = record.get("check", {}), record["forms"]
        ours = forms.get("ours", {})
        share = [
            cell(record[f"roofline_{key}_ms"] / ours[f"{key}_ms"], 2)
            for key in ("forward", "both")
            if ours.get(f"{key}_ms") and f"roofline_{key}_ms" in record
        ]
        least = [cell(record.get(f"roofline_{key}_ms")) for key in ("forward", "both") if f"{key}_ms" in ours]
        right = {True: "yes", False: "NO"}.get(check.get("right"), "failed" if check else "–")
        row = [record["case"], right, form_cell(ours), " / ".join(least) or "–", " / ".join(share) or "–"]
        row += [form_cell(forms.get(name)) for name in ("plain", *peers)]
        lines.append("| " + " | ".join(row) + " |")
    lines += choices_table(report)
    lines += ["", f"Training steps of {STEP_TOKENS:,} tokens, quantization-aware.", ""]
    head = ["preset", "variant", "step ms", "tokens/s", "of matmul ceiling", "peak GB", "loss after 3 steps"]
    lines += ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for step in report["steps"]:
        if "step_ms" not in step:
            why = "missing" if "missing" in step.get("failure", {}) else "failed"
            lines.append(f"| {step['preset']} | {step['variant']} | {why} | | | | |")
            continue
        peak = step.get("peak_bytes")
        row = [step["preset"], step["variant"], cell(step["step_ms"], 2), f"{step['tokens_per_s']:,.0f}"]
        row += [cell(step["of_matmul_ceiling"], 3), cell(peak and peak / 1e9, 2), cell(step["losses"][-1], 4)]
        lines.append("| " + " | ".join(row) + " |")
    for step in report["steps"]:
        if "phases_ms" in step:
            lines += ["", f"Phases of {step['preset']}, {step['variant']}, in ms:", ""]
            lines.append(", ".join(f"{name} {value:.2f}" for name, value in step["phases_ms"].items()))
    lines += ["", "| bar | value | holds |", "| --- | --- | --- |"]
    lines += [f"| {b['bar']} | {cell(b['value'])} | {cell(b['holds'])} |" for b in report["bars"]]
    if report["failures"]:
        lines += ["", "Not measured:", ""]
        lines += [f"- {f['part']}: {f['reason'].strip().splitlines()[-1]}" for f in report["failures"]]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns 1 if something is wrong or failed, 0 also where peers are missing."""
    parser = argparse.ArgumentParser(
        "python scripts/bench kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder of DATE.json and DATE.md; default benchmarks/GPU")
    parser.add_argument("--presets", nargs="+", default=["seed_bpe"], help="whose steps (default %(default)s)")
    parser.add_argument("--parts", nargs="+", default=[], help="only parts that begin so: operation:ssd, step:seed_bpe")
    parser.add_argument("--budget-s", type=float, default=450.0, help="seconds of all workers (default %(default)s)")
    parser.add_argument("--part-limit-s", type=float, default=100.0, help="seconds of one part (default %(default)s)")
    parser.add_argument("--miniature", action="store_true", help="tiny shapes on a CPU, kernels interpreted: a test")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.miniature and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device; --miniature tests this program on a CPU")
    device = torch.device("cpu" if arguments.miniature else "cuda")
    if arguments.worker:
        work_through(arguments.worker, device)
        return 0
    slug = re.sub(r"[^a-z0-9]+", "-", machine(device)["device"].lower()).strip("-")
    folder = arguments.output or ROOT / "benchmarks" / slug
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    report: dict[str, Any] = {
        "command": "python scripts/bench kernels",
        "date": date,
        "machine": machine(device),
        "ceilings": {},
        "operations": [],
        "choices": [],
        "steps": [],
        "bars": [],
        "failures": [],
    }

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        report["bars"] = bars_of(report["steps"])
        write_atomically(folder / f"{date}.json", (json.dumps(report, indent=1) + "\n").encode())
        write_atomically(folder / f"{date}.md", markdown(report).encode())

    def keep(said: dict) -> None:
        merge(report, said)
        write()

    started_s = time.monotonic()
    command = [sys.executable, str(ROOT / "scripts" / "bench"), "kernels"]
    if arguments.miniature:
        command.append("--miniature")
        os.environ["TRITON_INTERPRET"] = "1"  # of the workers: they import Triton, this process does not use it
    parts = parts_of(arguments.presets, arguments.parts)
    report["failures"] = drive(parts, command, arguments.budget_s, arguments.part_limit_s, keep)
    report["seconds"] = time.monotonic() - started_s
    write()
    print(markdown(report))
    wrong = [r["case"] for r in report["operations"] if not r.get("check", {}).get("right", True)]
    broken = [r for r in report["operations"] if "right" not in r.get("check", {}) or "error" in r["forms"]["ours"]]
    return 1 if wrong or broken or report["failures"] else 0
