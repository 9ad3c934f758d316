"""The true states behind the frames of a data set, where its game is one that can tell them.

Letters: B windows, T frames, K numbers of a state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from worldmodel.data import puck
from worldmodel.data.records import EpisodeSet


@dataclass(frozen=True)
class KnownStates:
    """States of some windows, and what their numbers are."""

    names: tuple[str, ...]
    groups: dict[str, tuple[int, ...]]
    """Columns that belong together (a position, a velocity); the name ends in the unit."""
    values_BTK: np.ndarray
    """float32."""


def known_states(dataset: EpisodeSet, windows_B: np.ndarray, seq_len: int) -> KnownStates | None:
    """The states at the frames of some windows, recomputed from level seeds and recorded actions.

    Args:
        dataset: a split.
        windows_B: numbers of windows, see `EpisodeSet.fixed_windows`.
        seq_len: frames of a window.

    Returns:
        The states, or None where the game is not one that tells them.
    """
    if (dataset.manifest.get("source") or {}).get("type") != puck.SPEC.source:
        return None
    places = [dataset.locate(int(window), seq_len) for window in windows_B]
    wanted = sorted({episode for episode, _ in places})
    actions = [dataset.read(episode, with_items=False)["actions"] for episode in wanted]
    levels = np.asarray([dataset.episodes[episode].level_seed for episode in wanted])
    states = dict(zip(wanted, puck.replay_states(levels, actions), strict=True))
    values_BTK = np.stack([states[episode][start : start + seq_len] for episode, start in places])
    return KnownStates(puck.STATE_NAMES, puck.STATE_GROUPS, values_BTK)
