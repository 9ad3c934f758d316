"""Where text comes from: the standard library, folders, JSON lines, parquet, and FineWeb's published token shards.

A source is iterated as often as needed and gives documents in a fixed order, one at a time, so that a corpus may be
larger than memory (one document must fit). Files that cannot be used are counted and named, or raise an error with
`strict`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO, Protocol

from common.errors import DataError

JSONL_SUFFIXES = (".jsonl", ".jsonl.xz", ".jsonl.zst", ".jsonl.gz")
SOURCE_CHUNK_BYTES = 1 << 16
# Parts of the standard library that distributions package separately, that hold tests or other people's packages, or
# that are written for one machine: without them every installation of a Python version gives nearly the same text.
STDLIB_EXCLUDED_FOLDERS = (
    "site-packages", "dist-packages", "test", "tests", "*_test", "idlelib", "tkinter", "turtledemo", "lib2to3",
    "distutils", "ensurepip", "config-*", "lib-dynload", "__pycache__",
)  # fmt: skip
STDLIB_EXCLUDED_FILES = ("_sysconfigdata_*", "sitecustomize.py", "usercustomize.py", "turtle.py", "*_test.py")


class TextSource:
    """Documents from a list of files.

    Args:
        name: short name, used for shard files.
        root: folder that the files' names are reported relative to.
        files: the files, in the order of reading.
        text_field: key or column that holds the text in JSON lines and parquet.
        document_bytes: 0, or the length (at least 4) at which plain text files are cut into documents (at line ends).
        strict: undecodable text raises DataError and is not only counted.

    After an iteration `skipped` counts what was left out by reason, `first_skipped` names one of each, and `done_bytes`
    of `size_bytes` on disk are read.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        files: list[Path],
        *,
        text_field: str = "text",
        document_bytes: int = 0,
        strict: bool = False,
    ) -> None:
        if document_bytes and document_bytes < 4:
            raise DataError(f"document_bytes {document_bytes}, expected 0 or at least 4, the longest UTF-8 character.")
        self.name = name
        self._root = root
        self._files = files
        self._text_field = text_field
        self._document_bytes = document_bytes
        self._strict = strict
        self._sizes_bytes = [path.stat().st_size for path in files]
        self.size_bytes = sum(self._sizes_bytes)
        self.done_bytes = 0
        self.skipped: Counter[str] = Counter()
        self.first_skipped: dict[str, str] = {}

    def fingerprint(self) -> str:
        """Hash of the files' relative names and sizes: tells whether a prepared folder came from these files."""
        digest = hashlib.sha256()
        for path, size_bytes in zip(self._files, self._sizes_bytes, strict=True):
            digest.update(f"{path.relative_to(self._root).as_posix()}\0{size_bytes}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def __iter__(self) -> Iterator[str]:
        self.done_bytes = 0
        self.skipped.clear()
        self.first_skipped.clear()
        finished_bytes = 0
        for path, size_bytes in zip(self._files, self._sizes_bytes, strict=True):
            for place, raw in self._raw_documents(path, finished_bytes):
                text = self._checked(raw, place)
                if text:
                    yield text
            finished_bytes += size_bytes
            self.done_bytes = finished_bytes

    def _raw_documents(self, path: Path, finished_bytes: int) -> Iterator[tuple[str, str | bytes]]:
        """(where, document) of one file."""
        if path.name.lower().endswith(JSONL_SUFFIXES):
            yield from self._json_lines(path, finished_bytes)
        elif path.suffix.lower() == ".parquet":
            yield from self._parquet_rows(path)
        else:
            yield from self._plain_text(path, finished_bytes)

    def _plain_text(self, path: Path, finished_bytes: int) -> Iterator[tuple[str, bytes]]:
        with open_source_file(path) as file:
            if not self._document_bytes:
                yield str(path), file.read()
                return
            lines: list[bytes] = []
            length_bytes = 0
            while line := file.readline(self._document_bytes):
                if length_bytes and length_bytes + len(line) > self._document_bytes:
                    cut = continuation_bytes(line)  # not 0 if the bound cut a very long line inside a character
                    lines.append(line[:cut])
                    line = line[cut:]
                    yield f"{path} before byte {file.tell()}", b"".join(lines)
                    lines, length_bytes = [], 0
                    self.done_bytes = finished_bytes + file.tell()
                lines.append(line)
                length_bytes += len(line)
            yield f"{path} at its end", b"".join(lines)

    def _json_lines(self, path: Path, finished_bytes: int) -> Iterator[tuple[str, str | bytes]]:
        with open_source_file(path) as file:
            for number, line in enumerate(decompressed_lines(path, file), start=1):
                self.done_bytes = finished_bytes + file.tell()
                place = f"{path} line {number}"
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode())
                except UnicodeDecodeError:
                    yield place, line
                    continue
                except (ValueError, RecursionError) as error:
                    raise DataError(
                        f"{place}: no JSON ({error}); expected one object a line; repair the file."
                    ) from error
                yield place, self._text_of(record, place)

    def _parquet_rows(self, path: Path) -> Iterator[tuple[str, str]]:
        import pyarrow
        import pyarrow.parquet

        number = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                if self._text_field not in file.schema_arrow.names:
                    raise DataError(
                        f"{path}: columns {file.schema_arrow.names}, expected one named {self._text_field!r}; "
                        "name the column with --text-field."
                    )
                for batch in file.iter_batches(batch_size=1024, columns=[self._text_field]):
                    for value in batch.column(0).to_pylist():
                        number += 1
                        place = f"{path} row {number}"
                        yield place, self._text_of({self._text_field: "" if value is None else value}, place)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: cannot be read after row {number} ({error}); expected a parquet file; "
                "make or download it again."
            ) from error

    def _text_of(self, record: object, place: str) -> str:
        if not isinstance(record, dict) or self._text_field not in record:
            got = f"keys {sorted(record)}" if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{place}: {got}, expected an object with the key {self._text_field!r}; name the key with --text-field."
            )
        text = record[self._text_field]
        if not isinstance(text, str):
            raise DataError(
                f"{place}: {self._text_field!r} is {type(text).__name__}, expected a string; repair the file or name "
                "another key with --text-field."
            )
        return text

    def _checked(self, raw: str | bytes, place: str) -> str:
        """The text, or "" after counting why it is left out."""
        try:
            if isinstance(raw, bytes):
                text = raw.decode()
            else:
                raw.encode()
                text = raw
        except UnicodeError as error:
            if self._strict:
                raise DataError(
                    f"{place}: no UTF-8 text ({error}); convert it to UTF-8, or leave out --strict to skip it."
                ) from error
            reason = "undecodable"
        else:
            if text:
                return text
            reason = "empty"
        self.skipped[reason] += 1
        self.first_skipped.setdefault(reason, place)
        return ""


def continuation_bytes(line: bytes) -> int:
    """How many bytes at the start of a line continue a UTF-8 character (at most 3)."""
    count = 0
    while count < min(3, len(line)) and line[count] & 0xC0 == 0x80:
        count += 1
    return count


def open_source_file(path: Path) -> BinaryIO:
    """Open a file of a source.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path.") from error


def decompressed_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Lines of a file, decompressed by its suffix (.xz, .zst, .gz or none) a piece at a time.

    Raises:
        DataError: damaged or truncated compressed data.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".zst":
            yield from zstd_lines(path, file)
        elif suffix == ".xz":
            with lzma.open(file) as stream:
                yield from stream
        elif suffix == ".gz":
            with gzip.open(file) as stream:
                yield from stream
        else:
            yield from file
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise DataError(
            f"{path}: damaged or truncated at byte {file.tell()} ({error}); expected whole {suffix} data; "
            "make or download it again."
        ) from error


def zstd_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Lines of a zstd file of one or more frames; unlike a plain reader, refuses a last frame that is cut off."""
    import zstandard

    pending = io.BytesIO()
    frame = None
    data = b""
    try:
        while data or (data := file.read(SOURCE_CHUNK_BYTES)):
            if frame is None:
                frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            text = frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
            if b"\n" not in text:
                pending.write(text)
                continue
            head, text = text.split(b"\n", 1)
            yield pending.getvalue() + head + b"\n"
            pending = io.BytesIO()
            *lines, rest = text.split(b"\n")
            for line in lines:
                yield line + b"\n"
            pending.write(rest)
    except zstandard.ZstdError as error:
        raise DataError(
            f"{path}: damaged at byte {file.tell()} ({error}); expected zstd data; make or download it again."
        ) from error
    if frame is not None:
        raise DataError(f"{path}: the last zstd frame is cut off, expected whole data; make or download it again.")
    if pending.getvalue():
        yield pending.getvalue()


def stdlib_files(root: Path) -> list[Path]:
    """Python sources of a standard library, sorted by name, without the parts that differ between distributions."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not any(fnmatch(f, pattern) for pattern in STDLIB_EXCLUDED_FOLDERS)]
        for name in names:
            if name.endswith(".py") and not any(fnmatch(name, pattern) for pattern in STDLIB_EXCLUDED_FILES):
                found.append(Path(folder, name))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def folder_files(root: Path) -> list[Path]:
    """Every regular file below a folder but the hidden ones, sorted by name."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".") and Path(folder, name).is_file()]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def open_source(
    spec: str | Path, *, text_field: str = "text", document_bytes: int = 0, strict: bool = False
) -> TextSource:
    """The source that a specification names.

    Args:
        spec: "stdlib" (the running Python's own sources), a folder (every file in it), a .jsonl[.xz|.zst|.gz] or
            .parquet file, or any other file (plain UTF-8 text).
        text_field, document_bytes, strict: see `TextSource`.

    Raises:
        DataError: nothing there.
    """
    if str(spec) == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = stdlib_files(root)
        name = "stdlib"
    else:
        root = Path(spec)
        if root.is_dir():
            files = folder_files(root)
            name = root.resolve().name
        elif root.is_file():
            files, root = [root], root.parent
            name = files[0].name.split(".")[0]
        else:
            raise DataError(
                f"{spec}: no such file or folder, expected 'stdlib', 'fineweb:VARIANT' or the path of a text source; "
                "check the path."
            )
    if not files:
        raise DataError(f"{spec}: no text file in {root}, expected at least one; check the path.")
    safe = "".join(c if c.isalnum() or c == "-" else "_" for c in name) or "text"
    return TextSource(safe, root, files, text_field=text_field, document_bytes=document_bytes, strict=strict)


# FineWeb as the challenge publishes it: token shards, tokenizers and documents in data set repositories of a hub.


@dataclass(frozen=True)
class FinewebVariant:
    """Where a variant of the challenge's data lies: repository, folder of the shards, tokenizer file (None: bytes)."""

    repository: str
    folder: str
    tokenizer_file: str | None


FINEWEB_VARIANTS = {
    "sp1024": FinewebVariant(
        "willdepueoai/parameter-golf",
        "datasets/datasets/fineweb10B_sp1024/",
        "datasets/tokenizers/fineweb_1024_bpe.model",
    ),
    "sp4096": FinewebVariant(
        "kevclark/parameter-golf",
        "datasets/datasets/fineweb10B_sp4096/",
        "datasets/tokenizers/fineweb_4096_bpe.model",
    ),
    "sp8192": FinewebVariant(
        "kevclark/parameter-golf",
        "datasets/datasets/fineweb10B_sp8192/",
        "datasets/tokenizers/fineweb_8192_bpe.model",
    ),
    "bytes": FinewebVariant("mistobaan/fineweb10B_bytes", "", None),
}
FINEWEB_DOCS_REPOSITORY = "willdepueoai/parameter-golf"
FINEWEB_DOCS_FILE = "datasets/docs_selected.jsonl"


@dataclass(frozen=True)
class RemoteFile:
    """A published file: its path, size, and SHA-256 or Git blob id (SHA-1) where the hub tells one."""

    path: str
    size_bytes: int
    sha256: str | None = None
    git_blob_id: str | None = None


class RemoteFolder(Protocol):
    """A place that files are downloaded from."""

    def files(self) -> list[RemoteFile]:
        """All files."""
        ...

    def download(self, path: str, folder: Path) -> Path:
        """Bring one file to below `folder`, continuing an earlier attempt if it can, and say where it lies."""
        ...


class HubFolder:
    """A data set repository of the Hugging Face hub."""

    def __init__(self, repository: str) -> None:
        self._repository = repository

    def files(self) -> list[RemoteFile]:
        """All files with sizes and hashes, from the hub's metadata."""
        import huggingface_hub

        found = []
        try:
            for entry in huggingface_hub.HfApi().list_repo_tree(self._repository, repo_type="dataset", recursive=True):
                if isinstance(entry, huggingface_hub.hf_api.RepoFile):
                    sha256 = entry.lfs.sha256 if entry.lfs else None
                    found.append(RemoteFile(entry.path, entry.size, sha256, None if sha256 else entry.blob_id))
        except Exception as error:  # the hub's client raises many kinds; all become one named error
            raise DataError(self._failure("its list of files", error)) from error
        return found

    def download(self, path: str, folder: Path) -> Path:
        """Download a file; the hub's client continues a partial download left in `folder`."""
        import huggingface_hub

        try:
            return Path(huggingface_hub.hf_hub_download(self._repository, path, repo_type="dataset", local_dir=folder))
        except Exception as error:
            raise DataError(self._failure(path, error)) from error

    def _failure(self, what: str, error: Exception) -> str:
        return (
            f"{self._repository}: cannot download {what} ({type(error).__name__}: {error}); expected a reachable data "
            "set repository: check the network and run the same command again (it continues where it stopped), or give "
            "a local copy with --mirror FOLDER."
        )


class MirrorFolder:
    """A local copy of such a repository, with the same paths inside."""

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root)

    def files(self) -> list[RemoteFile]:
        """All files with their sizes."""
        if not self._root.is_dir():
            raise DataError(f"{self._root}: no such folder, expected a copy of the data repository; check --mirror.")
        return [
            RemoteFile(path.relative_to(self._root).as_posix(), path.stat().st_size)
            for path in folder_files(self._root)
        ]

    def download(self, path: str, folder: Path) -> Path:
        """Copy a file."""
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._root / path, target)
        return target


def verify_remote_file(path: Path, expected: RemoteFile) -> str | None:
    """What is wrong with a downloaded file, or None: size, then SHA-256 or Git blob id."""
    size_bytes = path.stat().st_size
    if size_bytes != expected.size_bytes:
        return f"{size_bytes} bytes, expected {expected.size_bytes}"
    if expected.sha256 is not None:
        kind, wanted, prefix = "sha256", expected.sha256, b""
    elif expected.git_blob_id is not None:
        kind, wanted, prefix = "sha1", expected.git_blob_id, f"blob {size_bytes}\0".encode()
    else:
        return None
    digest = hashlib.new(kind, prefix)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return None if digest.hexdigest() == wanted else f"{kind} {digest.hexdigest()}, expected {wanted}"


def fetch_remote_file(
    remote: RemoteFolder, expected: RemoteFile, target: Path, check: Callable[[Path], object] | None = None
) -> bool:
    """Bring one file to `target`, verified; nothing is done if it is there and right.

    Args:
        remote: where from.
        expected: its path, size and hash there.
        target: final path. Partial downloads live in a folder `download` beside it.
        check: raises an error if the content is not what it should be.

    Returns:
        Whether anything was downloaded.

    Raises:
        DataError: the download fails, or gives something else twice.
    """
    if target.exists() and verify_remote_file(target, expected) is None:
        return False
    fault = None
    for _ in range(2):
        got = remote.download(expected.path, target.parent / "download")
        fault = verify_remote_file(got, expected)
        if fault is None:
            if check is not None:
                check(got)
            os.replace(got, target)
            return True
        got.unlink()
    raise DataError(
        f"{expected.path}: downloaded {fault}; the transfer or the published file is damaged: run the command again, "
        "or give a verified copy with --mirror FOLDER."
    )


def fineweb_files(
    remote: RemoteFolder, variant: FinewebVariant, train_shards: int | None
) -> tuple[list[RemoteFile], list[RemoteFile], RemoteFile | None]:
    """Training shards, validation shards and tokenizer of a variant, of those that a repository holds.

    Args:
        remote: the repository.
        variant: which paths.
        train_shards: only the first so many training shards (the challenge's order); None for all.

    Raises:
        DataError: a kind of file is missing, or fewer training shards than asked for.
    """
    by_path = {file.path: file for file in remote.files()}
    splits = {
        split: [by_path[path] for path in sorted(by_path) if fnmatch(path, f"{variant.folder}fineweb_{split}_*.bin")]
        for split in ("train", "val")
    }
    for split, files in splits.items():
        if not files:
            raise DataError(
                f"{variant.repository}: no {variant.folder}fineweb_{split}_*.bin among {len(by_path)} files, expected "
                "at least one; the repository has changed or the mirror is incomplete: give a whole one with --mirror."
            )
    if train_shards is not None and train_shards > len(splits["train"]):
        raise DataError(
            f"{variant.repository}: {len(splits['train'])} training shards, expected {train_shards}; ask for fewer "
            "with --train-shards."
        )
    tokenizer = None
    if variant.tokenizer_file is not None:
        if variant.tokenizer_file not in by_path:
            raise DataError(
                f"{variant.repository}: no {variant.tokenizer_file}, expected the tokenizer of the shards; "
                "complete the mirror."
            )
        tokenizer = by_path[variant.tokenizer_file]
    return splits["train"][:train_shards], splits["val"], tokenizer
