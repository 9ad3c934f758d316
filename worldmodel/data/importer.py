"""Bring your own data: videos or folders of images, with actions if there are any, into the records that training
reads.

What counts as one video: a file that ffmpeg or Pillow can play (mp4, webm, mkv, avi, mov, gif), or a folder that holds
images directly, in natural order of their names (frame2 before frame10). Its name is its path relative to the source
folder.

Actions, one a source frame, in one file:

    csv    columns `video`, `frame`, `action`; `video` may be left out when there is one video, `frame` when rows are in
    order jsonl  one such object a line, or {"video": ..., "actions": [...]}
    npz    one 1-D array a video, named as the video (or as its file name without the ending)

Actions are integers, or names, which are then numbered in alphabetical order. A frame without an action gets -1
(unknown).

Letters: N frames, H height, W width, C channels.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from rich.progress import Progress

from common.errors import ConfigError, DataError
from worldmodel.data.records import (
    END_CUT,
    END_OF_VIDEO,
    MANIFEST_NAME,
    SPLITS,
    UNKNOWN_ACTION,
    EncodedEpisode,
    EpisodeEncoder,
    RecordLayout,
    RecordWriter,
    Scan,
    sha256_of_file,
    split_file_name,
    write_manifest,
)

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_FILE_FRAMES = 65_536

ResizeMode = Literal["crop", "pad", "stretch"]


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """Turn videos or image folders into a data set."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """A folder of videos and image folders, or one video."""
    out_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder of the data set."""
    actions: Path | None = None
    """csv, jsonl or npz with one action a source frame."""
    height: int = 64
    width: int = 64
    resize: ResizeMode = "crop"
    """Another aspect ratio: cut the middle out, pad with black, or stretch."""
    fps: float | None = None
    """Frames a second to keep; all by default. A kept frame has the action of that source frame."""
    source_fps: float | None = None
    """Frames a second of the source where the file does not say (image folders: 15 by default) or says it wrongly."""
    num_actions: int | None = None
    """Number of actions; the largest one that occurs + 1 by default."""
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    """Share of the videos; with fewer than three videos, share of the end of each."""
    seed: int = 0
    """Decides which videos go where."""
    group_frames: int = 16
    zstd_level: int = 9
    scan: Scan = "auto"
    overwrite: bool = False
    """Replace the data set in `out_dir`."""
    quiet: bool = False


@dataclasses.dataclass(frozen=True)
class SourceVideo:
    """One video of the source."""

    name: str
    path: Path
    images: tuple[Path, ...] = ()


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def find_videos(source: Path) -> list[SourceVideo]:
    """Videos of a folder, in natural order of their names.

    Raises:
        DataError: nothing there.
    """
    if source.is_file():
        return [SourceVideo(source.name, source)]
    if not source.is_dir():
        raise DataError(f"{source}: not found: name a folder of videos or image folders, or one video")
    videos = [
        SourceVideo(path.relative_to(source).as_posix(), path)
        for path in source.rglob("*")
        if path.is_file() and path.suffix.lower() in (*VIDEO_SUFFIXES, ".gif")
    ]
    for folder in (source, *(path for path in source.rglob("*") if path.is_dir())):
        images = [path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES]
        if images:
            name = folder.relative_to(source).as_posix() if folder != source else source.name
            images.sort(key=lambda path: _natural_key(path.name))
            videos.append(SourceVideo(name, folder, tuple(images)))
    if not videos:
        raise DataError(
            f"{source}: no video ({', '.join((*VIDEO_SUFFIXES, '.gif'))}) and no folder of images "
            f"({', '.join(IMAGE_SUFFIXES)}) in it"
        )
    return sorted(videos, key=lambda video: _natural_key(video.name))


def _fit(image: Image.Image, height: int, width: int, mode: ResizeMode) -> np.ndarray:
    """One frame as (height, width, 3) uint8; shrinking averages over the pixels that a new pixel covers."""
    image = image.convert("RGB")
    if image.size != (width, height):
        if mode == "stretch":
            image = image.resize((width, height), Image.Resampling.BOX)
        elif mode == "pad":
            image = ImageOps.pad(image, (width, height), Image.Resampling.BOX)
        else:
            image = ImageOps.fit(image, (width, height), Image.Resampling.BOX)
    return np.asarray(image)


def _play_video(path: Path) -> tuple[float, Iterator[Image.Image]]:
    import imageio_ffmpeg

    try:
        stream = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24")
        meta = next(stream)
    except (OSError, RuntimeError, StopIteration, IndexError) as error:
        raise DataError(f"{path}: ffmpeg cannot read it ({str(error).strip()[:200]}): convert or remove it") from error
    assert isinstance(meta, dict)
    size = tuple(meta["size"])
    fps = float(meta.get("fps") or 0)
    promised_frames = float(meta.get("duration") or 0) * fps

    def frames() -> Iterator[Image.Image]:
        count = 0
        try:
            for raw in stream:
                yield Image.frombuffer("RGB", size, raw)
                count += 1
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: ffmpeg stopped ({str(error).strip()[:200]}): convert or remove it") from error
        # ffmpeg ends quietly where a file is cut off; durations are rounded, hence the slack.
        if count < 0.95 * promised_frames - 2:
            raise DataError(
                f"{path}: {count} frames could be decoded of about {promised_frames:.0f} that it promises: damaged or "
                "cut off; convert or remove it"
            )

    return fps, frames()


def _play_gif(path: Path) -> tuple[float, Iterator[Image.Image]]:
    try:
        gif = Image.open(path)
        durations_ms = [frame.info.get("duration", 0) for frame in ImageSequence.Iterator(gif)]
        gif.seek(0)
    except (OSError, EOFError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: not readable as GIF ({error}): convert or remove it") from error
    median_ms = float(np.median(durations_ms))
    return 1000 / median_ms if median_ms > 0 else 0.0, (frame.copy() for frame in ImageSequence.Iterator(gif))


def _play_images(video: SourceVideo) -> tuple[float, Iterator[Image.Image]]:
    def frames() -> Iterator[Image.Image]:
        size = None
        for path in video.images:
            try:
                with Image.open(path) as image:
                    picture = image.convert("RGB")
            except (OSError, UnidentifiedImageError) as error:
                raise DataError(f"{path}: not readable as an image ({error}): replace or remove it") from error
            if size is not None and picture.size != size:
                raise DataError(
                    f"{path}: {picture.size[0]}x{picture.size[1]} pixels, the images before it {size[0]}x{size[1]}: "
                    "a folder is one video, whose frames have one size"
                )
            size = picture.size
            yield picture

    return 0.0, frames()


def _play(video: SourceVideo) -> tuple[float, Iterator[Image.Image]]:
    """(frames a second, 0 when unknown; frames)."""
    if video.images:
        return _play_images(video)
    if video.path.suffix.lower() == ".gif":
        return _play_gif(video.path)
    return _play_video(video.path)


# -------------------------------------------------------------------------------------------------------------- actions


@dataclasses.dataclass(frozen=True)
class ActionTable:
    """Actions of each video by source frame, as numbers, and their names."""

    by_video: dict[str, np.ndarray]
    names: tuple[str, ...]


def _rows_of(path: Path, videos: list[SourceVideo]) -> Iterator[tuple[str, str, int | None, Any]]:
    """(where, video, frame or None, action) of every row of a csv or jsonl file."""
    only = videos[0].name if len(videos) == 1 else None

    def video_of(row: dict[str, Any], where: str) -> str:
        name = row.get("video", only)
        if name is None:
            raise DataError(f"{where}: no `video`, but there are {len(videos)} videos: say which one the row is about")
        return str(name)

    try:
        with open(path, encoding="utf-8", newline="") as file:
            if path.suffix.lower() == ".csv":
                reader = csv.DictReader(file)
                if not reader.fieldnames or "action" not in reader.fieldnames:
                    raise DataError(f"{path}: columns {reader.fieldnames}: a column `action` is needed")
                for row in reader:
                    where = f"{path}, line {reader.line_num}"
                    yield where, video_of(row, where), _frame_number(row.get("frame"), where), row["action"]
            else:
                for line_number, line in enumerate(file, 1):
                    where = f"{path}, line {line_number}"
                    if not line.strip():
                        continue
                    row = json.loads(line)
                    if not isinstance(row, dict) or ("action" in row) == ("actions" in row):
                        raise DataError(f"{where}: expected an object with `action`, or with a list `actions`")
                    if "actions" in row:
                        for frame, action in enumerate(row["actions"]):
                            yield where, video_of(row, where), frame, action
                    else:
                        yield where, video_of(row, where), _frame_number(row.get("frame"), where), row["action"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error, TypeError) as error:
        raise DataError(f"{path}: not readable ({error})") from error


def _frame_number(value: Any, where: str) -> int | None:
    if value is None or value == "":
        return None
    try:
        frame = int(value)
    except (TypeError, ValueError):
        frame = -1
    if frame < 0:
        raise DataError(f"{where}: frame {value!r}: expected a number, counted from 0")
    return frame


def read_actions(path: Path, videos: list[SourceVideo]) -> ActionTable:
    """Read an actions file. See the top of this module for its forms.

    Raises:
        DataError: unreadable, about a video that is not there, two actions for one frame, or numbers mixed with names.
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl", ".npz"):
        raise DataError(f"{path}: expected a .csv, .jsonl or .npz file")
    known = {video.name for video in videos}
    stems: dict[str, str] = {}
    for video in videos:
        stem = str(Path(video.name).with_suffix("")) if not video.images else video.name
        stems[stem] = video.name
    raw: dict[str, dict[int, Any]] = {}

    def put(where: str, name: str, frame: int | None, action: Any) -> None:
        video = name if name in known else stems.get(name)
        if video is None:
            raise DataError(f"{where}: video {name!r} is not in the source, which has {sorted(known)[:5]} ...")
        of_video = raw.setdefault(video, {})
        frame = len(of_video) if frame is None else frame
        if frame in of_video:
            raise DataError(f"{where}: a second action for frame {frame} of {video!r}")
        of_video[frame] = action

    if suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                for key in arrays.files:
                    values = arrays[key]
                    if values.ndim != 1:
                        raise DataError(f"{path}, array {key!r}: shape {values.shape}, expected one action a frame")
                    if not np.issubdtype(values.dtype, np.integer) and values.dtype.kind != "U":
                        raise DataError(f"{path}, array {key!r}: dtype {values.dtype}, expected integers or strings")
                    for frame, value in enumerate(values.tolist()):
                        put(f"{path}, array {key!r}", key, frame, value)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not readable as npz ({error})") from error
    else:
        for where, name, frame, action in _rows_of(path, videos):
            put(where, name, frame, action)
    if not raw:
        raise DataError(f"{path}: holds no action")
    values = {str(value).strip() for of_video in raw.values() for value in of_video.values()}
    numeric = all(re.fullmatch(r"-?\d+", value) for value in values)
    if not numeric and any(re.fullmatch(r"-?\d+", value) for value in values):
        raise DataError(f"{path}: numbers and names are mixed ({sorted(values)[:6]} ...): use one of them")
    if numeric:
        largest = max(int(value) for value in values)
        if largest > 0x7FFE or min(int(value) for value in values) < UNKNOWN_ACTION:
            raise DataError(
                f"{path}: actions {sorted(values, key=int)[:1]} to {largest}: expected numbers in [-1, 32766]"
            )
        code = {value: int(value) for value in values}
        names = tuple(str(action) for action in range(largest + 1))
    else:
        names = tuple(sorted(values))
        code = {name: number for number, name in enumerate(names)}
    by_video = {}
    for video, of_video in raw.items():
        actions_N = np.full(max(of_video) + 1, UNKNOWN_ACTION, np.int64)
        for frame, value in of_video.items():
            actions_N[frame] = code[str(value).strip()]
        by_video[video] = actions_N
    return ActionTable(by_video, names)


# --------------------------------------------------------------------------------------------------------------- import


def kept_frames(source_fps: float, fps: float | None) -> Iterator[int]:
    """Numbers of the source frames to keep, in order, for ever.

    Frame k of the result is the source frame shown at time k / fps.
    """
    step = 1.0 if fps is None else source_fps / fps
    number = 0
    while True:
        yield int(number * step + 1e-6)
        number += 1


def _encode_video(
    video: SourceVideo,
    config: ImportConfig,
    layout: RecordLayout,
    actions: ActionTable | None,
    cuts: tuple[float, float],
) -> tuple[dict[str, EncodedEpisode], float]:
    """Episodes by split, and the frames a second kept. `cuts` are the shares of the video where val and test begin."""
    said_fps, images = _play(video)
    source_fps = config.source_fps or said_fps or 15.0
    if config.fps is not None and config.fps > source_fps * 1.001:
        raise ConfigError(
            f"{video.path}: {source_fps:g} frames a second, {config.fps:g} wanted: frames cannot be invented; lower "
            "--fps, or give --source-fps if the file is wrong"
        )
    wanted = kept_frames(source_fps, config.fps)
    next_wanted = next(wanted)
    frames: list[np.ndarray] = []
    numbers: list[int] = []
    source_frames = 0
    for image in images:
        if source_frames == next_wanted:
            frames.append(_fit(image, config.height, config.width, config.resize))
            numbers.append(source_frames)
            next_wanted = next(wanted)
        source_frames += 1
    if not frames:
        raise DataError(f"{video.path}: no frame could be decoded: convert or remove it")
    given_N = actions.by_video.get(video.name) if actions is not None else None
    if given_N is not None and len(given_N) > source_frames:
        raise DataError(
            f"{config.actions}: has an action for frame {len(given_N) - 1} of {video.name!r}, which has "
            f"{source_frames} frames"
        )
    actions_N = np.full(len(frames), UNKNOWN_ACTION, np.int64)
    if given_N is not None:
        for kept, number in enumerate(numbers):
            if number < len(given_N):
                actions_N[kept] = given_N[number]
    bounds = [0, round(cuts[0] * len(frames)), round(cuts[1] * len(frames)), len(frames)]
    episodes = {}
    for split, low, high in zip(SPLITS, bounds, bounds[1:], strict=False):
        if low == high:
            continue
        encoder = EpisodeEncoder(layout)
        for frame, action in zip(frames[low:high], actions_N[low:high].tolist(), strict=True):
            encoder.add_item(frame)
            encoder.add_step(action, 0.0)
        episodes[split] = encoder.finish(level_seed=-1, end=END_OF_VIDEO if high == len(frames) else END_CUT)
    return episodes, config.fps or source_fps


def _assign(videos: list[SourceVideo], config: ImportConfig) -> list[tuple[float, float]]:
    """For each video, the shares of it where validation and test begin."""
    val, test = config.val_fraction, config.test_fraction
    if min(val, test) < 0 or val + test >= 1:
        raise ConfigError(
            f"val_fraction {val} and test_fraction {test}: expected shares of at least 0 and below 1 together"
        )
    if len(videos) < 3:
        return [(1 - val - test, 1 - test)] * len(videos)
    order = np.random.Generator(np.random.Philox(config.seed)).permutation(len(videos))
    num_val = max(1, round(val * len(videos))) if val else 0
    num_test = max(1, round(test * len(videos))) if test else 0
    cuts = [(1.0, 1.0)] * len(videos)
    for rank, video in enumerate(order.tolist()):
        if rank < num_val:
            cuts[video] = (0.0, 1.0)
        elif rank < num_val + num_test:
            cuts[video] = (0.0, 0.0)
    return cuts


class _SplitWriter:
    """Writes a split's episodes to files of bounded size."""

    def __init__(self, out_dir: Path, split: str, layout: RecordLayout) -> None:
        self._out_dir, self._split, self._layout = out_dir, split, layout
        self._writer: RecordWriter | None = None
        self._frames = 0
        self.files: list[dict[str, Any]] = []

    def write(self, episode: EncodedEpisode) -> None:
        if self._writer is None:
            name = split_file_name(self._split, len(self.files))
            self._writer = RecordWriter(self._out_dir / name, self._layout)
        self._writer.write(episode)
        self._frames += episode.num_frames
        if self._frames >= _FILE_FRAMES:
            self.close()

    def close(self) -> None:
        if self._writer is not None:
            self.files.append(dataclasses.asdict(self._writer.close()))
            self._writer, self._frames = None, 0

    def discard(self) -> None:
        if self._writer is not None:
            self._writer.__exit__(KeyboardInterrupt, None, None)
            self._writer = None


def run_import(config: ImportConfig) -> dict[str, Any]:
    """Import videos or image folders.

    Args:
        config: from where, to where, and how.

    Returns:
        The manifest of the data set.

    Raises:
        DataError: nothing to import, an unreadable file, actions that do not fit, or an occupied folder.
        ConfigError: options that cannot be met.
    """
    if config.height < 1 or config.width < 1:
        raise ConfigError(f"size {config.height}x{config.width}: expected at least one pixel")
    for name in ("fps", "source_fps"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name} {value}: expected a positive number")
    videos = find_videos(config.source)
    actions = read_actions(config.actions, videos) if config.actions is not None else None
    num_actions = len(actions.names) if actions is not None else 0
    if config.num_actions is not None:
        if config.num_actions < num_actions:
            raise DataError(
                f"{config.actions}: has action {num_actions - 1}, outside [0, {config.num_actions}): raise "
                "--num-actions"
            )
        num_actions = config.num_actions
    names = list(actions.names) if actions is not None else []
    names += [str(number) for number in range(len(names), num_actions)]
    cuts = _assign(videos, config)
    _empty_folder(config.out_dir, overwrite=config.overwrite)
    layout = RecordLayout(
        item_shape=(config.height, config.width, 3),
        num_actions=num_actions,
        group_frames=config.group_frames,
        zstd_level=config.zstd_level,
        scan=config.scan,
    )
    writers = {split: _SplitWriter(config.out_dir, split, layout) for split in SPLITS}
    members: dict[str, list[str]] = {split: [] for split in SPLITS}
    rates: dict[float, str] = {}
    try:
        with Progress(disable=config.quiet) as progress:
            for number in progress.track(range(len(videos)), description="videos"):
                episodes, fps = _encode_video(videos[number], config, layout, actions, cuts[number])
                rates.setdefault(round(fps, 3), videos[number].name)
                if len(rates) > 1:
                    (first, first_name), (other, other_name) = list(rates.items())[:2]
                    raise DataError(
                        f"{first_name!r} has {first:g} frames a second, {other_name!r} {other:g}: a model needs one "
                        "rate; give --fps, at most the lowest"
                    )
                for split, episode in episodes.items():
                    writers[split].write(episode)
                    members[split].append(videos[number].name)
        for writer in writers.values():
            writer.close()
    except BaseException:
        for writer in writers.values():
            writer.discard()
        for path in config.out_dir.glob("*.array_record"):
            path.unlink()
        raise
    options = dataclasses.asdict(config)
    for name in ("source", "out_dir", "actions", "overwrite", "quiet"):
        del options[name]
    manifest = {
        "kind": "frames",
        "name": config.source.name,
        "item_shape": list(layout.item_shape),
        "dtype": "uint8",
        "group_frames": config.group_frames,
        "num_actions": num_actions,
        "action_names": names,
        "fps": next(iter(rates)),
        "complete": True,
        "source": {
            "type": "import",
            "options": options,
            "videos": {
                video.name: {"images": len(video.images)} if video.images else {"sha256": sha256_of_file(video.path)}
                for video in videos
            },
        },
        "splits": {
            split: {"files": writer.files, "videos": members[split]}
            for split, writer in writers.items()
            if writer.files
        },
    }
    return write_manifest(config.out_dir, manifest)


def _empty_folder(out_dir: Path, *, overwrite: bool) -> None:
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        if not overwrite:
            raise DataError(f"{out_dir}: exists and is not empty: name another folder or give --overwrite")
        if not (out_dir / MANIFEST_NAME).exists():
            raise DataError(f"{out_dir}: holds no data set: not deleted; empty it or name another folder")
        shutil.rmtree(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
