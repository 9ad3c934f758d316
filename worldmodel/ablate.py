"""One change at a time against a reference, each over the same seeds, in several games: what each choice is worth.

Legend: S seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
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
from worldmodel.data.envs import EnvOptions
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
    ("bits a frame", lambda d: (d["teacher_forced_bits_per_frame"] or {"value": None})["value"]),
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
    "masking-all-add": Variant(
        "all frames masked, action added",
        "maskgit",
        "masking-all",
        {"dynamics.masking": "all", "dynamics.action_conditioning": "add"},
    ),
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

# The paper: prepending actions instead of adding them is what makes rollouts faithful. Pairs that differ in that alone.
PREPENDING = (("maskgit", "add"), ("masking-all", "masking-all-add"))
CLAIM_METRIC = "PSNR at 15, dB"
POLICIES = {"puck": "sticky"}  # of the other games: the preset's


@dataclass(frozen=True)
class AblateConfig:
    """Train each variant over several seeds on one tokenizer, score them alike, write one table."""

    profile: ProfileName = "cpu"
    run_dir: str = ""
    """Folder of all runs; runs/ablate-PROFILE by default."""
    games: tuple[str, ...] = ("coinrun", "puck")
    """Games to collect as the preset does, inside the run folder; each has its own table."""
    data_dirs: tuple[str, ...] = ()
    """Data sets to use instead, each by the name of its folder."""
    table: str = ""
    """Markdown file to write; ablation.md in the run folder by default."""
    keep: str = ""
    """JSON file that gets the scores of every seed; ablation.json in the run folder by default."""
    only: tuple[str, ...] = ()
    """Variants to run, with the references that they are compared with; all by default."""
    seeds: int = 3
    step_share: float = 1.0
    clips: int = 0
    """Clips of the evaluation; 0 takes the preset's number."""

    def __post_init__(self) -> None:
        if not 2 <= self.seeds <= len(T_QUANTILE) + 1:
            raise ConfigError(f"seeds {self.seeds}: an interval over seeds needs 2 to {len(T_QUANTILE) + 1}")
        names = [Path(folder).name for folder in self.data_dirs]
        if len(set(names)) < len(names):
            raise ConfigError(f"data_dirs {', '.join(self.data_dirs)}: last parts name tables, so they must differ")


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


def with_references(names: Iterable[str]) -> list[str]:
    """Variants and all that they are compared with, in the table's order.

    Raises:
        ConfigError: a name that there is not.
    """
    wanted, waiting = set[str](), list(names)
    while waiting:
        name = waiting.pop()
        if name not in VARIANTS:
            raise ConfigError(f"no variant {name!r}; there are {', '.join(VARIANTS)}")
        if name not in wanted:
            wanted.add(name)
            waiting.append(VARIANTS[name].reference)
    return [name for name in VARIANTS if name in wanted]


def run_ablate(config: AblateConfig) -> Path:
    """Train and score what is not done yet, then write the table and the scores behind it.

    Args:
        config: what to run and where.

    Returns:
        The table's file.
    """
    names = with_references(config.only or VARIANTS)
    profile = load_profile(config.profile)
    root = Path(config.run_dir or f"runs/ablate-{config.profile}")
    data = {Path(folder).name: Path(folder) for folder in config.data_dirs}
    for game in () if data else config.games:
        folder = root / "data" / game.replace(":", "-")
        recipe = profile.collect
        env = recipe.env if game == recipe.env.game else EnvOptions(game=game)
        policy = POLICIES.get(game, recipe.policy)
        run_collect(dataclasses.replace(recipe, env=env, policy=policy, out_dir=folder))
        data[folder.name] = folder
    tables: dict[str, Any] = {}
    for where, folder in data.items():
        documents = {
            name: [_score(config, profile, root / where, str(folder), name, seed) for seed in range(config.seeds)]
            for name in names
        }
        tables[where] = summarised(documents)
    kept = {"profile": config.profile, "step_share": config.step_share, "seeds": config.seeds, "tables": tables}
    write_json_atomic(Path(config.keep) if config.keep else root / "ablation.json", kept)
    out = Path(config.table) if config.table else root / "ablation.md"
    write_text_atomic(out, "\n".join(ablation_lines(kept)) + "\n")
    return out


def summarised(documents: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What the table needs of the evaluations of one data set: clips, and by variant the scores of every seed."""
    first = next(iter(documents.values()))[0]
    return {
        "data": {name: first["data"][name] for name in ("clips", "split", "sha256")},
        "variants": {
            name: {
                "parameters": of_seeds[0]["parameters"],
                "scores": {metric: [value_of(d) for d in of_seeds] for metric, value_of in METRICS},
            }
            for name, of_seeds in documents.items()
        },
    }


def _score(config: AblateConfig, profile: Profile, root: Path, data_dir: str, name: str, seed: int) -> dict[str, Any]:
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
        evaluate = dataclasses.replace(profile.evaluate, clips=config.clips or profile.evaluate.clips, rollout=rollout)
        scores = score_run(run_dir, data_dir, evaluate, grid=profile.grid)
        write_json_atomic(document, {"parameters": summary["parameters"], "seed": seed, **scores})
    return read_json(document, what="an evaluation")


def difference(variants: dict[str, Any], name: str, reference: str, metric: str) -> tuple[float, float] | None:
    """Mean over seeds of a score less the reference's, and half of its interval; None where it was not measured."""
    pairs = [variants[n]["scores"].get(metric, [None]) for n in (name, reference) if n in variants]
    if len(pairs) < 2 or None in pairs[0] or None in pairs[1]:
        return None
    return interval_over_seeds(np.subtract(*pairs))


def claim_lines(tables: dict[str, Any]) -> list[str]:
    """What the intervals say of the paper's claim about prepending, a line a game and pair."""
    lines = []
    for where, of_data in tables.items():
        for prepended, added in PREPENDING:
            found = difference(of_data["variants"], added, prepended, CLAIM_METRIC)
            if found is None:
                continue
            shift, half = found
            verdict = "not shown, the interval holds 0"
            if abs(shift) > half:
                verdict = "confirmed" if shift < 0 else "refuted"
            lines.append(
                f"- {where}, {VARIANTS[prepended].title}: adding instead changes {CLAIM_METRIC.split(',')[0]} by "
                f"{shift:+.2f} ± {half:.2f} dB: **{verdict}**."
            )
    return lines


def ablation_lines(kept: dict[str, Any]) -> list[str]:
    """The document: for each game every variant's mean over seeds, and its paired difference, with intervals."""
    head = ["variant", "parameters, M", *(name for name, _ in METRICS)]
    lines = [
        "# One change at a time",
        "",
        f"Written by `python -m worldmodel ablate --profile {kept['profile']} --seeds {kept['seeds']} --step-share "
        f"{kept['step_share']:g}`. One tokenizer a game; weights and order of data drawn anew by seed, alike for all "
        "variants. Mean over seeds ± half of its 95% interval (Student's t); in parentheses the difference from the "
        "reference, paired by seed, bold where its interval excludes 0. Intervals are not adjusted for their number.",
    ]
    if kept["step_share"] != 1.0:
        lines += ["", f"**Every model was trained for {kept['step_share']:.0%} of the preset's steps only.**"]
    claims = claim_lines(kept["tables"])
    if claims:
        lines += ["", "The paper: prepending actions makes rollouts faithful where adding them does not. Here:", ""]
        lines += claims
    for where, of_data in kept["tables"].items():
        rows = []
        for name, entry in of_data["variants"].items():
            title, reference = VARIANTS[name].title, VARIANTS[name].reference
            against = "" if name == reference else f" (against {reference})"
            cells = [title + against, f"{entry['parameters'] / 1e6:.3f}"]
            for metric, _ in METRICS:
                values = entry["scores"][metric]
                if None in values:
                    cells.append("–")
                    continue
                mean, half = interval_over_seeds(np.asarray(values))
                text = f"{mean:.2f} ± {half:.2f}"
                found = None if name == reference else difference(of_data["variants"], name, reference, metric)
                if found is not None:
                    shift, spread = found
                    mark = "**" if abs(shift) > spread else ""
                    text += f" ({mark}{shift:+.2f} ± {spread:.2f}{mark})"
                cells.append(text)
            rows.append(cells)
        data = of_data["data"]
        about = f"{data['clips']} clips of split {data['split']}, data {data['sha256'][:12]}."
        lines += ["", f"## {where}", "", about, "", *table(head, rows)]
    return lines
