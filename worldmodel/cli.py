"""Commands of `python -m worldmodel`: one dataclass each, parsed by tyro."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from common.artifact.budget import format_size_table
from common.console import TrainingConsole
from common.errors import ConfigError, GolfError
from worldmodel.ablate import AblateConfig, run_ablate
from worldmodel.baselines import BaselinesConfig, run_baselines
from worldmodel.coinrun import CoinrunConfig, load_profile, run_coinrun
from worldmodel.config import EvaluateConfig, RolloutConfig, TrainConfig
from worldmodel.configs.baselines import baselines
from worldmodel.data.collect import CollectConfig, run_collect
from worldmodel.data.importer import ImportConfig, run_import
from worldmodel.data.inspect import InspectConfig, ValidateConfig, run_inspect, run_validate
from worldmodel.data.records import open_dataset
from worldmodel.data.tokenize import TokenizeConfig, run_tokenize
from worldmodel.doctor import examine, lines_of
from worldmodel.evaluate.suite import evaluate_world
from worldmodel.export import FITTED_GRIDS, export_world, load_exported
from worldmodel.fisher import world_statistics
from worldmodel.leaderboard import LeaderboardConfig, write_leaderboard
from worldmodel.play.start import PlayConfig, run_play
from worldmodel.rollout.render import rollout_rows, write_picture_files
from worldmodel.rollout.world import World, load_world
from worldmodel.runs import write_json_atomic
from worldmodel.train.loop import train
from worldmodel.train.processes import BAD_INPUT_STATUS, joined, launch, members
from worldmodel.train.restore import load_run_config

PROFILES = ("cpu", "gpu", "paper")


@dataclass(frozen=True)
class WorldSource:
    """Which trained world to use: a run folder of stage dynamics, or an artifact."""

    run: str = ""
    """Run folder of the dynamics."""
    tokenizer_run: str = ""
    """Run folder of its tokenizer, when it has moved since training."""
    from_artifact: str = ""
    """Artifact file of `export`."""

    def load(self) -> World:
        """The world.

        Raises:
            ConfigError: not exactly one of the two is given.
        """
        if bool(self.run) == bool(self.from_artifact):
            raise ConfigError("name one source of weights: --run RUN_FOLDER or --from-artifact FILE")
        if self.from_artifact:
            return load_exported(self.from_artifact)
        return load_world(self.run, tokenizer_run=self.tokenizer_run)


@dataclass(frozen=True)
class RolloutCommand:
    """Draw dreamed clips beside the truth: PNG, GIF and MP4 grids."""

    world: Annotated[WorldSource, tyro.conf.arg(name="")] = field(default_factory=WorldSource)
    latent_run: str = ""
    """Run folder of a second world with latent actions (same tokenizer), for its rows."""
    latent_artifact: str = ""
    """The same, from an artifact."""
    data_dir: str = ""
    """Data set of the true clips; the one of training by default."""
    split: str = "val"
    out_dir: str = "rollouts"
    clips: int = 4
    seed: int = 0
    formats: tuple[Literal["png", "gif", "mp4"], ...] = ("png", "gif", "mp4")
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    overwrite: bool = False


@dataclass(frozen=True)
class EvaluateCommand:
    """Score a world on fixed clips, with intervals."""

    world: Annotated[WorldSource, tyro.conf.arg(name="")] = field(default_factory=WorldSource)
    data_dir: str = ""
    """Data set; the one of training by default."""
    json: str = ""
    """File for the JSON document; it is printed when none is named."""
    overwrite: bool = False
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


@dataclass(frozen=True)
class ExportCommand:
    """Write a trained world to one quantized artifact file."""

    run: str
    """Run folder of the dynamics."""
    out: str
    """Artifact file."""
    tokenizer_run: str = ""
    grid: Literal["int8", "int4", "fitted", "trellis"] = "int8"
    """The last two have steps that fill the bits below; trellis takes longer and should lose less (LOG.md)."""
    bits: float = 4.0
    """Bits a weight of the whole file, of the grids fitted and trellis."""
    data_dir: str = ""
    """Data set whose training clips show what their errors cost; the one of training by default."""
    clips: int = 1024
    """How many of them."""
    overwrite: bool = False


@dataclass(frozen=True)
class TrainCommand:
    """Train one stage, or go on with it."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    overwrite: bool = False
    """Discard an earlier run in the same folder."""
    log_json: bool = False
    """Print the entries of log.jsonl and nothing else."""
    processes: int = 1
    """Start so many processes on this machine, one GPU each, as one run; mesh.data x mesh.fsdp counts their devices."""


@dataclass(frozen=True)
class DoctorCommand:
    """Predict memory and speed of a preset's training on this device, or on another."""

    preset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRESET")] = "cpu-dynamics"
    """A preset of `train`, such as cpu-dynamics."""
    run: str = ""
    """Run folder whose configuration is examined instead."""
    batch_size: int = 0
    """Clips a step; 0 takes the configuration's."""
    num_actions: int = 15
    """Recorded actions of the data set."""
    target: Literal["here", "h200"] = "here"
    measure_steps: int = 0
    """Also run so many steps on random frames, and say what they took."""
    json: str = ""
    """File for the JSON document."""
    overwrite: bool = False

    def config(self) -> TrainConfig:
        """The configuration to examine.

        Raises:
            ConfigError: no preset of that name (the nearest is suggested).
        """
        if self.run:
            config = load_run_config(self.run)
        else:
            presets = train_presets()
            if self.preset not in presets:
                near = difflib.get_close_matches(self.preset, presets, 1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ConfigError(f"no preset {self.preset!r}: {hint}there are {', '.join(presets)}")
            config = presets[self.preset].config
        return dataclasses.replace(config, batch_size=self.batch_size) if self.batch_size else config


def train_presets() -> dict[str, TrainCommand]:
    """Every preset of `train`, by name."""
    presets = {}
    for profile in PROFILES:
        loaded = load_profile(profile)
        for stage in ("tokenizer", "dynamics", "dynamics_latent"):
            presets[f"{profile}-{stage.replace('_', '-')}"] = TrainCommand(getattr(loaded, stage))
        for name, baseline in baselines(loaded).items():
            if name not in ("vqvae", "maskgit", "maskgit-latent"):  # the three stages above
                presets[f"{profile}-{name}"] = TrainCommand(
                    dataclasses.replace(baseline.train, run_dir=f"runs/{name}")
                )
    return presets


def _command_type() -> Any:
    plain = {
        "collect": (CollectConfig, "record games"),
        "import": (ImportConfig, "bring your own videos"),
        "inspect": (InspectConfig, "what a data set holds"),
        "validate": (ValidateConfig, "find damage in a data set"),
        "tokenize": (TokenizeConfig, "write the token form of a data set"),
        "rollout": (RolloutCommand, "draw dreamed clips"),
        "evaluate": (EvaluateCommand, "score a world"),
        "export": (ExportCommand, "write a world to one file"),
        "play": (PlayConfig, "steer a world in the browser"),
        "coinrun": (CoinrunConfig, "the whole case study"),
        "baselines": (BaselinesConfig, "train and score every kind of model"),
        "leaderboard": (LeaderboardConfig, "write the leaderboard from run folders"),
        "doctor": (DoctorCommand, "what a configuration will need"),
        "ablate": (AblateConfig, "one change at a time, over seeds"),
    }
    train_type = tyro.extras.subcommand_type_from_defaults(train_presets(), prefix_names=False)
    kinds = [Annotated[train_type, tyro.conf.subcommand("train", description="train one stage of a preset")]]
    kinds += [Annotated[kind, tyro.conf.subcommand(name, description=text)] for name, (kind, text) in plain.items()]
    return Union[tuple(kinds)]  # noqa: UP007 (the members are built at run time)


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; choose another place or pass --overwrite")


def _rollout(command: RolloutCommand) -> None:
    worlds = [command.world.load()]
    if command.latent_run or command.latent_artifact:
        worlds.append(WorldSource(run=command.latent_run, from_artifact=command.latent_artifact).load())
    dataset = open_dataset(command.data_dir or worlds[0].config.data_dir, command.split)
    out = Path(command.out_dir)
    total = command.rollout.prompt_frames + command.rollout.horizon
    clips = dataset.fixed_windows(command.clips, total, seed=command.seed)
    out.mkdir(parents=True, exist_ok=True)
    for index in range(command.clips):
        for name in command.formats:
            _refuse_existing(out / f"clip_{index}.{name}", command.overwrite)
    for index in range(command.clips):
        rows = rollout_rows(
            worlds, clips["frames_BTHWC"][index], clips["actions_BT"][index], command.rollout, seed=command.seed
        )
        for path in write_picture_files(rows, out / f"clip_{index}", formats=command.formats, fps=dataset.fps / 3):
            print(path)


def _evaluate(command: EvaluateCommand) -> None:
    if command.json:
        _refuse_existing(Path(command.json), command.overwrite)
    world = command.world.load()
    document = evaluate_world(world, command.data_dir or world.config.data_dir, command.evaluate)
    if command.json:
        write_json_atomic(Path(command.json), document)
        print(command.json)
    else:
        print(json.dumps(document, indent=2))


def _export(command: ExportCommand) -> None:
    _refuse_existing(Path(command.out), command.overwrite)
    world = load_world(command.run, tokenizer_run=command.tokenizer_run)
    statistics = None
    if command.grid in FITTED_GRIDS:
        dataset = open_dataset(command.data_dir or world.config.data_dir, "train")
        count = min(command.clips, dataset.require_windows(world.config.seq_len))
        statistics = world_statistics(world, dataset.fixed_windows(count, world.config.seq_len))
    report = export_world(
        world, command.out, grid=command.grid, bits=command.bits, statistics=statistics, overwrite=command.overwrite
    )
    print(format_size_table(report))


def _doctor(command: DoctorCommand) -> None:
    if command.json:
        _refuse_existing(Path(command.json), command.overwrite)
    document = examine(
        command.config(), num_actions=command.num_actions, target=command.target, measure_steps=command.measure_steps
    )
    print("\n".join(lines_of(document)))
    if command.json:
        write_json_atomic(Path(command.json), document)
        print(command.json)


def run(command: Any) -> int:
    """Do what a parsed command says; the exit status."""
    if isinstance(command, TrainCommand):
        with joined(os.environ) as speaks:
            train(command.config, overwrite=command.overwrite, console=TrainingConsole(speaks, command.log_json))
        return 0  # stopped by a signal, too: it has saved, and the same command goes on
    if isinstance(command, CollectConfig):
        run_collect(command)
    elif isinstance(command, ImportConfig):
        run_import(command)
    elif isinstance(command, InspectConfig):
        run_inspect(command)
    elif isinstance(command, ValidateConfig):
        run_validate(command)
    elif isinstance(command, TokenizeConfig):
        run_tokenize(command)
    elif isinstance(command, RolloutCommand):
        _rollout(command)
    elif isinstance(command, EvaluateCommand):
        _evaluate(command)
    elif isinstance(command, ExportCommand):
        _export(command)
    elif isinstance(command, PlayConfig):
        run_play(command)
    elif isinstance(command, BaselinesConfig):
        print(run_baselines(command))
    elif isinstance(command, LeaderboardConfig):
        print(write_leaderboard(command.runs, Path(command.out)))
    elif isinstance(command, DoctorCommand):
        _doctor(command)
    elif isinstance(command, AblateConfig):
        print(run_ablate(command))
    else:
        run_coinrun(command)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; named errors become one line and status 2."""
    # Orbax announces as a warning that a folder opened for reading is opened for reading.
    logging.getLogger("absl").setLevel(logging.ERROR)
    # JAX warns of every fork in a process with threads; ffmpeg's is followed by exec at once.
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
    try:
        command = tyro.cli(_command_type(), args=arguments, prog="python -m worldmodel")
        if isinstance(command, TrainCommand) and command.processes != 1 and members(os.environ) is None:
            own = sys.argv[1:] if arguments is None else arguments
            return launch([sys.executable, "-m", "worldmodel", *own], command.processes)
        return run(command)
    except GolfError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return BAD_INPUT_STATUS
