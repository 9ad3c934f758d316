"""What is in a data set: counts, lengths, actions, size, duplicates, a contact sheet; and the validator.

Letters: T frames, H height, W width, C channels.
"""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from common.errors import DataError
from worldmodel.data.records import END_NAMES, EpisodeSet, find_problems, open_dataset, read_manifest


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """Print what a data set holds and write a contact sheet."""

    data_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder of the data set."""
    sheet: Path | None = None
    """Where the contact sheet goes; `contact_sheet.png` beside the manifest by default."""
    sheet_episodes: int = 12
    sheet_frames: int = 8
    overwrite: bool = False
    """Replace an existing contact sheet of another name than the default."""


@dataclasses.dataclass(frozen=True)
class ValidateConfig:
    """Read every byte of a data set and name every damaged file and record."""

    data_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder of the data set."""
    splits: tuple[str, ...] = ()
    """Which splits; all by default."""


def describe(dataset: EpisodeSet) -> dict[str, Any]:
    """Figures of one split.

    Returns:
        Counts, quantiles of length, action counts (index -1 last), returns, ends, bytes, and how many episodes repeat
        another one frame by frame (`duplicate_episodes`) or its level alone (`repeated_levels`).
    """
    actions = collections.Counter()
    returns = []
    for episode in range(dataset.num_episodes):
        steps = dataset.read(episode, with_items=False)
        values, counts = np.unique(steps["actions"], return_counts=True)
        actions.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        returns.append(float(steps["rewards"].sum()))
    levels = [episode.level_seed for episode in dataset.episodes if episode.level_seed >= 0]
    digests = [episode.digest for episode in dataset.episodes]
    size_bytes = int(dataset.manifest["splits"][dataset.split]["bytes"])
    lengths = np.quantile(dataset.frames_E, [0, 0.25, 0.5, 0.75, 1]).round().astype(int).tolist()
    return {
        "files": len(dataset.files),
        "episodes": dataset.num_episodes,
        "frames": dataset.num_frames,
        "bytes": size_bytes,
        "bytes_per_frame": size_bytes / dataset.num_frames,
        "length_min_q25_median_q75_max": lengths,
        "length_mean": float(dataset.frames_E.mean()),
        "action_counts": [actions.get(action, 0) for action in range(dataset.num_actions)] + [actions.get(-1, 0)],
        "return_mean": float(np.mean(returns)),
        "ends": {name: sum(e.end == code for e in dataset.episodes) for code, name in END_NAMES.items()},
        "levels": len(set(levels)),
        "repeated_levels": len(levels) - len(set(levels)),
        "duplicate_episodes": len(digests) - len(set(digests)),
        "content_sha256": dataset.content_sha256,
    }


def contact_sheet(dataset: EpisodeSet, episodes: int, frames: int, *, margin: int = 2) -> np.ndarray:
    """A picture with one episode a row: `frames` frames spread evenly from its first to its last.

    Args:
        dataset: a set of frames.
        episodes: rows, spread evenly over the episodes.
        frames: columns.
        margin: white pixels between frames.

    Returns:
        (H, W, 3) uint8.
    """
    height, width, channels = dataset.item_shape
    rows = np.unique(np.linspace(0, dataset.num_episodes - 1, episodes).round().astype(int))
    sheet = np.full((len(rows) * (height + margin) + margin, frames * (width + margin) + margin, 3), 255, np.uint8)
    for row, episode in enumerate(rows):
        for column, frame in enumerate(np.linspace(0, dataset.frames_E[episode] - 1, frames).round().astype(int)):
            picture = dataset.read(int(episode), int(frame), 1)["items"][0]
            top, left = margin + row * (height + margin), margin + column * (width + margin)
            sheet[top : top + height, left : left + width] = picture[..., :3] if channels >= 3 else picture[..., :1]
    return sheet


def run_inspect(config: InspectConfig, console: Console | None = None) -> dict[str, Any]:
    """Print figures of every split, write the contact sheet of the first one, and return the figures by split.

    Raises:
        DataError: the data set is missing or damaged, or the contact sheet's name is taken.
    """
    console = console or Console()
    manifest = read_manifest(config.data_dir)
    figures: dict[str, Any] = {}
    sheet_path = config.sheet or config.data_dir / "contact_sheet.png"
    if config.sheet is not None and sheet_path.exists() and not config.overwrite:
        raise DataError(f"{sheet_path}: exists: name another file or give --overwrite")
    drawn = False
    for split in manifest["splits"]:
        if not manifest["splits"][split]["files"]:
            continue
        dataset = open_dataset(config.data_dir, split)
        figures[split] = describe(dataset)
        if dataset.kind == "frames" and not drawn:
            Image.fromarray(contact_sheet(dataset, config.sheet_episodes, config.sheet_frames)).save(sheet_path)
            drawn = True
        dataset.close()
    if not figures:
        raise DataError(f"{config.data_dir}: holds no file yet: collect or import data first")
    table = Table(title=f"{manifest.get('name', config.data_dir.name)} ({manifest['kind']} {manifest['item_shape']})")
    table.add_column("")
    for split in figures:
        table.add_column(split, justify="right")
    for name in next(iter(figures.values())):
        if name in ("action_counts", "ends"):
            continue
        values = [figures[split][name] for split in figures]
        table.add_row(name, *[_short(value) for value in values])
    for code in END_NAMES.values():
        table.add_row(code, *[str(figures[split]["ends"][code]) for split in figures])
    names = [f"action {i} {name}" for i, name in enumerate(manifest["action_names"])] + ["action unknown"]
    for number, name in enumerate(names):
        shares = [figures[split]["action_counts"][number] / figures[split]["frames"] for split in figures]
        table.add_row(name, *[f"{share:.1%}" for share in shares])
    console.print(table)
    if drawn:
        console.print(f"contact sheet: {sheet_path}")
    if not manifest.get("complete", True):
        console.print("not finished: run the same command again to complete it")
    return figures


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)[:16]


def run_validate(config: ValidateConfig, console: Console | None = None) -> None:
    """Check everything that can be checked.

    Raises:
        DataError: with one line a fault, each naming file and record.
    """
    console = console or Console()
    problems = find_problems(config.data_dir, config.splits or None)
    if problems:
        lines = [
            f"{problem.file}{'' if problem.record is None else f', record {problem.record}'}: {problem.fault}"
            for problem in problems
        ]
        raise DataError(f"{config.data_dir}: {len(problems)} faults\n" + "\n".join(lines))
    manifest = read_manifest(config.data_dir)
    totals = [
        f"{name} {split['episodes']} episodes, {split['frames']} frames" for name, split in manifest["splits"].items()
    ]
    console.print(f"{config.data_dir}: sound ({'; '.join(totals)}), content {manifest['content_sha256']}")
