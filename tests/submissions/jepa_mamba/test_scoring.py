"""Scoring: every token once, the modes agree where they must, ranks and lanes change nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from submissions.jepa_mamba.train_gpt import Ranks, lanes_of, search_temperature, token_nll, windows_of
from tests.submissions.jepa_mamba.conftest import tiny
from tests.submissions.jepa_mamba.test_model import randomised

ALONE = Ranks(0, 1, torch.device("cpu"))


@given(st.sampled_from(["standard", "sliding"]), st.integers(1, 300), st.integers(1, 64), st.integers(1, 64))
def test_windows_score_every_target_once(mode: str, targets: int, length: int, stride: int) -> None:
    stride = min(stride, length)
    windows = windows_of(mode, targets, length, stride)
    scored = np.concatenate([np.arange(first, end) for _, end, first in windows])
    assert np.array_equal(np.sort(scored), np.arange(targets))
    assert all(0 <= start <= first < end <= targets and end - start <= length for start, end, first in windows)
    if mode == "sliding":
        assert all(first - start >= length - stride for start, end, first in windows if start > 0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 12))
@settings(max_examples=50)
def test_lanes_cover_the_stream_and_begin_at_documents(lengths: list[int], lanes: int) -> None:
    tokens = np.concatenate([[255, *[1] * n] for n in lengths])
    cut = lanes_of(tokens, lanes, 255)
    assert cut[0][0] == 0
    assert cut[-1][1] == len(tokens) - 1
    assert all(a[1] == b[0] for a, b in itertools.pairwise(cut))
    assert all(tokens[start] == 255 for start, _ in cut)
    assert len(cut) <= lanes


def stream(seed: int = 0, documents: int = 9) -> np.ndarray:
    generator = np.random.default_rng(seed)
    parts = [np.concatenate([[255], generator.integers(0, 250, generator.integers(3, 60))]) for _ in range(documents)]
    return np.concatenate(parts).astype(np.uint16)


def nll(lm, tokens: np.ndarray, mode: str, **options) -> tuple[np.ndarray, int]:
    chosen = {
        "length": 32,
        "stride": 8,
        "batch_tokens": 128,
        "lanes": 3,
        "bos_id": 255,
        "temperature": 1.0,
        "ranks": ALONE,
    }
    return token_nll(lm, tokens, mode=mode, **{**chosen, **options})


@pytest.mark.parametrize(
    "options", [{}, {"document_reset": True}, {"document_reset": True, "attn_layers": "1", "attn_window": 16}], ids=str
)
def test_carried_state_is_one_long_sequence(options: dict) -> None:
    lm, tokens = randomised(tiny(**options)), stream()
    carried, computed = nll(lm, tokens, "carried")
    whole, _ = nll(lm, tokens, "standard", length=len(tokens))
    np.testing.assert_allclose(carried, whole, atol=2e-4)
    assert carried.shape == (len(tokens) - 1,)
    assert computed <= len(tokens) + 3 * 32  # padding of the last windows of three lanes
    if not options:
        assert computed == len(tokens) - 1


def test_sliding_with_stride_of_the_window_is_standard() -> None:
    lm, tokens = randomised(tiny()), stream()[: 32 * 5 + 1]
    np.testing.assert_allclose(nll(lm, tokens, "sliding", stride=32)[0], nll(lm, tokens, "standard")[0], atol=1e-5)


@pytest.mark.parametrize("mode", ["standard", "sliding", "carried"])
def test_scores_do_not_depend_on_batching(mode: str) -> None:
    lm, tokens = randomised(tiny(document_reset=True)), stream()
    reference, _ = nll(lm, tokens, mode)
    for options in ({"batch_tokens": 32}, {"lanes": 1}, {"lanes": 8}):
        np.testing.assert_allclose(nll(lm, tokens, mode, **options)[0], reference, atol=2e-5)


@pytest.mark.parametrize("mode", ["standard", "sliding", "carried"])
def test_probabilities_sum_to_one(mode: str) -> None:
    """Score each of the 256 continuations of a prefix: their probabilities must sum to one at any temperature."""
    lm, prefix = randomised(tiny()), stream()[:40]
    for temperature in (0.7, 1.0, 1.3):
        last = [
            nll(lm, np.append(prefix, np.uint16(token)), mode, temperature=temperature)[0][-1] for token in range(256)
        ]
        assert np.exp(-np.array(last)).sum() == pytest.approx(1.0, abs=1e-4)


def test_temperature_search_finds_the_sharpness_that_was_taken_away() -> None:
    lm = randomised(tiny(logit_softcap=0.0))
    with torch.no_grad():
        lm.token_embed.weight.normal_(std=1.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 250, (128, 32), generator=generator)
    documents = torch.zeros(128, 32, dtype=torch.int32)
    with torch.no_grad():
        rows, weight, bias = lm.head(lm.encode(x)[0])
        logits = rows @ weight.T + bias
        y = torch.multinomial((logits / 1.3).softmax(-1), 1, generator=generator).view(128, 32)
    assert search_temperature(lm, x, y, documents, 64, ALONE) == pytest.approx(1.3, abs=0.1)
