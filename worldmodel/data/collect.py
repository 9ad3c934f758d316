"""Collect a data set from games: reproducible bit for bit, resumable, extensible.

A split is a list of *shards*; a shard is a fresh vector of games with its own seed, played for a fixed number of steps,
and becomes one file. Shards do not depend on each other, so the content does not depend on how many are played at once,
and a killed run loses only the shards that it had not finished.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common.errors import ConfigError, DataError
from worldmodel.data.envs import (
    Cancelled,
    EnvOptions,
    make_policy,
    play_shard,
    spec_of,
)
from worldmodel.data.policies import POLICY_NAMES, load_policy_factory, policy_source_sha256, right_weights
from worldmodel.data.records import (
    MANIFEST_NAME,
    SPLITS,
    RecordLayout,
    RecordWriter,
    Scan,
    read_manifest,
    split_file_name,
    write_manifest,
)


@dataclasses.dataclass(frozen=True)
class LevelRange:
    """Levels [start, start + count) of one split."""

    start: int
    count: int


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """Record games. Every value but `workers`, `append` and `overwrite` decides the content."""

    out_dir: Path = Path("data/coinrun")
    """Folder of the data set."""
    env: EnvOptions = dataclasses.field(default_factory=EnvOptions)
    policy: str = "sticky-right"
    """Who plays: `random` (uniform), `sticky` (repeats itself), `sticky-right` (the same, tending to the right), or
    `module:function` of your own, called as function(num_envs, generator, action_names)."""
    seed: int = 0
    train_frames: int = 102_400
    val_frames: int = 12_800
    test_frames: int = 12_800
    train_levels: LevelRange = LevelRange(0, 500)
    val_levels: LevelRange = LevelRange(10_000, 500)
    test_levels: LevelRange = LevelRange(20_000, 500)
    num_envs: int = 16
    """Games side by side in one shard."""
    shard_steps: int = 1_600
    """Steps of every game in one shard; the games that are under way at the end are cut there."""
    group_frames: int = 32
    """Frames compressed together."""
    zstd_level: int = 3
    scan: Scan = "auto"
    """Order of pixels in the compressor."""
    workers: int = 0
    """Shards played at once; 0 takes one a core."""
    append: bool = False
    """Add `*_frames` frames to a finished set."""
    overwrite: bool = False
    """Delete what is in `out_dir` first."""
    quiet: bool = False


def _check(config: CollectConfig) -> None:
    for name in ("num_envs", "shard_steps", "group_frames"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} {getattr(config, name)}: expected at least 1")
    if not 1 <= config.zstd_level <= 22:
        raise ConfigError(f"zstd_level {config.zstd_level}: expected a value in [1, 22]")
    if config.workers < 0 or config.seed < 0:
        raise ConfigError(f"workers {config.workers} and seed {config.seed}: expected at least 0")
    spec = spec_of(config.env)  # refuses a game that cannot be opened here
    if config.policy == "sticky-right" and not config.env.procgen:
        right_weights(spec.action_names)
    elif config.policy not in POLICY_NAMES:
        load_policy_factory(config.policy)
    wanted = []
    for split in SPLITS:
        frames, levels = _frames_of(config, split), _levels_of(config, split)
        if frames < 0:
            raise ConfigError(f"{split}_frames {frames}: expected at least 0")
        if frames and (levels.count < 1 or levels.start < 0):
            raise ConfigError(f"{split}_levels {levels}: expected a start of at least 0 and a count of at least 1")
        if frames:
            wanted.append((split, levels))
    if not wanted:
        raise ConfigError("no frames wanted: set train_frames, val_frames or test_frames")
    for i, (split, levels) in enumerate(wanted):
        for other, other_levels in wanted[:i]:
            if (
                levels.start < other_levels.start + other_levels.count
                and other_levels.start < levels.start + levels.count
            ):
                raise ConfigError(
                    f"levels of {split} {levels} and {other} {other_levels} overlap: a model would be tested on levels "
                    "that it has seen; make the ranges disjoint"
                )


def _frames_of(config: CollectConfig, split: str) -> int:
    return int(getattr(config, f"{split}_frames"))


def _levels_of(config: CollectConfig, split: str) -> LevelRange:
    return getattr(config, f"{split}_levels")


def _recipe(config: CollectConfig) -> dict[str, Any]:
    """Everything that decides what one shard holds."""
    source_sha256 = policy_source_sha256(config.policy)
    return {
        "env": config.env.recipe(),
        "policy": config.policy,
        **({"policy_source_sha256": source_sha256} if source_sha256 else {}),
        "seed": config.seed,
        "levels": {split: [_levels_of(config, split).start, _levels_of(config, split).count] for split in SPLITS},
        "num_envs": config.num_envs,
        "shard_steps": config.shard_steps,
        "group_frames": config.group_frames,
        "zstd_level": config.zstd_level,
        "scan": config.scan,
    }


def _plan_shards(frames: int, config: CollectConfig) -> list[int]:
    """Steps of each shard that together make at least `frames` frames."""
    steps = -(-frames // config.num_envs)
    return [min(config.shard_steps, steps - done) for done in range(0, steps, config.shard_steps)]


def _shard_seed(seed: int, split: str, number: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, SPLITS.index(split), number])


def _new_manifest(config: CollectConfig) -> dict[str, Any]:
    spec = spec_of(config.env)
    return {
        "kind": "frames",
        "name": spec.name,
        "item_shape": list(spec.frame_shape),
        "dtype": "uint8",
        "group_frames": config.group_frames,
        "num_actions": len(spec.action_names),
        "action_names": list(spec.action_names),
        "fps": spec.fps,
        "complete": False,
        "source": {"type": spec.source, "recipe": _recipe(config)},
        "plan": {
            split: _plan_shards(_frames_of(config, split), config) for split in SPLITS if _frames_of(config, split)
        },
        "splits": {
            split: {
                "level_ranges": [
                    [_levels_of(config, split).start, sum(dataclasses.astuple(_levels_of(config, split)))]
                ],
                "files": [],
            }
            for split in SPLITS
            if _frames_of(config, split)
        },
    }


def _prepare(config: CollectConfig) -> dict[str, Any]:
    """The manifest to work on: a new one, that of a killed run, or a finished one with more planned."""
    out_dir = config.out_dir
    if out_dir.exists() and not out_dir.is_dir():
        raise DataError(f"{out_dir}: is a file, a folder is needed: name another --out-dir")
    if config.overwrite and out_dir.exists() and any(out_dir.iterdir()):
        # Only a folder that is recognisably a data set is deleted.
        if not (out_dir / MANIFEST_NAME).exists():
            raise DataError(
                f"{out_dir}: holds files but no {MANIFEST_NAME}: not deleted; empty it or name another --out-dir"
            )
        shutil.rmtree(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if not (out_dir / MANIFEST_NAME).exists():
        if any(out_dir.iterdir()):
            raise DataError(f"{out_dir}: holds files but no {MANIFEST_NAME}: empty it or name another --out-dir")
        return write_manifest(out_dir, _new_manifest(config))
    manifest = read_manifest(out_dir)
    recipe = manifest.get("source", {}).get("recipe")
    if recipe != _recipe(config):
        wanted = _recipe(config)
        differing = sorted(
            name for name in wanted if not isinstance(recipe, Mapping) or recipe.get(name) != wanted[name]
        )
        raise DataError(
            f"{out_dir}: holds a data set made otherwise (different: {', '.join(differing)}): use its options, name "
            "another --out-dir, or replace it with --overwrite"
        )
    if not manifest["complete"]:
        for leftover in out_dir.glob(".*.tmp"):  # A killed run could not clean up after itself.
            leftover.unlink()
        return manifest
    more = {split: _plan_shards(_frames_of(config, split), config) for split in SPLITS if _frames_of(config, split)}
    if config.append:
        fresh = _new_manifest(config)["splits"]
        manifest["plan"] = {
            split: manifest["plan"].get(split, []) + more.get(split, [])
            for split in SPLITS
            if split in manifest["plan"] or split in more
        }
        manifest["splits"] = {split: manifest["splits"].get(split) or fresh[split] for split in manifest["plan"]}
        manifest["complete"] = False
        return write_manifest(out_dir, manifest)
    if manifest["plan"] != more:
        raise DataError(
            f"{out_dir}: holds a finished data set of another size ({_sizes(manifest)}): grow it with --append, or "
            "replace it with --overwrite"
        )
    return manifest


def _sizes(manifest: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {split['frames']} frames" for name, split in manifest["splits"].items())


def run_collect(config: CollectConfig) -> dict[str, Any]:
    """Collect the data set, or what is missing of it.

    Args:
        config: what to record and where.

    Returns:
        The manifest of the finished set; `content_sha256` depends on nothing but the configuration.

    Raises:
        ConfigError: options that contradict each other, such as overlapping level ranges.
        DataError: the folder holds something else.
    """
    _check(config)
    manifest = _prepare(config)
    todo = [
        (split, number, steps)
        for split, plan in manifest["plan"].items()
        for number, steps in enumerate(plan)
        if number >= len(manifest["splits"][split]["files"])
    ]
    total_frames = sum(sum(plan) for plan in manifest["plan"].values()) * config.num_envs
    if todo:
        spec = spec_of(config.env)
        layout = RecordLayout(
            item_shape=spec.frame_shape,
            num_actions=len(spec.action_names),
            group_frames=config.group_frames,
            zstd_level=config.zstd_level,
            scan=config.scan,
        )
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=config.quiet) as progress:
            done_frames = total_frames - sum(steps for _, _, steps in todo) * config.num_envs
            task = progress.add_task(f"frames of {config.env.game}", total=total_frames, completed=done_frames)
            manifest = _collect_shards(config, manifest, todo, layout, lambda frames: progress.advance(task, frames))
    if not manifest["complete"]:
        manifest = write_manifest(config.out_dir, {**manifest, "complete": True})
    return manifest


def _collect_shards(
    config: CollectConfig,
    manifest: dict[str, Any],
    todo: list[tuple[str, int, int]],
    layout: RecordLayout,
    on_frames: Callable[[int], None],
) -> dict[str, Any]:
    stop = threading.Event()
    action_names = spec_of(config.env).action_names
    workers = config.workers or len(os.sched_getaffinity(0))

    def collect_one(split: str, number: int, steps: int) -> dict[str, Any]:
        level_rng, action_rng = _shard_seed(config.seed, split, number).spawn(2)
        levels = _levels_of(config, split)
        episodes = play_shard(
            config.env,
            layout,
            num_envs=config.num_envs,
            num_steps=steps,
            start_level=levels.start,
            num_levels=levels.count,
            rand_seed=int(level_rng.generate_state(1, np.uint32)[0]) >> 1,
            policy=make_policy(
                config.policy,
                config.num_envs,
                np.random.Generator(np.random.Philox(action_rng)),
                action_names=action_names,
            ),
            on_frames=on_frames,
            stop=stop,
        )
        with RecordWriter(config.out_dir / split_file_name(split, number), layout) as writer:
            for episode in episodes:
                writer.write(episode)
        assert writer.summary is not None
        return dataclasses.asdict(writer.summary)

    # Files enter the manifest in order, so a split's file list is always a prefix of its plan.
    finished: dict[tuple[str, int], dict[str, Any]] = {}
    with concurrent.futures.ThreadPoolExecutor(min(workers, len(todo)), thread_name_prefix="collect") as pool:
        futures = {pool.submit(collect_one, *shard): shard for shard in todo}
        try:
            for future in concurrent.futures.as_completed(futures):
                split, number, _ = futures[future]
                finished[split, number] = future.result()
                grown = False
                for name, value in manifest["splits"].items():
                    while (name, len(value["files"])) in finished:
                        value["files"].append(finished.pop((name, len(value["files"]))))
                        grown = True
                if grown:
                    manifest = write_manifest(config.out_dir, manifest)
        except BaseException as error:
            stop.set()
            for future in futures:
                future.cancel()
            if isinstance(error, Cancelled):
                raise KeyboardInterrupt from error
            raise
    return manifest
