"""Run folders: config.json, log.jsonl, train.log, checkpoints/, model.artifact, summary.json.

`train.log` opens with the source of every module of ours that is loaded, package versions and hardware, so that a log
proves what made it.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from common.console import TrainingConsole, progress_text
from common.errors import CheckpointError, ConfigError
from common.files import remove_temporaries, storing, write_atomically
from worldmodel.config import read_json, resume_differences

OUR_PACKAGES = ("common", "worldmodel")
NAMED_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "numpy")


def write_text_atomic(path: Path, text: str) -> None:
    """As `common.files.write_atomically`, in UTF-8."""
    write_atomically(path, text.encode("utf-8"))


def write_json_atomic(path: Path, value: Any) -> None:
    """Write JSON, indented, atomically."""
    write_text_atomic(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def _is_temporary(path: Path) -> bool:
    """Whether this is what a writer that was killed left."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


class RunFolder:
    """One run's folder, opened for training: fresh, or to be resumed under the same configuration."""

    def __init__(self, path: str | Path, config: dict[str, Any], *, overwrite: bool = False) -> None:
        """Create or reopen.

        Args:
            path: folder.
            config: JSON form of the stage's config.
            overwrite: delete what an earlier run left.

        Raises:
            CheckpointError: the folder holds a run of another configuration.
            ConfigError: the folder exists and is not a run.
        """
        self.path = Path(path)
        config_path = self.path / "config.json"
        if overwrite and config_path.exists():
            shutil.rmtree(self.path)
        if config_path.exists():
            saved = read_json(config_path, what="the config of a run")
            differences = resume_differences(saved, config)
            if differences:
                raise CheckpointError(
                    f"{self.path} holds a run of another configuration ({'; '.join(differences[:4])}); "
                    "use another --run-dir, or --overwrite to discard it"
                )
        elif self.path.exists() and any(not _is_temporary(path) for path in self.path.iterdir()):
            raise ConfigError(f"{self.path} is not empty and is not a run folder; choose another --run-dir")
        with storing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            remove_temporaries(self.path)
        write_json_atomic(config_path, config)

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, or None."""
        path = self.path / "summary.json"
        return read_json(path, what="the summary of a run") if path.exists() else None

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json, the mark of a finished run."""
        write_json_atomic(self.path / "summary.json", summary)


class RunLog:
    """log.jsonl and train.log, with TensorBoard and (only when asked) wandb beside them."""

    def __init__(
        self, run: RunFolder, console: TrainingConsole, *, step: int, steps: int, tensorboard: bool, wandb: bool,
        hardware: str,
    ) -> None:  # fmt: skip
        """Open the logs of a run at a step; entries after it (of a killed attempt) are dropped.

        Args:
            run: the folder.
            console: what is shown of it meanwhile.
            step: step that training continues from.
            steps: step that it ends with.
            tensorboard: write event files.
            wandb: also log to Weights & Biases (needs the package and its own login).
            hardware: one line.
        """
        self._console, self._steps = console, steps
        self._jsonl_path = run.path / "log.jsonl"
        kept = [line for line in self._read_lines() if self._step_of(line) <= step] if step else []
        write_text_atomic(self._jsonl_path, "".join(line + "\n" for line in kept))
        with storing(self._jsonl_path):
            self._jsonl = open(self._jsonl_path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
            self._text = open(run.path / "train.log", "a" if step else "w", encoding="utf-8")  # noqa: SIM115
            if not step:
                self._text.write(provenance(hardware))
        self._tensorboard = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(run.path / "tensorboard"), purge_step=step or None)
        self._wandb = None
        if wandb:
            try:
                import wandb as wandb_module  # pyright: ignore[reportMissingImports]
            except ImportError as error:
                raise ConfigError(
                    "wandb is on but the package is not installed; install it or turn wandb off"
                ) from error
            self._wandb = wandb_module.init(dir=str(run.path), name=run.path.name)

    def _read_lines(self) -> list[str]:
        if not self._jsonl_path.exists():
            return []
        text = self._jsonl_path.read_text(encoding="utf-8", errors="replace")
        return text[: text.rfind("\n") + 1].splitlines()  # a line cut short by a kill is no entry

    def _step_of(self, line: str) -> int:
        try:
            return int(json.loads(line).get("step", 0))
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{self._jsonl_path}: the line {line[:80]!r} is damaged ({type(error).__name__}: {error}); expected a "
                "JSON object: delete that line to go on"
            ) from error

    def text(self, line: str) -> None:
        """A line on the console and in train.log."""
        self._console.say(line)
        self._note(line)

    def _note(self, line: str) -> None:
        with storing(self._jsonl_path.with_name("train.log")):
            self._text.write(line + "\n")
            self._text.flush()

    def write(self, step: int, **values: float | int | str) -> None:
        """One entry, with `eta_s` and `memory_bytes`, to files and console; `val_` numbers on a second line.

        What is not finite is null in the entry.
        """
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        entry = {"step": step, **finite}
        with storing(self._jsonl_path):
            self._jsonl.write(json.dumps(entry) + "\n")
            self._jsonl.flush()
        self._console.entry(entry)
        self._console.progress(entry, step / self._steps)
        text = progress_text(entry)
        if found := " ".join(f"{name} {value:.5g}" for name, value in values.items() if name.startswith("val_")):
            self._console.say(f"step {step:,} {found}")
            text += " " + found
        self._note(text)
        numbers = {k: v for k, v in values.items() if not isinstance(v, str)}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Flush and close everything."""
        with storing(self._jsonl_path):
            self._jsonl.close()
            self._text.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class SilentLog:
    """The `RunLog` of a process that does not write: another one speaks for the run."""

    def text(self, line: str) -> None:
        """Nothing."""

    def write(self, step: int, **values: float | int | str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def provenance(hardware: str) -> str:
    """The head of train.log: time, versions, hardware and the source of our loaded modules."""
    lines = [
        f"# started {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}",
        f"# python {platform.python_version()} on {platform.platform()}",
        f"# hardware {hardware}",
        "# packages " + " ".join(f"{name}=={metadata.version(name)}" for name in NAMED_PACKAGES),
    ]
    for name in sorted(sys.modules):
        module = sys.modules[name]
        origin = getattr(getattr(module, "__spec__", None), "origin", None)
        if name.split(".")[0] in OUR_PACKAGES and origin and Path(origin).is_file():
            source = Path(origin).read_text(encoding="utf-8")
            if source.strip():
                lines += [f"# ==== source of {name}", source.rstrip()]
    return "\n".join([*lines, "# ==== log", ""])
