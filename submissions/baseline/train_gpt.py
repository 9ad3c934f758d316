"""A plain transformer of the challenge's kind: the opponent that every other entry has to beat at its own budget.

    python submissions/baseline/train_gpt.py --preset mini --data_path DATA          # two CPU cores
    torchrun --standalone --nproc_per_node=8 submissions/baseline/train_gpt.py --preset full --data_path DATA
    python submissions/baseline/train_gpt.py --score model.artifact --val 'DATA/*_val_*.bin'

Source: the naive baseline of the challenge: nine layers, grouped-query attention with rotary positions and query-key
norm, squared-ReLU feed-forward, U-Net skips, tied embedding, tanh softcap, Muon for matrices and Adam for the rest; the
weights ship as int8 by row under zlib. Text, optimizer, loss, grid, container and bytes of text are those of `common`.

Letters: B batch, T time, D model dim, H heads, P head dim, V vocabulary, N tokens of a stream.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common.artifact.container import decode_artifact, encode_artifact
from common.cpu import compile_obstacle, in_default_products, processor_name, tune_cpu_process
from common.errors import ArtifactError, ConfigError, GolfError, TokenizerError
from common.files import write_atomically
from common.optim.muon import Muon
from common.quant.grid import GridSpec, QuantizedTensor, dequantize
from common.quant.torch_impl import quantize_torch
from common.rms_norm import rms_norm_torch
from common.softcap_xent.torch_impl import softcap_nll_torch, softcap_xent_torch
from common.text.bpb import bits_per_byte, byte_table, token_bytes
from common.text.loader import TokenLoader
from common.text.shards import list_shards, open_shard
from common.text.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer

ARTIFACT_LIMIT_BYTES = 1 << 28  # nothing that claims to be larger is unpacked


@dataclasses.dataclass(frozen=True)
class Config:
    """Every option, set by preset < flag; defaults are the challenge's."""

    run_id: str = ""
    runs_dir: str = "runs"
    seed: int = 42
    device: str = "auto"  # auto: CUDA where there is one; cpu
    data_path: str = "./data/datasets/fineweb10B_sp8192"
    tokenizer: str = "bpe"  # bpe: DATA_PATH/tokenizer.model; byte
    vocab_size: int = 8192
    model_dim: int = 512
    num_layers: int = 9
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_mult: int = 2
    logit_softcap: float = 30.0
    train_seq_len: int = 1024
    train_batch_tokens: int = 524288
    micro_batch_tokens: int = 65536
    iterations: int = 20000
    max_wallclock_seconds: float = 600.0  # of training; 0: no limit
    clock: str = "wall"  # wall, or cpu: processor time of this process
    warmdown_fraction: float = 0.2  # last part of the run over which the learning rate falls to 0
    matrix_lr: float = 0.04
    embed_lr: float = 0.05
    scalar_lr: float = 0.04
    muon_momentum: float = 0.95
    muon_momentum_warmup_steps: int = 500  # from 0.85
    muon_steps: int = 5
    train_log_every: int = 100
    compile_model: int = 0  # 1: torch.compile the loss (on a CPU if there is a C++ compiler), before the clock starts
    eval_stride: int = 0  # tokens that a window scores after its first; 0: windows side by side
    val_batch_tokens: int = 65536


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    # 0.49M weights, about 0.45 MB. Two CPU cores give some thousand steps of 4,096 tokens in 600 s.
    "mini": {
        "vocab_size": 1024, "model_dim": 80, "num_heads": 4, "num_kv_heads": 2, "train_seq_len": 512,
        "train_batch_tokens": 4096, "micro_batch_tokens": 4096, "muon_momentum_warmup_steps": 100,
        "warmdown_fraction": 0.5, "train_log_every": 20, "val_batch_tokens": 8192,
    },
}  # fmt: skip
DESCRIBED = (  # what an artifact says of its model
    *("vocab_size", "model_dim", "num_layers", "num_heads", "num_kv_heads", "mlp_mult", "logit_softcap"),
    *("train_seq_len", "eval_stride", "tokenizer"),
)


def parse_command(argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """Command line -> what to do and its options. Raises ConfigError for values that cannot be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", default="full", choices=sorted(PRESETS), help="named sizes")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished run")
    parser.add_argument("--score", default="", metavar="ARTIFACT", help="score an artifact, print one JSON object")
    parser.add_argument("--val", default="", metavar="GLOB", help="validation shards (default: those of data_path)")
    for f in dataclasses.fields(Config):
        parser.add_argument(f"--{f.name}", type=type(f.default), default=None, help=f"(default {f.default!r})")
    arguments = parser.parse_args(list(argv))
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Config)}
    options = PRESETS[arguments.preset] | {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(Config(), **options)
    check_config(config)
    return arguments, dataclasses.replace(config, run_id=config.run_id or f"baseline-{arguments.preset}-{config.seed}")


def check_config(c: Config) -> None:
    """Raises ConfigError."""
    for f in dataclasses.fields(Config):  # configurations come out of artifacts too
        value, kind = getattr(c, f.name), type(f.default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ConfigError(f"{f.name} is {value!r}; expected {kind.__name__}")
    may_be_zero = ("seed", "eval_stride", "compile_model")
    sizes = [f.name for f in dataclasses.fields(Config) if type(f.default) is int and f.name not in may_be_zero]
    rules = {
        f"{', '.join(sizes)} must be at least 1": all(getattr(c, name) > 0 for name in sizes),
        "model_dim must be an even multiple of num_heads": c.model_dim % max(2 * c.num_heads, 1) == 0,
        "num_kv_heads must divide num_heads": c.num_heads % max(c.num_kv_heads, 1) == 0,
        "train_seq_len must divide train_batch_tokens": c.train_batch_tokens % max(c.train_seq_len, 1) == 0,
        "eval_stride may not exceed train_seq_len": 0 <= c.eval_stride <= c.train_seq_len,
        "warmdown_fraction lies in [0, 1], seconds and seed are not negative":
            0 <= c.warmdown_fraction <= 1 and c.max_wallclock_seconds >= 0 and c.seed >= 0,
        "compile_model is 0 or 1": c.compile_model in (0, 1),
        "clock is wall or cpu, tokenizer bpe or byte": c.clock in ("wall", "cpu") and c.tokenizer in ("bpe", "byte"),
        "logit_softcap must be positive": 0 < c.logit_softcap < math.inf,
    }  # fmt: skip
    for rule, holds in rules.items():
        if not holds:
            raise ConfigError(f"contradictory options: {rule}")


def rotated(x_BHTP: Tensor) -> Tensor:
    """Rotary position code (Su et al. 2021), base 10000."""
    half = x_BHTP.shape[-1] // 2
    position_T = torch.arange(x_BHTP.shape[2], device=x_BHTP.device, dtype=torch.float32)
    angle_TP = position_T[:, None] * 10000.0 ** (-torch.arange(half, device=x_BHTP.device) / half)
    cos_TP, sin_TP = angle_TP.cos().to(x_BHTP.dtype), angle_TP.sin().to(x_BHTP.dtype)
    a, b = x_BHTP.split(half, dim=-1)
    return torch.cat([a * cos_TP - b * sin_TP, a * sin_TP + b * cos_TP], dim=-1)


class Block(nn.Module):
    """Grouped-query attention and a squared-ReLU feed-forward, each with a learned scale a channel."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.headdim = c.num_heads, c.num_kv_heads, c.model_dim // c.num_heads
        kv_width = c.num_kv_heads * self.headdim
        self.q = nn.Linear(c.model_dim, c.model_dim, bias=False)
        self.k = nn.Linear(c.model_dim, kv_width, bias=False)
        self.v = nn.Linear(c.model_dim, kv_width, bias=False)
        self.out = nn.Linear(c.model_dim, c.model_dim, bias=False)
        self.up = nn.Linear(c.model_dim, c.mlp_mult * c.model_dim, bias=False)
        self.down = nn.Linear(c.mlp_mult * c.model_dim, c.model_dim, bias=False)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)
        self.q_gain = nn.Parameter(torch.full((c.num_heads,), 1.5))
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.ones(c.model_dim)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(c.model_dim), torch.zeros(c.model_dim)]))

    def forward(self, x_BTD: Tensor, x0_BTD: Tensor) -> Tensor:
        batch, time_, width = x_BTD.shape
        x_BTD = self.resid_mix[0] * x_BTD + self.resid_mix[1] * x0_BTD
        u_BTD = rms_norm_torch(x_BTD, 1e-6)
        q, k, v = (
            layer(u_BTD).view(batch, time_, heads, self.headdim).transpose(1, 2)
            for layer, heads in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        q = rotated(rms_norm_torch(q, 1e-6)) * self.q_gain.to(q.dtype)[:, None, None]
        k = rotated(rms_norm_torch(k, 1e-6))
        gqa = self.kv_heads != self.heads
        attention = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=gqa)
        y_BHTP = in_default_products(attention, q, k, v)
        x_BTD = x_BTD + self.attn_scale * self.out(y_BHTP.transpose(1, 2).reshape(batch, time_, width))
        return x_BTD + self.mlp_scale * self.down(F.relu(self.up(rms_norm_torch(x_BTD, 1e-6))).square())


class Transformer(nn.Module):
    """Embedding, blocks with U-Net skips, tied head."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config, self.encoder_layers = c, c.num_layers // 2
        self.embed = nn.Embedding(c.vocab_size, c.model_dim)
        nn.init.normal_(self.embed.weight, std=0.005)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(self.encoder_layers, c.model_dim))

    def rows(self, ids_BT: Tensor) -> Tensor:
        """Token ids (B, T) -> what the tied head reads, (B * T, D)."""
        x_BTD = x0_BTD = rms_norm_torch(self.embed(ids_BT), 1e-12)
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i >= self.encoder_layers and skips:
                x_BTD = x_BTD + self.skip_weights[i - self.encoder_layers] * skips.pop()
            x_BTD = block(x_BTD, x0_BTD)
            if i < self.encoder_layers:
                skips.append(x_BTD)
        return rms_norm_torch(x_BTD, 1e-6).reshape(-1, x_BTD.shape[-1])

    def loss(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats."""
        rows, cap, y_N = self.rows(x_BT), self.config.logit_softcap, y_BT.reshape(-1)
        return softcap_xent_torch(rows, self.embed.weight.to(rows.dtype), None, y_N, cap=cap, kind="tanh")[0]

    def nll(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        """Nats of every target, float32 (B, T)."""
        rows, cap, y_N = self.rows(x_BT), self.config.logit_softcap, y_BT.reshape(-1)
        weight_VD = self.embed.weight.to(rows.dtype)
        return softcap_nll_torch(rows, weight_VD, None, y_N, cap=cap, kind="tanh", temperature=1.0).view(y_BT.shape)


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def export(path: Path, model: Transformer, tokenizer_sha256: str) -> None:
    """int8 matrices with a scale a row, bfloat16 vectors, the whole file under zlib."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        spec = GridSpec("int", bits=8) if tensor.ndim == 2 and "resid_mix" not in name else GridSpec("bf16")
        values = tensor.detach().float().cpu()
        codes, scales = quantize_torch(values, spec)
        tensors[name] = QuantizedTensor(spec, codes.numpy(), scales.numpy(), tuple(values.shape))
    described = {name: getattr(model.config, name) for name in DESCRIBED}
    meta = {"entry": "baseline", "config": described, "tokenizer_sha256": tokenizer_sha256}
    write_atomically(path, zlib.compress(encode_artifact(tensors, meta, ("raw",)), 9))


def load(path: Path, device: torch.device) -> tuple[Transformer, dict[str, Any]]:
    """Artifact -> fresh model and what the file says about itself. Raises ArtifactError or ConfigError."""
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(path.read_bytes(), ARTIFACT_LIMIT_BYTES)
    except zlib.error as error:
        raise ArtifactError(f"{path}: not zlib ({error}); expected an artifact of this entry") from error
    if not unpacker.eof or unpacker.unused_data:
        raise ArtifactError(f"{path}: truncated, extended or over {ARTIFACT_LIMIT_BYTES:,} bytes unpacked")
    stored, meta, _ = decode_artifact(data)
    described = meta.get("config")
    if meta.get("entry") != "baseline" or not isinstance(described, dict) or set(described) != {*DESCRIBED}:
        raise ConfigError(f"{path}: not an artifact of this entry; it says {str(meta)[:200]}")
    config = dataclasses.replace(Config(), train_batch_tokens=described["train_seq_len"], **described)
    check_config(config)
    if config.num_layers > len(stored):
        raise ConfigError(f"{path}: describes {config.num_layers} layers but holds {len(stored)} tensors")
    with torch.device("meta"):
        model = Transformer(config)
    weights = {n: torch.from_numpy(t if isinstance(t, np.ndarray) else dequantize(t)) for n, t in stored.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if expected != {name: tuple(tensor.shape) for name, tensor in weights.items()}:
        raise ConfigError(f"{path}: its tensors do not fit the model that it describes")
    model.load_state_dict(weights, strict=True, assign=True)
    return model.to(device).eval(), meta


def scoring_windows(targets: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first scored) of windows that score every target once; stride 0: side by side."""
    end = min(length, targets)
    yield 0, end, 0
    while end < targets:
        first, end = end, min(end + (stride or length), targets)
        yield (max(end - length, 0) if stride else first), end, first


@torch.inference_mode()
def stream_nll(model: Transformer, tokens: np.ndarray, c: Config, device: torch.device) -> np.ndarray:
    """Nats of tokens[1:], float64 (N - 1)."""
    ids_N = torch.from_numpy(tokens.astype(np.int64)).to(device)
    nll_N = torch.zeros(len(tokens) - 1, dtype=torch.float64, device=device)
    rows = max(1, c.val_batch_tokens // c.train_seq_len)
    by_width: dict[int, list[tuple[int, int, int]]] = {}
    for window in scoring_windows(len(tokens) - 1, c.train_seq_len, c.eval_stride):
        by_width.setdefault(window[1] - window[0], []).append(window)
    for windows in by_width.values():
        for i in range(0, len(windows), rows):
            group = windows[i : i + rows]
            x_BT = torch.stack([ids_N[start:end] for start, end, _ in group])
            y_BT = torch.stack([ids_N[start + 1 : end + 1] for start, end, _ in group])
            with autocast(device):
                nll_BT = model.nll(x_BT, y_BT)
            for row, (start, end, first) in enumerate(group):
                nll_N[first:end] = nll_BT[row, first - start :].double()
    return nll_N.cpu().numpy()


Tokenizer = ByteTokenizer | SentencePieceTokenizer


def open_tokenizer(c: Config, beside: Path) -> Tokenizer:
    return load_tokenizer("byte" if c.tokenizer == "byte" else beside / "tokenizer.model", vocab_size=c.vocab_size)


def score(model: Transformer, pattern: str, tokenizer: Tokenizer, c: Config, device: torch.device) -> dict[str, Any]:
    """Bits per byte of validation shards, of the text that their tokens spell."""
    started_s, shards = time.perf_counter(), list_shards(pattern)
    tokens = np.concatenate([open_shard(path, vocab_size=c.vocab_size, deep=True) for path in shards])
    nats = float(stream_nll(model, tokens, c, device).sum())
    if not math.isfinite(nats):
        raise GolfError(f"the score is not finite ({nats})")
    spelled = int(token_bytes(byte_table(tokenizer), tokens[:-1], tokens[1:]).sum())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in map(Path, shards))).hexdigest()
    return {
        "val_bpb": bits_per_byte(nats, spelled), "val_loss": nats / (len(tokens) - 1), "val_tokens": len(tokens) - 1,
        "val_bytes": spelled, "eval_mode": "sliding" if c.eval_stride else "standard", "val_sha256": digest,
        "byte_source": "decoded", "tokenizer_lossless": tokenizer.lossless, "tokenizer_sha256": tokenizer.sha256,
        "eval_s": time.perf_counter() - started_s,
    }  # fmt: skip


def score_artifact(path: Path, pattern: str, given: Config, device: torch.device) -> dict[str, Any]:
    """Score an artifact from nothing but the file, its tokenizer and the shards."""
    model, meta = load(path, device)
    c = dataclasses.replace(model.config, val_batch_tokens=given.val_batch_tokens, eval_stride=given.eval_stride)
    tokenizer = open_tokenizer(c, Path(list_shards(pattern)[0]).parent)
    if tokenizer.sha256 != meta["tokenizer_sha256"]:
        raise TokenizerError(f"{path} was trained with another tokenizer than the one beside {pattern}")
    found = score(model, pattern, tokenizer, c, device)
    data = path.read_bytes()
    return found | {"artifact_bytes": len(data), "artifact_sha256": hashlib.sha256(data).hexdigest()}


def compiled_loss(model: Transformer, c: Config, rows: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """`model.loss`, compiled for windows (rows, T) if it is asked for and there is a compiler; learns nothing."""
    obstacle = compile_obstacle(device) if c.compile_model else "not asked for"
    if obstacle:
        print(f"loss not compiled: {obstacle}", flush=True)
        return model.loss
    compiled, x_BT = torch.compile(model.loss), torch.zeros(rows, c.train_seq_len, dtype=torch.int64, device=device)
    with autocast(device):
        compiled(x_BT, x_BT.clone()).backward()
    model.zero_grad(set_to_none=True)
    return compiled


def train(c: Config, folder: Path, model: Transformer, loader: TokenLoader, device: torch.device) -> dict[str, Any]:
    """Train until steps or seconds are used up; every rank alike. Returns what summary.json says of it."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    matrices = [p for block in model.blocks for p in block.parameters() if p.ndim == 2 and p is not block.resid_mix]
    own = {id(p) for p in (*matrices, model.embed.weight)}
    scalars = [p for p in model.parameters() if id(p) not in own]
    muon = Muon(matrices, lr=c.matrix_lr, momentum=c.muon_momentum, steps=c.muon_steps)
    adam = torch.optim.Adam(
        [{"params": [model.embed.weight], "lr": c.embed_lr}, {"params": scalars, "lr": c.scalar_lr}],
        betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    rates = [(group, group["lr"]) for optimizer in (muon, adam) for group in optimizer.param_groups]
    now = time.process_time if c.clock == "cpu" else time.perf_counter
    micro = max(1, c.micro_batch_tokens // c.train_seq_len)
    loss_of = compiled_loss(model, c, min(micro, c.train_batch_tokens // c.train_seq_len // world), device)
    step, elapsed_s, last_s, started_s = 0, 0.0, 0.0, now()
    while step < c.iterations and not 0 < c.max_wallclock_seconds <= elapsed_s + last_s:
        done = max(step / c.iterations, elapsed_s / c.max_wallclock_seconds if c.max_wallclock_seconds else 0.0)
        scale = min((1 - done) / c.warmdown_fraction, 1.0) if c.warmdown_fraction else 1.0
        for group, lr in rates:
            group["lr"] = lr * scale
        share = min(step / c.muon_momentum_warmup_steps, 1.0)
        muon.param_groups[0]["momentum"] = (1 - share) * 0.85 + share * c.muon_momentum
        batch = loader.next_batch()
        x_BT, y_BT = (torch.from_numpy(a).to(device) for a in (batch.x_BT, batch.y_BT))
        rows, loss = len(x_BT), torch.zeros((), device=device)
        for i in range(0, rows, micro):
            with autocast(device):
                part = loss_of(x_BT[i : i + micro], y_BT[i : i + micro]) * (len(x_BT[i : i + micro]) / rows)
            part.backward()
            loss += part.detach()
        for p in model.parameters():
            if world > 1 and p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= world
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        reading = torch.tensor([now() - started_s], dtype=torch.float64, device=device)
        if world > 1:
            dist.broadcast(reading, src=0)
        step, last_s, elapsed_s = step + 1, float(reading) - elapsed_s, float(reading)
        if rank == 0 and (step % c.train_log_every == 0 or step == 1):
            tokens = step * c.train_batch_tokens
            event = {"event": "step", "step": step, "elapsed_s": elapsed_s, "tokens": tokens, "lr_scale": scale}
            event |= {"loss": float(loss), "ce": float(loss), "tokens_per_s": tokens / elapsed_s}
            print(f"step {step} loss {event['loss']:.4f} {event['tokens_per_s']:,.0f} tokens/s", flush=True)
            with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(event) + "\n")
    return {"steps": step, "tokens": step * c.train_batch_tokens, "train_s": elapsed_s, "world_size": world}


def run(arguments: argparse.Namespace, c: Config, device: torch.device, rank: int, world: int) -> None:
    """One run from the start to `summary.json`; an unfinished one starts over."""
    folder, pattern = Path(c.runs_dir) / c.run_id, arguments.val or str(Path(c.data_path) / "*_val_*.bin")
    if (folder / "summary.json").exists() and not arguments.overwrite:
        raise ConfigError(f"{folder} is finished; use another --run_id or --overwrite")
    tokenizer = open_tokenizer(c, Path(c.data_path))
    torch.manual_seed(c.seed)
    model = Transformer(c).to(device)
    loader = TokenLoader(
        list_shards(str(Path(c.data_path) / "*_train_*.bin")), seq_len=c.train_seq_len, rank=rank, world_size=world,
        batch_sequences=c.train_batch_tokens // c.train_seq_len, seed=c.seed, bos_id=tokenizer.bos_id,
        vocab_size=c.vocab_size,
    )  # fmt: skip
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").unlink(missing_ok=True)
        record = {"preset": arguments.preset, "config": dataclasses.asdict(c)}
        write_atomically(folder / "config.json", json.dumps(record, indent=1).encode())
        write_atomically(folder / "log.jsonl", b"")
        write_atomically(folder / "train.log", Path(__file__).read_bytes())
    found = train(c, folder, model, loader, device)
    if rank != 0:
        return
    floating = score(model.eval(), pattern, tokenizer, c, device)
    export(folder / "model.artifact", model, tokenizer.sha256)
    scored = score_artifact(folder / "model.artifact", pattern, c, device)
    summary = scored | found | {
        "float_val_bpb": floating["val_bpb"], "quantization_gap_bpb": scored["val_bpb"] - floating["val_bpb"],
        "params": sum(p.numel() for p in model.parameters()), "clock": c.clock, "seed": c.seed,
        "preset": arguments.preset, "config": dataclasses.asdict(c),
        "code_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "environment": {
            "torch": torch.__version__, "threads": torch.get_num_threads(), "cpus": os.cpu_count(),
            "processor": processor_name(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(world)] if device.type == "cuda" else [],
        },
    }  # fmt: skip
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1).encode())
    print(f"{folder}: val_bpb {scored['val_bpb']:.4f} (read back), {scored['artifact_bytes']:,} bytes of weights")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (2 for input that cannot be used)."""
    given = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    rank, world, local = (int(os.environ.get(name, default)) for name, default in given)
    try:
        arguments, config = parse_command(sys.argv[1:] if argv is None else argv)
        cuda = config.device != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if not cuda:
            tune_cpu_process()  # as the other entries have it: an opponent is not slower than it must be
        if arguments.score:
            pattern = arguments.val or str(Path(config.data_path) / "*_val_*.bin")
            print(json.dumps(score_artifact(Path(arguments.score), pattern, config, device)))
            return 0
        if world > 1:
            dist.init_process_group("nccl" if cuda else "gloo")
        try:
            run(arguments, config, device, rank, world)
        finally:
            if world > 1:
                dist.destroy_process_group()
    except GolfError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
