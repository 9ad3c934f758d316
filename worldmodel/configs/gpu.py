"""CoinRun on one GPU in about an hour: the cpu profile's recipe, widened and in bfloat16.

Command: make coinrun PROFILE=gpu (or: python -m worldmodel coinrun --profile gpu)
Cost: 1M frames (collected on the CPU in minutes), 20k tokenizer steps at batch 256 and 40k dynamics steps at batch 64,
twice (recorded and latent actions). Not yet measured on a GPU.
Expected: better than the cpu profile in every row of its evaluation; figures are added when it has been run.
"""

from __future__ import annotations

import dataclasses

from worldmodel.config import BlockConfig, OptimConfig, Profile
from worldmodel.configs import cpu

_BASE = cpu.PROFILE


def _wide(layers: int, *, temporal: bool) -> BlockConfig:
    return BlockConfig(
        dim=384, ffn_dim=1536, heads=6, layers=layers, temporal=temporal, temporal_window=16, compute_dtype="bfloat16"
    )


_TOKENIZER = dataclasses.replace(
    _BASE.tokenizer.tokenizer,
    frame=dataclasses.replace(_BASE.tokenizer.tokenizer.frame, patch=8),
    encoder=_wide(2, temporal=False),
    decoder=_wide(4, temporal=False),
)
_LAM = dataclasses.replace(
    _BASE.tokenizer.lam,
    encoder=dataclasses.replace(_wide(4, temporal=True), temporal_window=2),
    decoder=dataclasses.replace(_wide(4, temporal=True), temporal_window=2),
)
_SCHEDULE = OptimConfig(learning_rate=6e-4, warmup_steps=500, decay_steps=20_000, beta2=0.95, gradient_clip=1.0)


def _dynamics(base_name: str) -> object:
    base = getattr(_BASE, base_name)
    return dataclasses.replace(
        base,
        tokenizer=_TOKENIZER,
        lam=_LAM,
        dynamics=dataclasses.replace(base.dynamics, blocks=_wide(8, temporal=True)),
        optim=_SCHEDULE,
        steps=40_000,
        batch_size=64,
        seq_len=16,
        eval_every=2_000,
        checkpoint_every=2_000,
        loader_threads=8,
        deterministic=False,
    )


PROFILE = Profile(
    collect=dataclasses.replace(_BASE.collect, train_frames=1_024_000, val_frames=51_200),
    tokenizer=dataclasses.replace(
        _BASE.tokenizer,
        tokenizer=_TOKENIZER,
        lam=_LAM,
        optim=dataclasses.replace(_SCHEDULE, decay_steps=10_000),
        steps=20_000,
        batch_size=256,
        eval_every=2_000,
        checkpoint_every=2_000,
        loader_threads=8,
        deterministic=False,
    ),
    dynamics=_dynamics("dynamics"),  # pyright: ignore[reportArgumentType]
    dynamics_latent=_dynamics("dynamics_latent"),  # pyright: ignore[reportArgumentType]
    evaluate=dataclasses.replace(_BASE.evaluate, rollout=dataclasses.replace(_BASE.evaluate.rollout, decode_steps=4)),
)
