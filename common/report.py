"""Parts of a self-contained HTML report: line charts, a treemap of bytes, tables, pictures. Standard library only.

A page asks for nothing outside itself: drawings are inline SVG, pictures are data, there is no script. Every text is
escaped here, so callers pass plain text.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import DataError

CHART_WIDTH, CHART_HEIGHT, CHART_LEFT, CHART_BOTTOM = 450, 230, 66, 34
TREEMAP_WIDTH, TREEMAP_HEIGHT = 940, 300
# Distinguishable with the common colour deficiencies and on white; runs beyond eight begin again.
REPORT_COLOURS = ("#0969da", "#d9772b", "#1a7f37", "#a0349d", "#cf222e", "#7a5ea8", "#6b5900", "#00707a")
REPORT_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;color:#1b1f24;background:#fff}
table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #d0d7de;padding:.25rem .6rem;text-align:right}
th:first-child,td:first-child{text-align:left}.met{color:#1a7f37}.missed{color:#cf222e}
figure{display:inline-block;margin:.5rem 1rem .5rem 0;vertical-align:top}figcaption{font-size:13px;color:#57606a}
img,svg{max-width:100%}.chart{width:450px;max-width:100%}pre{background:#f6f8fa;padding:.6rem;overflow:auto;max-height:30rem;white-space:pre-wrap}
.key{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 .8em}
"""


@dataclass(frozen=True)
class Curve:
    """One line of a chart: (x, y) points in order of x."""

    label: str
    points: tuple[tuple[float, float], ...]
    colour: str = REPORT_COLOURS[0]


def read_log_events(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a log.jsonl. A last line without its end is one that is still being written, and left out.

    Raises:
        DataError: the file is missing, or a whole line is not a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; give the folder of a run") from error
    events = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); the log is damaged") from error
        if not isinstance(event, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, got {type(event).__name__}")
        events.append(event)
    return events


def log_points(events: Iterable[dict[str, Any]], name: str, over: str = "step") -> tuple[tuple[float, float], ...]:
    """Points (over, name) of the events that have both as finite numbers."""
    points = []
    for event in events:
        x, y = event.get(over), event.get(name)
        if isinstance(x, int | float) and isinstance(y, int | float) and math.isfinite(x) and math.isfinite(y):
            points.append((float(x), float(y)))
    return tuple(points)


def chart_svg(title: str, curves: Sequence[Curve], x_label: str) -> str:
    """Curves over one another with both axes' ends, a key, and the last value of each; "" when none has two points."""
    drawn = [curve for curve in curves if len(curve.points) >= 2]
    if not drawn:
        return ""
    xs = [x for curve in drawn for x, _ in curve.points]
    ys = [y for curve in drawn for _, y in curve.points]
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    right, bottom = CHART_WIDTH - 8, CHART_HEIGHT - CHART_BOTTOM

    def place(x: float, y: float) -> str:
        px = CHART_LEFT + (x - x_low) / ((x_high - x_low) or 1.0) * (right - CHART_LEFT)
        py = 10 + (y_high - y) / ((y_high - y_low) or 1.0) * (bottom - 10)
        return f"{px:.1f},{py:.1f}"

    lines = "".join(
        f'<polyline points="{" ".join(place(x, y) for x, y in curve.points)}" fill="none" stroke="{curve.colour}" '
        'stroke-width="1.6"/>'
        for curve in drawn
    )
    key = "".join(
        f'<span class="key" style="background:{curve.colour}"></span>{html.escape(curve.label)} '
        f"{curve.points[-1][1]:.4g}"
        for curve in drawn
    )
    return (
        f'<figure class="chart"><svg width="{CHART_WIDTH}" height="{CHART_HEIGHT}" '
        f'viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" '
        f'role="img" aria-label="{html.escape(title)}">'
        f'<path d="M{CHART_LEFT},10 V{bottom} H{right}" fill="none" stroke="#8c959f"/>{lines}'
        f'<g font-size="11" fill="#57606a"><text x="{CHART_LEFT - 4}" y="18" text-anchor="end">{y_high:.4g}</text>'
        f'<text x="{CHART_LEFT - 4}" y="{bottom}" text-anchor="end">{y_low:.4g}</text>'
        f'<text x="{CHART_LEFT}" y="{bottom + 15}">{x_low:.4g}</text>'
        f'<text x="{right}" y="{bottom + 15}" text-anchor="end">{x_high:.4g} {html.escape(x_label)}</text></g></svg>'
        f"<figcaption><b>{html.escape(title)}</b>, last values:{key}</figcaption></figure>"
    )


def _worst_side_ratio(areas: Sequence[float], side: float) -> float:
    depth = sum(areas) / side
    return max(max(area / depth / depth, depth * depth / area) for area in areas)


def squarify(
    sizes: Sequence[float], x: float, y: float, width: float, height: float
) -> list[tuple[float, float, float, float]]:
    """Rectangles whose areas are in proportion to sizes, as near to squares as rows and columns allow.

    Source: Bruls, Huizing, van Wijk, "Squarified treemaps" (2000), section 3.

    Args:
        sizes: positive, largest first.
        x: left edge of the whole.
        y: upper edge.
        width: of the whole.
        height: of the whole.

    Returns:
        (x, y, width, height) of each, in the order of sizes; together they cover the whole.
    """
    boxes: list[tuple[float, float, float, float]] = []
    total = sum(sizes)
    areas = [size * width * height / total for size in sizes] if total > 0 else []
    start = 0
    while start < len(areas):
        side = min(width, height)
        stop = start + 1
        while stop < len(areas) and (
            _worst_side_ratio(areas[start : stop + 1], side) <= _worst_side_ratio(areas[start:stop], side)
        ):
            stop += 1
        depth = sum(areas[start:stop]) / side
        along = 0.0
        for area in areas[start:stop]:
            length = area / depth
            if width >= height:  # a column at the left
                boxes.append((x, y + along, depth, length))
            else:  # a row on top
                boxes.append((x + along, y, length, depth))
            along += length
        if width >= height:
            x, width = x + depth, width - depth
        else:
            y, height = y + depth, height - depth
        start = stop
    return boxes


def treemap_svg(parts: Sequence[tuple[str, int]], title: str) -> str:
    """Named byte counts as areas; the name and count of each stand in it where they fit, and in its tooltip."""
    ordered = sorted(((name, size) for name, size in parts if size > 0), key=lambda part: -part[1])
    total = sum(size for _, size in ordered)
    if not total:
        return ""
    boxes = squarify([float(size) for _, size in ordered], 0.0, 0.0, float(TREEMAP_WIDTH), float(TREEMAP_HEIGHT))
    cells = []
    for place, ((name, size), (x, y, width, height)) in enumerate(zip(ordered, boxes, strict=True)):
        label = f"{name}: {size:,} bytes, {100 * size / total:.1f}%"
        room = int((width - 6) / 6.2)
        text = ""
        if height > 16 and room > 4:
            shown = name if len(name) <= room else "…" + name[1 - room :]  # ends of names tell tensors apart
            text = f'<text x="{x + 3:.1f}" y="{y + 13:.1f}">{html.escape(shown)}</text>'
            if height > 30:
                text += f'<text x="{x + 3:.1f}" y="{y + 26:.1f}">{size:,}</text>'
        cells.append(
            f"<g><title>{html.escape(label)}</title>"
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{REPORT_COLOURS[place % len(REPORT_COLOURS)]}" stroke="#fff"/>{text}</g>'
        )
    return (
        f'<figure><svg width="{TREEMAP_WIDTH}" height="{TREEMAP_HEIGHT}" '
        f'viewBox="0 0 {TREEMAP_WIDTH} {TREEMAP_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f'<g font-size="11" fill="#fff">{"".join(cells)}</g></svg>'
        f"<figcaption><b>{html.escape(title)}</b>, {total:,} bytes in all; the pointer shows each part</figcaption>"
        "</figure>"
    )


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of plain text cells."""
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def folded(title: str, text: str) -> str:
    """A text that opens on a click."""
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"


def embedded_picture(path: Path) -> str:
    """A PNG or GIF as part of the page.

    Raises:
        DataError: another kind of file.
    """
    kinds = {".png": "image/png", ".gif": "image/gif"}
    if path.suffix not in kinds:
        raise DataError(f"{path}: expected a picture ending in {' or '.join(kinds)}")
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<figure><img alt="{html.escape(path.stem)}" src="data:{kinds[path.suffix]};base64,{data}"></figure>'


def html_page(title: str, parts: Iterable[str]) -> str:
    """The whole document."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{REPORT_STYLE}</style><h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + "</html>\n"
    )
