"""Offline tokenisation: every frame once, with its context, resumable, bound to tokenizer and pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError, DataError
from worldmodel.data.records import find_problems, open_dataset
from worldmodel.data.tokens import TokenizerInfo, require_tokenizer, write_token_set

MakeSet = Callable[..., Path]


def with_memory(memory: int) -> Callable[[np.ndarray], np.ndarray]:
    """A causal tokenizer whose tokens of a frame are that frame's time and that of the frame `memory` steps before."""

    def encode(frames_BTHWC: np.ndarray) -> np.ndarray:
        times_BT = frames_BTHWC[:, :, 0, 0, 1].astype(np.int32)
        past_BT = np.concatenate([np.full_like(times_BT[:, :memory], 99), times_BT[:, : times_BT.shape[1] - memory]], 1)
        return np.stack([times_BT, past_BT], -1)

    return encode


@pytest.mark.parametrize("chunk_frames", [1, 4, 5])
@pytest.mark.parametrize("memory", [0, 1, 3])
@pytest.mark.parametrize("batch_chunks", [1, 3])
def test_every_frame_has_its_tokens_with_full_context(
    make_set: MakeSet, tmp_path: Path, chunk_frames: int, memory: int, batch_chunks: int
) -> None:
    data_dir = make_set()
    info = TokenizerInfo("abc", vocab_size=256, tokens_per_frame=2, context_frames=memory)
    write_token_set(
        data_dir,
        tmp_path / "tokens",
        with_memory(memory),
        info,
        chunk_frames=chunk_frames,
        batch_chunks=batch_chunks,
        quiet=True,
    )
    assert find_problems(tmp_path / "tokens") == []
    for split in ("train", "val"):
        frames, tokens = open_dataset(data_dir, split), open_dataset(tmp_path / "tokens", split)
        assert tokens.item_shape == (2,)
        assert tokens.frame_shape == (6, 10, 3)
        assert tokens.num_windows(3) == frames.num_windows(3)
        for episode in frames.episodes:
            got, source = tokens.read(episode.index), frames.read(episode.index)
            times = np.arange(episode.num_frames)
            past = np.where(times >= memory, times - memory, 99)
            assert np.array_equal(got["items"], np.stack([times, past], -1))
            assert np.array_equal(got["actions"], source["actions"])
            assert np.array_equal(got["rewards"], source["rewards"])
            twin = tokens.episodes[episode.index]
            assert (twin.level_seed, twin.end) == (episode.level_seed, episode.end)


def test_a_killed_run_resumes_and_a_finished_one_is_left_alone(make_set: MakeSet, tmp_path: Path) -> None:
    data_dir, info = make_set(), TokenizerInfo("abc", 256, 2)
    calls = [0]

    def dies(frames_BTHWC: np.ndarray) -> np.ndarray:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return with_memory(0)(frames_BTHWC)

    options = {"chunk_frames": 8, "batch_chunks": 4, "quiet": True}
    with pytest.raises(KeyboardInterrupt):
        write_token_set(data_dir, tmp_path / "tokens", dies, info, **options)
    assert [path.name for path in (tmp_path / "tokens").glob("*.array_record")] == ["train-00000.array_record"]
    resumed = write_token_set(data_dir, tmp_path / "tokens", with_memory(0), info, **options)
    whole = write_token_set(data_dir, tmp_path / "whole", with_memory(0), info, **options)
    assert resumed == whole

    def never(frames_BTHWC: np.ndarray) -> np.ndarray:
        raise AssertionError("encoded again")

    assert write_token_set(data_dir, tmp_path / "tokens", never, info, **options) == whole


def test_another_tokenizer_needs_overwrite(make_set: MakeSet, tmp_path: Path) -> None:
    data_dir, out_dir = make_set(), tmp_path / "tokens"
    write_token_set(data_dir, out_dir, with_memory(0), TokenizerInfo("one", 256, 2), quiet=True)
    with pytest.raises(DataError, match=r"another tokenizer.*--overwrite"):
        write_token_set(data_dir, out_dir, with_memory(0), TokenizerInfo("two", 256, 2), quiet=True)
    manifest = write_token_set(
        data_dir, out_dir, with_memory(0), TokenizerInfo("two", 256, 2), overwrite=True, quiet=True
    )
    assert manifest["source"]["tokenizer"]["sha256"] == "two"
    require_tokenizer(out_dir, "two")
    with pytest.raises(DataError, match="made by tokenizer two, this run uses one"):
        require_tokenizer(out_dir, "one")


def test_large_vocabularies_fit(make_set: MakeSet, tmp_path: Path) -> None:
    def encode(frames_BTHWC: np.ndarray) -> np.ndarray:
        return np.full((*frames_BTHWC.shape[:2], 1), 99_999)

    write_token_set(make_set(), tmp_path / "tokens", encode, TokenizerInfo("big", 100_000, 1), quiet=True)
    assert open_dataset(tmp_path / "tokens", "train").read(0)["items"].max() == 99_999


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (TokenizerInfo("t", 256, 3), r"gave \(16, 16, 2\)"),
        (TokenizerInfo("t", 5, 2), r"expected \[0, 5\)"),
    ],
)
def test_a_tokenizer_that_breaks_its_promise_is_refused(
    make_set: MakeSet, tmp_path: Path, info: TokenizerInfo, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        write_token_set(make_set(), tmp_path / "tokens", with_memory(0), info, quiet=True)


def test_folders_are_not_mixed_up(make_set: MakeSet, tmp_path: Path) -> None:
    data_dir, info = make_set(), TokenizerInfo("t", 256, 2)
    with pytest.raises(ConfigError, match="different folders"):
        write_token_set(data_dir, data_dir, with_memory(0), info, quiet=True)
    write_token_set(data_dir, tmp_path / "tokens", with_memory(0), info, quiet=True)
    with pytest.raises(DataError, match="holds tokens, not frames"):
        write_token_set(tmp_path / "tokens", tmp_path / "more", with_memory(0), info, quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="is no data set"):
        write_token_set(data_dir, tmp_path / "mine", with_memory(0), info, overwrite=True, quiet=True)
    with pytest.raises(ConfigError, match="positive vocabulary"):
        TokenizerInfo("t", 0, 2)
