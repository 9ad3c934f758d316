"""The rules between rooms as data, and their picture: `python scripts/architecture.py` writes docs/architecture.svg.

`tests/test_imports.py` checks every file against these tables, and that the picture is what they say.
"""

from __future__ import annotations

import argparse
import ast
import functools
import html
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"

ROOMS = ("common", "worldmodel", "submissions", "referee", "scripts", "tests")
PACKAGES = ("common", "worldmodel", "submissions", "referee")
# A room may import itself and the rooms named here.
MAY_IMPORT = {
    "common": {"common"},
    "worldmodel": {"worldmodel", "common"},
    "submissions": {"submissions", "common"},
    "referee": {"referee", "common"},
    "scripts": {"common", "worldmodel", "submissions", "referee", "scripts"},
    "tests": {"common", "worldmodel", "submissions", "referee", "scripts", "tests"},  # helpers of tests lie beside them
}
FRAMEWORK_OF = {
    "torch": "torch", "triton": "torch", "mamba_ssm": "torch", "causal_conv1d": "torch",
    "jax": "jax", "jaxlib": "jax", "flax": "jax", "optax": "jax", "orbax": "jax", "grain": "jax", "jax_triton": "jax",
}  # fmt: skip
FRAMEWORK_OF_ROOM = {"worldmodel": "jax", "submissions": "torch"}
# Third-party modules beyond NumPy that the NumPy-only files of `common` may use.
CODECS = {"brotli", "zstandard"}
NUMPY_ONLY_EXTRAS = {
    "common/artifact/": CODECS,
    "common/artifact/__main__.py": {"rich"},  # a command, imported by nothing: its tables on a terminal
    "common/text/tokenizer.py": {"sentencepiece"},
    "common/text/sources.py": CODECS | {"pyarrow", "huggingface_hub"},
    "common/text/": set(),
    "common/quant/grid.py": set(),
    "common/quant/bitpack.py": set(),
    "common/quant/gptq.py": set(),
    "common/quant/trellis.py": set(),
    "common/quant/plan.py": set(),
    "common/console.py": {"rich"},
    "common/errors.py": set(),
    "common/files.py": set(),
    "common/report.py": set(),
    "referee/": CODECS | {"sentencepiece"},
}
# All that the referee shares with what it judges: names of errors.
REFEREE_SHARES = {"common.errors"}
LAZY_ONLY = {"pyarrow", "huggingface_hub", "rich"}

ABOUT = {
    "tests": "a mirror of the rooms; golden vectors",
    "scripts": "commands: demo, report, bundle, bench, verify",
    "submissions": "entries of the challenge",
    "worldmodel": "frames to tokens to dreams; training, play",
    "referee": "is a submission what it claims to be?",
    "common": "what both learners stand on",
}
WRITTEN_IN = {"numpy": "NumPy", "triton": "Triton", "jax": "JAX"}
WIDTH, MARGIN, GAP, HEAD = 960, 16, 24, 44
LINE, CELL_WIDTH = 17, 228
INK, SOFT, PAPER = "#1b1f24", "#57606a", "#ffffff"
FILLS = {"torch": "#fff1e5", "jax": "#e6f1ff", "numpy": "#f3f4f6", "any": "#ffffff"}


def levels(may_import: Mapping[str, set[str]]) -> dict[str, int]:
    """Height of each room: one above the highest room that it may import."""
    found: dict[str, int] = {}

    def height(room: str) -> int:
        if room not in found:
            found[room] = 1 + max([-1, *(height(other) for other in may_import[room] - {room})])
        return found[room]

    for room in may_import:
        height(room)
    return found


def arrows(may_import: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """The fewest arrows from which, followed from room to room, the whole table can be read again."""
    through = {
        room: {far for near in others - {room} for far in may_import[near] - {near}}
        for room, others in may_import.items()
    }
    return [
        (room, other) for room, others in may_import.items() for other in sorted(others - {room} - through[room])
    ]


def _imported_roots(path: Path) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            roots.add("triton" if node.module == "common.triton_support" else node.module.split(".")[0])
    return roots


def _place(name: str) -> tuple[int, str]:
    order = ("numpy", "torch", "triton", "jax")
    return (order.index(name) if name in order else len(order), name)


@functools.cache
def parts_of_common(root: Path) -> tuple[tuple[str, str], ...]:
    """(part, what it is written in) for each folder and file of `common`, as its imports say."""
    parts = []
    for path in sorted((root / "common").iterdir()):
        if path.is_dir() and (path / "__init__.py").is_file():
            files = sorted(path.glob("*.py"))
        elif path.suffix == ".py" and path.stem != "__init__":
            files = [path]
        else:
            continue
        found: set[str] = set()
        for roots in map(_imported_roots, files):
            frameworks = roots & set(FRAMEWORK_OF)
            found |= frameworks or roots & {"numpy"}
        forms = [WRITTEN_IN.get(name, name) for name in sorted(found, key=_place)]
        parts.append((path.name, ", ".join(forms) or "standard library"))
    return tuple(parts)


def _text(x: float, y: float, text: str, size: int = 12, colour: str = INK, extra: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}"{extra}>{html.escape(text)}</text>'


def _framework(room: str) -> str:
    if room in FRAMEWORK_OF_ROOM:
        return FRAMEWORK_OF_ROOM[room]
    return "numpy" if f"{room}/" in NUMPY_ONLY_EXTRAS else "any"


def architecture_svg(root: Path = ROOT, may_import: Mapping[str, set[str]] = MAY_IMPORT) -> str:
    """The picture: rooms in layers, an arrow to what a room may import, and what is in `common`."""
    height_of = levels(may_import)
    top = max(height_of.values())
    parts = parts_of_common(root)
    columns = (WIDTH - 2 * MARGIN - 12) // CELL_WIDTH
    rows_of_parts = -(-len(parts) // columns)
    boxes: dict[str, tuple[float, float, float, float]] = {}
    y = float(MARGIN)
    for level in range(top, -1, -1):
        rooms = [room for room in may_import if height_of[room] == level]
        tall = HEAD + 22 + (rows_of_parts * 2 * LINE + 10 if "common" in rooms else 0)
        wide = (WIDTH - 2 * MARGIN - GAP * (len(rooms) - 1)) / len(rooms)
        for place, room in enumerate(rooms):
            boxes[room] = (MARGIN + place * (wide + GAP), y, wide, tall)
        y += tall + (46 if level else MARGIN)
    drawn = []
    for room, (x, top_y, wide, tall) in boxes.items():
        kind = _framework(room)
        drawn.append(
            f'<rect x="{x:g}" y="{top_y:g}" width="{wide:g}" height="{tall:g}" rx="8" fill="{FILLS[kind]}" '
            f'stroke="#8c959f"/>'
        )
        uses = {"torch": "torch, Triton, NumPy", "jax": "JAX, NumPy", "numpy": "NumPy, codecs"}.get(kind, "")
        uses = "one framework a file" if room == "common" else uses
        drawn.append(_text(x + 12, top_y + 24, f"{room}/", 16, extra=' font-weight="bold"'))
        if uses:
            drawn.append(_text(x + wide - 12, top_y + 24, uses, 12, SOFT, ' text-anchor="end"'))
        drawn.append(_text(x + 12, top_y + 44, ABOUT[room], 12, SOFT))
    x, top_y, _, _ = boxes["common"]
    for index, (name, forms) in enumerate(parts):
        cell_x = x + 12 + (index // rows_of_parts) * CELL_WIDTH
        cell_y = top_y + HEAD + 30 + (index % rows_of_parts) * 2 * LINE
        drawn += [_text(cell_x, cell_y, name, 13), _text(cell_x, cell_y + 14, forms, 11, SOFT)]
    for room, other in arrows(may_import):
        (x, y0, wide, tall), (to_x, y1, to_wide, _) = boxes[room], boxes[other]
        at_x = x + wide / 2 if wide <= to_wide else to_x + to_wide / 2
        drawn.append(
            f'<path d="M{at_x:g},{y0 + tall:g} V{y1 - 2:g}" stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>'
        )
        if room == "referee":
            shared = ", ".join(sorted(REFEREE_SHARES))
            drawn.append(_text(at_x + 8, (y0 + tall + y1) / 2 + 4, f"{shared} only", 11, SOFT))
    label = "Rooms of the repository; an arrow points to what a room may import"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y:g}" viewBox="0 0 {WIDTH} {y:g}" '
        f'role="img" aria-label="{label}" font-family="system-ui, sans-serif">\n'
        f'<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>\n'
        f'<rect width="{WIDTH}" height="{y:g}" fill="{PAPER}"/>\n' + "\n".join(drawn) + "\n</svg>\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the picture of the rooms and of what they may import.")
    parser.add_argument("--out", type=Path, default=PICTURE, help="SVG to write (default: docs/architecture.svg)")
    arguments = parser.parse_args(argv)
    write_atomically(arguments.out, architecture_svg().encode())
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
