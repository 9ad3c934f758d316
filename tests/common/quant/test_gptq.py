"""Steps and codes by loss: against brute force, against rounding to nearest, and the solver against its budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from common.artifact.container import encode_artifact, load_artifact, save_artifact
from common.errors import ArtifactError, ConfigError
from common.quant.gptq import LayerStatistics, eliminate, gptq_codes, plan_scales, trellis_codes
from common.quant.grid import BF16_GRID, GridSpec, QuantizedTensor, dequantize, quantize
from common.quant.plan import (
    FREE_STEP_GRID,
    TRELLIS_GRID,
    TrainedSteps,
    expected_increase,
    fit_budget,
    fit_model,
    plan_model,
)
from common.quant.torch_impl import fake_quantize_torch
from common.quant.trellis import TRELLIS_NEXT, trellis_halves


def layer(rows: int, columns: int, seed: int = 0, correlation: float = 0.8) -> tuple[np.ndarray, LayerStatistics]:
    rng = np.random.default_rng(seed)
    mixing = np.eye(columns) + correlation * rng.standard_normal((columns, columns)) / np.sqrt(columns)
    mixing *= np.exp2(rng.standard_normal(columns))[:, None]
    w = (0.05 * rng.standard_normal((rows, columns))).astype(np.float32)
    return w, LayerStatistics(mixing @ mixing.T, np.exp2(2 * rng.standard_normal(rows)) * 1e-4)


def test_elimination_factors_the_inverse():
    _, statistics = layer(1, 12)
    found = eliminate(statistics.hessian_CC, damping=0.0)
    ordered = statistics.hessian_CC[np.ix_(found.order_C, found.order_C)]
    assert (np.diff(np.diag(ordered)) <= 0).all()
    np.testing.assert_allclose(found.upper_CC.T @ found.upper_CC, np.linalg.inv(ordered), rtol=1e-8)
    assert np.allclose(found.upper_CC, np.triu(found.upper_CC))
    # cost of a column: its variance given the columns after it
    for j in range(12):
        later = ordered[j + 1 :, j + 1 :]
        explained = ordered[j, j + 1 :] @ np.linalg.solve(later, ordered[j + 1 :, j])
        assert found.cost_C[j] == pytest.approx(ordered[j, j] - explained)


@pytest.mark.parametrize("bad", [np.array([[np.nan]]), np.array([[-1.0]])])
def test_statistics_that_are_no_covariance(bad):
    with pytest.raises(ConfigError, match="not finite"):
        eliminate(bad)


def test_error_feedback_beats_nearest_and_nears_the_best_there_is():
    """Over all 9^4 codes around a row, sequential rounding must come close to the best; nearest does not."""
    w, statistics = layer(20, 4, seed=3, correlation=2.0)
    found = eliminate(statistics.hessian_CC, damping=0.0)
    row_R, column_C = np.full(20, 0.05, np.float32), np.ones(4, np.float32)

    def loss(codes_RC):
        error = codes_RC * row_R[:, None] - w
        return ((error @ statistics.hessian_CC) * error).sum(axis=1)

    nearest = np.rint(w / row_R[:, None])
    fed = gptq_codes(w, row_R, column_C, 127, found, rate=0.0)
    offsets = np.array(list(itertools.product(range(-4, 5), repeat=4)))
    best = np.min([loss(nearest + offset) for offset in offsets], axis=0)
    assert loss(fed).sum() < 0.8 * loss(nearest).sum()
    assert loss(fed).sum() < 1.4 * best.sum()


def test_blocks_change_nothing(monkeypatch):
    w, statistics = layer(7, 40)
    found = eliminate(statistics.hessian_CC)
    row_R, column_C = plan_scales(w, statistics, 1e-9, found, 127)
    whole = gptq_codes(w, row_R, column_C, 127, found)
    monkeypatch.setattr("common.quant.gptq.GPTQ_BLOCK", 7)
    np.testing.assert_array_equal(gptq_codes(w, row_R, column_C, 127, found), whole)


def test_steps_follow_the_loss():
    w, statistics = layer(64, 32)
    found = eliminate(statistics.hessian_CC)
    row_R, column_C = plan_scales(w, statistics, 1e-8, found, 127)
    free = (row_R > 0.12 * 0.05) & (row_R < 2.5 * 0.05)
    cost_C = np.empty(32)
    cost_C[found.order_C] = found.cost_C
    each = statistics.sensitivity_R[free, None] * cost_C * (row_R[free, None] * column_C) ** 2 / 24
    assert free.sum() > 20
    assert np.exp(np.log(each).mean()) == pytest.approx(1e-8, rel=0.1)
    assert each.std() / each.mean() < 0.15  # steps of an eighth and a quarter of an octave
    assert len(np.unique(row_R)) < 40


def test_expected_loss_is_what_the_knob_says_and_rate_saves_bytes():
    w, statistics = layer(96, 64)
    statistics = LayerStatistics(statistics.hessian_CC, np.full(96, 1e-4))
    weights, specs = {"w": w}, {}
    finer, coarser = (plan_model(weights, {"w": statistics}, specs, loss, 0.0) for loss in (1e-9, 4e-9))
    assert finer.expected_nats["w"] / w.size == pytest.approx(1e-9, rel=0.3)
    assert coarser.expected_nats["w"] / w.size == pytest.approx(4e-9, rel=0.3)
    error = dequantize(coarser.tensors["w"]).astype(np.float64) - w
    direct = 0.5 * sum(g * e @ statistics.hessian_CC @ e for g, e in zip(statistics.sensitivity_R, error))
    assert expected_increase(w, coarser.tensors["w"], statistics) == pytest.approx(direct)
    sizes = [len(encode_artifact(plan_model(weights, {"w": statistics}, specs, 4e-9, r).tensors, {})) for r in (0, 2)]
    assert sizes[1] < sizes[0]


def model() -> tuple[dict, dict, dict]:
    weights, statistics = {}, {}
    for index in range(3):
        weights[f"blocks.{index}.w"], statistics[f"blocks.{index}.w"] = layer(96, 80, seed=index)
    weights["norm"] = np.ones(80, np.float32)
    return weights, statistics, {"norm": BF16_GRID}


@pytest.mark.parametrize("share", [0.9, 0.5, 0.35])
def test_the_file_fills_its_budget(share):
    weights, statistics, specs = model()

    def size_of(plan):
        return len(encode_artifact(plan.tensors, {}, ("raw", "rans")))

    budget_bytes = int(share * 3 * 96 * 80 * 5.2 / 8)
    plan, points = fit_budget(lambda loss: plan_model(weights, statistics, specs, loss, 0.25), size_of, budget_bytes)
    assert 0.995 * budget_bytes <= size_of(plan) <= budget_bytes
    assert len(points) <= 10
    sizes, losses = [p[1] for p in points], [p[2] for p in points]
    assert sizes == sorted(sizes, reverse=True)
    assert all(later > 0.98 * earlier for earlier, later in itertools.pairwise(losses))  # sizes almost alike may swap
    again, _ = fit_budget(lambda loss: plan_model(weights, statistics, specs, loss, 0.25), size_of, budget_bytes)
    assert all(np.array_equal(again.tensors[n].codes, plan.tensors[n].codes) for n in weights)


def test_budgets_that_cannot_be_met_or_filled():
    weights, statistics, specs = model()

    def fit(budget_bytes):
        return fit_budget(
            lambda loss: plan_model(weights, statistics, specs, loss, 0.25),
            lambda plan: len(encode_artifact(plan.tensors, {}, ("raw", "rans"))), budget_bytes,
        )  # fmt: skip

    with pytest.raises(ArtifactError, match="1,000 bytes are too few"):
        fit(1000)
    plan, points = fit(10**6)
    assert max(size for _, size, _ in points) < 10**6  # every step at its finest
    assert plan.loss_nats == min(loss for loss, size, _ in points if size == points[0][1])


def test_trained_steps_are_kept_but_for_one_factor():
    weights, statistics, specs = model()
    first = plan_model(weights, statistics, specs, 1e-10, 0.25)
    trained = TrainedSteps(first.loss_nats, {n: first.tensors[n].scales for n in first.expected_nats})
    other = {name: LayerStatistics(s.hessian_CC, s.sensitivity_R * 3) for name, s in statistics.items()}
    same = plan_model(weights, other, specs, 1e-10, 0.25, trained)
    for name in first.expected_nats:
        np.testing.assert_array_equal(same.tensors[name].scales, first.tensors[name].scales)
    wider = plan_model(weights, other, specs, 4e-10, 0.25, trained)
    ratio = wider.tensors["blocks.0.w"].scales[:96] / first.tensors["blocks.0.w"].scales[:96]
    np.testing.assert_allclose(ratio, 2.0)


def test_a_grid_of_rows_and_columns():
    q = QuantizedTensor(FREE_STEP_GRID, np.array([[1, 2], [3, 4]], np.int8), np.array([1, 2, 4, 8], np.float32), (2, 2))
    np.testing.assert_array_equal(dequantize(q), [[4, 16], [24, 64]])


def test_statistics_of_another_shape():
    weights, statistics, specs = model()
    with pytest.raises(ConfigError, match="statistics are for"):
        plan_model(weights | {"blocks.0.w": np.ones((2, 2), np.float32)}, statistics, specs, 1e-9, 0.0)


def halves_by_hand(codes_RC: np.ndarray) -> np.ndarray:
    """The machine as FORMAT.md draws it."""
    even, odd = (0, 5, 1, 6, 2, 4, 3, 7), (2, 7, 3, 4, 0, 6, 1, 5)
    out = []
    for row in codes_RC.tolist():
        state = 0
        for code in row:
            out.append(0.5 * (state % 2))
            state = (odd if code % 2 else even)[state]
    return np.array(out).reshape(codes_RC.shape)


def test_halves_are_those_of_the_format():
    codes = np.random.default_rng(0).integers(-127, 128, (9, 40)).astype(np.int8)
    np.testing.assert_array_equal(trellis_halves(codes), halves_by_hand(codes))
    assert trellis_halves(np.zeros((0, 3), np.int8)).shape == (0, 3)
    assert trellis_halves(np.zeros((3, 0), np.int8)).shape == (3, 0)
    # Eight states, two ways into each, and every pair of ways out apart by a parity.
    assert sorted(TRELLIS_NEXT.ravel().tolist()) == sorted([*range(8)] * 2)


@pytest.mark.parametrize("rate", [0.0, 0.7])
def test_the_path_is_the_best_of_all_where_no_column_makes_up_for_another(rate):
    """Over all 5^5 rows of codes; a diagonal H, whose columns differ in weight."""
    rng = np.random.default_rng(1)
    w = (0.03 * rng.standard_normal((6, 5))).astype(np.float32)
    weight_C = np.exp2(rng.standard_normal(5))
    found = eliminate(np.diag(weight_C), damping=0.0, ordered=False)
    row_R, column_C = np.full(6, 0.05, np.float32), np.exp2(np.arange(5) / 4 - 0.5).astype(np.float32)
    codes = trellis_codes(w, row_R, column_C, 127, found, rate)
    every = np.array(list(itertools.product(range(-2, 3), repeat=5)), np.int8)
    step = row_R[0].astype(np.float64) * column_C
    values = (every + halves_by_hand(every)) * step
    for row in range(6):
        price = rate / 12 * (step / np.sqrt(np.mean(np.square(w[row].astype(np.float64))))) ** 2
        loss = (weight_C * (np.square(values - w[row]) + price * np.square(values))).sum(axis=1)
        ours = (codes[row] + halves_by_hand(codes[row : row + 1])[0]) * step
        own = (weight_C * (np.square(ours - w[row]) + price * np.square(ours))).sum()
        assert own == pytest.approx(loss.min(), rel=1e-6)


def bits_and_error(codes, values, w):
    counts = np.unique(codes, return_counts=True)[1]
    return float((counts * np.log2(codes.size / counts)).sum()) / codes.size, float(np.square(values - w).mean())


@pytest.mark.parametrize("step,gain_db", [(0.2, 0.95), (0.5, 0.95), (1.0, 0.7)])
def test_a_trellis_gains_a_decibel_over_a_uniform_grid_at_equal_bits(step, gain_db):
    """Marcellin and Fischer have 1.1 dB for eight states; six decibels are a bit."""
    w = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    found = eliminate(np.eye(128), damping=0.0, ordered=False)
    row_R, column_C = np.full(128, step, np.float32), np.ones(128, np.float32)
    uniform, path = (find(w, row_R, column_C, 127, found, 0.5) for find in (gptq_codes, trellis_codes))
    bits, error = bits_and_error(path, (path + trellis_halves(path)) * step, w)
    uniform_bits, uniform_error = bits_and_error(uniform, uniform * step, w)
    assert 10 * np.log10(uniform_error / error) - 6.02 * (bits - uniform_bits) > gain_db


def test_a_trellis_feeds_errors_back_and_rows_are_apart(monkeypatch):
    w, statistics = layer(40, 48, correlation=2.0)
    found = eliminate(statistics.hessian_CC, ordered=False)
    row_R, column_C = plan_scales(w, statistics, 1e-9, found, 127)
    fed = trellis_codes(w, row_R, column_C, 127, found, 0.25)
    apart = eliminate(np.diag(np.diag(statistics.hessian_CC)), ordered=False)
    alone = trellis_codes(w, row_R, column_C, 127, apart, 0.25)
    step = row_R[:, None] * column_C

    def loss(codes_RC):
        error = (codes_RC + trellis_halves(codes_RC)) * step - w
        return float(statistics.sensitivity_R @ ((error @ statistics.hessian_CC) * error).sum(axis=1))

    assert loss(fed) < 0.5 * loss(alone)
    uniform = gptq_codes(w, row_R, column_C, 127, found, 0.25) * step - w
    assert loss(fed) < 0.9 * float(statistics.sensitivity_R @ ((uniform @ statistics.hessian_CC) * uniform).sum(axis=1))
    monkeypatch.setattr("common.quant.gptq.TRELLIS_ROWS", 7)
    monkeypatch.setattr("common.quant.gptq.TRELLIS_BLOCK", 5)
    np.testing.assert_array_equal(trellis_codes(w, row_R, column_C, 127, found, 0.25), fed)


def test_a_trellis_fills_its_budget_with_less_loss_and_comes_back(tmp_path):
    weights, statistics, specs = model()
    budget_bytes = int(0.75 * 3 * 96 * 80 * 5.2 / 8)

    def size_of(plan):
        return len(encode_artifact(plan.tensors, {}, ("raw", "rans")))

    plans = {}
    for trellis in (False, True):
        plan, points = fit_model(weights, statistics, specs, size_of, budget_bytes, rate=0.25, trellis=trellis)
        assert 0.995 * budget_bytes <= size_of(plan) <= budget_bytes
        plans[trellis] = sum(plan.expected_nats.values())
    assert len(points) <= 6  # begun where the uniform grids end
    assert plans[True] < 0.96 * plans[False]  # rows of less than 2 bits gain little
    save_artifact(tmp_path / "trellis.artifact", plan.tensors, {})
    loaded, _ = load_artifact(tmp_path / "trellis.artifact")
    for name, q in plan.tensors.items():
        np.testing.assert_array_equal(loaded[name], dequantize(q))
    assert plan.tensors["blocks.0.w"].spec == TRELLIS_GRID
    assert TRELLIS_GRID.label == "trellis8/cross"


def test_a_single_weight_has_no_place_on_a_trellis():
    with pytest.raises(ConfigError, match=r"plan\.plan_model finds them"):
        quantize(np.ones((2, 2), np.float32), TRELLIS_GRID)
    with pytest.raises(ConfigError, match="none for training to snap to"):
        fake_quantize_torch(torch.ones(2, 2), TRELLIS_GRID)
    for options in ({"bits": 7}, {"scale": "none"}, {"clip": 2.0}):
        with pytest.raises(ConfigError):
            GridSpec("trellis", **options)
