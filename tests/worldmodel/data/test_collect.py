"""Collection from real procgen games: exact alignment, reproducibility, resume, append, no survivor bias, refusals."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigError, DataError
from worldmodel.data import collect
from worldmodel.data.collect import CollectConfig, LevelRange, run_collect
from worldmodel.data.envs import (
    NUM_ACTIONS,
    PROCGEN_GAMES,
    Cancelled,
    EnvOptions,
    make_policy,
    make_procgen,
    play_shard,
    replay_episode,
)
from worldmodel.data.records import END_CUT, END_TERMINAL, RecordLayout, find_problems, open_dataset, read_manifest

pytest.importorskip("procgen", reason="procgen is not installed")

EASY = EnvOptions(distribution_mode="easy", use_backgrounds=False)


def config(out_dir: Path, **options: Any) -> CollectConfig:
    defaults: dict[str, Any] = {
        "env": EASY,
        "train_frames": 4 * 240,
        "val_frames": 4 * 40,
        "test_frames": 0,
        "num_envs": 4,
        "shard_steps": 90,
        "workers": 1,
        "quiet": True,
    }
    return CollectConfig(out_dir=out_dir, **{**defaults, **options})


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("collect") / "set"
    run_collect(config(out_dir))
    return out_dir


@pytest.mark.parametrize("options", [EASY, EnvOptions()], ids=["easy", "default"])
def test_replaying_an_episode_shows_the_recorded_frames(tmp_path: Path, collected: Path, options: EnvOptions) -> None:
    """The alignment of levels, frames, actions, rewards and ends, held against the game itself, bit for bit."""
    out_dir = collected
    if options != EASY:
        out_dir = tmp_path / "set"
        run_collect(config(out_dir, env=options, policy="random", val_frames=0))
    dataset = open_dataset(out_dir, "train")
    ends = {END_CUT: 0, END_TERMINAL: 0}
    for episode in dataset.episodes:
        recorded = dataset.read(episode.index)
        frames, rewards, ended = replay_episode(options, episode.level_seed, recorded["actions"])
        assert np.array_equal(frames, recorded["items"])
        assert np.array_equal(rewards, recorded["rewards"])
        assert ended == (episode.end == END_TERMINAL)
        if episode.end == END_TERMINAL:  # CoinRun pays 10 for the coin, which is the only way to complete a level.
            assert episode.level_complete == (rewards[-1] == 10)
        ends[episode.end] += 1
    assert ends[END_CUT] > 0
    assert options != EASY or ends[END_TERMINAL] > 4


def test_another_alignment_would_not_replay(collected: Path) -> None:
    """The test above can fail: actions moved by one step lead elsewhere."""
    dataset = open_dataset(collected, "train")
    longest = max(dataset.episodes, key=lambda episode: episode.num_frames)
    recorded = dataset.read(longest.index)
    moved = np.roll(recorded["actions"], 1)
    frames, _, _ = replay_episode(EASY, longest.level_seed, moved)
    assert not np.array_equal(frames, recorded["items"])


def test_every_frame_that_was_played_is_kept(collected: Path) -> None:
    manifest = read_manifest(collected)
    assert manifest["splits"]["train"]["frames"] == 4 * 240
    assert manifest["splits"]["val"]["frames"] == 4 * 40
    assert manifest["plan"] == {"train": [90, 90, 60], "val": [40]}
    assert find_problems(collected) == []
    lengths = open_dataset(collected, "train").frames_E
    assert lengths.min() < 60  # Short episodes are not thrown away.


def test_levels_of_splits_are_disjoint_and_as_asked(collected: Path) -> None:
    train = {episode.level_seed for episode in open_dataset(collected, "train").episodes}
    val = {episode.level_seed for episode in open_dataset(collected, "val").episodes}
    assert train <= set(range(500))
    assert val <= set(range(10_000, 10_500))
    assert len(train) > 5


def test_the_same_configuration_gives_the_same_bytes(collected: Path, tmp_path: Path) -> None:
    manifest = run_collect(config(tmp_path / "again", workers=3))
    assert manifest == read_manifest(collected)
    for entry in manifest["splits"]["train"]["files"]:
        assert (tmp_path / "again" / entry["name"]).read_bytes() == (collected / entry["name"]).read_bytes()
    other = run_collect(config(tmp_path / "seed", seed=1))
    assert other["content_sha256"] != manifest["content_sha256"]


def test_a_killed_run_resumes_to_the_same_set(collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out_dir = tmp_path / "set"
    played: list[int] = []

    def killed_in_the_second_shard(*arguments: Any, **options: Any) -> Any:
        played.append(options["num_steps"])
        if len(played) == 2:
            raise KeyboardInterrupt
        return play_shard(*arguments, **options)

    monkeypatch.setattr(collect, "play_shard", killed_in_the_second_shard)
    with pytest.raises(KeyboardInterrupt):
        run_collect(config(out_dir))
    assert not read_manifest(out_dir)["complete"]
    done = len(read_manifest(out_dir)["splits"]["train"]["files"])
    assert done == 1
    assert not list(out_dir.glob(".*")), "temporary files are left behind"
    (out_dir / ".train-00001.array_record.1.2.tmp").write_bytes(b"what SIGKILL leaves")
    played.clear()
    monkeypatch.setattr(collect, "play_shard", lambda *a, **o: played.append(o["num_steps"]) or play_shard(*a, **o))
    manifest = run_collect(config(out_dir))
    assert len(played) == 4 - done
    assert manifest == read_manifest(collected)
    assert not list(out_dir.glob(".*"))


def test_stop_ends_a_shard_without_a_result() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        play_shard(
            EASY,
            RecordLayout((64, 64, 3)),
            num_envs=1,
            num_steps=5,
            start_level=0,
            num_levels=1,
            rand_seed=0,
            policy=make_policy("random", 1, np.random.default_rng(0)),
            stop=stop,
        )


def test_append_grows_a_set_and_keeps_what_was_there(tmp_path: Path) -> None:
    out_dir = tmp_path / "set"
    first = run_collect(config(out_dir, train_frames=4 * 90, val_frames=0))
    before = (out_dir / "train-00000.array_record").read_bytes()
    with pytest.raises(DataError, match=r"another size.*--append"):
        run_collect(config(out_dir, train_frames=4 * 180, val_frames=0))
    grown = run_collect(config(out_dir, train_frames=4 * 90, val_frames=4 * 40, append=True))
    assert (out_dir / "train-00000.array_record").read_bytes() == before
    assert grown["splits"]["train"]["files"][0] == first["splits"]["train"]["files"][0]
    assert grown["splits"]["train"]["frames"] == 4 * 180
    assert grown["splits"]["val"]["frames"] == 4 * 40
    assert find_problems(out_dir) == []
    # Appending gives what collecting at once would have given.
    once = run_collect(config(tmp_path / "once", train_frames=4 * 180, val_frames=4 * 40))
    assert once["content_sha256"] == grown["content_sha256"]


def test_a_finished_set_is_left_alone_and_nothing_is_overwritten(collected: Path, tmp_path: Path) -> None:
    stamps = {path.name: path.stat().st_mtime_ns for path in collected.iterdir()}
    assert run_collect(config(collected)) == read_manifest(collected)
    with pytest.raises(DataError, match=r"made otherwise \(different: policy, seed\)"):
        run_collect(config(collected, seed=3, policy="random"))
    assert {path.name: path.stat().st_mtime_ns for path in collected.iterdir()} == stamps
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"no manifest.json"):
            run_collect(config(tmp_path / "mine", overwrite=overwrite))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        run_collect(config(tmp_path / "file"))


def test_overwrite_replaces_a_set(tmp_path: Path) -> None:
    small: dict[str, Any] = {"train_frames": 40, "val_frames": 0}
    run_collect(config(tmp_path, seed=1, **small))
    manifest = run_collect(config(tmp_path, seed=2, overwrite=True, **small))
    assert manifest["source"]["recipe"]["seed"] == 2
    assert manifest["splits"]["train"]["frames"] == 40


@pytest.mark.parametrize("game", PROCGEN_GAMES)
def test_every_game_can_be_recorded(game: str, tmp_path: Path) -> None:
    manifest = run_collect(config(tmp_path, env=EnvOptions(game=game), train_frames=24, val_frames=0))
    assert manifest["name"] == game
    dataset = open_dataset(tmp_path, "train")
    recorded = dataset.read(0)
    assert recorded["items"].std() > 0
    frames, rewards, _ = replay_episode(EnvOptions(game=game), dataset.episodes[0].level_seed, recorded["actions"])
    assert np.array_equal(frames, recorded["items"])
    assert np.array_equal(rewards, recorded["rewards"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_levels": LevelRange(499, 10)}, "overlap"),
        ({"train_levels": LevelRange(0, 0)}, "train_levels"),
        ({"train_frames": -1}, "train_frames -1"),
        ({"train_frames": 0, "val_frames": 0}, "no frames wanted"),
        ({"num_envs": 0}, "num_envs 0"),
        ({"zstd_level": 50}, "zstd_level 50"),
        ({"workers": -1}, "workers -1"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_collect(config(tmp_path / "set", **options))
    assert not (tmp_path / "set").exists()


def test_names_are_checked_and_the_nearest_is_suggested() -> None:
    with pytest.raises(ConfigError, match="did you mean 'coinrun'"):
        EnvOptions(game="coinrunn")
    with pytest.raises(ConfigError, match="policy 'expert'"):
        make_policy("expert", 1, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="at least one level"):
        make_procgen(EASY, num_envs=1, start_level=0, num_levels=0, rand_seed=0)


def test_the_sticky_policy_sticks_goes_right_and_tries_everything() -> None:
    policy = make_policy("sticky-right", 64, np.random.default_rng(0))
    frames, never = np.zeros((64, 1, 1, 3), np.uint8), np.zeros(64, bool)
    actions = np.stack([policy.act(frames, never) for _ in range(800)])[50:]
    counts = np.bincount(actions.ravel(), minlength=NUM_ACTIONS) / actions.size
    same = np.sum((np.asarray((2, 8, 5, 3, 6, 8, 2, 30, 30, 1, 1, 1, 1, 1, 1)) / 100) ** 2)
    assert np.mean(actions[1:] == actions[:-1]) == pytest.approx(0.75 + 0.25 * same, abs=0.01)
    assert counts.min() > 0.002
    assert counts[[6, 7, 8]].sum() > 0.5
    # A new episode starts with a fresh draw, not with the last action of the one before.
    fresh = np.stack([policy.act(frames, ~never) for _ in range(400)])
    assert np.mean(fresh[1:] == fresh[:-1]) == pytest.approx(same, abs=0.02)


def test_the_policy_sees_the_frames() -> None:
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    class Watching:
        def act(self, frames_NHWC: np.ndarray, first_N: np.ndarray) -> np.ndarray:
            seen.append((frames_NHWC.copy(), first_N.copy()))
            return np.full(len(first_N), 7, np.int32)

    arguments: dict[str, Any] = {"num_envs": 2, "num_steps": 6, "start_level": 0, "num_levels": 5, "rand_seed": 0}
    episodes = play_shard(EASY, RecordLayout((64, 64, 3)), policy=Watching(), **arguments)
    assert len(seen) == 6
    assert seen[0][1].all()
    assert sum(episode.num_frames for episode in episodes) == 12
    assert all((episode.actions_N == 7).all() for episode in episodes)


def test_the_default_split_sizes_and_levels_are_disjoint() -> None:
    defaults = CollectConfig()
    spans = [dataclasses.astuple(getattr(defaults, f"{split}_levels")) for split in ("train", "val", "test")]
    assert spans == [(0, 500), (10_000, 500), (20_000, 500)]
