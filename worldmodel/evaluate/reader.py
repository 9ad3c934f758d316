"""A small network that reads real frames: which action lay between two of them, and the true state where one is known.

It is trained on the training split of a data set and then shown dreams. What it reads there tells whether a dream does
what was asked (action fidelity) and whether things are where they should be (state error over the horizon). Beside each
number stands what it reads from the true frames of the same clips: its own ceiling.

Legend: S clips · B clips of a batch · T time · F future frames · A actions · K numbers of a state · H W C pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from worldmodel.data.records import open_dataset, read_manifest
from worldmodel.data.states import known_states
from worldmodel.evaluate.metrics import mean_entry
from worldmodel.models.layers import frames_to_unit
from worldmodel.train.state import Functional, values_of

SEEN = 3  # frames: the one before the action, the one at which it is taken, the one that it leads to
BATCH = 64
LEARNING_RATE = 1e-3
CHANNELS = (16, 32, 64)
HIDDEN = 128


class ReaderNet(nnx.Module):
    """Three frames to action logits and to the state at the last of them (in units of its spread)."""

    def __init__(
        self, height: int, width: int, channels: int, *, num_actions: int, states: int, rngs: nnx.Rngs
    ) -> None:
        widths = (SEEN * channels, *CHANNELS)
        self.convs = nnx.List(
            [nnx.Conv(a, b, (4, 4), strides=(2, 2), rngs=rngs) for a, b in itertools.pairwise(widths)]
        )
        for _ in CHANNELS:
            height, width = -(-height // 2), -(-width // 2)
        self.hidden = nnx.Linear(height * width * CHANNELS[-1], HIDDEN, rngs=rngs)
        self.action_out = nnx.Linear(HIDDEN, num_actions, rngs=rngs)
        self.state_out = nnx.Linear(HIDDEN, max(states, 1), rngs=rngs)

    def __call__(self, frames_BTHWC: Array) -> tuple[Array, Array]:
        """Logits (B, A) and state (B, K) of three frames in 0..1."""
        B, T, H, W, C = frames_BTHWC.shape
        x = (frames_BTHWC - 0.5).transpose(0, 2, 3, 1, 4).reshape(B, H, W, T * C)
        for conv in self.convs:
            x = jax.nn.relu(conv(x))
        x = jax.nn.relu(self.hidden(x.reshape(B, -1)))
        return self.action_out(x), self.state_out(x)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A trained network, and what its numbers mean."""

    net: ReaderNet
    steps: int
    state_groups: dict[str, tuple[int, ...]]
    """Columns of the state that belong together; empty where the game tells no state."""
    state_mean_K: np.ndarray
    state_spread_K: np.ndarray

    @functools.cached_property
    def _compiled(self) -> Any:
        functional, values = Functional(self.net), values_of(self.net)

        def read(values: Any, frames_BTHWC: Array) -> tuple[Array, Array]:
            # Every three neighbouring frames; the first frame stands twice where nothing lies before it.
            whole = jnp.concatenate([frames_BTHWC[:, :1], frames_BTHWC], axis=1)
            length = whole.shape[1] - SEEN + 1
            windows = jnp.stack([whole[:, t : t + length] for t in range(SEEN)], axis=2)
            logits, state = functional.merge(*values)(windows.reshape(-1, *windows.shape[2:]))
            lead = windows.shape[:2]
            return logits.argmax(axis=-1).reshape(lead), state.reshape(*lead, -1)

        compiled = jax.jit(read)
        return lambda frames: compiled(values, frames)

    def read(self, frames_BTHWC: Array) -> tuple[np.ndarray, np.ndarray]:
        """Of T frames in 0..1: actions int32 (B, T - 1) that lie between them, and states (B, T - 1, K) of frames 1...

        The state has the data's units; it is of no meaning where the game tells none.
        """
        actions_BT, states_BTK = self._compiled(frames_BTHWC)
        scaled = np.asarray(states_BTK)[..., : max(len(self.state_mean_K), 1)]
        if len(self.state_mean_K):
            scaled = scaled * self.state_spread_K + self.state_mean_K
        return np.asarray(actions_BT), scaled


def has_train_split(data_dir: str) -> bool:
    """Whether a data set has frames to learn reading from."""
    split = read_manifest(data_dir)["splits"].get("train")
    return bool(split and split["files"])


@functools.lru_cache(maxsize=2)
def trained_reader(data_dir: str, content_sha256: str, steps: int, seed: int) -> Reader:
    """A reader of a data set's games; a process trains one once.

    Args:
        data_dir: data set with recorded actions and a training split.
        content_sha256: of that split; only there so that another content under the same name is not mistaken for it.
        steps: of Adam, 64 windows of three frames each.
        seed: of weights and batches.

    Raises:
        DataError: the training split has no window of three frames.
    """
    dataset = open_dataset(data_dir, "train")
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, dataset.require_windows(SEEN), steps * BATCH)
    known = known_states(dataset, ids, SEEN)
    groups, states = ({}, None) if known is None else (dict(known.groups), known.values_BTK[:, -1])
    mean_K = np.zeros(0) if states is None else states.mean(axis=0)
    spread_K = np.zeros(0) if states is None else states.std(axis=0) + 1e-6
    height, width, channels = dataset.item_shape
    net = ReaderNet(
        height, width, channels, num_actions=max(dataset.num_actions, 1), states=len(mean_K), rngs=nnx.Rngs(seed)
    )
    functional, (params, stats) = Functional(net), values_of(net)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

    def loss_of(params: Any, frames_BTHWC: Array, action_B: Array, state_BK: Array | None) -> Array:
        logits_BA, read_BK = functional.merge(params, stats)(frames_to_unit(frames_BTHWC))
        known_B = action_B >= 0
        entropy_B = optax.softmax_cross_entropy_with_integer_labels(logits_BA, jnp.maximum(action_B, 0))
        loss = jnp.sum(entropy_B * known_B) / jnp.maximum(known_B.sum(), 1)
        return loss if state_BK is None else loss + jnp.mean((read_BK - state_BK) ** 2)

    @jax.jit
    def step(params: Any, opt: Any, frames: Array, action: Array, state: Array | None) -> tuple[Any, Any]:
        updates, opt = optimizer.update(jax.grad(loss_of)(params, frames, action, state), opt)
        return optax.apply_updates(params, updates), opt

    opt = optimizer.init(params)
    for number in range(steps):
        rows = slice(number * BATCH, (number + 1) * BATCH)
        frames_BTHWC, actions_BT = dataset.windows(ids[rows], SEEN)
        target = None if states is None else ((states[rows] - mean_K) / spread_K).astype(np.float32)
        params, opt = step(params, opt, frames_BTHWC, actions_BT[:, SEEN - 2], target)
    dataset.close()
    return Reader(functional.merge(params, stats), steps, groups, mean_K, spread_K)


def fidelity_entries(
    read: dict[str, np.ndarray],
    recorded_SF: np.ndarray,
    horizons: tuple[int, ...],
    *,
    samples: int,
    seed: int,
) -> dict[str, Any] | None:
    """How often the action that a reader sees is the one that was taken.

    Args:
        read: by name ("dream", "true_frames"), the actions (S, F) that it sees.
        recorded_SF: the actions taken; -1 where unknown, which do not count.
        horizons: future frames at which the dream is also scored alone.
        samples: bootstrap draws, over clips.
        seed: of the draws.

    Returns:
        JSON-ready accuracies with intervals, beside that of always naming the most frequent action of these clips; None
        where no action is known.
    """
    known_SF = recorded_SF >= 0
    if not known_SF.any():
        return None
    boot = {"samples": samples, "seed": seed}
    whole = known_SF.any(axis=1)
    weight_SF = known_SF[whole] / known_SF[whole].sum(axis=1, keepdims=True)

    def accuracy(actions_SF: np.ndarray | int) -> np.ndarray:
        return (np.equal(actions_SF, recorded_SF)[whole] * weight_SF).sum(axis=1)

    guess = int(np.bincount(recorded_SF[known_SF]).argmax())
    result: dict[str, Any] = {name: mean_entry(accuracy(actions), **boot) for name, actions in read.items()}
    result["most_frequent_action"] = mean_entry(accuracy(guess), **boot)
    result["dream_below_true_frames"] = mean_entry(accuracy(read["true_frames"]) - accuracy(read["dream"]), **boot)
    at: dict[str, Any] = {}
    for h in horizons:
        known_S = known_SF[:, h - 1]
        if known_S.any():
            right_S = (read["dream"][:, h - 1] == recorded_SF[:, h - 1])[known_S]
            at[str(h)] = mean_entry(right_S.astype(np.float64), **boot)
    return {**result, "dream_at_horizon": at}


def state_entries(
    read: dict[str, np.ndarray],
    true_STK: np.ndarray,
    prompt: int,
    groups: dict[str, tuple[int, ...]],
    horizons: tuple[int, ...],
    *,
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """How far what is read off frames lies from the true state, over the horizon.

    Args:
        read: by name ("dream", "true_frames"), states (S, F, K) read off future frames.
        true_STK: true states of prompt and future.
        prompt: frames before the future.
        groups: columns that belong together; their error is the length of the difference.
        horizons: future frames to score.
        samples: bootstrap draws, over clips.
        seed: of the draws.

    Returns:
        JSON-ready: horizon -> group -> for each name, and for a state that stays as it was, the mean error with its
        interval.
    """
    boot = {"samples": samples, "seed": seed}
    result: dict[str, Any] = {}
    for h in horizons:
        truth_SK = true_STK[:, prompt + h - 1]
        found = {**{name: values[:, h - 1] for name, values in read.items()}, "copy_last": true_STK[:, prompt - 1]}
        result[str(h)] = {
            group: {
                name: mean_entry(np.linalg.norm((values - truth_SK)[:, list(columns)], axis=1), **boot)
                for name, values in found.items()
            }
            for group, columns in groups.items()
        }
    return result
