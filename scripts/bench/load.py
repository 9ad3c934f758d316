"""Large inputs on this machine: text and frames by the gigabyte in bounded memory, checkpoints of growing models, cost.

    python scripts/bench load [--gigabytes 0.1 1] [--parts text world checkpoints cost] [--json FILE]

Each size is a process of its own, watched every 50 ms: memory is what its whole tree holds besides pages of files
(which the kernel takes back at will). Text is synthetic: documents of about 4 kB of random words, no two alike, in one
.jsonl file, through `prepare_text.py` as a user runs it (bytes, all cores) and then through the token loader, which
draws windows from all of it. Frames are synthetic records of 64 x 64 x 3, written and then drawn in windows of 16. A
size needs about 3.2 times its bytes of disk under --scratch, and gives them back.

Costs are arithmetic: parameters that multiply, times six floating-point operations, against a stated rate of a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.reliability import PAGE, ROOT, STORE, provenance, record, table

GIGABYTE = 10**9
MEMORY_LIMIT_BYTES = 1_500_000_000
PARTS = ("text", "world", "checkpoints", "cost")
# Rates and prices that the projections state beside their results.
GPU_FLOPS = 989e12  # one H100, bf16 dense, as its maker says
GPU_USD_AN_HOUR = 3.0
MEASURED_STEPS, MEASURED_S, STEP_TOKENS = 6000, 600.0, 524_288  # the published run of seed_bpe on 8 H100
FINEWEB_TOKENS = {"FineWeb, 10B sample": 10e9, "FineWeb-Edu": 1.3e12, "FineWeb": 15e12}
WORLD_UTILISATION = 0.3  # of GPU_FLOPS, assumed


# ---------------------------------------------------------------- measuring


def tree_of(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop()
        try:
            threads = os.listdir(f"/proc/{one}/task")
            found.append(one)
            for thread in threads:
                children = Path(f"/proc/{one}/task/{thread}/children").read_text(encoding="ascii")
                waiting += map(int, children.split())
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    return found


def own_bytes(pid: int) -> int:
    """Memory of a process that is no page of a file."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    return 1024 * (int(sizes.get("RssAnon", 0)) + int(sizes.get("RssShmem", 0)))


class Watch:
    """Peak memory of a process tree while it is entered."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak_bytes, self.over = pid, 0, threading.Event()

    def _look(self) -> None:
        while not self.over.wait(0.05):
            self.peak_bytes = max(self.peak_bytes, sum(map(own_bytes, tree_of(self.pid))))

    def __enter__(self) -> Watch:
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        self.thread.join()


def apart(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Do work in a process of its own; its result, and the memory that it took at most."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_report, args=(there, work, *arguments))
    process.start()
    there.close()
    with Watch(process.pid or 0) as watch:
        try:
            result = here.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"{work.__name__}{arguments} ended with {process.exitcode}") from None
        process.join()
    return {**result, "memory_bytes": watch.peak_bytes}


def _report(pipe: Any, work: Callable[..., dict[str, Any]], *arguments: Any) -> None:
    pipe.send(work(*arguments))


# ---------------------------------------------------------------- text


def write_text(path: Path, size_bytes: int) -> int:
    """A .jsonl file of documents that differ; the documents."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(2, 9, 5000)]
    bodies = [" ".join(words[i] for i in rng.integers(0, len(words), 700)) for _ in range(64)]
    written = count = 0
    with open(path, "w", encoding="ascii") as file:
        while written < size_bytes:
            line = f'{{"text": "document {count} {bodies[count % len(bodies)]} {rng.integers(1 << 60)}"}}\n'
            file.write(line)
            written += len(line)
            count += 1
    return count


def draw_tokens(folder: str, seconds: float) -> dict[str, Any]:
    """Batches of the token loader for some seconds."""
    from common.text.loader import TokenLoader
    from common.text.shards import list_shards

    began_s = time.perf_counter()
    loader = TokenLoader(list_shards(f"{folder}/*_train_*.bin"), seq_len=1024, batch_sequences=64, bos_id=255, seed=1)
    loader.next_batch()
    opened_s, tokens, began_s, cpu_s = time.perf_counter() - began_s, 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began_s < seconds:
        tokens += loader.next_batch().x_BT.size
    drawn_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    return {"tokens_per_s": tokens / drawn_s, "tokens_per_cpu_s": tokens / cpu_s, "first_batch_s": opened_s}


def measure_text(gigabytes: float, seconds: float, scratch: Path) -> dict[str, Any]:
    source, out = scratch / "text.jsonl", scratch / "shards"
    documents = write_text(source, int(gigabytes * GIGABYTE))
    size_bytes = source.stat().st_size
    command = [sys.executable, str(ROOT / "scripts" / "prepare_text.py"), "--source", str(source), "--out", str(out)]
    began_s, cpu_s = time.perf_counter(), os.times()
    with open(scratch / "prepare.out", "wb") as log:
        process = subprocess.Popen([*command, "--tokenizer", "byte"], stdout=log, stderr=log, cwd=ROOT)
        with Watch(process.pid) as watch:
            status = process.wait()
    took_s, now = time.perf_counter() - began_s, os.times()
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {status}: {(scratch / 'prepare.out').read_text()[-2000:]}")
    source.unlink()
    spent_s = now.children_user + now.children_system - cpu_s.children_user - cpu_s.children_system
    loading = apart(draw_tokens, str(out), seconds)
    shutil.rmtree(out)
    return {
        "gigabytes": size_bytes / GIGABYTE, "documents": documents, "prepare_mb_per_s": size_bytes / took_s / 1e6,
        "prepare_mb_per_cpu_s": size_bytes / spent_s / 1e6, "prepare_memory_bytes": watch.peak_bytes, "loader": loading,
    }  # fmt: skip


# ---------------------------------------------------------------- frames


def write_frames(folder: str, size_bytes: int) -> dict[str, Any]:
    """A data set of so many bytes of raw frames: a smooth picture that drifts, with some noise in it."""
    from worldmodel.data.records import RecordLayout, RecordWriter, encode_episode, write_manifest

    layout, rng = RecordLayout((64, 64, 3), num_actions=15), np.random.default_rng(0)
    y, x = np.mgrid[0:64, 0:64]
    picture = np.stack([127 + 120 * np.sin(y / (5 + c) + x / (9 - c)) for c in range(3)], axis=-1).astype(np.uint8)
    episode, entries, done, began_s = 256, [], 0, time.perf_counter()
    noise = rng.integers(0, 8, (episode, 64, 64, 3), dtype=np.uint8)
    while done < size_bytes:
        with RecordWriter(Path(folder) / f"train-{len(entries):05d}.array_record", layout) as writer:
            for _ in range(100):
                shift = int(rng.integers(64))
                frames = np.stack([np.roll(picture, shift + t, axis=1) for t in range(episode)]) + noise
                writer.write(encode_episode(layout, frames, rng.integers(0, 15, episode)))
                done += frames.nbytes
                if done >= size_bytes:
                    break
        assert writer.summary is not None
        entries.append(dataclasses.asdict(writer.summary))
    manifest = {
        "kind": "frames", "name": "drift", "item_shape": [64, 64, 3], "dtype": "uint8", "num_actions": 15, "fps": 15.0,
        "group_frames": layout.group_frames, "action_names": [str(i) for i in range(15)], "complete": True,
        "source": {"type": "synthetic"}, "splits": {"train": {"files": entries}},
    }  # fmt: skip
    write_manifest(folder, manifest)
    return {"frames": done // (64 * 64 * 3), "write_mb_per_s": done / (time.perf_counter() - began_s) / 1e6}


def draw_frames(folder: str, seconds: float) -> dict[str, Any]:
    """Batches of the window loader for some seconds."""
    from worldmodel.data.pipeline import make_loader

    began_s = time.perf_counter()
    loader = make_loader(folder, split="train", seq_len=16, batch_size=36, seed=1, num_threads=1)
    next(loader)
    opened_s, frames, began_s, cpu_s = time.perf_counter() - began_s, 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began_s < seconds:
        frames += next(loader)["frames_BTHWC"].shape[0] * 16
    drawn_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    return {"frames_per_s": frames / drawn_s, "frames_per_cpu_s": frames / cpu_s, "first_batch_s": opened_s}


def measure_world(gigabytes: float, seconds: float, scratch: Path) -> dict[str, Any]:
    folder = scratch / "frames"
    folder.mkdir()
    writing = apart(write_frames, str(folder), int(gigabytes * GIGABYTE))
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    loading = apart(draw_frames, str(folder), seconds)
    shutil.rmtree(folder)
    raw_bytes = writing["frames"] * 64 * 64 * 3
    return {"gigabytes": raw_bytes / GIGABYTE, "disk_bytes": size_bytes, "writer": writing, "loader": loading}


# ---------------------------------------------------------------- checkpoints


def lm_checkpoint(width: int, layers: int, folder: str) -> dict[str, Any]:
    """Time of saving (read back and verified) and loading a language model of a width, with its optimizers."""
    import torch

    from submissions.jepa_mamba import train_gpt as entry

    torch.set_num_threads(1)
    config = entry.Config(model_dim=width, num_layers=layers, embed_dim=width // 2, runs_dir=folder, run_id="run",
                          device="cpu", checkpoint_keep=1)  # fmt: skip
    ranks = entry.Ranks(0, 1, torch.device("cpu"))
    trainer = entry.Trainer(config, entry.select_kernels("torch", ranks.device), ranks)
    for optimizer in trainer.optimizers.values():  # moments come to be with a step; the gradients are zeros
        optimizer.step()
    run = entry.RunFolder(config, ranks)
    run.checkpoints.mkdir(parents=True)
    saves, loads = [], []
    for step in range(3):
        began_s = time.perf_counter()
        entry.save_checkpoint(run, trainer.masters, trainer.optimizers, entry.Progress(step, 0.0), {})
        saves.append(time.perf_counter() - began_s)
        began_s = time.perf_counter()
        entry.load_checkpoint(run, trainer.masters, trainer.optimizers)
        loads.append(time.perf_counter() - began_s)
    parameters = sum(p.numel() for p in trainer.masters.master.values())
    size_bytes = run.checkpoint_of(2).stat().st_size
    return {"parameters": parameters, "bytes": size_bytes, "save_s": statistics.median(saves),
            "load_s": statistics.median(loads)}  # fmt: skip


def world_checkpoint(width: int, layers: int, folder: str) -> dict[str, Any]:
    """The same for a state of a world model's shape (float32 parameters, AdamW's two moments, an average)."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from worldmodel.train.checkpoint import Checkpoints

    rng = np.random.default_rng(0)

    def weights() -> dict[str, Any]:
        return {
            f"layer_{i}": {
                name: {"kernel": jax.numpy.asarray(rng.standard_normal(shape, np.float32))}
                for name, shape in (("qkv", (width, 3 * width)), ("out", (width, width)), ("up", (width, 4 * width)),
                                    ("down", (4 * width, width)))
            } for i in range(layers)
        }  # fmt: skip

    state = {"params": weights(), "opt": {"mu": weights(), "nu": weights()}, "ema": weights()}
    parameters = sum(x.size for x in jax.tree.leaves(state["params"]))
    saves, loads = [], []
    checkpoints = Checkpoints(folder, keep=1)
    for step in range(3):
        began_s = time.perf_counter()
        checkpoints.save(step, state, config={}, loader_state={})
        checkpoints.verify()
        saves.append(time.perf_counter() - began_s)
        began_s = time.perf_counter()
        checkpoints.restore(state, config={})
        loads.append(time.perf_counter() - began_s)
    checkpoints.close()
    size_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {"parameters": parameters, "bytes": size_bytes, "save_s": statistics.median(saves),
            "load_s": statistics.median(loads)}  # fmt: skip


SIZES = {"language model": (lm_checkpoint, ((256, 6), (640, 10), (1280, 12))),
         "world model": (world_checkpoint, ((128, 4), (384, 6), (768, 8)))}  # fmt: skip


def measure_checkpoints(scratch: Path) -> list[dict[str, Any]]:
    found = []
    for learner, (work, sizes) in SIZES.items():
        for width, layers in sizes:
            folder = scratch / f"{learner}-{width}"
            result = apart(work, width, layers, str(folder))
            shutil.rmtree(folder)
            found.append({"learner": learner, "width": width, "layers": layers, **result})
    return found


# ---------------------------------------------------------------- cost


def lm_multiplying() -> int:
    """Parameters of seed_bpe's language model and objective that multiply a token's activations."""
    import torch

    from submissions.jepa_mamba import train_gpt as entry

    preset = ROOT / "submissions" / "jepa_mamba" / "presets" / "seed_bpe.py"
    config = entry.Config(**entry.read_preset(str(preset)))
    with torch.device("meta"):
        model = entry.TrainingModel(config, entry.select_kernels("torch", torch.device("cpu")))
    return sum(p.numel() for p in model.parameters() if p.ndim == 2)  # the tied embedding once, as the head


def world_per_frame() -> dict[str, tuple[int, int]]:
    """Parameters that multiply, and tokens a frame, of each stage of the paper's profile."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    from flax import nnx

    from worldmodel.configs.paper import PROFILE
    from worldmodel.models.kinds import build_dynamics
    from worldmodel.models.tokenizer import Tokenizer
    from worldmodel.train.state import is_matrix, values_of

    def multiplying(build: Callable[[], Any]) -> int:
        params, _ = values_of(nnx.eval_shape(build))
        leaves = jax.tree_util.tree_leaves_with_path(params)
        return sum(x.size for path, x in leaves if is_matrix(path, x))

    stage = PROFILE.tokenizer
    frame = stage.tokenizer.frame
    tokens = frame.rows * frame.columns
    return {
        "tokenizer": (multiplying(lambda: Tokenizer(stage.tokenizer, rngs=nnx.Rngs(0))), tokens),
        "dynamics": (multiplying(lambda: build_dynamics(PROFILE.dynamics, num_actions=15, rngs=nnx.Rngs(0))), tokens),
    }


def measure_cost() -> dict[str, Any]:
    multiplying = lm_multiplying()
    tokens_per_s = MEASURED_STEPS * STEP_TOKENS / MEASURED_S
    return {
        "lm": {"multiplying": multiplying, "flops_a_token": 6 * multiplying, "tokens_per_s_8_gpus": tokens_per_s},
        "world": {name: {"multiplying": p, "tokens": n, "flops_a_frame": 6 * p * n}
                  for name, (p, n) in world_per_frame().items()},
        "gpu_flops": GPU_FLOPS, "gpu_usd_an_hour": GPU_USD_AN_HOUR,
    }  # fmt: skip


# ---------------------------------------------------------------- the page


def render_loads(document: dict[str, Any]) -> str:
    parts = []
    if rows := document.get("text"):
        parts.append(table(
            ("text, GB", "documents", "prepare_text, MB/s", "MB/CPU s", "memory, MB", "loader, tokens/s",
             "tokens/CPU s", "memory, MB", "first batch, s"),
            [(f"{r['gigabytes']:.2f}", f"{r['documents']:,}", f"{r['prepare_mb_per_s']:.1f}",
              f"{r['prepare_mb_per_cpu_s']:.1f}", f"{r['prepare_memory_bytes'] / 1e6:.0f}",
              f"{r['loader']['tokens_per_s']:,.0f}", f"{r['loader']['tokens_per_cpu_s']:,.0f}",
              f"{r['loader']['memory_bytes'] / 1e6:.0f}", f"{r['loader']['first_batch_s']:.2f}") for r in rows],
        ))  # fmt: skip
        parts.append(flatness(rows, {"prepare_text": lambda r: r["prepare_mb_per_cpu_s"],
                                     "loader": lambda r: r["loader"]["tokens_per_cpu_s"]}))  # fmt: skip
    if rows := document.get("world"):
        parts.append(table(
            ("raw frames, GB", "on disk, GB", "writer, MB/s", "memory, MB", "loader, frames/s", "frames/CPU s",
             "memory, MB", "first batch, s"),
            [(f"{r['gigabytes']:.2f}", f"{r['disk_bytes'] / GIGABYTE:.2f}", f"{r['writer']['write_mb_per_s']:.1f}",
              f"{r['writer']['memory_bytes'] / 1e6:.0f}", f"{r['loader']['frames_per_s']:,.0f}",
              f"{r['loader']['frames_per_cpu_s']:,.0f}", f"{r['loader']['memory_bytes'] / 1e6:.0f}",
              f"{r['loader']['first_batch_s']:.2f}") for r in rows],
        ))  # fmt: skip
        parts.append(flatness(rows, {"loader": lambda r: r["loader"]["frames_per_cpu_s"]}))
    if rows := document.get("checkpoints"):
        parts.append(table(
            ("checkpoints of", "width x layers", "parameters", "MB", "save and verify, s", "load and verify, s",
             "MB/s saved", "memory of the process, MB"),
            [(r["learner"], f"{r['width']} x {r['layers']}", f"{r['parameters']:,}", f"{r['bytes'] / 1e6:.1f}",
              f"{r['save_s']:.2f}", f"{r['load_s']:.2f}", f"{r['bytes'] / r['save_s'] / 1e6:.0f}",
              f"{r['memory_bytes'] / 1e6:.0f}") for r in rows],
        ))  # fmt: skip
    if cost := document.get("cost"):
        parts.append(render_cost(cost))
    return "\n\n".join(part for part in parts if part)


def flatness(rows: Sequence[dict[str, Any]], rates: dict[str, Callable[[dict[str, Any]], float]]) -> str:
    """What is left of each rate a processor second at the largest size; "" for a single size."""
    first, last = (extreme(rows, key=lambda r: r["gigabytes"]) for extreme in (min, max))
    if first is last:
        return ""
    shares = ", ".join(f"{name} {rate(last) / rate(first):.2f}" for name, rate in rates.items())
    return (
        f"Rate a CPU second at {last['gigabytes']:.2f} GB over that at {first['gigabytes']:.2f} GB: {shares} "
        "(rates by the clock depend on what else the machine does)."
    )


def render_cost(cost: dict[str, Any]) -> str:
    """Projections with their arithmetic; nothing here was measured on this machine."""
    lm, flops, usd = cost["lm"], cost["gpu_flops"], cost["gpu_usd_an_hour"]
    rate = lm["tokens_per_s_8_gpus"]
    share = rate * lm["flops_a_token"] / (8 * flops)
    million_usd = 8 * usd / 3600 * 1e6 / rate
    lines = [
        "**On paper**, not measured here. Assumed: "
        f"{flops / 1e12:.0f} TFLOP/s and {usd:.2f} USD an hour for one H100; 64 GPUs are eight times eight: each has "
        "the same text a step, and the gradients of so small a model hide behind the backward pass.",
        "",
        f"`seed_bpe`: {lm['multiplying']:,} parameters multiply a token, forward and backward 6 x "
        f"{lm['multiplying']:,} = {lm['flops_a_token']:.3g} FLOP a token. The published run made {MEASURED_STEPS:,} "
        f"steps of {STEP_TOKENS:,} tokens in {MEASURED_S:.0f} s on 8 H100: {rate:,.0f} tokens/s, "
        f"{rate * lm['flops_a_token'] / 1e12:.0f} TFLOP/s, {share:.1%} of the eight. A million tokens cost "
        f"8 x {usd:.2f} USD / 3600 s x 10^6 / {rate:,.0f} = {million_usd:.5f} USD.",
        "",
    ]
    rows = []
    for name, tokens in FINEWEB_TOKENS.items():
        hours = tokens / rate / 3600
        rows.append((name, f"{tokens:.3g}", f"{hours:,.2f}", f"{hours / 8:,.2f}", f"{8 * hours * usd:,.0f}"))
    lines.append(table(("one pass over", "tokens", "hours, 8 H100", "hours, 64 H100", "USD"), rows))
    lines += ["", f"World model, profile `paper`, at an assumed {WORLD_UTILISATION:.0%} of the GPU:", ""]
    rows = []
    for name, part in cost["world"].items():
        frames_per_s = 8 * flops * WORLD_UTILISATION / part["flops_a_frame"]
        rows.append((
            name, f"{part['multiplying']:,}", part["tokens"],
            f"6 x {part['multiplying']:,} x {part['tokens']} = {part['flops_a_frame']:.3g}",
            f"{frames_per_s:,.0f}", f"{8 * frames_per_s:,.0f}", f"{8 * usd / 3600 * 1e6 / frames_per_s:.4f}",
        ))  # fmt: skip
    headings = ("stage", "parameters that multiply", "tokens a frame", "FLOP a frame, trained", "frames/s, 8 H100")
    lines.append(table((*headings, "64 H100", "USD a million frames"), rows))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 1 if a loader or prepare_text took more memory than it may."""
    parser = argparse.ArgumentParser("python scripts/bench load", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--seconds", type=float, default=5.0, help="that each loader draws for")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scratch", type=Path, help="folder for synthetic data; default: the system's temporary one")
    parser.add_argument("--json", type=Path, help="write figures here instead of the tables in docs/RELIABILITY.md")
    args = parser.parse_args(argv)
    words = " ".join(argv or [])
    document: dict[str, Any] = {"provenance": provenance(f"python scripts/bench load {words}".strip())}
    with tempfile.TemporaryDirectory(prefix="load-", dir=args.scratch) as temporary:
        scratch = Path(temporary)
        for part, measure in (("text", measure_text), ("world", measure_world)):
            if part in args.parts:
                document[part] = []
                for gigabytes in args.gigabytes:
                    document[part].append(measure(gigabytes, args.seconds, scratch))
                    print(json.dumps({part: document[part][-1]}), flush=True)
                    keep(document, args.json)
        if "checkpoints" in args.parts:
            document["checkpoints"] = measure_checkpoints(scratch)
            print(json.dumps({"checkpoints": document["checkpoints"]}), flush=True)
            keep(document, args.json)
    if "cost" in args.parts:
        document["cost"] = apart(measure_cost)
        keep(document, args.json)
    print(render_loads(document))
    memory = [r["prepare_memory_bytes"] for r in document.get("text", [])]
    memory += [r["loader"]["memory_bytes"] for part in ("text", "world") for r in document.get(part, [])]
    over = [size for size in memory if size > MEMORY_LIMIT_BYTES]
    if over:
        print(f"memory of {max(over):,} bytes, at most {MEMORY_LIMIT_BYTES:,} are wanted", file=sys.stderr)
    return 1 if over else 0


def keep(document: dict[str, Any], path: Path | None, *, store: Path = STORE, page: Path = PAGE) -> None:
    """Write what is known so far, beside the parts that earlier commands measured and this one has not.

    Args:
        document: what was measured, by part, with its provenance.
        path: a JSON file for it instead of the page.
        store: figures of all earlier commands.
        page: where the tables stand.
    """
    if path is not None:
        path.write_text(json.dumps(document, indent=1), encoding="utf-8")
        return
    sections = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    before = sections.get("load", {})
    earlier = {part: before[part] for part in PARTS if part in before and part not in document}
    made = [line for line in before.get("provenance", []) if line not in document["provenance"]] if earlier else []
    whole = {**document, **earlier, "provenance": [*made, *document["provenance"]]}
    record("load", whole, render_loads(whole), store=store, page=page)
