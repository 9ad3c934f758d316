"""python -m common.artifact budget: the file fills the budget, plan and curve are printed, bad input is named."""

from __future__ import annotations

import numpy as np
import pytest

from common.artifact.__main__ import main
from common.artifact.container import load_artifact, save_artifact


@pytest.fixture
def inputs(tmp_path):
    rng = np.random.default_rng(0)
    weights = {f"blocks.{i}.w": (0.1 * rng.standard_normal((96, 64))).astype(np.float32) for i in range(4)}
    weights["norm"] = np.ones(64, np.float32)
    statistics = {}
    for name in list(weights)[:4]:
        x_NC = rng.standard_normal((200, 64)) * np.exp2(rng.standard_normal(64))
        statistics[f"{name}/hessian"] = (x_NC.T @ x_NC / 200).astype(np.float32)
        statistics[f"{name}/sensitivity"] = (1e-4 * np.exp2(rng.standard_normal(96))).astype(np.float32)
    save_artifact(tmp_path / "float.artifact", weights, {"entry": "x"}, ("raw",))
    save_artifact(tmp_path / "statistics.artifact", statistics, {}, ("raw",))
    return tmp_path


def test_plan_curve_and_file(inputs, capsys):
    out = inputs / "model.artifact"
    paths = [str(inputs / "float.artifact"), str(inputs / "statistics.artifact")]
    options = ["--bytes", "14000", "--code-bytes", "2000", "--points", "1", "--bytes-per-token", "3.7"]
    options += ["--out", str(out)]
    assert main(["budget", *paths, *options]) == 0
    assert 0.995 * 12_000 <= out.stat().st_size <= 12_000
    tensors, meta = load_artifact(out)
    assert meta == {"entry": "x"}
    assert set(tensors) == {"blocks.0.w", "blocks.1.w", "blocks.2.w", "blocks.3.w", "norm"}
    text = capsys.readouterr().out
    assert f"{out.stat().st_size:,}" in text
    curve = [line.split() for line in text.splitlines()[text.splitlines().index("") + 1 :] if "%" in line]
    sizes, losses = [int(c[0].replace(",", "")) for c in curve], [float(c[4]) for c in curve]
    assert len(curve) >= 3
    assert sizes == sorted(sizes, reverse=True)
    assert losses == sorted(losses)


@pytest.mark.parametrize(
    "bytes_,says", [("100", "too few"), ("16000001", None)], ids=["too small for any steps", "more than can be used"]
)
def test_budgets_at_the_edges(inputs, capsys, bytes_, says):
    status = main(["budget", str(inputs / "float.artifact"), str(inputs / "statistics.artifact"), "--bytes", bytes_])
    assert status == (2 if says else 0)
    assert (says or "budget") in (capsys.readouterr().err if says else capsys.readouterr().out)


def test_statistics_that_do_not_belong(inputs, capsys):
    rng = np.random.default_rng(1)
    save_artifact(inputs / "half", {"w/hessian": np.eye(3, dtype=np.float32)}, {}, ("raw",))
    other = {"w/hessian": np.eye(3, dtype=np.float32), "w/sensitivity": rng.random(2).astype(np.float32)}
    save_artifact(inputs / "other", other, {}, ("raw",))
    for name, says in (("half", "has no partner"), ("other", "is no tensor of")):
        assert main(["budget", str(inputs / "float.artifact"), str(inputs / name)]) == 2
        assert says in capsys.readouterr().err
