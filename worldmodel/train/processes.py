"""Several JAX processes as one run: they join, decide alike, stop at the same step, and leave when one is lost.

Process 0 decides and writes what belongs to the run as a whole; the others follow (`agreed`). Whoever fails leaves at
once, without a word to the others: for them it is lost, as if it had been killed, and they leave too. Nothing waits for
a process that may be gone; the newest checkpoint is where the same command goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from common import errors
from common.errors import ConfigError, GolfError, TrainingError

HEARTBEAT_TIMEOUT_S = 30  # a process that says nothing for so long is lost
LEAVE_LIMIT_S = 60.0  # what the launcher gives the others when one has failed
BAD_INPUT_STATUS = 2
BROADCAST_BYTES = 1 << 16  # texts are padded to a multiple: one compiled program serves all
COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# By launcher: number and index of processes, and from what JAX itself finds the coordinator (Open MPI 5 has no such).
LAUNCHERS = (
    (COUNT, INDEX, COORDINATOR),
    ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri"),
)
# What gloo, NCCL and JAX's coordination service say of a process that is gone; they have no class of error for it.
LOSS = re.compile(
    r"Gloo \S+ failed|gloo/transport|NCCL|coordination service|heartbeat timeout|Barrier (failed|timed out)"
    r"|waiting for \S+ barrier|Socket closed",
    re.IGNORECASE,
)


def _whole_number(environ: Mapping[str, str], name: str, lowest: int, below: float, fix: str) -> int:
    text = environ[name].strip()
    if not text.isdecimal() or not lowest <= int(text) < below:
        raise ConfigError(f"{name}={text!r}: expected a whole number from {lowest}, {fix}")
    return int(text)


def members(environ: Mapping[str, str]) -> tuple[str | None, int, int] | None:
    """The run's processes as the environment names them.

    `jax.distributed.initialize` reads the coordinator's address itself, and everything else only from a cluster that it
    knows; number and index without a cluster are read here.

    Args:
        environ: environment variables.

    Returns:
        Coordinator ("host:port", None where JAX finds it), number of processes and index of this one; None for one.

    Raises:
        ConfigError: a variable is missing or malformed; it names variable, value and fix.
    """
    address = environ.get(COORDINATOR)
    launcher = next((names for names in LAUNCHERS if {*names[:2]} & environ.keys()), None)
    if launcher is None:
        if address is None:
            return None
        raise ConfigError(f"{COORDINATOR}={address!r} is set: set {COUNT} and {INDEX} too, or none for one process")
    names = launcher[:2]
    if missing := [name for name in names if name not in environ]:
        if launcher != LAUNCHERS[0]:
            return None  # inside an allocation, not started by its launcher
        there = next(name for name in names if name in environ)
        raise ConfigError(f"{there}={environ[there]!r} is set: set {missing[0]} too, or none for one process")
    count = _whole_number(environ, names[0], 1, float("inf"), "the number of processes")
    index = _whole_number(environ, names[1], 0, count, f"less than {names[0]}={count}")
    if count == 1:
        return None
    if address is None:
        if launcher[2] in environ:
            return None, count, index
        if launcher[0].startswith("SLURM"):
            return None  # a script of the allocation, not started by srun
        raise ConfigError(f"{names[0]}={count}: set {COORDINATOR} too, to host:port of process 0, the same in all")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"{COORDINATOR}={address!r}: expected host:port of process 0, such as 10.0.0.1:8476")
    return address, count, index


def lost(index: int, count: int, reason: str) -> TrainingError:
    """The error of a process whose peer is gone."""
    return TrainingError(
        f"process {index} of {count}: another process of the run was lost ({reason}); start the same command in all "
        "processes again, it goes on from the newest checkpoint"
    )


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of dying; a second SIGINT interrupts at once.

    Inside another one, the list begins with what that has collected.
    """
    caught: list[int] = [*getattr(signal.getsignal(signal.SIGTERM), "caught", ())]

    def handler(number: int, _frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    handler.caught = caught
    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _name_aborts(error: TrainingError) -> Any:
    """Make the abort of JAX's coordination client a named error with status 2; the returned handler must be kept.

    The client ends its process by `abort()` when the service says that a process has missed its heartbeats, or when the
    service went with process 0. JAX 0.10.2 offers no other way: `missed_heartbeat_callback` is not an option of
    `jax.distributed.initialize`, and given to the client behind it a Python function raises std::bad_cast;
    `jax_enable_recoverability` spares the others, but they then wait for the lost one without end.
    """
    line = f"{type(error).__name__}: {error}\n".encode()

    def handler(_number: int) -> None:
        os.write(2, line)
        os._exit(BAD_INPUT_STATUS)

    handler_c = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler_c)
    return handler_c


def _require_free_port(address: str) -> None:
    """Raise ConfigError unless this process, the first, can listen at the address: JAX 0.10.2 crashes if it cannot."""
    place = ("", int(address.rpartition(":")[2]))
    try:
        if socket.has_dualstack_ipv6():
            socket.create_server(place, family=socket.AF_INET6, dualstack_ipv6=True).close()
        else:
            socket.create_server(place).close()
    except OSError as error:
        raise ConfigError(
            f"{COORDINATOR}={address!r}: process 0 cannot listen at that port ({error.strerror}); name a free one"
        ) from error


@contextlib.contextmanager
def joined(environ: Mapping[str, str]) -> Iterator[bool]:
    """Around a run: join the processes that the environment names, if it names any; do so before JAX is used.

    An error inside ends the process here, with its message in one line and status 2: JAX's own end would first wait for
    the others, which wait for this one.

    Args:
        environ: environment variables.

    Yields:
        Whether this process speaks for the run (it is the only one, or process 0).

    Raises:
        ConfigError: the environment names processes that cannot be; and everything that is raised inside, if there is
            but one process.
    """
    named = members(environ)
    if named is None:
        yield True
        return
    address, count, index = named
    if address is not None and index == 0:
        _require_free_port(address)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
    alone = TrainingError(
        f"process {index} of {count}: not all met at {address or 'the address that JAX found'} in five minutes; start "
        "all processes, and name process 0's machine and a free port of it"
    )
    try:
        with stop_signals():  # one that comes while they meet is heeded as soon as they have met
            handlers = [_name_aborts(alone)]
            jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S)
            handlers.append(_name_aborts(lost(index, count, "JAX ended this one, its own messages are above")))
            yield index == 0
            jax.distributed.shutdown()
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is told and the process ends
        _leave(error, index, count)
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    handlers.clear()


def loss_of(error: BaseException) -> str:
    """What an error, or one that it came of, says of a process that is gone; empty if it came of something else."""
    at: BaseException | None = error
    while at is not None:
        if LOSS.search(str(at)):
            return str(at).splitlines()[0][:200]
        at = at.__cause__ or at.__context__
    return ""


def _leave(error: BaseException, index: int, count: int) -> NoReturn:
    """Say why and end at once: the others notice when the connections close."""
    status = BAD_INPUT_STATUS
    if reason := loss_of(error):
        error = lost(index, count, reason)
    if isinstance(error, GolfError):
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
        status = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def agreed(decide: Callable[[], Any]) -> Any:
    """What process 0 decides, in every process.

    Args:
        decide: called in process 0 only; its result can be written as JSON.

    Returns:
        The result.

    Raises:
        GolfError: the one that process 0 met, in every process.
    """
    if jax.process_count() == 1:
        return decide()
    answer = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": decide()}
        except GolfError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
    text = json.dumps(answer).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(-(-size // BROADCAST_BYTES) * BROADCAST_BYTES, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    answer = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size]))
    if "error" in answer:
        meet("an error that all have")
        raise getattr(errors, answer["error"])(answer["message"])
    return answer["value"]


def meet(what: str) -> None:
    """Wait for the others before leaving with an error that all of them have, so that each can tell of it."""
    if jax.process_count() > 1:
        with contextlib.suppress(Exception):  # one has left already: the error that all have is the one to tell
            multihost_utils.sync_global_devices(what)


class Stop:
    """Whether to stop, asked once a step; every process gets the same answer behind the same step.

    A single process answers at once. Of several each sends a number with its batch, the compiled step returns the
    greatest, and that is read one step later, when it is there: nothing waits.
    """

    def __init__(self, caught: Sequence[int], mesh: Mesh) -> None:
        """Args:
        caught: stop signals that this process has got; it grows.
        mesh: devices of the run.
        """
        self._caught, self._devices = caught, len(mesh.local_devices)
        self._before: Array | None = None

    def at_start(self) -> bool:
        """The answer before the first step, which would have to be compiled."""
        if jax.process_count() == 1:
            return bool(self._caught)
        return bool(np.asarray(multihost_utils.process_allgather(np.int32(bool(self._caught)))).any())

    def flags(self) -> dict[str, np.ndarray]:
        """What goes with the next batch: int32 (local devices,), or nothing."""
        if jax.process_count() == 1:
            return {}
        return {"stop_D": np.full(self._devices, bool(self._caught), np.int32)}

    def asked(self, greatest: Array | None) -> bool:
        """The answer behind a step, given what the step returned (nothing in a single process)."""
        if greatest is None:
            return bool(self._caught)
        before, self._before = self._before, greatest
        return before is not None and bool(before)


def launch(command: Sequence[str], count: int) -> int:
    """Run a command as several processes of this machine, with one GPU each where there are GPUs.

    Stop signals are passed on to all. When one fails, the others get a minute to leave.

    Args:
        command: of one process.
        count: how many.

    Returns:
        The worst exit status: 0, or the greatest, 128 + the signal for a process that a signal ended.

    Raises:
        ConfigError: fewer than one.
    """
    if count < 1:
        raise ConfigError(f"--processes {count}: expected at least 1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _frame: Any) -> None:
        for child in children:
            child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    until_s = float("inf")
    try:
        for index in range(count):
            own = {COORDINATOR: address, COUNT: str(count), INDEX: str(index)}
            environ = {"JAX_LOCAL_DEVICE_IDS": str(index), **os.environ, **own}
            # A group of its own: Ctrl-C reaches it once, from here.
            children.append(subprocess.Popen(command, env=environ, process_group=0))
        while None in (codes := [child.poll() for child in children]):
            if any(codes):
                until_s = min(until_s, time.monotonic() + LEAVE_LIMIT_S)
            if time.monotonic() > until_s:
                forward(signal.SIGKILL, None)
            time.sleep(0.05)
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
        forward(signal.SIGKILL, None)  # of those that still run: only if something failed here
    return max(code if code >= 0 else 128 - code for code in (child.wait() for child in children))
