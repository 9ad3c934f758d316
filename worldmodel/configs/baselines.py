"""The baselines of a profile: every kind of model, at the profile's size and on its data.

Command: make worldmodel-baselines (or: python -m worldmodel baselines --profile cpu)
Cost: at profile cpu about an hour on two idle cores; --step-share 0.1 trains a tenth of the steps.
Expected: worldmodel/LEADERBOARD.md, which the same command writes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from worldmodel.config import DiffusionConfig, JepaConfig, Profile, QuantizerConfig, RolloutConfig, TrainConfig


@dataclass(frozen=True)
class Baseline:
    """One model: how it is trained, from which other baselines, and how its rollouts are sampled."""

    title: str
    train: TrainConfig
    tokenizer: str = ""
    """Baseline that its tokenizer comes from."""
    lam: str = ""
    """Baseline that its frozen action model comes from."""
    rollout: RolloutConfig | None = None



def shortened(config: TrainConfig, share: float) -> TrainConfig:
    """The same stage with a share of its steps, its schedule shortened alike."""
    if share == 1.0:
        return config

    def part(steps: int) -> int:
        return max(1, round(share * steps))

    optim = dataclasses.replace(
        config.optim, warmup_steps=part(config.optim.warmup_steps), decay_steps=part(config.optim.decay_steps)
    )
    steps = max(part(config.steps), optim.warmup_steps + optim.decay_steps)
    return dataclasses.replace(config, steps=steps, optim=optim, eval_every=part(config.eval_every))


def baselines(profile: Profile) -> dict[str, Baseline]:
    """All baselines of a profile by name, each after those that it needs.

    Args:
        profile: sizes, schedules and sampling.

    Returns:
        Name -> baseline. Paths are left to who runs them.
    """
    few, sampled = profile.evaluate.rollout, profile.dynamics
    tokenizer = profile.tokenizer.tokenizer
    mae = dataclasses.replace(
        tokenizer,
        quantizer=QuantizerConfig(kind="tanh", codes=0, latent_dim=tokenizer.quantizer.latent_dim),
        mask_high=0.9,
    )
    many = dataclasses.replace(few, decode_steps=16)

    def diffusion(**options: Any) -> TrainConfig:
        kind = dataclasses.replace(sampled.dynamics, kind="diffusion", diffusion=DiffusionConfig(**options))
        return dataclasses.replace(sampled, tokenizer=mae, dynamics=kind, token_dir="")

    causal = dataclasses.replace(sampled, dynamics=dataclasses.replace(sampled.dynamics, kind="causal"))
    lam = dataclasses.replace(profile.dynamics_latent, stage="lam", token_dir="")
    jepa = dataclasses.replace(
        profile.dynamics_latent,
        stage="jepa",
        token_dir="",
        # SIGReg compares the embeddings of one frame number over the clips of a batch: it needs many clips.
        batch_size=4 * sampled.batch_size,
        jepa=JepaConfig(
            frame=tokenizer.frame,
            encoder=dataclasses.replace(tokenizer.encoder, layers=tokenizer.decoder.layers),
            predictor=sampled.dynamics.blocks,
            embedding_dim=tokenizer.quantizer.latent_dim,
        ),
    )
    frozen = dataclasses.replace(sampled.dynamics, action_source="latent-frozen")
    return {
        "vqvae": Baseline("VQ-VAE tokenizer", profile.tokenizer),
        "mae": Baseline("MAE tokenizer", dataclasses.replace(profile.tokenizer, tokenizer=mae)),
        "lam": Baseline("LAM, alone", lam),
        "maskgit": Baseline("MaskGIT", sampled, "vqvae", rollout=few),
        "maskgit-latent": Baseline("MaskGIT, LAM co-trained", profile.dynamics_latent, "vqvae", rollout=few),
        "maskgit-lam": Baseline(
            "MaskGIT, LAM frozen",
            # The path is filled in by who runs it; the configuration must name one to be complete.
            dataclasses.replace(profile.dynamics_latent, dynamics=frozen, lam_run="lam"),
            "vqvae", "lam", rollout=few,
        ),
        "causal": Baseline("causal", causal, "vqvae", rollout=few),
        "diffusion": Baseline("diffusion forcing, x", diffusion(), "mae", rollout=many),
        "diffusion-v": Baseline("diffusion forcing, v", diffusion(prediction="v"), "mae", rollout=many),
        "diffusion-context": Baseline(
            "diffusion, x, context stream", diffusion(history="context"), "mae", rollout=many
        ),
        "shortcut": Baseline(
            "shortcut forcing", diffusion(shortcut=True), "mae", rollout=dataclasses.replace(few, decode_steps=4)
        ),
        "jepa": Baseline("JEPA", jepa),
    }
