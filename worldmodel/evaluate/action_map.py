"""What latent actions mean: a fitted map from latent to recorded actions, and how often it is right on other clips.

Legend: S clips · A transitions · C latent codes · E recorded actions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.errors import ConfigError
from worldmodel.evaluate.metrics import mean_entry


def count_pairs(codes_SA: np.ndarray, actions_SA: np.ndarray, codes: int, actions: int) -> np.ndarray:
    """How often a latent code stood beside a recorded action, float64 (C, E); unknown actions (-1) do not count."""
    known_SA = actions_SA >= 0
    counts_CE = np.zeros((codes, actions))
    np.add.at(counts_CE, (codes_SA[known_SA], actions_SA[known_SA]), 1.0)
    return counts_CE


def mutual_information_bits(counts_CE: np.ndarray) -> float:
    """Bits that the code tells about the action (of the counts themselves, biased upwards when they are few)."""
    joint_CE = counts_CE / counts_CE.sum()
    outer_CE = joint_CE.sum(axis=1, keepdims=True) * joint_CE.sum(axis=0, keepdims=True)
    positive = joint_CE > 0
    return float((joint_CE[positive] * np.log2(joint_CE[positive] / outer_CE[positive])).sum())


def score_action_map(
    codes_SA: np.ndarray,
    actions_SA: np.ndarray,
    *,
    codes: int,
    actions: int,
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """Fit a map on the first half of the clips, score it on the second.

    The map gives each code the recorded action that it stood beside most often; a code that was never seen, the most
    frequent action. The same accuracy for always guessing that action stands beside it.

    Args:
        codes_SA: latent codes of clips that training has not seen, in random order.
        actions_SA: the recorded actions beside them, -1 where unknown.
        codes: number of latent codes.
        actions: number of recorded actions.
        samples: bootstrap draws, over held-out clips.
        seed: of the draws.

    Returns:
        JSON-ready: the map, accuracy and the guess's accuracy with intervals, mutual information in bits.

    Raises:
        ConfigError: clips without recorded actions.
    """
    half = len(codes_SA) // 2
    held_out = (codes_SA[half:], actions_SA[half:])
    counts_CE = count_pairs(codes_SA[:half], actions_SA[:half], codes, actions)
    known_SA = held_out[1] >= 0
    if not counts_CE.sum() or not known_SA.any():
        raise ConfigError("a map of latent actions needs clips with recorded actions; these have none")
    guess = int(counts_CE.sum(axis=0).argmax())
    to_action_C = np.where(counts_CE.sum(axis=1) > 0, counts_CE.argmax(axis=1), guess)
    whole = known_SA.any(axis=1)  # clips without any recorded action say nothing
    weight_SA = known_SA[whole] / known_SA[whole].sum(axis=1, keepdims=True)
    right_S = ((to_action_C[held_out[0]] == held_out[1])[whole] * weight_SA).sum(axis=1)
    guessed_S = ((held_out[1] == guess)[whole] * weight_SA).sum(axis=1)
    boot = {"samples": samples, "seed": seed}
    return {
        "map": to_action_C.tolist(),
        "fitted_on_transitions": int(counts_CE.sum()),
        "accuracy": mean_entry(right_S, **boot),
        "most_frequent_action_accuracy": mean_entry(guessed_S, **boot),
        "above_guess": mean_entry(right_S - guessed_S, **boot),
        "mutual_information_bits": mutual_information_bits(count_pairs(*held_out, codes, actions)),
    }
