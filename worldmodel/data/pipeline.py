"""Batches for training: a Grain pipeline over all windows of T frames.

Grain owns order, repetition, batching, prefetching and the resumable position; the last step turns a batch of window
numbers into arrays, each window decoded straight into its row. Order depends on the seed alone: batch g is the same for
every number of processes and threads, and a process decodes only its own rows of it.

Letters: B rows of this process, T frames of a window, H height, W width, C channels, N tokens of a frame.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import grain
import numpy as np

from common.errors import CheckpointError, ConfigError, DataError
from worldmodel.data.records import EpisodeSet, open_dataset

STATE_VERSION = 1


class WindowBatches:
    """Turns numbers of windows into a batch of arrays.

    Args:
        frames: the pixel set, or None when only tokens are wanted.
        tokens: the token set, or None.
        seq_len: frames of a window.
        rows: the part of a global batch that this process decodes.
    """

    def __init__(self, frames: EpisodeSet | None, tokens: EpisodeSet | None, seq_len: int, rows: slice) -> None:
        self._frames = frames
        self._tokens = tokens
        self._seq_len = seq_len
        self._rows = rows

    def __call__(self, windows: np.ndarray) -> dict[str, np.ndarray]:
        """Decode this process's rows of a global batch of window numbers."""
        windows_B = np.asarray(windows)[self._rows]
        batch: dict[str, np.ndarray] = {}
        if self._frames is not None:
            frames_BTHWC, batch["actions_BT"] = self._frames.windows(windows_B, self._seq_len)
            assert frames_BTHWC is not None
            batch["frames_BTHWC"] = frames_BTHWC
        if self._tokens is not None:
            tokens_BTN, batch["actions_BT"] = self._tokens.windows(windows_B, self._seq_len)
            assert tokens_BTN is not None
            batch["tokens_BTN"] = tokens_BTN.astype(np.int32)
        return batch


class WindowLoader:
    """An endless, resumable iterator over batches. Made by `make_loader`.

    `state()` after batch g and `restore()` continue with batch g + 1, bitwise, whatever the number of processes or
    threads.
    """

    def __init__(self, dataset: grain.IterDataset, identity: dict[str, Any], num_windows: int) -> None:
        self._iterator = iter(dataset)
        self._identity = identity
        self.num_windows = num_windows

    @property
    def batches_per_epoch(self) -> float:
        """Global batches in which every window is drawn once."""
        return self.num_windows / self._identity["batch_size"]

    def __iter__(self) -> WindowLoader:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """Position, as a dict that JSON can hold."""
        return {"version": STATE_VERSION, **self._identity, "position": self._iterator.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            CheckpointError: the state belongs to other data or to another order of batches.
        """
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION or "position" not in state:
            raise CheckpointError(f"loader state {state!r}: expected a dict made by state() of version {STATE_VERSION}")
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise CheckpointError(
                    f"loader state has {name} = {state.get(name)!r}, this loader has {value!r}: resume with the data "
                    "and the options that the run was started with, or start a new run"
                )
        try:
            self._iterator.set_state(state["position"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"loader state has position {str(state['position'])[:80]} ({error!r}), expected one that state() gave: "
                "take an older checkpoint"
            ) from error

    def close(self) -> None:
        """Stop prefetching."""
        self._iterator.close()


def make_loader(
    data_dir: str | Path,
    *,
    split: str,
    seq_len: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    prefetch_batches: int = 8,
    shuffle: bool = True,
    with_tokens: str | Path | None = None,
    with_frames: bool = True,
) -> WindowLoader:
    """Batches of windows of one split, for ever.

    Args:
        data_dir: folder of the pixel data set.
        split: "train", "val" or "test".
        seq_len: frames of a window (T).
        batch_size: rows of the *global* batch; each process gets batch_size / process_count of them.
        seed: decides the order; every epoch has another permutation of all windows.
        process_index, process_count: which rows are this process's.
        num_threads: threads that decode ahead; None takes one a core, at most 16; 0 decodes when asked.
        prefetch_batches: batches held ready.
        shuffle: False gives the windows in order, for ever.
        with_tokens: folder of a token set made from this data set; adds `tokens_BTN` int32.
        with_frames: False reads tokens only; pixels are not touched.

    Returns:
        A `WindowLoader` whose batches hold `frames_BTHWC` uint8, `actions_BT` int32 (-1 unknown) and, if wanted,
        `tokens_BTN` int32.

    Raises:
        DataError: missing, damaged or too short data, or tokens of another data set.
        ConfigError: batch and processes do not fit.
    """
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ConfigError(f"process {process_index} of {process_count}: expected 0 <= index < count")
    if batch_size < 1 or batch_size % process_count:
        raise ConfigError(
            f"global batch of {batch_size} rows for {process_count} processes: expected a positive multiple of "
            f"{process_count}"
        )
    if not with_frames and with_tokens is None:
        raise ConfigError("with_frames=False needs with_tokens: a batch of nothing was asked for")
    frames = open_dataset(data_dir, split)
    if frames.kind != "frames":
        raise DataError(
            f"{data_dir}: holds {frames.kind}, not frames: give the pixel data set, and tokens as with_tokens"
        )
    tokens = None
    if with_tokens is not None:
        tokens = open_dataset(with_tokens, split)
        check_tokens_belong(tokens, frames)
    num_windows = frames.require_windows(seq_len)
    identity = {
        "content_sha256": frames.content_sha256,
        "tokens_sha256": None if tokens is None else tokens.content_sha256,
        "split": split,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "seed": seed,
        "shuffle": shuffle,
    }
    rows_each = batch_size // process_count
    rows = slice(process_index * rows_each, (process_index + 1) * rows_each)
    windows = grain.MapDataset.range(num_windows)
    if shuffle:
        windows = windows.shuffle(seed=seed)
    decode = WindowBatches(frames if with_frames else None, tokens, seq_len, rows)
    if num_threads is None:
        num_threads = min(16, len(os.sched_getaffinity(0)))
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch_batches if num_threads else 0)
    batches = windows.repeat().batch(batch_size, drop_remainder=True).map(decode).to_iter_dataset(options)
    return WindowLoader(batches, identity, num_windows)


def check_tokens_belong(tokens: EpisodeSet, frames: EpisodeSet) -> None:
    """Raise DataError unless `tokens` was made from exactly these frames."""
    if tokens.kind != "tokens":
        raise DataError(
            f"{tokens.data_dir}: holds {tokens.kind}, not tokens: make tokens with `python -m worldmodel tokenize`"
        )
    source = tokens.manifest.get("source", {}).get("content_sha256", {}).get(tokens.split)
    if source != frames.content_sha256 or not np.array_equal(tokens.frames_E, frames.frames_E):
        raise DataError(
            f"{tokens.data_dir}, split {tokens.split!r}: made from data {source}, not from {frames.data_dir} "
            f"({frames.content_sha256}): run `python -m worldmodel tokenize` on this data set again"
        )
