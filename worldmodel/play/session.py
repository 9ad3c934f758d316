"""One player's game: what it was, what is held, who steers, and how far back it can go. No network, no clock.

Every list here has a bound, so a game of hours needs the memory of a game of minutes.

Legend: N tokens of a frame · R frames of a replay · P prompt frames · H W C frame.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from common.errors import ConfigError, DataError, GolfError
from worldmodel.data.envs import PROCGEN_ACTION_NAMES, Policy, make_policy
from worldmodel.models.dynamics import UNKNOWN_ACTION
from worldmodel.play.clips import ActionTable, StartClip
from worldmodel.play.messages import (
    Act,
    GameAct,
    Message,
    MessageError,
    Pause,
    Pilot,
    Record,
    Reset,
    Resync,
    Rewind,
    Settings,
    Shown,
    Step,
)
from worldmodel.play.pool import DreamPool, StepRequest, StepResult
from worldmodel.play.real import RealGame, RealSource

# Weight of a new frame in the running mean of the entropy: about a second at 15 frames/s.
DRIFT_WEIGHT = 1 / 15
CALIBRATION_FRAMES = 12
CALIBRATION_MARGIN = 1.25


@dataclass(frozen=True)
class Limits:
    """Bounds of one game."""

    history_frames: int = 900
    """Frames that can be rewound."""
    record_frames: int = 900
    """Frames of one recording; it ends by itself there."""


class NotNow(GolfError):
    """A sensible wish that this game cannot fulfil at present; the player is told and plays on."""


@dataclass(frozen=True)
class Past:
    """One finished frame."""

    tokens_N: np.ndarray
    action: int
    game_action: int
    """What was sent to the real game; -1 before the first."""
    entropy_bits: float
    drift_bits: float


class Session:
    """One game. Methods that touch the pool or the real game (all but `settings`) belong on the model's thread."""

    def __init__(
        self, pool: DreamPool, slot: int, clips: list[StartClip], table: ActionTable, real: RealSource,
        *, settings: Settings, limits: Limits, warn_bits: float, seed: int,
    ) -> None:  # fmt: skip
        """Args:
            pool: where the dream lives.
            slot: its place there.
            clips: where it may begin.
            table: the controls.
            real: the real game, or why there is none.
            settings: sampling and speed at first.
            limits: bounds of history and recording.
            warn_bits: running mean of the entropy above which a dream counts as drifting.
            seed: of the sampling noise and of the policies.
        """
        self.slot, self.settings, self.paused, self.pilot = slot, settings, False, "human"
        self.clip, self.frame, self.answered = 0, 0, 0
        self.recording: list[np.ndarray] | None = None
        self.record_format: str = "mp4"
        self.real_reason = real.reason
        self._pool, self._clips, self._table, self._limits = pool, clips, table, limits
        self._warn_bits, self._seed = warn_bits, seed
        self._real = RealGame(real.options, limits.history_frames) if real.options is not None else None
        self._real_recent: deque[tuple[np.ndarray, int]] = deque(maxlen=len(clips[0].frames_PHWC))
        self._past: deque[Past] = deque(maxlen=limits.history_frames + pool.replay_frames)
        self._single = False  # one frame is wanted although the game stands still
        self._base = 0  # frame number at position 0 of the dream's clock
        idle = table.game_names.index("none") if "none" in table.game_names else 0
        self._idle_game = idle
        self._held = (table.from_game_E[idle] if table.from_game_E else 0, idle)
        self._next = self._held
        self._generator, self._policy = self._fresh_policy()
        self.shown = self._reset(0)

    @property
    def pilots(self) -> tuple[str, ...]:
        """Who may steer here."""
        sticky = self._table.game_names == PROCGEN_ACTION_NAMES
        return ("human", "random", "sticky-right") if sticky else ("human", "random")

    @property
    def due(self) -> bool:
        """Whether a frame is to be made now."""
        return self._single or not self.paused

    def close(self) -> None:
        """Release the real game."""
        if self._real is not None:
            self._real.close()

    # ------------------------------------------------------------------------------------------------------- messages

    def handle(self, message: Message) -> bool:
        """Do what a message asks; a changed picture is in `shown`.

        Returns:
            Whether there is a new picture to show now.

        Raises:
            MessageError: it names something that does not exist.
            NotNow: it asks for something that this game cannot do at present.
        """
        match message:
            case Act(action, number):
                self._hold(self._known(action, len(self._table.names)), None, number)
            case GameAct(action, number):
                self._known(action, len(self._table.from_game_E))
                self._hold(self._table.from_game_E[action], action, number)
            case Pilot(name):
                if name not in self.pilots:
                    raise MessageError(f"pilot {name}: this world has {', '.join(self.pilots)}")
                self.pilot = name
                self._generator, self._policy = self._fresh_policy()
            case Pause(on):
                self.paused = on
                self.shown = replace(self.shown, paused=on)
                return True
            case Step():
                self.paused = self._single = True
            case Rewind(frames):
                self.shown = self._rewind(frames)
                return True
            case Reset(clip):
                if clip >= len(self._clips):
                    raise MessageError(f"clip {clip}: there are clips 0..{len(self._clips) - 1}")
                self.shown = self._reset(clip)
                return True
            case Resync():
                self.shown = self._resync()
                return True
            case Settings(_, decode_steps, _):
                if decode_steps > self._pool.tokens:
                    raise MessageError(f"decode_steps {decode_steps}: a frame has {self._pool.tokens} tokens to fix")
                self.settings = message
            case Record(True, form):
                self.recording, self.record_format = [], form
                self.shown = replace(self.shown, recording=True)
                return True
            case _:
                raise MessageError(f"{type(message).__name__.lower()} does not belong here")
        return False

    def _known(self, action: int, count: int) -> int:
        if action >= count:
            raise MessageError(f"action {action}: expected one of 0..{count - 1}")
        return action

    def _hold(self, action: int, game_action: int | None, number: int) -> None:
        if game_action is None:
            game_action = self._table.to_game_A[action]
        self._held = (action, game_action if game_action >= 0 else self._idle_game)
        self.answered = number

    def take_recording(self) -> tuple[list[np.ndarray], str] | None:
        """End a recording; its pictures and the format wanted, or None where nothing was recorded."""
        pictures, self.recording = self.recording, None
        self.shown = replace(self.shown, recording=False)
        return (pictures, self.record_format) if pictures else None

    # ------------------------------------------------------------------------------------------------------- the game

    def _fresh_policy(self) -> tuple[np.random.Generator, Policy | None]:
        generator = np.random.Generator(np.random.Philox(self._seed))
        return generator, make_policy("sticky-right", 1, generator) if self.pilot == "sticky-right" else None

    def _choose(self) -> tuple[int, int]:
        """The next action for the dream and for the real game."""
        if self.pilot == "human":
            return self._held
        if self._policy is not None:
            first = np.asarray([not self._past or self._past[-1].game_action < 0])
            game = int(self._policy.act(self.shown.dream_HWC[None], first)[0])
            return self._table.from_game_E[game], game
        action = int(self._generator.integers(len(self._table.names)))
        game = self._table.to_game_A[action]
        return action, game if game >= 0 else self._idle_game

    def request(self) -> StepRequest:
        """What the pool is to do for the next frame; the action is chosen here."""
        if self.frame + 1 - self._base >= self._pool.clock_limit:
            keep = min(self._pool.replay_frames, len(self._past), max(1, self._pool.clock_limit // 2))
            self._base = self.frame - keep + 1
            self._rebuild(keep)
        self._next = self._choose()
        number = self.frame + 1
        return StepRequest(
            self.slot, self._next[0], number, number - self._base, self._seed, self.settings.temperature,
            self.settings.decode_steps,
        )  # fmt: skip

    def finish(self, result: StepResult) -> None:
        """Take the frame that `request` asked for, play the real game on, and keep both."""
        action, game_action = self._next
        self._single = False
        self.frame += 1
        entropy_bits = float(result.entropy_N.mean())
        before = self._past[-1].drift_bits
        drift_bits = entropy_bits if math.isnan(before) else before + DRIFT_WEIGHT * (entropy_bits - before)
        self._past.append(Past(result.tokens_N, action, game_action, entropy_bits, drift_bits))
        real_HWC, ended = None, False
        if self._real is not None:
            real_HWC, _, ended = self._real.step(game_action, self.frame)
            self._real_recent.append((real_HWC, game_action))
        self.shown = self._show(result.frame_HWC, real_HWC, ended=ended)
        if self.recording is not None and len(self.recording) < self._limits.record_frames:
            pictures = [result.frame_HWC] if real_HWC is None else [result.frame_HWC, real_HWC]
            self.recording.append(np.concatenate(pictures, axis=1))

    @property
    def recording_full(self) -> bool:
        """Whether the recording has reached its bound."""
        return self.recording is not None and len(self.recording) >= self._limits.record_frames

    def _show(self, dream_HWC: np.ndarray, real_HWC: np.ndarray | None, *, ended: bool = False) -> Shown:
        newest = self._past[-1]
        return Shown(
            frame=self.frame,
            action=newest.action,
            dream_HWC=dream_HWC,
            real_HWC=real_HWC,
            entropy_bits=newest.entropy_bits,
            drift_bits=newest.drift_bits,
            psnr_db=math.nan if real_HWC is None else psnr_of(dream_HWC, real_HWC),
            paused=self.paused,
            drifting=newest.drift_bits > self._warn_bits,
            level_ended=ended,
            recording=self.recording is not None,
            answered=self.answered,
        )

    def _reset(self, clip: int) -> Shown:
        self.clip, start = clip, self._clips[clip]
        self._generator, self._policy = self._fresh_policy()
        picture_HWC = self._begin(start.frames_PHWC, start.actions_A)
        real_HWC = None
        if self._real is not None and start.level_seed >= 0:
            try:
                real_HWC = self._real.reset(start.level_seed, start.prefix_N, start.frames_PHWC[-1], self.frame)
            except (ConfigError, DataError) as error:  # the dream plays on alone, and the page says why
                self.real_reason = str(error)
                self._real.close()
                self._real = None
            else:
                self._real_recent.clear()
                actions = [UNKNOWN_ACTION, *(int(action) for action in start.actions_A)]
                self._real_recent.extend(zip(start.frames_PHWC, actions, strict=True))
        return self._show(picture_HWC, real_HWC)

    def _begin(self, frames_PHWC: np.ndarray, game_actions: np.ndarray) -> np.ndarray:
        """Fill the dream's memory with true frames; numbers and clock start anew."""
        driven = self._pool.world.actions_of(frames_PHWC[None], np.append(game_actions, UNKNOWN_ACTION)[None])[0]
        self._past.clear()
        for tokens_N, action in zip(self._pool.encode(frames_PHWC), [UNKNOWN_ACTION, *driven], strict=True):
            self._past.append(Past(tokens_N, int(action), UNKNOWN_ACTION, math.nan, math.nan))
        self.frame, self._base = len(frames_PHWC) - 1, 0
        return self._rebuild(len(self._past))

    def _rebuild(self, count: int) -> np.ndarray:
        """Make the dream's memory anew from the last `count` frames."""
        recent = list(self._past)[-count:]
        first = self.frame - len(recent) + 1
        self._base = min(self._base, first)  # a rewind may reach behind the last setting of the clock
        tokens_RN = np.stack([past.tokens_N for past in recent])
        return self._pool.rebuild(self.slot, tokens_RN, [past.action for past in recent], first - self._base)

    def _resync(self) -> Shown:
        if self._real is None:
            raise NotNow(f"there is no real game to begin from: {self.real_reason}")
        if len(self._real_recent) < len(self._clips[0].frames_PHWC):
            raise NotNow("the real game was just rewound: play a few frames, then begin the dream from it")
        frames_PHWC = np.stack([frame for frame, _ in self._real_recent])
        picture_HWC = self._begin(frames_PHWC, np.asarray([action for _, action in self._real_recent][1:], np.int32))
        self._real.renumber(self.frame)
        return self._show(picture_HWC, frames_PHWC[-1])

    def _rewind(self, frames: int) -> Shown:
        """Go back as far as asked, or as far as the kept history reaches, and stand still."""
        self.paused = True
        prompt, replay = len(self._clips[0].frames_PHWC), self._pool.replay_frames
        from_start = len(self._past) == self.frame + 1  # then fewer frames than a replay suffice
        spare = len(self._past) - (prompt if from_start else replay)
        if self._real is not None:
            spare = min(spare, self.frame - self._real.oldest)
        frames = max(0, min(frames, spare))
        sent = {self.frame - back: past.game_action for back, past in enumerate(reversed(self._past))}
        for _ in range(frames):
            self._past.pop()
        self.frame -= frames
        picture_HWC = self._rebuild(min(replay, len(self._past)))
        real_HWC = self.shown.real_HWC
        if self._real is not None and frames:
            real_HWC = self._real.rewind(self.frame, sent)
            self._real_recent.clear()
        return self._show(picture_HWC, real_HWC)


def psnr_of(a_HWC: np.ndarray, b_HWC: np.ndarray) -> float:
    """PSNR in dB of two uint8 pictures; infinite for equal ones."""
    mse = float(np.mean((a_HWC.astype(np.float32) - b_HWC.astype(np.float32)) ** 2)) / 255.0**2
    return math.inf if mse == 0.0 else -10.0 * math.log10(mse)


def calibrate(pool: DreamPool, clips: list[StartClip], table: ActionTable, settings: Settings) -> float:
    """The entropy above which a dream is called drifting, from fresh dreams that follow the recorded actions.

    Each clip is dreamed on for up to CALIBRATION_FRAMES frames on the spare slot; the bound is the largest running mean
    that occurs, and CALIBRATION_MARGIN more.

    Returns:
        Bits a token.
    """
    largest = 0.0
    off = RealSource(None, "calibration")
    for number in range(len(clips)):
        session = Session(
            pool, pool.slots, clips[number : number + 1], table, off,
            settings=settings, limits=Limits(CALIBRATION_FRAMES, 1), warn_bits=math.inf, seed=0,
        )  # fmt: skip
        for game_action in clips[number].later_N[:CALIBRATION_FRAMES]:
            if game_action >= 0 and table.from_game_E:
                session.handle(GameAct(int(game_action)))
            session.finish(pool.step([session.request()])[0])
            largest = max(largest, session.shown.drift_bits)
    return largest * CALIBRATION_MARGIN
