"""Tiny configurations, a synthetic game and an in-memory source behind the loader's contract."""

from __future__ import annotations

import dataclasses

import numpy as np

from worldmodel.config import (
    BlockConfig,
    DynamicsConfig,
    FrameConfig,
    LamConfig,
    OptimConfig,
    QuantizerConfig,
    TokenizerConfig,
    TrainConfig,
)

FRAME = FrameConfig(16, 16, 3, patch=8)
BLOCKS = BlockConfig(dim=16, ffn_dim=32, heads=2, layers=2, temporal_window=4)
TOKENIZER = TokenizerConfig(
    frame=FRAME,
    encoder=dataclasses.replace(BLOCKS, layers=1, temporal=False),
    decoder=dataclasses.replace(BLOCKS, layers=1, temporal=False),
    quantizer=QuantizerConfig(codes=16, latent_dim=8, metric="euclidean", kmeans_init=True, dead_after_steps=5),
    linear_path=True,
)
LAM = LamConfig(
    frame=FRAME,
    encoder=dataclasses.replace(BLOCKS, temporal_window=2),
    decoder=dataclasses.replace(BLOCKS, temporal_window=2),
    quantizer=QuantizerConfig(codes=6, latent_dim=4, dead_after_steps=3),
)
DYNAMICS = DynamicsConfig(blocks=BLOCKS, action_source="ground-truth")
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=2, decay_steps=2, beta2=0.95)
NUM_ACTIONS = 3


def train_config(stage: str, run_dir: str, **changes) -> TrainConfig:
    """A stage that trains in a second."""
    base = TrainConfig(
        stage=stage,  # pyright: ignore[reportArgumentType]
        run_dir=run_dir,
        tokenizer=TOKENIZER,
        lam=LAM,
        dynamics=DYNAMICS,
        optim=OPTIM,
        steps=8,
        batch_size=8,
        seq_len=4,
        log_every=2,
        eval_every=4,
        eval_clips=8,
        checkpoint_every=4,
        init_clips=8,
        tensorboard=False,
    )
    return dataclasses.replace(base, **changes)


def game_clips(count: int, seq_len: int, seed: int) -> dict[str, np.ndarray]:
    """A bright square that moves left, stays or moves right by the action taken, on a grid of four pixels."""
    rng = np.random.default_rng(seed)
    actions_BT = rng.integers(0, NUM_ACTIONS, (count, seq_len)).astype(np.int32)
    frames_BTHWC = np.zeros((count, seq_len, 16, 16, 3), np.uint8)
    place_B = rng.integers(0, 4, count)
    for t in range(seq_len):
        for b in range(count):
            frames_BTHWC[b, t, 4:12, 4 * place_B[b] : 4 * place_B[b] + 4] = (255, 128, 0)
        place_B = (place_B + actions_BT[:, t] - 1) % 4
    return {"frames_BTHWC": frames_BTHWC, "actions_BT": actions_BT}


class MemoryLoader:
    """Endless batches whose only state is how many were given."""

    def __init__(self, batch_size: int, seq_len: int, seed: int) -> None:
        self._shape, self._seed, self._given = (batch_size, seq_len), seed, 0

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        self._given += 1
        return game_clips(*self._shape, seed=1_000_003 * self._seed + self._given)

    def state(self):
        return {"given": self._given}

    def restore(self, state) -> None:
        self._given = state["given"]


class MemorySource:
    """Stands in for `worldmodel.train.loop.Source`."""

    num_actions = NUM_ACTIONS

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def loader(self, *, with_frames: bool) -> MemoryLoader:
        return MemoryLoader(self.config.batch_size, self.config.seq_len, self.config.seed)

    def initial_clips(self):
        return game_clips(self.config.init_clips, self.config.seq_len, seed=77)

    def validation_clips(self):
        return game_clips(self.config.eval_clips, self.config.seq_len, seed=78)
