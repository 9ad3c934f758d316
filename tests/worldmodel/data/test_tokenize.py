"""`tokenize` with real (untrained) tokenizers: the tokens are those that the model gives on the whole episode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import ConfigError
from worldmodel.config import BlockConfig, FrameConfig, QuantizerConfig, TokenizerConfig
from worldmodel.data import tokenize
from worldmodel.data.records import open_dataset
from worldmodel.data.tokenize import TokenizeConfig, context_frames, run_tokenize, tokenizer_sha256
from worldmodel.models.tokenizer import Tokenizer

MakeSet = Callable[..., Path]


def small(**blocks: Any) -> TokenizerConfig:
    block = BlockConfig(dim=16, ffn_dim=16, heads=2, layers=2, **blocks)
    quantizer = QuantizerConfig(codes=32, latent_dim=4)
    return TokenizerConfig(frame=FrameConfig(6, 10, 3, patch=2), encoder=block, decoder=block, quantizer=quantizer)


@pytest.fixture
def tokenized(make_set: MakeSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(config: TokenizerConfig, **options: Any) -> tuple[Tokenizer, Path, Path]:
        model = Tokenizer(config, rngs=nnx.Rngs(0))
        monkeypatch.setattr(tokenize, "load_tokenizer", lambda run_dir: model)
        data_dir, out_dir = make_set(), tmp_path / "tokens"
        run_tokenize(TokenizeConfig(data_dir, tmp_path, out_dir, quiet=True, **options))
        return model, data_dir, out_dir

    return run


@pytest.mark.parametrize(
    ("blocks", "context"), [({"temporal": False}, 0), ({"temporal_window": 3}, 4)], ids=["frame by frame", "with past"]
)
def test_tokens_are_those_of_whole_episodes(tokenized: Any, blocks: dict[str, Any], context: int) -> None:
    config = small(**blocks)
    assert context_frames(config) == context
    model, data_dir, out_dir = tokenized(config, chunk_frames=5, batch_chunks=2)
    frames, tokens = open_dataset(data_dir, "train"), open_dataset(out_dir, "train")
    assert tokens.item_shape == (15,)
    for episode in range(frames.num_episodes):
        whole = model.encode(jnp.asarray(frames.read(episode)["items"])[None])[0]
        assert np.array_equal(tokens.read(episode)["items"], whole)
    assert len(np.unique(tokens.read(2)["items"])) > 3


def test_the_digest_names_the_weights(tokenized: Any) -> None:
    model, _, out_dir = tokenized(small(temporal=False))
    digest = tokenizer_sha256(model)
    assert open_dataset(out_dir, "train").manifest["source"]["tokenizer"]["sha256"] == digest
    assert tokenizer_sha256(Tokenizer(small(temporal=False), rngs=nnx.Rngs(0))) == digest
    assert tokenizer_sha256(Tokenizer(small(temporal=False), rngs=nnx.Rngs(1))) != digest
    model.patch_in.bias[...] = model.patch_in.bias[...].at[0].add(1e-3)
    assert tokenizer_sha256(model) != digest


def test_a_time_table_that_is_too_short_is_named(tokenized: Any) -> None:
    config = small(temporal_window=3, position="learned", max_frames=8)
    with pytest.raises(ConfigError, match="chunks of 16 frames with 4 past ones are longer"):
        tokenized(config)
    with pytest.raises(ConfigError, match="chunk_frames 0"):
        run_tokenize(dataclasses.replace(TokenizeConfig(), chunk_frames=0))
