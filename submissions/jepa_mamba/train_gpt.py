"""JEPA + Mamba-2 language model: train, export and score one parameter-golf entry.

    torchrun --standalone --nproc_per_node=8 submissions/jepa_mamba/train_gpt.py      # the published configuration
    python submissions/jepa_mamba/train_gpt.py --preset demo --data_path data/stdlib  # two CPU cores, minutes
    python submissions/jepa_mamba/train_gpt.py --score model.artifact --val 'data/stdlib/*_val_*.bin'

Tokens -> embedding -> [Mamba-2 or attention + feed-forward] x L with U-Net skips -> h -> tied head -> cross-entropy.
Training only: h -> projector -> z; a predictor rolls z forward (JEPA, mean squared error) while SIGReg keeps z Gaussian
(LeWorldModel, Maes et al. 2026). Neither enters the artifact.

How the parts fit together:
  * Optimizers move float32 *masters*. The model holds *compute weights*: the masters after the quantizer, in the
    compute dtype. `Masters.publish` writes them once a step, so training, validation and export see one and the same
    grid.
  * Everything random is a function of (seed, step): a checkpoint needs no generator state, a resumed run is the run.
  * The clock counts every second that can teach the model: steps, moving averages, temperature search. Its readings
    are in the log, and a run that is given them (`clock_from`) repeats the run that took them bit for bit.
  * A score is a result only if it was read back from the artifact on disk (`summary.json`: val_bpb).

Letters of shape suffixes: B batch, T time, D model dim, E embedding dim, V vocabulary, N = B*T rows, H heads, P head
dim, G state groups, S remembered tokens, U = S + T, C convolution channels, I inner width, M projections, K top k.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import difflib
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from common.artifact.budget import CHALLENGE_BUDGET_BYTES, SizeReport, check_budget, format_size_table
from common.artifact.container import encode_artifact, load_artifact, save_artifact
from common.causal_conv1d.package_impl import causal_conv1d_package
from common.causal_conv1d.torch_impl import causal_conv1d_torch
from common.causal_conv1d.triton_impl import causal_conv1d_triton
from common.console import TrainingConsole, peak_memory_bytes, progress_text
from common.cpu import compile_obstacle, in_default_products, processor_name, tune_cpu_process
from common.errors import (
    CheckpointError,
    ConfigError,
    GolfError,
    ShardError,
    StorageError,
    TokenizerError,
    TrainingError,
)
from common.files import remove_temporaries, storing, sync_folder, write_atomically
from common.gated_norm.torch_impl import gated_rms_norm_torch
from common.gated_norm.triton_impl import gated_rms_norm_triton
from common.optim.muon import NEWTON_SCHULZ_POLYNOMIALS, Muon, newton_schulz_torch
from common.optim.triton_impl import newton_schulz_triton
from common.quant.gptq import LayerStatistics
from common.quant.grid import GridSpec, QuantizedTensor, dequantize
from common.quant.plan import FREE_STEP_GRID, ModelPlan, TrainedSteps, fit_model
from common.quant.torch_impl import fake_quantize_torch, quantize_torch
from common.quant.triton_impl import FakeQuantizeAll
from common.relu2_ffn.torch_impl import relu2_ffn_torch
from common.relu2_ffn.triton_impl import relu2_ffn_triton
from common.rms_norm import rms_norm_torch
from common.sigreg.torch_impl import sigreg_floor, sigreg_torch
from common.sigreg.triton_impl import sigreg_triton
from common.softcap_xent.torch_impl import softcap_nll_torch, softcap_torch, softcap_xent_torch
from common.softcap_xent.triton_impl import softcap_nll_triton, softcap_xent_triton
from common.ssd.mamba_ssm_impl import ssd_scan_mamba_ssm
from common.ssd.torch_impl import ssd_scan_torch
from common.ssd.triton_impl import ssd_scan_triton
from common.text.bpb import ByteTable, bits_per_byte, byte_table, token_bytes
from common.text.loader import TokenLoader
from common.text.shards import list_shards, open_shard
from common.text.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer
from common.triton_support import triton_obstacle

Tokenizer = ByteTokenizer | SentencePieceTokenizer

# `scripts/bundle.py` writes the chosen preset here, so that the single file needs no preset folder.
BUNDLED_PRESET: dict[str, Any] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------


def option(default: Any, doc: str, choices: tuple[Any, ...] | None = None) -> Any:
    return field(default=default, metadata={"doc": doc, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every option of a run, set by preset < environment (upper case) < flag; defaults are the published BPE run."""

    # Run
    run_id: str = option("", "name of the run folder; empty: PRESET-seedSEED")
    runs_dir: str = option("runs", "folder that holds run folders")
    seed: int = option(42, "seed of initialisation, data order and every random draw")
    device: str = option("auto", "auto: CUDA where there is one", ("auto", "cpu", "cuda"))
    kernels: str = option(
        "auto",
        "triton: ours; mamba_ssm: packages for scan and convolution; torch: plain. auto: packages if installed",
        ("auto", "triton", "mamba_ssm", "torch"),
    )
    compile_model: bool = option(
        False, "torch.compile the loss (on a CPU if there is a C++ compiler); the warmup steps pay for it"
    )
    cuda_graphs: bool = option(False, "capture the whole step in a CUDA graph and replay it")
    budget_bytes: int = option(CHALLENGE_BUDGET_BYTES, "code + artifact may not exceed this; 0: no limit")
    clock: str = option(
        "wall", "wall: seconds that pass; cpu: seconds of processor time, whatever else runs", ("wall", "cpu")
    )
    clock_from: str = option("", "run folder whose clock readings decide instead of new ones: the same run again")
    # Data
    tokenizer: str = option("bpe", "byte: 256 byte values; bpe: a SentencePiece model", ("byte", "bpe"))
    tokenizer_path: str = option("", "SentencePiece model; empty: DATA_PATH/tokenizer.model")
    data_path: str = option("./data/datasets/fineweb10B_sp8192", "folder of *_train_*.bin and *_val_*.bin shards")
    vocab_size: int = option(8192, "rows of the embedding; the tokenizer may not have more")
    # Backbone
    model_dim: int = option(640, "width of the residual stream")
    num_layers: int = option(10, "blocks; the first half feeds U-Net skips to the second")
    d_state: int = option(64, "state dimension of the scan")
    d_conv: int = option(4, "taps of the causal convolution")
    expand: int = option(1, "inner width of the scan over model_dim")
    headdim: int = option(64, "channels that share one decay in the scan")
    ngroups: int = option(1, "groups of B and C")
    chunk_size: int = option(64, "tokens a chunk of the scan (speed only)")
    a_init_min: float = option(1.0, "decay rates start uniform in (a_init_min, a_init_max)")
    a_init_max: float = option(16.0, "see a_init_min")
    dt_init_min: float = option(0.001, "step sizes start log-uniform in (dt_init_min, dt_init_max)")
    dt_init_max: float = option(0.1, "see dt_init_min")
    attn_layers: str = option("", "comma-separated blocks whose mixer is causal attention instead of the scan")
    attn_headdim: int = option(64, "head dimension of attention layers")
    attn_window: int = option(0, "tokens an attention layer sees; 0: train_seq_len")
    dt_apart: bool = option(False, "dt has a matrix of its own instead of rows of in_proj, kept at 8 bits")
    repeat_blocks: str = option("", "comma-separated neighbouring blocks that run a second time, with the same weights")
    parallel_residual: bool = option(False, "mixer and feed-forward of a block read the same input")
    mlp_mult: int = option(4, "feed-forward width over model_dim; 0: no feed-forward")
    mlp_every: int = option(2, "every n-th block has a feed-forward, from block 0")
    activation: str = option("relu2", "feed-forward activation", ("relu2", "leaky_relu2", "swiglu"))
    unet_skips: bool = option(True, "second half of the blocks adds weighted outputs of the first half")
    x0_mix: bool = option(True, "each block mixes the embedding back into its input")
    document_reset: bool = option(False, "state and attention restart at every document")
    # Embedding and head
    embed_dim: int = option(336, "width of the factored embedding; 0: model_dim")
    embed_init_std: float = option(0.02, "standard deviation of the initial embedding")
    bigram_buckets: int = option(0, "rows of a table of hashed token pairs that is added to the embedding; 0: none")
    bigram_dim: int = option(32, "width of that table")
    tie_embeddings: int = option(
        1, "0 own head; 1 tied; 2 tied + learned correction; 3 tied + GELU adapter", (0, 1, 2, 3)
    )
    vocab_bias: bool = option(True, "learned bias per token")
    logit_softcap: float = option(15.0, "logits stay within +-this; 0: off")
    softcap_type: str = option("poly", "poly: degree-5 approximation of tanh", ("poly", "tanh"))
    # Objectives
    ce_weight: float = option(1.0, "weight of cross-entropy + z-loss")
    z_loss: float = option(1e-4, "weight of the mean squared log-partition")
    jepa_weight: float = option(1.0, "weight of latent prediction; 0 with sigreg_lambda 0 removes its modules")
    jepa_steps: int = option(3, "latent rollout length")
    projector_type: str = option("linear", "h -> z", ("linear", "mlp"))
    predictor_hidden_mult: int = option(4, "hidden width of the predictor over model_dim")
    jepa_stride: int = option(1, "tokens that one step of the rollout goes ahead")
    jepa_layer: int = option(0, "z is made after this many blocks; 0: of the final hidden state")
    jepa_until: float = option(0.0, "latent prediction and SIGReg fade to 0 by this fraction of the run; 0: they stay")
    jepa_shuffle: bool = option(False, "placebo: the targets are latents of other positions of other windows")
    detach_targets: bool = option(False, "stop the gradient at the predicted z")
    sigreg_lambda: float = option(1.0, "weight of SIGReg")
    sigreg_mode: str = option("timestep", "statistic per position or over all positions", ("timestep", "pooled"))
    sigreg_form: str = option(
        "waves", "waves: sliced test of the distribution; covariance: of its two moments", ("waves", "covariance")
    )
    sigreg_timesteps: int = option(64, "positions drawn a step for SIGReg; 0: all")
    sigreg_knots: int = option(17, "quadrature knots of SIGReg")
    sigreg_num_proj: int = option(0, "random projections of SIGReg; 0: twice the embedding width")
    sigreg_schedule: bool = option(False, "ramp sigreg_lambda from 0 over the first 30% of the run")
    # Training
    train_seq_len: int = option(1024, "tokens a training window")
    seq_len_start: int = option(0, "windows start at this length and double up to train_seq_len; 0: no schedule")
    seq_len_full_at: float = option(0.5, "fraction of the run from which windows have train_seq_len")
    train_batch_tokens: int = option(524288, "tokens a step over all ranks")
    batch_tokens_start: int = option(0, "batches start at these and double up to train_batch_tokens; 0: no schedule")
    batch_full_at: float = option(0.5, "fraction of the run from which batches have train_batch_tokens")
    micro_batch_tokens: int = option(65536, "tokens a forward pass of one rank at most")
    iterations: int = option(100000, "steps at most")
    max_wallclock_seconds: float = option(600.0, "training seconds at most, counting all that learns; 0: no limit")
    warmup_steps: int = option(10, "steps that compile and warm caches; all state is then restored bit for bit")
    lr_warmup_steps: int = option(0, "steps of linear learning-rate warmup")
    warmdown_fraction: float = option(0.15, "last fraction of the run over which the learning rate falls to 0")
    warmdown_by: str = option(
        "auto", "progress by steps or wall clock; auto: wall clock if it is limited", ("auto", "steps", "time")
    )
    # Optimizers
    matrix_lr: float = option(0.02, "Muon, matrices")
    scalar_lr: float = option(0.01, "AdamW, vectors and convolution")
    embed_lr: float = option(0.01, "AdamW, embedding")
    muon_momentum: float = option(0.95, "Muon momentum after its warmup")
    muon_momentum_warmup_start: float = option(0.85, "Muon momentum at step 0")
    muon_momentum_warmup_steps: int = option(500, "steps of momentum warmup")
    muon_backend_steps: int = option(3, "Newton-Schulz iterations")
    muon_normalize_rows: bool = option(True, "rows of the momentum have one size before Newton-Schulz (MuonEq-R)")
    muon_polynomial: str = option("jordan", "coefficients of Newton-Schulz", ("jordan", "polar_express"))
    muon_split_in_proj: bool = option(False, "orthogonalise the z, x, B, C, dt rows of in_proj apart")
    muon_wd: float = option(0.04, "decoupled weight decay of matrices")
    adam_wd: float = option(0.05, "decoupled weight decay of the embedding; vectors have none")
    beta1: float = option(0.9, "AdamW")
    beta2: float = option(0.95, "AdamW")
    adam_eps: float = option(1e-8, "AdamW")
    grad_clip_norm: float = option(1.0, "global gradient norm at most; 0: off")
    nonfinite_limit: int = option(10, "steps whose gradient is not finite, and counts as zero, before the run stops")
    ema_decay: float = option(0.0, "moving average of the weights, which then ships; 0: off")
    ema_start_fraction: float = option(0.5, "fraction of the run after which averaging starts")
    # Quantization
    quant_bits: int = option(4, "bits of large matrices", (4, 5, 6, 8))
    quant_clip: float = option(0.0, "largest code at this many standard deviations of the row; 0: at its maximum")
    fp_storage: str = option("FP8", "storage of the embedding", ("FP8", "INT8", "BF16"))
    qat_fraction: float = option(1.0, "last fraction of the run that trains on the quantized grid")
    free_steps: bool = option(False, "ship matrices and embedding on steps chosen to fill artifact_bytes")
    free_qat_fraction: float = option(0.0, "last fraction of the run that trains on those steps; 0: chosen at the end")
    trellis: bool = option(False, "with free_steps, ship on two interleaved grids: less loss, takes longer")
    artifact_bytes: int = option(0, "size of the artifact with free_steps; 0: budget_bytes less this code")
    statistics_tokens: int = option(65536, "training tokens that show what a rounding error costs")
    rate: float = option(0.25, "weight of the entropy coder's cost in rounding with free_steps")
    save_statistics: bool = option(False, "keep float weights and statistics for `python -m common.artifact budget`")
    # Validation and scoring
    val_loss_every: int = option(5000, "steps between validations of the weights that would ship; 0: only at the end")
    val_max_tokens: int = option(0, "tokens of a periodic validation; 0: all. Final scores always cover all")
    val_batch_size: int = option(65536, "tokens a forward pass of scoring, per rank")
    eval_modes: str = option("standard", "comma-separated: standard, sliding, carried, ttt; the first gives val_bpb")
    eval_seq_len: int = option(0, "tokens a scoring window; 0: train_seq_len")
    sliding_eval_stride: int = option(16, "tokens scored a sliding window")
    eval_lanes: int = option(8, "documents scored side by side in carried mode (needs document_reset)")
    eval_seconds: float = option(600.0, "a mode that would take longer is refused; 0: no limit")
    eval_tokens_per_s: float = option(0.0, "tokens that the declared hardware computes a second; 0: measured here")
    ttt_lr: float = option(0.01, "ttt: step size of the stochastic gradient descent on scored text")
    ttt_chunk_tokens: int = option(8192, "ttt: tokens that are scored, then learned from, at a time")
    temp_scaling: bool = option(True, "search a softmax temperature on training text, inside the clock")
    temp_calib_tokens: int = option(65536, "training tokens of the temperature search")
    jepa_diagnostics: bool = option(True, "measure the latent space at the end")
    latent_log_every: int = option(0, "steps between measurements of the latent objectives, off the clock; 0: none")
    # Logs and checkpoints
    train_log_every: int = option(100, "steps between log lines")
    checkpoint_every: int = option(0, "steps between checkpoints; 0: none")
    checkpoint_keep: int = option(2, "checkpoints kept")

    def attention_blocks(self) -> frozenset[int]:
        return frozenset(int(i) if i.strip().isdecimal() else -1 for i in self.attn_layers.split(",") if i.strip())

    def block_order(self) -> tuple[int, ...]:
        """Blocks as they run: those of repeat_blocks a second time after their last."""
        again = [int(i) for i in self.repeat_blocks.split(",") if i.strip()]
        last = again[-1] + 1 if again else self.num_layers
        return (*range(last), *again, *range(last, self.num_layers))

    def modes(self) -> list[str]:
        return [mode.strip() for mode in self.eval_modes.split(",") if mode.strip()]

    @property
    def jepa_on(self) -> bool:
        return self.jepa_weight > 0 or self.sigreg_lambda > 0

    @property
    def effective_embed_dim(self) -> int:
        return self.embed_dim or self.model_dim

    @property
    def window(self) -> int:
        return self.attn_window or self.train_seq_len

    @property
    def drawn_tokens(self) -> int:
        """Tokens of a loader's batch, over all ranks; a step takes a whole number of these."""
        return self.batch_tokens_start or self.train_batch_tokens


# What the model of an artifact is: everything else is about how it was trained.
MODEL_FIELDS = (
    *("vocab_size", "model_dim", "num_layers", "d_state", "d_conv", "expand", "headdim", "ngroups", "attn_layers"),
    *("attn_headdim", "attn_window", "mlp_mult", "mlp_every", "activation", "unet_skips", "x0_mix", "document_reset"),
    *("dt_apart", "repeat_blocks", "parallel_residual", "bigram_buckets", "bigram_dim"),
    *("embed_dim", "tie_embeddings", "vocab_bias", "logit_softcap", "softcap_type", "train_seq_len"),
)
SCORING_FIELDS = ("eval_modes", "eval_seq_len", "sliding_eval_stride", "ttt_lr", "ttt_chunk_tokens")
# What may differ between a run and its resumption.
RESUME_FREE_FIELDS = frozenset(
    {
        *("runs_dir", "device", "kernels", "compile_model", "cuda_graphs", "data_path", "tokenizer_path"),
        "micro_batch_tokens",
        *("eval_seconds", "eval_tokens_per_s", "latent_log_every"),
        "nonfinite_limit",
        *("val_batch_size", "train_log_every", "checkpoint_every", "checkpoint_keep", "eval_lanes", "warmup_steps"),
    }
)
EVAL_MODES = ("standard", "sliding", "carried", "ttt")
PRESETS_FOLDER = "presets"


def parse_value(name: str, text: str, origin: str) -> Any:
    """Text of a flag or variable -> value of the option's type. Raises ConfigError."""
    kind = type(next(f for f in fields(Config) if f.name == name).default)
    if kind is bool:
        lowered = text.strip().lower()
        if lowered in ("1", "true", "yes", "on"):
            return True
        if lowered in ("0", "false", "no", "off"):
            return False
        raise ConfigError(f"{origin}: {name} is {text!r}; it is a switch: give 1 or 0")
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{origin}: {name} is {text!r}; give {'an integer' if kind is int else 'a number'}") from None


def nearest(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {match[0]}?" if match else ""


def read_preset(path: str) -> dict[str, Any]:
    """Options of a preset file: a Python file whose one statement after the docstring is `PRESET = {literals}`.

    Read as a literal, never executed. Raises ConfigError.
    """
    file = Path(path)
    if not file.suffix:  # a bare name means a file of ours
        file = Path(__file__).resolve().parent / PRESETS_FOLDER / f"{path}.py"
    if not file.is_file():
        known = sorted(p.stem for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        raise ConfigError(f"preset {path}: {file} does not exist; presets here: {', '.join(known) or 'none'}")
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        values = next(
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PRESET"
        )
    except (SyntaxError, ValueError, StopIteration) as error:
        raise ConfigError(f"preset {file}: expected one `PRESET = {{...}}` of literals ({error})") from None
    known = [f.name for f in fields(Config)]
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"preset {file}: unknown option {name!r}{nearest(name, known)}")
        values[name] = parse_value(name, str(value), f"preset {file}")
    return values


def environment_options(environ: Mapping[str, str]) -> dict[str, Any]:
    """Options set by upper-case environment variables. A near miss of an option's name is an error (ConfigError)."""
    known = [f.name for f in fields(Config)]
    upper = {name.upper(): name for name in known}
    ignored = {name.strip() for name in environ.get("GOLF_IGNORE_ENV", "").split(",")}
    values = {}
    for variable, text in environ.items():
        if variable in upper:
            values[upper[variable]] = parse_value(upper[variable], text, f"environment variable {variable}")
        elif variable not in ignored and variable.isupper():
            match = difflib.get_close_matches(variable, list(upper), n=1, cutoff=0.88)
            if match:
                raise ConfigError(
                    f"environment variable {variable}={text!r} is not an option but looks like {match[0]}; rename or "
                    f"unset it, or, if it is none of ours, set GOLF_IGNORE_ENV={variable}"
                )
    return values


AT_LEAST_ONE = (
    *("vocab_size", "model_dim", "num_layers", "d_state", "expand", "headdim", "ngroups", "chunk_size", "attn_headdim"),
    *(
        "bigram_dim",
        "train_seq_len",
        "train_batch_tokens",
        "micro_batch_tokens",
        "iterations",
        "muon_backend_steps",
        "checkpoint_keep",
    ),
    *("val_batch_size", "sliding_eval_stride", "eval_lanes", "temp_calib_tokens", "predictor_hidden_mult"),
    *("jepa_stride", "ttt_chunk_tokens"),
)


def check_config(config: Config) -> None:
    """Refuse values that cannot be and contradictions, before anything is built. Raises ConfigError.

    Configurations come from artifacts of strangers too, so types are checked like everything else.
    """
    for f in fields(Config):
        value, kind, choices = getattr(config, f.name), type(f.default), f.metadata["choices"]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ConfigError(f"{f.name} is {value!r}; expected {kind.__name__}")
        if choices and value not in choices:
            raise ConfigError(f"{f.name} is {value!r}; choose one of {', '.join(map(str, choices))}")
        least = 1 if f.name in AT_LEAST_ONE else 0
        if kind in (int, float) and not least <= value < 2**53:
            raise ConfigError(f"{f.name} is {value}; it must be finite and at least {least}")
    c, layers = config, config.attention_blocks()
    again = [int(i) if i.strip().isdecimal() else -1 for i in c.repeat_blocks.split(",") if i.strip()]
    rules = [
        ((c.expand * c.model_dim) % c.headdim == 0, "headdim must divide expand * model_dim"),
        ((c.expand * c.model_dim // c.headdim) % c.ngroups == 0, "ngroups must divide the number of heads"),
        (c.d_conv > 1, "d_conv must be at least 2"),
        (c.sigreg_knots > 1, "sigreg_knots must be at least 2"),
        (c.drawn_tokens % c.train_seq_len == 0, "train_seq_len must divide train_batch_tokens (or batch_tokens_start)"),
        (not layers or c.model_dim % c.attn_headdim == 0, "attn_headdim must divide model_dim"),
        (all(0 <= i < c.num_layers for i in layers), "attn_layers are block numbers that must lie below num_layers"),
        (c.tokenizer != "byte" or c.vocab_size == 256, "byte mode has a vocabulary of 256"),
        (c.ce_weight > 0 or c.jepa_on, "at least one objective must have weight"),
        (
            c.jepa_weight == 0 or 0 < c.jepa_steps * c.jepa_stride < (c.seq_len_start or c.train_seq_len),
            "0 < jepa_steps * jepa_stride < train_seq_len (or seq_len_start)",
        ),
        (c.jepa_layer <= c.num_layers, "jepa_layer may not exceed num_layers"),
        (
            not again or (again == list(range(again[0], again[-1] + 1)) and again[0] >= 0 and again[-1] < c.num_layers),
            "repeat_blocks are block numbers below num_layers, one after the other",
        ),
        (
            can_double(c.seq_len_start, c.train_seq_len) and can_double(c.batch_tokens_start, c.train_batch_tokens),
            "train_seq_len and train_batch_tokens must be seq_len_start and batch_tokens_start times a power of two",
        ),
        (max(c.jepa_until, c.seq_len_full_at, c.batch_full_at) <= 1, "fractions lie in [0, 1]"),
        (not c.clock_from or c.max_wallclock_seconds > 0, "clock_from needs the max_wallclock_seconds of that run"),
        (c.warmdown_by != "time" or c.max_wallclock_seconds > 0, "warmdown_by=time needs max_wallclock_seconds"),
        (c.warmdown_fraction <= 1 and c.qat_fraction <= 1 and c.ema_start_fraction <= 1, "fractions lie in [0, 1]"),
        (c.free_steps or not c.trellis, "trellis needs free_steps"),
        (c.free_qat_fraction <= c.qat_fraction, "free_qat_fraction may not exceed qat_fraction"),
        (c.ema_decay < 1 and c.muon_momentum < 1, "ema_decay and muon_momentum lie below 1"),
        (bool(c.modes()) and set(c.modes()) <= set(EVAL_MODES), f"eval_modes are of {', '.join(EVAL_MODES)}"),
        (
            c.sliding_eval_stride <= (c.eval_seq_len or c.train_seq_len) or "sliding" not in c.modes(),
            "sliding_eval_stride may not exceed the scoring window",
        ),
        (c.a_init_max > c.a_init_min > 0, "0 < a_init_min < a_init_max"),
        (c.dt_init_max > c.dt_init_min > 0, "0 < dt_init_min < dt_init_max"),
    ]
    for holds, rule in rules:
        if not holds:
            raise ConfigError(f"contradictory options: {rule}")


class Command(NamedTuple):
    """What the command line asks for."""

    config: Config
    preset: str
    overwrite: bool
    score: str
    generate: str
    val: str
    prompt: str
    tokens: int
    given: frozenset[str]  # options set by preset file, environment or flag; a bundled preset is a default
    log_json: bool


class CommandParser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists all)")


def parse_command(argv: Sequence[str], environ: Mapping[str, str]) -> Command:
    """Command line + environment -> Command. Raises ConfigError; `--help` prints every option and exits."""
    parser = CommandParser(
        prog="train_gpt.py",
        description=(__doc__ or "").split("\n")[0],
        allow_abbrev=False,
        epilog="Every option can also be set by an environment variable of the same name in upper case.",
    )
    action = parser.add_argument_group("what to do (default: train, export, score)")
    action.add_argument("--preset", default=environ.get("PRESET", ""), help="name in presets/ or path of a preset file")
    overwrite = "start over where the run folder is finished or of another configuration; unfinished runs still resume"
    action.add_argument("--overwrite", action="store_true", help=overwrite)
    action.add_argument("--log_json", "--log-json", action="store_true", help="print log entries as JSON, nothing else")
    action.add_argument("--score", default="", metavar="ARTIFACT", help="score an artifact and print one JSON object")
    action.add_argument("--val", default="", metavar="GLOB", help="validation shards for --score")
    action.add_argument(
        "--generate", default="", metavar="ARTIFACT", help="continue --prompt with the artifact's model"
    )
    action.add_argument("--prompt", default="", help="text that --generate continues")
    action.add_argument("--tokens", type=int, default=200, help="tokens that --generate writes")
    options = parser.add_argument_group("options")
    known = [f.name for f in fields(Config)]
    for f in fields(Config):
        choices = f.metadata["choices"]
        choice = f" [{', '.join(map(str, choices))}]" if choices else ""
        doc = f"{f.metadata['doc']}{choice} (default {f.default!r})".replace("%", "%%")
        options.add_argument(f"--{f.name}", metavar=type(f.default).__name__.upper(), default=None, help=doc)
    arguments, unknown = parser.parse_known_args(list(argv))
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-")
        known += ["preset", "overwrite", "log_json", "score", "val", "generate", "prompt", "tokens"]
        raise ConfigError(
            f"unknown argument {unknown[0]!r}{nearest(name, [f'--{k}' for k in known])} (--help lists all)"
        )

    values: dict[str, Any] = {}
    preset = arguments.preset or ("bundled" if BUNDLED_PRESET else "")
    if arguments.preset:
        values.update(read_preset(arguments.preset))
    values.update(environment_options(environ))
    for f in fields(Config):
        text = getattr(arguments, f.name)
        if text is not None:
            values[f.name] = parse_value(f.name, text, f"flag --{f.name}")
    config = replace(Config(), **{**(BUNDLED_PRESET or {}), **values})
    if not config.run_id:
        config = replace(config, run_id=f"{Path(preset).stem or 'seed_bpe'}-seed{config.seed}")
    check_config(config)
    return Command(
        config,
        preset,
        arguments.overwrite,
        arguments.score,
        arguments.generate,
        arguments.val,
        arguments.prompt,
        arguments.tokens,
        frozenset(values),
        arguments.log_json,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


class Kernels(NamedTuple):
    """The implementations that a run uses, chosen once and written to the log; each by its contract in `common`."""

    name: str
    reason: str
    ssd_scan: Callable[..., tuple[Tensor, Tensor]]
    causal_conv1d: Callable[..., tuple[Tensor, Tensor]]
    gated_rms_norm: Callable[..., Tensor]
    relu2_ffn: Callable[..., Tensor]
    softcap_xent: Callable[..., tuple[Tensor, Tensor, Tensor]]
    softcap_nll: Callable[..., Tensor]
    sigreg: Callable[..., Tensor]
    newton_schulz: Callable[..., Tensor]
    quantize_at_once: bool  # all compute weights from all masters in one launch


def select_kernels(choice: str, device: torch.device) -> Kernels:
    """`--kernels` -> implementations. Raises ConfigError when an explicit choice cannot be had."""
    torch_forms = Kernels(
        name="torch",
        reason="asked for",
        ssd_scan=ssd_scan_torch,
        causal_conv1d=causal_conv1d_torch,
        gated_rms_norm=gated_rms_norm_torch,
        relu2_ffn=relu2_ffn_torch,
        softcap_xent=softcap_xent_torch,
        softcap_nll=softcap_nll_torch,
        sigreg=sigreg_torch,
        newton_schulz=newton_schulz_torch,
        quantize_at_once=False,
    )
    package_forms = torch_forms._replace(
        name="mamba_ssm", ssd_scan=ssd_scan_mamba_ssm, causal_conv1d=causal_conv1d_package
    )
    triton_forms = Kernels(
        name="triton",
        reason="asked for",
        ssd_scan=ssd_scan_triton,
        causal_conv1d=causal_conv1d_triton,
        gated_rms_norm=gated_rms_norm_triton,
        relu2_ffn=relu2_ffn_triton,
        softcap_xent=softcap_xent_triton,
        softcap_nll=softcap_nll_triton,
        sigreg=sigreg_triton,
        newton_schulz=newton_schulz_triton,
        quantize_at_once=True,
    )
    missing = [m for m in ("mamba_ssm", "causal_conv1d") if importlib.util.find_spec(m) is None]
    on_cuda = "" if device.type == "cuda" else f"device is {device.type}, not cuda"
    no_packages = f"{', '.join(missing)} not installed" if missing else on_cuda
    no_triton = triton_obstacle(device)
    if choice == "torch":
        return torch_forms
    if choice == "triton":
        if no_triton:
            raise ConfigError(f"--kernels triton: {no_triton}; run on a CUDA machine or use --kernels torch")
        return triton_forms
    if choice == "mamba_ssm":
        if no_packages:
            raise ConfigError(
                f"--kernels mamba_ssm: {no_packages}; install the `gpu` extra on a CUDA machine or use --kernels torch"
            )
        return package_forms
    if on_cuda:
        return torch_forms._replace(reason=f"auto: {on_cuda}")
    # Ours become the first choice once `scripts/bench kernels` has shown them right on a GPU (LOG.md, GPU queue).
    ours = no_triton or "--kernels triton has yet to be shown on a GPU"
    if not no_packages:
        return package_forms._replace(reason=f"auto: packages installed; {ours}")
    return torch_forms._replace(reason=f"auto: {no_packages}; {ours}")


class LayerState(NamedTuple):
    """What a mixer carries from window to window: convolution inputs and scan state, or keys and values."""

    first: Tensor
    second: Tensor


class StreamState(NamedTuple):
    """State of a whole model between two windows of one stream, with the document ids of the tokens it remembers."""

    layers: tuple[LayerState, ...]
    document_ids_BS: Tensor | None
    last_token_B: Tensor | None  # kept where the model embeds pairs of tokens

    def rows(self, count: int) -> StreamState:
        """The state of the first `count` streams."""
        layers = tuple(LayerState(layer.first[:count], layer.second[:count]) for layer in self.layers)
        ids = (None if t is None else t[:count] for t in (self.document_ids_BS, self.last_token_B))
        return StreamState(layers, *ids)


class Documents(NamedTuple):
    """Document ids of a window and of the tokens remembered before it; ids never return within a stream."""

    now_BT: Tensor
    before_BS: Tensor | None

    @property
    def goes_on_B(self) -> Tensor | None:
        """Does the window's first token belong to the document that the state ended in?"""
        return None if self.before_BS is None else self.before_BS[:, -1] == self.now_BT[:, 0]


def surviving(state: Tensor, documents: Documents | None) -> Tensor:
    """Zero the rows of a recurrent state whose document has ended: a scan's initial state is the first token's."""
    if documents is None or documents.goes_on_B is None:
        return state
    return state * documents.goes_on_B.view(-1, *[1] * (state.ndim - 1)).to(state.dtype)


class Mamba2(nn.Module):
    """Mamba-2 mixer (Dao & Gu 2024): in_proj -> causal convolution -> selective scan -> gated RMSNorm -> out_proj."""

    def __init__(self, config: Config, kernels: Kernels) -> None:
        super().__init__()
        c = config
        self.inner = c.expand * c.model_dim
        self.heads = self.inner // c.headdim
        self.headdim, self.ngroups, self.d_state, self.chunk_size = c.headdim, c.ngroups, c.d_state, c.chunk_size
        self.kernels = kernels
        channels = self.inner + 2 * c.ngroups * c.d_state
        self.in_proj = nn.Linear(c.model_dim, self.inner + channels + self.heads, bias=False)
        self.dt_proj = nn.Linear(c.model_dim, self.heads, bias=False, device="meta") if c.dt_apart else None
        if self.dt_proj is not None:  # takes the rows that in_proj would have had, and no random draws
            rest_RD, dt_HD = self.in_proj.weight.detach().split([self.inner + channels, self.heads])
            self.dt_proj.weight = nn.Parameter(dt_HD.clone())
            self.in_proj = nn.Linear(c.model_dim, len(rest_RD), bias=False, device="meta")
            self.in_proj.weight = nn.Parameter(rest_RD.clone())
        convolution = nn.Conv1d(channels, channels, c.d_conv, groups=channels)  # for its initialisation
        self.conv_weight = nn.Parameter(convolution.weight.detach().squeeze(1).clone())
        self.conv_bias = nn.Parameter(convolution.bias.detach().clone())  # pyright: ignore[reportOptionalMemberAccess]
        low, high = math.log(c.dt_init_min), math.log(c.dt_init_max)
        dt_H = torch.exp(torch.rand(self.heads) * (high - low) + low).clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt_H + torch.log(-torch.expm1(-dt_H)))  # inverse of softplus
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(c.a_init_min, c.a_init_max).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm_weight = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, c.model_dim, bias=False)

    def row_splits(self) -> tuple[int, ...]:
        """Rows of in_proj by kind: z, x, B, C, and dt unless it is apart."""
        groups = self.ngroups * self.d_state
        return (self.inner, self.inner, groups, groups, *([] if self.dt_proj is not None else [self.heads]))

    def empty_state(self, batch: int, like: Tensor) -> LayerState:
        conv_BDS = like.new_zeros(batch, self.conv_weight.shape[0], self.conv_weight.shape[1] - 1)
        scan_BHPN = torch.zeros(batch, self.heads, self.headdim, self.d_state, device=like.device)
        return LayerState(conv_BDS, scan_BHPN)

    def forward(
        self, u_BTD: Tensor, documents: Documents | None, state: LayerState | None
    ) -> tuple[Tensor, LayerState]:
        batch, time_, _ = u_BTD.shape
        groups = self.ngroups * self.d_state
        projected = self.in_proj(u_BTD).split([self.inner, self.inner + 2 * groups, *self.row_splits()[4:]], dim=-1)
        z_BTI, conv_BTC, dt_BTH = projected if self.dt_proj is None else (*projected, self.dt_proj(u_BTD))
        conv_BTC, conv_state_BCS = self.kernels.causal_conv1d(
            conv_BTC,
            self.conv_weight.to(u_BTD.dtype),
            self.conv_bias.to(u_BTD.dtype),
            initial_state_BDS=surviving(state.first, documents) if state else None,
            document_ids_BT=documents.now_BT if documents else None,
            activation="silu",
        )
        x_BTI, B_BTN, C_BTN = conv_BTC.split([self.inner, groups, groups], dim=-1)
        y_BTHP, scan_state_BHPN = self.kernels.ssd_scan(
            x_BTI.reshape(batch, time_, self.heads, self.headdim),
            F.softplus(dt_BTH.float() + self.dt_bias),
            -torch.exp(self.A_log.float()),
            B_BTN.reshape(batch, time_, self.ngroups, self.d_state),
            C_BTN.reshape(batch, time_, self.ngroups, self.d_state),
            self.D,
            initial_state_BHPN=surviving(state.second, documents) if state else None,
            document_ids_BT=documents.now_BT if documents else None,
            chunk_size=self.chunk_size,
        )
        normed_BTI = self.kernels.gated_rms_norm(
            y_BTHP.reshape(batch, time_, self.inner), z_BTI, self.norm_weight, eps=1e-5
        )
        return self.out_proj(normed_BTI), LayerState(conv_state_BCS, scan_state_BHPN)


def rotate(x_BHTP: Tensor, first_position: int) -> Tensor:
    """Rotary position code (Su et al. 2021), base 10000, over the whole head. x (B, H, T, P) -> same."""
    half = x_BHTP.shape[-1] // 2
    position_T = torch.arange(x_BHTP.shape[2], device=x_BHTP.device, dtype=torch.float32) + first_position
    frequency_P = 10000.0 ** (-torch.arange(half, device=x_BHTP.device, dtype=torch.float32) / half)
    angle_TP = position_T[:, None] * frequency_P
    cos_TP, sin_TP = angle_TP.cos().to(x_BHTP.dtype), angle_TP.sin().to(x_BHTP.dtype)
    a_BHTP, b_BHTP = x_BHTP[..., :half], x_BHTP[..., half : 2 * half]
    turned = (a_BHTP * cos_TP - b_BHTP * sin_TP, a_BHTP * sin_TP + b_BHTP * cos_TP, x_BHTP[..., 2 * half :])
    return torch.cat(turned, dim=-1)


class CausalAttention(nn.Module):
    """Causal softmax attention over the last `window` tokens, with query-key norm and rotary positions.

    The carried state holds the unrotated keys and values of the last window - 1 tokens: positions are counted from the
    oldest of them, so they never grow, and rotary codes depend on differences only.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.headdim, self.window = (
            config.model_dim // config.attn_headdim,
            config.attn_headdim,
            config.window,
        )
        self.qkv_proj = nn.Linear(config.model_dim, 3 * config.model_dim, bias=False)
        self.out_proj = nn.Linear(config.model_dim, config.model_dim, bias=False)
        nn.init.zeros_(self.out_proj.weight)

    def row_splits(self) -> tuple[int, ...]:
        """Rows of qkv_proj by kind: query, key, value."""
        return (self.out_proj.in_features,) * 3

    def empty_state(self, batch: int, like: Tensor) -> LayerState:
        """Keys and values (B, H, 0, P): nothing seen yet."""
        nothing = like.new_zeros(batch, self.heads, 0, self.headdim)
        return LayerState(nothing, nothing)

    def forward(
        self, u_BTD: Tensor, documents: Documents | None, state: LayerState | None
    ) -> tuple[Tensor, LayerState]:
        batch, time_, width = u_BTD.shape
        q_BHTP, k_BHTP, v_BHTP = (
            part.view(batch, time_, self.heads, self.headdim).transpose(1, 2)
            for part in self.qkv_proj(u_BTD).chunk(3, dim=-1)
        )
        eps = torch.finfo(torch.float32).eps
        q_BHTP, k_BHTP = rms_norm_torch(q_BHTP, eps), rms_norm_torch(k_BHTP, eps)
        past = state.first.shape[2] if state else 0
        if state:
            k_BHTP = torch.cat([state.first, k_BHTP], dim=2)
            v_BHTP = torch.cat([state.second, v_BHTP], dim=2)
        first_kept = max(past + time_ - self.window + 1, 0)
        new_state = LayerState(k_BHTP[:, :, first_kept:], v_BHTP[:, :, first_kept:])
        q_BHTP, k_BHTP = rotate(q_BHTP, past), rotate(k_BHTP, 0)
        if past == 0 and documents is None and time_ <= self.window:
            attention = functools.partial(F.scaled_dot_product_attention, is_causal=True)
        else:
            query = torch.arange(past, past + time_, device=u_BTD.device)[:, None]
            key = torch.arange(past + time_, device=u_BTD.device)[None, :]
            allowed = (key <= query) & (key > query - self.window)
            if documents is not None:
                ids_BU = documents.now_BT
                if past > 0 and documents.before_BS is not None:
                    ids_BU = torch.cat([documents.before_BS, ids_BU], dim=1)
                allowed = (allowed & (documents.now_BT[:, :, None] == ids_BU[:, None, :]))[:, None]
            attention = functools.partial(F.scaled_dot_product_attention, attn_mask=allowed)
        y_BHTP = in_default_products(attention, q_BHTP, k_BHTP, v_BHTP)
        return self.out_proj(y_BHTP.transpose(1, 2).reshape(batch, time_, width)), new_state


class FeedForward(nn.Module):
    """Per-position network with an RMSNorm before its last matrix: ReLU^2, LeakyReLU(0.5)^2 or SwiGLU."""

    def __init__(self, config: Config, kernels: Kernels) -> None:
        super().__init__()
        hidden = config.mlp_mult * config.model_dim
        self.activation, self.kernels = config.activation, kernels
        self.up = nn.Linear(config.model_dim, hidden * (2 if self.activation == "swiglu" else 1), bias=False)
        self.down = nn.Linear(hidden, config.model_dim, bias=False)
        nn.init.zeros_(self.down.weight)
        self.watched = False  # both matrices called as modules, so that hooks see what goes in and out of them

    def forward(self, x_BTD: Tensor) -> Tensor:
        slope = 0.5 if self.activation == "leaky_relu2" else 0.0
        if self.activation == "swiglu":
            gate, value = self.up(x_BTD).chunk(2, dim=-1)
            hidden_BTF = F.silu(gate) * value
        elif self.watched:
            hidden_BTF = F.leaky_relu(self.up(x_BTD), slope).square()
        else:
            return self.kernels.relu2_ffn(x_BTD, self.up.weight, self.down.weight, negative_slope=slope, eps=1e-6)
        return self.down(rms_norm_torch(hidden_BTF, 1e-6))


class Block(nn.Module):
    """x0 mix -> + scaled mixer(norm(x)) -> + scaled feed-forward(norm(x)), of the same x if they are parallel."""

    def __init__(self, config: Config, index: int, kernels: Kernels) -> None:
        super().__init__()
        ones_D = torch.ones(config.model_dim)
        self.resid_mix = nn.Parameter(torch.stack([ones_D, torch.zeros_like(ones_D)])) if config.x0_mix else None
        self.mixer = CausalAttention(config) if index in config.attention_blocks() else Mamba2(config, kernels)
        self.mixer_scale = nn.Parameter(ones_D.clone())
        has_mlp = config.mlp_mult > 0 and config.mlp_every > 0 and index % config.mlp_every == 0
        self.mlp = FeedForward(config, kernels) if has_mlp else None
        self.mlp_scale = nn.Parameter(ones_D.clone()) if has_mlp else None
        self.parallel = config.parallel_residual

    def forward(
        self, x_BTD: Tensor, x0_BTD: Tensor, documents: Documents | None, state: LayerState | None
    ) -> tuple[Tensor, LayerState]:
        if self.resid_mix is not None:
            mix_2D = self.resid_mix.to(x_BTD.dtype)
            x_BTD = mix_2D[0] * x_BTD + mix_2D[1] * x0_BTD
        normed_BTD = rms_norm_torch(x_BTD, 1e-6)
        mixed_BTD, new_state = self.mixer(normed_BTD, documents, state)
        x_BTD = torch.addcmul(x_BTD, self.mixer_scale.to(x_BTD.dtype), mixed_BTD)
        if self.mlp is not None and self.mlp_scale is not None:
            fed_BTD = self.mlp(normed_BTD if self.parallel else rms_norm_torch(x_BTD, 1e-6))
            x_BTD = torch.addcmul(x_BTD, self.mlp_scale.to(x_BTD.dtype), fed_BTD)
        return x_BTD, new_state


class HashedBigrams(nn.Module):
    """A small embedding of every token together with the one before it, in a table of hashed pairs.

    Source: hashed n-gram embeddings (Svenstrup et al. 2017), as entries of the challenge use them. Pairs share rows by
    chance. The first token of a stream or document has none before it, which is a token of its own here. The projection
    starts at 0, so that training starts with the model without the table.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.nothing = config.vocab_size
        self.table = nn.Embedding(config.bigram_buckets, config.bigram_dim)
        nn.init.normal_(self.table.weight, std=config.embed_init_std)
        self.proj = nn.Linear(config.bigram_dim, config.model_dim, bias=False)
        nn.init.zeros_(self.proj.weight)

    def buckets(self, ids_BT: Tensor, documents: Documents | None, last_token_B: Tensor | None) -> Tensor:
        """Rows (B, T) int64 of the table; last_token (B): what came before the window, if anything did."""
        before_BT = ids_BT.roll(1, 1)
        before_BT[:, 0] = self.nothing if last_token_B is None else last_token_B
        if documents is not None:
            starts_BT = documents.now_BT != documents.now_BT.roll(1, 1)
            goes_on_B = documents.goes_on_B
            starts_BT[:, 0] = True if goes_on_B is None else ~goes_on_B
            before_BT = before_BT.masked_fill(starts_BT, self.nothing)
        return (before_BT * 36313 + ids_BT * 27191) % self.table.num_embeddings

    def forward(self, ids_BT: Tensor, documents: Documents | None, last_token_B: Tensor | None) -> Tensor:
        """Token ids -> what is added to their embeddings (B, T, D)."""
        return self.proj(rms_norm_torch(self.table(self.buckets(ids_BT, documents, last_token_B)), 1e-12))


class LanguageModel(nn.Module):
    """What ships: embedding, blocks with U-Net skips, tied or own head."""

    def __init__(self, config: Config, kernels: Kernels) -> None:
        super().__init__()
        c = self.config = config
        self.token_embed = nn.Embedding(c.vocab_size, c.effective_embed_dim)
        nn.init.normal_(self.token_embed.weight, std=c.embed_init_std)
        factored = c.effective_embed_dim != c.model_dim
        self.embed_proj = nn.Linear(c.effective_embed_dim, c.model_dim, bias=False) if factored else None
        reverse = factored and c.tie_embeddings in (1, 2)
        self.embed_proj_rev = nn.Linear(c.model_dim, c.effective_embed_dim, bias=False) if reverse else None
        self.kernels = kernels
        self.order = c.block_order()
        self.encoder_layers = len(self.order) // 2
        self.skip_weights = nn.Parameter(torch.ones(self.encoder_layers, c.model_dim)) if c.unet_skips else None
        self.blocks = nn.ModuleList(Block(c, i, kernels) for i in range(c.num_layers))
        self.vocab_bias = nn.Parameter(torch.zeros(c.vocab_size)) if c.vocab_bias else None
        correction = torch.zeros(c.vocab_size, c.effective_embed_dim)
        self.lm_head_correction = nn.Parameter(correction) if c.tie_embeddings == 2 else None
        adapter = c.tie_embeddings == 3
        self.lm_head_adapter = nn.Linear(c.model_dim, c.effective_embed_dim, bias=False) if adapter else None
        self.lm_head = nn.Linear(c.model_dim, c.vocab_size, bias=False) if c.tie_embeddings == 0 else None
        self.bigrams = HashedBigrams(c) if c.bigram_buckets else None  # last: what draws before it draws the same

    def empty_state(self, batch: int) -> StreamState:
        like = self.embed_proj.weight if self.embed_proj is not None else self.token_embed.weight
        states = (self.blocks[i].mixer.empty_state(batch, like) for i in self.order)  # pyright: ignore
        return StreamState(tuple(states), None, None)

    def encode(
        self,
        ids_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        state: StreamState | None = None,
        taps: dict[int, Tensor] | None = None,
    ) -> tuple[Tensor, StreamState]:
        """Token ids -> normalised hidden states h (B, T, D) and the state after the last token.

        Args: ids (B, T) int64 in [0, V); document_ids (B, T) integers, used only if the configuration resets at
        documents; state of the preceding window of the same streams, or None at the start of a stream; taps is filled
        with what each block gives out, by the number of blocks behind it.
        """
        documents = None
        if self.config.document_reset and document_ids_BT is not None:
            documents = Documents(document_ids_BT, state.document_ids_BS if state else None)
        x_BTD = self.token_embed(ids_BT)
        if self.embed_proj is not None:
            x_BTD = self.embed_proj(x_BTD)
        x_BTD = rms_norm_torch(x_BTD, 1e-12)  # embeddings are small: eps must not show
        if self.bigrams is not None:
            x_BTD = x_BTD + self.bigrams(ids_BT, documents, state.last_token_B if state else None)
        x0_BTD = x_BTD
        skips: list[Tensor] = []
        layers: list[LayerState] = []
        for i, index in enumerate(self.order):
            if i >= self.encoder_layers and skips and self.skip_weights is not None:
                weight_D = self.skip_weights[i - self.encoder_layers].to(x_BTD.dtype)
                x_BTD = torch.addcmul(x_BTD, weight_D, skips.pop())
            x_BTD, layer_state = self.blocks[index](x_BTD, x0_BTD, documents, state.layers[i] if state else None)
            layers.append(layer_state)
            if taps is not None:
                taps[index + 1] = x_BTD
            if i < self.encoder_layers:
                skips.append(x_BTD)
        remembered = None
        if documents is not None:
            seen = (documents.before_BS, documents.now_BT)
            remembered = torch.cat([ids for ids in seen if ids is not None], dim=1)[
                :, -max(self.config.window - 1, 1) :
            ]
        last_token_B = ids_BT[:, -1] if self.bigrams is not None else None
        return rms_norm_torch(x_BTD, 1e-6), StreamState(tuple(layers), remembered, last_token_B)

    def head(self, h_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states -> (rows (N, E), weight (V, E), bias (V) or None): raw logits are rows @ weight.T + bias."""
        rows = h_BTD.reshape(-1, h_BTD.shape[-1])
        if self.lm_head is not None:
            return rows, self.lm_head.weight, self.vocab_bias
        if self.lm_head_adapter is not None:
            rows = F.gelu(self.lm_head_adapter(rows))
        elif self.embed_proj_rev is not None:
            rows = self.embed_proj_rev(rows)
        weight_VE = self.token_embed.weight
        if self.lm_head_correction is not None:
            weight_VE = weight_VE + self.lm_head_correction.to(weight_VE.dtype)
        return rows, weight_VE, self.vocab_bias

    @property
    def softcap_kind(self) -> str:
        return self.config.softcap_type if self.config.logit_softcap > 0 else "none"

    def nll(self, h_BTD: Tensor, y_BT: Tensor, temperature: float) -> Tensor:
        """Negative log-likelihood (B, T) float32 in nats of targets y under softmax(softcap(logits) / temperature)."""
        rows, weight, bias = self.head(h_BTD)
        nll_N = self.kernels.softcap_nll(
            rows,
            weight,
            bias,
            y_BT.reshape(-1),
            cap=self.config.logit_softcap,
            kind=self.softcap_kind,
            temperature=temperature,
        )
        return nll_N.view(y_BT.shape)


class ProjectorMLP(nn.Module):
    """Linear -> LayerNorm -> GELU -> Linear, hidden width twice the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(
            self.fc1(x), self.norm.normalized_shape, self.norm.weight.to(x.dtype), self.norm.bias.to(x.dtype)
        )
        return self.fc2(F.gelu(normed))


class JepaHead(nn.Module):
    """Training-only latent prediction: projector h -> z, predictor z_t -> z_{t+1}, pred_proj back into z's space."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, hidden = config.model_dim, config.predictor_hidden_mult * config.model_dim
        mlp = config.projector_type == "mlp"
        self.projector = ProjectorMLP(width) if mlp else nn.Linear(width, width, bias=False)
        self.pred_proj = ProjectorMLP(width) if mlp else nn.Linear(width, width, bias=False)
        self.predictor_in = nn.Linear(width, hidden)
        self.predictor_out = nn.Linear(hidden, width)
        nn.init.zeros_(self.predictor_out.weight)
        nn.init.zeros_(self.predictor_out.bias)
        projections = config.sigreg_num_proj or 2 * config.effective_embed_dim
        A_DM = torch.randn(width, projections)
        self.register_buffer("sigreg_A_DM", A_DM / A_DM.norm(dim=0, keepdim=True))

    def predict(self, z_BTD: Tensor) -> Tensor:
        return self.pred_proj(self.predictor_out(F.gelu(self.predictor_in(z_BTD))))

    def prediction_loss(self, z_BTD: Tensor, config: Config) -> Tensor:
        """Mean over k = 1..jepa_steps of the squared error of the k-fold rollout against z_{t + k * jepa_stride}."""
        batch, time_, _ = z_BTD.shape
        goal_BTD = z_BTD.detach() if config.detach_targets else z_BTD
        if config.jepa_shuffle:  # the next window, half a window away: as good a latent, but of nothing that follows
            goal_BTD = goal_BTD.roll((1 % batch, time_ // 2), (0, 1))
        losses = []
        rolled_BTD = z_BTD
        for k in range(1, config.jepa_steps + 1):
            target_BTD = goal_BTD[:, k * config.jepa_stride :]
            rolled_BTD = self.predict(rolled_BTD[:, : target_BTD.shape[1]])
            losses.append(F.mse_loss(rolled_BTD.float(), target_BTD.float()))
        return torch.stack(losses).mean()


def covariance_penalty(z_NTD: Tensor) -> Tensor:
    """How far two moments of z are from a standard Gaussian's: per position, (|E z z^T - I|^2 + |E z|^2) / D.

    Source: the weak form of SIGReg, which asks for the moments instead of the distribution. z (N, T, D), N samples over
    all ranks -> mean over T, float32. N samples of a standard Gaussian give (D + 2) / N.
    """
    z_TND = z_NTD.float().transpose(0, 1)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    count = z_TND.shape[1] * ranks
    moment_TDD, mean_TD = z_TND.mT @ z_TND / count, z_TND.sum(1) / count
    if ranks > 1:  # its gradient is summed over ranks too, and then averaged with all others
        moment_TDD, mean_TD = all_reduce(moment_TDD), all_reduce(mean_TD)
    off_TDD = moment_TDD - torch.eye(z_TND.shape[2], device=z_TND.device)
    return (off_TDD.square().sum((1, 2)) + mean_TD.square().sum(1)).mean() / z_TND.shape[2]


class TrainingModel(nn.Module):
    """The language model with its training-only head and the loss over both."""

    def __init__(self, config: Config, kernels: Kernels) -> None:
        super().__init__()
        self.config = config
        # Own generators: the language model starts the same whether or not the JEPA head exists.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.lm = LanguageModel(config, kernels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + 1)
            self.jepa = JepaHead(config) if config.jepa_on else None

    def sigreg_positions(self, step: int, time_: int) -> Tensor | None:
        """Positions (T') of this step's SIGReg, equal on all ranks; None: all positions."""
        count = self.config.sigreg_timesteps
        if self.config.sigreg_mode == "pooled" or count == 0 or time_ <= count:
            return None
        generator = np.random.Generator(np.random.Philox(key=[self.config.seed, step]))
        return torch.from_numpy(generator.integers(0, time_, count))

    def latents(self, x_BT: Tensor, document_ids_BT: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Hidden states h (B, T, D) of tokens (B, T) and, where there is a JEPA head, their latents z (B, T, D)."""
        if self.jepa is None:
            return self.lm.encode(x_BT, document_ids_BT)[0], None
        tap = self.config.jepa_layer
        taps: dict[int, Tensor] | None = {} if tap else None
        h_BTD, _ = self.lm.encode(x_BT, document_ids_BT, taps=taps)
        return h_BTD, self.jepa.projector(rms_norm_torch(taps[tap], 1e-6) if taps else h_BTD)

    def objectives(
        self,
        x_BT: Tensor,
        y_BT: Tensor,
        document_ids_BT: Tensor | None,
        sigreg_lambda: float | Tensor | None,
        positions: Tensor | None,
        jepa_scale: float | Tensor | None = 1.0,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted objectives of one micro-batch, whose sum is the loss, and detached parts: see `forward`."""
        c = self.config
        h_BTD, z_BTD = self.latents(x_BT, document_ids_BT)
        weighted: dict[str, Tensor] = {}
        parts: dict[str, Tensor] = {}
        if self.jepa is not None and z_BTD is not None:
            if c.jepa_weight > 0 and jepa_scale is not None:
                jepa = self.jepa.prediction_loss(z_BTD, c)
                weighted["jepa"] = c.jepa_weight * jepa_scale * jepa
                parts["jepa"] = jepa.detach()
            if sigreg_lambda is not None:
                per_timestep, knots = c.sigreg_mode == "timestep", c.sigreg_knots
                z = z_BTD if positions is None else z_BTD[:, positions]
                z = z if per_timestep else z.reshape(-1, z.shape[-1])
                samples = z.shape[0] * (dist.get_world_size() if dist.is_initialized() else 1)
                if c.sigreg_form == "covariance":
                    sigreg = covariance_penalty(z if per_timestep else z[:, None])
                    floor = (c.model_dim + 2) / samples
                else:
                    A_DM = self.jepa.get_buffer("sigreg_A_DM")
                    sigreg = self.lm.kernels.sigreg(z, A_DM, knots=knots, per_timestep=per_timestep)
                    floor = sigreg_floor(samples, knots=knots)
                weighted["sigreg"] = sigreg_lambda * sigreg
                parts["sigreg"] = sigreg.detach()
                parts["sigreg_excess"] = sigreg.detach() - floor
        if c.ce_weight > 0:
            rows, weight, bias = self.lm.head(h_BTD)
            total, ce, z = self.lm.kernels.softcap_xent(
                rows, weight, bias, y_BT.reshape(-1), cap=c.logit_softcap, kind=self.lm.softcap_kind, z_weight=c.z_loss
            )
            weighted["ce"] = c.ce_weight * total
            parts["ce"], parts["z_loss"] = ce, z
        return weighted, parts

    def forward(self, *inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch and its detached parts (nats): jepa, sigreg, sigreg_excess (over its floor), ce.

        Args: as `objectives`. sigreg_lambda and jepa_scale are scalar tensors where they change between replays of one
        graph, and None to leave SIGReg or latent prediction out.
        """
        weighted, parts = self.objectives(*inputs)
        loss = sum(weighted.values(), start=torch.zeros((), device=inputs[0].device))
        parts["loss"] = loss.detach()
        return loss, parts


# ---------------------------------------------------------------------------------------------------------------------
# Masters, grids and optimizers
# ---------------------------------------------------------------------------------------------------------------------


def storage_spec(name: str, tensor: Tensor, config: Config) -> GridSpec:
    """The grid on which a parameter of the language model is trained, shipped and scored."""
    clip = config.quant_clip or None
    if name == "token_embed.weight":
        kinds = {"FP8": GridSpec("fp8_e4m3"), "INT8": GridSpec("int", bits=8), "BF16": GridSpec("bf16")}
        return kinds[config.fp_storage]
    if name.endswith("dt_proj.weight"):  # a few rows that decide how long the model remembers
        return GridSpec("int", bits=8)
    if tensor.ndim == 2 and tensor.numel() >= 4096 and name.endswith(".weight"):
        return GridSpec("int", bits=config.quant_bits, clip=clip)
    if name.rsplit(".", 1)[-1] in ("A_log", "dt_bias", "D"):  # a few hundred numbers that set the model's memory
        return GridSpec("f32")
    return GridSpec("bf16")


def optimizer_group(name: str, tensor: Tensor) -> str:
    """muon, embed or scalar, exactly one. Convolution taps are a vector per channel, not a matrix: scalar."""
    if name.endswith(("token_embed.weight", "lm_head_correction", "bigrams.table.weight")):
        return "embed"
    return "muon" if tensor.ndim == 2 and name.endswith(".weight") else "scalar"


class Masters:
    """float32 masters of all parameters, one flat gradient buffer, and the compute weights made from them.

    Invariant after `publish`: every compute weight is cast(grid(master)) (or cast(master) before quantization-aware
    training starts), so the model never holds anything that a later stage would round differently.
    """

    def __init__(self, model: TrainingModel, config: Config, compute_dtype: torch.dtype) -> None:
        self.config = config
        self.at_once = model.lm.kernels.quantize_at_once
        self.publishers: dict[bool, FakeQuantizeAll] = {}
        self.compute: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.master: dict[str, nn.Parameter] = {}
        self.spec: dict[str, GridSpec] = {}
        total = sum(p.numel() for p in self.compute.values())
        device = next(iter(self.compute.values())).device
        self.flat_gradient = torch.zeros(total, device=device)
        offset = 0
        for name, parameter in self.compute.items():
            master = nn.Parameter(parameter.detach().float().clone())
            master.grad = self.flat_gradient[offset : offset + master.numel()].view_as(master)
            offset += master.numel()
            self.master[name] = master
            if name.startswith("lm."):
                self.spec[name] = storage_spec(name.removeprefix("lm."), master, config)
            if optimizer_group(name, parameter) != "scalar":
                parameter.data = parameter.data.to(compute_dtype)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # steps whose gradient was not finite
        self.ema: dict[str, Tensor] = {}
        self.steps: dict[str, Tensor] = {}  # free steps that training snaps to: (R + C,) on the device, by name
        self.steps_nats = 0.0  # of the plan that they come from
        self.rounded: dict[str, QuantizedTensor] = {}  # what ships, once training is over

    def train_on(self, steps: Mapping[str, Tensor], loss_nats: float) -> None:
        """From now on these matrices live on free steps, scales (R + C,) by name of the language model's state dict."""
        for name, scales in steps.items():
            self.steps[f"lm.{name}"] = scales.to(self.flat_gradient.device)
            self.spec[f"lm.{name}"] = FREE_STEP_GRID
        self.steps_nats = loss_nats

    def trained_steps(self) -> TrainedSteps | None:
        scales = {name.removeprefix("lm."): t.cpu().numpy() for name, t in self.steps.items()}
        return TrainedSteps(self.steps_nats, scales) if scales else None

    def groups(self) -> dict[str, list[str]]:
        members: dict[str, list[str]] = {"muon": [], "embed": [], "scalar": []}
        for name, parameter in self.compute.items():
            members[optimizer_group(name, parameter)].append(name)
        return members

    @torch.no_grad()
    def publish(self, on_grid: bool, source: Mapping[str, Tensor] | None = None) -> None:
        """Write the compute weights from the masters (or from `source`), on their grids or not."""
        if self.at_once and source is None and not (on_grid and (self.steps or self.rounded)):
            if on_grid not in self.publishers:
                specs = [self.spec.get(name) if on_grid else None for name in self.compute]
                weights = [parameter.data for parameter in self.compute.values()]
                self.publishers[on_grid] = FakeQuantizeAll(list(self.master.values()), specs, weights)
            self.publishers[on_grid]()
            return
        for name, parameter in self.compute.items():
            values = (source or self.master).get(name, self.master[name])
            if on_grid and name.removeprefix("lm.") in self.rounded:
                values = torch.from_numpy(dequantize(self.rounded[name.removeprefix("lm.")]))
            elif on_grid and name in self.spec:
                values = fake_quantize_torch(values, self.spec[name], scales=self.steps.get(name))
            parameter.copy_(values)

    def shipped(self) -> Mapping[str, Tensor]:
        """The float weights that the artifact is made from: the moving average once there is one."""
        return self.ema or self.master

    @contextlib.contextmanager
    def as_shipped(self, training_on_grid: bool, on_grid: bool = True) -> Iterator[None]:
        """Inside, the model holds what the artifact would hold; afterwards, what training had."""
        self.publish(on_grid, self.shipped())
        try:
            yield
        finally:
            self.publish(training_on_grid)

    @torch.no_grad()
    def accumulate_gradients(self, scale: float) -> None:
        """Add scale * compute gradients to the masters' and drop the former. A parameter without one adds zero."""
        for name, parameter in self.compute.items():
            master_grad = self.master[name].grad
            if parameter.grad is not None and master_grad is not None:
                master_grad.add_(parameter.grad, alpha=scale)
            parameter.grad = None

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        names = [name for name in self.master if name.startswith("lm.")]
        if not self.ema:
            self.ema = {name: self.master[name].detach().clone() for name in names}
        else:
            torch._foreach_lerp_([self.ema[n] for n in names], [self.master[n].detach() for n in names], 1 - decay)

    def quantized(self) -> dict[str, QuantizedTensor]:
        """The shipped tensors of the language model, by the names of its state dict."""
        out = dict(self.rounded)
        for name, spec in self.spec.items():
            if name.removeprefix("lm.") in out:
                continue
            codes, scales = quantize_torch(self.shipped()[name].detach().cpu(), spec)
            out[name.removeprefix("lm.")] = QuantizedTensor(
                spec, codes.numpy(), scales.numpy(), tuple(self.master[name].shape)
            )
        return out


def build_optimizers(model: TrainingModel, masters: Masters, config: Config) -> dict[str, torch.optim.Optimizer]:
    """Muon for matrices, AdamW with decay for the embedding and without for everything else."""
    c = config
    groups = masters.groups()
    splits = {}
    if c.muon_split_in_proj:
        for name, module in model.named_modules():
            if isinstance(module, Mamba2):
                splits[f"{name}.in_proj.weight"] = module.row_splits()
            elif isinstance(module, CausalAttention):
                splits[f"{name}.qkv_proj.weight"] = module.row_splits()
    by_split: dict[tuple[int, ...] | None, list[nn.Parameter]] = {}
    for name in groups["muon"]:
        by_split.setdefault(splits.get(name), []).append(masters.master[name])
    muon = Muon(
        [{"params": params, "row_splits": split} for split, params in by_split.items()],
        lr=c.matrix_lr,
        momentum=c.muon_momentum,
        steps=c.muon_backend_steps,
        weight_decay=c.muon_wd,
        normalize_rows=c.muon_normalize_rows,
        polynomials=NEWTON_SCHULZ_POLYNOMIALS[c.muon_polynomial],
        newton_schulz=model.lm.kernels.newton_schulz,
    )
    adam = {
        kind: torch.optim.AdamW(
            [masters.master[name] for name in groups[kind]],
            lr=lr,
            betas=(c.beta1, c.beta2),
            eps=c.adam_eps,
            weight_decay=decay,
            fused=True,
            capturable=c.cuda_graphs and model.lm.token_embed.weight.is_cuda,
        )
        for kind, lr, decay in (("embed", c.embed_lr, c.adam_wd), ("scalar", c.scalar_lr, 0.0))
    }
    return {"muon": muon, **adam}


# ---------------------------------------------------------------------------------------------------------------------
# Ranks, clock, data
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a run. One process is a world of its own; no process group is made then."""

    rank: int
    world: int
    device: torch.device
    tuning: str = ""  # what the process was set to for its device, and why

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_leader(self, value: Any) -> Any:
        """The leader's value of a small Python object of numbers and strings."""
        if self.world == 1:
            return value
        box = [json.dumps(value)]
        dist.broadcast_object_list(box, src=0)
        return json.loads(box[0])


def join_ranks(choice: str, environ: Mapping[str, str]) -> Ranks:
    """Read torchrun's variables, pick the device and join the process group. Raises ConfigError."""
    rank, world, local = (int(environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    cuda = torch.cuda.is_available()
    if choice == "cuda" and not cuda:
        raise ConfigError("--device cuda: PyTorch sees no CUDA device; use --device cpu or install a CUDA build")
    device = torch.device("cuda", local) if cuda and choice != "cpu" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        tuning = "float32 products in TF32"
    else:
        tuning = tune_cpu_process()
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(rank, world, device, tuning)


class Preempted(SystemExit):
    """The run ends with status 0: it was asked to, and the same command goes on from what it saved."""


class Interruption:
    """While it is entered, a SIGTERM (preemption) raises `Preempted`: at once, or behind a `deferred` block."""

    def __init__(self) -> None:
        self.asked = self.patient = False

    def __enter__(self) -> Interruption:
        self.previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, signum: int, frame: Any) -> None:
        self.asked = True
        if not self.patient:
            raise Preempted(0)

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self.previous)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a SIGTERM is only remembered, so that the step in flight can end first."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False
        if self.asked:
            raise Preempted(0)


def seconds_now(clock: str) -> float:
    """wall: seconds that pass. cpu: those that this process, all its threads together, has had a processor for."""
    return time.process_time() if clock == "cpu" else time.perf_counter()


class Clock:
    """Seconds that the model has been learning, agreed between ranks by the leader's reading once a step.

    It is monotonic: setting the system's time does not move it. A SIGTERM to any rank reaches all with the reading.
    """

    def __init__(self, ranks: Ranks, kind: str, elapsed_s: float, interruption: Interruption) -> None:
        self.ranks, self.kind, self.elapsed_s, self.interruption = ranks, kind, elapsed_s, interruption
        self.started_s: float | None = None
        self.last_step: torch.cuda.Event | None = None
        # A reading must not wait for the GPU: it travels over its own CPU group.
        self.group: Any = dist.new_group(backend="gloo") if ranks.world > 1 else None

    def start(self) -> None:
        self.started_s = seconds_now(self.kind)

    def _read(self) -> tuple[float, bool]:
        now_s = self.elapsed_s + (seconds_now(self.kind) - self.started_s if self.started_s is not None else 0.0)
        if self.ranks.world == 1:
            return now_s, self.interruption.asked
        reading = torch.tensor([now_s if self.ranks.leads else 0.0, self.interruption.asked], dtype=torch.float64)
        dist.all_reduce(reading, group=self.group)
        return float(reading[0]), bool(reading[1])

    def step_done(self) -> tuple[float, bool]:
        """(seconds so far, was an interruption asked for), alike on every rank. A GPU is at most a step behind."""
        if self.ranks.device.type == "cuda":
            before, self.last_step = self.last_step, torch.cuda.Event()
            self.last_step.record()
            if before is not None:
                before.synchronize()
        return self._read()

    def stop(self) -> float:
        """Wait for the device, stop counting and return the seconds counted so far."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        self.elapsed_s, self.started_s = self._read()[0], None
        return self.elapsed_s


class StepBatch(NamedTuple):
    """One rank's share of a step, with the loader's state after it."""

    x_BT: Tensor
    y_BT: Tensor
    document_ids_BT: Tensor
    loader_state: dict[str, Any]


class Prefetcher:
    """Draws batches in a thread, `depth` ahead, and starts their copy to the device."""

    def __init__(self, loader: TokenLoader, device: torch.device, depth: int = 2) -> None:
        self.loader, self.device = loader, device
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self.pending = deque(self.pool.submit(self._draw) for _ in range(depth))

    def _tensor(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _draw(self) -> StepBatch:
        batch = self.loader.next_batch()
        x_BT, y_BT, document_ids_BT = map(self._tensor, (batch.x_BT, batch.y_BT, batch.document_ids_BT))
        return StepBatch(x_BT, y_BT, document_ids_BT, self.loader.state())

    def next(self, batches: int = 1) -> StepBatch:
        """The next batches in order, as one; an error of the loader is raised here. Its state is the one after them."""
        drawn = []
        for _ in range(batches):
            self.pending.append(self.pool.submit(self._draw))
            drawn.append(self.pending.popleft().result())
        if batches == 1:
            return drawn[0]
        x_BT, y_BT, document_ids_BT = (torch.cat(parts) for parts in zip(*(batch[:3] for batch in drawn), strict=True))
        return StepBatch(x_BT, y_BT, document_ids_BT, drawn[-1].loader_state)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def open_tokens(pattern: str, vocab_size: int) -> np.ndarray:
    """All tokens of the shards that match, in order of name. Raises ShardError."""
    shards = [open_shard(path, vocab_size=vocab_size, deep=True) for path in list_shards(pattern)]
    tokens = shards[0] if len(shards) == 1 else np.concatenate(shards)
    if len(tokens) < 2:
        raise ShardError(f"{pattern}: {len(tokens)} tokens; scoring needs at least 2")
    return tokens


def open_tokenizer(config: Config, beside: str) -> Tokenizer:
    """The tokenizer of a run. Raises TokenizerError if it is missing or has more tokens than the embedding has rows."""
    if config.tokenizer == "byte":
        return load_tokenizer("byte", vocab_size=config.vocab_size)
    path = config.tokenizer_path or str(Path(beside) / "tokenizer.model")
    return load_tokenizer(path, vocab_size=config.vocab_size)


def manifest_original_bytes(pattern: str, tokens: int) -> int | None:
    """UTF-8 bytes of the original validation text, if a manifest beside the shards counts exactly these tokens."""
    path = list_shards(pattern)[0].parent / "manifest.json"
    if not path.is_file():
        return None
    try:
        split = json.loads(path.read_text(encoding="utf-8")).get("splits", {}).get("val", {})
        return int(split["original_bytes"]) if split.get("tokens") == tokens and split.get("original_bytes") else None
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error}); make it again or delete it") from error


@dataclass(frozen=True)
class Validation:
    """Validation text as tokens, with what is needed to count its bytes."""

    tokens: np.ndarray
    tokenizer: Tokenizer
    table: ByteTable
    original_bytes: int | None  # None: a lossless tokenizer spells them; or, for a lossy one, nobody counted them

    def first(self, limit: int) -> Validation:
        """The first `limit` scored tokens (0: all)."""
        if not 0 < limit < len(self.tokens) - 1:
            return self
        return replace(self, tokens=self.tokens[: limit + 1], original_bytes=None)


def open_validation(pattern: str, tokenizer: Tokenizer, vocab_size: int) -> Validation:
    tokens = open_tokens(pattern, vocab_size)
    original_bytes = None if tokenizer.lossless else manifest_original_bytes(pattern, len(tokens))
    return Validation(tokens, tokenizer, byte_table(tokenizer), original_bytes)


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A score over every token of a stream after its first, and what it covers."""

    mode: str
    loss: float  # nats a token
    bpb: float
    tokens: int
    scored_bytes: int
    byte_source: str  # "original": UTF-8 of the source text; "decoded": what the tokens spell
    decoded_bytes: int
    original_bytes: int | None
    tokens_computed: int
    context: str
    seconds: float
    nll_n: np.ndarray = field(repr=False)  # nats of each token, float64

    def summary(self) -> dict[str, Any]:
        told = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "nll_n"}
        return told | {"computed_per_token": self.tokens_computed / self.tokens}


def windows_of(mode: str, targets: int, length: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, first scored) of each window of inputs, covering targets 0 .. targets-1 exactly once.

    standard: windows side by side, each scored whole. sliding: a window's last `stride` targets are scored (all of the
    first window's), the last window ends at the last target, whatever is left to score.
    """
    if mode == "standard":
        return [(s, min(s + length, targets), s) for s in range(0, targets, length)]
    if targets <= length:
        return [(0, targets, 0)]
    windows, scored = [(0, length, 0)], length
    while scored < targets:
        end = min(scored + stride, targets)
        windows.append((end - length, end, scored))
        scored = end
    return windows


def lanes_of(tokens: np.ndarray, lanes: int, bos_id: int | None) -> list[tuple[int, int]]:
    """Cut inputs 0 .. len-2 into about equal runs that begin at documents, for carried scoring side by side."""
    targets = len(tokens) - 1
    if lanes <= 1 or bos_id is None:
        return [(0, targets)]
    starts = np.flatnonzero(np.asarray(tokens[:targets]) == bos_id)
    if len(starts) == 0:
        return [(0, targets)]
    wanted = np.linspace(0, targets, lanes + 1)[1:-1]
    cuts = {int(starts[min(np.searchsorted(starts, w), len(starts) - 1)]) for w in wanted}
    edges = [0, *sorted(cuts - {0}), targets]
    return list(itertools.pairwise(edges))


def tokens_to_compute(tokens: np.ndarray, config: Config, mode: str, bos_id: int | None, world: int) -> int:
    """Tokens that all ranks together push through the model to score a stream: `ttt` learns from each one too."""
    targets, length = len(tokens) - 1, config.eval_seq_len or config.train_seq_len
    if mode == "carried":
        cut = lanes_of(tokens, config.eval_lanes * world if config.document_reset else 1, bos_id)
        total = 0
        for rank in range(world):
            left = sorted((end - start for start, end in cut[rank::world]), reverse=True)
            while left:
                total += min(length, left[0]) * len(left)
                left = [n - length for n in left if n > length]
        return total
    if mode == "ttt":  # a backward pass costs two forward passes
        return 4 * targets
    return sum(end - start for start, end, _ in windows_of(mode, targets, length, config.sliding_eval_stride))


def check_evaluation(mode: str, tokens: int, tokens_per_s: float, config: Config, hardware: str) -> None:
    """Refuse a mode that would exceed eval_seconds. Raises ConfigError."""
    if config.eval_seconds > 0 and tokens > config.eval_seconds * tokens_per_s:
        raise ConfigError(
            f"eval mode {mode} computes {tokens:,} tokens: {tokens / tokens_per_s:,.0f} s at {tokens_per_s:,.0f} "
            f"tokens/s {hardware}, but eval_seconds is {config.eval_seconds:g}; use carried or --eval_seconds 0"
        )


class Pace:
    """Projects how long a mode will take from how it goes, where no other hardware is declared.

    On a CPU it goes by processor seconds over threads: what this machine needs if it does nothing else.
    """

    def __init__(self, mode: str, planned_tokens: int, config: Config, device: torch.device) -> None:
        self.mode, self.planned_tokens, self.config = mode, planned_tokens, config
        self.kind, self.shared_by = ("cpu", torch.get_num_threads()) if device.type == "cpu" else ("wall", 1)
        self.started_s = seconds_now(self.kind)

    def check(self, computed: int) -> None:
        """Raises ConfigError if, after a twentieth of eval_seconds, the rest would not fit into the rest."""
        seconds = (seconds_now(self.kind) - self.started_s) / self.shared_by
        if self.config.eval_tokens_per_s == 0 and seconds > self.config.eval_seconds / 20:
            check_evaluation(self.mode, self.planned_tokens, computed / seconds, self.config, "as measured here")


def window_nll(
    lm: LanguageModel,
    ids_n: Tensor,
    document_n: Tensor,
    spans: Sequence[tuple[int, int]],
    width: int,
    state: StreamState | None,
    temperature: float,
    device: torch.device,
) -> tuple[Tensor, StreamState]:
    """Inputs [start, end) of each span, padded to `width`, through the model: nll (rows, width) and the state."""
    x_BT, y_BT, document_BT = (torch.zeros(len(spans), width, dtype=d) for d in (torch.long, torch.long, torch.int32))
    for row, (start, end) in enumerate(spans):
        count = min(width, end - start)
        x_BT[row, :count] = ids_n[start : start + count]
        y_BT[row, :count] = ids_n[start + 1 : start + count + 1]
        document_BT[row] = document_n[start + count - 1]
        document_BT[row, :count] = document_n[start : start + count]
    x_BT, y_BT, document_BT = (t.to(device) for t in (x_BT, y_BT, document_BT))
    h_BTD, state = lm.encode(x_BT, document_BT, state)
    return lm.nll(h_BTD, y_BT, temperature), state


def stream_of(tokens: np.ndarray, bos_id: int | None) -> tuple[Tensor, Tensor]:
    """Ids (n) int64 and the document that each lies in (n) int32."""
    ids_n = torch.from_numpy(np.asarray(tokens).astype(np.int64))
    if bos_id is None:
        return ids_n, torch.zeros(len(ids_n), dtype=torch.int32)
    return ids_n, (ids_n == bos_id).cumsum(0).int()


@torch.inference_mode()
def token_nll(
    lm: LanguageModel,
    tokens: np.ndarray,
    *,
    mode: str,
    length: int,
    stride: int,
    batch_tokens: int,
    lanes: int,
    bos_id: int | None,
    temperature: float,
    ranks: Ranks,
    pace: Pace | None = None,
) -> tuple[np.ndarray, int]:
    """Negative log-likelihood (nats) of tokens[1:], each exactly once, and the number of tokens computed for it.

    Args: tokens (n) uint16; length and stride in tokens; batch_tokens computed side by side at most. Every rank returns
    the whole (n - 1) float64 array.
    """
    targets = len(tokens) - 1
    nll_n = torch.zeros(targets, dtype=torch.float64, device=ranks.device)
    ids_n, document_n = stream_of(tokens, bos_id)
    computed = 0

    def run(spans: list[tuple[int, int]], width: int, state: StreamState | None) -> tuple[Tensor, StreamState]:
        return window_nll(lm, ids_n, document_n, spans, width, state, temperature, ranks.device)

    if mode == "carried":
        cut = lanes_of(tokens, lanes * ranks.world if lm.config.document_reset else 1, bos_id)
        own = sorted(cut[ranks.rank :: ranks.world], key=lambda lane: lane[0] - lane[1])  # longest first
        state: StreamState | None = None
        for offset in range(0, max((end - start for start, end in own), default=0), length):
            alive = [(start + offset, end) for start, end in own if start + offset < end]
            if state is not None:  # lanes that have ended are the last rows
                state = state.rows(len(alive))
            width = min(length, max(end - start for start, end in alive))
            nll_BT, state = run(alive, width, state)
            computed += nll_BT.numel()
            for row, (start, end) in enumerate(alive):
                count = min(width, end - start)
                nll_n[start : start + count] = nll_BT[row, :count].double()
            if pace is not None:
                pace.check(computed * ranks.world)
    else:
        by_width: dict[int, list[tuple[int, int, int]]] = {}
        for start, end, first in windows_of(mode, targets, length, stride)[ranks.rank :: ranks.world]:
            by_width.setdefault(end - start, []).append((start, end, first))
        for width, windows in by_width.items():
            rows = max(1, batch_tokens // width)
            for batch in (windows[i : i + rows] for i in range(0, len(windows), rows)):
                nll_BT, _ = run([(start, end) for start, end, _ in batch], width, None)
                computed += nll_BT.numel()
                for row, (start, end, first) in enumerate(batch):
                    nll_n[first:end] = nll_BT[row, first - start :].double()
                if pace is not None:
                    pace.check(computed * ranks.world)
    total = ranks.sum(torch.tensor([computed], dtype=torch.int64, device=ranks.device))
    return ranks.sum(nll_n).cpu().numpy(), int(total)


def adapted_nll(
    lm: LanguageModel,
    tokens: np.ndarray,
    config: Config,
    *,
    bos_id: int | None,
    temperature: float,
    ranks: Ranks,
    pace: Pace | None = None,
) -> tuple[np.ndarray, int]:
    """Score-first test-time training: every chunk is scored with carried state, then learned from, in order.

    Momentum descent (0.9, gradient norm at most 1) on float32 weights, one step a chunk, on all of its windows of the
    training length at once. Every rank adapts weights of its own to its own documents; all are as before afterwards.

    Returns: as `token_nll`; a token that is learned from counts as three more.
    """
    parameters, length = list(lm.parameters()), config.eval_seq_len or config.train_seq_len
    before = [p.detach().clone() for p in parameters]
    weights = [p.to(torch.float32, copy=True) for p in before]
    momenta = [torch.zeros_like(w) for w in weights]
    ids_n, document_n = stream_of(tokens, bos_id)
    nll_n = torch.zeros(len(tokens) - 1, dtype=torch.float64, device=ranks.device)
    parts, state, computed = lanes_of(tokens, ranks.world, bos_id), None, 0
    first, last = parts[ranks.rank] if ranks.rank < len(parts) else (0, 0)
    try:
        for chunk in range(first, last, config.ttt_chunk_tokens):
            stop = min(chunk + config.ttt_chunk_tokens, last)
            with torch.inference_mode():
                for start in range(chunk, stop, length):
                    span = (start, min(start + length, stop))
                    nll_BT, state = window_nll(
                        lm, ids_n, document_n, [span], span[1] - start, state, temperature, ranks.device
                    )
                    nll_n[start : span[1]] = nll_BT[0].double()
            with torch.enable_grad():
                width = min(config.train_seq_len, stop - chunk)
                count = (stop - chunk) // width * width
                pieces = (ids_n[chunk:], ids_n[chunk + 1 :], document_n[chunk:])
                x_BT, y_BT, ids_BT = (piece[:count].view(-1, width).to(ranks.device) for piece in pieces)
                head, weight, bias = lm.head(lm.encode(x_BT, ids_BT)[0])
                cap, kind = config.logit_softcap, lm.softcap_kind
                y_N = y_BT.reshape(-1)
                lm.kernels.softcap_xent(head, weight, bias, y_N, cap=cap, kind=kind, z_weight=0.0)[0].backward()
            gradients = [torch.zeros_like(w) if p.grad is None else p.grad.float() for w, p in zip(weights, parameters)]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
            torch._foreach_mul_(momenta, 0.9)
            torch._foreach_add_(momenta, torch._foreach_mul(gradients, torch.clamp(1.0 / (norm + 1e-6), max=1.0)))
            torch._foreach_add_(weights, momenta, alpha=-config.ttt_lr)
            with torch.no_grad():
                for parameter, learned in zip(parameters, weights, strict=True):
                    parameter.copy_(learned)
                    parameter.grad = None
            computed += (stop - chunk) + 3 * count
            if pace is not None:
                pace.check(computed * ranks.world)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None
    total = ranks.sum(torch.tensor([computed], dtype=torch.int64, device=ranks.device))
    return ranks.sum(nll_n).cpu().numpy(), int(total)


def gain_by_position(standard_n: np.ndarray, carried_n: np.ndarray, length: int) -> list[dict[str, Any]]:
    """What carried state saves over windows side by side, by place in the window: one row a doubling of the place.

    Args: nats of every token (n) by both modes; tokens of a window. Returns: first and last place, tokens, and their
    mean bits a token by either mode and the difference.
    """
    place_n, rows, first = np.arange(len(standard_n)) % length, [], 0
    while first < length:
        last = min(max(2 * first - 1, first), length - 1)
        here = (first <= place_n) & (place_n <= last)
        if here.any():
            bits = [float(nll_n[here].mean()) / math.log(2) for nll_n in (standard_n, carried_n)]
            row = {"first": first, "last": last, "tokens": int(here.sum()), "standard_bits": bits[0]}
            rows.append(row | {"carried_bits": bits[1], "gain_bits": bits[0] - bits[1]})
        first = last + 1
    return rows


def score_tokens(
    lm: LanguageModel, validation: Validation, config: Config, *, mode: str, temperature: float, ranks: Ranks
) -> Score:
    """Bits per byte of validation text under the model as it stands.

    Bytes are those of the original text where they are known, else those that the tokens spell (the same thing for a
    lossless tokenizer). Raises GolfError if a token has no probability, ConfigError if it would take too long.
    """
    tokens, original_bytes = validation.tokens, validation.original_bytes
    length, bos_id = config.eval_seq_len or config.train_seq_len, validation.tokenizer.bos_id
    planned = tokens_to_compute(tokens, config, mode, bos_id, ranks.world)
    if config.eval_tokens_per_s > 0:
        check_evaluation(mode, planned, config.eval_tokens_per_s, config, "as declared by eval_tokens_per_s")
    started_s, pace = time.perf_counter(), Pace(mode, planned, config, ranks.device)
    if mode == "ttt":
        nll_n, computed = adapted_nll(
            lm, tokens, config, bos_id=bos_id, temperature=temperature, ranks=ranks, pace=pace
        )
    else:
        nll_n, computed = token_nll(
            lm,
            tokens,
            mode=mode,
            length=length,
            stride=config.sliding_eval_stride,
            batch_tokens=config.val_batch_size,
            lanes=config.eval_lanes,
            bos_id=bos_id,
            temperature=temperature,
            ranks=ranks,
            pace=pace,
        )
    decoded_bytes = int(token_bytes(validation.table, tokens[:-1], tokens[1:]).sum())
    scored_bytes = decoded_bytes if original_bytes is None else original_bytes
    total_nats = float(nll_n.sum())
    if not math.isfinite(total_nats):
        raise GolfError(
            f"the score is not finite ({total_nats}); {int((~np.isfinite(nll_n)).sum())} tokens have no probability"
        )
    contexts = {
        "standard": f"each token sees up to {length - 1} before it, from the start of its window",
        "sliding": f"each token sees {length - config.sliding_eval_stride} to {length - 1} before it",
        "carried": "each token sees all before it through the carried state",
        "ttt": "each token sees all before it through the carried state; weights learn from a chunk once it is scored",
    }
    isolated = "; documents are isolated" if lm.config.document_reset else ""
    return Score(
        mode=mode,
        loss=total_nats / len(nll_n),
        bpb=bits_per_byte(total_nats, scored_bytes),
        tokens=len(nll_n),
        scored_bytes=scored_bytes,
        byte_source="decoded" if original_bytes is None else "original",
        decoded_bytes=decoded_bytes,
        original_bytes=original_bytes,
        tokens_computed=computed,
        context=contexts[mode] + isolated,
        seconds=time.perf_counter() - started_s,
        nll_n=nll_n,
    )


COARSE_TEMPERATURES = (0.5, 0.7, 0.85, 0.95, 1.0, 1.1, 1.3, 1.5, 2.0)
FINE_STEP = 0.02


@torch.inference_mode()
def search_temperature(
    lm: LanguageModel, x_BT: Tensor, y_BT: Tensor, document_ids_BT: Tensor, rows: int, ranks: Ranks
) -> float:
    """Softmax temperature of least loss on training text: a coarse grid, then steps of 0.02 around its best.

    Hidden states are computed once; each temperature costs the head only. Ranks may hold different windows.
    """
    pieces = [
        (lm.encode(x_BT[i : i + rows], document_ids_BT[i : i + rows])[0], y_BT[i : i + rows])
        for i in range(0, x_BT.shape[0], rows)
    ]

    def loss(temperature: float) -> float:
        total = torch.stack([lm.nll(h_BTD, y, temperature).double().sum() for h_BTD, y in pieces]).sum()
        return float(ranks.sum(total))

    losses = {t: loss(t) for t in COARSE_TEMPERATURES}
    centre = min(losses, key=lambda t: losses[t])
    for k in (-3, -2, -1, 1, 2, 3):
        temperature = round(centre + k * FINE_STEP, 4)
        losses.setdefault(temperature, loss(temperature))
    return min(losses, key=lambda t: losses[t])


def layer_statistics(
    lm: LanguageModel, x_BT: Tensor, y_BT: Tensor, document_ids_BT: Tensor, rows: int, ranks: Ranks
) -> dict[str, LayerStatistics]:
    """What rounding errors cost, of every matrix of the model that a linear map or the embedding reads.

    Letters: R outputs, C inputs. Empirical Fisher factors of the summed loss of training text (gptq.LayerStatistics).
    An embedding row is used where its token occurs (its gradients' second moment) and, tied, where its token might
    come next (the head's inputs); both happen about as often as the token, so they are one matrix, weighed by that.
    """
    modules = {f"{name}.weight": m for name, m in lm.named_modules() if isinstance(m, nn.Linear)}
    modules.pop("lm_head.weight", None)  # its rows are counted with the logits
    hessian: dict[str, Tensor] = {}
    sensitivity: dict[str, Tensor] = {}
    embedded: list[Tensor] = []

    def add(into: dict[str, Tensor], name: str, value: Tensor) -> None:
        into[name] = into[name] + value.double() if name in into else value.double()

    def watch(name: str) -> Callable[..., None]:
        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x_NC = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            add(hessian, name, x_NC.T @ x_NC)
            output.register_hook(lambda g: add(sensitivity, name, g.reshape(-1, g.shape[-1]).float().square().sum(0)))

        return forward

    def keep_embedded(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        embedded.append(output)

    def count_pairs(module: nn.Embedding, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        def backward(gradient: Tensor) -> None:
            g_NE = gradient.reshape(-1, gradient.shape[-1]).float()
            add(hessian, "bigrams", g_NE.T @ g_NE)

        add(sensitivity, "bigrams", torch.bincount(inputs[0].reshape(-1), minlength=module.num_embeddings))
        output.register_hook(backward)

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    handles.append(lm.token_embed.register_forward_hook(keep_embedded))
    if lm.bigrams is not None:
        handles.append(lm.bigrams.table.register_forward_hook(count_pairs))
    own_head = lm.lm_head is not None
    networks = [module for module in lm.modules() if isinstance(module, FeedForward)]
    try:
        for network in networks:
            network.watched = True
        with torch.enable_grad():
            for i in range(0, x_BT.shape[0], rows):
                x, y, documents = (t[i : i + rows] for t in (x_BT, y_BT, document_ids_BT))
                embedded.clear()
                h_BTD, _ = lm.encode(x, documents)
                rows_NE, weight_VE, bias_V = lm.head(h_BTD)
                raw_NV = F.linear(rows_NE, weight_VE).float() + (0.0 if bias_V is None else bias_V)
                raw_NV.retain_grad()
                embedded[0].retain_grad()
                logits_NV = softcap_torch(raw_NV, lm.config.logit_softcap, lm.softcap_kind)
                F.cross_entropy(logits_NV, y.reshape(-1), reduction="sum").backward()
                assert raw_NV.grad is not None
                assert embedded[0].grad is not None
                g_NE = embedded[0].grad.reshape(-1, embedded[0].shape[-1]).float()
                head_NE = rows_NE.detach().float()
                add(hessian, "input", g_NE.T @ g_NE)
                add(hessian, "output", head_NE.T @ head_NE)
                add(sensitivity, "input", torch.bincount(x.reshape(-1), minlength=lm.config.vocab_size))
                add(sensitivity, "output", raw_NV.grad.square().sum(0))
    finally:
        for handle in handles:
            handle.remove()
        for network in networks:
            network.watched = False
        for parameter in lm.parameters():
            parameter.grad = None
    tokens = float(ranks.sum(torch.tensor([float(x_BT.numel())], device=x_BT.device)))
    for part in (hessian, sensitivity):
        for name in sorted(part):
            part[name] = ranks.sum(part[name]).cpu() / tokens
    found = {name: LayerStatistics(hessian[name].numpy(), sensitivity[name].numpy()) for name in modules}
    seen_V, might_V = sensitivity["input"].numpy(), sensitivity["output"].numpy()
    floor = 0.1 / tokens  # a token or pair that this text lacks is not free
    if lm.bigrams is not None:
        seen_N = sensitivity["bigrams"].numpy()
        found["bigrams.table.weight"] = LayerStatistics(hessian["bigrams"].numpy(), seen_N + floor)
    in_EE, out_EE = hessian["input"].numpy(), hessian["output"].numpy()
    if own_head:
        found["token_embed.weight"] = LayerStatistics(in_EE, seen_V + floor)
        found["lm_head.weight"] = LayerStatistics(out_EE, might_V + floor)
    else:
        found["token_embed.weight"] = LayerStatistics(out_EE + in_EE * (seen_V.sum() / might_V.sum()), might_V + floor)
    return found


def latent_sums(jepa: JepaHead, z_BTD: Tensor, stride: int) -> dict[str, float]:
    """Means over one batch of latents: cosine and squared error of the one-step prediction, of copying, variances."""
    guess_BTD, z_BTD = jepa.predict(z_BTD[:, :-stride]).float(), z_BTD.float()
    target_BTD = z_BTD[:, stride:]
    return {
        "cosine": float(F.cosine_similarity(guess_BTD, target_BTD, dim=-1).mean()),
        "mse": float((guess_BTD - target_BTD).square().mean()),
        "copy": float((z_BTD[:, :-stride] - target_BTD).square().mean()),
        "within": float(z_BTD.var(dim=1, unbiased=False).mean()),
        "variance": float(z_BTD.square().mean()),
    }


def latent_shares(sums: Mapping[str, float]) -> dict[str, float]:
    return {
        "jepa_cosine": sums["cosine"],
        "jepa_mse": sums["mse"],
        "jepa_r2_over_copy": 1.0 - sums["mse"] / max(sums["copy"], 1e-12),
        "z_temporal_variance": sums["within"] / max(sums["variance"], 1e-12),
    }


def jepa_diagnostics(
    model: TrainingModel, validation: Validation, config: Config, device: torch.device
) -> dict[str, float]:
    """What the latent space has learned, on validation windows (nothing measured here reaches the artifact).

    cosine and r2_over_copy compare the one-step prediction with its target (r2_over_copy = 1 - MSE(prediction) /
    MSE(copying z_t); 0 means no better than copying); temporal_variance is the share of z's variance that lies along
    time within a window (0: z is constant in time); top-k accuracies are the language model's; probe_bpb is a linear
    probe on frozen h, trained on the first 80% of the windows and scored in true bits per byte on the rest.
    """
    tokens, bos_id = validation.tokens, validation.tokenizer.bos_id
    length = config.train_seq_len
    rows = max(2, min(50_000 // length, (len(tokens) - 1) // length))
    count = rows * length
    if count + 1 > len(tokens):
        return {}
    ids_n = torch.from_numpy(np.asarray(tokens[: count + 1]).astype(np.int64)).to(device)
    x_BT, y_BT = ids_n[:-1].view(rows, length), ids_n[1:].view(rows, length)
    documents_BT = (x_BT == (-1 if bos_id is None else bos_id)).cumsum(1).int()
    sums: dict[str, float] = dict.fromkeys(
        ("cosine", "mse", "copy", "within", "variance", "top1", "top5", "top10"), 0.0
    )
    hidden = []
    with torch.no_grad():
        for i in range(rows):
            h_BTD, z_BTD = model.latents(x_BT[i : i + 1], documents_BT[i : i + 1])
            hidden.append(h_BTD[0].float())
            if model.jepa is not None and z_BTD is not None:
                for name, value in latent_sums(model.jepa, z_BTD, config.jepa_stride).items():
                    sums[name] += value / rows
            head_rows, weight, bias = model.lm.head(h_BTD)
            logits_TV = F.linear(head_rows, weight).float() + (0 if bias is None else bias)
            best_TK = logits_TV.topk(10, dim=-1).indices == y_BT[i][:, None]
            for k in (1, 5, 10):
                sums[f"top{k}"] += float(best_TK[:, :k].any(dim=1).float().mean()) / rows
    out = {f"lm_top{k}": sums[f"top{k}"] for k in (1, 5, 10)}
    if model.jepa is not None:
        out |= latent_shares(sums)
    split = max(1, int(0.8 * rows))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 2)
        probe = nn.Linear(config.model_dim, config.vocab_size).to(device)
        train_ND, train_N = torch.cat(hidden[:split]), y_BT[:split].reshape(-1)
        optimizer = torch.optim.Adam(probe.parameters(), lr=3e-3)
        for _ in range(200):
            pick = torch.randint(0, len(train_N), (min(2048, len(train_N)),)).to(device)
            loss = F.cross_entropy(probe(train_ND[pick]), train_N[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        nats = float(F.cross_entropy(probe(torch.cat(hidden[split:])), y_BT[split:].reshape(-1), reduction="sum"))
    held = np.asarray(tokens[split * length : count + 1])
    out["probe_bpb"] = bits_per_byte(nats, int(token_bytes(validation.table, held[:-1], held[1:]).sum()))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Run folder and checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def our_sources() -> dict[str, str]:
    """Source text of every module of ours that this process runs, by file name relative to the entry's repository."""
    entry = Path(__file__).resolve()
    sources = {"train_gpt.py": entry.read_text(encoding="utf-8")}
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.split(".")[0] == "common" and file:
            sources[name.replace(".", "/") + ".py"] = Path(file).read_text(encoding="utf-8")
    return {name: text for name, text in sources.items() if text}


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that the entry lies in and whether it has uncommitted changes; None outside git."""
    if shutil.which("git") is None:
        return None

    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=Path(__file__).resolve().parent, capture_output=True, text=True)

    commit = ask("rev-parse", "HEAD")
    if commit.returncode != 0:
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(ask("status", "--porcelain", "-uno").stdout.strip())}


def versions_and_hardware(device: torch.device) -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if device.type == "cuda" else []
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "processor": processor_name(),  # products of another round otherwise
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


class RunFolder:
    """`runs/RUN_ID`: config.json, log.jsonl, train.log, checkpoints/, model.artifact, summary.json. Leader writes."""

    def __init__(self, config: Config, ranks: Ranks, log_json: bool = False) -> None:
        self.path = Path(config.runs_dir) / config.run_id
        self.console = TrainingConsole(ranks.leads, log_json)
        self.checkpoints = self.path / "checkpoints"
        self.artifact = self.path / "model.artifact"
        self.summary = self.path / "summary.json"
        self.config, self.ranks = config, ranks
        # Where the checkpoint stands that the run goes on from: what log.jsonl held, the last step that was validated.
        self.logged_bytes = self.validated_step = 0

    def checkpoint_of(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}.safetensors"

    def open(self, command: Command) -> None:
        """Create or reopen. Raises ConfigError for a finished run, CheckpointError for another configuration."""
        if self.ranks.leads:
            record = self.path / "config.json"
            try:
                if self.summary.exists():
                    raise ConfigError(f"{self.path} is finished; use another --run_id or --overwrite")
                if record.exists():
                    self._check_same(self._recorded_config(record))
            except GolfError:
                if not command.overwrite:
                    raise
                shutil.rmtree(self.path)
            with storing(self.path):
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                remove_temporaries(self.path)
                remove_temporaries(self.checkpoints)
            write_atomically(
                record, json.dumps({"preset": command.preset, "config": asdict(self.config)}, indent=1).encode()
            )
        self.ranks.barrier()

    def _recorded_config(self, record: Path) -> dict[str, Any]:
        try:
            config = json.loads(record.read_text(encoding="utf-8"))["config"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{record} is damaged ({type(error).__name__}: {error}); expected what this program wrote: delete that "
                "file to go on from the newest checkpoint, which knows its configuration, or use --overwrite"
            ) from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{record}: config is {config!r}, expected an object; delete that file to go on")
        return config

    def _check_same(self, before: dict[str, Any]) -> None:
        now = asdict(self.config)
        changed = [k for k in now if k not in RESUME_FREE_FIELDS and before.get(k) != now[k]]
        if changed:
            listing = ", ".join(f"{k} was {before.get(k)!r}, is {now[k]!r}" for k in changed)
            raise CheckpointError(
                f"{self.path} was begun with another configuration ({listing}); use another --run_id or --overwrite"
            )

    def begin_logs(self, step: int, device: torch.device, kernels: Kernels) -> None:
        """Open train.log with the sources that run; drop what was logged behind the checkpoint: it is done again."""
        if not self.ranks.leads:
            return
        log = self.path / "log.jsonl"
        kept = log.read_bytes()[: self.logged_bytes] if log.exists() else b""
        write_atomically(log, kept[: kept.rfind(b"\n") + 1])
        if step == 0:
            write_atomically(self.path / "train.log", b"")
            sources = our_sources()
            for name, text in sources.items():
                self.text(f"{'=' * 40} {name}\n{text}", console=False)
        self.text(json.dumps(versions_and_hardware(device)), console=False)
        self.text(json.dumps(asdict(self.config)), console=False)
        self.text(f"kernels: {kernels.name} ({kernels.reason}); device {device}; ranks {self.ranks.world}")
        self.text(self.ranks.tuning, console=False)

    def sync_log(self) -> int:
        """Put log.jsonl on disk; its bytes."""
        log = self.path / "log.jsonl"
        if not log.exists():
            return 0
        with storing(log), open(log, "rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def text(self, line: str, console: bool = True) -> None:
        if self.ranks.leads:
            if console:
                self.console.say(line)
            log = self.path / "train.log"
            with storing(log), open(log, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def event(self, **values: Any) -> None:
        if self.ranks.leads:
            log = self.path / "log.jsonl"
            with storing(log), open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
            self.console.entry(values)


def checkpoint_digest(state: str, tensors: Mapping[str, Tensor]) -> str:
    """Checksum of a checkpoint: its header's text, and name, type, shape and bytes of every tensor (on the CPU)."""
    digest = hashlib.blake2b(state.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a checkpoint. Raises CheckpointError if it is not, bit for bit, what was saved."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        if checkpoint_digest(metadata["state"], tensors) != metadata["blake2b"]:
            raise CheckpointError(f"checkpoint {path} is damaged: its bytes do not fit its checksum")
        return json.loads(metadata["state"]), tensors
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({type(error).__name__}: {error})") from error


def save_checkpoint(
    folder: RunFolder,
    masters: Masters,
    optimizers: Mapping[str, torch.optim.Optimizer],
    at: Progress,
    loader_state: dict[str, Any],
) -> None:
    """Write checkpoints/step_N.safetensors, read it back, and keep the newest `checkpoint_keep`. Leader only.

    Plain tensors and JSON under a checksum; nothing is pickled. No generator state: every random draw is a function of
    (seed, step). A file has its final name once it is whole, on disk and verified; older ones go after that. Raises
    StorageError; older checkpoints are then as they were.
    """
    tensors = {f"master/{name}": p.detach() for name, p in masters.master.items()}
    tensors |= {f"ema/{name}": t for name, t in masters.ema.items()}
    tensors |= {f"steps/{name}": t for name, t in masters.steps.items()}
    names = {id(p): name for name, p in masters.master.items()}
    for kind, optimizer in optimizers.items():
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                tensors[f"{kind}/{names[id(parameter)]}/{key}"] = torch.as_tensor(value)
    from safetensors import SafetensorError  # not on top: a bench of steps needs no file format
    from safetensors.torch import save_file

    header = {"step": at.step, "elapsed_s": at.elapsed_s, "tokens": at.tokens}
    header |= {"loader": loader_state, "config": asdict(folder.config)}
    header |= {"steps_nats": masters.steps_nats, "skipped": int(masters.skipped)}
    header |= {"logged_bytes": folder.sync_log(), "validated_step": folder.validated_step}
    state, tensors = json.dumps(header), {k: t.cpu().contiguous() for k, t in tensors.items()}
    metadata = {"state": state, "blake2b": checkpoint_digest(state, tensors)}
    path = folder.checkpoint_of(at.step)
    temporary = path.with_name(f".{path.name}.tmp")
    with storing(path):
        try:
            save_file(tensors, temporary, metadata=metadata)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            read_checkpoint(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except (SafetensorError, CheckpointError) as error:
            raise StorageError(
                f"{path}: not saved ({error}); free space or use another disk. Older checkpoints are as they were: the "
                "same command goes on from the newest"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        for old in sorted(folder.checkpoints.glob("step_*.safetensors"))[: -max(folder.config.checkpoint_keep, 1)]:
            old.unlink()


def load_checkpoint(
    folder: RunFolder, masters: Masters, optimizers: Mapping[str, torch.optim.Optimizer]
) -> tuple[Progress, dict[str, Any] | None]:
    """Restore the newest readable checkpoint: where the run stood, loader state; the start and None without one.

    A damaged file is named and the one before it used. Raises CheckpointError if every one is damaged or of another
    configuration.
    """
    found = sorted(folder.checkpoints.glob("step_*.safetensors"), reverse=True)
    if not found:
        return Progress(0, 0.0), None
    for path in found:
        try:
            header, tensors = read_checkpoint(path)
        except CheckpointError as error:
            folder.text(f"{error}; trying the one before it")
            continue
        try:
            folder._check_same(header["config"])
            with torch.no_grad():
                for name, master in masters.master.items():
                    master.copy_(tensors[f"master/{name}"])
                    if f"ema/{name}" in tensors:
                        masters.ema[name] = tensors[f"ema/{name}"].to(master.device)
            steps = {key.removeprefix("steps/lm."): t for key, t in tensors.items() if key.startswith("steps/")}
            masters.train_on(steps, header["steps_nats"])
            masters.skipped.fill_(header["skipped"])
            folder.logged_bytes, folder.validated_step = int(header["logged_bytes"]), int(header["validated_step"])
            for kind, optimizer in optimizers.items():
                state_dict = optimizer.state_dict()
                order = [p for group in optimizer.param_groups for p in group["params"]]
                names = {id(p): name for name, p in masters.master.items()}
                state_dict["state"] = {}
                for i, parameter in enumerate(order):
                    prefix = f"{kind}/{names[id(parameter)]}/"
                    state = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
                    if any(t.shape not in ((), parameter.shape) for t in state.values()):
                        raise ValueError(f"{prefix} has another shape than its parameter")
                    if state:
                        state_dict["state"][i] = state
                optimizer.load_state_dict(state_dict)
            step = int(header["step"])
            # Before batches could grow, nobody counted their tokens.
            tokens = int(header.get("tokens", step * folder.config.train_batch_tokens))
            return Progress(step, float(header["elapsed_s"]), tokens=tokens), header["loader"]
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"checkpoint {path} does not fit this model ({type(error).__name__}: {error}); delete it, or start "
                "over with --overwrite"
            ) from error
    raise CheckpointError(f"{folder.checkpoints}: all {len(found)} checkpoints are damaged; delete them to start over")


# ---------------------------------------------------------------------------------------------------------------------
# Export and scoring of artifacts
# ---------------------------------------------------------------------------------------------------------------------


def cast_compute(lm: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """Matrices and embedding in the compute dtype, vectors in float32: what `Masters` does to a model in training."""
    for name, parameter in lm.named_parameters():
        if optimizer_group(name, parameter) != "scalar":
            parameter.data = parameter.data.to(dtype)
    return lm


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def artifact_meta(config: Config, tokenizer: Tokenizer, temperature: float) -> dict[str, Any]:
    """What an artifact says about itself: enough to build the model, find its tokenizer and score it."""
    return {
        "entry": "jepa_mamba",
        "model": {
            name: getattr(config, name) for name in MODEL_FIELDS if getattr(config, name) != getattr(Config(), name)
        },
        "temperature": temperature,
        "tokenizer": {"kind": config.tokenizer, "sha256": tokenizer.sha256, "bos_id": tokenizer.bos_id},
        "eval": {name: getattr(config, name) for name in SCORING_FIELDS},
    }


def export_artifact(
    path: Path, masters: Masters, config: Config, tokenizer: Tokenizer, temperature: float
) -> SizeReport:
    """Quantize what ships and write it. Training-only parameters are not in `masters.quantized()` and never enter."""
    return save_artifact(path, masters.quantized(), artifact_meta(config, tokenizer, temperature))


def load_model(path: str | Path, kernels_choice: str, ranks: Ranks) -> tuple[LanguageModel, Config, dict[str, Any]]:
    """Read an artifact into a fresh model, strictly. Raises ArtifactError or ConfigError.

    The model is first laid out without memory: what an artifact claims about itself must fit its tensors.
    """
    arrays, meta = load_artifact(path)
    model, scoring, tokenizer = (meta.get(key) for key in ("model", "eval", "tokenizer"))
    if (
        meta.get("entry") != "jepa_mamba"
        or not (isinstance(model, dict) and set(model) <= set(MODEL_FIELDS))
        or not (isinstance(scoring, dict) and set(scoring) <= set(SCORING_FIELDS))
        or not (isinstance(tokenizer, dict) and {"kind", "sha256"} <= set(tokenizer))
        or not (isinstance(meta.get("temperature"), (int, float)) and 0 < meta["temperature"] < math.inf)
    ):
        raise ConfigError(f"{path}: not an artifact of this entry; its description is {str(meta)[:200]}")
    config = replace(Config(), tokenizer=tokenizer["kind"], **model, **scoring)
    check_config(config)
    if config.num_layers > len(arrays):
        raise ConfigError(f"{path}: describes {config.num_layers} layers but holds {len(arrays)} tensors")
    try:
        with torch.device("meta"):
            lm = LanguageModel(config, select_kernels(kernels_choice, ranks.device))
    except RuntimeError as error:  # sizes that are each allowed and whose product is not
        raise ConfigError(f"{path}: describes a model that no memory could hold ({str(error)[:100]})") from error
    described = {name: tuple(tensor.shape) for name, tensor in lm.state_dict().items()}
    held = {name: array.shape for name, array in arrays.items()}
    if described != held:
        differing = sorted(name for name in described.keys() | held.keys() if described.get(name) != held.get(name))
        name = differing[0]
        raise ConfigError(
            f"{path}: {len(differing)} tensors do not fit the model that it describes, the first {name}: "
            f"{held.get(name, 'absent')} held, {described.get(name, 'none')} described"
        )
    lm.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, strict=True, assign=True)
    return cast_compute(lm.to(ranks.device), compute_dtype(ranks.device)).eval(), config, meta


def matching_tokenizer(config: Config, meta: Mapping[str, Any], beside: str, artifact: str | Path) -> Tokenizer:
    tokenizer = open_tokenizer(config, beside)
    if tokenizer.sha256 != meta["tokenizer"]["sha256"]:
        raise TokenizerError(
            f"{artifact} was trained with a tokenizer of sha256 {meta['tokenizer']['sha256']}, but the one "
            f"given has {tokenizer.sha256}; give the right one with --tokenizer_path"
        )
    return tokenizer


def score_artifact(command: Command, artifact: str | Path, pattern: str, ranks: Ranks) -> dict[str, Any]:
    """Score an artifact on validation shards, from nothing but code, artifact, tokenizer and shards -> JSON object."""
    started_s = time.perf_counter()
    given = command.config
    lm, config, meta = load_model(artifact, given.kernels, ranks)
    always = ("eval_seconds", "eval_tokens_per_s")
    scoring = (*SCORING_FIELDS, "eval_lanes", "val_batch_size", "tokenizer_path")
    chosen = [*always, *(name for name in scoring if name in command.given)]
    config = replace(config, **{name: getattr(given, name) for name in chosen})
    check_config(config)
    tokenizer = matching_tokenizer(config, meta, str(list_shards(pattern)[0].parent), artifact)
    validation = open_validation(pattern, tokenizer, config.vocab_size)
    scores = {
        mode: score_tokens(lm, validation, config, mode=mode, temperature=meta["temperature"], ranks=ranks)
        for mode in config.modes()
    }
    gain = {}
    if {"standard", "carried"} <= scores.keys():
        length = config.eval_seq_len or config.train_seq_len
        gain["carried_gain"] = gain_by_position(scores["standard"].nll_n, scores["carried"].nll_n, length)
    scores = {mode: score.summary() for mode, score in scores.items()}
    head = scores[config.modes()[0]]
    digest = hashlib.sha256()
    for shard in list_shards(pattern):
        digest.update(Path(shard).read_bytes())
    return {
        "val_bpb": head["bpb"],
        "val_loss": head["loss"],
        "val_tokens": head["tokens"],
        "val_bytes": head["scored_bytes"],
        "byte_source": head["byte_source"],
        "eval_mode": head["mode"],
        "temperature": meta["temperature"],
        "weights": "artifact",
        "artifact": str(artifact),
        "artifact_bytes": Path(artifact).stat().st_size,
        "artifact_sha256": hashlib.sha256(Path(artifact).read_bytes()).hexdigest(),
        "tokenizer_sha256": tokenizer.sha256,
        "tokenizer_lossless": tokenizer.lossless,
        "val_sha256": digest.hexdigest(),
        "eval_s": time.perf_counter() - started_s,
        "scores": scores,
        **gain,
    }


@torch.inference_mode()
def generate_text(command: Command, artifact: str, ranks: Ranks) -> str:
    """Continue a prompt by sampling from the artifact's model at its temperature, state carried token by token."""
    lm, config, meta = load_model(artifact, command.config.kernels, ranks)
    config = replace(config, tokenizer_path=command.config.tokenizer_path)
    tokenizer = matching_tokenizer(config, meta, str(Path(command.config.data_path)), artifact)
    generator = torch.Generator().manual_seed(command.config.seed)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = start + [int(i) for i in tokenizer.encode(command.prompt)] or [0]
    x_BT, state, written = torch.tensor([ids], device=ranks.device), None, []
    for _ in range(command.tokens):
        h_BTD, state = lm.encode(x_BT, torch.ones_like(x_BT), state)
        rows, weight, bias = lm.head(h_BTD[:, -1:])
        logits_V = F.linear(rows[-1], weight).float() + (0.0 if bias is None else bias)
        capped_V = softcap_torch(logits_V, config.logit_softcap, lm.softcap_kind) / meta["temperature"]
        token = int(torch.multinomial(capped_V.softmax(-1).cpu(), 1, generator=generator))
        if token == tokenizer.bos_id:
            break
        written.append(token)
        x_BT = torch.tensor([[token]], device=ranks.device)
    return command.prompt + tokenizer.decode(np.array(written, dtype=np.int64))


def referee_hook(artifact: str) -> dict[str, Any]:
    """What a referee may ask of an entry (docs/VERIFIER.md): its own scoring, on any stream of tokens."""
    ranks = join_ranks("cpu", {})
    lm, config, meta = load_model(artifact, "torch", ranks)
    bos_id = meta["tokenizer"].get("bos_id")
    length = config.eval_seq_len or config.train_seq_len

    def nll(tokens: np.ndarray, mode: str) -> np.ndarray:
        """Nats of tokens[1:], float64 (n - 1)."""
        if mode == "ttt":
            return adapted_nll(lm, tokens, config, bos_id=bos_id, temperature=meta["temperature"], ranks=ranks)[0]
        return token_nll(
            lm,
            tokens,
            mode=mode,
            length=length,
            stride=config.sliding_eval_stride,
            batch_tokens=config.val_batch_size,
            lanes=config.eval_lanes,
            bos_id=bos_id,
            temperature=meta["temperature"],
            ranks=ranks,
        )[0]

    return {
        "nll": nll,
        "modes": config.modes(),
        "vocab_size": config.vocab_size,
        "bos_id": bos_id,
        "isolates_documents": config.document_reset,
        "window": length,
        "learns_while_scoring": "ttt" in config.modes(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Progress(NamedTuple):
    """Where a run stands, from which every schedule is computed."""

    step: int
    elapsed_s: float
    reserved_s: float = 0.0  # seconds at the end of the clock that are not for steps: the temperature search
    tokens: int = 0  # learnt from so far, over all ranks

    def fraction(self, config: Config) -> float:
        by_steps = self.step / config.iterations
        for_steps_s = config.max_wallclock_seconds - self.reserved_s
        by_time = 0.0
        if config.max_wallclock_seconds > 0:
            by_time = self.elapsed_s / for_steps_s if for_steps_s > 0 else 1.0
        return min({"steps": by_steps, "time": by_time, "auto": max(by_steps, by_time)}[config.warmdown_by], 1.0)


def learning_rate_scale(at: Progress, config: Config) -> float:
    """Linear warmup over lr_warmup_steps, then 1, then linear to 0 over the last warmdown_fraction."""
    warmup = min((at.step + 1) / config.lr_warmup_steps, 1.0) if config.lr_warmup_steps else 1.0
    left = 1.0 - at.fraction(config)
    return warmup * (min(left / config.warmdown_fraction, 1.0) if config.warmdown_fraction > 0 else 1.0)


def momentum_at(step: int, config: Config) -> float:
    share = min(step / config.muon_momentum_warmup_steps, 1.0) if config.muon_momentum_warmup_steps else 1.0
    return (1 - share) * config.muon_momentum_warmup_start + share * config.muon_momentum


def on_grid_at(at: Progress, config: Config) -> bool:
    return config.qat_fraction > 0 and at.fraction(config) >= 1.0 - config.qat_fraction


def jepa_scale_at(at: Progress, config: Config) -> float:
    return max(1.0 - at.fraction(config) / config.jepa_until, 0.0) if config.jepa_until > 0 else 1.0


def sigreg_lambda_at(at: Progress, config: Config) -> float:
    ramp = min(at.fraction(config) / 0.3, 1.0) if config.sigreg_schedule else 1.0
    return config.sigreg_lambda * ramp * jepa_scale_at(at, config)


def can_double(start: int, full: int) -> bool:
    """Is full the start times a power of two (or start 0, for no schedule)?"""
    return start == 0 or (full % start == 0 and (full // start).bit_count() == 1)


def doubled_at(at: Progress, config: Config, start: int, full: int, full_at: float) -> int:
    """`start`, doubled at equal shares of the time before the fraction `full_at` of the run; `full` after it."""
    if start == 0 or at.fraction(config) >= full_at:
        return full
    doublings = (full // start).bit_length() - 1
    return start << int(at.fraction(config) / full_at * doublings)


def seq_len_at(at: Progress, config: Config) -> int:
    """Tokens of a window."""
    return doubled_at(at, config, config.seq_len_start, config.train_seq_len, config.seq_len_full_at)


def batch_tokens_at(at: Progress, config: Config) -> int:
    """Tokens of a step over all ranks: a whole number of the loader's batches."""
    return doubled_at(at, config, config.batch_tokens_start, config.train_batch_tokens, config.batch_full_at)


class StepPlan(NamedTuple):
    """What a step does, as far as it is not a number on the device: one CUDA graph serves one plan."""

    on_grid: bool  # the compute weights for the next step lie on their grids
    averaging: bool  # the moving average takes part
    sigreg: bool
    jepa: bool


class CapturedStep:
    """A step that the device runs by itself: captured as a CUDA graph when its plan comes for the second time.

    The first time runs eagerly, so that kernels compile, buffers and tables come to be, and nothing has to be undone.
    What is returned by a replay is overwritten by the next one. Other threads may go on copying batches meanwhile.
    """

    def __init__(self, work: Callable[..., dict[str, Tensor]]) -> None:
        self.work = work
        self.met: set[Any] = set()
        self.graphs: dict[Any, tuple[Any, list[Tensor | None], dict[str, Tensor]]] = {}

    def __call__(self, plan: StepPlan, inputs: Sequence[Tensor | None]) -> dict[str, Tensor]:
        key = (plan, *(None if t is None else (tuple(t.shape), t.dtype) for t in inputs))
        if key not in self.met:
            self.met.add(key)
            return self.work(plan, *inputs)
        if key not in self.graphs:
            static = [None if t is None else t.clone() for t in inputs]
            self.graphs[key] = self.record(plan, static)
        graph, static, outputs = self.graphs[key]
        for into, t in zip(static, inputs, strict=True):
            if into is not None and t is not None:
                into.copy_(t, non_blocking=True)
        graph.replay()
        return outputs

    def record(self, plan: StepPlan, static: list[Tensor | None]) -> tuple[Any, list[Tensor | None], dict[str, Tensor]]:
        """Capture one run of the work on `static`, without running it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = self.work(plan, *static)
        return graph, static, outputs

    def forget(self) -> None:
        """Drop all graphs: tensors that they know by address have been replaced."""
        self.met.clear()
        self.graphs.clear()


class Trainer:
    """Model, masters and optimizers, and what one step does to them."""

    def __init__(self, config: Config, kernels: Kernels, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.model = TrainingModel(config, kernels).to(ranks.device)
        self.masters = Masters(self.model, config, compute_dtype(ranks.device))
        self.optimizers = build_optimizers(self.model, self.masters, config)
        self.base_lr = {"muon": config.matrix_lr, "embed": config.embed_lr, "scalar": config.scalar_lr}
        self.not_compiled = compile_obstacle(ranks.device) if config.compile_model else "not asked for"
        self.loss = self.model if self.not_compiled else torch.compile(self.model)
        self.captured = CapturedStep(self.update) if config.cuda_graphs else None
        self.current: Mapping[str, float | Tensor] = self.numbers(Progress(0, 0.0))
        self.skipped_batch: tuple[Tensor, ...] | None = None  # of the last one: step, windows, x and y, room for more
        # A graph reads the numbers that change from step to step out of the device's memory.
        self.rates = {name: torch.zeros((), device=ranks.device) for name in self.current}

    def numbers(self, at: Progress) -> dict[str, float]:
        """What changes from step to step without changing what a step does."""
        scale = learning_rate_scale(at, self.config)
        rates = {f"lr/{kind}": lr * scale for kind, lr in self.base_lr.items()}
        momentum = momentum_at(at.step, self.config)
        latent = {"sigreg_lambda": sigreg_lambda_at(at, self.config), "jepa_scale": jepa_scale_at(at, self.config)}
        return rates | {"momentum": momentum, "step": at.step} | latent

    def step_plan(self, at: Progress) -> StepPlan:
        c, after = self.config, at._replace(step=at.step + 1)
        return StepPlan(
            on_grid=on_grid_at(after, c),
            averaging=c.ema_decay > 0 and after.fraction(c) >= c.ema_start_fraction,
            sigreg=sigreg_lambda_at(at, c) > 0,
            jepa=jepa_scale_at(at, c) > 0,
        )

    def gradients(
        self, plan: StepPlan, x_BT: Tensor, y_BT: Tensor, document_ids_BT: Tensor | None, positions: Tensor | None
    ) -> dict[str, Tensor]:
        """Forward and backward over the micro-batches of a step; masters' gradients summed over ranks."""
        c = self.config
        self.masters.flat_gradient.zero_()
        rows = x_BT.shape[0]
        micro = max(1, min(rows, c.micro_batch_tokens // x_BT.shape[1]))
        weight = self.current["sigreg_lambda"] if plan.sigreg else None
        scale = self.current["jepa_scale"] if plan.jepa else None
        totals: dict[str, Tensor] = {}
        for i in range(0, rows, micro):
            own = slice(i, i + micro)
            x, y = x_BT[own], y_BT[own]
            documents = None if document_ids_BT is None else document_ids_BT[own]
            loss, parts = self.loss(x, y, documents, weight, positions, scale)
            loss.backward()
            share = x.shape[0] / rows
            self.masters.accumulate_gradients(share / self.ranks.world)
            for key, value in parts.items():
                totals[key] = totals.get(key, 0.0) + share * value
        self.ranks.sum(self.masters.flat_gradient)
        return totals

    def update(
        self, plan: StepPlan, x_BT: Tensor, y_BT: Tensor, document_ids_BT: Tensor | None, positions: Tensor | None
    ) -> dict[str, Tensor]:
        """All that a step does on the device, with the numbers in `current`; never waits for the device."""
        c = self.config
        losses = self.gradients(plan, x_BT, y_BT, document_ids_BT, positions)
        norm = torch.linalg.vector_norm(self.masters.flat_gradient)
        if c.grad_clip_norm > 0:
            self.masters.flat_gradient.mul_(torch.clamp(c.grad_clip_norm / (norm + 1e-6), max=1.0))
        self.skip_unless(torch.isfinite(norm), x_BT, y_BT)
        for kind, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.current[f"lr/{kind}"]
                if kind == "muon":
                    group["momentum"] = self.current["momentum"]
            optimizer.step()
        if plan.averaging:
            self.masters.update_ema(c.ema_decay)
        self.masters.publish(plan.on_grid)
        return losses | {"grad_norm": norm}

    def skip_unless(self, finite: Tensor, x_BT: Tensor, y_BT: Tensor) -> None:
        """A gradient that is not finite (on any rank) counts as zero; the step is counted and its batch kept.

        Momentum and decay go on, as for any gradient of zero. All on the device: nobody waits to learn of it.
        """
        bad = ~finite
        self.masters.flat_gradient.masked_fill_(bad, 0.0)
        self.masters.skipped += bad
        step = self.current["step"]
        step = step if isinstance(step, Tensor) else torch.full((), step, device=bad.device)
        length = self.config.train_seq_len  # windows as the loader gave them, however short the step's pieces are
        x_BT, y_BT = x_BT.view(-1, length), y_BT.view(-1, length)
        windows = torch.full_like(step, len(x_BT))
        if self.skipped_batch is None:
            most = max(len(x_BT), self.config.train_batch_tokens // length // self.ranks.world)
            x_kept, y_kept = (t.new_zeros(most, length) for t in (x_BT, y_BT))
            self.skipped_batch = (torch.zeros_like(step), torch.zeros_like(step), x_kept, y_kept)
        step_kept, windows_kept, x_kept, y_kept = self.skipped_batch
        places = (step_kept, windows_kept, x_kept[: len(x_BT)], y_kept[: len(y_BT)])
        for kept, new in zip(places, (step, windows, x_BT, y_BT), strict=True):
            kept.copy_(torch.where(bad, new, kept))

    def step(self, batch: StepBatch, at: Progress) -> dict[str, Tensor]:
        """One optimizer step. Returns this rank's detached losses, and the gradient norm before clipping.

        They are tensors of the device, valid until the next step: reading one waits for the device.
        """
        c, numbers, length = self.config, self.numbers(at), seq_len_at(at, self.config)
        positions = self.model.sigreg_positions(at.step, length)
        if positions is not None and self.ranks.device.type == "cuda":
            positions = positions.pin_memory().to(self.ranks.device, non_blocking=True)
        # Shorter windows are pieces of the loader's; document ids stay what they are.
        x_BT, y_BT, ids_BT = (t.view(-1, length) for t in (batch.x_BT, batch.y_BT, batch.document_ids_BT))
        inputs = (x_BT, y_BT, ids_BT if c.document_reset else None, positions)
        if self.captured is None:
            self.current = numbers
            return self.update(self.step_plan(at), *inputs)
        self.current = self.rates
        for name, value in numbers.items():
            self.rates[name].fill_(value)
        return self.captured(self.step_plan(at), inputs)

    def measure_latents(self, batch: StepBatch, at: Progress) -> dict[str, float]:
        """Of one micro-batch: norm of each latent objective's gradient over cross-entropy's, and the state of z.

        Norms are over the weights that ship. Learns nothing: gradients are taken apart from the masters'.
        """
        c, model = self.config, self.model
        rows = max(1, min(len(batch.x_BT), c.micro_batch_tokens // c.train_seq_len))
        ids_BT = batch.document_ids_BT[:rows] if c.document_reset else None
        x_BT, y_BT = batch.x_BT[:rows], batch.y_BT[:rows]
        positions = model.sigreg_positions(at.step, c.train_seq_len)
        positions = None if positions is None else positions.to(self.ranks.device)
        weight = sigreg_lambda_at(at, c) or None
        weighted, parts = model.objectives(x_BT, y_BT, ids_BT, weight, positions, jepa_scale_at(at, c) or None)
        shipped, norms = list(model.lm.parameters()), {}
        for name, objective in weighted.items():
            found = torch.autograd.grad(objective, shipped, retain_graph=True, allow_unused=True)
            norms[name] = math.sqrt(sum(float(g.float().square().sum()) for g in found if g is not None))
        out = {f"{name}_gradient_over_ce": norm / norms["ce"] for name, norm in norms.items() if "ce" in norms}
        out.pop("ce_gradient_over_ce", None)
        with torch.no_grad():
            z_BTD = model.latents(x_BT, ids_BT)[1]
            if model.jepa is not None and z_BTD is not None:
                out |= latent_shares(latent_sums(model.jepa, z_BTD, c.jepa_stride))
        return out | {"sigreg_excess": float(parts["sigreg_excess"])} if "sigreg_excess" in parts else out

    @contextlib.contextmanager
    def rehearsal(self, at: Progress) -> Iterator[None]:
        """Whatever happens inside leaves weights, optimizers and averages as they were, bit for bit."""
        weights = {name: p.detach().clone() for name, p in self.masters.master.items()}
        averages = {name: t.clone() for name, t in self.masters.ema.items()}
        states = {kind: copy.deepcopy(o.state_dict()) for kind, o in self.optimizers.items()}
        skipped = self.masters.skipped.clone()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.masters.master.items():
                    parameter.copy_(weights[name])
            self.masters.ema = averages
            self.masters.skipped.copy_(skipped)
            for kind, optimizer in self.optimizers.items():
                optimizer.load_state_dict(states[kind])
            if self.captured is not None:
                self.captured.forget()
            self.masters.publish(on_grid_at(at, self.config))

    def rehearse(self, loader: TokenLoader, at: Progress, last: Callable[[Prefetcher], None]) -> float:
        """Run the warmup steps and what follows the last step, undo them, and return the seconds that `last` took."""
        if self.config.warmup_steps == 0 or at.fraction(self.config) >= 1.0:
            return 0.0
        prefetcher = Prefetcher(loader, self.ranks.device)
        with self.rehearsal(at):
            for _ in range(self.config.warmup_steps):
                self.step(prefetcher.next(), at)
            started_s = seconds_now(self.config.clock)
            last(prefetcher)
            last_s = seconds_now(self.config.clock) - started_s
        prefetcher.close()
        return last_s

    def calibration_batches(self) -> int:
        return max(1, round(self.config.temp_calib_tokens / self.config.drawn_tokens))

    def temperature(self, batches: Sequence[StepBatch]) -> float:
        """Temperature of the weights that would ship, on training text."""
        x_BT = torch.cat([batch.x_BT for batch in batches])
        y_BT = torch.cat([batch.y_BT for batch in batches])
        documents_BT = torch.cat([batch.document_ids_BT for batch in batches])
        rows = max(1, self.config.temp_calib_tokens // self.config.train_seq_len // self.ranks.world)
        micro = max(1, self.config.micro_batch_tokens // self.config.train_seq_len)
        with self.masters.as_shipped(training_on_grid=True):
            return search_temperature(self.model.lm, x_BT[:rows], y_BT[:rows], documents_BT[:rows], micro, self.ranks)

    def statistics(self, batches: Sequence[StepBatch]) -> dict[str, LayerStatistics]:
        """Of the float weights that would ship, on training text."""
        x_BT, y_BT = torch.cat([batch.x_BT for batch in batches]), torch.cat([batch.y_BT for batch in batches])
        documents_BT = torch.cat([batch.document_ids_BT for batch in batches])
        rows = max(1, self.config.statistics_tokens // self.config.train_seq_len // self.ranks.world)
        micro = max(1, min(self.config.micro_batch_tokens, 8192) // self.config.train_seq_len)  # whole logits
        with self.masters.as_shipped(training_on_grid=True, on_grid=False):
            return layer_statistics(self.model.lm, x_BT[:rows], y_BT[:rows], documents_BT[:rows], micro, self.ranks)

    def plan(
        self, statistics: Mapping[str, LayerStatistics], tokenizer: Tokenizer, budget_bytes: int, to_ship: bool
    ) -> tuple[ModelPlan, list[tuple[float, int, float]]]:
        """Free steps and codes that fill budget_bytes, from the weights that would ship (moving average included).

        Codes of a trellis only `to_ship`: training has use for the steps, which a trellis shares with a uniform grid.
        """
        masters, c = self.masters, self.config
        weights = {
            name.removeprefix("lm."): masters.shipped()[name].detach().cpu().float().numpy() for name in masters.spec
        }
        specs = {name.removeprefix("lm."): spec for name, spec in masters.spec.items()}
        meta = artifact_meta(c, tokenizer, 0.99)
        trained = masters.trained_steps()
        return fit_model(
            weights,
            statistics,
            specs,
            lambda plan: len(encode_artifact(plan.tensors, meta)),
            budget_bytes,
            rate=c.rate,
            start_nats=masters.steps_nats or 1e-9,
            trained=trained,
            trellis=c.trellis and to_ship,
        )


def seconds_left(at: Progress, config: Config) -> float:
    done = at.fraction(config)
    return at.elapsed_s * (1 - done) / done if done > 0 else 0.0


def held_memory_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()


def read_clock(run: str) -> list[Progress]:
    """Where another run stood before each of its steps and after the last, by its log. Raises ConfigError."""
    path = Path(run) / "log.jsonl"
    if not path.is_file():
        raise ConfigError(f"clock_from: {path} does not exist; give the folder of a run that the clock limited")
    events = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    readings = {e["step"]: e for e in events if e["event"] == "clock"}
    if len(readings) < 2 or sorted(readings) != list(range(len(readings))):
        raise ConfigError(f"clock_from: {path} has no clock readings; max_wallclock_seconds did not limit that run")
    return [Progress(step, readings[step]["elapsed_s"], readings[step]["reserved_s"]) for step in sorted(readings)]


class Run:
    """One training run: built or resumed, driven to its end, exported and scored."""

    def __init__(self, command: Command, ranks: Ranks) -> None:
        self.command, self.config, self.ranks = command, command.config, ranks
        config = self.config
        self.kernels = select_kernels(config.kernels, ranks.device)
        if config.cuda_graphs and ranks.device.type != "cuda":
            raise ConfigError(f"--cuda_graphs 1: device is {ranks.device.type}, not cuda; leave it 0")
        self.tokenizer = open_tokenizer(config, config.data_path)
        self.train_shards = list_shards(str(Path(config.data_path) / "*_train_*.bin"))
        self.val_pattern = command.val or str(Path(config.data_path) / "*_val_*.bin")
        self.validation = open_validation(self.val_pattern, self.tokenizer, config.vocab_size)
        if config.eval_tokens_per_s > 0:  # before anything is trained
            for mode in config.modes():
                computed = tokens_to_compute(self.validation.tokens, config, mode, self.tokenizer.bos_id, ranks.world)
                declared = "as declared by eval_tokens_per_s"
                check_evaluation(mode, computed, config.eval_tokens_per_s, config, declared)
        self.readings = read_clock(config.clock_from) if config.clock_from else []
        self.batch_rows = config.drawn_tokens // config.train_seq_len
        if self.batch_rows % ranks.world:
            name = "batch_tokens_start" if config.batch_tokens_start else "train_batch_tokens"
            raise ConfigError(f"{name} is {self.batch_rows} windows, not a multiple of {ranks.world} ranks")
        self.folder = RunFolder(config, ranks, command.log_json)
        self.folder.open(command)
        self.trainer = Trainer(config, self.kernels, ranks)
        loader = self.new_loader()
        self.at, loader_state = load_checkpoint(self.folder, self.trainer.masters, self.trainer.optimizers)
        if loader_state is not None:
            loader.restore(loader_state)
        self.loader, self.loader_state = loader, loader.state()
        self.trainer.masters.publish(on_grid_at(self.at, config))
        self.folder.begin_logs(self.at.step, ranks.device, self.kernels)
        if config.compile_model:
            obstacle = self.trainer.not_compiled
            self.folder.text(f"loss not compiled: {obstacle}" if obstacle else "loss compiled")
        self.params = sum(p.numel() for p in self.trainer.model.lm.parameters())
        self.training_only_params = sum(p.numel() for p in self.trainer.masters.master.values()) - self.params
        self.folder.text(
            f"parameters: {self.params:,} shipped, {self.training_only_params:,} training only; "
            f"step {self.at.step}, {self.at.elapsed_s:.1f} s behind us"
        )

    def new_loader(self) -> TokenLoader:
        return TokenLoader(
            self.train_shards,
            seq_len=self.config.train_seq_len,
            batch_sequences=self.batch_rows,
            rank=self.ranks.rank,
            world_size=self.ranks.world,
            seed=self.config.seed,
            bos_id=self.tokenizer.bos_id,
            vocab_size=self.config.vocab_size,
        )

    def drive(self, interruption: Interruption) -> tuple[float, float]:
        """Train until the steps or the seconds are used up: (softmax temperature, seconds of learning)."""
        with self.folder.console.live("train"):
            return self.drive_steps(interruption)

    def drive_steps(self, interruption: Interruption) -> tuple[float, float]:
        config, console = self.config, self.folder.console
        triton = self.kernels.name == "triton"
        loss = ("torch.compile", not self.trainer.not_compiled)
        compiled = (loss, ("Triton", triton), ("CUDA graph", config.cuda_graphs))
        first = ", ".join(name for name, on in compiled if on)
        console.waiting(f"first step: compiling ({first}), minutes where nothing is cached" if first else "first step")
        began_s = time.perf_counter()
        last_s = self.trainer.rehearse(self.new_loader(), self.at, self.rehearse_last)
        # Twice: a machine may be slower at the end than at the beginning, and a second over the limit is no record.
        self.at = self.at._replace(reserved_s=self.ranks.from_leader(2.0 * last_s))
        # Two steps ahead, however many of the loader's batches the largest one takes.
        ahead = 2 * config.train_batch_tokens // config.drawn_tokens
        prefetcher, first_step = Prefetcher(self.loader, self.ranks.device, ahead), self.at.step + 1
        last_step_s, logged = 0.0, self.at
        with interruption.deferred(), contextlib.closing(prefetcher):
            clock = Clock(self.ranks, config.clock, self.at.elapsed_s, interruption)
            if self.validation_due():
                self.validate()
            clock.start()
            while self.at.step < config.iterations:
                if self.readings:
                    self.at = self.readings[self.at.step]._replace(tokens=self.at.tokens)
                    if self.at.step == len(self.readings) - 1:
                        break
                elif 0 < config.max_wallclock_seconds <= self.at.elapsed_s + last_step_s + self.at.reserved_s:
                    break
                if config.max_wallclock_seconds > 0:
                    self.folder.event(event="clock", **self.at._asdict())
                if self.free_training_begins():
                    plan = self.choose_steps(prefetcher)
                    steps = {n: torch.from_numpy(plan.tensors[n].scales) for n in plan.expected_nats}
                    self.trainer.masters.train_on(steps, plan.loss_nats)
                    self.trainer.masters.publish(on_grid_at(self.at, config))
                    if self.trainer.captured is not None:
                        self.trainer.captured.forget()
                batch_tokens = batch_tokens_at(self.at, config)
                batch = prefetcher.next(batch_tokens // config.drawn_tokens)
                losses = self.trainer.step(batch, self.at)
                self.loader_state = batch.loader_state
                elapsed_s, interrupted = clock.step_done()
                last_step_s = elapsed_s - self.at.elapsed_s
                step = self.at.step + 1
                stands = self.readings[step] if self.readings else self.at._replace(step=step, elapsed_s=elapsed_s)
                self.at = stands._replace(tokens=self.at.tokens + batch_tokens)
                if step == first_step:
                    self.folder.text(f"first step done after {time.perf_counter() - began_s:.1f} s, warmup included")
                if config.train_log_every > 0 and (step % config.train_log_every == 0 or step == 1):
                    self.log(losses, batch, logged)
                    logged = self.at
                saving = config.checkpoint_every > 0 and step % config.checkpoint_every == 0
                validating = self.validation_due() and not interrupted  # the run that goes on does it then
                measuring = config.latent_log_every > 0 and step % config.latent_log_every == 0 and config.jepa_on
                if saving or validating or measuring or interrupted:  # none of these teaches the model
                    stopped_s = clock.stop()
                    self.at = self.at if self.readings else self.at._replace(elapsed_s=stopped_s)
                    if validating:
                        self.validate()
                    if measuring:
                        found = self.trainer.measure_latents(batch, self.at)
                        self.folder.event(event="latents", step=step, **found)
                    if saving or interrupted:
                        self.checkpoint()
                    if interrupted:
                        raise Preempted(0)
                    clock.start()
            if config.max_wallclock_seconds > 0:
                self.folder.event(event="clock", **self.at._asdict())  # the last reading: there is no step after it
            self.check_skipped()
            temperature = 1.0
            if config.free_steps:
                plan = self.choose_steps(prefetcher, keep=True)
                self.trainer.masters.rounded = {name: plan.tensors[name] for name in plan.expected_nats}
            if config.temp_scaling:
                batches = [prefetcher.next() for _ in range(self.trainer.calibration_batches())]
                temperature = self.trainer.temperature(batches)
            train_s = clock.stop()
        self.folder.text(f"trained {self.at.step} steps in {train_s:.2f} s; temperature {temperature:.2f}")
        return temperature, train_s

    def validation_due(self) -> bool:
        step, every = self.at.step, self.config.val_loss_every
        due = 0 < step < self.config.iterations and every > 0 and step % every == 0
        return due and self.folder.validated_step < step

    def free_training_begins(self) -> bool:
        c = self.config
        due = c.free_steps and c.free_qat_fraction > 0 and self.at.fraction(c) >= 1.0 - c.free_qat_fraction
        return due and not self.trainer.masters.steps

    def statistics_batches(self) -> int:
        return max(1, round(self.config.statistics_tokens / self.config.drawn_tokens))

    def artifact_budget_bytes(self) -> int:
        c = self.config
        if c.artifact_bytes:
            return c.artifact_bytes
        return (c.budget_bytes or CHALLENGE_BUDGET_BYTES) - sum(len(text.encode()) for text in our_sources().values())

    def rehearse_last(self, prefetcher: Prefetcher) -> None:
        """What comes after the last step, for its time: nothing of it is kept."""
        if self.config.free_steps:
            batches = [prefetcher.next() for _ in range(self.statistics_batches())]
            statistics = self.trainer.statistics(batches)
            self.trainer.plan(statistics, self.tokenizer, self.artifact_budget_bytes(), to_ship=True)
        if self.config.temp_scaling:
            self.trainer.temperature([prefetcher.next() for _ in range(self.trainer.calibration_batches())])

    def choose_steps(self, prefetcher: Prefetcher, keep: bool = False) -> ModelPlan:
        """Free steps and codes for the weights as they are; `keep` leaves weights and statistics in the run folder."""
        batches = [prefetcher.next() for _ in range(self.statistics_batches())]
        if not keep:
            self.loader_state = batches[-1].loader_state  # a resumed run goes on behind them, as this one does
        statistics = self.trainer.statistics(batches)
        budget_bytes = self.artifact_budget_bytes()
        plan, points = self.trainer.plan(statistics, self.tokenizer, budget_bytes, to_ship=keep)
        size = max(point[1] for point in points if point[0] == plan.loss_nats)
        expected = sum(plan.expected_nats.values())
        self.folder.text(
            f"step {self.at.step}: free steps at {plan.loss_nats:.2e} nats a weight, {size:,} of {budget_bytes:,} "
            f"bytes, expected loss +{expected:.5f} nats a token"
        )
        chosen = {"loss_nats": plan.loss_nats, "bytes": size, "expected_nats": expected, "points": points}
        self.folder.event(event="steps", step=self.at.step, **chosen)
        if keep and self.config.save_statistics and self.ranks.leads:
            masters = self.trainer.masters
            floats = {n.removeprefix("lm."): masters.shipped()[n].detach().cpu().float().numpy() for n in masters.spec}
            meta = artifact_meta(self.config, self.tokenizer, 1.0)
            save_artifact(self.folder.path / "float.artifact", floats, meta, ("raw",))
            parts = {
                f"{name}/{part}": np.asarray(value, np.float32)
                for name, layer in statistics.items()
                for part, value in (("hessian", layer.hessian_CC), ("sensitivity", layer.sensitivity_R))
            }
            save_artifact(self.folder.path / "statistics.artifact", parts, {}, ("raw",))
        return plan

    def log(self, losses: Mapping[str, Tensor], batch: StepBatch, logged: Progress) -> None:
        """One line and one JSON object: means over ranks, bits per byte of the leader's batch."""
        at, config = self.at, self.config
        self.check_skipped()
        skipped = int(self.trainer.masters.skipped)
        means = self.ranks.sum(torch.stack([v.detach().float() for v in losses.values()])) / self.ranks.world
        values = dict(zip(losses, means.tolist(), strict=True))
        x_N, y_N = batch.x_BT.cpu().numpy().ravel(), batch.y_BT.cpu().numpy().ravel()
        spelled_bytes = int(token_bytes(self.validation.table, x_N, y_N).sum())
        values["train_bpb"] = bits_per_byte(values.get("ce", math.nan) * len(y_N), spelled_bytes)
        tokens_per_s = (at.tokens - logged.tokens) / max(at.elapsed_s - logged.elapsed_s, 1e-9)
        entry = {
            "event": "step",
            "step": at.step,
            "elapsed_s": at.elapsed_s,
            "tokens": at.tokens,
            "tokens_per_s": tokens_per_s,
            "eta_s": seconds_left(at, config),
            "memory_bytes": held_memory_bytes(self.ranks.device),
            "lr_scale": learning_rate_scale(at, config),
            "skipped": skipped,
            **{key: value if math.isfinite(value) else None for key, value in values.items()},
        }
        self.folder.event(**entry)
        self.folder.console.progress(entry, at.fraction(config))
        line = progress_text(entry)
        if skipped:
            line += f" ({skipped} steps without a finite gradient)"
        self.folder.text(line, console=False)

    def check_skipped(self) -> None:
        """Stop if too many gradients were not finite. Raises TrainingError; every rank keeps the last such batch."""
        skipped, kept = int(self.trainer.masters.skipped), self.trainer.skipped_batch
        if skipped <= self.config.nonfinite_limit or kept is None:
            return
        step, windows, x_BT, y_BT = (tensor.cpu().numpy() for tensor in kept)
        path = self.folder.path / f"nonfinite_rank{self.ranks.rank}.npz"
        content = io.BytesIO()
        np.savez(content, step=step, x_BT=x_BT[: int(windows)], y_BT=y_BT[: int(windows)])
        write_atomically(path, content.getvalue())
        raise TrainingError(
            f"step {self.at.step}: {skipped} steps had gradients that are not finite, at most "
            f"{self.config.nonfinite_limit} are skipped (--nonfinite_limit); the last was step {int(step) + 1}, its "
            f"batch is in {path}. Lower the learning rates or look at that text; checkpoints hold finite weights"
        )

    def checkpoint(self) -> None:
        self.check_skipped()
        self.save()
        self.ranks.barrier()

    def save(self) -> None:
        if self.ranks.leads:
            masters, optimizers = self.trainer.masters, self.trainer.optimizers
            save_checkpoint(self.folder, masters, optimizers, self.at, self.loader_state)

    def complete(self, interruption: Interruption) -> None:
        """Train, export and score; a SIGTERM on the way leaves a checkpoint. Raises Preempted behind it."""
        try:
            self.finish(*self.drive(interruption))
        except Preempted:
            interruption.patient = True
            if not self.folder.checkpoint_of(self.at.step).exists():
                self.save()
            self.folder.text(f"interrupted at step {self.at.step}; the same command goes on from here")
            raise

    def score(self, mode: str, validation: Validation, temperature: float, on_grid: bool = True) -> Score:
        """The weights that would ship, or their float form, as they stand."""
        with self.trainer.masters.as_shipped(on_grid_at(self.at, self.config), on_grid):
            return score_tokens(
                self.trainer.model.lm, validation, self.config, mode=mode, temperature=temperature, ranks=self.ranks
            )

    def validate(self) -> None:
        headline = self.config.modes()[0]
        mode = "standard" if headline == "sliding" else headline  # a sliding pass would cost more than the steps
        result = self.score(mode, self.validation.first(self.config.val_max_tokens), temperature=1.0)
        self.folder.text(
            f"step {self.at.step}: val_bpb {result.bpb:.4f} val_loss {result.loss:.4f} over {result.tokens:,} tokens"
        )
        self.folder.event(
            event="validation",
            step=self.at.step,
            elapsed_s=self.at.elapsed_s,
            val_bpb=result.bpb,
            val_loss=result.loss,
            val_tokens=result.tokens,
            eval_mode=mode,
            trained_tokens=self.at.tokens,
        )
        self.folder.validated_step = self.at.step

    def finish(self, temperature: float, train_s: float) -> None:
        """Diagnose, export, read back, score, and write summary.json. Raises ArtifactError over the budget."""
        config, folder, masters = self.config, self.folder, self.trainer.masters
        diagnostics = {}
        if config.jepa_diagnostics and self.ranks.leads:
            with masters.as_shipped(on_grid_at(self.at, config)):
                diagnostics = jepa_diagnostics(self.trainer.model, self.validation, config, self.ranks.device)
            folder.event(event="diagnostics", step=self.at.step, **diagnostics)
        self.ranks.barrier()
        floating = self.score(config.modes()[0], self.validation, temperature, on_grid=False)
        report = None
        if self.ranks.leads:
            report = export_artifact(folder.artifact, masters, config, self.tokenizer, temperature)
        self.ranks.barrier()
        scored = score_artifact(self.command, folder.artifact, self.val_pattern, self.ranks)
        if report is None:
            return
        sources = our_sources()
        code_bytes = sum(len(text.encode()) for text in sources.values())
        total_bytes = code_bytes + scored["artifact_bytes"]
        summary = {
            **{key: value for key, value in scored.items() if key not in ("artifact", "weights")},
            "float_val_bpb": floating.bpb,
            "quantization_gap_bpb": scored["val_bpb"] - floating.bpb,
            "code_bytes": code_bytes,
            "code_sha256": hashlib.sha256("".join(sources.values()).encode()).hexdigest(),
            "total_bytes": total_bytes,
            "params": self.params,
            "training_only_params": self.training_only_params,
            "steps": self.at.step,
            "tokens": self.at.tokens,
            "train_s": train_s,
            "clock": config.clock,
            "seed": config.seed,
            "world_size": self.ranks.world,
            "kernels": self.kernels.name,
            "compiled": not self.trainer.not_compiled,
            "jepa_diagnostics": diagnostics,
            "preset": self.command.preset,
            "config": asdict(config),
            "git": git_state(),
            "environment": versions_and_hardware(self.ranks.device),
        }
        if config.budget_bytes:
            check_budget(total_bytes, config.budget_bytes)
        write_atomically(folder.summary, json.dumps(summary, indent=1).encode())
        folder.event(
            event="result",
            step=self.at.step,
            elapsed_s=train_s,
            val_bpb=summary["val_bpb"],
            float_val_bpb=floating.bpb,
        )
        folder.text(format_size_table(report, code_bytes, config.budget_bytes or None))
        folder.text(
            f"{folder.artifact}: val_bpb {summary['val_bpb']:.4f} ({summary['eval_mode']}, read back from disk), "
            f"float {floating.bpb:.4f}, {total_bytes:,} bytes of code and weights, eval_time {summary['eval_s']:.2f} s"
        )


def serve(command: Command, interruption: Interruption) -> None:
    """Do what a command says, as one of its ranks. Raises GolfError, Preempted."""
    ranks = join_ranks(command.config.device, os.environ)
    try:
        if command.score:
            pattern = command.val or str(Path(command.config.data_path) / "*_val_*.bin")
            result = score_artifact(command, command.score, pattern, ranks)
            if ranks.leads:
                print(json.dumps(result))
        elif command.generate:
            print(generate_text(command, command.generate, ranks))
        else:
            Run(command, ranks).complete(interruption)
    except (dist.DistError, RuntimeError) as error:  # gloo's and the store's are of no class of their own
        if ranks.world == 1 or not re.search("gloo|NCCL|TCPStore|[Cc]onnection", str(error)):
            raise
        if interruption.asked:  # all ranks were, and another left first
            raise Preempted(0) from error
        raise TrainingError(
            f"rank {ranks.rank}: another process of the run was lost ({str(error).splitlines()[0][:200]}); start "
            "the same command again, it goes on from the newest checkpoint, or let torchrun do so: --max-restarts"
        ) from error
    finally:
        if ranks.world > 1:
            dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (2 for input that cannot be used)."""
    try:
        command = parse_command(sys.argv[1:] if argv is None else argv, os.environ)
        interruption = Interruption()
        with contextlib.nullcontext() if command.score or command.generate else interruption:
            serve(command, interruption)
    except GolfError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
