"""Video tokenizer: frames to tokens or continuous latents and back (VQ-VAE, FSQ, masked autoencoder).

Legend: B batch · T time · H height · W width · C channels · N patches of a frame · P numbers of a patch · D width ·
L latent size · V codes · S sampled patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from common.errors import ConfigError
from worldmodel.config import FrameConfig, TokenizerConfig
from worldmodel.models.blocks import STTransformer
from worldmodel.models.layers import frames_to_unit, patchify, split_key, unpatchify
from worldmodel.models.quantizer import Quantized, TanhBottleneck, VectorQuantizer, build_quantizer

INIT_CHUNK_FRAMES = 256
TANH_SPREAD = 0.3


class TokenizerOutput(NamedTuple):
    """Reconstruction in 0..1 (unclipped) and the bottleneck's output."""

    frames_BTHWC: Array
    quantized: Quantized


def check_frames(frames_BTHWC: Array, frame: FrameConfig) -> None:
    """Raise ConfigError unless the frames have the size that a model was built for."""
    expected = (frame.height, frame.width, frame.channels)
    if frames_BTHWC.ndim != 5 or tuple(frames_BTHWC.shape[2:]) != expected:
        raise ConfigError(
            f"frames have shape {tuple(frames_BTHWC.shape)}, expected (batch, time, {', '.join(map(str, expected))}); "
            "collect or import the data at that size, or build the model for this one"
        )


class Tokenizer(nnx.Module):
    """Encoder, bottleneck and decoder over whole clips, causal in time.

    Source: Bruce et al., "Genie" (2024), section 2.1; with `mask_high` and the tanh bottleneck the masked autoencoder
    of Dreamer 4 (2025), section 3.1: the decoder has to rebuild every patch, hidden or not. Ours may add a linear path
    initialised by PCA (see `TokenizerConfig.linear_path`).
    """

    def __init__(self, config: TokenizerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        frame, latent = config.frame, config.quantizer.latent_dim
        last_init = nnx.initializers.zeros_init() if config.linear_path else nnx.initializers.lecun_normal()
        grid = {"rows": frame.rows, "columns": frame.columns}
        self.patch_in = nnx.Linear(frame.patch_values, config.encoder.dim, rngs=rngs)
        self.encoder = STTransformer(config.encoder, **grid, rngs=rngs)
        self.latent_out = nnx.Linear(config.encoder.dim, latent, kernel_init=last_init, rngs=rngs)
        self.quantizer = build_quantizer(config.quantizer, rngs=rngs)
        self.latent_in = nnx.Linear(latent, config.decoder.dim, rngs=rngs)
        self.decoder = STTransformer(config.decoder, **grid, rngs=rngs)
        self.patch_out = nnx.Linear(config.decoder.dim, frame.patch_values, kernel_init=last_init, rngs=rngs)
        if config.mask_high > 0.0:
            self.hidden_patch = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.encoder.dim,)))
        if config.linear_path:
            self.path_in = nnx.Linear(frame.patch_values, latent, rngs=rngs)
            self.path_out = nnx.Linear(latent, frame.patch_values, rngs=rngs)

    @property
    def continuous(self) -> bool:
        """Whether frames become latents instead of tokens."""
        return isinstance(self.quantizer, TanhBottleneck)

    def encode_latent(
        self, frames_BTHWC: Array, *, key: Array | None = None, hidden_BTN: Array | None = None
    ) -> Array:
        """Frames (uint8, or float in 0..1) to latents before the bottleneck, float32 (B, T, N, L).

        Args:
            frames_BTHWC: clips.
            key: dropout key.
            hidden_BTN: True for patches that the encoder may not see.

        Returns:
            Latents of every patch; a hidden one's come from what surrounds it.
        """
        check_frames(frames_BTHWC, self.config.frame)
        patches_BTNP = patchify(frames_to_unit(frames_BTHWC), self.config.frame.patch)
        x_BTND = self.patch_in(patches_BTNP - 0.5)
        if hidden_BTN is not None:
            x_BTND = jnp.where(hidden_BTN[..., None], self.hidden_patch[...], x_BTND)
        latent_BTNL = self.latent_out(self.encoder(x_BTND, key=key).astype(jnp.float32))
        if not self.config.linear_path:
            return latent_BTNL
        path_BTNL = self.path_in(patches_BTNP - 0.5)
        return latent_BTNL + (path_BTNL if hidden_BTN is None else jnp.where(hidden_BTN[..., None], 0.0, path_BTNL))

    def encode(self, frames_BTHWC: Array) -> Array:
        """Frames to tokens, int32 (B, T, N); with a continuous bottleneck to latents, float32 (B, T, N, L)."""
        quantized = self.quantizer(self.encode_latent(frames_BTHWC))
        return quantized.latent_XL if self.continuous else quantized.codes_X

    def decode_latent(self, latent_BTNL: Array, *, key: Array | None = None) -> Array:
        """Bottleneck latents to frames, float32 (B, T, H, W, C), about 0..1."""
        frame = self.config.frame
        x_BTND = self.decoder(self.latent_in(latent_BTNL), key=key)
        patches_BTNP = self.patch_out(x_BTND.astype(jnp.float32)) + 0.5
        if self.config.linear_path:
            patches_BTNP = patches_BTNP + self.path_out(latent_BTNL)
        return unpatchify(patches_BTNP, frame.patch, frame.height, frame.width)

    def decode(self, frames_BTX: Array) -> Array:
        """Tokens or latents, as `encode` gives them, to frames, float32 (B, T, H, W, C), clipped to 0..1."""
        latent_BTNL = frames_BTX if isinstance(self.quantizer, TanhBottleneck) else self.quantizer.lookup(frames_BTX)
        return jnp.clip(self.decode_latent(latent_BTNL), 0.0, 1.0)

    def __call__(self, frames_BTHWC: Array, *, key: Array | None = None) -> TokenizerOutput:
        """Reconstruct; with a key (training) hidden patches, dropout and codebook bookkeeping are on."""
        k1, k2, k3 = split_key(key, 3)
        hidden_BTN = None
        if key is not None and self.config.mask_high > 0.0:
            shape = (*frames_BTHWC.shape[:2], self.config.frame.tokens)
            hidden_BTN = hidden_patches(jax.random.fold_in(key, 3), shape, self.config.mask_high)
        quantized = self.quantizer(self.encode_latent(frames_BTHWC, key=k1, hidden_BTN=hidden_BTN), key=k2)
        return TokenizerOutput(self.decode_latent(quantized.latent_XL, key=k3), quantized)

    def initialize(self, frames_BTHWC: np.ndarray, key: Array) -> None:
        """Data-dependent start: PCA for the linear path, k-means for the codebook (each where the config asks).

        Args:
            frames_BTHWC: uint8 clips of the training split.
            key: random key of k-means.
        """
        config = self.config
        if config.linear_path:
            patches_BTNP = np.asarray(patchify(frames_to_unit(jnp.asarray(frames_BTHWC)), config.frame.patch))
            mean_P, basis_PL = principal_components(
                patches_BTNP.reshape(-1, config.frame.patch_values) - 0.5, config.quantizer.latent_dim
            )
            if self.continuous:
                basis_PL = TANH_SPREAD * basis_PL  # within the nearly linear part of tanh
            self.path_in.kernel[...] = jnp.asarray(basis_PL)
            assert self.path_in.bias is not None
            assert self.path_out.bias is not None
            self.path_in.bias[...] = jnp.asarray(-mean_P @ basis_PL)
            scale = float(np.sum(basis_PL[:, 0] ** 2))  # basis columns share one length
            self.path_out.kernel[...] = jnp.asarray(basis_PL.T / scale)
            self.path_out.bias[...] = jnp.asarray(mean_P)
        if config.quantizer.kmeans_init and isinstance(self.quantizer, VectorQuantizer):
            self.quantizer.initialize(encode_in_chunks(self.encode_latent, frames_BTHWC), key)


def hidden_patches(key: Array, shape_BTN: tuple[int, ...], high: float) -> Array:
    """Patches to hide, bool (B, T, N): a share ~ U(0, high) of each clip's, one coin a patch."""
    share_key, coin_key = jax.random.split(key)
    share_B11 = jax.random.uniform(share_key, (shape_BTN[0], 1, 1), maxval=high)
    return jax.random.uniform(coin_key, shape_BTN) < share_B11


def encode_in_chunks(encode: Callable[[Array], Array], frames_BTHWC: np.ndarray) -> Array:
    """Latents (S, L) of many clips, a few hundred frames at a time."""
    size = max(1, INIT_CHUNK_FRAMES // frames_BTHWC.shape[1])
    starts = range(0, len(frames_BTHWC), size)
    latents = [encode(jnp.asarray(frames_BTHWC[start : start + size])) for start in starts]
    return jnp.concatenate([latent.reshape(-1, latent.shape[-1]) for latent in latents])


def principal_components(points_SP: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and leading principal axes, scaled by one number so that the mean square of a latent is 1.

    One scale for all axes keeps Euclidean distances: the nearest code of a latent is then the nearest patch.

    Args:
        points_SP: float points.
        count: axes L to keep (more than P are padded with zeros).

    Returns:
        float32 mean (P,) and basis (P, L).
    """
    points = points_SP.astype(np.float64)
    mean_P = points.mean(axis=0)
    covariance_PP = np.cov(points - mean_P, rowvar=False)
    value_P, axis_PP = np.linalg.eigh(covariance_PP)
    order = np.argsort(-value_P)[:count]
    basis_PL = axis_PP[:, order] / np.sqrt(max(float(value_P[order].sum()) / count, 1e-12))
    if basis_PL.shape[1] < count:
        basis_PL = np.pad(basis_PL, ((0, 0), (0, count - basis_PL.shape[1])))
    return mean_P.astype(np.float32), basis_PL.astype(np.float32)
