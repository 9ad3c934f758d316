"""One change at a time against a reference, each over the same seeds: what prepending, mixers and passes are worth.

Legend: S seeds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError
from worldmodel.baselines import finished_run, score_run
from worldmodel.coinrun import ProfileName, load_profile
from worldmodel.config import Profile, TrainConfig, from_dict, read_json, to_dict
from worldmodel.configs.baselines import baselines, shortened
from worldmodel.data.collect import run_collect
from worldmodel.data.tokenize import TokenizeConfig, run_tokenize
from worldmodel.leaderboard import table
from worldmodel.runs import write_json_atomic, write_text_atomic

# 97.5% quantiles of Student's t by degrees of freedom, for intervals of a mean over 2 to 10 seeds.
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
METRICS = (
    ("PSNR at 4, dB", lambda d: d["horizons"]["4"]["rollout_psnr_db"]["value"]),
    ("PSNR at 15, dB", lambda d: d["horizons"]["15"]["rollout_psnr_db"]["value"]),
    ("SSIM at 15", lambda d: d["horizons"]["15"]["rollout_ssim"]["value"]),
    ("delta PSNR, dB", lambda d: d["delta_psnr_db"]["value"]),
    ("bits a frame", lambda d: (d["teacher_forced_bits_per_frame"] or {"value": float("nan")})["value"]),
    ("ms a frame (p50)", lambda d: d["speed"]["p50_ms"]),
)


@dataclass(frozen=True)
class Variant:
    """A row of the table: a baseline, what is changed in its stage, and how it is sampled."""

    title: str
    base: str
    """Baseline that it is a change of."""
    reference: str
    """Variant that it is compared with; its own name for a reference."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Dotted field of the stage's configuration -> value."""
    decode_steps: int = 0
    """Passes a frame; 0 takes the baseline's."""


VARIANTS = {
    "maskgit": Variant("MaskGIT: prepended action, factorised attention, 2 passes", "maskgit", "maskgit"),
    "add": Variant("action added", "maskgit", "maskgit", {"dynamics.action_conditioning": "add"}),
    "joint": Variant("full spatio-temporal attention", "maskgit", "maskgit", {"dynamics.blocks.joint": True}),
    "mamba2": Variant(
        "Mamba-2 along time, equal parameters", "maskgit", "maskgit", {"dynamics.blocks.mixer": "mamba2"}
    ),
    "masking-all": Variant("all frames masked, as published", "maskgit", "maskgit", {"dynamics.masking": "all"}),
    "passes-4": Variant("4 passes", "maskgit", "maskgit", decode_steps=4),
    "passes-8": Variant("8 passes", "maskgit", "maskgit", decode_steps=8),
    "passes-25": Variant("25 passes", "maskgit", "maskgit", decode_steps=25),
    "causal": Variant("causal", "causal", "maskgit"),
    "shortcut": Variant("shortcut forcing, 4 steps", "shortcut", "shortcut"),
    "shortcut-2": Variant("2 steps", "shortcut", "shortcut", decode_steps=2),
    "shortcut-1": Variant("1 step", "shortcut", "shortcut", decode_steps=1),
    "diffusion-16": Variant("without shortcut, 16 steps", "diffusion", "shortcut"),
    "diffusion-4": Variant("without shortcut, 4 steps", "diffusion", "shortcut", decode_steps=4),
    "context": Variant("context stream, without shortcut, 16 steps", "diffusion-context", "shortcut"),
}


@dataclass(frozen=True)
class AblateConfig:
    """Train each variant over several seeds on one tokenizer, score them alike, write one table."""

    profile: ProfileName = "cpu"
    run_dir: str = ""
    """Folder of all runs; runs/ablate-PROFILE by default."""
    data_dir: str = ""
    """Data set; CoinRun collected inside the run folder by default. A second environment is another folder."""
    only: tuple[str, ...] = ()
    """Variants to run, with the references that they are compared with; all by default."""
    seeds: int = 3
    step_share: float = 1.0
    clips: int = 0
    """Clips of the evaluation; 0 takes the preset's number."""

    def __post_init__(self) -> None:
        if not 2 <= self.seeds <= len(T_QUANTILE) + 1:
            raise ConfigError(f"seeds {self.seeds}: an interval over seeds needs 2 to {len(T_QUANTILE) + 1}")


def changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """A stage with some fields replaced, checked like any configuration.

    Raises:
        ConfigError: a field that there is not, or a value that does not fit.
    """
    values = to_dict(config)
    for name, value in changes.items():
        *path, last = name.split(".")
        node = values
        for part in path:
            if part not in node:
                raise ConfigError(f"no field {name!r} in a stage's configuration ({part!r} is unknown)")
            node = node[part]
        node[last] = value
    return from_dict(TrainConfig, values, where="ablation")


def run_key(variant: Variant) -> str:
    """Variants that differ only in sampling share a trained run."""
    return "-".join([variant.base, *(f"{name.split('.')[-1]}={value}" for name, value in variant.changes.items())])


def interval_over_seeds(values_S: np.ndarray) -> tuple[float, float]:
    """Mean and half width of its 95% interval by Student's t."""
    half = T_QUANTILE[len(values_S) - 2] * values_S.std(ddof=1) / np.sqrt(len(values_S))
    return float(values_S.mean()), float(half)


def run_ablate(config: AblateConfig) -> Path:
    """Train and score what is not done yet, then write ablation.md and ablation.json into the run folder.

    Args:
        config: what to run and where.

    Returns:
        The table's file.
    """
    unknown = sorted(set(config.only) - set(VARIANTS))
    if unknown:
        raise ConfigError(f"no variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    names = set(config.only or VARIANTS)
    names |= {VARIANTS[name].reference for name in names}
    profile = load_profile(config.profile)
    root = Path(config.run_dir or f"runs/ablate-{config.profile}")
    data_dir = config.data_dir or str(root / "data")
    if not config.data_dir:
        run_collect(dataclasses.replace(profile.collect, out_dir=Path(data_dir)))
    results: dict[str, list[dict[str, Any]]] = {}
    for name in (name for name in VARIANTS if name in names):
        results[name] = [_score(config, profile, root, data_dir, name, seed) for seed in range(config.seeds)]
    write_json_atomic(root / "ablation.json", results)
    write_text_atomic(root / "ablation.md", "\n".join(ablation_lines(results, config)) + "\n")
    return root / "ablation.md"


def _score(
    config: AblateConfig, profile: Profile, root: Path, data_dir: str, name: str, seed: int
) -> dict[str, Any]:
    variant, known = VARIANTS[name], baselines(profile)
    baseline = known[variant.base]
    tokenizer = dataclasses.replace(
        shortened(known[baseline.tokenizer].train, config.step_share),
        data_dir=data_dir, run_dir=str(root / baseline.tokenizer),
    )  # fmt: skip
    finished_run(tokenizer)
    token_dir = ""
    if baseline.train.dynamics.kind != "diffusion":
        token_dir = str(root / f"{baseline.tokenizer}-tokens")
        run_tokenize(TokenizeConfig(Path(data_dir), Path(tokenizer.run_dir), Path(token_dir)))
    run_dir = root / f"{run_key(variant)}-seed{seed}"
    stage = changed(shortened(baseline.train, config.step_share), variant.changes)
    summary = finished_run(
        dataclasses.replace(
            stage, data_dir=data_dir, run_dir=str(run_dir), tokenizer_run=tokenizer.run_dir, token_dir=token_dir,
            seed=seed,
        )
    )  # fmt: skip
    rollout = baseline.rollout or profile.evaluate.rollout
    rollout = dataclasses.replace(rollout, decode_steps=variant.decode_steps or rollout.decode_steps)
    document = run_dir / f"evaluation-{rollout.decode_steps}.json"
    if not document.exists():
        evaluate = dataclasses.replace(
            profile.evaluate, clips=config.clips or profile.evaluate.clips, rollout=rollout
        )
        scores = score_run(run_dir, data_dir, evaluate, grid=profile.grid)
        write_json_atomic(document, {"parameters": summary["parameters"], "seed": seed, **scores})
    return read_json(document, what="an evaluation")


def ablation_lines(results: dict[str, list[dict[str, Any]]], config: AblateConfig) -> list[str]:
    """The table: each variant's mean over seeds, and its paired difference from its reference, with intervals."""
    head = ["variant", "parameters, M", *(name for name, _ in METRICS)]
    rows = []
    for name, documents in results.items():
        variant = VARIANTS[name]
        cells = [variant.title, f"{documents[0]['parameters'] / 1e6:.3f}"]
        for _, value_of in METRICS:
            values_S = np.asarray([value_of(d) for d in documents])
            reference_S = np.asarray([value_of(d) for d in results[variant.reference]])
            mean, half = interval_over_seeds(values_S)
            if np.isnan(mean):
                cells.append("–")
                continue
            text = f"{mean:.2f} ± {half:.2f}"
            if variant.reference != name and not np.isnan(reference_S).any():
                shift, spread = interval_over_seeds(values_S - reference_S)
                text += f" ({shift:+.2f} ± {spread:.2f})"
            cells.append(text)
        rows.append(cells)
    covers = next(iter(results.values()))[0]["data"]
    return [
        "# Ablation",
        "",
        f"Written by `python -m worldmodel ablate --profile {config.profile} --seeds {config.seeds} --step-share "
        f"{config.step_share:g}`. {covers['clips']} clips of split {covers['split']}, data {covers['sha256'][:12]}; "
        "one tokenizer, weights and order of data drawn anew by seed. Mean over seeds ± half of its 95% interval "
        "(Student's t); in parentheses the difference from the reference, paired by seed.",
        "",
        *table(head, rows),
    ]
