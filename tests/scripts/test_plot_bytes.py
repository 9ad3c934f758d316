"""scripts/plot_bytes.py: the committed picture is of the committed figures; points are where they belong."""

from __future__ import annotations

import hashlib
import json

import pytest
from PIL import Image

from common.errors import DataError
from scripts.plot_bytes import FIGURES, PICTURE, SOURCE_KEY, draw_bytes, main, read_figures


def test_the_picture_is_of_these_figures():
    with Image.open(PICTURE) as picture:
        assert picture.info[SOURCE_KEY] == hashlib.sha256(FIGURES.read_bytes()).hexdigest(), "run scripts/plot_bytes.py"


def test_every_row_is_a_point():
    document = read_figures(FIGURES)
    lines = draw_bytes(document).axes[0].lines
    drawn = {(float(x), float(y)) for line in lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    for row in document["rows"]:
        assert (row["bytes"], document["float_bpb"] + row["loss_bpb"]) in drawn


def test_writes_and_refuses(tmp_path, capsys):
    rows = [{"row": "ours", "bytes": 10, "loss_bpb": 0.1}, {"row": "other", "bytes": 20, "loss_bpb": 0.2}]
    good = tmp_path / "good.json"
    good.write_text(json.dumps({"float_bpb": 1.0, "weights": 5, "rows": rows}))
    assert main([str(good), "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for text, message in (("{}", "not a document"), ('{"float_bpb": 1, "rows": []}', "no rows"), ("[", "not a doc")):
        good.write_text(text)
        with pytest.raises(DataError, match=message):
            read_figures(good)
    assert main([str(tmp_path / "none.json")]) == 2
    assert "is missing; write it with" in capsys.readouterr().err
