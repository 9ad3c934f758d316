"""CoinRun on two CPU cores, from nothing to a page of rollouts.

Command: make coinrun (or: python -m worldmodel coinrun --profile cpu)
Cost: about 20 minutes on two idle cores, 25 on busy ones, installation included; 2.4 GB of memory.
Expected: see LOG.md, "`make coinrun`, profile cpu". Tokenizer 27.3 dB at patch 16; rollouts above copy-last-frame by
6.0 / 6.9 / 6.0 dB at horizons 1 / 4 / 8; controllability (delta PSNR at 4) 4.2 dB with recorded actions, 6.0 with
latent ones, all six in use; 200 frames/s at batch 1; an artifact of 1.27 MB.

Game options: CoinRun, easy, without backgrounds; sticky right-biased actions; 500 training levels (0-499), validation
levels 10000-10499, test levels 20000-20499.
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
from worldmodel.data.collect import CollectConfig
from worldmodel.data.envs import EnvOptions

_FRAME = FrameConfig(64, 64, 3, patch=16)
_TOKENIZER = TokenizerConfig(
    frame=_FRAME,
    encoder=BlockConfig(dim=96, ffn_dim=256, heads=4, layers=1, temporal=False),
    decoder=BlockConfig(dim=96, ffn_dim=256, heads=4, layers=2, temporal=False),
    quantizer=QuantizerConfig(codes=2048, latent_dim=64, metric="euclidean", kmeans_init=True),
    linear_path=True,
)
_LAM_BLOCKS = BlockConfig(dim=64, ffn_dim=128, heads=4, layers=2, temporal_window=2)
_LAM = LamConfig(
    frame=_FRAME,
    encoder=_LAM_BLOCKS,
    decoder=_LAM_BLOCKS,
    quantizer=QuantizerConfig(codes=6, latent_dim=16, dead_after_steps=20, kmeans_init=True),
)
_BLOCKS = BlockConfig(dim=96, ffn_dim=256, heads=3, layers=3, temporal_window=6, qk_norm=False)


def _dynamics(source: str, steps: int) -> TrainConfig:
    return TrainConfig(
        stage="dynamics",
        tokenizer=_TOKENIZER,
        lam=_LAM,
        dynamics=DynamicsConfig(blocks=_BLOCKS, action_source=source),  # pyright: ignore[reportArgumentType]
        optim=OptimConfig(
            optimizer="muon",
            learning_rate=3e-3,
            muon_learning_rate=0.02,
            warmup_steps=50,
            decay_steps=steps // 2,
            beta2=0.95,
            gradient_clip=1.0,
        ),
        steps=steps,
        batch_size=16,
        seq_len=6,
        log_every=50,
        eval_every=500,
        eval_clips=128,
        checkpoint_every=500,
    )


PROFILE = Profile(
    collect=CollectConfig(env=EnvOptions(distribution_mode="easy", use_backgrounds=False), test_frames=0),
    tokenizer=TrainConfig(
        stage="tokenizer",
        tokenizer=_TOKENIZER,
        lam=_LAM,
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=20, decay_steps=400, beta2=0.99, gradient_clip=1.0),
        steps=800,
        batch_size=64,
        seq_len=1,
        log_every=50,
        eval_every=200,
        eval_clips=256,
        checkpoint_every=300,
        init_clips=8192,
    ),
    dynamics=_dynamics("ground-truth", 2400),
    dynamics_latent=_dynamics("latent", 1200),
    evaluate=EvaluateConfig(
        clips=1024, batch_size=64, rollout=RolloutConfig(prompt_frames=4, horizon=15, decode_steps=2)
    ),
)
