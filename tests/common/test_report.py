"""Parts of a report: escaped, self-contained, and drawn to scale."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import DataError
from common.report import (
    Curve,
    chart_svg,
    embedded_picture,
    folded,
    html_page,
    html_table,
    log_points,
    read_log_events,
    squarify,
    treemap_svg,
)


def test_logs_are_read_and_damage_is_named(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "other": 1}\n{"step": 5, "loss": 1.0}\n{"step": 9, "lo')
    events = read_log_events(log)
    assert log_points(events, "loss") == ((1.0, 3.0), (5.0, 1.0))
    log.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": "x"}\n{"loss": 2}\n')
    assert log_points(read_log_events(log), "loss") == ()
    log.write_text('{"step": 1}\n[1]\n')
    with pytest.raises(DataError, match=r"log\.jsonl:2: expected a JSON object"):
        read_log_events(log)
    log.write_text('{"step": 1}\nxx\n')
    with pytest.raises(DataError, match=r"log\.jsonl:2: not JSON"):
        read_log_events(log)
    with pytest.raises(DataError, match="is missing"):
        read_log_events(tmp_path / "none.jsonl")


def test_charts_are_to_scale_and_share_their_axes():
    curves = [Curve("a <b>", ((0.0, 0.0), (10.0, 4.0))), Curve("c", ((0.0, 8.0), (20.0, 0.0)), "#123456")]
    svg = chart_svg("title & more", curves, "steps")
    lines = [[tuple(map(float, p.split(","))) for p in points.split()] for points in re.findall(r'points="(.*?)"', svg)]
    (a0, a1), (c0, c1) = lines
    assert a0[0] == c0[0]
    assert a1[0] - a0[0] == pytest.approx((c1[0] - c0[0]) / 2, abs=0.2)  # half as many steps
    assert a0[1] - a1[1] == pytest.approx((c1[1] - c0[1]) / 2, abs=0.2)  # half as high, the other way
    assert "a &lt;b&gt; 4" in svg
    assert "title &amp; more" in svg
    assert chart_svg("x", [Curve("one point", ((1.0, 1.0),))], "steps") == ""
    assert chart_svg("flat", [Curve("k", ((1.0, 2.0), (2.0, 2.0)))], "steps").count("<polyline") == 1


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=40))
def test_a_treemap_covers_its_area_in_proportion(sizes):
    sizes = sorted(sizes, reverse=True)
    boxes = squarify(sizes, 0.0, 0.0, 300.0, 100.0)
    for size, (x, y, width, height) in zip(sizes, boxes, strict=True):
        assert width * height == pytest.approx(30_000 * size / sum(sizes), rel=1e-6)
        assert -1e-6 <= x <= x + width <= 300 + 1e-6
        assert -1e-6 <= y <= y + height <= 100 + 1e-6


def test_equal_parts_become_squares():
    for _, _, width, height in squarify([1.0] * 8, 0.0, 0.0, 400.0, 200.0):
        assert (width, height) == pytest.approx((100.0, 100.0))


def test_treemaps_name_every_part_and_its_bytes():
    svg = treemap_svg([("small", 1_000), ("big/<kernel>", 9_000), ("nothing", 0)], "Bytes of x")
    assert "big/&lt;kernel&gt;: 9,000 bytes, 90.0%" in svg
    assert "10,000 bytes in all" in svg
    assert "nothing" not in svg
    ElementTree.fromstring(svg)
    assert ">big/&lt;kernel&gt;</text>" in svg
    assert ">…" in treemap_svg([("a/" * 200 + "end", 1), ("b/" * 200 + "end", 1)], "long names are cut, visibly")
    assert treemap_svg([], "none") == ""


def test_pages_hold_their_pictures_and_ask_for_nothing(tmp_path):
    Image.new("RGB", (4, 3), "red").save(tmp_path / "a.png")
    page = html_page("A & B", [html_table(["<h>"], [["1 < 2"]]), folded("more", "<script>"),
                               embedded_picture(tmp_path / "a.png")])  # fmt: skip
    assert "<script" not in page
    assert "1 &lt; 2" in page
    assert 'src="data:image/png;base64,' in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    with pytest.raises(DataError, match="ending in"):
        embedded_picture(tmp_path / "a.svg")
