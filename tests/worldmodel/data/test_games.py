"""Our own game, the adapters and the policies: alignment, reproducibility, physics, refusals."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import ConfigError
from worldmodel.data import adapters, puck
from worldmodel.data.collect import CollectConfig, run_collect
from worldmodel.data.envs import EnvOptions, make_policy, open_games, replay_episode, spec_of
from worldmodel.data.policies import StickyPolicy, right_weights
from worldmodel.data.records import END_CUT, END_TERMINAL, find_problems, open_dataset, read_manifest
from worldmodel.data.states import known_states

PUCK = EnvOptions(game="puck")


def config(out_dir: Path, **options: Any) -> CollectConfig:
    defaults: dict[str, Any] = {
        "env": PUCK, "policy": "random", "train_frames": 4 * 500, "val_frames": 4 * 40, "test_frames": 0, "num_envs": 4,
        "shard_steps": 450, "workers": 1, "quiet": True,
    }  # fmt: skip
    return CollectConfig(out_dir=out_dir, **{**defaults, **options})


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("puck") / "set"
    run_collect(config(out_dir))
    return out_dir


def test_replaying_a_puck_episode_shows_the_recorded_frames(collected: Path) -> None:
    assert find_problems(collected) == []
    assert read_manifest(collected)["source"]["type"] == "puck"
    assert read_manifest(collected)["splits"]["train"]["frames"] == 4 * 500
    dataset = open_dataset(collected, "train")
    ends = {END_CUT: 0, END_TERMINAL: 0}
    for episode in dataset.episodes:
        recorded = dataset.read(episode.index)
        frames, rewards, ended = replay_episode(PUCK, episode.level_seed, recorded["actions"])
        assert np.array_equal(frames, recorded["items"])
        assert np.array_equal(rewards, recorded["rewards"])
        assert ended == (episode.end == END_TERMINAL)
        if episode.end == END_TERMINAL:
            assert episode.level_complete == (rewards[-1] == 1)
            assert episode.level_complete or episode.num_frames == puck.TIME_LIMIT
        ends[episode.end] += 1
    assert min(ends.values()) > 0
    longest = max(dataset.episodes, key=lambda episode: episode.num_frames)
    moved = np.roll(dataset.read(longest.index)["actions"], 1)
    assert not np.array_equal(replay_episode(PUCK, longest.level_seed, moved)[0], dataset.read(longest.index)["items"])


def test_the_same_configuration_gives_the_same_puck_set(collected: Path, tmp_path: Path) -> None:
    assert run_collect(config(tmp_path / "again", workers=2)) == read_manifest(collected)
    other = run_collect(config(tmp_path / "other", seed=1, train_frames=160, val_frames=0))
    assert other["content_sha256"] != read_manifest(collected)["content_sha256"]


def test_levels_are_what_they_were() -> None:
    """Frames of fixed levels and actions, as a digest: another JAX or another device must not make another game."""
    frames, _, _ = replay_episode(PUCK, 12345, np.arange(40) % 5)
    weights = np.arange(1, frames.size + 1, dtype=np.uint64).reshape(frames.shape)
    assert int((frames.astype(np.uint64) * weights).sum()) == GOLDEN_CHECKSUM


GOLDEN_CHECKSUM = 5_326_036_283_768


def play(seed: int, actions: np.ndarray) -> list[puck.State]:
    step = jax.jit(puck.step)
    states = [jax.jit(puck.reset)(jnp.uint32(seed))]
    for action in actions:
        states.append(step(states[-1], jnp.int32(action))[0])
    return states


def test_the_state_is_where_the_pixels_are() -> None:
    """Middle of mass of what has the puck's colour, against the state, to less than a third of a pixel."""
    checked = 0
    for seed in range(6):
        for state in play(seed, np.random.default_rng(seed).integers(0, 5, 30))[::5]:
            values = np.asarray(puck.numbers(state))
            if np.hypot(*(values[0:2] - values[4:6])) < 8:
                continue  # the puck is drawn over the ball
            without = state._replace(place_2=jnp.asarray([-9999, -9999]))
            difference = np.abs(
                np.asarray(puck.render(state), np.float64) - np.asarray(puck.render(without), np.float64)
            ).sum(axis=-1)
            rows, columns = np.indices(difference.shape) + 0.5
            middle = np.asarray([(difference * columns).sum(), (difference * rows).sum()]) / difference.sum()
            assert np.abs(middle - values[:2]).max() < 0.34
            checked += 1
    assert checked > 15


def test_puck_physics() -> None:
    free = puck.State(
        place_2=jnp.asarray([16 * 256, 32 * 256]), speed_2=jnp.zeros(2, jnp.int32),
        ball_place_2=jnp.asarray([48 * 256, 8 * 256]), ball_speed_2=jnp.asarray([100, 0]),
        walls_RS=jnp.zeros((8, 8), bool).at[4, 4].set(True), gravity=jnp.int32(0),
        colours_23=jnp.zeros((2, 3), jnp.uint8), time=jnp.int32(0),
    )  # fmt: skip
    step = jax.jit(puck.step)
    # Each action pushes its own way; doing nothing keeps a puck at rest where it is.
    moved = {
        name: np.asarray(puck.numbers(step(free, jnp.int32(index))[0]) - puck.numbers(free))[:2]
        for index, name in enumerate(puck.SPEC.action_names)
    }
    assert not moved["none"].any()
    assert moved["right"][0] > 0.5
    assert moved["left"][0] == -moved["right"][0]
    assert moved["down"][1] == -moved["up"][1] == moved["right"][0]
    assert moved["right"][1] == 0
    # A puck that is pushed against the wall in its way never enters it and comes back slower than it went.
    state, places, speeds = free, [], []
    for _ in range(30):
        state = step(state, jnp.int32(2))[0]
        values = np.asarray(puck.numbers(state))
        places.append(values[0])
        speeds.append(values[2])
    assert max(places) <= 32 - 3
    assert min(speeds) < 0
    fastest = max(speeds) + puck.PUSH * puck.SUBSTEPS / puck.UNIT  # it is pushed before it moves and hits
    assert -min(speeds) <= 0.75 * fastest
    # The ball loses nothing at walls or at the rim, and without gravity keeps its direction between them.
    ball = [np.asarray(puck.numbers(s))[6] for s in (free, *play_from(free, 60))]
    assert {abs(float(v)) for v in ball} == {abs(float(ball[0]))}
    assert min(ball) < 0 < max(ball)
    # Gravity pulls the puck down only.
    fallen = step(free._replace(gravity=jnp.int32(12)), jnp.int32(0))[0]
    assert np.asarray(puck.numbers(fallen))[1] > 32
    # Touching ends the episode and pays.
    touching = free._replace(ball_place_2=free.place_2 + jnp.asarray([5 * 256, 0]))
    _, reward, over, complete = step(touching, jnp.int32(0))
    assert (float(reward), bool(over), int(complete)) == (1.0, True, 1)
    late = free._replace(time=jnp.int32(puck.TIME_LIMIT - 1))
    _, reward, over, complete = step(late, jnp.int32(0))
    assert (float(reward), bool(over), int(complete)) == (0.0, True, 0)


def play_from(state: puck.State, steps: int) -> list[puck.State]:
    step, states = jax.jit(puck.step), []
    for _ in range(steps):
        state = step(state, jnp.int32(0))[0]
        states.append(state)
    return states


def test_levels_differ_and_never_begin_inside_a_wall() -> None:
    seeds = jnp.arange(300, dtype=jnp.uint32)
    states = jax.jit(jax.vmap(puck.reset))(seeds)
    frames = np.asarray(jax.jit(jax.vmap(puck.render))(states))
    assert len({frame.tobytes() for frame in frames}) == 300
    for place in (states.place_2, states.ball_place_2):
        assert not np.asarray(jax.vmap(puck._blocked)(place, states.walls_RS)).any()
    assert 0.1 < np.asarray(states.walls_RS).mean() < 0.2
    assert set(np.asarray(states.gravity).tolist()) == set(range(13))
    apart = np.abs(np.asarray(states.place_2 - states.ball_place_2)).max(axis=1)
    assert (apart >= 8 * 256).all()


def test_states_of_windows_are_those_of_their_frames(collected: Path) -> None:
    dataset = open_dataset(collected, "train")
    clips = dataset.fixed_windows(12, 5, seed=3)
    states = known_states(dataset, clips["windows_B"], 5)
    assert states is not None
    names, groups, states_BTK = states.names, states.groups, states.values_BTK
    assert states_BTK.shape == (12, 5, len(names))
    assert {column for columns in groups.values() for column in columns} == set(range(len(names)))
    for row, window in enumerate(clips["windows_B"]):
        episode, start = dataset.locate(int(window), 5)
        info = dataset.episodes[episode]
        actions = dataset.read(episode, with_items=False)["actions"]
        played = play(info.level_seed, actions[: start + 4])[start:]
        np.testing.assert_array_equal(states_BTK[row], np.stack([puck.numbers(state) for state in played]))
        np.testing.assert_array_equal(clips["frames_BTHWC"][row], np.stack([puck.render(state) for state in played]))


def test_other_sources_have_no_known_state(make_set: Any) -> None:
    dataset = open_dataset(make_set(), "train")
    assert known_states(dataset, dataset.fixed_window_ids(2, 3), 3) is None


# ------------------------------------------------------------------------------------------------------------ policies


class Circling:
    """Goes through the actions in order; a user's policy."""

    def __init__(self, num_envs: int, actions: int, offset: int = 0) -> None:
        self.count, self.actions, self.time, self.offset = num_envs, actions, 0, offset

    def act(self, frames_NHWC: np.ndarray, first_N: np.ndarray) -> np.ndarray:
        self.time += 1
        return np.full(self.count, self.time % self.actions + self.offset)


def circling(num_envs: int, generator: np.random.Generator, action_names: tuple[str, ...]) -> Circling:
    return Circling(num_envs, len(action_names))


def reaching_too_far(num_envs: int, generator: np.random.Generator, action_names: tuple[str, ...]) -> Circling:
    return Circling(num_envs, len(action_names), offset=1)


def misshapen(num_envs: int, generator: np.random.Generator, action_names: tuple[str, ...]) -> Circling:
    return Circling(num_envs + 1, len(action_names))


def no_policy(num_envs: int, generator: np.random.Generator, action_names: tuple[str, ...]) -> object:
    return object()


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """These policies as a module that a user would name."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "my_policies.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return "my_policies"


def test_a_policy_of_your_own_plays_and_its_source_is_in_the_recipe(own_module: str, tmp_path: Path) -> None:
    small: dict[str, Any] = {"train_frames": 4 * 12, "val_frames": 0}
    manifest = run_collect(config(tmp_path / "set", policy=f"{own_module}:circling", **small))
    actions = open_dataset(tmp_path / "set", "train").read(0)["actions"]
    assert actions.tolist() == [(t + 1) % 5 for t in range(len(actions))]
    assert len(manifest["source"]["recipe"]["policy_source_sha256"]) == 64
    for name, message in (
        ("reaching_too_far", r"action 5 is outside \[0, 5\)"),
        ("misshapen", r"shape \(5,\).*expected integers of shape \(4,\)"),
        ("no_policy", r"gave a object, which has no act"),
        ("absent", "has no function absent"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_collect(config(tmp_path / name, policy=f"{own_module}:{name}", **small))
    with pytest.raises(ConfigError, match="cannot be imported"):
        run_collect(config(tmp_path / "x", policy="no_such_module_here:function", **small))
    with pytest.raises(ConfigError, match="expected one of random, sticky, sticky-right, or module:function"):
        run_collect(config(tmp_path / "x", policy="clever", **small))
    assert not (tmp_path / "x").exists()


def test_sticky_policies_of_any_game() -> None:
    names = puck.SPEC.action_names
    frames, never = np.zeros((64, 1, 1, 3), np.uint8), np.zeros(64, bool)

    def shares(policy: Any) -> tuple[np.ndarray, float]:
        actions = np.stack([policy.act(frames, never) for _ in range(600)])[50:]
        return np.bincount(actions.ravel(), minlength=5) / actions.size, float(np.mean(actions[1:] == actions[:-1]))

    even, repeats = shares(make_policy("sticky", 64, np.random.default_rng(0), action_names=names))
    assert np.abs(even - 0.2).max() < 0.03
    assert repeats == pytest.approx(0.75 + 0.25 * 0.2, abs=0.01)
    right, _ = shares(make_policy("sticky-right", 64, np.random.default_rng(0), action_names=names))
    assert right[names.index("right")] > 0.5
    assert right.min() > 0.05
    with pytest.raises(ConfigError, match=r"no action goes to the right.*use 'sticky'"):
        right_weights(("noop", "fire"))
    assert isinstance(make_policy("sticky", 2, np.random.default_rng(0)), StickyPolicy)


# ------------------------------------------------------------------------------------------------------------ adapters


def test_games_are_named_and_options_of_procgen_are_refused_elsewhere() -> None:
    with pytest.raises(ConfigError, match="did you mean 'puck'"):
        EnvOptions(game="puk")
    with pytest.raises(ConfigError, match="distribution_mode: is an option of procgen games"):
        EnvOptions(game="puck", distribution_mode="easy")
    with pytest.raises(ConfigError, match="at least one level"):
        open_games(PUCK, num_envs=1, start_level=0, num_levels=0, rand_seed=0)


@pytest.mark.parametrize("game", ["minatar:breakout", "atari:pong", "craftax:classic"])
def test_a_missing_package_is_an_error_that_names_the_extra(
    game: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(adapters.ADAPTED, game.partition(":")[0], "a_package_that_nobody_has")
    adapters.adapted_spec.cache_clear()
    adapters._craftax.cache_clear()
    message = r"a_package_that_nobody_has, which is not installed: pip install .*\[games\]"
    with pytest.raises(ConfigError, match=message):
        run_collect(config(tmp_path / "set", env=EnvOptions(game=game), train_frames=8, val_frames=0))
    assert not (tmp_path / "set").exists()


def installed(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(adapters.ADAPTED[kind]) is None, reason=f"{adapters.ADAPTED[kind]} is not installed"
    )


@pytest.mark.parametrize(
    "game",
    [
        *(pytest.param(f"minatar:{name}", marks=installed("minatar")) for name in adapters.MINATAR_GAMES),
        pytest.param("atari:pong", marks=installed("atari")),
        pytest.param("atari:breakout", marks=installed("atari")),
        pytest.param("craftax:classic", marks=[installed("craftax"), pytest.mark.slow]),
        pytest.param("craftax:full", marks=[installed("craftax"), pytest.mark.slow]),
    ],
)
def test_an_adapted_game_is_recorded_and_replays(game: str, tmp_path: Path) -> None:
    options = EnvOptions(game=game)
    frames_each = 150 if game.startswith("minatar") else 30
    manifest = run_collect(
        config(tmp_path, env=options, num_envs=2, train_frames=2 * frames_each, val_frames=0, shard_steps=100)
    )
    assert manifest["name"] == game
    assert manifest["item_shape"] == [64, 64, 3]
    assert manifest["num_actions"] == len(spec_of(options).action_names) >= 3
    assert find_problems(tmp_path) == []
    dataset = open_dataset(tmp_path, "train")
    assert dataset.num_frames == 2 * frames_each
    checked = dataset.episodes[:: max(1, dataset.num_episodes // 4)]
    for episode in checked:
        recorded = dataset.read(episode.index)
        frames, rewards, ended = replay_episode(options, episode.level_seed, recorded["actions"])
        assert np.array_equal(frames, recorded["items"])
        assert np.array_equal(rewards, recorded["rewards"])
        assert ended == (episode.end == END_TERMINAL)
    longest = dataset.read(max(dataset.episodes, key=lambda episode: episode.num_frames).index)["items"]
    assert (longest[1:] != longest[:-1]).any(), "nothing ever moves"
    assert len(np.unique(longest[0].reshape(-1, 3), axis=0)) >= 2
    levels = [open_games(options, num_envs=1, start_level=seed, num_levels=1, rand_seed=0) for seed in (3, 3, 5, 6, 7)]
    first = [games.observe()[1][0] for games in levels]
    assert np.array_equal(first[0], first[1])
    if not game.startswith("minatar"):  # a MinAtar game differs in what comes later
        assert any(not np.array_equal(first[0], other) for other in first[2:])


@pytest.mark.parametrize("game", ["minatar:pong", "atari:no_such_cartridge", "craftax:huge"])
def test_unknown_games_of_a_package_are_named(game: str) -> None:
    kind = game.partition(":")[0]
    if importlib.util.find_spec(adapters.ADAPTED[kind]) is None:
        pytest.skip(f"{adapters.ADAPTED[kind]} is not installed")
    with pytest.raises(ConfigError, match=f"game '{game}': {kind} has "):
        spec_of(EnvOptions(game=game))
