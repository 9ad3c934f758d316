"""The published CoinRun case study (Jasmine): 64x64 frames, patch 16, 10,000 random-action episodes.

Command: make coinrun PROFILE=paper (or: python -m worldmodel coinrun --profile paper)
Cost: 300k tokenizer steps at batch 48 and 200k dynamics steps at batch 36, twice (recorded and latent actions), about
2e18 floating-point operations: the published run took under nine hours on one H100. Data: about 10.5M frames. Not yet
measured here.
Expected: the published curves; prepended actions give faithful rollouts.

Two deliberate differences from the published defaults: masking of the current frame against a clean history (published:
`--masking all`), and a vector-quantization loss for co-trained latent actions, which the published code lacks.
"""

from __future__ import annotations

from worldmodel.config import (
    BlockConfig,
    DynamicsConfig,
    EvaluateConfig,
    FrameConfig,
    LamConfig,
    OptimConfig,
    Profile,
    QuantizerConfig,
    RolloutConfig,
    TokenizerConfig,
    TrainConfig,
)
from worldmodel.data.collect import CollectConfig, LevelRange
from worldmodel.data.envs import EnvOptions

_FRAME = FrameConfig(64, 64, 3, patch=16)
_BLOCKS = BlockConfig(dim=512, ffn_dim=2048, heads=8, layers=4, temporal_window=16, compute_dtype="bfloat16")
_TOKENIZER = TokenizerConfig(
    frame=_FRAME,
    encoder=_BLOCKS,
    decoder=_BLOCKS,
    quantizer=QuantizerConfig(codes=1024, latent_dim=32, metric="cosine", codebook_dropout=0.01, dead_after_steps=1000),
)
_LAM = LamConfig(
    frame=_FRAME,
    encoder=_BLOCKS,
    decoder=_BLOCKS,
    quantizer=QuantizerConfig(codes=6, latent_dim=32, dead_after_steps=50),
)
_DYNAMICS_BLOCKS = BlockConfig(dim=512, ffn_dim=2048, heads=8, layers=6, temporal_window=16, compute_dtype="bfloat16")


def _dynamics(source: str) -> TrainConfig:
    return TrainConfig(
        stage="dynamics",
        tokenizer=_TOKENIZER,
        lam=_LAM,
        dynamics=DynamicsConfig(blocks=_DYNAMICS_BLOCKS, action_source=source),  # pyright: ignore[reportArgumentType]
        optim=OptimConfig(learning_rate=3e-5, warmup_steps=5_000, decay_steps=20_000),
        steps=200_000,
        batch_size=36,
        log_every=100,
        eval_every=5_000,
        checkpoint_every=5_000,
        loader_threads=8,
        deterministic=False,
    )


PROFILE = Profile(
    collect=CollectConfig(
        env=EnvOptions(distribution_mode="easy"),
        policy="random",
        train_frames=10_000_000,
        val_frames=500_000,
        test_frames=500_000,
        train_levels=LevelRange(0, 10_000),
        val_levels=LevelRange(10_000, 500),
        test_levels=LevelRange(20_000, 500),
    ),
    tokenizer=TrainConfig(
        stage="tokenizer",
        tokenizer=_TOKENIZER,
        lam=_LAM,
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=10_000, decay_steps=30_000),
        steps=300_000,
        batch_size=48,
        log_every=100,
        eval_every=5_000,
        checkpoint_every=5_000,
        loader_threads=8,
        deterministic=False,
    ),
    dynamics=_dynamics("ground-truth"),
    dynamics_latent=_dynamics("latent"),
    evaluate=EvaluateConfig(
        clips=1024, rollout=RolloutConfig(prompt_frames=4, horizon=15, decode_steps=25, temperature=1.0)
    ),
)
