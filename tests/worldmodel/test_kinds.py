"""Causal and diffusion dynamics beside MaskGIT: exact caches, and one loop, one export, one evaluation for all."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import ConfigError
from tests.worldmodel.small import DYNAMICS, NUM_ACTIONS, OPTIM, TOKENIZER, MemorySource, game_clips, train_config
from worldmodel.config import DiffusionConfig, EvaluateConfig, QuantizerConfig, RolloutConfig, TrainConfig
from worldmodel.evaluate import suite
from worldmodel.export import export_world, load_exported
from worldmodel.models.diffusion import DiffusionDynamics
from worldmodel.models.kinds import build_dynamics
from worldmodel.models.token_dynamics import CausalDynamics, TokenDynamics
from worldmodel.models.tokenizer import Tokenizer, hidden_patches
from worldmodel.play.pool import DreamPool
from worldmodel.rollout.sampling import rollout_frames
from worldmodel.rollout.world import World
from worldmodel.train.loop import train
from worldmodel.train.restore import load_dynamics, load_tokenizer

MAE = dataclasses.replace(
    TOKENIZER, quantizer=QuantizerConfig(kind="tanh", codes=0, latent_dim=8), mask_high=0.9
)
# Compiling is what these tests cost: one layer, whose window ends within a short rollout.
BLOCKS = dataclasses.replace(DYNAMICS.blocks, layers=1, temporal_window=3)
CAUSAL = dataclasses.replace(DYNAMICS, kind="causal", blocks=BLOCKS)
SHORTCUT = dataclasses.replace(
    DYNAMICS, kind="diffusion", diffusion=DiffusionConfig(levels=8, shortcut=True), blocks=BLOCKS
)
KINDS = {
    "causal": (TOKENIZER, CAUSAL),
    "diffusion-v": (
        MAE, dataclasses.replace(SHORTCUT, diffusion=DiffusionConfig(levels=8, prediction="v", history="context"))
    ),
    "shortcut-mamba": (
        MAE, dataclasses.replace(SHORTCUT, blocks=dataclasses.replace(BLOCKS, mixer="mamba2", mamba_state=8))
    ),
}  # fmt: skip
ROLLOUT = RolloutConfig(prompt_frames=2, horizon=3, decode_steps=2, temperature=0.7)


def model_of(name: str):
    """An untrained model whose outputs depend strongly on everything that it sees."""
    tokenizer, dynamics = KINDS[name]
    config = train_config("dynamics", "unused", tokenizer=tokenizer, dynamics=dynamics)
    codes = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    model = build_dynamics(config, num_actions=NUM_ACTIONS, codes_VL=codes, rngs=nnx.Rngs(0))
    if isinstance(model, TokenDynamics):
        model.token_table[...] = jax.random.normal(jax.random.key(9), model.token_table.shape)
    else:
        model.latent_out.kernel[...] = jax.random.normal(jax.random.key(9), model.latent_out.kernel.shape)
        model.spread[...] = jnp.asarray(0.3)
    model.action_table[...] = 10.0 * model.action_table[...]
    return model


def prompt_of(model, frames: int = 2, clips: int = 2):
    if isinstance(model, TokenDynamics):
        return jax.random.randint(jax.random.key(0), (clips, frames, 4), 0, 16)
    return jnp.tanh(jax.random.normal(jax.random.key(0), (clips, frames, 4, 8)))


@pytest.mark.parametrize("name", KINDS)
def test_rollouts_with_and_without_memory_are_equal(name):
    model = model_of(name)
    actions = np.asarray(jax.random.randint(jax.random.key(1), (16, 4), 0, NUM_ACTIONS))
    prompt = prompt_of(model, clips=16)
    # Frames 2, 3, 4: the last sees frames 2 and 3 only. Warm enough that an untrained model does not repeat one token.
    config = dataclasses.replace(ROLLOUT, horizon=3, temperature=3.0)
    roll = jax.jit(
        lambda prompt, actions, config: rollout_frames(model, prompt, actions, config, jax.random.key(2)),
        static_argnames="config",
    )
    cached = roll(prompt, actions, config)
    whole = roll(prompt, actions, dataclasses.replace(config, use_cache=False))
    if isinstance(model, TokenDynamics):
        np.testing.assert_array_equal(cached, whole)
        assert len(np.unique(cached)) > 8
    else:
        np.testing.assert_allclose(cached, whole, atol=2e-4)
        assert float(cached.std(axis=1).mean()) > 1e-2
    changed = roll(prompt, np.concatenate([actions[:, :3], (actions[:, 3:] + 1) % 3], axis=1), config)
    np.testing.assert_array_equal(changed[:, :2], cached[:, :2])  # action 3 leads to frame 4, future frame 2
    assert (changed[:, 2:] != cached[:, 2:]).any()


def test_a_causal_token_sees_the_whole_past_and_its_own_frame_up_to_itself():
    model = model_of("causal")
    assert isinstance(model, CausalDynamics)
    tokens = prompt_of(model, frames=4)
    action = model.shift_actions(model.embed_action_codes(jnp.zeros((2, 3), jnp.int32)))
    logits_of = jax.jit(model)
    base = logits_of(tokens, action)

    def changes(frame: int, place: int) -> np.ndarray:
        other = logits_of(tokens.at[:, frame, place].set((tokens[:, frame, place] + 5) % 16), action)
        return np.asarray(jnp.abs(other - base).max(axis=(0, 3)) > 1e-5)

    moved = changes(2, 1)
    assert not moved[:2].any()
    assert moved[2].tolist() == [False, False, True, True]  # not itself, not what comes before it
    assert moved[3].all()
    assert changes(2, 3)[3].all()  # the last token of a past frame reaches the first of the next: Jasmine's does not
    bits = model.frame_bits(tokens, action)
    log_p = np.asarray(jax.nn.log_softmax(base[:, 1:], axis=-1))
    chosen = np.take_along_axis(log_p, np.asarray(tokens)[:, 1:, :, None], axis=-1)[..., 0]
    np.testing.assert_allclose(bits, -chosen.sum(-1) / np.log(2), rtol=1e-5)


def test_forcing_sees_noised_frames_and_context_the_remembered_ones():
    model = model_of("diffusion-v")
    assert isinstance(model, DiffusionDynamics)
    x = prompt_of(model, frames=3)
    level, step = jnp.asarray([[2, 5, 3]] * 2), jnp.zeros((2, 3), jnp.int32)
    action = model.shift_actions(model.embed_action_codes(jnp.zeros((2, 2), jnp.int32)))
    denoise = jax.jit(model)
    forced, changed = (denoise(y, level, step, action)[1] for y in (x, x.at[:, 1].add(0.5)))
    np.testing.assert_array_equal(forced[:, 0], changed[:, 0])
    assert jnp.abs(forced[:, 2] - changed[:, 2]).max() > 1e-4
    with_context, changed = (denoise(y, level, step, action, x)[1] for y in (x, x.at[:, 1].add(0.5)))
    np.testing.assert_allclose(with_context[:, 2], changed[:, 2], atol=1e-6)
    assert jnp.abs(with_context[:, 1] - changed[:, 1]).max() > 1e-4
    cleaner = denoise(x, level.at[:, 1].set(7), step, action)[1]
    assert jnp.abs(forced[:, 2] - cleaner[:, 2]).max() > 1e-5  # the level of the past is told


def test_remembered_frames_carry_the_noise_of_their_level():
    model = model_of("diffusion-v")
    assert isinstance(model, DiffusionDynamics)
    assert model.context == 7
    frame = jnp.full((500, 4, 8), 0.6)
    known = model.as_context(frame, jnp.int32(3), jax.random.key(0))
    assert float(known.mean()) == pytest.approx(0.6 / 0.3 * 7 / 8, abs=0.01)
    assert float(known.std()) == pytest.approx(1 / 8, rel=0.05)
    np.testing.assert_array_equal(known, model.as_context(frame, jnp.int32(3), jax.random.key(0)))
    assert (known != model.as_context(frame, jnp.int32(4), jax.random.key(0))).all()
    np.testing.assert_allclose(model.to_latent(model.normalize(frame)), frame, atol=1e-6)


def test_hidden_patches_do_not_reach_the_latents():
    shares = np.asarray(hidden_patches(jax.random.key(0), (500, 2, 200), 0.9)).mean(axis=(1, 2))
    assert shares.max() < 0.97
    assert abs(shares.mean() - 0.45) < 0.03
    model = Tokenizer(dataclasses.replace(MAE, linear_path=False), rngs=nnx.Rngs(0))
    frames = jnp.asarray(game_clips(1, 1, seed=1)["frames_BTHWC"])
    hidden = jnp.asarray([[[True, False, False, False]]])
    encode = jax.jit(lambda frames: model.encode_latent(frames, hidden_BTN=hidden))
    base = encode(frames)
    np.testing.assert_array_equal(encode(frames.at[:, :, :8, :8].set(7)), base)  # patch 0 holds other pixels
    assert jnp.abs(encode(frames.at[:, :, :8, 8:].set(7)) - base)[0, 0, 0].max() > 1e-5  # patch 1 tells of it


def test_tanh_latents_start_as_pca_and_stay_in_range():
    frames = game_clips(8, 2, seed=1)["frames_BTHWC"]
    model = Tokenizer(MAE, rngs=nnx.Rngs(0))
    model.initialize(frames, jax.random.key(0))
    latents = model.encode(jnp.asarray(frames))
    assert latents.dtype == jnp.float32
    assert float(jnp.abs(latents).max()) < 1.0
    assert float(jnp.mean((model.decode(latents) - frames / 255.0) ** 2)) < 2e-3


class FakeSet:
    content_sha256 = "0" * 64

    def require_windows(self, seq_len: int) -> int:
        return 6

    def fixed_windows(self, count: int, seq_len: int, seed: int = 0):
        return game_clips(count, seq_len, seed=seed)


@pytest.mark.parametrize("tokenizer, dynamics", [(TOKENIZER, CAUSAL), (MAE, SHORTCUT)], ids=["causal", "shortcut"])
def test_one_loop_one_export_one_evaluation(tokenizer, dynamics, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "open_dataset", lambda *_: FakeSet())
    monkeypatch.setattr(suite, "MATMUL_SIZE", 64)
    first = train_config("tokenizer", str(tmp_path / "tokenizer"), tokenizer=tokenizer)
    train(first, source=MemorySource(first))
    config = train_config(
        "dynamics", str(tmp_path / "run"), tokenizer=tokenizer, dynamics=dynamics, tokenizer_run=first.run_dir
    )
    metrics = train(config, source=MemorySource(config))["metrics"]
    assert all(np.isfinite(value) for value in metrics.values())
    config, model = load_dynamics(config.run_dir, NUM_ACTIONS)
    world = World(config, load_tokenizer(first.run_dir, expected=tokenizer), model, NUM_ACTIONS, source="float")
    if isinstance(model, DiffusionDynamics):
        assert float(model.spread[...]) != 1.0  # set from data before step 0, and restored
    export_world(world, tmp_path / "m.artifact")
    stored = load_exported(tmp_path / "m.artifact").sharing(world)
    assert stored.config == config
    evaluate = EvaluateConfig(clips=6, batch_size=6, horizons=(1, 3), delta_horizon=2, bootstrap_samples=20,
                              rollout=ROLLOUT, speed_frames=2, reader_steps=0, frechet_samples=0)  # fmt: skip
    document = suite.evaluate_world(stored, "data", evaluate)
    json.dumps(document)
    assert document["kind"] == dynamics.kind
    assert np.isfinite(document["horizons"]["3"]["rollout_psnr_db"]["value"])
    assert (document["teacher_forced_bits_per_frame"] is None) == (dynamics.kind == "diffusion")
    with pytest.raises(ConfigError, match=f"this world has {dynamics.kind}"):
        DreamPool(stored, 1)


def test_tokenizers_and_dynamics_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="diffusion needs continuous latents"):
        TrainConfig(stage="dynamics", dynamics=SHORTCUT, tokenizer=TOKENIZER)
    with pytest.raises(ConfigError, match="need tokens"):
        TrainConfig(stage="dynamics", dynamics=CAUSAL, tokenizer=MAE)
    with pytest.raises(ConfigError, match="leave token_dir empty"):
        TrainConfig(stage="dynamics", dynamics=SHORTCUT, tokenizer=MAE, token_dir="tokens")
    with pytest.raises(ConfigError, match="set codes to 0"):
        QuantizerConfig(kind="tanh", codes=16)
    with pytest.raises(ConfigError, match="power of two"):
        DiffusionConfig(levels=48)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer, dynamics, steps, metric, bar", [
    (TOKENIZER, CAUSAL, 300, "val_teacher_forced_accuracy", 0.9),
    (MAE, dataclasses.replace(SHORTCUT, diffusion=DiffusionConfig(levels=8)), 1500, "val_from_noise_mse", -0.4),
])  # fmt: skip
def test_kinds_learn_the_game(tokenizer, dynamics, steps, metric, bar, tmp_path):
    optim = dataclasses.replace(OPTIM, warmup_steps=5, decay_steps=20, learning_rate=5e-3)
    first = train_config("tokenizer", str(tmp_path / "t"), tokenizer=tokenizer, optim=optim, steps=40, eval_every=40)
    assert train(first, source=MemorySource(first))["metrics"]["val_psnr_db"] > 25
    second = train_config(
        "dynamics", str(tmp_path / "d"), tokenizer=tokenizer, dynamics=dynamics, optim=optim, steps=steps,
        batch_size=16, eval_every=steps, tokenizer_run=first.run_dir,
    )  # fmt: skip
    value = train(second, source=MemorySource(second))["metrics"][metric]
    assert value > bar if bar > 0 else value < -bar


