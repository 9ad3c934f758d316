"""Code + weights against the 16,000,000 bytes of the challenge: `make verify-artifact-size [ARTIFACT=file]`.

Bundles the entry for a preset and adds an artifact: the one given, or one of a full-size model of that preset which
this script makes. Random weights would mislead: what an artifact weighs depends on the distribution of weights in a
row, and initial matrices (uniform) have another one than trained ones. So a few real optimizer steps are taken, on
tokens with the frequencies and the repetitiveness of text, and then the initial matrices are taken back to what weight
decay leaves of them over a full run, because a trained matrix is a sum of updates:

    W = W_0 * prod_t (1 - lr_t * wd) + (W_k - W_0).

The embedding keeps its (Gaussian) initial values: Adam's first steps are all of the size of the learning rate, and
alone they would compress far better than a trained embedding does. What comes out is an estimate; the weight of a
trained model is its own artifact's. Exits with status 1 if the total is over the limit, 2 for bad input.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common.artifact.budget import CHALLENGE_BUDGET_BYTES, SizeReport, check_budget, format_size_table
from common.artifact.container import read_artifact
from common.errors import ArtifactError, ConfigError, GolfError
from common.text.tokenizer import load_tokenizer
from scripts.bundle import ENTRY, ROOT, make_bundle
from submissions.jepa_mamba.train_gpt import (
    Config,
    Progress,
    Ranks,
    StepBatch,
    Trainer,
    check_config,
    export_artifact,
    learning_rate_scale,
    read_preset,
    select_kernels,
)

# The published run took 6,090 steps in its ten minutes.
FULL_RUN_STEPS = 6000


def text_like_tokens(count: int, vocab_size: int, seed: int) -> np.ndarray:
    """Tokens, int64 (count,), with a Zipf distribution, half of which repeat what followed the same token before."""
    rng = np.random.default_rng(seed)
    weights = 1.0 / (np.arange(vocab_size) + 2.7)
    ranks = rng.permutation(vocab_size)
    drawn = ranks[rng.choice(vocab_size, size=count, p=weights / weights.sum())]
    follower = rng.permutation(vocab_size)
    for i in np.flatnonzero(rng.random(count) < 0.5):
        if i > 0:
            drawn[i] = follower[drawn[i - 1]]
    return drawn


def retained_share(config: Config, base_lr: float, weight_decay: float, steps: int) -> float:
    """What decoupled weight decay leaves of an initial weight after `steps` steps of the preset's schedule."""
    schedule = replace(config, warmdown_by="steps", iterations=steps)
    rates = [base_lr * learning_rate_scale(Progress(step, 0.0), schedule) for step in range(steps)]
    return float(np.prod([1.0 - rate * weight_decay for rate in rates]))


def train_briefly(config: Config, steps: int, batch_tokens: int, seq_len: int) -> Trainer:
    """A full-size model after a few real steps, its initial weights decayed as by a full run."""
    brief = replace(
        config,
        train_seq_len=seq_len, train_batch_tokens=batch_tokens, micro_batch_tokens=batch_tokens, kernels="torch",
        iterations=FULL_RUN_STEPS, max_wallclock_seconds=0.0, warmdown_by="steps", ema_decay=0.0, qat_fraction=1.0,
        sigreg_timesteps=min(config.sigreg_timesteps, 16), sigreg_num_proj=64,
    )  # fmt: skip
    check_config(brief)
    device = torch.device("cpu")
    trainer = Trainer(brief, select_kernels("torch", device), Ranks(0, 1, device))
    masters = trainer.masters
    initial = {name: parameter.detach().clone() for name, parameter in masters.master.items()}
    masters.publish(on_grid=True)
    tokens = text_like_tokens(steps * batch_tokens + 1, config.vocab_size, config.seed)
    for step in range(steps):
        span = tokens[step * batch_tokens : (step + 1) * batch_tokens + 1]
        x, y = (torch.from_numpy(part.reshape(-1, seq_len).copy()) for part in (span[:-1], span[1:]))
        losses = trainer.step(StepBatch(x, y, torch.ones_like(x, dtype=torch.int32), {}), Progress(step, 0.0))
        if not all(bool(torch.isfinite(value).all()) for value in losses.values()):
            raise GolfError(f"step {step} of the brief training is not finite: {losses}")
    share = retained_share(config, config.matrix_lr, config.muon_wd, FULL_RUN_STEPS)
    with torch.no_grad():
        for name in masters.groups()["muon"]:
            masters.master[name].sub_(initial[name], alpha=1.0 - share)
    return trainer


def make_artifact(preset_name: str, steps: int, batch_tokens: int, seq_len: int, path: Path) -> SizeReport:
    """Train briefly and export. Raises GolfError."""
    config = replace(Config(), **read_preset(preset_name))
    trainer = train_briefly(config, steps, batch_tokens, seq_len)
    # Only the tokenizer's digest and first token go into the file, and every digest has the same length.
    return export_artifact(path, trainer.masters, config, load_tokenizer("byte"), temperature=0.97)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Code + weights against the challenge's 16,000,000 bytes.")
    parser.add_argument("--artifact", type=Path, default=None, help="artifact to weigh (default: make a full-size one)")
    parser.add_argument("--preset", default="seed_bpe", help="preset to bundle and, without --artifact, to make")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of the artifact that is made")
    parser.add_argument("--batch_tokens", type=int, default=1024, help="tokens of each of those steps")
    parser.add_argument("--seq_len", type=int, default=128, help="tokens of a window of those steps")
    parser.add_argument("--budget_bytes", type=int, default=CHALLENGE_BUDGET_BYTES, help="limit for code + artifact")
    arguments = parser.parse_args(argv)
    try:
        if arguments.steps < 1 or arguments.batch_tokens % arguments.seq_len:
            raise ConfigError("--steps must be at least 1, and --seq_len must divide --batch_tokens")
        code_bytes = make_bundle(ROOT, ENTRY, read_preset(arguments.preset)).code_bytes
        if arguments.artifact is not None:
            print(f"{arguments.artifact}, with the code of preset {arguments.preset}")
            report = read_artifact(arguments.artifact)[2]
        else:
            started_s = time.perf_counter()
            print(
                f"making a full-size {arguments.preset} model, {arguments.steps} steps on text-like tokens", flush=True
            )
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.artifact"
                shape = (arguments.steps, arguments.batch_tokens, arguments.seq_len)
                report = make_artifact(arguments.preset, *shape, path)
            print(f"made and packed in {time.perf_counter() - started_s:.0f} s")
        print(format_size_table(report, code_bytes, arguments.budget_bytes))
    except GolfError as error:
        print(f"verify_artifact_size: {error}", file=sys.stderr)
        return 2
    try:
        check_budget(report.file_bytes + code_bytes, arguments.budget_bytes)
    except ArtifactError as error:
        print(f"verify_artifact_size: {error}", file=sys.stderr)
        return 1
    print(f"fits: {report.file_bytes + code_bytes:,} of {arguments.budget_bytes:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
