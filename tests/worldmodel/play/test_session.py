"""One player's game: rewind is exact, history and recordings are bounded, wishes are checked."""

import dataclasses
import resource
from pathlib import Path

import numpy as np
import pytest

from tests.worldmodel.play.conftest import PROMPT, TABLE
from worldmodel.play.clips import ActionTable
from worldmodel.play.messages import (
    Act,
    GameAct,
    Hello,
    MessageError,
    Pause,
    Pilot,
    Record,
    Reset,
    Resync,
    Rewind,
    Settings,
    Step,
)
from worldmodel.play.session import Limits, NotNow, calibrate


def play(session, pool, frames: int, *, actions=None) -> list:
    shown = []
    for index in range(frames):
        if actions is not None:
            session.handle(Act(int(actions[index])))
        session.finish(pool.step([session.request()])[0])
        shown.append(session.shown)
    return shown


def test_rewound_and_played_again_is_the_same_game(make_session, pool):
    session = make_session(settings=Settings(1.0, 2, 15.0))
    actions = np.random.default_rng(0).integers(0, 3, 30)
    first = play(session, pool, 30, actions=actions)
    assert session.handle(Rewind(12))
    assert session.paused
    assert session.frame == PROMPT - 1 + 18
    np.testing.assert_array_equal(session.shown.dream_HWC, first[17].dream_HWC)
    again = play(session, pool, 12, actions=actions[18:])
    for a, b in zip(first[18:], again, strict=True):
        np.testing.assert_array_equal(a.dream_HWC, b.dream_HWC)
        assert a.entropy_bits == pytest.approx(b.entropy_bits, abs=1e-5)
        assert (a.frame, a.action) == (b.frame, b.action)


def test_a_rewind_stops_at_the_first_frame_and_at_the_kept_history(make_session, pool):
    session = make_session(limits=Limits(8, 4))
    play(session, pool, 5)
    session.handle(Rewind(1000))
    assert session.frame == PROMPT - 1
    play(session, pool, 50)
    session.handle(Rewind(1000))
    assert session.frame == PROMPT - 1 + 50 - 8
    play(session, pool, 3)


def test_a_clock_that_is_set_back_changes_nothing(make_session, pool, monkeypatch):
    actions = np.random.default_rng(1).integers(0, 3, 60)
    wanted = play(make_session(), pool, 60, actions=actions)
    monkeypatch.setattr(pool, "clock_limit", 16)
    session = make_session()
    got = play(session, pool, 60, actions=actions)
    for a, b in zip(wanted, got, strict=True):
        np.testing.assert_array_equal(a.dream_HWC, b.dream_HWC)
    session.handle(Rewind(30))  # behind several settings of the clock
    np.testing.assert_array_equal(session.shown.dream_HWC, wanted[29].dream_HWC)
    for a, b in zip(wanted[30:], play(session, pool, 30, actions=actions[30:]), strict=True):
        np.testing.assert_array_equal(a.dream_HWC, b.dream_HWC)


def test_the_held_action_decides_and_reset_begins_anew(make_session, pool):
    session = make_session()
    start = session.shown
    left = play(session, pool, 4, actions=[0] * 4)
    session.handle(Reset(0))
    np.testing.assert_array_equal(session.shown.dream_HWC, start.dream_HWC)
    right = play(session, pool, 4, actions=[2] * 4)
    assert any((a.dream_HWC != b.dream_HWC).any() for a, b in zip(left, right, strict=True))
    assert {shown.action for shown in right} == {2}
    session.handle(Reset(1))
    assert (session.shown.dream_HWC != start.dream_HWC).any()


def test_standing_still_and_single_steps(make_session, pool):
    session = make_session()
    assert session.due
    session.handle(Pause(True))
    assert not session.due
    session.handle(Step())
    assert session.due
    play(session, pool, 1)
    assert not session.due
    session.handle(Pause(False))
    assert session.due


def test_policies_steer_and_repeat_after_a_reset(make_session, pool):
    session = make_session()
    session.handle(Pilot("random"))
    first = [shown.action for shown in play(session, pool, 20)]
    assert len(set(first)) == 3
    session.handle(Reset(0))
    assert [shown.action for shown in play(session, pool, 20)] == first
    with pytest.raises(MessageError, match="this world has human, random"):
        session.handle(Pilot("sticky-right"))


def test_recordings_end_at_their_bound(make_session, pool):
    session = make_session(limits=Limits(40, 6))
    session.handle(Record(True, "gif"))
    play(session, pool, 9)
    assert session.recording_full
    pictures, form = session.take_recording()
    assert (len(pictures), form, pictures[0].shape) == (6, "gif", (16, 16, 3))
    assert session.take_recording() is None


def test_history_of_a_long_game_is_bounded(make_session, pool):
    session = make_session(limits=Limits(10, 4))
    play(session, pool, 60)
    assert len(session._past) == 10 + pool.replay_frames


def test_game_actions_go_through_the_table(make_session, pool):
    table = ActionTable(("latent 0 ≈ right", "latent 1 (unused)", "latent 2 ≈ left"), TABLE.names, (2, -1, 0),
                        (2, 0, 0))  # fmt: skip
    session = make_session(table=table)
    session.handle(GameAct(0, number=4))
    assert session.request().action == 2
    session.handle(Act(1))
    session.finish(pool.step([session.request()])[0])
    assert session._past[-1].game_action == TABLE.names.index("none")  # nothing stands for an unused latent action


def test_impossible_wishes_are_named(make_session, pool):
    session = make_session()
    for message, words in [
        (Act(3), r"action 3: expected one of 0\.\.2"),
        (GameAct(9), r"action 9"),
        (Reset(7), r"clips 0\.\.2"),
        (Settings(0.0, 5, 15.0), "4 tokens"),
        (Hello(), "hello does not belong here"),
        (Record(False), "does not belong"),
    ]:
        with pytest.raises(MessageError, match=words):
            session.handle(message)
    with pytest.raises(NotNow, match="no real game in this test"):
        session.handle(Resync())
    play(session, pool, 1)  # and the game goes on


def test_drift_is_called_above_the_bound_only(make_session, pool, clips):
    bound = calibrate(pool, clips, TABLE, Settings(0.0, 2, 15.0))
    session = make_session()
    shown = play(session, pool, 5)
    assert 0 < bound < 5
    assert not any(s.drifting for s in shown)
    session._warn_bits = 0.5 * min(s.drift_bits for s in shown)
    assert all(s.drifting for s in play(session, pool, 2))
    assert shown[0].drift_bits == pytest.approx(shown[0].entropy_bits)
    assert dataclasses.replace(shown[0]).psnr_db != shown[0].psnr_db  # NaN: there is nothing to compare with


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc, which is Linux")
def test_memory_is_flat_over_20000_frames(make_session, pool):
    def resident_mb() -> float:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize() / 1e6

    session = make_session(limits=Limits(900, 900))
    session.handle(Pilot("random"))
    session.handle(Record(True))
    measured = []
    for _ in range(20):
        for _ in range(1000):
            session.finish(pool.step([session.request()])[0])
        measured.append(resident_mb())
    assert session.frame == PROMPT - 1 + 20_000  # past the point where the clock is set back
    assert measured[-1] - measured[2] < 4.0, measured
