"""What a training run shows, the same for both learners: a bar on a terminal, lines elsewhere, JSON for machines."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import resource
import sys
from collections.abc import Iterator, Mapping
from typing import Any

# Numbers of a log entry in the order in which they are shown: name there, form here.
SHOWN_NUMBERS = (
    ("step", "step {:,}"),
    ("loss", "loss {:.4f}"),
    ("train_bpb", "bpb {:.4f}"),
    ("bits_per_frame", "{:.2f} bits/frame"),
    ("psnr_db", "PSNR {:.2f} dB"),
    ("tokens_per_s", "{:,.0f} tokens/s"),
    ("frames_per_s", "{:,.0f} frames/s"),
)


def peak_memory_bytes() -> int:
    """The most memory that this process has held at once, on the host."""
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def progress_text(values: Mapping[str, Any]) -> str:
    """One line of a log entry: what SHOWN_NUMBERS names of it, `eta_s` and `memory_bytes`; null is not finite."""
    shown = [(form, values[name]) for name, form in SHOWN_NUMBERS if name in values]
    parts = [form.format(math.nan if value is None else value) for form, value in shown]
    eta_s = int(values["eta_s"])
    hours, minutes = divmod(eta_s // 60, 60)
    parts.append(f"ETA {hours}:{minutes:02d}:{eta_s % 60:02d}" if hours else f"ETA {minutes}:{eta_s % 60:02d}")
    return " ".join([*parts, f"memory {values['memory_bytes'] / 1e6:,.0f} MB"])


class TrainingConsole:
    """Standard output of a training run.

    On a terminal where rich is installed, `progress` moves a bar; elsewhere it prints one line. As JSON, only the
    entries of log.jsonl are printed.
    """

    def __init__(self, speaks: bool = True, as_json: bool = False) -> None:
        """Args:
            speaks: False for all ranks but one: nothing is shown.
            as_json: entries as JSON objects, one a line, in place of text.
        """
        self.speaks, self.as_json, self._bar, self._task = speaks, as_json, None, None

    def say(self, line: str) -> None:
        """A line of text for people."""
        if self.speaks and not self.as_json:
            print(line, flush=True)

    def entry(self, values: Mapping[str, Any]) -> None:
        """An entry of log.jsonl, for machines."""
        if self.speaks and self.as_json:
            print(json.dumps(values), flush=True)

    def waiting(self, text: str) -> None:
        """What the next step waits for."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=text, refresh=True)  # a compiler may hold the next refresh up
        else:
            self.say(text)

    def progress(self, values: Mapping[str, Any], fraction: float) -> None:
        """Where the run stands: an entry with `eta_s` and `memory_bytes`, and the share that is done, 0 to 1."""
        line = progress_text(values)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=fraction, description=line)
        else:
            self.say(line)

    @contextlib.contextmanager
    def live(self, title: str) -> Iterator[None]:
        """Around the steps: the bar, where there is one. Lines that are said meanwhile scroll above it."""
        if self.speaks and not self.as_json and sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as LiveProgress

            share = TextColumn("{task.percentage:3.0f}% {task.description}", markup=False)
            with LiveProgress(TextColumn(title), BarColumn(20), share, transient=True) as self._bar:
                self._task = self._bar.add_task("", total=1.0)
                try:
                    yield
                finally:
                    self._bar = self._task = None
        else:
            yield
