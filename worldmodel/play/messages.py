"""What browser and server say to each other: JSON both ways, and binary frames to the browser.

A message that is not exactly one of these is refused with the reason; nothing is guessed.

Legend: H W C frame · N tokens.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from common.errors import GolfError

MAX_MESSAGE_BYTES = 2_048
MAX_FPS = 60
MAX_REWIND = 100_000
# Sizes and fields of a frame's header, little-endian; worldmodel/play/page/play.js reads the same.
FRAME_HEADER = struct.Struct("<BBHHHIiIIffff")
FLAG_REAL, FLAG_PAUSED, FLAG_DRIFT, FLAG_LEVEL_ENDED, FLAG_RECORDING = 1, 2, 4, 8, 16
FRAME_VERSION = 1


class MessageError(GolfError):
    """A message from a browser that is not one of ours."""


@dataclass(frozen=True)
class Hello:
    """First message: go on with an earlier session, or begin one."""

    session: str = ""


@dataclass(frozen=True)
class Act:
    """The action that is held from now on. `number` counts the browser's messages, for its latency."""

    action: int
    number: int = 0


@dataclass(frozen=True)
class GameAct:
    """The same, named by the game's actions."""

    action: int
    number: int = 0


@dataclass(frozen=True)
class Pilot:
    """Who is at the controls."""

    name: Literal["human", "random", "sticky-right"]


@dataclass(frozen=True)
class Pause:
    """Stop or go on."""

    on: bool


@dataclass(frozen=True)
class Step:
    """One frame, then stand still."""


@dataclass(frozen=True)
class Rewind:
    """Go back by frames and stand still."""

    frames: int


@dataclass(frozen=True)
class Reset:
    """Begin from a clip."""

    clip: int


@dataclass(frozen=True)
class Resync:
    """Begin the dream anew from what the real game shows now."""


@dataclass(frozen=True)
class Settings:
    """How the dream is sampled and how fast it runs."""

    temperature: float
    decode_steps: int
    fps: float


@dataclass(frozen=True)
class Record:
    """Begin to record, or end it and make the file."""

    on: bool
    format: Literal["mp4", "gif"] = "mp4"


Message = Hello | Act | GameAct | Pilot | Pause | Step | Rewind | Reset | Resync | Settings | Record
KINDS: dict[str, type] = {kind.__name__.lower(): kind for kind in get_args(Message)}


def parse_message(text: str | bytes | None) -> Message:
    """A browser's message.

    Raises:
        MessageError: binary, too long, not JSON, an unknown type or field, or a value of the wrong type or range.
    """
    if not isinstance(text, str):
        raise MessageError("binary message; send JSON text")
    if len(text) > MAX_MESSAGE_BYTES:
        raise MessageError(f"message of {len(text)} characters; at most {MAX_MESSAGE_BYTES}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"not JSON ({type(error).__name__})") from error
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise MessageError('expected an object with a string "type"')
    kind = KINDS.get(value.pop("type"))
    if kind is None:
        raise MessageError(f"unknown type; expected one of {', '.join(sorted(KINDS))}")
    hints = get_type_hints(kind)
    if unknown := sorted(set(value) - set(hints)):
        raise MessageError(f"{kind.__name__.lower()}: unknown field {unknown[0][:40]!r}")
    fields = {name: _checked(hints[name], item, f"{kind.__name__.lower()}.{name}") for name, item in value.items()}
    try:
        return _in_range(kind(**fields))
    except TypeError as error:
        needed = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
        missing = [name for name in needed if name not in fields]
        raise MessageError(f"{kind.__name__.lower()}: missing {', '.join(missing)}") from error


def _checked(hint: Any, item: Any, where: str) -> Any:
    if get_origin(hint) is Literal:
        if item not in get_args(hint):
            raise MessageError(f"{where}: expected one of {', '.join(get_args(hint))}")
        return item
    if hint is float and isinstance(item, int) and not isinstance(item, bool) and abs(item) < 1 << 53:
        return float(item)
    if not isinstance(item, hint) or (hint is int and isinstance(item, bool)):
        raise MessageError(f"{where}: expected {hint.__name__}, got {type(item).__name__}")
    return item


def _in_range(message: Any) -> Message:
    ranges = {
        "temperature": (0.0, 5.0), "decode_steps": (1, 4096), "fps": (1.0, float(MAX_FPS)), "number": (0, 0xFFFFFFFF),
        "frames": (1, MAX_REWIND), "action": (0, 4095), "clip": (0, 4095),
    }  # fmt: skip
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if field.name in ranges and not ranges[field.name][0] <= value <= ranges[field.name][1]:  # also refuses NaN
            low, high = ranges[field.name]
            raise MessageError(f"{type(message).__name__.lower()}.{field.name}: expected a value in [{low}, {high}]")
    return message


@dataclass(frozen=True)
class Shown:
    """One moment of a game as its player sees it."""

    frame: int
    action: int
    dream_HWC: np.ndarray
    real_HWC: np.ndarray | None
    entropy_bits: float
    """Mean entropy of the frame's tokens; NaN for a true frame."""
    drift_bits: float
    """Its running mean; NaN at first."""
    psnr_db: float
    """Of the dream against the real game; NaN without one."""
    paused: bool
    drifting: bool
    level_ended: bool
    recording: bool
    answered: int
    """Number of the newest message whose action this frame shows."""


def pack_frame(shown: Shown, *, dropped: int, step_ms: float) -> bytes:
    """The binary message of one moment: `FRAME_HEADER`, dream pixels, real pixels (RGB, row by row).

    Args:
        shown: the moment.
        dropped: frames that this connection was too slow for, so far.
        step_ms: time the model took for the batch that made it.
    """
    height, width, channels = shown.dream_HWC.shape
    flags = (
        FLAG_REAL * (shown.real_HWC is not None) | FLAG_PAUSED * shown.paused | FLAG_DRIFT * shown.drifting
        | FLAG_LEVEL_ENDED * shown.level_ended | FLAG_RECORDING * shown.recording
    )  # fmt: skip
    header = FRAME_HEADER.pack(
        FRAME_VERSION, flags, height, width, channels, shown.frame & 0xFFFFFFFF, shown.action, shown.answered,
        dropped & 0xFFFFFFFF, shown.entropy_bits, shown.drift_bits, shown.psnr_db, step_ms,
    )  # fmt: skip
    real = b"" if shown.real_HWC is None else shown.real_HWC.tobytes()
    return header + shown.dream_HWC.tobytes() + real
