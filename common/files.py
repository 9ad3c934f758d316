"""Writing a file so that a reader finds either the old one or the whole new one."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write to a temporary name beside the target, flush to disk, rename; a failed write leaves nothing behind.

    Args:
        path: file to create or replace; its folder exists.
        data: its whole content.
    Raises:
        OSError: as the file system has it; the target is then as it was.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
