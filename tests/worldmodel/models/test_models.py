"""Tokenizer, latent actions and dynamics: what may and may not be seen, and where gradients go."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import ConfigError
from tests.worldmodel.small import DYNAMICS, FRAME, LAM, NUM_ACTIONS, TOKENIZER, game_clips
from worldmodel.config import QuantizerConfig
from worldmodel.models.lam import LatentActionModel
from worldmodel.models.token_dynamics import MaskGitDynamics, draw_mask
from worldmodel.models.tokenizer import Tokenizer, principal_components

CODES = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


def dynamics(seed: int = 0, **changes) -> MaskGitDynamics:
    config = dataclasses.replace(DYNAMICS, **changes)
    lam = None if config.action_source == "ground-truth" else LAM
    model = MaskGitDynamics(config, FRAME, CODES, num_actions=NUM_ACTIONS, lam=lam, rngs=nnx.Rngs(seed))
    # Token offsets start at zero; random ones make leaks visible.
    model.token_table[...] = jax.random.normal(jax.random.key(9), model.token_table.shape)
    return model


def tokens(seed: int = 0, frames: int = 5) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (2, frames, 4), 0, 16)


def condition(model: MaskGitDynamics, actions: np.ndarray) -> jax.Array:
    return model.shift_actions(model.embed_action_codes(jnp.asarray(actions)))


def test_the_linear_path_starts_as_pca_and_kmeans_of_the_data():
    frames = game_clips(8, 2, seed=1)["frames_BTHWC"]
    model = Tokenizer(TOKENIZER, rngs=nnx.Rngs(0))
    model.initialize(frames, jax.random.key(0))
    exact = model.decode_latent(model.encode_latent(jnp.asarray(frames)))
    np.testing.assert_allclose(exact, frames / 255.0, atol=1e-3)  # 8 axes hold these patches
    rebuilt = model.decode(model.encode(jnp.asarray(frames)))
    assert float(jnp.mean((rebuilt - frames / 255.0) ** 2)) < 1e-4  # as do 16 codes


def test_principal_axes_keep_distances():
    points = np.random.default_rng(0).normal(size=(200, 6)) * np.asarray([3, 2, 1, 0, 0, 0])
    mean, basis = principal_components(points, 3)
    latent = (points - mean) @ basis
    assert abs((latent**2).mean() - 1) < 0.02
    ratio = np.linalg.norm(latent[1:] - latent[0], axis=1) / np.linalg.norm(points[1:] - points[0], axis=1)
    assert ratio.std() / ratio.mean() < 1e-4


def test_wrong_frame_sizes_are_named():
    with pytest.raises(ConfigError, match=r"\(1, 2, 8, 16, 3\)"):
        Tokenizer(TOKENIZER, rngs=nnx.Rngs(0)).encode(jnp.zeros((1, 2, 8, 16, 3), jnp.uint8))


def test_fsq_tokenizer_round_trips_tokens():
    quantizer = QuantizerConfig(kind="fsq", codes=15, latent_dim=2, fsq_levels=(5, 3))
    model = Tokenizer(dataclasses.replace(TOKENIZER, quantizer=quantizer, linear_path=False), rngs=nnx.Rngs(0))
    frames = jnp.asarray(game_clips(2, 2, seed=1)["frames_BTHWC"])
    assert model.decode(model.encode(frames)).shape == frames.shape
    grads = nnx.grad(lambda m: jnp.mean(m(frames).frames_BTHWC ** 2))(model)
    assert float(jnp.abs(grads.patch_in.kernel[...]).max()) > 0


def test_a_latent_action_sees_its_two_frames_and_nothing_later():
    frames = jax.random.uniform(jax.random.key(0), (1, 4, 16, 16, 3))
    model = LatentActionModel(LAM, rngs=nnx.Rngs(0)).actions
    latent = model.encode_latent(frames)
    assert latent.shape == (1, 3, 4)
    later = model.encode_latent(frames.at[:, 2:].set(0.0))
    np.testing.assert_array_equal(latent[:, :1], later[:, :1])
    assert jnp.abs(latent[:, 1] - later[:, 1]).max() > 1e-5
    earlier = model.encode_latent(frames.at[:, 0].set(0.0))
    assert jnp.abs(latent[:, 0] - earlier[:, 0]).max() > 1e-5


def test_the_action_decoder_starts_at_copy_last_frame_and_sees_no_future():
    frames = jax.random.uniform(jax.random.key(0), (1, 4, 16, 16, 3))
    model = LatentActionModel(LAM, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(model(frames).frames_BAHWC, frames[:, :-1], atol=1e-6)
    model.patch_out.kernel[...] = jax.random.normal(jax.random.key(1), model.patch_out.kernel.shape)
    later = model(frames.at[:, 3].set(0.0)).frames_BAHWC
    np.testing.assert_array_equal(model(frames).frames_BAHWC[:, :2], later[:, :2])


def test_masks_have_the_asked_ratios_and_spare_the_prompt():
    mask = np.asarray(draw_mask(jax.random.key(0), (400, 3, 200), 0.5, 1.0, per_frame=False))
    assert not mask[:, 0].any()
    ratio = mask[:, 1:].mean((1, 2))
    assert 0.45 < ratio.min() < 0.56
    assert ratio.max() > 0.94
    assert abs(ratio.mean() - 0.75) < 0.02
    assert np.abs(mask[:, 1].mean(1) - mask[:, 2].mean(1)).max() < 0.25  # one ratio a clip
    frames = np.asarray(draw_mask(jax.random.key(0), (400, 3, 200), 0.5, 1.0, per_frame=True))
    assert np.abs(frames[:, 1].mean(1) - frames[:, 2].mean(1)).max() > 0.3
    assert np.asarray(draw_mask(jax.random.key(0), (4, 3, 20), 1.0, 1.0, per_frame=True))[:, 1:].all()


@pytest.mark.parametrize("masking", ["current", "all"])
@pytest.mark.parametrize("conditioning", ["prepend", "add"])
def test_hidden_tokens_do_not_leak(masking, conditioning):
    model = dynamics(masking=masking, action_conditioning=conditioning)
    true, actions = tokens(), np.zeros((2, 4), np.int64)
    mask = jnp.zeros((2, 5, 4), bool).at[:, 3, 1:].set(True)
    if masking == "current":
        mask = mask.at[:, 4].set(True)
    changed = true.at[:, 3, 1:].set((true[:, 3, 1:] + 5) % 16)
    one = model(true, condition(model, actions), mask).logits_BTNV
    other = model(changed, condition(model, actions), mask).logits_BTNV
    np.testing.assert_array_equal(one[:, :4], other[:, :4])
    if masking == "current":  # the next frame, too, is predicted from the clean frame 3
        assert jnp.abs(one[:, 4] - other[:, 4]).max() > 1e-4
    visible = model(true.at[:, 3, 0].set((true[:, 3, 0] + 5) % 16), condition(model, actions), mask).logits_BTNV
    assert jnp.abs(one[:, 3] - visible[:, 3]).max() > 1e-4


@pytest.mark.parametrize("conditioning", ["prepend", "add"])
def test_action_t_conditions_frame_t_plus_one_and_nothing_before(conditioning):
    model = dynamics(action_conditioning=conditioning)
    actions = np.zeros((2, 4), np.int64)
    changed = actions.copy()
    changed[:, 2] = 1
    mask = jnp.ones((2, 5, 4), bool)
    one = model(tokens(), condition(model, actions), mask).logits_BTNV
    other = model(tokens(), condition(model, changed), mask).logits_BTNV
    np.testing.assert_array_equal(one[:, :3], other[:, :3])
    assert jnp.abs(one[:, 3] - other[:, 3]).max() > 1e-4


def test_unknown_actions_share_one_vector():
    model = dynamics()
    vectors = model.embed_action_codes(jnp.asarray([[-1, 0, 1, -1]]))
    np.testing.assert_array_equal(vectors[0, 0], vectors[0, 3])
    np.testing.assert_array_equal(vectors[0, 0], model.unknown_action[...])
    assert jnp.abs(vectors[0, 1] - vectors[0, 2]).max() > 1e-3


def test_training_logits_equal_those_of_sampling():
    model = dynamics()
    true, actions = tokens(), np.asarray([[0, 1, 2, 1], [2, 2, 0, 1]])
    action = condition(model, actions)
    mask = draw_mask(jax.random.key(3), (2, 5, 4), 0.5, 1.0, per_frame=True)
    trained = model(true, action, mask).logits_BTNV
    memory = model.blocks.empty_memory(2)
    for t in range(5):
        cached, _ = model.cached_logits(true[:, t], mask[:, t], action[:, t], memory, jnp.int32(t))
        whole = model.next_frame_logits(true[:, : t + 1], mask[:, t], action[:, : t + 1])
        np.testing.assert_allclose(cached, trained[:, t], atol=1e-5)
        np.testing.assert_allclose(whole, trained[:, t], atol=1e-5)
        _, memory = model.cached_logits(true[:, t], None, action[:, t], memory, jnp.int32(t))


def test_untied_tokens_have_their_own_table():
    model = dynamics(tie_codebook=False)
    assert model.token_vectors().shape == (16, DYNAMICS.blocks.dim)
    assert not hasattr(model, "codes_VL")
