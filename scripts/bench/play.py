"""Load test of `python -m worldmodel play`: many players for minutes; speed, latency, memory, lost connections.

    python scripts/bench play --players 8 --seconds 300 --json play.json
    python scripts/bench play --players 1 --fps 60 --seconds 340      # 20,000 frames of one game: is memory flat?

Starts a server of its own on a free port. Every player holds another action each half second; latency is from sending
that to the arrival of the first frame that shows it, as the page measures it. Memory and CPU time are the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import websockets
from websockets.asyncio.client import connect

from common.files import write_atomically
from worldmodel.play.messages import FRAME_HEADER

ACTION_EVERY_S = 0.5
SAMPLE_EVERY_S = 5.0
START_TIMEOUT_S = 600.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass
class Record:
    """What one player saw."""

    frames: int = 0
    first: int = -1
    last: int = -1
    missed: int = 0
    lost: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    closed: str = ""


async def play(address: str, record: Record, until_s: float, seed: int, fps: float) -> None:
    """One player until the time is up; a lost connection is counted and taken up again."""
    rng, session, number = random.Random(seed), "", 0
    while time.monotonic() < until_s:
        try:
            async with connect(address, max_size=None, compression=None) as browser:
                await browser.send(json.dumps({"type": "hello", "session": session}))
                sent: dict[int, float] = {}
                next_s = time.monotonic() + rng.random()
                while (now := time.monotonic()) < until_s:
                    if now >= next_s:
                        number += 1
                        sent[number] = now
                        await browser.send(json.dumps({"type": "act", "action": rng.randrange(15), "number": number}))
                        next_s = now + ACTION_EVERY_S
                    try:
                        message = await asyncio.wait_for(browser.recv(), min(ACTION_EVERY_S, until_s - now + 0.01))
                    except TimeoutError:
                        continue
                    if isinstance(message, str):
                        note = json.loads(message)
                        if note["type"] == "welcome":
                            session = note["session"]
                            if fps:
                                settings = {"temperature": note["temperature"], "decode_steps": note["decode_steps"]}
                                await browser.send(json.dumps({"type": "settings", **settings, "fps": fps}))
                        continue
                    header = FRAME_HEADER.unpack_from(message)
                    record.frames += 1
                    record.first = header[5] if record.first < 0 else record.first
                    record.last, record.missed = header[5], header[8]
                    if header[7] in sent:
                        record.latencies_ms.append((time.monotonic() - sent[header[7]]) * 1e3)
                        sent = {n: s for n, s in sent.items() if n > header[7]}
        except (OSError, websockets.WebSocketException) as error:
            record.lost += 1
            record.closed = str(error)
            await asyncio.sleep(0.25)


def server_usage(pid: int) -> tuple[float, float]:
    """(resident MB, CPU seconds) of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    resident_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return resident_kb / 1e3, (int(fields[11]) + int(fields[12])) / TICKS_PER_S


async def measure(arguments: argparse.Namespace, port: int, pid: int) -> dict:
    """Play and watch."""
    until_s = time.monotonic() + arguments.seconds
    records = [Record() for _ in range(arguments.players)]
    address = f"ws://127.0.0.1:{port}/play"
    games = [
        asyncio.create_task(play(address, record, until_s, seed, arguments.fps)) for seed, record in enumerate(records)
    ]
    memory_mb: list[tuple[float, float]] = []
    _, cpu_before_s = server_usage(pid)
    began_s = time.monotonic()
    while not all(game.done() for game in games):
        memory_mb.append((round(time.monotonic() - began_s, 1), round(server_usage(pid)[0], 1)))
        await asyncio.wait(games, timeout=SAMPLE_EVERY_S)
    await asyncio.gather(*games)
    cpu_s = server_usage(pid)[1] - cpu_before_s
    frames = sum(record.frames for record in records)
    rates = [record.frames / arguments.seconds for record in records]
    latencies_ms = sorted(value for record in records for value in record.latencies_ms)
    settled = [mb for at, mb in memory_mb if at > 0.25 * arguments.seconds] or [mb for _, mb in memory_mb]
    quarter = max(1, len(settled) // 4)
    return {
        "players": arguments.players,
        "seconds": arguments.seconds,
        "frames": frames,
        "frames_per_s_each": {"least": round(min(rates), 2), "most": round(max(rates), 2)},
        "latency_ms": {
            name: round(latencies_ms[min(len(latencies_ms) - 1, int(len(latencies_ms) * share))], 1)
            for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
        } if latencies_ms else None,
        "latencies": len(latencies_ms),
        "connections_lost": sum(record.lost for record in records),
        "why_lost": sorted({record.closed for record in records if record.closed}),
        "frames_missed": sum(record.missed for record in records),
        "longest_game_frames": max(record.last - record.first for record in records),
        "server_cpu_ms_per_frame": round(1e3 * cpu_s / max(frames, 1), 2),
        "memory_mb": {
            "after_quarter": round(sum(settled[:quarter]) / quarter, 1),
            "at_end": round(sum(settled[-quarter:]) / quarter, 1),
            "samples": memory_mb[:: max(1, len(memory_mb) // 40)],
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
    }  # fmt: skip


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when the server did not start or a connection was lost."""
    parser = argparse.ArgumentParser(
        "python scripts/bench play", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--players", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--fps", type=float, default=0.0, help="frames/s asked for; 0: the server's")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("rest", nargs="*", help="passed to `python -m worldmodel play` (after --)")
    arguments = parser.parse_args(argv)
    port = free_port()
    command = [sys.executable, "-m", "worldmodel", "play", "--port", str(port), "--max-players",
               str(arguments.players), *arguments.rest]  # fmt: skip
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the server must end with us
    with tempfile.TemporaryFile("w+") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)
        try:
            began_s = time.monotonic()
            while True:
                if server.poll() is not None or time.monotonic() - began_s > START_TIMEOUT_S:
                    output.seek(0)
                    print(f"the server did not start:\n{output.read()}", file=sys.stderr)
                    return 1
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    break
                except OSError:
                    time.sleep(0.5)
            start_s = time.monotonic() - began_s
            result = asyncio.run(measure(arguments, port, server.pid))
            result["start_s"] = round(start_s, 1)
        finally:
            server.terminate()
            server.wait(timeout=30)
    print(json.dumps(result, indent=1))
    if arguments.json:
        write_atomically(arguments.json, (json.dumps(result, indent=1) + "\n").encode())
    return 1 if result["connections_lost"] else 0
