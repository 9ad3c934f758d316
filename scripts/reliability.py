"""docs/RELIABILITY.md: the tables between its markers, written from docs/reliability.json by the commands that measure.

`scripts/faults.py`, `scripts/hostile.py` and `scripts/bench load` each record their section here; prose stands between
the markers and is nobody's but the writer's.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files import write_atomically
from scripts.readme_tables import replace_between

ROOT = Path(__file__).resolve().parents[1]
STORE = ROOT / "docs" / "reliability.json"
PAGE = ROOT / "docs" / "RELIABILITY.md"


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "| " + " | ".join("---" for _ in headings) + " |"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def provenance(command: str) -> list[dict[str, Any]]:
    """When, where and by what a section was measured: one entry a command."""
    date = time.strftime("%Y-%m-%d", time.gmtime())
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        cores = sum(line.startswith("processor") for line in file)
    return [{"command": command, "date": date, "machine": f"{cores} CPU cores, {platform.machine()}"}]


def merged(section: str, document: dict[str, Any], rows: str, keys: Sequence[str], order: Sequence[str]) -> None:
    """Add to a section's rows those of earlier commands that this one did not measure anew, and those commands.

    A command is named as long as a row of it is left.

    Args:
        section: key in the store.
        document: what was measured; its rows and provenance are completed in place.
        rows: key of the rows in it.
        keys: fields that tell one row from another; the first sorts.
        order: its values.
    """
    sections = json.loads(STORE.read_text(encoding="utf-8")) if STORE.exists() else {}
    before = sections.get(section, {})
    fresh = [[row[key] for key in keys] for row in document[rows]]
    for made in document["provenance"]:
        made["rows"] = fresh
    for made in reversed(before.get("provenance", [])):
        left = [row for row in made["rows"] if row not in fresh]
        if left:
            document["provenance"].insert(0, made | {"rows": left})
    kept = [row for row in before.get(rows, []) if [row[key] for key in keys] not in fresh]
    document[rows] = sorted([*kept, *document[rows]], key=lambda row: order.index(row[keys[0]]))


def record(section: str, document: dict[str, Any], body: str, *, store: Path = STORE, page: Path = PAGE) -> None:
    """Replace one section of the store and of the page.

    Args:
        section: marker on the page and key in the store.
        document: what was measured; it has `provenance`.
        body: Markdown of its tables.
        store: the JSON file.
        page: the Markdown file; it holds the section's two markers.
    """
    lock = os.open(store.parent, os.O_RDONLY)  # campaigns may run side by side, each with a section of its own
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sections = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
        sections[section] = document
        head = "\n".join(f"`{made['command']}`, {made['date']}, {made['machine']}  " for made in document["provenance"])
        text = replace_between(page.read_text(encoding="utf-8"), section, f"{head}\n\n{body}\n")
        write_atomically(store, (json.dumps(sections, indent=1) + "\n").encode())
        write_atomically(page, text.encode())
    finally:
        os.close(lock)
