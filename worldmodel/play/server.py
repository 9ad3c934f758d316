"""The page and its WebSocket: players come and go, one thread steps all their games together.

Three parties share the work. The event loop talks; the model's thread alone touches games, pool and procgen; a third
thread makes recordings. A player's pictures wait in an outbox of two: who reads slowly misses frames and holds nobody
up.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from common.errors import ConfigError
from worldmodel.play.clips import ActionTable, StartClip
from worldmodel.play.messages import (
    MAX_FPS,
    MAX_MESSAGE_BYTES,
    Hello,
    Message,
    MessageError,
    Record,
    Settings,
    Shown,
    pack_frame,
    parse_message,
)
from worldmodel.play.pool import DreamPool
from worldmodel.play.real import RealSource
from worldmodel.play.session import Limits, NotNow, Session
from worldmodel.rollout.render import gif_bytes, mp4_bytes

FRAMES_WAITING = 2
NOTES_WAITING = 64
HELLO_TIMEOUT_S, CLOSE_TIMEOUT_S = 10.0, 2.0
MESSAGES_PER_S, MESSAGE_BURST = 120.0, 240.0
# WebSocket close codes (RFC 6455, section 7.4.1; 1013 of its registry). 4001 is ours.
CLOSE_BAD_MESSAGE, CLOSE_FULL, CLOSE_ELSEWHERE = 1008, 1013, 4001
MAX_REASON_BYTES = 123
MP4_SCALE, GIF_SCALE = 4, 2
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
PAGE_FILES = {"/": ("index.html", "text/html"), "/play.js": ("play.js", "text/javascript"),
              "/play.css": ("play.css", "text/css")}  # fmt: skip


class Outbox:
    """What waits for one connection: a few notes in order, and the newest pictures only."""

    def __init__(self, on_overflow: Callable[[], None]) -> None:
        """Args:
            on_overflow: told when too many notes wait: the connection does not read and is to be ended.
        """
        self.dropped = 0
        self.overflown = False
        self._on_overflow = on_overflow
        self._notes: deque[str] = deque()
        self._frames: deque[tuple[Shown, float]] = deque()
        self._filled = asyncio.Event()

    def put_note(self, note: dict[str, Any]) -> None:
        """A message that must not get lost; a connection that lets too many pile up is given up."""
        if len(self._notes) < NOTES_WAITING:
            self._notes.append(json.dumps(note))
            self._filled.set()
        elif not self.overflown:
            self.overflown = True
            self._on_overflow()

    def put_frame(self, shown: Shown, step_ms: float) -> None:
        """A picture; the oldest waiting one gives way."""
        if len(self._frames) >= FRAMES_WAITING:
            self._frames.popleft()
            self.dropped += 1
        self._frames.append((shown, step_ms))
        self._filled.set()

    async def get(self) -> str | bytes:
        """The next message to send; notes first."""
        while not self._notes and not self._frames:
            self._filled.clear()
            await self._filled.wait()
        if self._notes:
            return self._notes.popleft()
        shown, step_ms = self._frames.popleft()
        return pack_frame(shown, dropped=self.dropped, step_ms=step_ms)


@dataclass
class Player:
    """A place at the table: a game, and the connection that plays it now."""

    name: str
    session: Session
    outbox: Outbox | None = None
    leave: Callable[[], None] | None = None
    """Ends the connection that has the place now."""
    next_due_s: float = 0.0
    detached_s: float = 0.0
    saving: bool = False


@dataclass(frozen=True)
class HostConfig:
    """What the server allows."""

    max_players: int = 8
    keep_s: float = 60.0
    """How long a place is kept for a lost connection."""
    settings: Settings = field(default_factory=lambda: Settings(0.0, 2, 15.0))
    limits: Limits = field(default_factory=Limits)
    fps: float = 15.0
    """Of recordings."""


class GameHost:
    """All games of one server."""

    def __init__(
        self, pool: DreamPool, clips: list[StartClip], table: ActionTable, real: RealSource, config: HostConfig,
        warn_bits: float,
    ) -> None:  # fmt: skip
        """Args:
            pool: dreams, at least `config.max_players` slots.
            clips: where games begin.
            table: the controls.
            real: the real game, or why there is none.
            config: limits.
            warn_bits: see `calibrate`.
        """
        self.pool, self.clips, self.table, self.real = pool, clips, table, real
        self.config, self.warn_bits = config, warn_bits
        self.players: dict[str, Player] = {}
        self.steps = 0
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._makers = ThreadPoolExecutor(1, thread_name_prefix="recordings")
        self._recordings: dict[str, tuple[str, str, bytes]] = {}  # address -> (player, format, file)
        self._free = list(range(config.max_players))
        self._wake = asyncio.Event()
        self._jobs: set[asyncio.Task[None]] = set()

    async def on_model(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run something on the model's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._model, work, *arguments)

    # ------------------------------------------------------------------------------------------------------- stepping

    async def run(self) -> None:
        """Step every game that is due, oldest due first, all due ones in one batch; forever."""
        loop = asyncio.get_running_loop()
        while True:
            now_s = loop.time()
            await self._forget_lost(now_s)
            playing = [p for p in self.players.values() if p.outbox is not None and p.session.due]
            due = sorted((p for p in playing if p.next_due_s <= now_s), key=lambda p: p.next_due_s)
            if due:
                began_s = loop.time()
                advanced = await self.on_model(self._advance, [p.session for p in due])
                step_ms = (loop.time() - began_s) * 1e3
                self.steps += len(advanced)
                for player in due:
                    # Due times lie on a common grid, so that players of one speed are stepped together.
                    interval_s = 1.0 / player.session.settings.fps
                    player.next_due_s = (math.floor(now_s / interval_s) + 1) * interval_s
                    if player.outbox is not None and player.session.slot in advanced:
                        player.outbox.put_frame(player.session.shown, step_ms)
                    if player.session.recording_full:
                        await self._end_recording(player, "the recording is full")
                continue
            wait_s = min([p.next_due_s - now_s for p in playing], default=1.0)
            self._wake.clear()
            try:
                async with asyncio.timeout(min(max(wait_s, 0.0), 1.0)):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _advance(self, sessions: list[Session]) -> set[int]:
        """On the model's thread; the slots that were stepped (a pause may have come between)."""
        sessions = [session for session in sessions if session.due]
        requests = [session.request() for session in sessions]
        for session, result in zip(sessions, self.pool.step(requests) if requests else [], strict=True):
            session.finish(result)
        return {session.slot for session in sessions}

    async def compile_batches(self) -> None:
        """Compile the larger batches while the first players already play in smaller ones."""
        with ThreadPoolExecutor(1, thread_name_prefix="compiler") as compiler:
            for size in self.pool.batch_sizes:
                if size > 1:
                    await asyncio.get_running_loop().run_in_executor(compiler, self.pool.compile_step, size)

    async def _forget_lost(self, now_s: float) -> None:
        for player in list(self.players.values()):
            if player.outbox is None and now_s - player.detached_s > self.config.keep_s:
                await self._remove(player)

    async def _remove(self, player: Player) -> None:
        if self.players.pop(player.name, None) is None:
            return
        for address in [a for a, (owner, _, _) in self._recordings.items() if owner == player.name]:
            del self._recordings[address]
        await self.on_model(player.session.close)
        self._free.append(player.session.slot)

    # ---------------------------------------------------------------------------------------------------- connections

    async def join(self, hello: Hello, outbox: Outbox, leave: Callable[[], None]) -> Player | None:
        """Give a connection its old place or a free one; None when all are taken."""
        player = self.players.get(hello.session)
        if player is None:
            if not self._free:
                lost = [p for p in self.players.values() if p.outbox is None]
                if not lost:
                    return None
                await self._remove(min(lost, key=lambda p: p.detached_s))
            slot = self._free.pop()
            try:
                session = await self.on_model(self._new_session, slot)
            except BaseException:
                self._free.append(slot)
                raise
            player = Player(secrets.token_urlsafe(18), session)
            self.players[player.name] = player
        elif player.leave is not None:
            player.leave()
        player.outbox, player.leave = outbox, leave
        outbox.put_note(self._welcome(player))
        outbox.put_frame(player.session.shown, 0.0)
        self._tell_count()
        self._wake.set()
        return player

    def leave(self, player: Player, outbox: Outbox) -> None:
        """A connection is gone; its place is kept for a while."""
        if player.outbox is outbox:
            player.outbox = player.leave = None
            player.detached_s = asyncio.get_running_loop().time()
            self._tell_count()

    def _new_session(self, slot: int) -> Session:
        return Session(
            self.pool, slot, self.clips, self.table, self.real, settings=self.config.settings,
            limits=self.config.limits, warn_bits=self.warn_bits, seed=secrets.randbits(31),
        )  # fmt: skip

    def _tell_count(self) -> None:
        present = [p for p in self.players.values() if p.outbox is not None]
        for player in present:
            assert player.outbox is not None
            player.outbox.put_note({"type": "players", "now": len(present), "most": self.config.max_players})

    def _welcome(self, player: Player) -> dict[str, Any]:
        return {
            "type": "welcome",
            "session": player.name,
            "world": self.pool.world.source,
            "latent": self.pool.world.latent,
            "actions": self.table.names,
            "game_actions": self.table.game_names,
            "clips": [clip.name for clip in self.clips],
            "tokens": self.pool.tokens,
            "warn_bits": self.warn_bits,
            "most_bits": math.log2(self.pool.num_codes),
            "max_fps": MAX_FPS,
            "record_frames": self.config.limits.record_frames,
            **self._state(player.session),
        }

    def _state(self, session: Session) -> dict[str, Any]:
        return {
            "clip": session.clip,
            "paused": session.paused,
            "pilot": session.pilot,
            "pilots": session.pilots,
            "real_off": session.real_reason,
            "temperature": session.settings.temperature,
            "decode_steps": session.settings.decode_steps,
            "fps": session.settings.fps,
        }

    async def handle(self, player: Player, message: Message) -> None:
        """Do what a player's message asks, and answer.

        Raises:
            MessageError: the connection is to be closed with this reason.
        """
        if isinstance(message, Record) and not message.on:
            await self._end_recording(player, "")
            return
        try:
            changed = await self.on_model(player.session.handle, message)
        except NotNow as error:
            if player.outbox is not None:
                player.outbox.put_note({"type": "notice", "text": str(error)})
            return
        if player.outbox is not None:
            if changed:
                player.outbox.put_frame(player.session.shown, 0.0)
            if type(message).__name__ not in ("Act", "GameAct"):
                player.outbox.put_note({"type": "state", **self._state(player.session)})
        self._wake.set()

    # ----------------------------------------------------------------------------------------------------- recordings

    async def _end_recording(self, player: Player, why: str) -> None:
        taken = await self.on_model(player.session.take_recording)
        if player.outbox is not None:
            player.outbox.put_frame(player.session.shown, 0.0)
        if taken is None or player.saving:
            self._note(player, {"type": "notice", "text": "nothing was recorded" if taken is None else "still saving"})
            return
        player.saving = True
        pictures, form = taken
        job = asyncio.create_task(self._save(player, pictures, form, why))
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

    async def _save(self, player: Player, pictures: list[np.ndarray], form: str, why: str) -> None:
        work = asyncio.get_running_loop().run_in_executor(self._makers, film_bytes, pictures, form, self.config.fps)
        try:
            content = await work
        finally:
            player.saving = False
        for address in [a for a, (owner, _, _) in self._recordings.items() if owner == player.name]:
            del self._recordings[address]  # one recording a player is kept
        address = f"/recording/{secrets.token_urlsafe(18)}.{form}"
        self._recordings[address] = (player.name, form, content)
        note = {"type": "recording", "url": address, "frames": len(pictures), "bytes": len(content), "why": why}
        self._note(player, note)

    def _note(self, player: Player, note: dict[str, Any]) -> None:
        if player.outbox is not None:
            player.outbox.put_note(note)

    def recording(self, address: str) -> tuple[str, bytes] | None:
        """(format, file) of a finished recording."""
        found = self._recordings.get(address)
        return None if found is None else found[1:]

    async def close(self) -> None:
        """Release games and threads."""
        for player in list(self.players.values()):
            await self._remove(player)
        self._makers.shutdown(wait=True, cancel_futures=True)
        self._model.shutdown(wait=True)


def film_bytes(pictures: list[np.ndarray], form: str, fps: float) -> bytes:
    """A recording as a file. Pictures of another size than the first (the real game came or went) are fitted to it.

    Args:
        pictures: uint8 (H, W, 3) each.
        form: mp4 or gif.
        fps: frames a second.
    """
    height, width = pictures[0].shape[:2]
    width = max(picture.shape[1] for picture in pictures)
    film_THWC = np.zeros((len(pictures), height, width, 3), np.uint8)
    for place, picture in enumerate(pictures):
        film_THWC[place, :, : picture.shape[1]] = picture
    if form == "mp4":
        return mp4_bytes(film_THWC, fps=fps, scale=MP4_SCALE)
    return gif_bytes(film_THWC.repeat(GIF_SCALE, axis=1).repeat(GIF_SCALE, axis=2), fps=fps)


class MessageBudget:
    """A token bucket: how many messages a connection may send."""

    def __init__(self, now_s: float) -> None:
        self._left, self._at_s = MESSAGE_BURST, now_s

    def spend(self, now_s: float) -> None:
        """Count one message.

        Raises:
            MessageError: too many of them.
        """
        self._left = min(MESSAGE_BURST, self._left + (now_s - self._at_s) * MESSAGES_PER_S) - 1.0
        self._at_s = now_s
        if self._left < 0.0:
            raise MessageError(f"more than {MESSAGES_PER_S:.0f} messages a second")


def same_origin(websocket: WebSocket) -> bool:
    """Whether a browser's connection comes from our own page (programs other than browsers send no Origin)."""
    origin = websocket.headers.get("origin")
    return origin is None or origin.partition("://")[2] == websocket.headers.get("host", "")


async def serve_connection(host: GameHost, websocket: WebSocket) -> None:
    """One browser, from hello to goodbye. A bad message ends this connection only."""
    if not same_origin(websocket):
        await websocket.close(CLOSE_BAD_MESSAGE)
        return
    await websocket.accept()
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    outbox, player = Outbox(ended.set), None
    tasks: list[asyncio.Task[Any]] = []
    code, reason = 1000, ""

    async def receive() -> Message:
        event = await websocket.receive()
        if event["type"] != "websocket.receive":
            raise WebSocketDisconnect(event.get("code", 1006))
        return parse_message(event.get("text"))

    async def listen(player: Player) -> None:
        budget = MessageBudget(loop.time())
        while True:
            message = await receive()
            budget.spend(loop.time())
            await host.handle(player, message)

    async def send() -> None:
        while True:
            message = await outbox.get()
            if isinstance(message, str):
                await websocket.send_text(message)
            else:
                await websocket.send_bytes(message)

    async def replaced() -> None:
        await ended.wait()

    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            hello = await receive()
        if not isinstance(hello, Hello):
            raise MessageError('the first message must be {"type": "hello"}')
        player = await host.join(hello, outbox, ended.set)
        if player is None:
            code, reason = CLOSE_FULL, f"all {host.config.max_players} places are taken; try again later"
            return
        tasks = [asyncio.create_task(work) for work in (listen(player), send(), replaced())]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if outbox.overflown:
            code, reason = CLOSE_BAD_MESSAGE, f"{NOTES_WAITING} messages wait unread; the connection is too slow"
        elif ended.is_set():
            code, reason = CLOSE_ELSEWHERE, "this game is played in another window now"
        for task in done:
            await task
    except MessageError as error:
        code, reason = CLOSE_BAD_MESSAGE, str(error)
    except TimeoutError:
        code, reason = CLOSE_BAD_MESSAGE, f"no hello within {HELLO_TIMEOUT_S:.0f} s"
    except WebSocketDisconnect:
        code = 0
    finally:
        if player is not None:
            host.leave(player, outbox)  # first: what is awaited below may be cut short
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for task in tasks:  # two may have failed at once; the first one's error is the one that counts
            if not task.cancelled():
                task.exception()
        if code:
            await _close(websocket, code, reason)


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    shortened = reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):  # who does not read, does not read this either
            if reason:
                await websocket.send_text(json.dumps({"type": "error", "text": reason}))
            await websocket.close(code, shortened)
    except (WebSocketDisconnect, TimeoutError):
        return  # the other side was faster, or is gone
    except RuntimeError as error:
        if "close" not in str(error).lower():  # Starlette's word for a connection that has ended already
            raise


def make_app(host: GameHost, allowed_hosts: list[str], on_fault: Callable[[BaseException], None]) -> Starlette:
    """The web application.

    Args:
        host: the games.
        allowed_hosts: Host headers that are answered; others are a rebound name of some other site.
        on_fault: told when the games have stopped by a fault, so that no server goes on showing still pictures.
    """
    page = {path: (files("worldmodel.play") / "page" / name).read_bytes() for path, (name, _) in PAGE_FILES.items()}

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (fault := task.exception()) is not None:
                on_fault(fault)

        tasks = [asyncio.create_task(host.run()), asyncio.create_task(host.compile_batches())]
        for task in tasks:
            task.add_done_callback(ended)
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await host.close()

    async def get_page(request: Request) -> Response:
        _, kind = PAGE_FILES[request.url.path]
        return Response(page[request.url.path], media_type=kind, headers=HEADERS)

    async def get_recording(request: Request) -> Response:
        found = host.recording(request.url.path)
        if found is None:
            return PlainTextResponse("no such recording; it was replaced by a newer one or its player left", 404)
        form, content = found
        name = f'attachment; filename="dream.{form}"'
        kind = {"mp4": "video/mp4", "gif": "image/gif"}[form]
        return Response(content, media_type=kind, headers={**HEADERS, "Content-Disposition": name})

    async def get_health(request: Request) -> Response:
        present = sum(p.outbox is not None for p in host.players.values())
        return Response(json.dumps({"players": present, "frames": host.steps}), media_type="application/json",
                        headers=HEADERS)  # fmt: skip

    async def play(websocket: WebSocket) -> None:
        await serve_connection(host, websocket)

    routes = [Route(path, get_page) for path in PAGE_FILES]
    routes += [Route("/recording/{name}", get_recording), Route("/health", get_health), WebSocketRoute("/play", play)]
    return Starlette(
        routes=routes, lifespan=lifespan, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts)]
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(host: GameHost, address: str, port: int) -> None:
    """Serve until interrupted.

    Args:
        host: the games.
        address: to listen at; only a loopback address stays on this machine.
        port: TCP port.

    Raises:
        ConfigError: the port cannot be listened at.
    """
    if not 0 < port < 1 << 16:
        raise ConfigError(f"port {port}: expected 1..65535")
    local = is_loopback(address)
    hosts = ["127.0.0.1", "localhost", "[::1]", "::1"] if local else ["*"]
    faults: list[BaseException] = []

    def on_fault(fault: BaseException) -> None:
        faults.append(fault)
        server.should_exit = True

    config = uvicorn.Config(
        make_app(host, hosts, on_fault), host=address, port=port, log_level="warning", access_log=False, lifespan="on",
        ws="websockets-sansio", ws_max_size=MAX_MESSAGE_BYTES * 4, ws_per_message_deflate=not local,
        ws_ping_interval=20.0, ws_ping_timeout=20.0, timeout_graceful_shutdown=3,
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.run()
    if faults:
        raise faults[0]
    if not server.started:
        raise ConfigError(f"cannot listen at {address}:{port}; choose another --port or --host")

