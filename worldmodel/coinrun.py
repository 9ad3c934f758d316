"""The whole pipeline as one resumable command: collect, tokenizer, tokens, dynamics (recorded and latent actions),
export, evaluation, rollouts, report page.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.console import TrainingConsole
from common.errors import ConfigError
from worldmodel.config import EvaluateConfig, Profile, TrainConfig, read_json, to_dict
from worldmodel.data.collect import run_collect
from worldmodel.data.records import open_dataset
from worldmodel.data.tokenize import TokenizeConfig, run_tokenize
from worldmodel.evaluate.suite import evaluate_world
from worldmodel.export import export_world, load_exported
from worldmodel.report import write_report
from worldmodel.rollout.render import rollout_rows, side_by_side, write_picture_files
from worldmodel.rollout.world import World, load_world
from worldmodel.runs import RunFolder, provenance, write_json_atomic, write_text_atomic
from worldmodel.train.loop import hardware_line, train

ProfileName = Literal["cpu", "gpu", "paper"]
CLIP_SEED = 7


@dataclass(frozen=True)
class CoinrunConfig:
    """Record CoinRun, train a world on it, score it and show it."""

    profile: ProfileName = "cpu"
    """Preset of worldmodel/configs."""
    run_dir: str = ""
    """Run folder; runs/coinrun-PROFILE by default."""
    data_dir: str = ""
    """Data set; inside the run folder by default."""
    overwrite: bool = False
    """Discard an earlier run in the same folder, with its data set unless `data_dir` is elsewhere."""
    log_json: bool = False
    """Print the entries of log.jsonl, the stages and the bars as JSON, one object a line, and nothing else."""


def load_profile(name: str) -> Profile:
    """The preset of that name."""
    return importlib.import_module(f"worldmodel.configs.{name}").PROFILE


def stage_config(base: TrainConfig, root: Path, name: str, data_dir: str) -> TrainConfig:
    """A preset's stage with the paths of one run."""
    tokenizer = "" if base.stage == "tokenizer" else str(root / "tokenizer")
    return dataclasses.replace(base, data_dir=data_dir, run_dir=str(root / name), tokenizer_run=tokenizer)


class _Timer:
    """Seconds of each stage, kept over resumes in stages.json."""

    def __init__(self, root: Path, console: TrainingConsole) -> None:
        self._console = console
        self._path = root / "stages.json"
        self.seconds: dict[str, float] = read_json(self._path, what="stage times") if self._path.exists() else {}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        self._console.say(f"== {name}")
        self._console.entry({"event": "stage", "stage": name})
        began_s = time.perf_counter()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began_s
        write_json_atomic(self._path, self.seconds)
        return result


def _evaluate_both(world: World, artifact: Path, data_dir: str, config: EvaluateConfig) -> dict[str, Any]:
    """Scores of the artifact read back from disk (the result) and of the float weights, and what the export lost."""
    stored = evaluate_world(load_exported(artifact).sharing(world), data_dir, config)
    # What the export lost is told by pictures and bits: the float weights need no other score.
    few = dataclasses.replace(config, speed_frames=2, reader_steps=0, frechet_samples=0)
    floating = evaluate_world(world, data_dir, few)
    horizons = {h: {"rollout_psnr_db": floating["horizons"][h]["rollout_psnr_db"]["value"]
                    - stored["horizons"][h]["rollout_psnr_db"]["value"]} for h in stored["horizons"]}  # fmt: skip
    lost = {
        "tokenizer_psnr_db": floating["tokenizer_psnr_db"]["value"] - stored["tokenizer_psnr_db"]["value"],
        "horizons": horizons,
        "teacher_forced_bits_per_frame": stored["teacher_forced_bits_per_frame"]["value"]
        - floating["teacher_forced_bits_per_frame"]["value"],
    }
    floating.pop("speed")
    return {"artifact": stored, "float": floating, "lost_by_export": lost, "artifact_bytes": artifact.stat().st_size}


def run_coinrun(config: CoinrunConfig) -> dict[str, Any]:
    """Run every stage that is not done yet.

    Args:
        config: preset and folders.

    Returns:
        The evaluation document (also in evaluation.json).

    Raises:
        ConfigError: a training stage was stopped by a signal; run the command again to go on.
    """
    profile = load_profile(config.profile)
    root = Path(config.run_dir or f"runs/coinrun-{config.profile}")
    data_dir = config.data_dir or str(root / "data")
    run = RunFolder(root, {"profile": config.profile, **to_dict(_without_paths(profile))}, overwrite=config.overwrite)
    if not (root / "train.log").exists():
        write_text_atomic(root / "train.log", provenance(hardware_line()))
    console = TrainingConsole(as_json=config.log_json)
    timer = _Timer(root, console)
    collect = dataclasses.replace(profile.collect, out_dir=Path(data_dir))
    timer.run("collect", lambda: run_collect(collect))
    stages = {
        "tokenizer": stage_config(profile.tokenizer, root, "tokenizer", data_dir),
        "dynamics": stage_config(profile.dynamics, root, "dynamics", data_dir),
        "dynamics_latent": stage_config(profile.dynamics_latent, root, "dynamics_latent", data_dir),
    }
    token_dir = str(root / "tokens")
    summaries: dict[str, Any] = {}
    for name, stage in stages.items():
        if stage.stage == "dynamics":
            tokenize = TokenizeConfig(Path(data_dir), root / "tokenizer", Path(token_dir))
            timer.run("tokenize", lambda tokenize=tokenize: run_tokenize(tokenize))
            stage = dataclasses.replace(stage, token_dir=token_dir)
        summaries[name] = timer.run(name, lambda stage=stage: train(stage, console=console))
        if summaries[name]["status"] != "finished":
            raise ConfigError(
                f"stage {name} was stopped at step {summaries[name]['steps']}; run the same command to go on"
            )
    worlds = {name: load_world(str(root / name)) for name in ("dynamics", "dynamics_latent")}
    evaluation: dict[str, Any] = {"profile": config.profile, "hardware": hardware_line()}
    for name, world in worlds.items():
        artifact = root / ("model.artifact" if name == "dynamics" else f"{name}.artifact")
        timer.run("export", lambda w=world, a=artifact: export_world(w, a, grid=profile.grid, overwrite=True))
        document = root / f"evaluation_{name}.json"
        if not document.exists():
            scores = timer.run(
                f"evaluate {name}", lambda w=world, a=artifact: _evaluate_both(w, a, data_dir, profile.evaluate)
            )
            write_json_atomic(document, scores)
        evaluation[name] = read_json(document, what="an evaluation")
    pictures = root / "rollouts"
    if not (pictures / "done.json").exists():
        timer.run("rollout", lambda: _draw(list(worlds.values()), data_dir, pictures, profile))
    evaluation["bars"] = bars(evaluation, profile)
    evaluation["seconds"] = timer.seconds
    evaluation["seconds_total"] = sum(timer.seconds.values())
    evaluation["training"] = summaries
    write_json_atomic(root / "evaluation.json", evaluation)
    write_report(root, evaluation)
    run.finish({"status": "finished", "seconds": timer.seconds, "bars": evaluation["bars"]})
    console.entry({"event": "bars", **evaluation["bars"]})
    console.say(json.dumps(evaluation["bars"], indent=2))
    console.say(f"report: {root / 'report.html'}")
    return evaluation


def _without_paths(profile: Profile) -> Any:
    return dataclasses.replace(profile, collect=dataclasses.replace(profile.collect, out_dir=""))  # pyright: ignore


def _draw(worlds: list[World], data_dir: str, out: Path, profile: Profile) -> None:
    out.mkdir(parents=True, exist_ok=True)
    config = profile.evaluate.rollout
    dataset = open_dataset(data_dir, profile.evaluate.split)
    clips = dataset.fixed_windows(profile.rollout_clips, config.prompt_frames + config.horizon, seed=CLIP_SEED)
    fps = max(dataset.fps / 3, 2.0)
    drawn = []
    for index in range(profile.rollout_clips):
        rows = rollout_rows(worlds, clips["frames_BTHWC"][index], clips["actions_BT"][index], config)
        write_picture_files(rows, out / f"clip_{index}", formats=("png", "gif", "mp4"), fps=fps)
        drawn.append(rows)
    overview = side_by_side(drawn, {"truth": "the game", "true actions": "the dream, same actions"})
    write_picture_files(overview, out / "overview", formats=("gif",), fps=fps)
    write_json_atomic(out / "done.json", {"clips": profile.rollout_clips})


def bars(evaluation: dict[str, Any], profile: Profile) -> dict[str, Any]:
    """The stated bars of the case study beside what the artifacts reach.

    Args:
        evaluation: the document so far.
        profile: preset, which decides the tokenizer's bar by its patch size.

    Returns:
        For each bar: value, bar, and whether it is met.
    """
    recorded = evaluation["dynamics"]["artifact"]
    latent = evaluation["dynamics_latent"]["artifact"]
    result: dict[str, Any] = {}

    def check(name: str, value: float, bar: float, *, strictly: bool = False) -> None:
        result[name] = {"value": value, "bar": bar, "met": value > bar if strictly else value >= bar}

    patch = profile.tokenizer.tokenizer.frame.patch
    check("tokenizer_psnr_db", recorded["tokenizer_psnr_db"]["value"], 26.0 if patch >= 16 else 30.0)
    for horizon, bar in (("1", 4.0), ("4", 3.0), ("8", 2.5)):
        if horizon in recorded["horizons"]:
            entry = recorded["horizons"][horizon]["above_copy_last_db"]
            check(f"above_copy_last_db_at_{horizon}", entry["value"], bar)
    check("delta_psnr_db", recorded["delta_psnr_db"]["value"], 1.5)
    check("delta_psnr_db_low", recorded["delta_psnr_db"]["low"], 0.0, strictly=True)
    check("frames_per_s_at_batch_1", recorded["speed"]["frames_per_s"], 10.0)
    check("latent_actions_used", latent["action_codes"]["used"], latent["action_codes"]["of"])
    check("latent_delta_psnr_db_low", latent["delta_psnr_db"]["low"], 0.0, strictly=True)
    return result
