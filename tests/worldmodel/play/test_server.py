"""Connections: joining, leaving and coming back, bad messages, slow readers, recordings, foreign pages."""

import asyncio
import io
import json
import time

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from tests.worldmodel.play.conftest import OFF, TABLE
from tests.worldmodel.play.test_messages import shown
from worldmodel.play import server
from worldmodel.play.messages import FLAG_PAUSED, FRAME_HEADER, MessageError, Settings
from worldmodel.play.server import GameHost, HostConfig, MessageBudget, Outbox, film_bytes, is_loopback, make_app
from worldmodel.play.session import Limits


@pytest.fixture
def host(pool, clips) -> GameHost:
    config = HostConfig(max_players=2, settings=Settings(0.0, 2, 60.0), limits=Limits(60, 20), fps=15.0)
    return GameHost(pool, clips, TABLE, OFF, config, warn_bits=9.0)


@pytest.fixture
def client(host):
    def on_fault(fault: BaseException) -> None:
        raise fault

    with TestClient(make_app(host, ["testserver"], on_fault)) as client:
        yield client


class Browser:
    """A player's side of one connection, as the page would be."""

    def __init__(self, socket, session: str = "") -> None:
        self._socket = socket
        self.frames: list[int] = []
        self.say(type="hello", session=session)
        self.welcome = self.note("welcome")

    def say(self, **message) -> None:
        self._socket.send_text(json.dumps(message))

    def note(self, kind: str) -> dict:
        """The next message of a kind; frames on the way are kept."""
        for _ in range(2000):
            event = self._socket.receive()
            if event["type"] == "websocket.close":
                raise WebSocketDisconnect(event["code"], event["reason"])
            if event.get("bytes"):
                self.frames.append(FRAME_HEADER.unpack_from(event["bytes"])[5])
                if kind == "frame":
                    return {"bytes": event["bytes"]}
            elif (note := json.loads(event["text"]))["type"] == kind:
                return note
        raise AssertionError(f"no {kind} in 2000 messages")

    def frame(self) -> tuple:
        return FRAME_HEADER.unpack_from(self.note("frame")["bytes"])

    def until(self, number: int) -> None:
        """Read frames up to the one of that number; one that was on its way may come before it."""
        seen = [self.frame()[5]]
        while seen[-1] != number:
            assert len(seen) < 5, f"wanted frame {number}, got {seen}"
            seen.append(self.frame()[5])


def test_a_player_is_welcomed_and_frames_come_by_themselves(client):
    with client.websocket_connect("/play") as socket:
        browser = Browser(socket)
        assert browser.welcome["actions"] == list(TABLE.names)
        assert browser.welcome["real_off"] == OFF.reason
        numbers = [browser.frame()[5] for _ in range(6)]
        assert numbers == sorted(numbers)
        assert numbers[-1] > numbers[0]
        browser.say(type="act", action=2, number=41)
        while (header := browser.frame())[7] != 41:
            pass
        assert header[6] == 2  # the frame that answers a message shows its action


def test_pause_step_rewind_reset(client):
    with client.websocket_connect("/play") as socket:
        browser = Browser(socket)
        while browser.frame()[5] < 12:
            pass
        browser.say(type="pause", on=True)
        assert browser.note("state")["paused"]
        while not (header := browser.frame())[1] & FLAG_PAUSED:
            pass
        at = header[5]
        browser.say(type="rewind", frames=5)
        browser.until(at - 5)
        browser.say(type="step")
        browser.until(at - 4)
        browser.say(type="reset", clip=2)
        browser.until(1)
        browser.say(type="resync")
        assert "no real game in this test" in browser.note("notice")["text"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not JSON"), ('{"type": "act", "action": 99}', "action 99"), ('{"type": "hello"}', "does not belong")],
)
def test_a_bad_message_closes_its_own_connection_only(client, text, words):
    with client.websocket_connect("/play") as good, client.websocket_connect("/play") as bad:
        one, other = Browser(good), Browser(bad)
        bad.send_text(text)
        assert words in other.note("error")["text"]
        with pytest.raises(WebSocketDisconnect) as closed:
            other.frame()
        assert closed.value.code == 1008
        assert words in closed.value.reason
        before = one.frame()[5]
        while one.frame()[5] <= before + 3:
            pass


def test_without_hello_there_is_no_place(client, host):
    with client.websocket_connect("/play") as socket:
        socket.send_text('{"type": "step"}')
        assert "first message" in socket.receive_json()["text"]
    assert not host.players


def test_a_lost_connection_gets_its_game_back(client, host):
    with client.websocket_connect("/play") as socket:
        browser = Browser(socket)
        while browser.frame()[5] < 8:
            pass
        browser.say(type="pause", on=True)
        browser.note("state")
        session, at = browser.welcome["session"], browser.frames[-1]
    with client.websocket_connect("/play") as socket:
        again = Browser(socket, session)
        assert again.welcome["session"] == session
        assert again.welcome["paused"]
        assert again.frame()[5] >= at
    assert len(host.players) == 1


def test_one_game_is_played_in_one_window(client):
    with client.websocket_connect("/play") as first:
        one = Browser(first)
        with client.websocket_connect("/play") as second:
            Browser(second, one.welcome["session"])
            with pytest.raises(WebSocketDisconnect) as closed:
                one.note("never")
            assert closed.value.code == 4001


def test_a_full_table_says_so_and_the_longest_lost_place_is_given_away(client, host):
    with client.websocket_connect("/play") as a, client.websocket_connect("/play") as b:
        first = Browser(a)
        Browser(b)
        while first.note("players") != {"type": "players", "now": 2, "most": 2}:
            pass
        with client.websocket_connect("/play") as c:
            c.send_text('{"type": "hello"}')
            assert "all 2 places are taken" in c.receive_json()["text"]
            assert c.receive()["code"] == 1013
    with client.websocket_connect("/play") as c:
        assert Browser(c).welcome["session"] != first.welcome["session"]
    assert len(host.players) == 2


@pytest.mark.parametrize("form", ["mp4", "gif"])
def test_recordings_can_be_downloaded(client, form):
    with client.websocket_connect("/play") as socket:
        browser = Browser(socket)
        browser.say(type="record", on=True, format=form)
        note = browser.note("recording")  # it ends by itself at its bound
        assert note["frames"] == 20
        assert note["why"] == "the recording is full"
        answer = client.get(note["url"])
        assert answer.status_code == 200
        assert f'filename="dream.{form}"' in answer.headers["content-disposition"]
        assert len(answer.content) == note["bytes"]
        pictures = iio.imread(answer.content, extension=f".{form}", index=None)
        scale = {"mp4": server.MP4_SCALE, "gif": server.GIF_SCALE}[form]
        assert pictures.shape[1:] == (16 * scale, 16 * scale, 3)
        assert client.get("/recording/none.mp4").status_code == 404


def test_films_take_pictures_of_two_widths():
    narrow, wide = np.zeros((16, 16, 3), np.uint8), np.full((16, 32, 3), 255, np.uint8)
    image = Image.open(io.BytesIO(film_bytes([narrow, wide], "gif", 15.0)))
    assert image.size == (64, 32)


def test_foreign_pages_and_rebound_names_are_turned_away(client):
    with (
        pytest.raises(WebSocketDisconnect),
        client.websocket_connect("/play", headers={"origin": "http://elsewhere.test"}),
    ):
        pass
    assert client.get("/", headers={"host": "rebound.test"}).status_code == 400
    with client.websocket_connect("/play", headers={"origin": "http://testserver"}) as socket:
        Browser(socket)


def test_the_page_is_served_with_a_strict_policy(client):
    for path in ("/", "/play.js", "/play.css"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert client.get("/health").json()["players"] == 0


def test_a_slow_reader_misses_frames_and_keeps_the_newest():
    async def scene() -> list:
        outbox = Outbox(lambda: None)
        for frame in range(50):
            outbox.put_frame(shown(frame=frame), 1.0)
        outbox.put_note({"type": "players"})
        return [await outbox.get() for _ in range(3)]

    note, *frames = asyncio.run(scene())
    assert json.loads(note) == {"type": "players"}
    assert [FRAME_HEADER.unpack_from(frame)[5] for frame in frames] == [48, 49]
    assert FRAME_HEADER.unpack_from(frames[0])[8] == 48  # how many it missed


def test_a_reader_of_nothing_is_given_up():
    async def scene() -> None:
        given_up = []
        outbox = Outbox(lambda: given_up.append(1))
        for _ in range(server.NOTES_WAITING):
            outbox.put_note({"type": "players"})
        assert not given_up
        for _ in range(1000):
            outbox.put_note({"type": "players"})
        assert given_up == [1]
        assert len(outbox._notes) == server.NOTES_WAITING

    asyncio.run(scene())


def test_a_reader_who_stands_still_stalls_nobody(client):
    with client.websocket_connect("/play") as slow, client.websocket_connect("/play") as quick:
        Browser(slow)  # and reads no more
        browser = Browser(quick)
        while browser.frame()[5] < 40:
            pass


def test_too_many_messages_are_too_many():
    budget = MessageBudget(0.0)
    for _ in range(240):
        budget.spend(0.0)
    with pytest.raises(MessageError, match="120 messages a second"):
        budget.spend(0.0)
    budget = MessageBudget(0.0)
    for tick in range(2000):
        budget.spend(tick / 100)


def test_only_loopback_is_private():
    assert [is_loopback(a) for a in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "10.0.0.1", "example.org")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


def test_places_of_lost_players_are_freed_in_time(client, host, monkeypatch):
    object.__setattr__(host.config, "keep_s", 0.0)
    with client.websocket_connect("/play") as socket:
        Browser(socket)
    for _ in range(200):
        if len(host._free) == 2:
            break
        time.sleep(0.02)
    assert sorted(host._free) == [0, 1]
    assert not host.players
