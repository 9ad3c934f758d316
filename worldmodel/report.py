"""What a run of `coinrun` adds to its report: bars, metrics with intervals, moving rollouts, curves of each stage.

Only `common` is imported: the report of a language model is made where no JAX is installed.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from common.artifact.container import read_artifact
from common.files import write_atomically
from common.report import (
    Curve,
    chart_svg,
    embedded_picture,
    folded,
    html_page,
    html_table,
    log_points,
    read_log_events,
    treemap_svg,
)

STAGES = ("tokenizer", "dynamics", "dynamics_latent")
CURVES = ("loss", "val_psnr_db", "val_full_mask_ce_nats", "frames_per_s")


def interval(entry: dict[str, float]) -> str:
    """value [low, high] to two decimals."""
    return f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"


def _world_section(name: str, scores: dict[str, Any]) -> str:
    stored, lost = scores["artifact"], scores["lost_by_export"]
    rows = [
        [h, interval(e["rollout_psnr_db"]), interval(e["copy_last_psnr_db"]), interval(e["above_copy_last_db"]),
         interval(e["tokenizer_oracle_psnr_db"]), interval(e["rollout_ssim"]), interval(e["copy_last_ssim"]),
         f"{lost['horizons'][h]['rollout_psnr_db']:.3f}"]
        for h, e in stored["horizons"].items()
    ]  # fmt: skip
    head = ["frames ahead", "rollout PSNR, dB", "copy last frame", "above copy", "tokenizer oracle", "rollout SSIM",
            "copy SSIM", "dB lost by export"]  # fmt: skip
    speed, delta = stored["speed"], stored["delta_psnr_db"]
    facts = [
        ["tokenizer PSNR, dB", interval(stored["tokenizer_psnr_db"])],
        [f"controllability: delta PSNR at {delta['horizon']}, dB", interval(delta)],
        ["teacher-forced bits a frame", interval(stored["teacher_forced_bits_per_frame"])],
        ["tokens in use", f"{stored['codebook']['used']} of {stored['codebook']['of']}"],
        ["actions in use", f"{stored['action_codes']['used']} of {stored['action_codes']['of']}"],
        [
            "frames/s at batch 1",
            f"{speed['frames_per_s']:.1f} (p50 {speed['p50_ms']:.1f} ms, p95 {speed['p95_ms']:.1f} ms)",
        ],
        ["MFU against a measured matmul", f"{100 * speed['mfu']:.1f}%"],
        ["artifact, bytes", f"{scores['artifact_bytes']:,}"],
    ]
    covers = stored["data"]
    note = (
        f"{covers['clips']} fixed clips of {covers['frames_per_clip']} frames, split {covers['split']}, weights: "
        f"{stored['weights']}; intervals are 95% bootstrap over clips."
    )
    return (
        f"<h2>{html.escape(name)} ({html.escape(stored['actions'])} actions)</h2><p>{html.escape(note)}</p>"
        + html_table(head, rows)
        + html_table(["", "value"], facts)
    )


def _bars_table(bars: dict[str, Any]) -> str:
    lines = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{bar['value']:.2f}</td><td>{bar['bar']:g}</td>"
        f"<td class={'met' if bar['met'] else 'missed'}>{'met' if bar['met'] else 'missed'}</td></tr>"
        for name, bar in bars.items()
    )
    return f"<table><tr><th></th><th>value</th><th>bar</th><th></th></tr>{lines}</table>"


def world_sections(root: Path, evaluation: dict[str, Any]) -> list[str]:
    """The parts of a page that only a world model has.

    Args:
        root: run folder of `coinrun`, with stage folders and rollouts/.
        evaluation: its evaluation document.

    Returns:
        HTML fragments.
    """
    parts = [
        f"<p>{html.escape(evaluation['hardware'])}; {evaluation['seconds_total'] / 60:.1f} minutes in all.</p>",
        "<h2>Bars</h2>",
        _bars_table(evaluation["bars"]),
    ]
    parts += [_world_section(name, evaluation[name]) for name in STAGES[1:] if name in evaluation]
    parts.append("<h2>Rollouts</h2><p>Rows: truth, reconstruction, rollout with true actions, rollout with inferred "
                 "latent actions, and one row for each latent action held down after the prompt.</p>")  # fmt: skip
    parts += [embedded_picture(path) for path in sorted((root / "rollouts").glob("clip_*.gif"))]
    parts += [embedded_picture(path) for path in sorted((root / "rollouts").glob("clip_0.png"))]
    seconds = [[name, f"{value:.1f}"] for name, value in evaluation["seconds"].items()]
    return [*parts, "<h2>Time</h2>", html_table(["stage", "s"], seconds)]


def stage_curves(root: Path) -> list[str]:
    """Charts of every stage of a `coinrun` folder."""
    parts = ["<h2>Curves</h2>"]
    for stage in STAGES:
        log = root / stage / "log.jsonl"
        events = read_log_events(log) if log.is_file() else []
        for name in CURVES:
            parts.append(chart_svg(f"{stage}: {name}", [Curve(name, log_points(events, name))], "steps"))
    return parts


def artifact_section(path: Path) -> str:
    """Where an artifact's bytes are."""
    _, _, sizes = read_artifact(path)
    parts = [(tensor.name, tensor.total_bytes) for tensor in sizes.tensors]
    return treemap_svg([*parts, ("header, checksum", sizes.overhead_bytes)], f"Bytes of {path.name}")


def write_report(root: Path, evaluation: dict[str, Any]) -> Path:
    """Write report.html into a run folder of `coinrun`.

    Args:
        root: run folder with stage folders and rollouts/.
        evaluation: the evaluation document.

    Returns:
        The page.
    """
    profile = evaluation["profile"]
    parts = [*world_sections(root, evaluation), *stage_curves(root)]
    parts += ["<h2>Bytes</h2>", artifact_section(root / "model.artifact")]
    head = (root / "train.log").read_text(encoding="utf-8").partition("# ==== source of")[0]
    command = f"python -m worldmodel coinrun --profile {profile}"
    parts += ["<h2>To make it again</h2>", f"<pre>{html.escape(command)}</pre>", folded("Versions, hardware", head)]
    config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    parts.append(folded("Configuration", json.dumps(config, indent=1)))
    path = root / "report.html"
    write_atomically(path, html_page(f"CoinRun world model, profile {profile}", parts).encode())
    return path
