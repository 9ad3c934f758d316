"""Where a game may begin: clips of a data set's validation split, the packaged ones where there is no data set.

Legend: P prompt frames · N actions · A actions of the world · E actions of the game · T time · B clips · H W C frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import DataError
from worldmodel.data.records import EpisodeSet
from worldmodel.rollout.world import World

NAMING_CLIPS = 512
NAMING_FRAMES = 4


@dataclass(frozen=True)
class StartClip:
    """True frames that a dream begins from."""

    name: str
    frames_PHWC: np.ndarray
    actions_A: np.ndarray
    """Recorded actions between them (P - 1; -1 unknown)."""
    later_N: np.ndarray
    """Recorded actions from the last prompt frame on."""
    level_seed: int
    prefix_N: np.ndarray
    """Recorded actions from the level's first frame to the last prompt frame."""


def start_clips(dataset: EpisodeSet, count: int, prompt_frames: int) -> list[StartClip]:
    """One clip from each of the first `count` episodes that are long enough.

    Raises:
        DataError: no episode has a prompt's length.
    """
    clips: list[StartClip] = []
    for episode in dataset.episodes:
        if len(clips) == count:
            break
        if episode.num_frames < prompt_frames:
            continue
        # A little into the level, where something moves, but near enough to play the real game up to there at once.
        first = min(episode.num_frames - prompt_frames, prompt_frames)
        read = dataset.read(episode.index, first, prompt_frames)
        actions_N = dataset.read(episode.index, with_items=False)["actions"]
        last = first + prompt_frames - 1
        clips.append(
            StartClip(
                name=f"level {episode.level_seed}" if episode.level_seed >= 0 else f"episode {episode.index}",
                frames_PHWC=read["items"],
                actions_A=read["actions"][:-1],
                later_N=actions_N[last:],
                level_seed=episode.level_seed,
                prefix_N=actions_N[:last],
            )
        )
    if not clips:
        raise DataError(
            f"{dataset.data_dir}, split {dataset.split!r}: no episode has the {prompt_frames} frames of a prompt; "
            "collect longer episodes or lower --prompt-frames"
        )
    return clips


@dataclass(frozen=True)
class ActionTable:
    """What the controls are called, and how the world's actions and the game's belong together."""

    names: tuple[str, ...]
    """One name a world action; a latent action's is learned."""
    game_names: tuple[str, ...]
    """Names of the recorded actions; empty for video without actions."""
    to_game_A: tuple[int, ...]
    """Game action that stands for a world action (-1: none known)."""
    from_game_E: tuple[int, ...]
    """World action that stands for a game action."""


def name_latent_actions(counts_AE: np.ndarray, game_names: tuple[str, ...]) -> ActionTable:
    """Names of latent actions from how often each was inferred where a recorded action was taken.

    A latent action is called after the recorded action with the largest term n log(lift) of its mutual information,
    lift being that action's share where the latent one was inferred over its share overall. The plain most frequent one
    would call every latent action after what the policy does most; the largest lift alone, after some rare accident.

    Args:
        counts_AE: how often latent action a was inferred where recorded action e was taken.
        game_names: of the recorded actions.

    Returns:
        The table. A latent action that never occurs stays without a game action.
    """
    total = max(float(counts_AE.sum()), 1.0)
    share_A, share_E = counts_AE.sum(axis=1) / total, counts_AE.sum(axis=0) / total
    lift_AE = (counts_AE / total) / np.maximum(np.outer(share_A, share_E), 1e-12)
    term_AE = counts_AE * np.log(np.maximum(lift_AE, 1e-12))
    names, to_game = [], []
    for code, counts_E in enumerate(counts_AE):
        if not counts_E.sum():
            names.append(f"latent {code} (unused)")
            to_game.append(-1)
            continue
        best = int(term_AE[code].argmax())
        names.append(f"latent {code} ≈ {game_names[best]} ({lift_AE[code, best]:.1f}×, {counts_E.sum() / total:.0%})")
        to_game.append(best)
    weight_EA = counts_AE.T + share_A  # an action that was never seen gets the most frequent latent one
    return ActionTable(tuple(names), game_names, tuple(to_game), tuple(int(row.argmax()) for row in weight_EA))


def action_table(world: World, dataset: EpisodeSet) -> ActionTable:
    """The controls of a world on this data.

    Raises:
        DataError: a world with recorded actions, and data with another number of them.
    """
    game_names = tuple(dataset.action_names)
    if not world.latent:
        if len(game_names) != world.dynamics.num_actions:
            raise DataError(
                f"{dataset.data_dir} has {len(game_names)} actions, the world {world.dynamics.num_actions}: name the "
                "data set that it was trained on with --data-dir"
            )
        same = tuple(range(len(game_names)))
        return ActionTable(game_names, game_names, same, same)
    codes = world.dynamics.num_actions
    if not game_names:
        return ActionTable(tuple(f"latent {code}" for code in range(codes)), (), (-1,) * codes, ())
    available = dataset.num_windows(NAMING_FRAMES)
    if not available:
        return ActionTable(tuple(f"latent {code}" for code in range(codes)), game_names, (-1,) * codes,
                           (0,) * len(game_names))  # fmt: skip
    clips = dataset.fixed_windows(min(NAMING_CLIPS, available), NAMING_FRAMES)
    recorded_BA = clips["actions_BT"][:, :-1]
    inferred_BA = world.actions_of(clips["frames_BTHWC"], clips["actions_BT"])
    counts_AE = np.zeros((codes, len(game_names)))
    known_BA = recorded_BA >= 0
    np.add.at(counts_AE, (inferred_BA[known_BA], recorded_BA[known_BA]), 1.0)
    return name_latent_actions(counts_AE, game_names)


def find_data_dir(wanted: str, trained_on: str, packaged: Path) -> Path:
    """The data set that start clips come from: the one named, else the training data, else the packaged clips."""
    if wanted:
        return Path(wanted)
    return Path(trained_on) if (Path(trained_on) / "manifest.json").is_file() else packaged
