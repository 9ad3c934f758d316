"""`python -m worldmodel tokenize`: the token form of a data set, made by a trained tokenizer.

Letters: B chunks, T frames, H height, W width, C channels, N tokens of a frame.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from common.errors import ConfigError
from worldmodel.config import TokenizerConfig, to_dict
from worldmodel.data.tokens import Encode, TokenizerInfo, write_token_set
from worldmodel.models.tokenizer import Tokenizer
from worldmodel.train.restore import load_tokenizer


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """Encode a data set once, so that dynamics training reads tokens where it needs no pixels."""

    data_dir: Path = Path("data/coinrun")
    """The pixel data set."""
    tokenizer_run: Path = Path("runs/tokenizer")
    """Run folder of the trained tokenizer."""
    out_dir: Path = Path("data/coinrun-tokens")
    """Folder of the token set."""
    chunk_frames: int = 16
    """Frames encoded at once, beside the past frames that the tokenizer looks at."""
    batch_chunks: int = 16
    overwrite: bool = False
    """Replace a token set of another tokenizer or of other pixels."""
    quiet: bool = False


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Digest of what decides a tokenizer's tokens: its configuration and every value of it.

    Two equal tokenizers have one digest, wherever and however they were stored.
    """
    digest = hashlib.sha256(json.dumps(to_dict(tokenizer.config), sort_keys=True).encode())
    # Whatever is no parameter or statistic (random keys, counters) does not decide tokens.
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(tokenizer, nnx.Param))):
        value = np.asarray(leaf)
        digest.update(json.dumps([jax.tree_util.keystr(path), str(value.dtype), value.shape]).encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def context_frames(config: TokenizerConfig) -> int:
    """Past frames that reach a frame's tokens through the encoder's temporal attention: one window a layer."""
    encoder = config.encoder
    return encoder.layers * (encoder.temporal_window - 1) if encoder.temporal else 0


def describe_tokenizer(tokenizer: Tokenizer) -> TokenizerInfo:
    """What a token set records about its tokenizer."""
    config = tokenizer.config
    return TokenizerInfo(
        sha256=tokenizer_sha256(tokenizer),
        vocab_size=config.quantizer.codes,
        tokens_per_frame=config.frame.tokens,
        context_frames=context_frames(config),
    )


def encoder_of(tokenizer: Tokenizer) -> Encode:
    """The compiled encoder: frames_BTHWC uint8 -> tokens_BTN int32."""
    graph, state = nnx.split(tokenizer)

    @jax.jit
    def encode(values: Any, frames_BTHWC: jax.Array) -> jax.Array:
        return nnx.merge(graph, values).encode(frames_BTHWC)

    return lambda frames_BTHWC: np.asarray(encode(state, frames_BTHWC))


def run_tokenize(config: TokenizeConfig) -> dict[str, Any]:
    """Write the token set.

    Args:
        config: what to encode, with what, and where to.

    Returns:
        The token set's manifest.

    Raises:
        CheckpointError: no trained tokenizer in the run folder.
        DataError: the data is missing or damaged, or the folder holds something else.
        ConfigError: data and tokenizer do not fit.
    """
    if config.chunk_frames < 1 or config.batch_chunks < 1:
        raise ConfigError(
            f"chunk_frames {config.chunk_frames} and batch_chunks {config.batch_chunks}: expected at least 1"
        )
    tokenizer = load_tokenizer(config.tokenizer_run)
    if tokenizer.continuous:
        raise ConfigError(
            f"{config.tokenizer_run} gives continuous latents, a token set holds integers: train diffusion dynamics "
            "from pixels, without token_dir"
        )
    encoder = tokenizer.config.encoder
    info = describe_tokenizer(tokenizer)
    if encoder.temporal and encoder.position == "learned":
        length = config.chunk_frames + info.context_frames
        if length > encoder.max_frames:
            raise ConfigError(
                f"chunks of {config.chunk_frames} frames with {info.context_frames} past ones are longer than the "
                f"tokenizer's time table of {encoder.max_frames} frames: lower --chunk-frames, or train with rope"
            )
    return write_token_set(
        config.data_dir,
        config.out_dir,
        encoder_of(tokenizer),
        info,
        chunk_frames=config.chunk_frames,
        batch_chunks=config.batch_chunks,
        overwrite=config.overwrite,
        quiet=config.quiet,
    )
