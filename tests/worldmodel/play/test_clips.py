"""Start clips, names of latent actions, the packaged world, the real game."""

from importlib.resources import files

import numpy as np
import pytest

from common.errors import ConfigError, DataError
from worldmodel.data.records import find_problems, open_dataset
from worldmodel.play.clips import find_data_dir, name_latent_actions, start_clips
from worldmodel.play.real import KEEP_EVERY, RealGame, checked_source, real_source
from worldmodel.play.start import PlayConfig, load_for_play, make_host

PLAY = files("worldmodel.play")
PACKAGED = PLAY / "clips"


@pytest.fixture(scope="module")
def dataset():
    return open_dataset(str(PACKAGED), "val")


def test_packaged_clips_are_whole_and_the_packaged_world_is_small(dataset):
    assert find_problems(str(PACKAGED)) == []
    clips = start_clips(dataset, 12, 4)
    assert len(clips) == 12
    assert all(10_000 <= clip.level_seed < 10_500 for clip in clips)  # levels that training never saw
    assert len((PLAY / "coinrun.artifact").read_bytes()) <= 1_500_000


def test_clips_are_where_they_say(dataset):
    clip = start_clips(dataset, 3, 4)[2]
    whole = dataset.read(2)
    np.testing.assert_array_equal(clip.frames_PHWC, whole["items"][4:8])
    np.testing.assert_array_equal(clip.prefix_N, whole["actions"][:7])
    np.testing.assert_array_equal(clip.actions_A, whole["actions"][4:7])
    np.testing.assert_array_equal(clip.later_N, whole["actions"][7:])
    with pytest.raises(DataError, match="no episode has the 5000 frames"):
        start_clips(dataset, 3, 5000)


def test_latent_actions_are_named_after_what_they_raise_most():
    # The policy mostly goes right, so every code sees "right" most often; code 0 alone sees "left" at all.
    rare = name_latent_actions(np.asarray([[80.0, 9.0, 1.0], [10.0, 90.0, 0.0]]), ("left", "right", "accident"))
    assert rare.to_game_A == (0, 1)
    assert rare.from_game_E == (0, 1, 0)
    counts = np.asarray([[30.0, 60.0], [0.0, 100.0], [0.0, 0.0]])
    table = name_latent_actions(counts, ("left", "right"))
    assert table.to_game_A == (0, 1, -1)
    assert table.from_game_E == (0, 1)
    assert table.names[0].startswith("latent 0 ≈ left (2.1×, 47%)")
    assert table.names[2] == "latent 2 (unused)"


def test_the_data_set_beside_the_weights_comes_first(tmp_path):
    assert find_data_dir("named", "trained", tmp_path) == type(tmp_path)("named")
    assert find_data_dir("", str(tmp_path / "gone"), tmp_path) == tmp_path
    (tmp_path / "manifest.json").touch()
    assert find_data_dir("", str(tmp_path), tmp_path / "packaged") == tmp_path


def test_contradictions_are_named():
    with pytest.raises(ConfigError, match="one source of weights"):
        load_for_play(PlayConfig(run="a", artifact="b"))
    with pytest.raises(ConfigError, match="clips 0"):
        make_host(PlayConfig(clips=0), None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="fps 100"):
        make_host(PlayConfig(fps=100.0), None)  # pyright: ignore[reportArgumentType]


def test_without_procgen_the_reason_is_given(dataset, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    source = real_source(dataset)
    assert source.options is None
    assert "procgen is not installed" in source.reason


def test_the_real_game_begins_as_recorded_and_rewinds(dataset):
    pytest.importorskip("procgen", reason="procgen is not installed here")
    source = real_source(dataset)
    assert source.options is not None
    first = start_clips(dataset, 1, 4)[0]
    last_HWC = first.frames_PHWC[-1]
    assert checked_source(source, first.level_seed, first.prefix_N, last_HWC) == source
    refused = checked_source(source, first.level_seed, first.prefix_N, 255 - last_HWC)
    assert refused.options is None
    assert "does not look as recorded" in refused.reason
    game = RealGame(source.options, history_frames=60)
    for clip in start_clips(dataset, 12, 4):  # every packaged clip: reset compares with the recorded frame
        game.reset(clip.level_seed, clip.prefix_N, clip.frames_PHWC[-1], 3)
    for offset, action in enumerate(clip.later_N[:-1]):
        picture, _, _ = game.step(int(action), 4 + offset)
    whole = dataset.read(11)["items"]
    np.testing.assert_array_equal(picture, whole[-1])
    actions = np.random.default_rng(0).integers(0, 15, 100)
    begin = 4 + len(clip.later_N) - 1
    sent = {begin + i: int(a) for i, a in enumerate(actions)}
    pictures = {number: game.step(action, number)[0] for number, action in sent.items()}
    last = begin + 99
    assert last - game.oldest >= 60
    for back in (0, 7, 20, 55):
        np.testing.assert_array_equal(game.rewind(last - back, sent), pictures[last - back])
    assert KEEP_EVERY < 20  # so that the rewinds above crossed kept states
    with pytest.raises(DataError, match="older than the oldest"):
        game.rewind(0, sent)
    with pytest.raises(DataError, match="does not look as recorded"):
        game.reset(clip.level_seed, clip.prefix_N, clip.frames_PHWC[0] ^ 1, 3)
    game.close()
