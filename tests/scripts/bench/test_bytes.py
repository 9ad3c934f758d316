"""The byte bench: its arithmetic, and the bar on the synthetic full-size state."""

from __future__ import annotations

import pytest

from scripts.bench.bytes import bytes_at, main, summary_lines, synthetic_row, synthetic_state

OURS = [{"bytes": 100, "loss_bpb": 0.004}, {"bytes": 200, "loss_bpb": 0.002}, {"bytes": 300, "loss_bpb": 0.001}]


def test_bytes_at_a_loss_lie_on_the_curve():
    assert bytes_at(OURS, 0.002) == 200
    assert bytes_at(OURS, 0.003) == pytest.approx(150)
    assert bytes_at(OURS, 0.01) is None
    assert bytes_at(OURS, 0.0001) is None


def test_summary_compares_at_equal_loss_and_under_the_limit():
    others = [{"row": "seed", "bytes": 250, "loss_bpb": 0.003}, {"row": "far", "bytes": 90, "loss_bpb": 0.02}]
    lines = summary_lines(others, OURS)
    assert "150 bytes, 40.0% fewer" in lines[0]
    assert "outside our curve" in lines[1]
    assert "ours 200 (+0.00200), others 250 (+0.00300): 20.0% fewer" in lines[2]


def test_usage(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "--synthetic" in capsys.readouterr().err


@pytest.mark.slow
def test_the_synthetic_full_size_state_keeps_its_bar():
    row = synthetic_row(synthetic_state())  # raises if a code or scale comes back changed
    assert row["int"] > 29e6
    assert row["fp8_e4m3"] > 2.7e6
    assert row["bytes"] <= 13_970_000
