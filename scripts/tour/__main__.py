"""Follow pages of docs/ literally, in a fresh clone: `python scripts/tour docs/TOUR.md [more pages]`.

Every fenced block of kind `sh` is run by bash as it stands, from the clone's root, in the order of the page; the first
that fails ends the page. Two comments may stand above a block, unseen by the reader:

    <!-- serves: http://127.0.0.1:8377/health -->   the block runs until this address answers, and is then ended
    <!-- short: --steps 800 -> --steps 8 -->        with --short this text is replaced, to save time; nothing else is

Without --venv the clone makes an environment of its own, as the reader's would.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.artifact.budget import format_text_table
from common.errors import ConfigError, DataError, GolfError

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"((?:^<!--[^\n]*-->\n)*)^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"^<!-- (\w+): (.+) -->$", re.MULTILINE)
NAME_CHARACTERS = 72
SERVING_PATIENCE_S, STOP_PATIENCE_S = 900.0, 30.0


@dataclass(frozen=True)
class Step:
    """One block of a page."""

    script: str
    serves: str = ""
    """Address that answers once the block is ready; "" for a block that ends by itself."""
    shorter: tuple[tuple[str, str], ...] = ()
    """Texts that a short run replaces, and by what."""

    def text(self, short: bool) -> str:
        """What bash is given."""
        script = self.script
        for old, new in self.shorter if short else ():
            script = script.replace(old, new)
        return script


def read_steps(page: Path) -> list[Step]:
    """The blocks of a page.

    Raises:
        DataError: there is none, or a comment above one is not understood or replaces nothing.
    """
    steps = []
    for comments, script in BLOCK.findall(page.read_text(encoding="utf-8")):
        serves, shorter = "", []
        for kind, value in COMMENT.findall(comments):
            if kind == "serves":
                serves = value
            elif kind == "short" and " -> " in value:
                old, _, new = value.partition(" -> ")
                if old not in script:
                    raise DataError(f"{page}: `short: {value}` replaces nothing in the block below it")
                shorter.append((old, new))
            else:
                raise DataError(f"{page}: comment `{kind}: {value}`; expected `serves: URL` or `short: OLD -> NEW`")
        steps.append(Step(script, serves, tuple(shorter)))
    if not steps:
        raise DataError(f"{page}: no block of commands (```sh) to follow")
    return steps


def clone(target: Path, venv: Path | None) -> dict[str, str]:
    """Clone the repository's HEAD, and return the environment for commands there. Raises ConfigError."""
    done = subprocess.run(["git", "clone", "--quiet", str(ROOT), str(target)], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"git clone failed: {done.stderr.strip()}")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if venv is not None:
        (target / ".venv").symlink_to(venv.resolve(), target_is_directory=True)
        environment["PYTHONPATH"] = str(target)  # an environment's own rooms are those of the checkout that made it
    return environment


def _serve_until(step: Step, script: str, cwd: Path, environment: Mapping[str, str]) -> int:
    """Start a server, wait until it answers, end it; 0, or its status where it ended by itself."""
    process = subprocess.Popen(["bash", "-euo", "pipefail", "-c", script], cwd=cwd, env=environment,
                               start_new_session=True)  # fmt: skip
    began_s = time.monotonic()
    try:
        while time.monotonic() - began_s < SERVING_PATIENCE_S:
            if process.poll() is not None:
                return process.returncode or 1  # a server that ends is no server
            try:
                urllib.request.urlopen(step.serves, timeout=5).close()
                return 0
            except OSError:
                time.sleep(0.2)
        raise DataError(f"{step.serves} did not answer within {SERVING_PATIENCE_S:.0f} s")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(STOP_PATIENCE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def follow(page: Path, cwd: Path, environment: Mapping[str, str], short: bool) -> list[tuple[str, float]]:
    """Run every block of a page; (block, seconds) of each.

    Raises:
        GolfError: a block failed.
    """
    seconds = []
    for number, step in enumerate(read_steps(page), start=1):
        script = step.text(short)
        print(f"\n$ {script.strip()}", flush=True)
        began_s = time.monotonic()
        if step.serves:
            status = _serve_until(step, script, cwd, environment)
        else:
            status = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=cwd, env=environment).returncode
        if status:
            raise GolfError(f"{page.name}, block {number} ended with status {status}:\n{script}")
        seconds.append((script.strip().splitlines()[0][:NAME_CHARACTERS], time.monotonic() - began_s))
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 when a block failed, 2 for a page or option that cannot be used."""
    parser = argparse.ArgumentParser(
        "python scripts/tour", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="+", type=Path, help="pages, such as docs/TOUR.md")
    parser.add_argument("--short", action="store_true", help="apply the pages' `short` comments")
    parser.add_argument("--venv", type=Path, help="environment to use in place of a new one")
    parser.add_argument("--into", type=Path, help="folder for the clone, which is then kept; it must not exist")
    arguments = parser.parse_args(argv)
    try:
        for page in arguments.pages:
            read_steps(page)
        with tempfile.TemporaryDirectory(prefix="tour-") as folder:
            target = arguments.into or Path(folder) / "clone"
            environment = clone(target, arguments.venv)
            for page in arguments.pages:
                try:
                    seconds = follow(page, target, environment, arguments.short)
                except GolfError as error:
                    print(f"tour: {error}", file=sys.stderr)
                    return 1
                rows = [[page.name, "s"], *([name, f"{took:.1f}"] for name, took in seconds)]
                total = sum(took for _, took in seconds)
                print("\n" + format_text_table([*rows, ["in all", f"{total:.1f}"]], left_columns=1), flush=True)
    except (GolfError, OSError) as error:
        print(f"tour: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
