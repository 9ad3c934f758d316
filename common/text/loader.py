"""Batches of windows from token shards: shuffled, resumable, and the same for every number of processes.

Every shard is cut into windows of seq_len + 1 tokens that overlap by one, so that each token is a target once; a
window never spans two shards, and fewer than seq_len tokens at a shard's end are left out. The windows of an epoch are
ordered by a hash of (seed, epoch, window), a permutation that depends on nothing else: not on the number of processes
and not on the version of NumPy. Epochs follow each other without a gap: a batch that an epoch cannot fill takes its
last windows from the next one, so every window is used exactly once in each epoch.

Shards stay on disk: a process touches the pages of its own windows only, and holds one permutation (4 bytes a window).
The kernel is told that reads jump about (what it would read ahead is rarely wanted while it is still there), and which
pages the next batch needs: it fetches them side by side while this batch is worked on.

Letters: B sequences of this process, T positions of a sequence, W windows of all shards, S shards.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from common.errors import CheckpointError, ConfigError, ShardError
from common.text.shards import SHARD_HEADER_BYTES, SHARD_TOKEN_BYTES, open_shard


@dataclass(frozen=True)
class TokenBatch:
    """One process's part of a batch.

    x_BT: int64 inputs. y_BT: int64 targets, the token after each input. document_ids_BT: int32, 0 at the start of each
    row (1 if it starts with a beginning-of-document token), one more at each beginning-of-document token in x.
    """

    x_BT: np.ndarray
    y_BT: np.ndarray
    document_ids_BT: np.ndarray


def window_order(windows: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits its windows: a permutation of 0 .. windows-1, uint32 (W,).

    Sorted by SplitMix64's output function of the window's number and a hash of (seed, epoch).
    """
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest(), "little")
    mixed_W = np.arange(1, windows + 1, dtype=np.uint64)
    mixed_W *= np.uint64(0x9E3779B97F4A7C15)
    mixed_W += np.uint64(key)
    mixed_W ^= mixed_W >> np.uint64(30)
    mixed_W *= np.uint64(0xBF58476D1CE4E5B9)
    mixed_W ^= mixed_W >> np.uint64(27)
    mixed_W *= np.uint64(0x94D049BB133111EB)
    mixed_W ^= mixed_W >> np.uint64(31)
    # The mixing is one-to-one, so no two windows tie and any sorting method gives the same order.
    return np.argsort(mixed_W).astype(np.uint32)


class TokenLoader:
    """Reads shuffled batches from token shards; an endless iterator over epochs.

    Args:
        shard_paths: the shards, in a fixed order.
        seq_len: T, tokens of a sequence.
        batch_sequences: sequences of a batch over all processes.
        rank: this process; it takes the rank-th contiguous part of every batch.
        world_size: number of processes; divides batch_sequences.
        seed: of the order.
        bos_id: the token that begins a document, or None (then all document ids are 0).
        vocab_size: every token read must be below it.

    Raises:
        ConfigError: sizes that do not fit together.
        ShardError: a damaged shard, a token outside the vocabulary, or fewer windows than one batch.
    """

    def __init__(
        self,
        shard_paths: Sequence[str | Path],
        *,
        seq_len: int,
        batch_sequences: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        bos_id: int | None = None,
        vocab_size: int = 65536,
    ) -> None:
        if seq_len < 1 or batch_sequences < 1:
            raise ConfigError(
                f"seq_len {seq_len} and batch_sequences {batch_sequences}, expected both at least 1; set larger ones."
            )
        if world_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(
                f"rank {rank} of world_size {world_size}, expected 0 <= rank < world_size; check the launcher."
            )
        if batch_sequences % world_size:
            raise ConfigError(
                f"batch_sequences {batch_sequences} with world_size {world_size}, expected a multiple; "
                f"set it to {-(-batch_sequences // world_size) * world_size}."
            )
        if not shard_paths:
            raise ShardError("no shard given, expected at least one; check the data folder.")
        self._paths = [Path(path) for path in shard_paths]
        self._seq_len = seq_len
        self._batch_sequences = batch_sequences
        self._part = batch_sequences // world_size
        self._rank = rank
        self._seed = seed
        self._bos_id = bos_id
        self._vocab_size = vocab_size
        shards = [open_shard(path) for path in self._paths]
        counts_S = np.array([len(shard) for shard in shards], dtype=np.int64)
        self._first_window_S = np.concatenate(([0], np.cumsum((counts_S - 1) // seq_len)))
        self.windows = int(self._first_window_S[-1])
        self.total_tokens = int(counts_S.sum())
        if self.windows < batch_sequences:
            raise ShardError(
                f"{self._paths[0]} and {len(shards) - 1} more: {self.total_tokens} tokens give {self.windows} windows "
                f"of {seq_len} + 1 tokens, expected at least one batch of {batch_sequences}; "
                "give more data, a shorter seq_len or a smaller batch."
            )
        if self.windows > 2**32:
            raise ShardError(
                f"{self.windows} windows of {seq_len} tokens, expected at most {2**32}; "
                "use fewer shards or a longer seq_len."
            )
        # Row w of a shard's view is its window w; rows overlap by one token and nothing is copied.
        self._windows_of_S = [
            np.lib.stride_tricks.sliding_window_view(shard, seq_len + 1)[::seq_len] if len(shard) > seq_len else None
            for shard in shards
        ]
        self._maps = [cast(mmap.mmap, shard.base) for shard in shards]
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_RANDOM)
        digest = hashlib.sha256()
        for path, count in zip(self._paths, counts_S.tolist(), strict=True):
            digest.update(f"{path.name}\0{count}\0".encode())
        self._identity = {
            "seed": seed,
            "seq_len": seq_len,
            "batch_sequences": batch_sequences,
            "shards": len(shards),
            "windows": self.windows,
            "shards_sha256": digest.hexdigest(),
        }
        self._next_batch = 0
        self._orders: dict[int, np.ndarray] = {}

    @property
    def batches_done(self) -> int:
        """Global batches given out so far."""
        return self._next_batch

    @property
    def epochs_done(self) -> float:
        """Passes over the data so far."""
        return self._next_batch * self._batch_sequences / self.windows

    def next_batch(self) -> TokenBatch:
        """The next batch's part for this process."""
        shard_B, window_B = self._places_of(self._next_batch)
        tokens_BU = np.empty((self._part, self._seq_len + 1), dtype=np.uint16)
        for shard in np.unique(shard_B).tolist():
            rows = np.flatnonzero(shard_B == shard)
            tokens_BU[rows] = self._windows_of_S[shard][window_B[rows]]
            highest = int(tokens_BU[rows].max())
            if highest >= self._vocab_size:
                raise ShardError(
                    f"{self._paths[shard]}: token {highest}, expected all tokens below the vocabulary size "
                    f"{self._vocab_size}; use the tokenizer that made these shards, or make them again."
                )
        self._next_batch += 1
        self._expect(self._next_batch)
        x_BT = tokens_BU[:, :-1].astype(np.int64)
        y_BT = tokens_BU[:, 1:].astype(np.int64)
        if self._bos_id is None:
            document_ids_BT = np.zeros(x_BT.shape, dtype=np.int32)
        else:
            document_ids_BT = np.cumsum(x_BT == self._bos_id, axis=1, dtype=np.int32)
        return TokenBatch(x_BT, y_BT, document_ids_BT)

    def state(self) -> dict:
        """Where the loader stands, as plain JSON values; the same for every rank and world_size."""
        return {"batch": self._next_batch, **self._identity}

    def restore(self, state: dict) -> None:
        """Continue exactly where `state` was taken, with any number of processes.

        Raises:
            CheckpointError: the state belongs to other data, another seed or other sizes.
        """
        if not isinstance(state, dict) or set(state) != {"batch", *self._identity}:
            raise CheckpointError(
                f"loader state {state!r}, expected the keys {sorted(('batch', *self._identity))}; "
                "the checkpoint is damaged or of another version: start again or take an older one."
            )
        for key, value in self._identity.items():
            if state[key] != value:
                raise CheckpointError(
                    f"loader state has {key} = {state[key]!r}, this run has {value!r}; expected equal: resume with the "
                    "data and options that the run was started with."
                )
        batch = state["batch"]
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 0:
            raise CheckpointError(
                f"loader state has batch = {batch!r}, expected a count; the checkpoint is damaged: take an older one."
            )
        self._next_batch = batch

    def _places_of(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard (B,) and window within it (B,) of each row of this process's part of a batch."""
        windows_B = self._windows_at(batch * self._batch_sequences + self._rank * self._part, self._part)
        shard_B = np.searchsorted(self._first_window_S, windows_B, side="right") - 1
        return shard_B, windows_B - self._first_window_S[shard_B]

    def _expect(self, batch: int) -> None:
        """Let the kernel begin to read the pages of a batch."""
        for shard, window in zip(*(place_B.tolist() for place_B in self._places_of(batch)), strict=True):
            first = SHARD_HEADER_BYTES + window * self._seq_len * SHARD_TOKEN_BYTES
            page = first // mmap.PAGESIZE * mmap.PAGESIZE  # the mapping begins with the file
            size = first - page + (self._seq_len + 1) * SHARD_TOKEN_BYTES
            self._maps[shard].madvise(mmap.MADV_WILLNEED, page, size)

    def _windows_at(self, first: int, count: int) -> np.ndarray:
        """Window numbers at places first .. first+count-1 of the endless sequence of epochs, int64 (B,)."""
        parts = []
        while count:
            epoch, place = divmod(first, self.windows)
            if epoch not in self._orders:
                self._orders = {old: order for old, order in self._orders.items() if old == epoch - 1}
                self._orders[epoch] = window_order(self.windows, self._seed, epoch)
            piece_B = self._orders[epoch][place : place + count]
            parts.append(piece_B)
            first += piece_B.size
            count -= piece_B.size
        return np.concatenate(parts).astype(np.int64)
