"""Episodes on disk: ArrayRecord files of independently compressed frame groups, plus one manifest a data set.

A data set is a folder:

    manifest.json                 what it is, how it was made, every file with its size and digests
    train-00000.array_record ...  `<split>-<number>.array_record`

Every record of a file but the last is one *group*: up to `group_frames` consecutive items (frames, or the tokens of
frames) of one episode, compressed by themselves, so a window of T frames reads ceil(T / G) or one more records and
nothing else. The last record is the file's index. Nothing is pickled. All integers are little-endian.

    group record                                          index record
    0   4s   magic b"WMG1"                                0  4s  magic b"WMI1"
    4   u8   version (1)                                  4  msgpack map:
    5   u8   codec: 0 raw, 1 zstd                              version, kind, item_shape, dtype, group_frames,
    6   u8   scan: 0 rows, 1 columns                           num_actions, and one packed array an episode column:
    7   u8   dtype: 0 uint8, 1 uint16, 2 int32                 first_record u32, frames u32, level_seed i64, end u8,
    8   u32  episode, counted in this file                     level_complete i8, digest 32 bytes
    12  u32  first frame, counted in the episode
    16  u16  frames n in this group
    18  u16  d0, d1, d2: shape of an item (trailing 1s for items of lower rank)
    24  u32  payload bytes
    28  u32  reserved, 0
    32  i16  actions[n]     -1: unknown
        f32  rewards[n]     reward that followed the action
        payload

Scan order: a camera that scrolls sideways turns columns into columns of the next frame. Stored column by column, such a
frame is one long match for the compressor: hard CoinRun, in groups of 16 at level 5, costs 747 bytes a frame where rows
cost 887. "auto" tries both on the first group of an episode and keeps the smaller.

Alignment: `actions[t]` is the action taken at frame t; it leads to frame t + 1. The last action of an ended episode
leads to a frame that the environment never showed.

Letters: E episodes, T frames of a window, B windows, H height, W width, C channels, D item dimensions, N items.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgpack
import numpy as np
import zstandard
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from common.errors import DataError
from common.files import write_atomically

MANIFEST_NAME = "manifest.json"
FORMAT_NAME = "worldmodel-records"
FORMAT_VERSION = 1
UNKNOWN_ACTION = -1
SPLITS = ("train", "val", "test")

_GROUP_MAGIC = b"WMG1"
_INDEX_MAGIC = b"WMI1"
_GROUP_HEADER = struct.Struct("<4sBBBBIIHHHHII")
_CODEC_RAW, _CODEC_ZSTD = 0, 1
_SCAN_ROWS, _SCAN_COLUMNS = 0, 1
_DTYPES = (np.dtype("uint8"), np.dtype("<u2"), np.dtype("<i4"))
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_MAX_GROUP_BYTES = 1 << 28

END_CUT, END_TERMINAL, END_OF_VIDEO = 0, 1, 2
END_NAMES = {
    END_CUT: "cut by the end of the collection",
    END_TERMINAL: "ended by the game",
    END_OF_VIDEO: "end of video",
}

Scan = Literal["auto", "rows", "columns"]


@dataclasses.dataclass(frozen=True)
class RecordLayout:
    """Shape and encoding of the items of one data set."""

    item_shape: tuple[int, ...]
    dtype: str = "uint8"
    num_actions: int = 15
    group_frames: int = 32
    zstd_level: int = 3
    scan: Scan = "auto"

    def __post_init__(self) -> None:
        sizes = self.item_shape
        if not 1 <= len(sizes) <= 3 or any(type(size) is not int or not 1 <= size <= 0xFFFF for size in sizes):
            raise DataError(f"item shape {str(sizes)[:80]}: expected one to three sizes in [1, 65535]")
        if self.dtype not in [dtype.name for dtype in _DTYPES]:
            raise DataError(f"item dtype {self.dtype!r}: expected one of {[str(dtype) for dtype in _DTYPES]}")
        if not 1 <= self.group_frames <= 0xFFFF:
            raise DataError(f"group_frames {self.group_frames}: expected a value in [1, 65535]")
        if not 0 <= self.num_actions <= 0x7FFF:
            raise DataError(f"num_actions {self.num_actions}: expected a value in [0, 32767]")
        if self.group_frames * self.item_bytes > _MAX_GROUP_BYTES:
            raise DataError(
                f"a group of {self.group_frames} items of {self.item_bytes} bytes is larger than {_MAX_GROUP_BYTES} "
                "bytes: lower group_frames"
            )

    @property
    def item_bytes(self) -> int:
        """Bytes of one uncompressed item."""
        return int(np.prod(self.item_shape)) * np.dtype(self.dtype).itemsize

    @property
    def can_scan_columns(self) -> bool:
        """Whether items are images, which alone have a column order."""
        return len(self.item_shape) == 3 and np.dtype(self.dtype).itemsize == 1


@dataclasses.dataclass(frozen=True)
class EpisodeInfo:
    """Where one episode lies and how it ended."""

    index: int
    file_index: int
    first_record: int
    num_frames: int
    level_seed: int
    end: int
    level_complete: int
    digest: str


@dataclasses.dataclass(frozen=True)
class EncodedEpisode:
    """One finished episode, compressed, ready to be written to any file."""

    payloads: tuple[bytes, ...]
    scan: int
    codec: int
    actions_N: np.ndarray
    rewards_N: np.ndarray
    level_seed: int
    end: int
    level_complete: int
    digest: bytes

    @property
    def num_frames(self) -> int:
        return len(self.actions_N)


@dataclasses.dataclass(frozen=True)
class FileSummary:
    """What the manifest says about one file."""

    name: str
    bytes: int
    sha256: str
    content_sha256: str
    episodes: int
    frames: int


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _transpose_images(source_NWHC: np.ndarray, out_NHWC: np.ndarray) -> None:
    """Swap the two image axes into `out`; channel by channel, which NumPy copies several times faster."""
    for channel in range(source_NWHC.shape[-1]):
        out_NHWC[..., channel] = source_NWHC[..., channel].swapaxes(1, 2)


def episode_digest(items_ND: np.ndarray, actions_N: np.ndarray, rewards_N: np.ndarray, level_seed: int) -> bytes:
    """SHA-256 over what an episode *is*, whatever the compressor and its version made of it.

    Args:
        items_ND: frames or tokens, (N, *item_shape).
        actions_N: (N,) actions, -1 for unknown.
        rewards_N: (N,) rewards.
        level_seed: seed of the level, -1 when there is none.
    """
    digest = _start_digest(items_ND.shape[1:], items_ND.dtype)
    digest.update(np.ascontiguousarray(items_ND))
    return _finish_digest(digest, actions_N, rewards_N, level_seed)


def _start_digest(item_shape: tuple[int, ...], dtype: np.dtype) -> Any:
    return hashlib.sha256(json.dumps([list(item_shape), np.dtype(dtype).name]).encode())


def _finish_digest(digest: Any, actions_N: np.ndarray, rewards_N: np.ndarray, level_seed: int) -> bytes:
    digest.update(actions_N.astype("<i2"))
    digest.update(rewards_N.astype("<f4"))
    digest.update(struct.pack("<qI", level_seed, len(actions_N)))
    return digest.digest()


def content_digest(parts: Iterable[bytes]) -> str:
    """SHA-256, as hex, over digests of parts in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


class EpisodeEncoder:
    """Compresses one episode while it is played, a frame group at a time, so that only one raw group is held.

    Args:
        layout: shape and encoding of the items.
        compressor: reused between encoders of one thread; made when absent.
    """

    def __init__(self, layout: RecordLayout, compressor: zstandard.ZstdCompressor | None = None) -> None:
        self.layout = layout
        self._compressor = compressor or zstandard.ZstdCompressor(level=layout.zstd_level)
        self._dtype = np.dtype(layout.dtype)
        self._group_ND = np.empty((layout.group_frames, *layout.item_shape), self._dtype)
        self._scratch_ND: np.ndarray | None = None
        self.restart()

    def restart(self) -> None:
        """Forget everything; the next item is the first of a new episode."""
        self._filled = 0
        self._payloads: list[bytes] = []
        self._actions: list[int] = []
        self._rewards: list[float] = []
        self._scan: int | None = None
        self._digest = _start_digest(self.layout.item_shape, self._dtype)

    @property
    def num_frames(self) -> int:
        """Items seen so far."""
        return len(self._payloads) * self.layout.group_frames + self._filled

    def add_item(self, item_D: np.ndarray) -> None:
        """Take the next frame (or its tokens)."""
        if item_D.shape != self.layout.item_shape or item_D.dtype != self._dtype:
            raise DataError(
                f"item {self.num_frames} has shape {item_D.shape} and dtype {item_D.dtype}, expected "
                f"{self.layout.item_shape} and {self._dtype}: resize or convert it first"
            )
        self._group_ND[self._filled] = item_D
        self._filled += 1
        if self._filled == self.layout.group_frames:
            self._flush()

    def add_step(self, action: int, reward: float) -> None:
        """Take the action taken at the oldest frame that has none yet, and the reward that followed it."""
        self._actions.append(action)
        self._rewards.append(reward)

    def finish(self, *, level_seed: int, end: int, level_complete: int = -1) -> EncodedEpisode:
        """Close the episode and start the next.

        Args:
            level_seed: -1 when there is none.
            end: one of END_CUT, END_TERMINAL, END_OF_VIDEO.
            level_complete: 1 reached the goal, 0 did not, -1 unknown.

        Raises:
            DataError: no items, items and actions of different number, or an action outside [-1, num_actions).
        """
        num_frames = self.num_frames
        if num_frames == 0:
            raise DataError("an episode without frames cannot be stored")
        if len(self._actions) != num_frames:
            raise DataError(
                f"{num_frames} frames but {len(self._actions)} actions: one action a frame is needed, -1 where unknown"
            )
        if end not in END_NAMES:
            raise DataError(f"episode end {end!r}: expected one of {sorted(END_NAMES)}")
        actions_N = np.asarray(self._actions, np.int64)
        check_actions(actions_N, self.layout.num_actions, where="a new episode")
        if self._filled:
            self._flush()
        actions_N = actions_N.astype(np.int16)
        rewards_N = np.asarray(self._rewards, np.float32)
        episode = EncodedEpisode(
            payloads=tuple(self._payloads),
            scan=_SCAN_ROWS if self._scan is None else self._scan,
            codec=_CODEC_ZSTD,
            actions_N=actions_N,
            rewards_N=rewards_N,
            level_seed=int(level_seed),
            end=int(end),
            level_complete=int(level_complete),
            digest=_finish_digest(self._digest, actions_N, rewards_N, int(level_seed)),
        )
        self.restart()
        return episode

    def _flush(self) -> None:
        group_ND = self._group_ND[: self._filled]
        self._digest.update(group_ND)
        if self._scan is None and self.layout.can_scan_columns and self.layout.scan == "auto":
            rows, columns = self._compress(group_ND), self._compress_columns(group_ND)
            self._scan = _SCAN_COLUMNS if len(columns) < len(rows) else _SCAN_ROWS
            self._payloads.append(columns if self._scan == _SCAN_COLUMNS else rows)
        else:
            if self._scan is None:
                columns_wanted = self.layout.can_scan_columns and self.layout.scan == "columns"
                self._scan = _SCAN_COLUMNS if columns_wanted else _SCAN_ROWS
            compress = self._compress_columns if self._scan == _SCAN_COLUMNS else self._compress
            self._payloads.append(compress(group_ND))
        self._filled = 0

    def _compress(self, group_ND: np.ndarray) -> bytes:
        return self._compressor.compress(group_ND.data)

    def _compress_columns(self, group_NHWC: np.ndarray) -> bytes:
        height, width, channels = self.layout.item_shape
        if self._scratch_ND is None:
            self._scratch_ND = np.empty((self.layout.group_frames, width, height, channels), self._dtype)
        scratch_NWHC = self._scratch_ND[: len(group_NHWC)]
        _transpose_images(group_NHWC, scratch_NWHC)
        return self._compress(scratch_NWHC)


def encode_episode(
    layout: RecordLayout,
    items_ND: np.ndarray,
    actions_N: np.ndarray | None = None,
    rewards_N: np.ndarray | None = None,
    *,
    level_seed: int = -1,
    end: int = END_OF_VIDEO,
    level_complete: int = -1,
) -> EncodedEpisode:
    """Compress a whole episode that is in memory; absent actions are unknown, absent rewards 0."""
    count = len(items_ND)
    actions = [UNKNOWN_ACTION] * count if actions_N is None else np.asarray(actions_N).tolist()
    rewards = [0.0] * count if rewards_N is None else np.asarray(rewards_N).tolist()
    if len(actions) != count or len(rewards) != count:
        raise DataError(
            f"{count} frames, {len(actions)} actions and {len(rewards)} rewards: one of each a frame is needed"
        )
    encoder = EpisodeEncoder(layout)
    for item_D, action, reward in zip(items_ND, actions, rewards, strict=True):
        encoder.add_item(item_D)
        encoder.add_step(action, reward)
    return encoder.finish(level_seed=level_seed, end=end, level_complete=level_complete)


class RecordWriter:
    """Writes one ArrayRecord file under a temporary name and moves it into place when closed without an error.

    Use it as a context manager; an exception inside leaves nothing behind.

    Args:
        path: final name of the file.
        layout: shape and encoding of the items.
        kind: "frames" or "tokens".
    """

    def __init__(self, path: Path, layout: RecordLayout, *, kind: str = "frames") -> None:
        self.path = Path(path)
        self.layout = layout
        self.kind = kind
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        self._writer = array_record_module.ArrayRecordWriter(str(self._temporary), _WRITER_OPTIONS)
        self._num_records = 0
        self._num_frames = 0
        self._first_records: list[int] = []
        self._episodes: list[tuple[int, int, int, int, bytes]] = []
        self.summary: FileSummary | None = None

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._writer.close()
            self._temporary.unlink(missing_ok=True)

    def write(self, episode: EncodedEpisode) -> None:
        """Append one episode."""
        group_frames = self.layout.group_frames
        dimensions = self.layout.item_shape + (1,) * (3 - len(self.layout.item_shape))
        dtype_code = _DTYPES.index(np.dtype(self.layout.dtype))
        self._first_records.append(self._num_records)
        for number, payload in enumerate(episode.payloads):
            start = number * group_frames
            actions_N = episode.actions_N[start : start + group_frames]
            rewards_N = episode.rewards_N[start : start + group_frames]
            header = _GROUP_HEADER.pack(
                _GROUP_MAGIC,
                FORMAT_VERSION,
                episode.codec,
                episode.scan,
                dtype_code,
                len(self._episodes),
                start,
                len(actions_N),
                *dimensions,
                len(payload),
                0,
            )
            record = (header, actions_N.astype("<i2").tobytes(), rewards_N.astype("<f4").tobytes(), payload)
            self._writer.write(b"".join(record))
            self._num_records += 1
        self._num_frames += episode.num_frames
        self._episodes.append(
            (episode.num_frames, episode.level_seed, episode.end, episode.level_complete, episode.digest)
        )

    def close(self) -> FileSummary:
        """Write the index, sync and move the file into place."""
        if self.summary is not None:
            return self.summary
        frames, seeds, ends, completes, digests = zip(*self._episodes, strict=True) if self._episodes else ((),) * 5
        index = {
            "version": FORMAT_VERSION,
            "kind": self.kind,
            "item_shape": list(self.layout.item_shape),
            "dtype": np.dtype(self.layout.dtype).name,
            "group_frames": self.layout.group_frames,
            "num_actions": self.layout.num_actions,
            "first_record": np.asarray(self._first_records, "<u4").tobytes(),
            "frames": np.asarray(frames, "<u4").tobytes(),
            "level_seed": np.asarray(seeds, "<i8").tobytes(),
            "end": np.asarray(ends, "u1").tobytes(),
            "level_complete": np.asarray(completes, "i1").tobytes(),
            "digest": b"".join(digests),
        }
        packed = msgpack.packb(index)
        assert isinstance(packed, bytes)
        self._writer.write(_INDEX_MAGIC + packed)
        self._writer.close()
        with open(self._temporary, "rb+") as file:
            os.fsync(file.fileno())
        digest = sha256_of_file(self._temporary)
        size_bytes = self._temporary.stat().st_size
        os.replace(self._temporary, self.path)
        self.summary = FileSummary(
            name=self.path.name,
            bytes=size_bytes,
            sha256=digest,
            content_sha256=content_digest(digests),
            episodes=len(self._episodes),
            frames=self._num_frames,
        )
        return self.summary


# ------------------------------------------------------------------------------------------------------------- manifest


def read_manifest(data_dir: str | Path) -> dict[str, Any]:
    """Read and check `manifest.json`.

    Raises:
        DataError: missing, not JSON, of another format or version, or without a field that readers need.
    """
    path = Path(data_dir) / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path}: not found. A data set is a folder with this file: make one with `python -m worldmodel collect` "
            "or `python -m worldmodel import`"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}): restore it or collect the data set again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT_NAME:
        raise DataError(f'{path}: not a world-model data set (expected "format": "{FORMAT_NAME}")')
    if manifest.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {manifest.get('version')!r}, this code reads version {FORMAT_VERSION}: collect "
            "again"
        )
    needed = {
        "kind": str,
        "item_shape": list,
        "dtype": str,
        "group_frames": int,
        "num_actions": int,
        "action_names": list,
        "splits": dict,
        "content_sha256": str,
    }
    for name, kind in needed.items():
        if not isinstance(manifest.get(name), kind):
            raise DataError(f"{path}: field {name!r} is {manifest.get(name)!r}, expected a {kind.__name__}")
    for name, split in manifest["splits"].items():
        files = split.get("files") if isinstance(split, dict) else None
        if not isinstance(files, list):
            raise DataError(f"{path}: split {name!r} has no list of files: restore it or collect the data set again")
        pairs = split.get("level_ranges", [])
        ends = [end for pair in pairs for end in pair] if _is_list_of_pairs(pairs) else [None]
        if any(type(end) is not int for end in ends):
            raise DataError(f"{path}: level_ranges of split {name!r} are {str(pairs)[:80]}, expected pairs of levels")
        if files and not _is_hex(split.get("content_sha256")):
            raise DataError(f"{path}: split {name!r} has no digest of its content: restore it")
        for entry in files:
            _check_entry(entry, f"{path}, split {name!r}")
    return manifest


def _is_list_of_pairs(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)


def _is_hex(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _check_entry(entry: Any, where: str) -> None:
    """A file's entry has what `FileSummary` has, and names a file in the data set's own folder."""
    if not isinstance(entry, dict):
        raise DataError(f"{where}: a file's entry is {entry!r}, expected an object")
    name = entry.get("name")
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
        raise DataError(f"{where}: a file is named {name!r}, expected the name of a file in this folder")
    for count in ("bytes", "episodes", "frames"):
        if type(entry.get(count)) is not int or not 0 <= entry[count] < 1 << 62:
            raise DataError(f"{where}: {count} of {name!r} is {entry.get(count)!r}, expected a count")
    for digest in ("sha256", "content_sha256"):
        if not _is_hex(entry.get(digest)):
            raise DataError(f"{where}: {digest} of {name!r} is {entry.get(digest)!r}, expected 64 hexadecimal digits")


def write_manifest(data_dir: str | Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write `manifest.json` atomically, with the totals and digests of its splits filled in.

    Args:
        data_dir: the data set's folder.
        manifest: `splits` maps a split's name to a dict whose `files` are `FileSummary` dicts.

    Returns:
        The manifest as written.
    """
    manifest = {**manifest, "format": FORMAT_NAME, "version": FORMAT_VERSION}
    splits = {}
    for name, split in manifest["splits"].items():
        files = split["files"]
        splits[name] = {
            **split,
            "episodes": sum(file["episodes"] for file in files),
            "frames": sum(file["frames"] for file in files),
            "bytes": sum(file["bytes"] for file in files),
            "content_sha256": content_digest(bytes.fromhex(file["content_sha256"]) for file in files),
        }
    manifest["splits"] = splits
    names = sorted(splits)
    manifest["content_sha256"] = content_digest(
        part for name in names for part in (name.encode(), bytes.fromhex(splits[name]["content_sha256"]))
    )
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    write_atomically(Path(data_dir) / MANIFEST_NAME, text.encode())
    return manifest


def split_file_name(split: str, number: int) -> str:
    """Name of a split's file."""
    return f"{split}-{number:05d}.array_record"


# -------------------------------------------------------------------------------------------------------------- reading


def check_actions(actions: np.ndarray, num_actions: int, *, where: str) -> None:
    """Raise DataError unless every action is -1 (unknown) or in [0, num_actions)."""
    if actions.size and (int(actions.min()) < UNKNOWN_ACTION or int(actions.max()) >= num_actions):
        wrong = actions[(actions < UNKNOWN_ACTION) | (actions >= num_actions)].reshape(-1)[0]
        raise DataError(
            f"{where}: action {int(wrong)} is outside [0, {num_actions}) (-1 means unknown): the data set declares "
            f"{num_actions} actions; correct the actions or the number"
        )


@dataclasses.dataclass(frozen=True)
class _FileIndex:
    first_record_E: np.ndarray
    frames_E: np.ndarray
    level_seed_E: np.ndarray
    end_E: np.ndarray
    level_complete_E: np.ndarray
    digests: tuple[bytes, ...]


class RecordFile:
    """Random access to the groups of one file; safe to use from several threads.

    Args:
        path: the file.
        layout: what the manifest says about its items.
        kind: "frames" or "tokens".
        expected: the manifest's entry for the file; size and counts are checked against it.

    Raises:
        DataError: missing, damaged, of another size or layout than the manifest says.
    """

    def __init__(
        self, path: Path, layout: RecordLayout, *, kind: str = "frames", expected: Mapping[str, Any] | None = None
    ) -> None:
        self.path = Path(path)
        self.layout = layout
        self.kind = kind
        self._dtype = np.dtype(layout.dtype)
        self._dimensions = layout.item_shape + (1,) * (3 - len(layout.item_shape))
        self._local = threading.local()
        try:
            size_bytes = self.path.stat().st_size
        except OSError as error:
            raise DataError(
                f"{self.path}: listed in the manifest but not readable ({error}): restore the file"
            ) from error
        if expected is not None and size_bytes != expected["bytes"]:
            raise DataError(
                f"{self.path}: {size_bytes} bytes, the manifest says {expected['bytes']}: truncated or replaced; "
                "restore it"
            )
        self._reader = array_record_module.ArrayRecordReader(
            str(self.path), options=_READER_OPTIONS, file_reader_buffer_size=4096
        )
        if not self._reader.ok() or self._reader.num_records() < 1:
            raise DataError(f"{self.path}: not a complete ArrayRecord file: truncated or damaged; restore it")
        self.num_groups = self._reader.num_records() - 1
        self.index = self._read_index()
        if expected is not None:
            counts = (len(self.index.frames_E), int(self.index.frames_E.sum()))
            if counts != (expected["episodes"], expected["frames"]):
                raise DataError(
                    f"{self.path}: holds {counts[0]} episodes and {counts[1]} frames, the manifest says "
                    f"{expected['episodes']} and {expected['frames']}: file and manifest belong to different data sets"
                )

    def _read_raw(self, record: int) -> bytes:
        # One record a call: the reader hands a range to its thread pool, costing more than it saves.
        try:
            return self._reader.read(record, record + 1)[0]
        except (RuntimeError, IndexError, ValueError) as error:
            raise DataError(f"{self.path}, record {record}: damaged ({error}): restore the file") from error

    def _read_index(self) -> _FileIndex:
        number = self.num_groups
        raw = self._read_raw(number)
        where = f"{self.path}, record {number} (index)"
        if raw[:4] != _INDEX_MAGIC:
            raise DataError(f"{where}: does not start with {_INDEX_MAGIC!r}: not a file of this format")
        try:
            index = msgpack.unpackb(raw[4:])
            if not isinstance(index, dict) or index["version"] != FORMAT_VERSION:
                raise ValueError(f"not a map of version {FORMAT_VERSION}")
            columns = [
                np.frombuffer(index[name], dtype)
                for name, dtype in (
                    ("first_record", "<u4"),
                    ("frames", "<u4"),
                    ("level_seed", "<i8"),
                    ("end", "u1"),
                    ("level_complete", "i1"),
                )
            ]
            digests = index["digest"]
            stored = (tuple(index["item_shape"]), str(index["dtype"]), int(index["group_frames"]), str(index["kind"]))
            if {len(column) for column in columns} | {len(digests) // 32} != {len(columns[0])} or len(digests) % 32:
                raise ValueError("columns of different lengths")
        except (KeyError, TypeError, ValueError, msgpack.UnpackException) as error:
            raise DataError(f"{where}: malformed ({error!r}): restore the file") from error
        wanted = (self.layout.item_shape, self._dtype.name, self.layout.group_frames, self.kind)
        if stored != wanted:
            raise DataError(
                f"{where}: items are (shape, dtype, group, kind) {stored}, the manifest says {wanted}: frames of "
                "another size or a file of another data set; remove it or import the data again"
            )
        first_E, frames_E = columns[0].astype(np.int64), columns[1].astype(np.int64)
        groups_E = -(-frames_E // self.layout.group_frames)
        if not np.array_equal(first_E, np.cumsum(groups_E) - groups_E) or int(groups_E.sum()) != self.num_groups:
            raise DataError(f"{where}: its episodes do not cover the file's {self.num_groups} groups: restore the file")
        return _FileIndex(
            first_record_E=first_E,
            frames_E=frames_E,
            level_seed_E=columns[2],
            end_E=columns[3],
            level_complete_E=columns[4],
            digests=tuple(digests[i : i + 32] for i in range(0, len(digests), 32)),
        )

    def _parse(self, raw: bytes, record: int, episode: int, first_frame: int, count: int) -> tuple[int, int, int]:
        """Check a group's header; returns (codec, scan, offset of the payload)."""
        fault = None
        if len(raw) < _GROUP_HEADER.size:
            fault = f"{len(raw)} bytes, shorter than a header"
        else:
            header = _GROUP_HEADER.unpack_from(raw)
            magic, version, codec, scan, dtype_code, got_episode, got_first, n, *dims, payload_bytes, reserved = header
            offset = _GROUP_HEADER.size + 6 * n
            if magic != _GROUP_MAGIC or version != FORMAT_VERSION or reserved != 0:
                fault = f"header {magic!r} version {version}, expected {_GROUP_MAGIC!r} version {FORMAT_VERSION}"
            elif tuple(dims) != self._dimensions or dtype_code != _DTYPES.index(self._dtype):
                dtype_name = _DTYPES[dtype_code].name if dtype_code < len(_DTYPES) else f"code {dtype_code}"
                fault = (
                    f"items of shape {tuple(dims)} and dtype {dtype_name}, "
                    f"expected {self._dimensions} and {self._dtype.name}"
                )
            elif (got_episode, got_first, n) != (episode, first_frame, count):
                fault = (
                    f"{n} frames from frame {got_first} of episode {got_episode}, "
                    f"expected {count} from {first_frame} of {episode}"
                )
            elif codec not in (_CODEC_RAW, _CODEC_ZSTD) or scan not in (_SCAN_ROWS, _SCAN_COLUMNS):
                fault = f"unknown codec {codec} or scan order {scan}"
            elif scan == _SCAN_COLUMNS and not self.layout.can_scan_columns:
                fault = "column scan order of items that are no images"
            elif len(raw) != offset + payload_bytes:
                fault = f"{len(raw)} bytes, its header says {offset + payload_bytes}"
            else:
                return codec, scan, offset
        raise DataError(f"{self.path}, record {record}: {fault}: damaged or of another data set; restore the file")

    def _scratch(self) -> np.ndarray:
        scratch = getattr(self._local, "scratch", None)
        if scratch is None:
            scratch = np.empty((self.layout.group_frames, *self.layout.item_shape), self._dtype)
            self._local.scratch = scratch
            self._local.decompressor = zstandard.ZstdDecompressor()
        return scratch

    def _decode(
        self, raw: bytes, record: int, codec: int, scan: int, offset: int, start: int, out_ND: np.ndarray
    ) -> None:
        """Decode items [start, start + len(out)) of a group into `out`, C-contiguous; later items stay encoded."""
        scratch_ND = self._scratch()
        count = len(out_ND)
        direct = start == 0 and scan == _SCAN_ROWS
        target_ND = out_ND if direct else scratch_ND[: start + count]
        target = target_ND.reshape(-1).view(np.uint8)
        payload = memoryview(raw)[offset:]
        try:
            if codec == _CODEC_RAW:
                target[:] = np.frombuffer(payload, np.uint8, target.size)
                got_bytes = target.size
            else:
                with self._local.decompressor.stream_reader(payload, closefd=False) as stream:
                    got_bytes = stream.readinto(target)
        except (zstandard.ZstdError, ValueError) as error:
            raise DataError(
                f"{self.path}, record {record}: payload does not decode ({error}): restore the file"
            ) from error
        if got_bytes != target.size:
            raise DataError(
                f"{self.path}, record {record}: payload decodes to {got_bytes} of {target.size} bytes: restore the file"
            )
        if scan == _SCAN_COLUMNS:
            height, width, channels = self.layout.item_shape
            columns_NWHC = target_ND.reshape(-1, width, height, channels)
            _transpose_images(columns_NWHC[start:], out_ND)
        elif not direct:
            out_ND[...] = target_ND[start:]

    def read_span(
        self,
        episode: int,
        start: int,
        count: int,
        *,
        items_ND: np.ndarray | None,
        actions_N: np.ndarray,
        rewards_N: np.ndarray | None = None,
        check: bool = True,
    ) -> None:
        """Decode frames [start, start + count) of an episode of this file into the given arrays.

        Args:
            episode: counted in this file.
            start: first frame.
            count: number of frames; the span lies inside the episode.
            items_ND: (count, *item_shape) C-contiguous, or None when items are not wanted.
            actions_N: (count,) of any integer dtype.
            rewards_N: (count,) or None.
            check: whether actions are checked here; a caller that reads many spans checks them all at once.

        Raises:
            DataError: a record that the span touches is damaged; the message names file and record.
        """
        group_frames = self.layout.group_frames
        num_frames = int(self.index.frames_E[episode])
        assert start >= 0
        assert 0 < count <= num_frames - start
        first_group, last_group = start // group_frames, (start + count - 1) // group_frames
        first_record = int(self.index.first_record_E[episode])
        done = 0
        for group in range(first_group, last_group + 1):
            group_start = group * group_frames
            group_count = min(group_frames, num_frames - group_start)
            low = max(start - group_start, 0)
            high = min(start + count - group_start, group_count)
            record = first_record + group
            raw = self._read_raw(record)
            codec, scan, offset = self._parse(raw, record, episode, group_start, group_count)
            actions = np.frombuffer(raw, "<i2", group_count, _GROUP_HEADER.size)[low:high]
            if check:
                check_actions(actions, self.layout.num_actions, where=f"{self.path}, record {record}")
            taken = slice(done, done + high - low)
            actions_N[taken] = actions
            if rewards_N is not None:
                rewards_offset = _GROUP_HEADER.size + 2 * group_count
                rewards_N[taken] = np.frombuffer(raw, "<f4", group_count, rewards_offset)[low:high]
            if items_ND is not None:
                self._decode(raw, record, codec, scan, offset, low, items_ND[taken])
            done += high - low

    def close(self) -> None:
        """Release the file."""
        self._reader.close()


def layout_of(manifest: Mapping[str, Any]) -> RecordLayout:
    """The layout that a manifest describes."""
    return RecordLayout(
        item_shape=tuple(manifest["item_shape"]),
        dtype=manifest["dtype"],
        num_actions=manifest["num_actions"],
        group_frames=manifest["group_frames"],
    )


class EpisodeSet:
    """One split of a data set: random access to episodes and to windows of T consecutive frames.

    Windows are numbered 0 .. num_windows(T) - 1 over all episodes of at least T frames, every start once: drawing
    numbers uniformly draws windows uniformly.

    Args:
        data_dir: folder of the data set.
        split: "train", "val" or "test" (or another name that the manifest has).

    Raises:
        DataError: the set, the split or a file is missing, damaged or empty.
    """

    def __init__(self, data_dir: str | Path, split: str) -> None:
        self.data_dir = Path(data_dir)
        self.split = split
        self.manifest = read_manifest(self.data_dir)
        splits = self.manifest["splits"]
        if split not in splits:
            raise DataError(f"{self.data_dir}: has no split {split!r}, it has {sorted(splits)}: name one of them")
        entries = splits[split]["files"]
        if not entries:
            raise DataError(f"{self.data_dir}: split {split!r} is empty: collect or import data for it")
        self.layout = layout_of(self.manifest)
        self.kind: str = self.manifest["kind"]
        self.files = [
            RecordFile(self.data_dir / entry["name"], self.layout, kind=self.kind, expected=entry) for entry in entries
        ]
        self.frames_E = np.concatenate([file.index.frames_E for file in self.files])
        if not len(self.frames_E):
            raise DataError(f"{self.data_dir}: split {split!r} holds no episode: collect or import data for it")
        self._file_E = np.repeat(np.arange(len(self.files)), [len(file.index.frames_E) for file in self.files])
        self._in_file_E = np.concatenate([np.arange(len(file.index.frames_E)) for file in self.files])
        self._window_ends: dict[int, np.ndarray] = {}
        self._episodes: list[EpisodeInfo] | None = None

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of one item: (H, W, C) of frames, (tokens,) of tokens."""
        return self.layout.item_shape

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """(H, W, C) of a frame, also for a token set, where it is the shape of the frames that were tokenised."""
        return tuple(self.manifest.get("frame_shape", self.manifest["item_shape"]))

    @property
    def num_actions(self) -> int:
        """Number of actions; 0 for video without actions."""
        return self.layout.num_actions

    @property
    def action_names(self) -> list[str]:
        """One name an action."""
        return list(self.manifest["action_names"])

    @property
    def fps(self) -> float:
        """Frames a second of the recording."""
        return float(self.manifest.get("fps") or 15.0)

    @property
    def content_sha256(self) -> str:
        """Digest of this split's content."""
        return str(self.manifest["splits"][self.split]["content_sha256"])

    @property
    def num_frames(self) -> int:
        """Frames of all episodes."""
        return int(self.frames_E.sum())

    @property
    def num_episodes(self) -> int:
        """Number of episodes."""
        return len(self.frames_E)

    @property
    def episodes(self) -> list[EpisodeInfo]:
        """One entry an episode, in order."""
        if self._episodes is None:
            self._episodes = []
            for file_index, file in enumerate(self.files):
                index = file.index
                for number in range(len(index.frames_E)):
                    self._episodes.append(
                        EpisodeInfo(
                            index=len(self._episodes),
                            file_index=file_index,
                            first_record=int(index.first_record_E[number]),
                            num_frames=int(index.frames_E[number]),
                            level_seed=int(index.level_seed_E[number]),
                            end=int(index.end_E[number]),
                            level_complete=int(index.level_complete_E[number]),
                            digest=index.digests[number].hex(),
                        )
                    )
        return self._episodes

    def _ends(self, seq_len: int) -> np.ndarray:
        ends = self._window_ends.get(seq_len)
        if ends is None:
            if seq_len < 1:
                raise DataError(f"window length {seq_len}: expected at least 1 frame")
            ends = np.cumsum(np.maximum(self.frames_E - seq_len + 1, 0))
            self._window_ends[seq_len] = ends
        return ends

    def num_windows(self, seq_len: int) -> int:
        """Number of windows of `seq_len` consecutive frames inside one episode."""
        return int(self._ends(seq_len)[-1])

    def require_windows(self, seq_len: int) -> int:
        """`num_windows`, refusing a split that has none.

        Raises:
            DataError: every episode is shorter than the window.
        """
        count = self.num_windows(seq_len)
        if count == 0:
            raise DataError(
                f"{self.data_dir}, split {self.split!r}: no episode has {seq_len} frames (the longest has "
                f"{int(self.frames_E.max())}): lower the sequence length or collect longer episodes"
            )
        return count

    def locate(self, window: int, seq_len: int) -> tuple[int, int]:
        """(episode, first frame) of a window's number."""
        ends = self._ends(seq_len)
        if not 0 <= window < ends[-1]:
            raise DataError(f"window {window}: expected a number in [0, {int(ends[-1])}) for {seq_len} frames")
        episode = int(np.searchsorted(ends, window, side="right"))
        return episode, int(window - (ends[episode - 1] if episode else 0))

    def read(
        self, episode: int, start: int = 0, count: int | None = None, *, with_items: bool = True
    ) -> dict[str, np.ndarray]:
        """Read part of one episode.

        Returns:
            `items` (count, *item_shape), `actions` (count,) int32, `rewards` (count,) float32.
        """
        if not 0 <= episode < self.num_episodes:
            raise DataError(f"episode {episode}: split {self.split!r} has {self.num_episodes}, numbered from 0")
        count = int(self.frames_E[episode]) - start if count is None else count
        if start < 0 or count < 1 or start + count > self.frames_E[episode]:
            raise DataError(
                f"frames [{start}, {start + count}) of episode {episode}, which has {int(self.frames_E[episode])} "
                "frames"
            )
        items = np.empty((count, *self.item_shape), self.layout.dtype) if with_items else None
        actions, rewards = np.empty(count, np.int32), np.empty(count, np.float32)
        file = self.files[self._file_E[episode]]
        file.read_span(
            int(self._in_file_E[episode]), start, count, items_ND=items, actions_N=actions, rewards_N=rewards
        )
        result = {"actions": actions, "rewards": rewards}
        if items is not None:
            result["items"] = items
        return result

    def window(self, window: int, seq_len: int) -> dict[str, np.ndarray]:
        """One window: `items` (T, *item_shape), `actions` (T,), `rewards` (T,)."""
        return self.read(*self.locate(window, seq_len), seq_len)

    def windows(
        self, windows: Sequence[int] | np.ndarray, seq_len: int, *, with_items: bool = True
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Several windows, each decoded straight into its row of the batch.

        Returns:
            items_BTD (B, T, *item_shape) or None, and actions_BT (B, T) int32.
        """
        batch = len(windows)
        items_BTD = np.empty((batch, seq_len, *self.item_shape), self.layout.dtype) if with_items else None
        actions_BT = np.empty((batch, seq_len), np.int32)
        spans = [self.locate(int(window), seq_len) for window in windows]
        for row, (episode, start) in enumerate(spans):
            self.files[self._file_E[episode]].read_span(
                int(self._in_file_E[episode]),
                start,
                seq_len,
                items_ND=None if items_BTD is None else items_BTD[row],
                actions_N=actions_BT[row],
                check=False,
            )
        if batch and not UNKNOWN_ACTION <= actions_BT.min() <= actions_BT.max() < self.num_actions:
            for row, (episode, start) in enumerate(spans):  # Read again with the check that names the record.
                file = self.files[self._file_E[episode]]
                file.read_span(int(self._in_file_E[episode]), start, seq_len, items_ND=None, actions_N=actions_BT[row])
        return items_BTD, actions_BT

    def fixed_window_ids(self, count: int, seq_len: int, seed: int = 0) -> np.ndarray:
        """Numbers of `count` different windows, uniform over all windows, the same for the same data and seed.

        Raises:
            DataError: the split has fewer windows than asked for.
        """
        available = self.require_windows(seq_len)
        if count > available:
            raise DataError(
                f"{self.data_dir}, split {self.split!r}: {count} clips of {seq_len} frames wanted, it has {available} "
                "windows: ask for fewer or collect more"
            )
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, seq_len])))
        return np.sort(generator.choice(available, size=count, replace=False, shuffle=False))

    def fixed_windows(self, count: int, seq_len: int, seed: int = 0) -> dict[str, np.ndarray]:
        """The fixed clip set that evaluations of this split share.

        Returns:
            `frames_BTHWC` uint8 (or `tokens_BTN` of a token set), `actions_BT` int32, `windows_B` int64.
        """
        ids = self.fixed_window_ids(count, seq_len, seed)
        items_BTD, actions_BT = self.windows(ids, seq_len)
        assert items_BTD is not None
        name = "frames_BTHWC" if self.kind == "frames" else "tokens_BTN"
        items_BTD = items_BTD if self.kind == "frames" else items_BTD.astype(np.int32)
        return {name: items_BTD, "actions_BT": actions_BT, "windows_B": ids}

    def close(self) -> None:
        """Release all files."""
        for file in self.files:
            file.close()


def open_dataset(data_dir: str | Path, split: str = "train") -> EpisodeSet:
    """Open one split of a data set. See `EpisodeSet`."""
    return EpisodeSet(data_dir, split)


# ----------------------------------------------------------------------------------------------------------- validation


@dataclasses.dataclass(frozen=True)
class Problem:
    """One fault that the validator found."""

    file: str
    record: int | None
    fault: str


def find_problems(data_dir: str | Path, splits: Sequence[str] | None = None) -> list[Problem]:
    """Read every byte of a data set and decode every record.

    Checks file digests, every group, every action, every episode's content digest, the index against the manifest, and
    that level ranges of splits do not overlap.

    Args:
        data_dir: folder of the data set.
        splits: which splits; all by default.

    Returns:
        All faults found, empty for a sound set.

    Raises:
        DataError: the manifest itself is missing or malformed, or a split is unknown.
    """
    data_dir = Path(data_dir)
    manifest = read_manifest(data_dir)
    layout = layout_of(manifest)
    problems: list[Problem] = []
    for split in splits if splits is not None else sorted(manifest["splits"]):
        if split not in manifest["splits"]:
            raise DataError(f"{data_dir}: has no split {split!r}, it has {sorted(manifest['splits'])}")
        for entry in manifest["splits"][split]["files"]:
            problems += _problems_of_file(data_dir / entry["name"], layout, manifest["kind"], entry)
        for start, stop in manifest["splits"][split].get("level_ranges", []):
            for other, (other_start, other_stop) in (
                (name, pair)
                for name, value in manifest["splits"].items()
                if name < split
                for pair in value.get("level_ranges", [])
            ):
                if start < other_stop and other_start < stop:
                    problems.append(
                        Problem(
                            MANIFEST_NAME, None, f"levels [{start}, {stop}) of {split!r} overlap those of {other!r}"
                        )
                    )
    return problems


def _problems_of_file(path: Path, layout: RecordLayout, kind: str, entry: Mapping[str, Any]) -> list[Problem]:
    problems = []
    try:
        file = RecordFile(path, layout, kind=kind, expected=entry)
    except DataError as error:
        return [Problem(entry["name"], None, str(error))]
    if sha256_of_file(path) != entry["sha256"]:
        problems.append(Problem(entry["name"], None, "its bytes do not have the SHA-256 that the manifest gives"))
    group_frames = layout.group_frames
    for episode, num_frames in enumerate(file.index.frames_E):
        num_frames = int(num_frames)
        first_record = int(file.index.first_record_E[episode])
        digest = _start_digest(layout.item_shape, np.dtype(layout.dtype))
        actions_N, rewards_N = np.empty(num_frames, np.int16), np.empty(num_frames, np.float32)
        sound = True
        for start in range(0, num_frames, group_frames):
            count = min(group_frames, num_frames - start)
            items_ND = np.empty((count, *layout.item_shape), layout.dtype)
            span = slice(start, start + count)
            try:
                file.read_span(
                    episode, start, count, items_ND=items_ND, actions_N=actions_N[span], rewards_N=rewards_N[span]
                )
            except DataError as error:
                problems.append(Problem(entry["name"], first_record + start // group_frames, str(error)))
                sound = False
                continue
            digest.update(items_ND)
        if not sound:
            continue
        found = _finish_digest(digest, actions_N, rewards_N, int(file.index.level_seed_E[episode]))
        if found != file.index.digests[episode]:
            fault = f"{path}, episode {episode}: content does not have the digest that the file's index gives"
            problems.append(Problem(entry["name"], first_record, fault))
    if content_digest(file.index.digests) != entry["content_sha256"]:
        problems.append(
            Problem(entry["name"], file.num_groups, "the index does not have the manifest's content digest")
        )
    file.close()
    return problems
