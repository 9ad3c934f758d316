"""One model on every grid: bytes of its artifact against bits per byte read back from it.

    python scripts/bench bytes --run runs/demo --data data/stdlib-bpe1024 --tokens 60000 --out benchmarks/bytes.json

Every row starts from the same float weights (the masters of the run's newest checkpoint), goes through a whole artifact
in memory and is scored on the same validation tokens; `loss` is the difference to the float weights' own score. Rows:
the seed document's quantizer (absmax int4, unscaled e4m3 embedding) with brotli; int6 at 12.85 sigma and int5 at 5
sigma by GPTQ with brotli, embedding int8 by GPTQ, as the challenge's records store theirs; and free steps with our
coder at a few sizes, on uniform grids (`ours`) and on a trellis. Statistics come from training text.

    python scripts/bench bytes --synthetic

writes nothing and trains nothing: the published configuration's shapes filled with Gaussian numbers, on the seed
document's grids, through encoder and decoder, with the CPU seconds that they take.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from common.artifact.budget import format_text_table
from common.artifact.container import decode_artifact, encode_artifact
from common.errors import DataError, GolfError
from common.files import write_atomically
from common.quant.gptq import Elimination, LayerStatistics, eliminate, gptq_codes
from common.quant.grid import FP8_UNSCALED_GRID, GridSpec, QuantizedTensor, dequantize, quantize
from common.quant.plan import fit_model
from common.text.bpb import bits_per_byte, byte_table, token_bytes
from common.text.loader import TokenLoader
from common.text.shards import list_shards
from submissions.jepa_mamba.train_gpt import (
    Config,
    LanguageModel,
    Ranks,
    layer_statistics,
    open_tokenizer,
    open_tokens,
    read_preset,
    select_kernels,
    storage_spec,
    token_nll,
)

CPU = Ranks(0, 1, torch.device("cpu"))
BROTLI = ("raw", "brotli")
SHARES = (1.1, 1.0, 0.9, 0.8, 0.7)  # of the smallest file of the others
MAX_LOSS_BPB = 0.003


def load_masters(run: Path) -> tuple[Config, dict[str, np.ndarray]]:
    """Configuration and float32 weights (the moving average where there is one) of a run's newest checkpoint.

    Raises DataError.
    """
    found = sorted((run / "checkpoints").glob("step_*.safetensors"))
    if not found:
        raise DataError(f"{run}/checkpoints holds no checkpoint; train with --checkpoint_every")
    with safe_open(found[-1], "np") as file:
        state = json.loads((file.metadata() or {})["state"])
        keys = list(file.keys())
        prefix = "ema/lm." if any(key.startswith("ema/lm.") for key in keys) else "master/lm."
        weights = {key.removeprefix(prefix): file.get_tensor(key) for key in keys if key.startswith(prefix)}
    known = {name: value for name, value in state["config"].items() if hasattr(Config(), name)}
    return replace(Config(), **known), weights


def gptq_tensor(name: str, w: np.ndarray, spec: GridSpec, elimination: Elimination) -> QuantizedTensor:
    """A matrix on a row-scaled grid by plain GPTQ."""
    scales = quantize(w, spec, name).scales
    codes = gptq_codes(w, scales, np.ones(w.shape[1], np.float32), spec.qmax, elimination, 0.0)
    return QuantizedTensor(spec, codes, scales, w.shape)


class Bench:
    """Float weights, what the loss says about them, and validation tokens."""

    def __init__(self, run: Path, data: Path, tokens: int, statistics_tokens: int) -> None:
        self.config, self.weights = load_masters(run)
        c = self.config = replace(self.config, data_path=str(data), tokenizer_path="")
        self.tokenizer = open_tokenizer(c, str(data))
        self.lm = LanguageModel(c, select_kernels("torch", CPU.device)).eval()
        self.fill(self.weights)
        self.tokens = open_tokens(str(data / "*_val_*.bin"), c.vocab_size)[: tokens + 1]
        self.scored_bytes = int(token_bytes(byte_table(self.tokenizer), self.tokens[:-1], self.tokens[1:]).sum())
        loader = TokenLoader(
            list_shards(str(data / "*_train_*.bin")), seq_len=c.train_seq_len,
            batch_sequences=max(1, statistics_tokens // c.train_seq_len), rank=0, world_size=1, seed=c.seed,
            bos_id=self.tokenizer.bos_id, vocab_size=c.vocab_size,
        )  # fmt: skip
        batch = loader.next_batch()
        x, y, documents = (torch.from_numpy(a) for a in (batch.x_BT, batch.y_BT, batch.document_ids_BT))
        rows = max(1, 4096 // c.train_seq_len)
        found = layer_statistics(self.lm, x, y, documents, rows, CPU)
        grids = {name: storage_spec(name, torch.from_numpy(w), c) for name, w in self.weights.items()}
        self.statistics: dict[str, LayerStatistics] = {
            name: layer for name, layer in found.items() if grids[name].kind in ("int", "fp8_e4m3")
        }
        self.rest = {name: spec for name, spec in grids.items() if name not in self.statistics}
        self.eliminations = {name: eliminate(layer.hessian_CC) for name, layer in self.statistics.items()}
        self.float_bpb = self.score()

    def fill(self, weights: dict[str, np.ndarray]) -> None:
        self.lm.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in weights.items()}, strict=True)

    def score(self) -> float:
        c = self.config
        nll_n, _ = token_nll(
            self.lm, self.tokens, mode="standard", length=c.eval_seq_len or c.train_seq_len, stride=1,
            batch_tokens=8192, lanes=1, bos_id=self.tokenizer.bos_id, temperature=1.0, ranks=CPU,
        )  # fmt: skip
        return bits_per_byte(float(nll_n.sum()), self.scored_bytes)

    def measure(self, label: str, tensors: dict[str, QuantizedTensor], codecs: Sequence[str] | None) -> dict:
        """Encode, read back, score."""
        started_s = time.process_time()
        data = encode_artifact(tensors, {}) if codecs is None else encode_artifact(tensors, {}, codecs)
        encode_s = time.process_time() - started_s
        stored, _, report = decode_artifact(data)
        decode_s = time.process_time() - started_s - encode_s
        self.fill({k: t if isinstance(t, np.ndarray) else dequantize(t) for k, t in stored.items()})
        row = {
            "row": label, "bytes": len(data), "bits_per_weight": 8 * len(data) / report.n_weights,
            "loss_bpb": self.score() - self.float_bpb, "encode_cpu_s": encode_s, "decode_cpu_s": decode_s,
        }  # fmt: skip
        print(f"{label}: {len(data):,} bytes, loss {row['loss_bpb']:+.5f}", file=sys.stderr, flush=True)
        return row

    def others(self) -> list[dict]:
        """The seed document's quantizer and the records'."""
        rest = {name: quantize(self.weights[name], spec, name) for name, spec in self.rest.items()}

        def with_gptq(spec: GridSpec) -> dict[str, QuantizedTensor]:
            return rest | {
                name: gptq_tensor(
                    name, self.weights[name], GridSpec("int", 8) if name == "token_embed.weight" else spec,
                    self.eliminations[name],
                )
                for name in self.statistics
            }  # fmt: skip

        seed = rest | {
            name: quantize(
                self.weights[name], FP8_UNSCALED_GRID if name == "token_embed.weight" else GridSpec("int", 4), name
            )
            for name in self.statistics
        }
        return [
            self.measure("seed: absmax int4, e4m3, brotli", seed, BROTLI),
            self.measure("int6 12.85 sigma GPTQ, brotli", with_gptq(GridSpec("int", 6, clip=12.85)), BROTLI),
            self.measure("int5 5 sigma GPTQ, brotli", with_gptq(GridSpec("int", 5, clip=5.0)), BROTLI),
        ]

    def ours(self, budget_bytes: int, rate: float, trellis: bool) -> dict:
        """Free steps that fill a budget."""
        started_s = time.process_time()
        plan, _ = fit_model(
            self.weights, self.statistics, self.rest, lambda plan: len(encode_artifact(plan.tensors, {})),
            budget_bytes, rate=rate, trellis=trellis,
        )  # fmt: skip
        fit_cpu_s = time.process_time() - started_s
        expected_nats = sum(plan.expected_nats.values())
        row = self.measure(f"{'trellis' if trellis else 'ours'}, budget {budget_bytes:,}", plan.tensors, None)
        share = row["bytes"] / budget_bytes
        expected_bpb = expected_nats * (len(self.tokens) - 1) / self.scored_bytes / math.log(2)
        return row | {"budget_bytes": budget_bytes, "budget_share": share, "expected_loss_bpb": expected_bpb} | {
            "fit_cpu_s": fit_cpu_s
        }


def synthetic_state(seed: int = 0) -> dict[str, QuantizedTensor]:
    """The published configuration with Gaussian weights on its grids: int4 rows, unscaled e4m3 embedding, bf16 vectors.

    The embedding has the standard deviation 0.05, where unscaled e4m3 codes have 6.0 bits of entropy: 5.3 at 0.02, as
    initialised, and 6.4 at 1.
    """
    config = replace(Config(), **read_preset("seed_bpe"))
    with torch.device("meta"):
        lm = LanguageModel(config, select_kernels("torch", CPU.device))
    shapes = {name: tuple(p.shape) for name, p in lm.named_parameters()}
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in shapes.items():
        spec = storage_spec(name, torch.empty(shape, device="meta"), config)
        if spec.kind == "fp8_e4m3":
            spec = FP8_UNSCALED_GRID
        elif spec.kind == "f32":
            spec = GridSpec("bf16")
        sigma = np.float32(0.05 if spec.kind == "fp8_e4m3" else 1.0)
        state[name] = quantize(sigma * rng.standard_normal(shape, dtype=np.float32), spec, name)
    return state


def synthetic_row(state: dict[str, QuantizedTensor]) -> dict:
    """Bytes and CPU seconds of a state through the artifact; raises DataError if a code or scale comes back changed."""
    started_s = time.process_time()
    data = encode_artifact(state, {})
    encode_s = time.process_time() - started_s
    back, _, report = decode_artifact(data)
    decode_s = time.process_time() - started_s - encode_s
    for name, q in state.items():
        stored = back[name]
        if not isinstance(stored, QuantizedTensor) or not np.array_equal(stored.codes, q.codes):
            raise DataError(f"{name} does not come back as it was stored")
        if not np.array_equal(stored.scales, q.scales):
            raise DataError(f"the scales of {name} do not come back as they were stored")
    kinds = ("int", "fp8_e4m3", "bf16")
    counts = {kind: sum(q.codes.size for q in state.values() if q.spec.kind == kind) for kind in kinds}
    row = {"bytes": len(data), "encode_cpu_s": encode_s, "decode_cpu_s": decode_s, "weights": report.n_weights}
    return row | counts


def bytes_at(rows: Sequence[dict], loss_bpb: float) -> float | None:
    """Bytes at which a curve of rows has this loss, linear between neighbours; None outside of it."""
    ordered = sorted(rows, key=lambda row: row["bytes"])
    for small, large in itertools.pairwise(ordered):
        low, high = large["loss_bpb"], small["loss_bpb"]
        if low <= loss_bpb <= high and high > low:
            return large["bytes"] - (loss_bpb - low) / (high - low) * (large["bytes"] - small["bytes"])
    return None


def summary_lines(others: Sequence[dict], ours: Sequence[dict]) -> list[str]:
    """What the table shows: our bytes where we lose as much as each other row, and at MAX_LOSS_BPB."""
    lines = []
    for row in others:
        equal = bytes_at(ours, row["loss_bpb"])
        verdict = "outside our curve" if equal is None else f"{equal:,.0f} bytes, {1 - equal / row['bytes']:.1%} fewer"
        lines.append(f"at the loss of `{row['row']}` ({row['loss_bpb']:+.5f}): {verdict}")
    sound = [row for row in others if row["loss_bpb"] <= MAX_LOSS_BPB]
    ours_sound = [row for row in ours if row["loss_bpb"] <= MAX_LOSS_BPB]
    if sound and ours_sound:
        best, own = min(sound, key=lambda r: r["bytes"]), min(ours_sound, key=lambda r: r["bytes"])
        lines.append(
            f"smallest file with a loss of at most {MAX_LOSS_BPB}: ours {own['bytes']:,} ({own['loss_bpb']:+.5f}), "
            f"others {best['bytes']:,} ({best['loss_bpb']:+.5f}): {1 - own['bytes'] / best['bytes']:.1%} fewer"
        )
    return lines


def trellis_lines(ours: Sequence[dict], trellis: Sequence[dict]) -> list[str]:
    """What a trellis is worth at the bytes of its rows, by expected loss: that has no noise of the text scored."""
    curve = sorted((row["bytes"], math.log(row["expected_loss_bpb"])) for row in ours)
    sizes, logs = zip(*curve, strict=True)
    shares = [
        row["expected_loss_bpb"] / math.exp(np.interp(row["bytes"], sizes, logs)) - 1
        for row in trellis if sizes[0] <= row["bytes"] <= sizes[-1]
    ]  # fmt: skip
    seconds = sum(row["fit_cpu_s"] for row in trellis) / sum(row["fit_cpu_s"] for row in ours)
    return [
        f"trellis: expected loss {min(shares):+.1%} to {max(shares):+.1%} at equal bytes, {seconds:.1f} times the CPU "
        "seconds to fit a budget"
    ] if shares else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser("python scripts/bench bytes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--synthetic", action="store_true", help="the published shapes with Gaussian weights instead")
    parser.add_argument("--run", type=Path, help="run folder with a checkpoint")
    parser.add_argument("--data", type=Path, help="folder of its shards")
    parser.add_argument("--tokens", type=int, default=60_000, help="validation tokens to score (%(default)s)")
    parser.add_argument("--statistics-tokens", type=int, default=32_768, help="training tokens (%(default)s)")
    parser.add_argument("--rate", type=float, default=Config().rate, help="weight of the coder's cost (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args(arguments)
    if not options.synthetic and not (options.run and options.data):
        parser.error("give --run and --data, or --synthetic")
    try:
        if options.synthetic:
            print(json.dumps(synthetic_row(synthetic_state())))
            return 0
        bench = Bench(options.run, options.data, options.tokens, options.statistics_tokens)
        others = bench.others()
        smallest = min(row["bytes"] for row in others)
        budgets = [round(share * smallest) for share in SHARES]
        ours, trellis = ([bench.ours(size, options.rate, on) for size in budgets] for on in (False, True))
    except GolfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cells = [["row", "bytes", "bits/weight", "loss, bpb", "expected"]]
    for row in [*others, *ours, *trellis]:
        expected = f"{row['expected_loss_bpb']:+.5f}" if "expected_loss_bpb" in row else "-"
        size = f"{row['bits_per_weight']:.3f}"
        cells.append([row["row"], f"{row['bytes']:,}", size, f"{row['loss_bpb']:+.5f}", expected])
    lines = [*summary_lines(others, ours), *trellis_lines(ours, trellis)]
    print(f"float weights: {bench.float_bpb:.5f} bpb over {len(bench.tokens) - 1:,} tokens")
    print(format_text_table(cells, left_columns=1))
    print("\n".join(lines))
    if options.out:
        record = {
            "float_bpb": bench.float_bpb, "tokens": len(bench.tokens) - 1, "scored_bytes": bench.scored_bytes,
            "weights": sum(w.size for w in bench.weights.values()), "rows": [*others, *ours, *trellis],
            "summary": lines,
        }  # fmt: skip
        write_atomically(options.out, json.dumps(record, indent=1).encode() + b"\n")
    return 0
