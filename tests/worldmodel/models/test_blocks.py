"""Attention, position codes and the three exact forms of the transformer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import ConfigError
from tests.worldmodel.small import BLOCKS
from worldmodel.config import BlockConfig
from worldmodel.models.attention import attend, rotate, spatial_angles, window_mask
from worldmodel.models.blocks import STTransformer
from worldmodel.models.layers import dropout, patchify, unpatchify


def build(config: BlockConfig = BLOCKS, prefix: int = 0) -> STTransformer:
    return STTransformer(config, rows=2, columns=2, prefix=prefix, rngs=nnx.Rngs(0))


def noise(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_attend_honours_its_mask():
    q, k, v = noise(3, 2, 2, 8), noise(3, 5, 2, 8, seed=1), noise(3, 5, 2, 8, seed=2)
    mask = jnp.asarray([[True, False, True, False, False], [True, True, True, True, True]])
    got = attend(q, k, v, mask, "xla")
    seen = attend(q[:, :1], k[:, ::2][:, :2], v[:, ::2][:, :2], None, "xla")
    np.testing.assert_allclose(got[:, :1], seen, atol=1e-6)
    np.testing.assert_allclose(got[:, 1:], attend(q[:, 1:], k, v, None, "xla"), atol=1e-6)
    assert np.abs(got[:, :1] - attend(q[:, :1], k, v, None, "xla")).max() > 1e-2


def test_attend_equals_the_softmax_formula():
    q, k, v = noise(2, 3, 2, 8), noise(2, 4, 2, 8, seed=1), noise(2, 4, 2, 8, seed=2)
    score = np.einsum("xqhk,xshk->xhqs", q, k) / np.sqrt(8)
    weight = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
    np.testing.assert_allclose(attend(q, k, v, None, "xla"), np.einsum("xhqs,xshk->xqhk", weight, v), atol=1e-5)


@pytest.mark.gpu
def test_cudnn_attention_agrees_with_xla():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    q, k, v = (noise(4, 16, 2, 64, seed=s).astype(jnp.bfloat16) for s in range(3))
    mask = jnp.asarray(window_mask(16, 5))
    exact = attend(*(x.astype(jnp.float32) for x in (q, k, v)), mask, "xla")
    xla, cudnn = attend(q, k, v, mask, "xla"), attend(q, k, v, mask, "cudnn")
    assert jnp.abs(cudnn - exact).max() <= 2 * jnp.abs(xla - exact).max() + 1e-2


def test_window_mask_is_causal_and_banded():
    mask = window_mask(5, 3)
    assert mask.sum(1).tolist() == [1, 2, 3, 3, 3]
    assert not np.triu(mask, 1).any()


def test_rotation_depends_on_differences_only():
    x, y = noise(8), noise(8, seed=1)
    angle = jnp.arange(4) * 0.3 + 0.1
    near = rotate(x, 2 * angle) @ rotate(y, 5 * angle)
    far = rotate(x, 7 * angle) @ rotate(y, 10 * angle)
    np.testing.assert_allclose(near, far, atol=1e-5)
    assert abs(near - rotate(x, 2 * angle) @ rotate(y, 6 * angle)) > 1e-3


def test_spatial_angles_tell_every_place_apart_and_leave_prefix_alone():
    angle = spatial_angles(3, 4, 2, 16, 100.0)
    assert not angle[:2].any()
    assert len(np.unique(angle[2:].round(6), axis=0)) == 12


def test_learned_codes_of_place_and_time_do_not_commute():
    model = build(dataclasses.replace(BLOCKS, position="learned", max_frames=4))
    code = model._embed_positions(jnp.zeros((1, 4, 4, 16)), jnp.arange(4))[0]
    for t in range(4):
        for n in range(t):
            assert jnp.abs(code[t, n] - code[n, t]).max() > 1e-3


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_swapping_time_and_place_of_a_mark_changes_what_is_seen(position):
    model = build(dataclasses.replace(BLOCKS, position=position))
    mark, base = noise(16, seed=3), noise(16, seed=4)
    x = jnp.broadcast_to(base, (1, 4, 4, 16))
    one = model(x.at[0, 1, 2].set(mark))[0, 3, 3]
    other = model(x.at[0, 2, 1].set(mark))[0, 3, 3]
    assert jnp.abs(one - other).max() > 1e-4


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_order_in_time_is_seen(position):
    model = build(dataclasses.replace(BLOCKS, position=position))
    x = noise(1, 4, 4, 16)
    swapped = x[:, jnp.asarray([1, 0, 2, 3])]
    assert jnp.abs(model(x)[:, 3] - model(swapped)[:, 3]).max() > 1e-4


@pytest.mark.parametrize("qk_norm", [True, False])
def test_later_frames_change_nothing_earlier(qk_norm):
    model = build(dataclasses.replace(BLOCKS, qk_norm=qk_norm))
    x = noise(2, 5, 4, 16)
    changed = x.at[:, 3:].set(noise(2, 2, 4, 16, seed=9))
    np.testing.assert_array_equal(model(x)[:, :3], model(changed)[:, :3])
    assert jnp.abs(model(x)[:, 3:] - model(changed)[:, 3:]).max() > 1e-2


def test_frames_beyond_the_window_are_not_seen():
    model = build(dataclasses.replace(BLOCKS, layers=1, temporal_window=2))
    x = noise(1, 4, 4, 16)
    changed = x.at[:, 0].set(noise(1, 4, 16, seed=9))
    np.testing.assert_array_equal(model(x)[:, 2:], model(changed)[:, 2:])
    assert jnp.abs(model(x)[:, 1] - model(changed)[:, 1]).max() > 1e-3


def test_without_temporal_attention_frames_are_alone():
    model = build(dataclasses.replace(BLOCKS, temporal=False))
    x = noise(1, 3, 4, 16)
    np.testing.assert_allclose(model(x)[:, 2:], model(x[:, 2:]), atol=1e-6)


def test_dropout_is_honoured_and_off_without_a_key():
    config = dataclasses.replace(BLOCKS, dropout=0.5)
    model, plain = build(config), build()
    x = noise(1, 3, 4, 16)
    np.testing.assert_array_equal(model(x), plain(x))
    assert jnp.abs(model(x, key=jax.random.key(1)) - model(x)).max() > 1e-2
    assert jnp.abs(model(x, key=jax.random.key(1)) - model(x, key=jax.random.key(2))).max() > 1e-2
    kept = dropout(jnp.ones(10_000), 0.25, jax.random.key(0))
    assert set(np.unique(kept).round(5)) == {0.0, np.float32(4 / 3).round(5)}
    assert abs(float(kept.mean()) - 1.0) < 0.03


MIXERS = {
    "attention": BLOCKS,
    "joint": dataclasses.replace(BLOCKS, joint=True),
    "mamba2": dataclasses.replace(BLOCKS, mixer="mamba2", mamba_state=8),
}


@pytest.mark.parametrize("mixer, frames, prefix", [("attention", 3, 1), ("attention", 7, 0), ("joint", 7, 1),
                                                   ("mamba2", 7, 1)])  # fmt: skip
def test_cached_frames_equal_the_whole_clip_past_the_window(mixer, frames, prefix):
    model = build(MIXERS[mixer], prefix=prefix)
    x = noise(2, frames, 4 + prefix, 16)
    whole, memory, step = jax.jit(model)(x), model.empty_memory(2), jax.jit(model.cached_frame)
    for t in range(frames):
        got, memory = step(x[:, t], memory, jnp.int32(t))
        np.testing.assert_allclose(got, whole[:, t], atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_two_streams_equal_a_masked_frame_after_clean_ones(mixer):
    model = build(MIXERS[mixer])
    clean, masked = noise(2, 6, 4, 16), noise(2, 6, 4, 16, seed=5)
    seen = jnp.tril(jnp.ones((4, 4), bool))  # also: inside an unfinished frame only earlier tokens are seen
    two_stream, step, whole = jax.jit(model.two_stream), jax.jit(model.cached_frame), jax.jit(model)
    streams, ordered = two_stream(clean, masked), two_stream(clean, masked, seen_NN=seen)
    memory = model.empty_memory(2)
    for t in range(6):
        mixed = clean.at[:, t].set(masked[:, t])  # what comes after t changes nothing
        np.testing.assert_allclose(streams[:, t], whole(mixed)[:, t], atol=1e-5)
        got, _ = step(masked[:, t], memory, jnp.int32(t), seen_NN=seen)
        np.testing.assert_allclose(got, ordered[:, t], atol=1e-5)
        _, memory = step(clean[:, t], memory, jnp.int32(t))
    changed = two_stream(clean, masked.at[:, :, 2:].set(0.0), seen_NN=seen)
    np.testing.assert_allclose(changed[:, :, :2], ordered[:, :, :2], atol=1e-6)
    assert jnp.abs(changed[:, :, 2:] - ordered[:, :, 2:]).max() > 1e-2


def test_joint_attention_sees_other_places_of_earlier_frames_in_one_layer():
    x = noise(1, 3, 4, 16)
    changed = x.at[0, 0, 3].add(1.0)
    for mixer, seen in (("attention", False), ("joint", True)):
        model = build(dataclasses.replace(MIXERS[mixer], layers=1))
        model.layer_0.ffn_out.kernel[...] = 0 * model.layer_0.ffn_out.kernel[...]
        if not seen:  # only time is left of the factorised block
            model.layer_0.space.out.kernel[...] = 0 * model.layer_0.space.out.kernel[...]
        whole = jax.jit(model)
        assert bool(jnp.abs(whole(x)[0, 2, 0] - whole(changed)[0, 2, 0]).max() > 1e-4) == seen


def test_mamba_remembers_without_a_window_in_constant_memory():
    model = build(dataclasses.replace(MIXERS["mamba2"], layers=1, temporal_window=2))
    x = noise(1, 12, 4, 16)
    changed, whole = x.at[:, 0].set(noise(1, 4, 16, seed=9)), jax.jit(model)
    assert jnp.abs(whole(x)[:, 11] - whole(changed)[:, 11]).max() > 1e-4
    memory = model.empty_memory(1)
    sizes = [leaf.shape for leaf in jax.tree.leaves(memory)]
    _, memory = jax.eval_shape(model.cached_frame, x[:, 0], memory, jnp.int32(0))
    assert [leaf.shape for leaf in jax.tree.leaves(memory)] == sizes


def test_mixers_of_the_ablation_have_equal_numbers_of_weights():
    base = BlockConfig(dim=96, ffn_dim=256, heads=3, layers=3, temporal_window=6)
    count = {}
    for name in ("attention", "mamba2"):
        config = dataclasses.replace(base, mixer=name)
        shapes = nnx.eval_shape(lambda config=config: build(config))
        count[name] = sum(int(np.prod(p.shape)) for p in jax.tree.leaves(nnx.state(shapes, nnx.Param)))
    assert abs(count["mamba2"] / count["attention"] - 1.0) < 0.02


def test_bfloat16_compute_stays_near_float32():
    half = build(dataclasses.replace(BLOCKS, compute_dtype="bfloat16"))
    x = noise(1, 3, 4, 16)
    assert half(x).dtype == jnp.bfloat16
    assert jnp.abs(half(x).astype(jnp.float32) - build()(x)).max() < 0.1
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(half, nnx.Param)))


def test_learned_time_has_an_end_and_says_so():
    model = build(dataclasses.replace(BLOCKS, position="learned", max_frames=3))
    with pytest.raises(ConfigError, match="max_frames"):
        model(noise(1, 4, 4, 16))


def test_a_wrong_number_of_tokens_is_named():
    with pytest.raises(ConfigError, match="4 tokens a frame, got 5"):
        build()(noise(1, 2, 5, 16))


def test_patches_are_cut_row_by_row_and_put_back():
    frames = jnp.arange(2 * 3 * 8 * 12 * 3).reshape(2, 3, 8, 12, 3)
    patches = patchify(frames, 4)
    assert patches.shape == (2, 3, 6, 48)
    np.testing.assert_array_equal(patches[0, 0, 1], frames[0, 0, :4, 4:8].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, 4, 8, 12), frames)
