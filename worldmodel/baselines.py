"""Every baseline as one resumable command: data, training, export, evaluation, leaderboard."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from worldmodel.coinrun import ProfileName, load_profile
from worldmodel.config import EvaluateConfig, TrainConfig
from worldmodel.configs.baselines import Baseline, baselines, shortened
from worldmodel.data.collect import run_collect
from worldmodel.data.records import read_manifest
from worldmodel.data.tokenize import TokenizeConfig, run_tokenize
from worldmodel.evaluate.jepa import evaluate_jepa
from worldmodel.evaluate.stages import evaluate_lam, evaluate_tokenizer
from worldmodel.evaluate.suite import evaluate_world
from worldmodel.export import export_world, load_exported
from worldmodel.leaderboard import write_leaderboard
from worldmodel.rollout.world import load_world
from worldmodel.runs import write_json_atomic
from worldmodel.train.loop import hardware_line, train
from worldmodel.train.restore import load_jepa, load_lam, load_run_config, load_tokenizer


@dataclass(frozen=True)
class BaselinesConfig:
    """Train and score every kind of model on one data set, and write the leaderboard."""

    profile: ProfileName = "cpu"
    """Preset of worldmodel/configs that sizes and schedules come from."""
    run_dir: str = ""
    """Folder of all runs; runs/baselines-PROFILE by default."""
    data_dir: str = ""
    """Data set; collected inside the run folder by default."""
    only: tuple[str, ...] = ()
    """Names of the baselines to run, and what they need; all by default."""
    step_share: float = 1.0
    """Share of the preset's training steps."""
    clips: int = 0
    """Clips of the evaluation; 0 takes the preset's number."""
    leaderboard: str = ""
    """Markdown file to write at the end; inside the run folder by default."""

    def __post_init__(self) -> None:
        if not 0.0 < self.step_share <= 1.0:
            raise ConfigError(f"step_share {self.step_share}: expected a share above 0, at most 1")
        if self.clips < 0:
            raise ConfigError(f"clips {self.clips}: expected 0 (the preset's number) or more")


def wanted(all_of_them: dict[str, Baseline], only: tuple[str, ...]) -> dict[str, Baseline]:
    """The baselines asked for, with what they need, in order.

    Raises:
        ConfigError: a name that there is not.
    """
    unknown = sorted(set(only) - set(all_of_them))
    if unknown:
        raise ConfigError(f"no baseline {unknown[0]!r}; there are {', '.join(all_of_them)}")
    names = set(only or all_of_them)
    for name in list(names):
        names |= {all_of_them[name].tokenizer, all_of_them[name].lam}
    return {name: baseline for name, baseline in all_of_them.items() if name in names}


def finished_run(config: TrainConfig) -> dict[str, Any]:
    """Train a stage to its end; its summary.

    Raises:
        ConfigError: a signal stopped it; the same command goes on.
    """
    summary = train(config)
    if summary["status"] != "finished":
        raise ConfigError(f"{config.run_dir} was stopped at step {summary['steps']}; run the same command to go on")
    return summary


def score_run(run_dir: Path, data_dir: str, evaluate: EvaluateConfig, *, grid: str) -> dict[str, Any]:
    """The evaluation of a trained run of any stage: of a world, the artifact read back from disk."""
    stage = load_run_config(run_dir).stage
    if stage == "tokenizer":
        return evaluate_tokenizer(load_tokenizer(run_dir), data_dir, evaluate)
    num_actions = int(read_manifest(data_dir)["num_actions"])
    if stage == "lam":
        return evaluate_lam(load_lam(run_dir), data_dir, evaluate, num_actions=num_actions)
    if stage == "jepa":
        return evaluate_jepa(load_jepa(run_dir, num_actions), data_dir, evaluate)
    artifact = run_dir / "model.artifact"
    export_world(load_world(str(run_dir)), artifact, grid=grid, overwrite=True)
    document = evaluate_world(load_exported(artifact), data_dir, evaluate)
    return {"stage": stage, "artifact_bytes": artifact.stat().st_size, **document}


def placed(baseline: Baseline, root: Path, name: str, data_dir: str, token_dir: str, share: float) -> TrainConfig:
    """A baseline's stage with the paths of one run and a share of its steps."""
    config = dataclasses.replace(
        shortened(baseline.train, share),
        data_dir=data_dir,
        run_dir=str(root / name),
        tokenizer_run=str(root / baseline.tokenizer) if baseline.tokenizer else "",
        lam_run=str(root / baseline.lam) if baseline.lam else "",
    )
    discrete = config.stage == "dynamics" and config.dynamics.kind != "diffusion"
    return dataclasses.replace(config, token_dir=token_dir if discrete else "")


def run_baselines(config: BaselinesConfig) -> Path:
    """Train, export and score what is not done yet, then write the leaderboard.

    Args:
        config: what to run and where.

    Returns:
        The leaderboard file.

    Raises:
        ConfigError: a stage was stopped by a signal; run the command again to go on.
        CheckpointError: a run folder holds a run of other options.
    """
    profile = load_profile(config.profile)
    chosen = wanted(baselines(profile), config.only)
    root = Path(config.run_dir or f"runs/baselines-{config.profile}")
    data_dir = config.data_dir or str(root / "data")
    if not config.data_dir:
        run_collect(dataclasses.replace(profile.collect, out_dir=Path(data_dir)))
    clips = config.clips or profile.evaluate.clips
    for name, baseline in chosen.items():
        print(f"== {name}", flush=True)
        token_dir = str(root / f"{baseline.tokenizer}-tokens") if baseline.tokenizer else ""
        stage = placed(baseline, root, name, data_dir, token_dir, config.step_share)
        if stage.token_dir:
            run_tokenize(TokenizeConfig(Path(data_dir), Path(stage.tokenizer_run), Path(token_dir)))
        began_s = time.process_time()
        summary = finished_run(stage)
        trained_cpu_s = time.process_time() - began_s
        document = root / name / "evaluation.json"
        if document.exists():
            continue
        rollout = baseline.rollout or profile.evaluate.rollout
        evaluate = dataclasses.replace(profile.evaluate, clips=clips, rollout=rollout)
        scores = score_run(root / name, data_dir, evaluate, grid=profile.grid)
        entry = {
            "name": name, "title": baseline.title, "profile": config.profile, "step_share": config.step_share,
            "steps": summary["steps"], "parameters": summary["parameters"], "seconds": summary["seconds"],
            "cpu_seconds": trained_cpu_s, "hardware": hardware_line(),
        }  # fmt: skip
        write_json_atomic(document, {"baseline": entry, **scores})
    return write_leaderboard([root], Path(config.leaderboard) if config.leaderboard else root / "LEADERBOARD.md")
