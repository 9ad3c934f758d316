"""Turn text into token shards that a model can train on, with a manifest that proves what is in them.

    python scripts/prepare_text.py --source stdlib --out data/stdlib --tokenizer bpe --vocab-size 1024
    python scripts/prepare_text.py --source FOLDER_OR_FILE --out data/mine --tokenizer bpe --vocab-size 8192
    python scripts/prepare_text.py --source train.jsonl.xz --val-source val.jsonl.xz --out data/pair --tokenizer byte
    python scripts/prepare_text.py --source fineweb:sp8192 --out data/sp8192 --train-shards 10
    python scripts/prepare_text.py --check data/stdlib

Writes NAME_train_%06d.bin, NAME_val_%06d.bin (the challenge's format), tokenizer.model (not for bytes), train.hashes,
val.hashes (the sorted 16-byte BLAKE2b hashes of every document) and, last of all, manifest.json. A document goes to
validation or training by its own hash, so the split does not depend on order or machine, and a text that occurs twice
is kept once: no document is in both splits, and `--check` proves it from the files.

Everything is first written to OUT/.partial; a run that was killed is started again with the same command, and a
download continues where it stopped.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import difflib
import fcntl
import hashlib
import heapq
import itertools
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as a file: the repository root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import ConfigError, DataError, GolfError, ShardError, TokenizerError
from common.files import write_atomically
from common.text.bpb import ByteTable, byte_table, token_bytes
from common.text.shards import SHARD_TOKENS_DEFAULT, ShardWriter, check_tokens, open_shard, sha256_of_file
from common.text.sources import (
    FINEWEB_DOCS_FILE,
    FINEWEB_DOCS_REPOSITORY,
    FINEWEB_VARIANTS,
    HubFolder,
    MirrorFolder,
    RemoteFolder,
    TextSource,
    fetch_remote_file,
    fineweb_files,
    open_source,
)
from common.text.tokenizer import (
    ByteTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
    trainer_chunks,
)

MANIFEST_FORMAT = "text-shards-1"
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.model"
PARTIAL_NAME = ".partial"
SPLITS = ("train", "val")
HASH_BYTES = 16
BATCH_CHARS = 1 << 20  # text sent to a process at once
PIECE_TOKENS = 1 << 22  # tokens looked at at once when shards are read
OWN_NAMES = re.compile(r"\w[\w-]*_(train|val)_\d{6}\.bin|manifest\.json|tokenizer\.model|(train|val)\.hashes")

Tokenizer = ByteTokenizer | SentencePieceTokenizer


# ---------------------------------------------------------------- documents, hashes, split


class HashTable:
    """A set of 16-byte hashes in 24 to 48 bytes each: open addressing in one flat buffer."""

    def __init__(self) -> None:
        self._slots = 1 << 12
        self._table = bytearray(HASH_BYTES * self._slots)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, key: bytes) -> bool:
        """Add a hash; False if it was there."""
        key = key if any(key) else b"\1" * HASH_BYTES  # all zeros marks an empty slot
        if 3 * self._count >= 2 * self._slots:
            self._grow()
        place = self._place(key)
        if self._table[place : place + HASH_BYTES] == key:
            return False
        self._table[place : place + HASH_BYTES] = key
        self._count += 1
        return True

    def _place(self, key: bytes) -> int:
        """Where the hash is, or the empty slot where it belongs."""
        slot = int.from_bytes(key[:8], "little") & (self._slots - 1)
        while True:
            place = HASH_BYTES * slot
            found = self._table[place : place + HASH_BYTES]
            if found == key or not any(found):
                return place
            slot = (slot + 1) & (self._slots - 1)

    def _grow(self) -> None:
        old = self._table
        self._slots *= 2
        self._table = bytearray(HASH_BYTES * self._slots)
        for start in range(0, len(old), HASH_BYTES):
            key = bytes(old[start : start + HASH_BYTES])
            if any(key):
                place = self._place(key)
                self._table[place : place + HASH_BYTES] = key


def document_hash(text: str) -> bytes:
    """Identity of a document: BLAKE2b of its UTF-8, 16 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest()


def split_of_hash(digest: bytes, val_fraction: float) -> str:
    """The split that a document belongs to, from its hash alone."""
    return "val" if int.from_bytes(digest[8:], "big") < val_fraction * 2.0**64 else "train"


@dataclass
class Reading:
    """What was left out while reading a source once."""

    duplicates: int = 0
    over_val_limit: int = 0
    cut_at_train_limit: bool = False
    skipped: collections.Counter[str] = field(default_factory=collections.Counter)
    first_skipped: dict[str, str] = field(default_factory=dict)

    def note(self, source: TextSource) -> None:
        """Take over what a source has skipped."""
        self.skipped.update(source.skipped)
        for reason, place in source.first_skipped.items():
            self.first_skipped.setdefault(reason, Path(place).name)


def split_documents(
    source: TextSource,
    val_source: TextSource | None,
    val_fraction: float,
    max_train_bytes: int | None,
    max_val_bytes: int | None,
    reading: Reading,
) -> Iterator[tuple[str, bytes, str]]:
    """(split, hash, text) of every document that is kept, in a fixed order.

    With `val_source`, its documents come first and are all validation; training documents equal to one are dropped.
    Reading ends at the first training document that would exceed `max_train_bytes`.
    """
    seen = HashTable()
    used_bytes: dict[str, int] = {"train": 0, "val": 0}
    parts = ((val_source, 1.0), (source, 0.0)) if val_source is not None else ((source, val_fraction),)
    for part, fraction in parts:
        for text in part:
            digest = document_hash(text)
            split = split_of_hash(digest, fraction)
            if not seen.add(digest):
                reading.duplicates += 1
                continue
            length_bytes = len(text) if text.isascii() else len(text.encode())
            if split == "train" and max_train_bytes is not None and used_bytes[split] + length_bytes > max_train_bytes:
                reading.cut_at_train_limit = True
                break
            if split == "val" and max_val_bytes is not None and used_bytes[split] + length_bytes > max_val_bytes:
                reading.over_val_limit += 1
                continue
            used_bytes[split] += length_bytes
            yield split, digest, text
        reading.note(part)


def sample_chunks(documents: Iterable[tuple[str, bytes, str]], sample_bytes: int) -> list[str]:
    """A sample of training text for the tokenizer, in bounded memory.

    Every piece of a document has a rank, a hash of the document's hash and the piece's number. Kept are the pieces of
    lowest rank, up to the one that reaches `sample_bytes` characters: the same ones in whatever order documents come.
    """
    kept: list[tuple[int, str]] = []  # a heap of negated ranks: its first entry has the highest rank
    total = 0
    for split, digest, text in documents:
        if split != "train":
            continue
        for number, chunk in enumerate(trainer_chunks(text)):
            key = hashlib.blake2b(digest + number.to_bytes(8, "little"), digest_size=8).digest()
            negated_rank = -int.from_bytes(key, "big")
            if total >= sample_bytes and negated_rank < kept[0][0]:
                continue
            heapq.heappush(kept, (negated_rank, chunk))
            total += len(chunk)
            while total - len(kept[0][1]) >= sample_bytes:
                total -= len(heapq.heappop(kept)[1])
    return [chunk for _, chunk in sorted(kept, reverse=True)]


# ---------------------------------------------------------------- encoding on all cores


@dataclass(frozen=True)
class EncodedBatch:
    """Encoded documents: their token counts, their tokens end to end, their original and decoded bytes."""

    counts: np.ndarray
    tokens: np.ndarray
    original_bytes: np.ndarray
    decoded_bytes: np.ndarray


class Encoder:
    """Encodes documents with their beginning-of-document token, and counts the bytes that the tokens stand for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._table = byte_table(tokenizer)
        self._start = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], dtype=np.uint16)

    def encode(self, texts: list[str]) -> EncodedBatch:
        """Encode a list of documents.

        Raises:
            TokenizerError: the tokenizer calls itself lossless and the bytes counted are not the text's.
        """
        original, decoded, encoded = [], [], []
        for text in texts:
            tokens = np.concatenate([self._start, self._tokenizer.encode(text)])
            encoded.append(tokens)
            original.append(len(text.encode()))
            decoded.append(int(stream_bytes(self._table, self._tokenizer.bos_id, tokens)))
            if self._tokenizer.lossless and decoded[-1] != original[-1]:
                raise TokenizerError(
                    f"{self._tokenizer.name} counts {decoded[-1]} bytes for a document of {original[-1]} that starts "
                    f"{text[:40]!r}, expected equal for a lossless tokenizer; use another one and report this text."
                )
        counts = np.array([len(tokens) for tokens in encoded], dtype=np.int64)
        return EncodedBatch(counts, np.concatenate(encoded), np.array(original), np.array(decoded))


def stream_bytes(table: ByteTable, bos_id: int | None, tokens_N: np.ndarray, previous: int | None = None) -> int:
    """Bytes that a run of tokens stands for; without `previous` it is the start of a document."""
    if not len(tokens_N):
        return 0
    tokens_N = np.asarray(tokens_N, dtype=np.int64)
    if previous is None and bos_id is None:
        # No token marks the start: the first token's leading space is the dummy prefix, if the tokenizer has one.
        first = int(table.base_bytes_V[tokens_N[0]])
        first += int(table.has_space_V[tokens_N[0]] and not table.is_boundary_V.any())
        return first + int(token_bytes(table, tokens_N[:-1], tokens_N[1:]).sum())
    before_N = np.roll(tokens_N, 1)
    before_N[0] = bos_id if previous is None else previous
    return int(token_bytes(table, before_N, tokens_N).sum())


_worker_encoder: Encoder | None = None


def start_worker(tokenizer_spec: str) -> None:
    """Prepare an encoding process; it ends when the process that started it is gone, however that ended."""
    global _worker_encoder
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a child process"

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _worker_encoder = Encoder(load_tokenizer(tokenizer_spec))


def encode_in_worker(texts: list[str]) -> EncodedBatch:
    """Encode in a process prepared by `start_worker`."""
    assert _worker_encoder is not None, "start_worker ran first"
    return _worker_encoder.encode(texts)


def batches_of(documents: Iterable[tuple[str, bytes, str]]) -> Iterator[list[tuple[str, bytes, str]]]:
    """Group documents into batches of about BATCH_CHARS characters."""
    batch, length = [], 0
    for document in documents:
        batch.append(document)
        length += len(document[2])
        if length >= BATCH_CHARS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def encode_documents(
    documents: Iterable[tuple[str, bytes, str]], tokenizer: Tokenizer, tokenizer_spec: str, workers: int
) -> Iterator[tuple[list[tuple[str, bytes, str]], EncodedBatch]]:
    """Encode batches on `workers` processes, in order, with a bounded number of batches on the way."""
    if workers == 1:
        encoder = Encoder(tokenizer)
        for batch in batches_of(documents):
            yield batch, encoder.encode([text for _, _, text in batch])
        return
    waiting: collections.deque = collections.deque()
    # "spawn": the progress bar's thread must not be copied into a forked child.
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=start_worker, initargs=(tokenizer_spec,)
    ) as pool:
        try:
            for batch in batches_of(documents):
                waiting.append((batch, pool.submit(encode_in_worker, [text for _, _, text in batch])))
                if len(waiting) > 3 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


# ---------------------------------------------------------------- progress


class Progress:
    """Bars on a terminal, nothing elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bars

        console = Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip

    @contextmanager
    def bar(self, label: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
        """A bar; call what it gives with the bytes done so far."""
        with self._bars:
            task = self._bars.add_task(label, total=total_bytes)
            last = [0.0]

            def show(done_bytes: int) -> None:
                now = time.monotonic()
                if now - last[0] > 0.1:
                    last[0] = now
                    self._bars.update(task, completed=done_bytes)

            yield show
            self._bars.remove_task(task)


# ---------------------------------------------------------------- output folder


def read_manifest(folder: Path) -> dict:
    """The manifest of a finished folder.

    Raises:
        DataError: missing, damaged or of another format.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: missing, expected the manifest of a finished data folder; make one with "
            "scripts/prepare_text.py --out FOLDER."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}); make the folder again with --overwrite.") from error
    got = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    if got != MANIFEST_FORMAT:
        raise DataError(f"{path}: format {got!r}, expected {MANIFEST_FORMAT!r}; make it again with --overwrite.")
    if fault := manifest_fault(manifest):
        raise DataError(f"{path}: {fault}; the file is damaged: make the folder again with --overwrite.")
    return manifest


def manifest_fault(manifest: dict) -> str:
    """What is wrong with the form of a manifest, or the empty string. Names are those of files of our own making."""

    def is_count(value: object) -> bool:
        return type(value) is int and 0 <= value < 1 << 62

    def is_digest(value: object) -> bool:
        return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None

    def is_own(value: object) -> bool:
        return isinstance(value, str) and OWN_NAMES.fullmatch(value) is not None

    entry, splits = manifest.get("tokenizer"), manifest.get("splits")
    if not isinstance(entry, dict) or entry.get("file", "") not in (None, TOKENIZER_NAME):
        return f"tokenizer is {entry!r}"
    if not isinstance(entry.get("sha256"), str) or not is_count(entry.get("vocab_size")):
        return f"tokenizer is {entry!r}"
    if manifest.get("hash_of") not in ("text", "tokens"):
        return f"hash_of is {manifest.get('hash_of')!r}"
    for split in SPLITS:
        facts = splits.get(split) if isinstance(splits, dict) else None
        if not isinstance(facts, dict) or not isinstance(facts.get("shards"), list):
            return f"split {split} is missing or has no list of shards"
        if not (is_own(facts.get("hashes")) and is_digest(facts.get("hashes_sha256"))):
            return f"split {split} names hashes {facts.get('hashes')!r} with digest {facts.get('hashes_sha256')!r}"
        if not (is_count(facts.get("documents")) and is_count(facts.get("decoded_bytes"))):
            return f"split {split} counts {facts.get('documents')!r} documents, {facts.get('decoded_bytes')!r} bytes"
        for shard in facts["shards"]:
            if not isinstance(shard, dict) or not (is_own(shard.get("file")) and is_digest(shard.get("sha256"))):
                return f"split {split} has a shard {str(shard)[:200]}"
            if not is_count(shard.get("tokens")):
                return f"split {split} counts {shard.get('tokens')!r} tokens of {shard['file']}"
    return ""


def publish(partial: Path, out: Path) -> None:
    """Move a finished staging folder's files into place, the manifest last.

    Wherever it is killed, the staging folder still holds the manifest, and calling it again completes the move.
    """
    manifest = json.loads((partial / MANIFEST_NAME).read_text())
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    names = manifest_files(manifest)
    for path in out.iterdir():
        if path.is_file() and OWN_NAMES.fullmatch(path.name) and path.name not in names:
            path.unlink()
    for name in names:
        if (partial / name).exists():
            os.replace(partial / name, out / name)
    os.replace(partial / MANIFEST_NAME, out / MANIFEST_NAME)
    directory = os.open(out, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    shutil.rmtree(partial)


def manifest_files(manifest: dict) -> list[str]:
    """Names of the files that a manifest describes."""
    names = [manifest["tokenizer"]["file"]] if manifest["tokenizer"]["file"] else []
    for split in SPLITS:
        names.append(manifest["splits"][split]["hashes"])
        names += [shard["file"] for shard in manifest["splits"][split]["shards"]]
    return names


@contextmanager
def staging_folder(out: Path, settings: dict, *, overwrite: bool, keep_downloads: bool) -> Iterator[Path | None]:
    """The staging folder of a run, or None if `out` is finished with the same settings.

    Raises:
        ConfigError: `out` is finished with other settings, or holds something else, or another run is writing it.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file, expected a folder; choose another.")
    partial = out / PARTIAL_NAME
    others = [p.name for p in out.iterdir() if p.name != PARTIAL_NAME] if out.exists() else []
    strangers = sorted(name for name in others if not OWN_NAMES.fullmatch(name))
    finished = (out / MANIFEST_NAME).exists()
    old = read_manifest(out)["settings"] if finished else {}
    if finished and old == settings and not (partial / MANIFEST_NAME).exists():
        yield None  # nothing is to be written, so it does not matter what else is here
        return
    if strangers:
        raise ConfigError(
            f"--out {out}: holds {strangers[0]!r}, expected an empty or a prepared folder; choose another (files that "
            "this program did not write are never touched)."
        )
    if finished:
        if old != settings and not overwrite:
            changed = ", ".join(
                f"{key} {old.get(key)!r} -> {settings.get(key)!r}"
                for key in sorted(old.keys() | settings.keys())
                if old.get(key) != settings.get(key)
            )
            raise ConfigError(
                f"--out {out}: prepared with other settings ({changed}); choose another folder, or replace it with "
                "--overwrite."
            )
    elif others and not partial.exists() and not overwrite:
        raise ConfigError(
            f"--out {out}: holds {sorted(others)[0]!r} but no {MANIFEST_NAME}, expected an empty or a prepared folder; "
            "choose another, or replace it with --overwrite."
        )
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"--out {out}: another run is writing it; wait or choose another folder.") from error
        marker = partial / "settings.json"
        wanted = json.dumps(settings, sort_keys=True).encode()
        same = marker.exists() and marker.read_bytes() == wanted
        if same and (partial / MANIFEST_NAME).exists():  # killed while it moved the finished files into place
            publish(partial, out)
            yield None
            return
        for path in partial.iterdir():
            if path.name == "lock" or (same and keep_downloads):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_atomically(marker, wanted)
        yield partial


class SplitWriter:
    """Writes one split: shards, hashes, and the counts for the manifest."""

    def __init__(self, folder: Path, name: str, split: str, shard_tokens: int) -> None:
        self._folder = folder
        self._split = split
        self.shards = ShardWriter(lambda index: folder / f"{name}_{split}_{index:06d}.bin", shard_tokens=shard_tokens)
        self._hashes = open(folder / f"{split}.hashes", "wb")  # noqa: SIM115 - closed in entry or abort
        self.documents = 0
        self.original_bytes = 0
        self.decoded_bytes = 0

    def add_hash(self, digest: bytes) -> None:
        """One more document."""
        self._hashes.write(digest)
        self.documents += 1

    def abort(self) -> None:
        """Close the files of a run that failed."""
        self.shards.abort()
        self._hashes.close()

    def entry(self, shards: list[tuple[Path, int]] | None = None) -> dict:
        """Finish, and describe the split for the manifest; `shards` (path, tokens) if others wrote them."""
        from_text = shards is None
        self.shards.close()
        self._hashes.close()
        path = self._folder / f"{self._split}.hashes"
        digest = sort_hashes(path)
        shards = list(zip(self.shards.paths, self.shards.counts_tokens, strict=True)) if shards is None else shards
        return {
            "documents": self.documents,
            "tokens": sum(count for _, count in shards),
            "original_bytes": self.original_bytes if from_text else None,
            "decoded_bytes": self.decoded_bytes,
            "hashes": path.name,
            "hashes_sha256": digest,
            "shards": [
                {"file": p.name, "tokens": count, "bytes": p.stat().st_size, "sha256": sha256_of_file(p)}
                for p, count in shards
            ],
        }


def sort_hashes(path: Path) -> str:
    """Sort a file of 16-byte hashes in place and give its SHA-256."""
    hashes = np.fromfile(path, dtype=f"S{HASH_BYTES}")
    hashes.sort()
    write_atomically(path, hashes.tobytes())
    return sha256_of_file(path)


def tokenizer_entry(tokenizer: Tokenizer) -> dict:
    """Describe a tokenizer for the manifest."""
    return {
        "name": tokenizer.name,
        "file": None if isinstance(tokenizer, ByteTokenizer) else TOKENIZER_NAME,
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "lossless": tokenizer.lossless,
    }


def check_not_empty(splits: dict[str, dict], fix: str) -> None:
    """Raises DataError if a split has no tokens."""
    for split, entry in splits.items():
        if not entry["tokens"]:
            raise DataError(f"the {split} split has no document, expected at least one; {fix}")


# ---------------------------------------------------------------- text into shards


def prepare_from_text(args: argparse.Namespace, source: TextSource, val_source: TextSource | None, partial: Path,
                      settings: dict, progress: Progress) -> dict:  # fmt: skip
    """Split, tokenize and write the documents of a source into the staging folder; give the manifest."""

    def documents(reading: Reading) -> Iterator[tuple[str, bytes, str]]:
        return split_documents(
            source, val_source, args.val_fraction, args.max_train_bytes, args.max_val_bytes, reading
        )

    def watched(items: Iterable, show: Callable[[int], None]) -> Iterator:
        for item in items:
            show(source.done_bytes)
            yield item

    tokenizer_path = partial / TOKENIZER_NAME
    tokenizer_spec = "byte" if args.tokenizer == "byte" else str(tokenizer_path)
    if args.tokenizer == "bpe":
        with progress.bar("sampling", source.size_bytes) as show:
            chunks = sample_chunks(watched(documents(Reading()), show), args.tokenizer_sample_bytes)
        with progress.bar(f"training {args.vocab_size} tokenizer entries", None):
            tokenizer = train_sentencepiece(chunks, args.vocab_size, tokenizer_path)
        del chunks
    elif args.tokenizer == "byte":
        tokenizer = load_tokenizer("byte")
    else:
        load_tokenizer(args.tokenizer, args.vocab_size)
        write_atomically(tokenizer_path, Path(args.tokenizer).read_bytes())
        tokenizer = load_tokenizer(tokenizer_path)

    reading = Reading()
    writers = {split: SplitWriter(partial, settings["name"], split, args.shard_tokens) for split in SPLITS}
    try:
        with progress.bar("encoding", source.size_bytes) as show:
            encoded = encode_documents(watched(documents(reading), show), tokenizer, tokenizer_spec, args.workers)
            for batch, result in encoded:
                ends = np.cumsum(result.counts).tolist()
                start = 0
                for index, ((split, digest, _), end) in enumerate(zip(batch, ends, strict=True)):
                    writer = writers[split]
                    writer.add_hash(digest)
                    writer.shards.write(result.tokens[start:end])
                    writer.original_bytes += int(result.original_bytes[index])
                    writer.decoded_bytes += int(result.decoded_bytes[index])
                    start = end
        splits = {split: writer.entry() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abort()
    check_not_empty(
        splits,
        "give more documents, a larger --val-fraction, a --val-source, or cut plain text with --document-bytes.",
    )
    return {
        "format": MANIFEST_FORMAT,
        "name": settings["name"],
        "settings": settings,
        "hash_of": "text",
        "tokenizer": tokenizer_entry(tokenizer),
        "duplicates_dropped": reading.duplicates,
        "dropped_over_val_limit": reading.over_val_limit,
        "cut_at_train_limit": reading.cut_at_train_limit,
        "skipped": dict(sorted(reading.skipped.items())),
        "first_skipped": dict(sorted(reading.first_skipped.items())),
        "splits": splits,
    }


# ---------------------------------------------------------------- published shards


def shard_documents(paths: Iterable[Path], bos_id: int | None) -> Iterator[tuple[np.ndarray, bool]]:
    """Pieces of the documents in a run of shards: (tokens, whether a document begins here).

    Documents may run over from shard to shard; without a beginning-of-document token everything is one document.
    """
    fresh = True
    for path in paths:
        shard = open_shard(path)
        for start in range(0, len(shard), PIECE_TOKENS):
            piece = np.asarray(shard[start : start + PIECE_TOKENS])
            if bos_id is None:
                yield piece, fresh
                fresh = False
                continue
            starts = np.flatnonzero(piece == bos_id)
            bounds = [*starts.tolist(), len(piece)]
            if bounds[0] > 0:
                bounds.insert(0, 0)
            for low, high in itertools.pairwise(bounds):
                yield piece[low:high], fresh or int(piece[low]) == bos_id
                fresh = False


def whole_documents(paths: Iterable[Path], bos_id: int | None) -> Iterator[np.ndarray]:
    """Every document's tokens, joined over pieces and shards, its beginning-of-document token included."""
    parts: list[np.ndarray] = []
    for piece, begins in shard_documents(paths, bos_id):
        if begins and parts:
            yield np.concatenate(parts)
            parts = []
        parts.append(piece)
    if parts:
        yield np.concatenate(parts)


def token_document_hash(tokens_N: np.ndarray) -> bytes:
    """Identity of a document of which only tokens are known: BLAKE2b of its little-endian uint16 tokens."""
    return hashlib.blake2b(np.ascontiguousarray(tokens_N, dtype="<u2").tobytes(), digest_size=HASH_BYTES).digest()


def prepare_from_shards(args: argparse.Namespace, remote: RemoteFolder, partial: Path, settings: dict,
                        progress: Progress) -> dict:  # fmt: skip
    """Download a published variant into the staging folder, verify it and describe it; give the manifest."""
    variant = FINEWEB_VARIANTS[args.source.removeprefix("fineweb:")]
    train_files, val_files, tokenizer_file = fineweb_files(remote, variant, args.train_shards)
    shard_files = {"train": train_files, "val": val_files}
    total_bytes = sum(file.size_bytes for files in shard_files.values() for file in files)
    paths: dict[str, list[Path]] = {split: [] for split in SPLITS}
    with progress.bar("downloading", total_bytes) as show:
        if tokenizer_file is not None:
            fetch_remote_file(remote, tokenizer_file, partial / TOKENIZER_NAME, check=SentencePieceTokenizer)
        done_bytes = 0
        for split, files in shard_files.items():
            for file in files:
                paths[split].append(partial / Path(file.path).name)
                fetch_remote_file(remote, file, paths[split][-1], check=open_shard)
                done_bytes += file.size_bytes
                show(done_bytes)
    tokenizer = load_tokenizer("byte" if tokenizer_file is None else partial / TOKENIZER_NAME)
    table = byte_table(tokenizer)
    splits = {}
    done_tokens = 0
    with progress.bar("counting", total_bytes) as show:
        for split in SPLITS:
            writer = SplitWriter(partial, settings["name"], split, args.shard_tokens)
            try:
                for tokens in whole_documents(paths[split], tokenizer.bos_id):
                    place = f"{split} shards of {args.source}, document {writer.documents}"
                    check_tokens(tokens, tokenizer.vocab_size, place)
                    writer.add_hash(token_document_hash(tokens))
                    writer.decoded_bytes += stream_bytes(table, tokenizer.bos_id, tokens)
                    done_tokens += len(tokens)
                    show(2 * done_tokens)
                splits[split] = writer.entry([(path, len(open_shard(path))) for path in paths[split]])
            finally:
                writer.abort()
    return {
        "format": MANIFEST_FORMAT,
        "name": settings["name"],
        "settings": settings,
        "hash_of": "tokens",
        "tokenizer": tokenizer_entry(tokenizer),
        "splits": splits,
    }


# ---------------------------------------------------------------- check


def check_disjoint(data_dir: str | Path) -> dict:
    """Prove that a prepared folder holds what its manifest says and that its splits share no document.

    Every shard's and hash file's SHA-256, size and count is held against the manifest; the hash files are sorted, of
    the stated length, and share no entry; and the hash files are what the shards' own documents hash to: recomputed
    from the decoded text if the tokenizer is lossless, from the tokens if the manifest hashes tokens. (For text that
    was tokenized lossily the number of documents is recomputed, the hashes cannot be.)

    Returns:
        documents per split, whether hashes were recomputed, and the number of documents in both splits: 0 for text
        prepared here; published shards may contain the same document in both, and the count says so.

    Raises:
        DataError, ShardError, TokenizerError: the first thing that is wrong, with what to do.
    """
    folder = Path(data_dir)
    manifest = read_manifest(folder)
    fix = "the folder was changed after it was made: make it again with --overwrite."
    entry = manifest["tokenizer"]
    tokenizer = load_tokenizer("byte" if entry["file"] is None else folder / entry["file"], entry["vocab_size"])
    if tokenizer.sha256 != entry["sha256"]:
        where = folder / (entry["file"] or MANIFEST_NAME)
        raise TokenizerError(f"{where}: sha256 {tokenizer.sha256}, expected {entry['sha256']}; {fix}")
    recompute = manifest["hash_of"] == "tokens" or tokenizer.lossless
    table = byte_table(tokenizer)
    hashes = {}
    for split in SPLITS:
        facts = manifest["splits"][split]
        paths = []
        for shard in facts["shards"]:
            path = folder / shard["file"]
            paths.append(path)
            count = len(open_shard(path, vocab_size=tokenizer.vocab_size, deep=True))
            if count != shard["tokens"]:
                raise ShardError(f"{path}: {count} tokens, expected {shard['tokens']}; {fix}")
            digest = sha256_of_file(path)
            if digest != shard["sha256"]:
                raise ShardError(f"{path}: sha256 {digest}, expected {shard['sha256']}; {fix}")
        path = folder / facts["hashes"]
        if not path.is_file():
            raise DataError(f"{path}: missing, expected {facts['documents']} document hashes; {fix}")
        digest = sha256_of_file(path)
        if digest != facts["hashes_sha256"]:
            raise DataError(f"{path}: sha256 {digest}, expected {facts['hashes_sha256']}; {fix}")
        found = np.fromfile(path, dtype=f"S{HASH_BYTES}")
        if found.nbytes != path.stat().st_size or len(found) != facts["documents"]:
            raise DataError(f"{path}: {path.stat().st_size} bytes, expected {facts['documents']} hashes of 16; {fix}")
        ordered = found[:-1] < found[1:] if manifest["hash_of"] == "text" else found[:-1] <= found[1:]
        if not ordered.all():
            raise DataError(f"{path}: not in rising order, expected sorted hashes, each once; {fix}")
        hashes[split] = found
        documents = decoded_bytes = 0
        # Without a token that begins a document, the shards do not show where documents end.
        countable = tokenizer.bos_id is not None or manifest["hash_of"] == "tokens"
        again = np.zeros(facts["documents"], dtype=f"S{HASH_BYTES}")
        for tokens in whole_documents(paths, tokenizer.bos_id) if countable else ():
            if recompute and documents < len(again):
                is_text = manifest["hash_of"] == "text"
                again[documents] = document_hash(tokenizer.decode(tokens)) if is_text else token_document_hash(tokens)
            documents += 1
            decoded_bytes += stream_bytes(table, tokenizer.bos_id, tokens)
        if countable:
            for what, got in (("documents", documents), ("decoded_bytes", decoded_bytes)):
                if got != facts[what]:
                    raise DataError(f"{folder}: the {split} shards hold {got} {what}, expected {facts[what]}; {fix}")
        if countable and recompute:
            again.sort()
            if again.tobytes() != found.tobytes():
                raise DataError(f"{path}: not the hashes of the documents in the {split} shards; {fix}")
    train, val = hashes["train"], np.unique(hashes["val"])
    place = np.minimum(np.searchsorted(train, val), len(train) - 1)
    shared = int((train[place] == val).sum())
    if shared and manifest["hash_of"] == "text":
        raise DataError(f"{folder}: {shared} documents are in both splits, expected 0; {fix}")
    return {
        "train_documents": len(train),
        "val_documents": len(hashes["val"]),
        "hashes_recomputed": recompute and (tokenizer.bos_id is not None or manifest["hash_of"] == "tokens"),
        "documents_in_both": shared,
    }


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError and suggests the nearest option."""

    def error(self, message: str):
        hint = ""
        unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], list(self._option_string_actions), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{message}{hint} (see --help)")


def byte_count(text: str) -> int:
    """A positive number of bytes, with an optional K, M or G (powers of 1000)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", text.strip(), flags=re.IGNORECASE)
    value = int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()]) if match else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive number of bytes like 500000 or 50M")
    return value


def positive(text: str) -> int:
    """A positive whole number."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least 1")
    return int(text)


def fraction(text: str) -> float:
    """A number strictly between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number between 0 and 1 such as 0.05")
    return value


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse and cross-check the command line."""
    parser = Parser(
        description=(__doc__ or "").split("\n\n")[0], epilog=(__doc__ or "").partition("\n\n")[2], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--source", metavar="WHAT", help="stdlib, a file, a folder, or fineweb:VARIANT with VARIANT one of "
        f"{', '.join(FINEWEB_VARIANTS)} (published shards) or docs (published text)")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="folder to write")
    add("--check", type=Path, metavar="DIR", help="verify a prepared folder, prove its splits disjoint")
    add("--tokenizer", metavar="WHAT", help="byte (default), bpe (trained on the training split; lossless), "
        "or the path of a SentencePiece .model")  # fmt: skip
    add("--vocab-size", type=positive, metavar="N", help="entries to train (bpe: default 1024)")
    add("--tokenizer-sample-bytes", type=byte_count, default=20_000_000, metavar="N",
        help="text that the tokenizer is trained on, about (default 20M)")  # fmt: skip
    add("--val-fraction", type=fraction, metavar="F", help="share of documents for validation (default 0.05)")
    add("--val-source", metavar="WHAT", help="take validation from here; equal training documents are dropped")
    add("--max-train-bytes", type=byte_count, metavar="N", help="stop reading at this much training text")
    add("--max-val-bytes", type=byte_count, metavar="N", help="drop validation documents beyond this much text")
    add("--text-field", default="text", metavar="KEY", help="key or column of the text (default text)")
    add("--document-bytes", type=byte_count, metavar="N", help="cut plain text files into documents of N bytes")
    add("--name", metavar="NAME", help="first part of the shards' names (default: from the source)")
    add("--shard-tokens", type=positive, default=SHARD_TOKENS_DEFAULT, metavar="N", help="tokens of a shard")
    add("--train-shards", type=positive, metavar="N", help="fineweb: only the first N training shards")
    add("--mirror", metavar="DIR", help="fineweb: a local copy of the data repository instead of the hub")
    add("--strict", action="store_true", help="undecodable text is an error instead of being skipped")
    add("--overwrite", action="store_true", help="replace a folder prepared with other settings")
    add("--workers", type=positive, metavar="N", help="processes (default: all cores)")
    args = parser.parse_args(argv)
    if args.check is not None:
        if args.source or args.out:
            raise ConfigError("--check with --source or --out, expected --check alone; run them one after the other.")
        return args
    if args.source is None or args.out is None:
        missing = "--source" if args.source is None else "--out"
        raise ConfigError(f"{missing} is missing; give --source WHAT --out DIR, or --check DIR (see --help)")
    cross_check(args)
    args.workers = args.workers or len(os.sched_getaffinity(0))
    args.val_fraction = args.val_fraction or 0.05
    args.tokenizer = args.tokenizer or "byte"
    if args.tokenizer == "bpe":
        args.vocab_size = args.vocab_size or 1024
    return args


def cross_check(args: argparse.Namespace) -> None:
    """Raises ConfigError for options that do not go together."""
    if args.source.startswith("fineweb:"):
        variants = [*FINEWEB_VARIANTS, "docs"]
        variant = args.source.removeprefix("fineweb:")
        if variant not in variants:
            near = difflib.get_close_matches(variant, variants, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ConfigError(f"--source {args.source}: no such variant, expected one of {', '.join(variants)}{hint}")
    ready_made = args.source.startswith("fineweb:") and args.source != "fineweb:docs"
    if ready_made:
        for option in ("tokenizer", "vocab_size", "val_fraction", "val_source", "max_train_bytes", "max_val_bytes",
                       "document_bytes", "name"):  # fmt: skip
            if getattr(args, option) is not None:
                raise ConfigError(
                    f"--{option.replace('_', '-')} with --source {args.source}: those shards are published ready-made; "
                    "leave it out, or tokenize the text yourself with --source fineweb:docs."
                )
    elif args.train_shards is not None:
        raise ConfigError(f"--train-shards with --source {args.source}: not published shards; use --max-train-bytes.")
    if args.mirror is not None and not args.source.startswith("fineweb:"):
        raise ConfigError(f"--mirror with --source {args.source}: only for fineweb:VARIANT; leave it out.")
    if args.val_source is not None and args.val_fraction is not None:
        raise ConfigError("--val-source and --val-fraction together, expected one of them; leave one out.")
    if args.val_source is not None and args.val_source.startswith("fineweb:"):
        raise ConfigError(f"--val-source {args.val_source}: expected stdlib, a file or a folder; download it first.")
    if args.vocab_size is not None and args.tokenizer in (None, "byte"):
        raise ConfigError(f"--vocab-size {args.vocab_size} with the byte tokenizer; add --tokenizer bpe.")
    if args.name is not None and not re.fullmatch(r"\w[\w-]*", args.name, flags=re.ASCII):
        raise ConfigError(f"--name {args.name!r}: expected letters, digits, _ and - only; choose another.")


def summary_lines(manifest: dict, out: Path) -> list[str]:
    """What was made, for people."""
    tokenizer = manifest["tokenizer"]
    loss = "lossless" if tokenizer["lossless"] else "LOSSY"
    lines = [f"{out}: {tokenizer['name']} ({loss}), {manifest['name']}_*.bin"]
    for split in SPLITS:
        facts = manifest["splits"][split]
        n_bytes = facts["decoded_bytes"] if facts["original_bytes"] is None else facts["original_bytes"]
        kind = "decoded" if facts["original_bytes"] is None else "original"
        lines.append(
            f"  {split:5}  {facts['documents']:>12,} documents  {facts['tokens']:>14,} tokens  "
            f"{n_bytes:>15,} {kind} bytes  {n_bytes / facts['tokens']:.3f} bytes/token  {len(facts['shards'])} shards"
        )
    if manifest.get("duplicates_dropped"):
        lines.append(f"  {manifest['duplicates_dropped']:,} exact duplicates dropped")
    if manifest.get("dropped_over_val_limit"):
        lines.append(f"  {manifest['dropped_over_val_limit']:,} validation documents dropped over --max-val-bytes")
    if manifest.get("cut_at_train_limit"):
        lines.append("  stopped reading at --max-train-bytes")
    for reason, count in manifest.get("skipped", {}).items():
        lines.append(f"  {count:,} {reason} documents skipped, first {manifest['first_skipped'][reason]}")
    return lines


def prepare(args: argparse.Namespace, remote: RemoteFolder | None = None) -> dict:
    """Prepare a folder as the options say, or find it finished; give its manifest.

    Args:
        args: from `parse_args`.
        remote: where published files come from; None for the hub or `--mirror`.
    """
    progress = Progress()
    kind, _, variant = args.source.partition(":")
    settings: dict = {"source": Path(args.source).name if kind != "fineweb" else args.source}
    if kind == "fineweb":
        repository = FINEWEB_DOCS_REPOSITORY if variant == "docs" else FINEWEB_VARIANTS[variant].repository
        if remote is None:
            remote = MirrorFolder(args.mirror) if args.mirror is not None else HubFolder(repository)
    if kind == "fineweb" and variant != "docs":
        assert remote is not None, "set above"
        settings |= {"name": "fineweb", "train_shards": args.train_shards}
        with staging_folder(args.out, settings, overwrite=args.overwrite, keep_downloads=True) as partial:
            if partial is None:
                return report(read_manifest(args.out), args.out, already=True)
            manifest = prepare_from_shards(args, remote, partial, settings, progress)
            finish(manifest, partial, args.out)
        return report(manifest, args.out)
    if kind == "fineweb":
        assert remote is not None, "set above"
        spec = fetch_documents(remote, args.out.with_name(f"{args.out.name}.documents"), progress)
    else:
        spec = args.source
    options = {"text_field": args.text_field, "document_bytes": args.document_bytes or 0, "strict": args.strict}
    source = open_source(spec, **options)
    val_source = open_source(args.val_source, **options) if args.val_source is not None else None
    given = args.tokenizer not in ("byte", "bpe")
    tokenizer = load_tokenizer(args.tokenizer, args.vocab_size) if given else None
    settings |= {
        "name": args.name or ("fineweb" if kind == "fineweb" else source.name),
        "source_fingerprint": source.fingerprint(),
        "val_source": None if val_source is None else Path(str(args.val_source)).name,
        "val_source_fingerprint": None if val_source is None else val_source.fingerprint(),
        "val_fraction": args.val_fraction if val_source is None else None,
        "tokenizer": args.tokenizer if tokenizer is None else tokenizer.sha256,
        "vocab_size": args.vocab_size if tokenizer is None else tokenizer.vocab_size,
        "tokenizer_sample_bytes": args.tokenizer_sample_bytes if args.tokenizer == "bpe" else None,
        "max_train_bytes": args.max_train_bytes,
        "max_val_bytes": args.max_val_bytes,
        "shard_tokens": args.shard_tokens,
        **options,
    }
    with staging_folder(args.out, settings, overwrite=args.overwrite, keep_downloads=False) as partial:
        if partial is None:
            return report(read_manifest(args.out), args.out, already=True)
        manifest = prepare_from_text(args, source, val_source, partial, settings, progress)
        finish(manifest, partial, args.out)
    return report(manifest, args.out)


def fetch_documents(remote: RemoteFolder, folder: Path, progress: Progress) -> Path:
    """Download the published text itself to beside the output folder."""
    found = [file for file in remote.files() if file.path == FINEWEB_DOCS_FILE]
    if not found:
        raise DataError(f"no {FINEWEB_DOCS_FILE} there, expected the published text; give a whole copy with --mirror.")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / Path(FINEWEB_DOCS_FILE).name
    with progress.bar("downloading documents", found[0].size_bytes):
        fetch_remote_file(remote, found[0], target)
    return target


def finish(manifest: dict, partial: Path, out: Path) -> None:
    """Write the manifest into the staging folder and move everything into place."""
    write_atomically(partial / MANIFEST_NAME, (json.dumps(manifest, indent=1) + "\n").encode())
    publish(partial, out)


def report(manifest: dict, out: Path, *, already: bool = False) -> dict:
    """Print the summary and give the manifest."""
    if already:
        print(f"{out} is already prepared with these settings; nothing to do.")
    print("\n".join(summary_lines(manifest, out)))
    return manifest


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 after one line about what is wrong."""
    try:
        args = parse_args(argv)
        if args.check is not None:
            facts = check_disjoint(args.check)
            how = "recomputed from the shards" if facts["hashes_recomputed"] else "as recorded when made"
            print(
                f"{args.check}: files match the manifest; {facts['train_documents']:,} training and "
                f"{facts['val_documents']:,} validation documents (hashes {how}); "
                f"{facts['documents_in_both']:,} in both."
            )
        else:
            prepare(args)
    except GolfError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
