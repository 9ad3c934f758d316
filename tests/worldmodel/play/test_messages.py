"""Only exact messages are understood; frames are packed as the page unpacks them."""

import contextlib
import dataclasses
import json
import math
import re
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldmodel.play.messages import (
    FLAG_DRIFT,
    FLAG_LEVEL_ENDED,
    FLAG_PAUSED,
    FLAG_REAL,
    FLAG_RECORDING,
    FRAME_HEADER,
    Act,
    Hello,
    MessageError,
    Record,
    Settings,
    Shown,
    pack_frame,
    parse_message,
)


def test_messages_are_read():
    assert parse_message('{"type": "act", "action": 2, "number": 9}') == Act(2, 9)
    assert parse_message('{"type": "hello"}') == Hello("")
    assert parse_message('{"type": "record", "on": true, "format": "gif"}') == Record(True, "gif")
    text = '{"type": "settings", "temperature": 1, "decode_steps": 4, "fps": 15}'
    assert parse_message(text) == Settings(1.0, 4, 15.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\x00", "binary"),
        (None, "binary"),
        ("{", "not JSON"),
        ("[" * 2000, "not JSON"),
        ('"' + "x" * 3000 + '"', "at most 2048"),
        ("[1]", "expected an object"),
        ('{"type": 3}', "expected an object"),
        ('{"type": "fly"}', "unknown type; expected one of act"),
        ('{"type": "act"}', "act: missing action"),
        ('{"type": "act", "action": "2"}', "act.action: expected int, got str"),
        ('{"type": "act", "action": true}', "expected int, got bool"),
        ('{"type": "act", "action": 1.5}', "expected int, got float"),
        ('{"type": "act", "action": -1}', r"expected a value in \[0, 4095\]"),
        ('{"type": "act", "action": 1, "speed": 2}', "unknown field 'speed'"),
        ('{"type": "pause", "on": 1}', "expected bool"),
        ('{"type": "settings", "temperature": NaN, "decode_steps": 1, "fps": 15}', "settings.temperature"),
        ('{"type": "settings", "temperature": 0, "decode_steps": 1, "fps": 1e400}', "settings.fps"),
        ('{"type": "record", "on": true, "format": "exe"}', "one of mp4, gif"),
        ('{"type": "rewind", "frames": 0}', "rewind.frames"),
    ],
)
def test_anything_else_is_refused_with_the_reason(text, words):
    with pytest.raises(MessageError, match=words):
        parse_message(text)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.sampled_from(["type", "action", "on", "fps", "name", "frames", "format", "session"]), _JSON))
def test_hostile_objects_raise_nothing_else(value):
    with contextlib.suppress(MessageError):
        parse_message(json.dumps(value))


def shown(**changes) -> Shown:
    dream = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    base = Shown(
        frame=70_000, action=-1, dream_HWC=dream, real_HWC=dream[::-1], entropy_bits=1.5, drift_bits=math.nan,
        psnr_db=math.inf, paused=False, drifting=True, level_ended=False, recording=True, answered=4_000_000_000,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def test_frames_are_packed_as_described():
    data = pack_frame(shown(), dropped=3, step_ms=2.5)
    version, flags, h, w, c, frame, action, answered, dropped, entropy, drift, psnr, ms = FRAME_HEADER.unpack_from(data)
    assert (version, flags, h, w, c) == (1, FLAG_REAL | FLAG_DRIFT | FLAG_RECORDING, 2, 3, 3)
    assert (frame, action, answered, dropped, entropy, ms) == (70_000, -1, 4_000_000_000, 3, 1.5, 2.5)
    assert math.isnan(drift)
    assert psnr == math.inf
    pixels = np.frombuffer(data, np.uint8, offset=FRAME_HEADER.size).reshape(2, 2, 3, 3)
    np.testing.assert_array_equal(pixels[0], shown().dream_HWC)
    np.testing.assert_array_equal(pixels[1], shown().real_HWC)
    alone = pack_frame(shown(real_HWC=None, drifting=False, recording=False, paused=True, level_ended=True),
                       dropped=0, step_ms=0.0)  # fmt: skip
    assert len(alone) == FRAME_HEADER.size + 18
    assert alone[1] == FLAG_PAUSED | FLAG_LEVEL_ENDED


def test_the_page_reads_the_header_that_is_written():
    code = (files("worldmodel.play") / "page" / "play.js").read_text(encoding="utf-8")
    assert f"const HEADER_BYTES = {FRAME_HEADER.size};" in code
    assert FRAME_HEADER.format in code
    flags = dict(re.findall(r"\b(REAL|PAUSED|DRIFT|LEVEL_ENDED|RECORDING) = (\d+)", code))
    assert {name: int(value) for name, value in flags.items()} == {
        "REAL": FLAG_REAL, "PAUSED": FLAG_PAUSED, "DRIFT": FLAG_DRIFT, "LEVEL_ENDED": FLAG_LEVEL_ENDED,
        "RECORDING": FLAG_RECORDING,
    }  # fmt: skip


def test_the_page_is_small_and_asks_nobody_else():
    total = 0
    for name in ("index.html", "play.js", "play.css"):
        text = (files("worldmodel.play") / "page" / name).read_text(encoding="utf-8")
        total += len(text.encode())
        for address in re.findall(r"(?:https?:)?//[\w.]+", re.sub(r"^\s*//.*$|\s// .*$", "", text, flags=re.M)):
            raise AssertionError(f"{name} names {address}")
    assert total < 100_000
