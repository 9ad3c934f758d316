"""`python -m worldmodel play`: from a run folder or an artifact to a page in the browser."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from common.errors import ConfigError
from worldmodel.data.records import open_dataset
from worldmodel.export import load_exported
from worldmodel.play.clips import action_table, find_data_dir, start_clips
from worldmodel.play.messages import MAX_FPS, Settings
from worldmodel.play.pool import DreamPool
from worldmodel.play.real import checked_source, real_source
from worldmodel.play.server import GameHost, HostConfig, serve
from worldmodel.play.session import Limits, calibrate
from worldmodel.rollout.world import World, load_world

PACKAGED_ARTIFACT, PACKAGED_CLIPS = "coinrun.artifact", "clips"


@dataclass(frozen=True)
class PlayConfig:
    """Steer a world in the browser, beside the real game. Without --run or --artifact: the packaged CoinRun world."""

    run: str = ""
    """Run folder: of `coinrun` (its model.artifact and data are used) or of stage dynamics."""
    artifact: str = ""
    """Artifact file of `export`."""
    tokenizer_run: str = ""
    """Run folder of the tokenizer, when it has moved since training (with a dynamics run)."""
    data_dir: str = ""
    """Data set of the start clips; that of training by default, the packaged clips where it is not here."""
    split: str = "val"
    host: str = "127.0.0.1"
    """Address to listen at. Anything but a loopback address lets others play."""
    port: int = 8377
    max_players: int = 8
    clips: int = 12
    """Clips to choose from."""
    prompt_frames: int = 4
    """True frames that a dream begins from."""
    temperature: float = 0.0
    decode_steps: int = 2
    fps: float = 0.0
    """Frames a second at first; 0: the data set's."""
    history_s: float = 60.0
    """How far back a rewind reaches."""
    record_s: float = 60.0
    """Length of a recording at most."""
    real: bool = True
    """Show the real game where it can run."""


def load_for_play(config: PlayConfig) -> tuple[World, str]:
    """The world, and the data set that lies beside it ("" when there is none).

    Raises:
        ConfigError: both a run and an artifact are named.
    """
    if config.run and config.artifact:
        raise ConfigError("name one source of weights: --run RUN_FOLDER or --artifact FILE")
    if config.artifact:
        world = load_exported(config.artifact)
        return world, world.config.data_dir
    if not config.run:
        with as_file(files("worldmodel.play") / PACKAGED_ARTIFACT) as path:
            return load_exported(path), ""
    root = Path(config.run)
    if (root / "model.artifact").is_file():
        world = load_exported(root / "model.artifact")
        beside = root / "data"
        return world, str(beside) if beside.is_dir() else world.config.data_dir
    world = load_world(config.run, tokenizer_run=config.tokenizer_run)
    return world, world.config.data_dir


def make_host(config: PlayConfig, stack: ExitStack) -> GameHost:
    """Everything that a server needs, compiled for one player and calibrated.

    Args:
        config: what to play.
        stack: keeps packaged files open for as long as they are read.

    Raises:
        ConfigError, DataError, ArtifactError: a file or option is wrong.
    """
    if config.clips < 1 or config.prompt_frames < 1:
        raise ConfigError(f"clips {config.clips} and prompt_frames {config.prompt_frames}: expected at least 1")
    if not 0.0 <= config.fps <= MAX_FPS:
        raise ConfigError(f"fps {config.fps}: expected 0 (the data set's) to {MAX_FPS}")
    print("loading the world …", flush=True)
    world, trained_on = load_for_play(config)
    packaged = stack.enter_context(as_file(files("worldmodel.play") / PACKAGED_CLIPS))
    data_dir = find_data_dir(config.data_dir, trained_on, packaged)
    dataset = open_dataset(data_dir, config.split)
    stack.callback(dataset.close)
    if dataset.frame_shape != frame_shape(world):
        raise ConfigError(
            f"{data_dir} has frames of {dataset.frame_shape}, the world of {frame_shape(world)}; name the data set "
            "that it was trained on with --data-dir"
        )
    clips, table = start_clips(dataset, config.clips, config.prompt_frames), action_table(world, dataset)
    real = real_source(dataset)
    if not config.real:
        real = dataclasses.replace(real, options=None, reason="switched off with --no-real")
    real = checked_source(real, clips[0].level_seed, clips[0].prefix_N, clips[0].frames_PHWC[-1])
    pool = DreamPool(world, config.max_players)
    fps = config.fps or dataset.fps
    settings = Settings(config.temperature, min(config.decode_steps, pool.tokens), fps)
    print("compiling, and dreaming on from each clip to learn how sure a fresh dream is …", flush=True)
    warn_bits = calibrate(pool, clips, table, settings)
    limits = Limits(round(config.history_s * fps), max(1, round(config.record_s * fps)))
    host_config = HostConfig(max_players=config.max_players, settings=settings, limits=limits, fps=fps)
    print(
        f"{world.source}; start clips from {data_dir}; real game: {real.reason or 'on'}; drift warning above "
        f"{warn_bits:.2f} bits a token",
        flush=True,
    )
    return GameHost(pool, clips, table, real, host_config, warn_bits)


def frame_shape(world: World) -> tuple[int, int, int]:
    """(H, W, C) of a world's frames."""
    frame = world.config.tokenizer.frame
    return frame.height, frame.width, frame.channels


def run_play(config: PlayConfig) -> None:
    """Serve until interrupted."""
    with ExitStack() as stack:
        host = make_host(config, stack)
        print(f"play at http://{'127.0.0.1' if config.host == '0.0.0.0' else config.host}:{config.port}  (Ctrl-C ends)",
              flush=True)  # fmt: skip
        serve(host, config.host, config.port)
