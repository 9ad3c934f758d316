"""Predicted sizes: within a percent for models of other sizes, refused for grids that nobody measured."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from common.artifact.__main__ import main
from common.artifact.container import decode_artifact, encode_artifact
from common.artifact.predict import (
    gaussian_code_bits,
    leave_one_out,
    measure_artifact,
    predict_size,
    read_measured,
    report_layout,
    write_measured,
)
from common.errors import ArtifactError, ConfigError
from common.quant.grid import GridSpec, quantize

INT4 = GridSpec("int", 4)


def trained_like(width: int, layers: int, seed: int) -> dict:
    """Rows with lighter tails than Gaussian ones in one role, heavier in the other; embedding and norms."""
    rng = np.random.default_rng(seed)
    state = {"embed.weight": quantize(0.1 * rng.standard_normal((400, width), dtype=np.float32), GridSpec("fp8_e4m3"))}
    for index in range(layers):
        light = rng.uniform(-1, 1, (3 * width, width)) + 0.5 * rng.standard_normal((3 * width, width))
        heavy = rng.standard_normal((width, 3 * width)) * np.exp2(np.sin(np.arange(3 * width)) / 2)
        state[f"blocks.{index}.up.weight"] = quantize(light.astype(np.float32), INT4)
        state[f"blocks.{index}.down.weight"] = quantize(heavy.astype(np.float32), INT4)
        norm = 1 + 0.1 * rng.standard_normal(width)
        state[f"blocks.{index}.norm"] = quantize(norm.astype(np.float32), GridSpec("bf16"))
    return state


@pytest.fixture(scope="module")
def reports() -> dict:
    shapes = {"small": (96, 3), "middle": (128, 4), "large": (192, 3)}
    return {
        name: decode_artifact(encode_artifact(trained_like(*shape, seed=index), {}, ("raw", "rans")))[2]
        for index, (name, shape) in enumerate(shapes.items())
    }


def test_gaussian_bits_are_the_entropy_of_gaussian_rows():
    rng = np.random.default_rng(0)
    for columns in (64, 640):
        codes = quantize(rng.standard_normal((200_000 // columns, columns), dtype=np.float32), INT4, "w").codes
        shares = np.bincount(codes.reshape(-1) + 7, minlength=15) / codes.size
        entropy = -sum(p * math.log2(p) for p in shares if p > 0)
        assert gaussian_code_bits(INT4, columns) == pytest.approx(entropy, abs=0.03)
    assert gaussian_code_bits(GridSpec("int", 6, clip=12.85), 640) == gaussian_code_bits(GridSpec("bf16"), 9) == 0.0


def test_other_sizes_are_predicted_within_a_percent(reports):
    for label, predicted in leave_one_out(reports).items():
        assert predicted.file_bytes == pytest.approx(reports[label].file_bytes, rel=0.01)
        # and tensor by tensor, not by luck of a sum
        for got, true in zip(predicted.tensors, reports[label].tensors, strict=True):
            if true.n_weights > 10_000:
                assert got.total_bytes == pytest.approx(true.total_bytes, rel=0.03), true.name


def test_a_role_that_was_never_measured_costs_what_others_on_its_grid_did(reports):
    measured = [measure_artifact(label, report) for label, report in reports.items()]
    layout = {"blocks.0.gate.weight": ((256, 256), INT4)}
    alike = [role for one in measured for role in one.roles.values() if role.grid == "int4"]
    beyond = sum(8 * role.code_bytes - role.model_bits for role in alike) / sum(role.n_weights for role in alike)
    expected = 256 * 256 * (gaussian_code_bits(INT4, 256) + beyond) / 8
    assert predict_size(layout, measured).tensors[0].code_bytes == pytest.approx(expected, abs=1)
    with pytest.raises(ConfigError, match="int5"):
        predict_size({"w": ((64, 64), GridSpec("int", 5))}, measured)


def test_commands(reports, tmp_path, capsys):
    paths = []
    for index, shape in enumerate(((96, 3), (128, 4))):
        path = tmp_path / f"{index}.artifact"
        path.write_bytes(encode_artifact(trained_like(*shape, seed=index), {}, ("raw", "rans")))
        paths.append(str(path))
    sizes = tmp_path / "sizes.json"
    assert main(["measure", *paths, "--out", str(sizes)]) == 0
    off = [float(line.split()[-1].rstrip("%")) for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(off) == 2
    assert max(map(abs, off)) < 1
    measured = read_measured(sizes)
    assert write_measured(measured) == sizes.read_bytes()
    # One more, beside those of the file: predicted from them, and added to them; measured again, it is there once.
    more = tmp_path / "more.artifact"
    more.write_bytes(encode_artifact(trained_like(160, 3, seed=9), {}, ("raw", "rans")))
    both = tmp_path / "both.json"
    for _ in range(2):
        assert main(["measure", str(more), "--with", str(sizes), "--out", str(both)]) == 0
        row = capsys.readouterr().out.splitlines()[1].split()
        sizes_of = predict_size(report_layout(decode_artifact(more.read_bytes())[2]), measured)
        assert row[3] == f"{sizes_of.file_bytes:,}"
        assert [one.label for one in read_measured(both)] == [*paths, str(more)]
        sizes = both
    assert main(["measure", str(more)]) == 2
    assert "at least two" in capsys.readouterr().err
    sizes = tmp_path / "sizes.json"
    layout = {name: {"shape": s, "grid": g.label} for name, (s, g) in report_layout(reports["large"]).items()}
    (tmp_path / "layout.json").write_text(json.dumps(layout), encoding="utf-8")
    options = ["budget", "--predict", str(tmp_path / "layout.json"), "--measured", str(sizes)]
    assert main([*options, "--bytes", "10000000"]) == 0
    assert f"{predict_size(report_layout(reports['large']), measured).file_bytes:,}" in capsys.readouterr().out
    assert main([*options, "--bytes", "1000"]) == 2
    assert "over the budget of 1,000" in capsys.readouterr().err


def test_bad_input_is_named(tmp_path, capsys):
    (tmp_path / "bad").write_text('{"w": {"shape": [-1], "grid": "int4"}}', encoding="utf-8")
    (tmp_path / "none").write_text("[]", encoding="utf-8")
    cases = (("bad", "none", "whole numbers"), ("no", "none", "layout"), ("none", "no", "layout"))
    for predict, measured, says in cases:
        options = ["--predict", str(tmp_path / predict), "--measured", str(tmp_path / measured)]
        assert main(["budget", *options]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(ArtifactError, match="measure"):
        read_measured(tmp_path / "bad")
    with pytest.raises(SystemExit):
        main(["budget"])
    assert main(["measure", str(tmp_path / "bad")]) == 2
