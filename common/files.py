"""Writing a file so that a reader finds either the old one or the whole new one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from common.errors import StorageError


@contextlib.contextmanager
def storing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, a failing file system is a `StorageError` that names the file and what to do."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror or error}); free space or name a folder that can be written. "
            "What was written before is whole: the same command goes on from there"
        ) from error


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make renames in a folder last through a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write to a temporary name beside the target, flush to disk, rename; a failed write leaves nothing behind.

    Args:
        path: file to create or replace; its folder exists.
        data: its whole content.
    Raises:
        StorageError: the file system refuses (it is an OSError too); the target is then as it was.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with storing(target):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def remove_temporaries(folder: str | os.PathLike[str]) -> None:
    """Delete what writers that were killed left in a folder; nobody else may be writing there."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)
