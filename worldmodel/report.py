"""The result of a run as one self-contained HTML page: bars, metrics, curves, moving rollouts."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from worldmodel.runs import write_text_atomic

WIDTH, HEIGHT, MARGIN = 420, 200, 44
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #d0d7de;padding:.25rem .6rem;text-align:right}
th:first-child,td:first-child{text-align:left}.met{color:#1a7f37}.missed{color:#cf222e}
figure{display:inline-block;margin:.5rem 1rem .5rem 0}figcaption{font-size:13px;color:#57606a}img{max-width:100%}
"""


def read_curve(path: Path, name: str) -> list[tuple[float, float]]:
    """(step, value) pairs of one name in a log.jsonl; steps without it are left out."""
    points = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if name in entry:
            points.append((float(entry["step"]), float(entry[name])))
    return points


def curve_svg(points: list[tuple[float, float]], title: str) -> str:
    """One curve as inline SVG, with its first and last values and both axes' ends."""
    if len(points) < 2:
        return ""
    xs, ys = zip(*points, strict=True)
    low, high = min(ys), max(ys)
    span_x, span_y = max(xs[-1] - xs[0], 1e-9), max(high - low, 1e-9)

    def place(x: float, y: float) -> str:
        px = MARGIN + (x - xs[0]) / span_x * (WIDTH - MARGIN - 10)
        py = 10 + (high - y) / span_y * (HEIGHT - 40)
        return f"{px:.1f},{py:.1f}"

    line = " ".join(place(x, y) for x, y in points)
    bottom = HEIGHT - 30
    return (
        f'<figure><svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f'<path d="M{MARGIN},10 V{bottom} H{WIDTH - 10}" fill="none" stroke="#8c959f"/>'
        f'<polyline points="{line}" fill="none" stroke="#0969da" stroke-width="1.5"/>'
        f'<g font-size="11" fill="#57606a"><text x="2" y="16">{high:.3g}</text>'
        f'<text x="2" y="{bottom}">{low:.3g}</text>'
        f'<text x="{MARGIN}" y="{HEIGHT - 14}">{xs[0]:.0f}</text>'
        f'<text x="{WIDTH - 10}" y="{HEIGHT - 14}" text-anchor="end">{xs[-1]:.0f} steps</text></g></svg>'
        f"<figcaption>{html.escape(title)}, last {ys[-1]:.4g}</figcaption></figure>"
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """An HTML table of plain text cells."""
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def interval(entry: dict[str, float]) -> str:
    """value [low, high] to two decimals."""
    return f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"


def _image(path: Path, kind: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<figure><img alt="{html.escape(path.stem)}" src="data:image/{kind};base64,{data}"></figure>'


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
        + table(head, rows)
        + table(["", "value"], facts)
    )


def write_report(root: Path, evaluation: dict[str, Any], stages: list[str]) -> Path:
    """Write report.html into a run folder.

    Args:
        root: run folder with stage folders and rollouts/.
        evaluation: the evaluation document.
        stages: stage folders in order.

    Returns:
        The page.
    """
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8>"
        f"<title>World model {html.escape(evaluation['profile'])}</title>",
        f"<style>{STYLE}</style><h1>CoinRun world model, profile {html.escape(evaluation['profile'])}</h1>",
        f"<p>{html.escape(evaluation['hardware'])}; {evaluation['seconds_total'] / 60:.1f} minutes in all.</p>",
    ]
    rows = [
        [html.escape(name), f"{bar['value']:.2f}", f"{bar['bar']:g}",
         f"<span class={'met' if bar['met'] else 'missed'}>{'met' if bar['met'] else 'missed'}</span>"]
        for name, bar in evaluation["bars"].items()
    ]  # fmt: skip
    parts += ["<h2>Bars</h2>", table(["", "value", "bar", ""], rows)]
    parts += [_world_section(name, evaluation[name]) for name in ("dynamics", "dynamics_latent")]
    parts.append("<h2>Rollouts</h2><p>Rows: truth, reconstruction, rollout with true actions, rollout with inferred "
                 "latent actions, and one row for each latent action held down after the prompt.</p>")  # fmt: skip
    parts += [_image(path, "gif") for path in sorted((root / "rollouts").glob("clip_*.gif"))]
    parts += [_image(path, "png") for path in sorted((root / "rollouts").glob("clip_0.png"))]
    parts.append("<h2>Curves</h2>")
    for stage in stages:
        log = root / stage / "log.jsonl"
        for name in ("loss", "val_psnr_db", "val_full_mask_ce_nats", "frames_per_s"):
            parts.append(curve_svg(read_curve(log, name), f"{stage}: {name}"))
    seconds = [[html.escape(name), f"{value:.1f}"] for name, value in evaluation["seconds"].items()]
    parts += ["<h2>Time</h2>", table(["stage", "s"], seconds)]
    path = root / "report.html"
    write_text_atomic(path, "\n".join(parts) + "</html>\n")
    return path
