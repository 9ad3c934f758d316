"""What is in an image: one line for every file of its Python environment and of our code, and for every Debian package.

A container cannot know the digest of the image that it runs in, so the build writes this list into the image, and the
sha256 of the list stands for the image in scores. Anyone can make it again: `manifest.py FOLDER...` in the container.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

MANIFEST_NAME = "image.manifest"  # itself not listed


def file_lines(folder: Path) -> Iterator[str]:
    """`sha256  mode  path` of every file under a folder, `symlink  target  path` of every link, in path order."""
    for path in sorted(folder.rglob("*"), key=lambda path: path.as_posix()):
        if path.is_symlink():
            yield f"symlink  {os.readlink(path)}  {path.as_posix()}"
        elif path.is_file() and path.name != MANIFEST_NAME:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            yield f"{digest}  {path.stat().st_mode & 0o7777:o}  {path.as_posix()}"


def debian_lines() -> list[str]:
    """`debian  version  package` of every installed Debian package; none where dpkg is not."""
    if shutil.which("dpkg-query") is None:
        return []
    form = "debian  ${Version}  ${Package}:${Architecture}\n"
    return sorted(subprocess.check_output(["dpkg-query", "-W", "-f", form], text=True).splitlines())


def manifest(folders: Iterable[Path]) -> str:
    """The list of an image with these folders, ending with the interpreter and the Debian packages."""
    lines = [line for folder in folders for line in file_lines(folder)]
    interpreter = Path(sys.executable).resolve()
    lines.append(f"{hashlib.sha256(interpreter.read_bytes()).hexdigest()}  interpreter  {interpreter}")
    return "\n".join([*lines, *debian_lines()]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    folders = [Path(word) for word in (sys.argv[1:] if argv is None else argv)]
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing or not folders:
        print(f"manifest: expected folders, got {', '.join(missing) or 'nothing'}", file=sys.stderr)
        return 2
    sys.stdout.write(manifest(folders))
    return 0


if __name__ == "__main__":
    sys.exit(main())
