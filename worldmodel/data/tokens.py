"""The token form of a data set: every frame of every episode, encoded once by a frozen tokenizer.

The result is a data set of its own, in the same format, file by file and episode by episode beside the pixels, so that
a window has one number in both. Its manifest names the tokenizer by hash and the pixels by content digest; a reader
refuses tokens of other pixels.

Letters: B chunks of a call, T frames of a chunk, H height, W width, C channels, N tokens of a frame.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from common.errors import ConfigError, DataError
from worldmodel.data.records import (
    MANIFEST_NAME,
    EncodedEpisode,
    EpisodeSet,
    RecordLayout,
    RecordWriter,
    encode_episode,
    open_dataset,
    read_manifest,
    write_manifest,
)

Encode = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """What a token set says about the tokenizer that made it."""

    sha256: str
    """Digest of its weights and configuration."""
    vocab_size: int
    tokens_per_frame: int
    context_frames: int = 0
    """Past frames that the tokens of a frame depend on; 0 when each frame is encoded alone."""

    def __post_init__(self) -> None:
        if self.vocab_size < 1 or self.tokens_per_frame < 1 or self.context_frames < 0:
            raise ConfigError(f"{self}: expected a positive vocabulary and tokens per frame and no negative context")


def require_tokenizer(token_dir: str | Path, sha256: str) -> None:
    """Raise DataError unless a token set was made by the tokenizer with this digest."""
    made_by = read_manifest(token_dir).get("source", {}).get("tokenizer", {}).get("sha256")
    if made_by != sha256:
        raise DataError(
            f"{token_dir}: made by tokenizer {made_by}, this run uses {sha256}: name that tokenizer's run, or run "
            "`python -m worldmodel tokenize` again"
        )


def _chunks(num_frames: int, chunk_frames: int, context_frames: int) -> Iterator[tuple[int, int, int]]:
    """(first frame read, frames read, frames of those that only give context), every frame kept exactly once."""
    length = chunk_frames + context_frames
    start = 0
    while start < num_frames:
        context = min(context_frames, start)
        first = start - context
        count = min(length, num_frames - first)
        yield first, count, context
        start = first + count


def _encode_file(
    source: EpisodeSet,
    episodes: Sequence[int],
    encode: Encode,
    info: TokenizerInfo,
    chunk_frames: int,
    batch_chunks: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """(episode, tokens_TN) of the given episodes in order; every call of `encode` has the same shape."""
    length = chunk_frames + info.context_frames
    tokens = {e: np.empty((int(source.frames_E[e]), info.tokens_per_frame), np.int64) for e in episodes}
    waiting: list[tuple[int, int, int, int]] = []
    frames_BTHWC = np.zeros((batch_chunks, length, *source.item_shape), np.uint8)
    pending = list(episodes)

    def flush() -> None:
        tokens_BTN = np.asarray(encode(frames_BTHWC))
        wanted = (batch_chunks, length, info.tokens_per_frame)
        if tokens_BTN.shape != wanted or not np.issubdtype(tokens_BTN.dtype, np.integer):
            raise ConfigError(
                f"the tokenizer gave {tokens_BTN.shape} {tokens_BTN.dtype}, expected integers of shape {wanted}"
            )
        if tokens_BTN.min() < 0 or tokens_BTN.max() >= info.vocab_size:
            raise ConfigError(
                f"the tokenizer gave tokens in [{tokens_BTN.min()}, {tokens_BTN.max()}], expected [0, "
                f"{info.vocab_size})"
            )
        for row, (episode, first, count, context) in enumerate(waiting):
            tokens[episode][first + context : first + count] = tokens_BTN[row, context:count]
        waiting.clear()

    for episode in episodes:
        for first, count, context in _chunks(int(source.frames_E[episode]), chunk_frames, info.context_frames):
            row = len(waiting)
            frames_BTHWC[row, :count] = source.read(episode, first, count)["items"]
            frames_BTHWC[row, count:] = frames_BTHWC[row, count - 1]  # Padding behind; a causal tokenizer ignores it.
            waiting.append((episode, first, count, context))
            if len(waiting) == batch_chunks:
                flush()
                while pending[0] != episode:  # All earlier episodes are complete; this one may go on.
                    finished = pending.pop(0)
                    yield finished, tokens.pop(finished)
    if waiting:
        flush()
    for episode in pending:
        yield episode, tokens.pop(episode)


def _encoded(source: EpisodeSet, layout: RecordLayout, episode: int, tokens_TN: np.ndarray) -> EncodedEpisode:
    steps = source.read(episode, with_items=False)
    info = source.episodes[episode]
    return encode_episode(
        layout,
        tokens_TN.astype(layout.dtype),
        steps["actions"],
        steps["rewards"],
        level_seed=info.level_seed,
        end=info.end,
        level_complete=info.level_complete,
    )


def write_token_set(
    data_dir: str | Path,
    out_dir: str | Path,
    encode: Encode,
    info: TokenizerInfo,
    *,
    chunk_frames: int = 16,
    batch_chunks: int = 16,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Encode every split of a data set; a killed run goes on after its last finished file.

    Args:
        data_dir: the pixel data set.
        out_dir: folder of the token set; a finished one of the same pixels and tokenizer is left as it is.
        encode: frames_BTHWC uint8 -> tokens_BTN integers. Called with one shape only; causal in T.
        info: the tokenizer.
        chunk_frames: frames encoded at once beside the context.
        batch_chunks: chunks in a call.
        overwrite: replace a token set of other pixels or of another tokenizer.
        quiet: no progress bar.

    Returns:
        The token set's manifest.

    Raises:
        DataError: the folder holds something else, or the pixels are damaged.
        ConfigError: the tokenizer does not do what `info` says.
    """
    out_dir = Path(out_dir)
    pixels = read_manifest(data_dir)
    if pixels["kind"] != "frames":
        raise DataError(f"{data_dir}: holds {pixels['kind']}, not frames: name the pixel data set")
    if Path(data_dir).resolve() == out_dir.resolve():
        raise ConfigError(f"{out_dir}: tokens and pixels need different folders: name another output folder")
    splits = [name for name, split in pixels["splits"].items() if split["files"]]
    source = {
        "type": "tokens",
        "content_sha256": {name: pixels["splits"][name]["content_sha256"] for name in splits},
        "tokenizer": dataclasses.asdict(info),
        "chunk_frames": chunk_frames,
    }
    layout = RecordLayout(
        item_shape=(info.tokens_per_frame,),
        dtype="uint16" if info.vocab_size <= 1 << 16 else "int32",
        num_actions=pixels["num_actions"],
        group_frames=64,
        zstd_level=3,
    )
    if (out_dir / MANIFEST_NAME).exists():
        manifest = read_manifest(out_dir)
        if manifest.get("source") != source:
            if not overwrite:
                raise DataError(
                    f"{out_dir}: holds a data set of other pixels, another tokenizer or other chunks: name another "
                    "folder or replace it with --overwrite"
                )
            shutil.rmtree(out_dir)
    elif out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise DataError(f"{out_dir}: exists and is no data set: empty it or name another folder")
    if not (out_dir / MANIFEST_NAME).exists():
        out_dir.mkdir(parents=True, exist_ok=True)
        manifest = {
            "kind": "tokens",
            "name": f"{pixels.get('name', 'data')} tokens",
            "item_shape": list(layout.item_shape),
            "dtype": layout.dtype,
            "group_frames": layout.group_frames,
            "num_actions": pixels["num_actions"],
            "action_names": pixels["action_names"],
            "fps": pixels.get("fps"),
            "frame_shape": pixels["item_shape"],
            "vocab_size": info.vocab_size,
            "complete": False,
            "source": source,
            "splits": {name: {"files": []} for name in splits},
        }
        manifest = write_manifest(out_dir, manifest)
    else:
        manifest = read_manifest(out_dir)
    total = sum(pixels["splits"][name]["frames"] for name in splits)
    with Progress(disable=quiet) as progress:
        task = progress.add_task("frames to tokens", total=total)
        for split in splits:
            dataset = open_dataset(data_dir, split)
            for number, entry in enumerate(pixels["splits"][split]["files"]):
                if number >= len(manifest["splits"][split]["files"]):
                    episodes = [e.index for e in dataset.episodes if e.file_index == number]
                    with RecordWriter(out_dir / entry["name"], layout, kind="tokens") as writer:
                        encoded = _encode_file(dataset, episodes, encode, info, chunk_frames, batch_chunks)
                        for episode, tokens_TN in encoded:
                            writer.write(_encoded(dataset, layout, episode, tokens_TN))
                            progress.advance(task, len(tokens_TN))
                    assert writer.summary is not None
                    manifest["splits"][split]["files"].append(dataclasses.asdict(writer.summary))
                    manifest = write_manifest(out_dir, manifest)
                else:
                    progress.advance(task, entry["frames"])
            dataset.close()
    if not manifest["complete"]:
        manifest = write_manifest(out_dir, {**manifest, "complete": True})
    return manifest
