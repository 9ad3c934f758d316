"""`worldmodel/LEADERBOARD.md`, written from run folders and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from worldmodel.config import read_json
from worldmodel.runs import write_text_atomic

HORIZONS = ("1", "4", "15")


@dataclass(frozen=True)
class LeaderboardConfig:
    """Write the leaderboard from run folders of `baselines`."""

    runs: tuple[str, ...] = ("runs/baselines-cpu",)
    """Folders of `baselines`; every evaluation.json one level below counts."""
    out: str = "worldmodel/LEADERBOARD.md"
    """Markdown file."""


def cell(entry: dict[str, float] | None, digits: int = 2) -> str:
    """value [low, high], or a dash where nothing was measured."""
    if entry is None:
        return "–"
    return f"{entry['value']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"


def table(head: Sequence[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def facts(scores: dict[str, Any]) -> list[str]:
    """What every row says of its run."""
    entry = scores["baseline"]
    return [entry["title"], f"{entry['steps']:,}", f"{entry['parameters'] / 1e6:.2f}"]


FACT_HEAD = ("model", "steps", "parameters, M")


def tokenizer_row(scores: dict[str, Any]) -> list[str]:
    """One tokenizer."""
    codes = scores["codebook"]
    return [
        *facts(scores), cell(scores["tokenizer_psnr_db"]), cell(scores["tokenizer_ssim"], 3),
        f"{codes['used']} of {codes['of']}" if codes else "continuous",
    ]  # fmt: skip


def lam_row(scores: dict[str, Any]) -> list[str]:
    """One latent action model."""
    codes, fitted = scores["action_codes"], scores["action_map"]
    return [
        *facts(scores), cell(scores["next_frame_psnr_db"]), cell(scores["above_copy_last_db"]),
        f"{codes['used']} of {codes['of']}", cell(fitted["accuracy"], 3), cell(fitted["above_guess"], 3),
    ]  # fmt: skip


def world_row(scores: dict[str, Any]) -> list[str]:
    """One world."""
    fitted = scores["action_map"]
    return [
        *facts(scores),
        "one a token" if scores.get("kind") == "causal" else str(scores["config"]["rollout"]["decode_steps"]),
        *(cell(scores["horizons"][h]["rollout_psnr_db"]) if h in scores["horizons"] else "–" for h in HORIZONS),
        cell(scores["horizons"]["4"]["above_copy_last_db"]) if "4" in scores["horizons"] else "–",
        cell(scores["delta_psnr_db"]),
        cell(scores["tokenizer_psnr_db"]),
        cell(scores["teacher_forced_bits_per_frame"], 1),
        cell(fitted["accuracy"], 3) if fitted else "recorded",
        f"{scores['speed']['p50_ms']:.1f}",
        f"{scores['artifact_bytes'] / 1e6:.2f}",
    ]  # fmt: skip


def jepa_row(scores: dict[str, Any]) -> list[str]:
    """One JEPA world model."""
    near, surprise = scores["horizons"]["1"], scores["surprise"]
    return [
        *facts(scores), cell(near["predicted_error_share"], 3), cell(near["copy_last_error_share"], 3),
        f"{scores['probes']['action_r2']:.3f}", cell(surprise["teleport"]["more_surprising"], 3),
        cell(surprise["repeat"]["more_surprising"], 3), f"{scores['embedding_variance']:.3f}",
    ]  # fmt: skip


SECTIONS: tuple[tuple[str, str, tuple[str, ...], Callable[[dict[str, Any]], list[str]]], ...] = (
    ("dynamics", "Worlds",
     (*FACT_HEAD, "passes a frame", *(f"PSNR at {h}, dB" for h in HORIZONS), "above copy-last at 4, dB",
      "delta PSNR, dB", "tokenizer PSNR, dB", "bits a frame", "latent → recorded action", "ms a frame (p50)",
      "artifact, MB"), world_row),
    ("tokenizer", "Tokenizers", (*FACT_HEAD, "PSNR, dB", "SSIM", "codes used"), tokenizer_row),
    ("lam", "Latent actions",
     (*FACT_HEAD, "next-frame PSNR, dB", "above copy-last, dB", "codes used", "action accuracy", "above guessing"),
     lam_row),
    ("jepa", "JEPA",
     (*FACT_HEAD, "error share at 1", "of repeating", "action R²", "teleport surprises", "repeat surprises",
      "embedding variance"), jepa_row),
)  # fmt: skip


def write_leaderboard(runs: Sequence[str | Path], out: Path) -> Path:
    """Collect evaluations and write one Markdown file.

    Args:
        runs: folders of `baselines`.
        out: file.

    Returns:
        The file.

    Raises:
        ConfigError: no evaluation in any of the folders.
    """
    paths = [path for run in runs for path in sorted(Path(run).glob("*/evaluation.json"))]
    documents = [read_json(path, what="an evaluation") for path in paths]
    documents = [document for document in documents if "baseline" in document]
    if not documents:
        raise ConfigError(f"no evaluation.json of a baseline one level below {', '.join(map(str, runs))}")
    lines = [
        "# Leaderboard",
        "",
        "Written by `python -m worldmodel leaderboard` from the run folders of `make worldmodel-baselines`. Intervals "
        "are 95% bootstrap over clips; worlds are scored from the artifact read back from disk, the rest from float "
        "weights.",
    ]
    for group in sorted({(d["baseline"]["profile"], d["baseline"]["step_share"]) for d in documents}):
        mine = [d for d in documents if (d["baseline"]["profile"], d["baseline"]["step_share"]) == group]
        covers = mine[0]["data"]
        whole = group[1] == 1.0
        lines += ["", f"## Profile {group[0]}, {'all' if whole else f'{group[1]:.0%}'} of its steps", ""]
        if not whole:
            lines += [
                f"**Not the full preset: every model was trained for {group[1]:.0%} of its steps only**, its schedule "
                "shortened alike.",
                "",
            ]
        lines.append(
            f"{covers['clips']} clips of {covers['frames_per_clip']} frames, split {covers['split']}, data "
            f"{covers['sha256'][:12]}; {mine[0]['baseline']['hardware']}."
        )
        for stage, title, head, row in SECTIONS:
            rows = [row(d) for d in mine if d["stage"] == stage]
            if rows:
                short = "" if whole else f" at {group[1]:.0%} of the preset's steps"
                lines += ["", f"### {title}{short}", "", *table(head, rows)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out, "\n".join([*lines, ""]))
    return out
