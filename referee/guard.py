"""What watches a process of the folder under test: sockets are refused, opened files and started programs written down.

`stage.py` writes this file's text into an empty folder as `sitecustomize.py`, with a call of `install_guard` below
it, and puts that folder on PYTHONPATH: Python imports it before anything of the submission runs. An audit hook cannot
be removed again. It sees what Python does; native code that opens a socket is stopped by the network namespace, where
one can be had.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

SOCKET_EVENTS = (
    "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname",
    "socket.gethostbyaddr",
)  # fmt: skip


def install_guard(report: str, packages: list[str], quiet: list[str]) -> None:
    """Write one JSON line per event to `report`.

    Opens of files under the prefixes `packages` and `quiet` are not worth one. An event's place is the innermost line
    of code outside of `packages`.
    """
    descriptor = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    libraries = ("<", *(prefix.rstrip("/") + "/" for prefix in packages))
    prefixes = (*libraries[1:], *(prefix.rstrip("/") + "/" for prefix in quiet))

    def say(**event: object) -> None:
        frame = sys._getframe()  # of the guard's own, or of no line at all where the interpreter itself opens a file
        while frame is not None and frame.f_code.co_filename.startswith(libraries):
            frame = frame.f_back
        if frame is not None:
            event["place"] = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        os.write(descriptor, (json.dumps(event) + "\n").encode())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, bytes):
                path = os.fsdecode(path)
            if not isinstance(path, str):
                return
            path = os.path.abspath(path)
            if not path.startswith(prefixes):
                writes = bool(flags & (os.O_WRONLY | os.O_RDWR)) if isinstance(flags, int) else "r" not in (mode or "r")
                say(event="open", path=path, write=writes)
        elif event in SOCKET_EVENTS:
            address = arguments[-1 if event in ("socket.connect", "socket.bind") else 0]
            family = getattr(arguments[0], "family", None)
            if family is not None and family.name == "AF_UNIX":
                return
            say(event="socket", what=event, address=str(address))
            raise PermissionError(f"{event} of {address}: the referee runs submissions without a network")
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            say(event="spawn", program=str(arguments[1] if event == "subprocess.Popen" else arguments[0])[:200])
        elif event == "ctypes.dlopen" and arguments[0]:
            library = os.path.abspath(str(arguments[0])) if "/" in str(arguments[0]) else ""
            if library and not library.startswith(prefixes):
                say(event="library", path=library)

    sys.addaudithook(hook)
