"""scripts/architecture.py: the picture is current, and its arrows say no more and no less than the table."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from scripts.architecture import MAY_IMPORT, PICTURE, architecture_svg, arrows, levels


def reachable(edges: list[tuple[str, str]], room: str) -> set[str]:
    near = {other for start, other in edges if start == room}
    return near.union(*(reachable(edges, other) for other in near))


def test_the_picture_is_current():
    assert PICTURE.read_text(encoding="utf-8") == architecture_svg(), "run `python scripts/architecture.py`"


def test_following_arrows_gives_the_table_back():
    edges = arrows(MAY_IMPORT)
    for room, others in MAY_IMPORT.items():
        assert reachable(edges, room) == others - {room}
    for start, end in edges:  # none is spare
        assert end not in reachable([edge for edge in edges if edge != (start, end)], start)
        assert levels(MAY_IMPORT)[start] > levels(MAY_IMPORT)[end]


def test_another_table_gives_another_picture():
    looser = {**MAY_IMPORT, "worldmodel": {"worldmodel", "submissions", "common"}}
    assert ("worldmodel", "submissions") in arrows(looser)
    assert ("worldmodel", "common") not in arrows(looser)  # said by the two arrows through submissions
    picture = architecture_svg(may_import=looser)
    assert picture != architecture_svg()
    drawn = ET.fromstring(picture)
    assert sum(element.get("marker-end") is not None for element in drawn.iter()) == len(arrows(looser))
