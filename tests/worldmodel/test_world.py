"""Trained worlds in use: evaluation, pictures, play, export to an artifact and back."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from common.artifact.container import load_artifact, save_artifact
from common.errors import ArtifactError, ConfigError
from common.quant.grid import dequantize
from tests.worldmodel.small import DYNAMICS, NUM_ACTIONS, MemorySource, game_clips, train_config
from worldmodel.config import EvaluateConfig, RolloutConfig
from worldmodel.evaluate import suite
from worldmodel.export import (
    DERIVED,
    GRIDS,
    export_world,
    fixed_tensors,
    inference_values,
    is_quantized,
    load_exported,
    stored_values,
)
from worldmodel.fisher import matrix_rows, world_statistics
from worldmodel.models.token_dynamics import MaskGitDynamics, standardize_codes
from worldmodel.rollout.render import (
    Row,
    gif_bytes,
    movie,
    rollout_rows,
    sheet,
    side_by_side,
    write_picture_files,
)
from worldmodel.rollout.world import World
from worldmodel.train.loop import train
from worldmodel.train.restore import load_dynamics, load_tokenizer

ROLLOUT = RolloutConfig(prompt_frames=2, horizon=3, decode_steps=2)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[str, World]:
    root = tmp_path_factory.mktemp("worlds")
    tokenizer = train_config("tokenizer", str(root / "tokenizer"))
    train(tokenizer, source=MemorySource(tokenizer))
    result = {}
    for source in ("ground-truth", "latent"):
        config = train_config(
            "dynamics", str(root / source), tokenizer_run=tokenizer.run_dir,
            dynamics=dataclasses.replace(DYNAMICS, action_source=source),
        )  # fmt: skip
        train(config, source=MemorySource(config))
        config, dynamics = load_dynamics(config.run_dir, NUM_ACTIONS)
        result[source] = World(config, load_tokenizer(tokenizer.run_dir), dynamics, NUM_ACTIONS, source="float")
    return result


@pytest.fixture(scope="module")
def statistics(worlds) -> dict[str, dict]:
    clips = game_clips(32, 4, seed=3)
    return {source: world_statistics(world, clips, pixel_weight=0.25) for source, world in worlds.items()}


class FakeSet:
    content_sha256 = "0" * 64

    def require_windows(self, seq_len: int) -> int:
        return 13

    def fixed_windows(self, count: int, seq_len: int, seed: int = 0):
        return game_clips(count, seq_len, seed=seed)


@pytest.mark.parametrize("source", ["ground-truth", "latent"])
def test_evaluation_measures_what_it_says(worlds, source, monkeypatch):
    monkeypatch.setattr(suite, "open_dataset", lambda *_: FakeSet())
    monkeypatch.setattr(suite, "MATMUL_SIZE", 64)
    config = EvaluateConfig(clips=99, batch_size=5, horizons=(1, 3), delta_horizon=2, bootstrap_samples=50,
                            rollout=ROLLOUT, speed_frames=3, reader_steps=0, frechet_samples=5)  # fmt: skip
    world = worlds[source]
    document = suite.evaluate_world(world, "data", config)
    json.dumps(document)
    clips = game_clips(13, 5, seed=0)
    truth = clips["frames_BTHWC"] / 255.0
    copy_mse = ((truth[:, 2] - truth[:, 1]) ** 2).mean()
    assert document["horizons"]["1"]["copy_last_psnr_db"]["value"] == pytest.approx(-10 * np.log10(copy_mse), abs=1e-3)
    driven = world.actions_of(clips["frames_BTHWC"], clips["actions_BT"])
    dream = world.frames_after(clips["frames_BTHWC"], driven, ROLLOUT, jax.random.key(0))
    mse = ((truth[:, 4] - np.asarray(dream)[:, 2]) ** 2).mean()
    entry = document["horizons"]["3"]
    assert entry["rollout_psnr_db"]["value"] == pytest.approx(-10 * np.log10(mse), abs=1e-3)
    expected = entry["rollout_psnr_db"]["value"] - entry["copy_last_psnr_db"]["value"]
    assert entry["above_copy_last_db"]["value"] == pytest.approx(expected, abs=1e-6)
    assert entry["rollout_psnr_db"]["low"] <= entry["rollout_psnr_db"]["value"] <= entry["rollout_psnr_db"]["high"]
    assert document["data"]["clips"] == 13
    assert document["action_codes"]["of"] == (6 if source == "latent" else NUM_ACTIONS)
    assert sum(document["action_codes"]["shares"]) == pytest.approx(1.0, abs=1e-3)
    assert document["teacher_forced_bits_per_frame"]["value"] > 0
    speed = document["speed"]
    assert speed["frames"] == 3
    assert 0 < speed["p50_ms"] <= speed["p95_ms"]
    assert 0 < speed["mfu"] < 1
    assert 0 < speed["remembered_bytes"] < speed["peak_memory_bytes"]
    far, oracle = (document["frechet_random_features"][name] for name in ("dream", "tokenizer_oracle"))
    assert far["value"] > 0 < oracle["value"]
    assert document["action_fidelity"] is None


def test_teacher_forced_bits_are_the_cross_entropy_of_unscaled_logits(worlds):
    world = worlds["ground-truth"]
    clips = game_clips(2, 4, seed=0)
    tokens, actions = world.encode(clips["frames_BTHWC"]), clips["actions_BT"][:, :-1]
    bits = np.asarray(world.bits(tokens, actions))
    model = world.dynamics
    assert isinstance(model, MaskGitDynamics)
    action = model.shift_actions(model.embed_action_codes(jax.numpy.asarray(actions)))
    hidden = np.ones((2, 4), bool)
    for t in (1, 3):
        logits = np.asarray(model.next_frame_logits(tokens[:, : t + 1], hidden, action[:, : t + 1]), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats = -np.take_along_axis(log_p, np.asarray(tokens)[:, t, :, None], axis=-1).sum((1, 2))
        np.testing.assert_allclose(bits[:, t - 1], nats / np.log(2), rtol=1e-4)


def test_random_actions_keep_the_prompt(worlds):
    actions = np.full((50, 6), 7)
    changed = suite.random_actions(actions, 2, 3, np.random.default_rng(0))
    assert (changed[:, :2] == 7).all()
    assert set(np.unique(changed[:, 2:])) == {0, 1, 2}
    assert (actions == 7).all()


def test_playing_equals_rolling_out(worlds):
    world = worlds["ground-truth"]
    clips = game_clips(1, 7, seed=4)
    config = dataclasses.replace(ROLLOUT, horizon=5, temperature=0.5)
    whole = world.frames_after(clips["frames_BTHWC"], clips["actions_BT"][:, :-1], config, jax.random.key(1))
    player = world.player(config)
    player.reset(clips["frames_BTHWC"][:, :2], clips["actions_BT"][:, :1], jax.random.key(1))
    for t in range(5):
        np.testing.assert_allclose(player.step(clips["actions_BT"][:, t + 1]), whole[:, t], atol=1e-5)
    with pytest.raises(ConfigError, match="outside"):
        player.step(np.asarray([NUM_ACTIONS]))


def test_rows_of_a_grid_and_their_files(worlds, tmp_path):
    clips = game_clips(1, 6, seed=4)
    rows = rollout_rows(list(worlds.values()), clips["frames_BTHWC"][0], clips["actions_BT"][0], ROLLOUT)
    labels = [row.label for row in rows]
    assert labels[:4] == ["truth", "reconstruction", "true actions", "inferred latent actions"]
    assert labels[4:] == [f"latent action {i}" for i in range(6)]
    assert all(row.frames_THWC.shape == (5, 16, 16, 3) and row.frames_THWC.dtype == np.uint8 for row in rows)
    np.testing.assert_array_equal(rows[0].frames_THWC, clips["frames_BTHWC"][0, :5])
    for row in rows[2:]:
        np.testing.assert_array_equal(row.frames_THWC[:2], rows[1].frames_THWC[:2])
    paths = write_picture_files(rows, tmp_path / "clip", formats=("png", "gif", "mp4"), fps=5)
    assert [p.name for p in paths] == ["clip.png", "clip.gif", "clip.mp4"]
    with Image.open(paths[1]) as gif:  # Pillow makes one frame of equal neighbours: the time is what stays
        assert sum(gif.seek(i) or gif.info["duration"] for i in range(gif.n_frames)) == 5 * 200
    with Image.open(paths[0]) as png:
        assert png.size[1] == 10 * (16 * 2 + 2)
    import imageio.v3 as iio

    assert len(iio.imread(paths[2])) == 5
    with pytest.raises(ConfigError, match="too short"):
        rollout_rows(list(worlds.values()), clips["frames_BTHWC"][0, :3], clips["actions_BT"][0], ROLLOUT)


def test_clips_side_by_side_keep_their_places():
    clips = [[Row(name, np.full((2, 4, 4, 3), 10 * clip + place, np.uint8)) for place, name in enumerate("abc")]
             for clip in range(3)]  # fmt: skip
    rows = side_by_side(clips, {"c": "see", "a": "ay"})
    assert [row.label for row in rows] == ["see", "ay"]
    assert rows[0].frames_THWC.shape == (2, 4, 3 * 4 + 2 * 2, 3)
    for clip in range(3):
        assert (rows[0].frames_THWC[:, :, 6 * clip : 6 * clip + 4] == 10 * clip + 2).all()
        assert (rows[1].frames_THWC[:, :, 6 * clip : 6 * clip + 4] == 10 * clip).all()


def test_a_shorter_rollout_begins_like_the_longer_one(worlds):
    world = worlds["ground-truth"]
    clips = game_clips(2, 6, seed=5)
    prompt, actions = world.encode(clips["frames_BTHWC"])[:, :2], clips["actions_BT"][:, :-1]
    config = dataclasses.replace(ROLLOUT, horizon=4, temperature=1.0, choice_temperature=1.0)
    whole = world.rollout(prompt, actions, config, jax.random.key(2))
    short = world.rollout(prompt, actions, dataclasses.replace(config, horizon=2), jax.random.key(2))
    np.testing.assert_array_equal(short, whole[:, :2])


def test_a_sheet_shows_each_pixel_where_it_belongs():
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    frames[1, 1, 2] = 200
    image = sheet([Row("a", frames)], scale=3)
    first = image.shape[1] - 2 * (4 * 3 + 2)
    assert (image[3:6, first + 14 + 6 : first + 14 + 9] == 200).all()
    film = movie([Row("a", frames)], scale=3)
    assert film.shape[0] == 2
    assert film.shape[1] % 2 == 0
    assert film.shape[2] % 2 == 0
    with Image.open(io.BytesIO(gif_bytes(film, fps=4))) as gif:
        assert gif.n_frames == 2
        assert gif.info["duration"] == 250


def test_shared_compilation_uses_each_worlds_own_weights(worlds, tmp_path):
    world = worlds["latent"]
    export_world(world, tmp_path / "m.artifact", grid="int4")
    stored = load_exported(tmp_path / "m.artifact")
    clips = game_clips(2, 5, seed=1)
    alone = stored.decode(stored.encode(clips["frames_BTHWC"]))
    shared = load_exported(tmp_path / "m.artifact").sharing(world)
    np.testing.assert_array_equal(shared.decode(shared.encode(clips["frames_BTHWC"])), alone)
    with pytest.raises(ConfigError, match="one configuration"):
        stored.sharing(worlds["ground-truth"])


def stored_form(world: World) -> dict[str, np.ndarray]:
    """Every inference value of a world under its artifact's name, matrices with one output a row."""
    values = {}
    for prefix, model in (("tokenizer", world.tokenizer), ("dynamics", world.dynamics)):
        for name, value in inference_values(model).items():
            values[f"{prefix}/{name}"] = matrix_rows(name, value) if is_quantized(value) else value
    return values


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("source", ["ground-truth", "latent"])
def test_artifacts_hold_exactly_the_grid_of_the_weights(worlds, tmp_path, grid, source, monkeypatch):
    monkeypatch.setattr("worldmodel.export.MIN_QUANTIZED_VALUES", 32)
    world = worlds[source]
    report = export_world(world, tmp_path / "m.artifact", grid=grid)
    assert report.file_bytes == (tmp_path / "m.artifact").stat().st_size
    back = load_exported(tmp_path / "m.artifact")
    assert back.config == world.config
    assert back.num_actions == NUM_ACTIONS
    stored, expected = stored_form(back), fixed_tensors(stored_values(world), grid)
    assert stored.keys() == expected.keys() | {DERIVED}
    assert sum(not isinstance(tensor, np.ndarray) for tensor in expected.values()) > 8
    for name, tensor in expected.items():
        value = tensor if isinstance(tensor, np.ndarray) else dequantize(tensor)
        np.testing.assert_array_equal(stored[name], value)
    # the dynamics' copy of the codebook is not stored: it follows from the codebook that was
    np.testing.assert_array_equal(stored[DERIVED], standardize_codes(np.asarray(back.tokenizer.quantizer.codes)))
    np.testing.assert_allclose(stored[DERIVED], stored_form(world)[DERIVED], atol=0.02 if grid == "int8" else 0.2)
    clips = game_clips(2, 5, seed=1)
    driven = back.actions_of(clips["frames_BTHWC"], clips["actions_BT"])
    dream = back.frames_after(clips["frames_BTHWC"], driven, ROLLOUT, jax.random.key(0))
    assert np.isfinite(dream).all()


def test_artifacts_of_the_first_format_keep_their_own_codes(worlds, tmp_path):
    world = worlds["ground-truth"]
    export_world(world, tmp_path / "new")
    tensors, meta = load_artifact(tmp_path / "new")
    codes_VL = np.asarray(world.dynamics.codes_VL[...]) + 1
    old = {**meta, "format": "worldmodel-1"}
    save_artifact(tmp_path / "old", {**tensors, DERIVED: codes_VL}, old)
    np.testing.assert_array_equal(load_exported(tmp_path / "old").dynamics.codes_VL[...], codes_VL)
    save_artifact(tmp_path / "gap", tensors, old)
    with pytest.raises(ArtifactError, match="codes_VL"):
        load_exported(tmp_path / "gap")
    save_artifact(tmp_path / "twice", {**tensors, DERIVED: codes_VL}, meta)
    with pytest.raises(ArtifactError, match="codes_VL"):
        load_exported(tmp_path / "twice")


@pytest.mark.parametrize(
    ("source", "grid"), [("ground-truth", "fitted"), ("latent", "fitted"), ("ground-truth", "trellis")]
)
def test_fitted_grids_fill_their_bits_and_keep_the_world(worlds, statistics, tmp_path, source, grid, monkeypatch):
    monkeypatch.setattr("worldmodel.export.MIN_QUANTIZED_VALUES", 32)
    world = worlds[source]
    values = stored_values(world)
    assert statistics[source].keys() <= values.keys()
    assert any("/lam/" in name for name in statistics[source]) == (source == "latent")
    with pytest.raises(ConfigError, match="statistics"):
        export_world(world, tmp_path / "none", grid=grid)
    with pytest.raises(ConfigError, match="at least 4 clips"):
        world_statistics(world, game_clips(3, 4, seed=3))
    report = export_world(world, tmp_path / "m.artifact", grid=grid, bits=7.0, statistics=statistics[source])
    budget_bytes = 7.0 * sum(value.size for value in values.values()) / 8
    assert 0.995 * budget_bytes - 1 <= report.file_bytes <= budget_bytes
    assert any(tensor.grid.startswith("trellis") for tensor in report.tensors) == (grid == "trellis")
    back = load_exported(tmp_path / "m.artifact")
    clips = game_clips(32, 4, seed=5)
    driven = world.actions_of(clips["frames_BTHWC"], clips["actions_BT"])
    tokens = world.encode(clips["frames_BTHWC"])
    lost = float((back.bits(tokens, driven) - world.bits(tokens, driven)).mean())
    assert abs(lost) < 0.3 * float(world.bits(tokens, driven).mean())


def test_statistics_are_second_moments_of_the_gradient(worlds, statistics):
    world = worlds["ground-truth"]
    for name in ("tokenizer/params/path_out/kernel", "dynamics/params/head/kernel"):
        layer = statistics["ground-truth"][name]
        n_columns = layer.hessian_CC.shape[1]
        assert layer.hessian_CC.shape == (n_columns, n_columns)
        rounding = 1e-6 * np.trace(layer.hessian_CC)  # of float32 products, whose order differs from side to side
        np.testing.assert_allclose(layer.hessian_CC, layer.hessian_CC.T, rtol=0, atol=rounding)
        assert np.linalg.eigvalsh(layer.hessian_CC).min() > -rounding
        assert layer.sensitivity_R.mean() == pytest.approx(1.05)
    # decoder output x = W z + b: a unit of noise over the pixels has E|dW|^2 = (pixels a patch) E|z|^2 / mse
    clips = game_clips(32, 4, seed=3)
    tokenizer = world.tokenizer
    latent = np.asarray(tokenizer.quantizer.lookup(tokenizer.encode(clips["frames_BTHWC"])), np.float64)
    rebuilt = np.asarray(tokenizer.decode_latent(jax.numpy.asarray(latent, np.float32)))
    patches_per_frame, mse = latent.shape[2], ((rebuilt - clips["frames_BTHWC"] / 255.0) ** 2).mean()
    layer = statistics["ground-truth"]["tokenizer/params/path_out/kernel"]
    expected = 0.25 * len(layer.sensitivity_R) * patches_per_frame * (latent**2).sum(-1).mean() / mse
    assert np.trace(layer.hessian_CC) * len(layer.sensitivity_R) == pytest.approx(expected, rel=0.4)


def test_artifacts_are_not_overwritten_and_damage_is_named(worlds, tmp_path):
    path = tmp_path / "m.artifact"
    export_world(worlds["ground-truth"], path)
    with pytest.raises(ConfigError, match="--overwrite"):
        export_world(worlds["ground-truth"], path)
    first = path.read_bytes()
    export_world(worlds["ground-truth"], path, overwrite=True)
    assert path.read_bytes() == first
    with pytest.raises(ConfigError, match="unknown grid"):
        export_world(worlds["ground-truth"], tmp_path / "x", grid="int3")
    path.write_bytes(first[:-5])
    with pytest.raises(ArtifactError):
        load_exported(path)


def test_artifacts_of_another_shape_are_refused(worlds, tmp_path, monkeypatch):
    path = tmp_path / "m.artifact"
    export_world(worlds["ground-truth"], path)
    tensors, meta = load_artifact(path)
    save_artifact(tmp_path / "less", {k: v for k, v in tensors.items() if "mask_token" not in k}, meta)
    with pytest.raises(ArtifactError, match="mask_token"):
        load_exported(tmp_path / "less")
    save_artifact(tmp_path / "other", tensors, {**meta, "format": "language-model"})
    with pytest.raises(ArtifactError, match="not a world-model artifact"):
        load_exported(tmp_path / "other")
    save_artifact(tmp_path / "wide", {**tensors, "dynamics/params/head_bias": np.zeros(3, np.float32)}, meta)
    with pytest.raises(ArtifactError, match=r"head_bias: \(3,\) held"):
        load_exported(tmp_path / "wide")


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        (("tokenizer", "encoder"), {"layers": 10**9}, "tokenizer.encoder.layers is 1000000000"),
        (("tokenizer", "quantizer"), {"codes": 1 << 40}, "tokenizer.quantizer.codes is 1099511627776"),
        (("tokenizer", "encoder"), {"dim": 60_000, "heads": 2}, "tensors do not fit"),
        (("tokenizer", "frame"), {"height": -8}, "tokenizer.frame.height is -8"),
        (("tokenizer", "frame"), {"patch": 0}, "a size of FrameConfig is out of range"),
    ],
)
def test_artifacts_that_lie_about_their_size_are_refused_before_they_are_built(worlds, tmp_path, part, change, says):
    from common.artifact.container import load_artifact, save_artifact

    path = tmp_path / "m.artifact"
    export_world(worlds["ground-truth"], path)
    tensors, meta = load_artifact(path)
    node = meta["config"]
    for name in part:
        node = node[name]
    node |= change
    save_artifact(path, tensors, meta)
    with pytest.raises(ArtifactError, match=says):
        load_exported(path)
