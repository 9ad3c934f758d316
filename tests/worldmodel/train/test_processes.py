"""Several processes as one run: who joins, equal results, one stop for all, other numbers, lost peers, errors.

The processes are real and meet over gloo; `scripts/fault_runs.py` forks them from a server that has imported JAX.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest

from common.errors import ConfigError, StorageError
from scripts.fault_runs import ROOT, Attempt, Ended, Learner
from worldmodel.cli import BAD_INPUT_STATUS, main
from worldmodel.config import MeshConfig
from worldmodel.train.processes import Stop, agreed, joined, launch, loss_of, members, stop_signals
from worldmodel.train.state import make_mesh

STEPS = 24
LIMIT_S = 600.0  # of a run that is left alone, on a machine that does much else
NOTICE_S = 60.0


# ---------------------------------------------------------------- alone


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}, ("a:1", 3, 2)),
        ({"JAX_COORDINATOR_ADDRESS": "[::1]:80", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, ("[::1]:80", 2, 0)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-2]"}, (None, 4, 1)),
        ({"SLURM_NTASKS": "4"}, None),  # inside an allocation, not started by srun
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # its script
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "JAX_COORDINATOR_ADDRESS": "b:2"}, ("b:2", 2, 1)),
    ],
)
def test_who_belongs_to_a_run_is_read_from_the_environment(environ, expected) -> None:
    assert members(environ) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, r"JAX_NUM_PROCESSES='two': expected a whole number from 1"),
        ({"JAX_NUM_PROCESSES": "0"}, r"JAX_NUM_PROCESSES='0': expected a whole number from 1"),
        ({"JAX_PROCESS_ID": "2"}, r"JAX_PROCESS_ID='2': .* less than JAX_NUM_PROCESSES=2"),
        ({"JAX_PROCESS_ID": "-1"}, r"JAX_PROCESS_ID='-1': expected a whole number from 0"),
        ({"JAX_PROCESS_ID": None}, r"JAX_NUM_PROCESSES='2' is set: set JAX_PROCESS_ID too"),
        ({"JAX_NUM_PROCESSES": None, "JAX_PROCESS_ID": None}, r"JAX_COORDINATOR_ADDRESS='a:1' is set: set"),
        (
            {"JAX_COORDINATOR_ADDRESS": None},
            r"JAX_NUM_PROCESSES=2: set JAX_COORDINATOR_ADDRESS too",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": None, "JAX_NUM_PROCESSES": None, "JAX_PROCESS_ID": None}
            | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
            r"OMPI_COMM_WORLD_SIZE=2: set JAX_COORDINATOR_ADDRESS too",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "a"}, r"JAX_COORDINATOR_ADDRESS='a': expected host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "a:70000"}, r"JAX_COORDINATOR_ADDRESS='a:70000': expected host:port"),
    ],
)
def test_an_environment_that_cannot_be_names_variable_value_and_fix(changes, message) -> None:
    environ = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0", **changes}
    with pytest.raises(ConfigError, match=message):
        members({name: value for name, value in environ.items() if value is not None})


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        environ = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
        with pytest.raises(ConfigError, match=f"'{address}': process 0 cannot listen at that port"), joined(environ):
            pass


def test_a_single_process_decides_and_stops_at_once() -> None:
    caught: list[int] = []
    stop = Stop(caught, make_mesh(MeshConfig()))
    assert agreed(lambda: [1]) == [1]
    assert not stop.at_start()
    assert (stop.flags(), stop.asked(None)) == ({}, False)
    caught.append(15)
    assert (stop.flags(), stop.asked(None)) == ({}, True)
    assert stop.at_start()


def test_a_signal_of_before_counts_inside() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals():
        signal.raise_signal(signal.SIGTERM)
        with stop_signals() as caught:
            assert caught == [signal.SIGTERM]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_several_return_is_read_one_step_later() -> None:
    stop = Stop([], make_mesh(MeshConfig()))
    assert [stop.asked(jnp.int32(value)) for value in (0, 1, 0)] == [False, False, True]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read error", True),
        ("INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout.", True),
        ("Timed out while waiting for async_commit_complete barrier.", True),
        ("UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted", True),
        ("runs/x/checkpoints/4: not saved (OSError: [Errno 28] No space left on device); free space", False),
        ("batch_size 7 for 2 processes: expected a positive multiple of 2", False),
    ],
)
def test_the_loss_of_a_process_is_told_from_other_errors(text: str, expected: bool) -> None:
    assert loss_of(ValueError(text)) == (text if expected else "")
    not_saved = StorageError("not saved")
    not_saved.__cause__ = ValueError(text)
    assert loss_of(not_saved) == (text if expected else "")


CHILD = """
import os, signal, sys, time
index = int(os.environ["JAX_PROCESS_ID"])
assert os.environ["JAX_NUM_PROCESSES"] == "2" and os.environ["JAX_COORDINATOR_ADDRESS"].startswith("127.0.0.1:")
assert os.environ["JAX_LOCAL_DEVICE_IDS"] == str(index)
def stop(number, frame): sys.exit(0)
signal.signal(signal.SIGTERM, stop)
kind = sys.argv[1]
if kind == "kill" and index == 1: os.kill(os.getpid(), signal.SIGKILL)
if kind == "fail": sys.exit(2 * index)
if kind == "stop":
    if index == 0: open("ready", "w").close()  # it hears signals from here on
    while not os.path.exists("ready"): time.sleep(0.01)
    if index == 1: os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
if kind == "hang" and index == 0: time.sleep(60)
if kind == "hang": sys.exit(1)
"""


@pytest.mark.parametrize(("kind", "status"), [("well", 0), ("fail", 2), ("kill", 137), ("stop", 0), ("hang", 137)])
def test_the_launcher_passes_signals_on_and_ends_with_the_worst_status(kind, status, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JAX_LOCAL_DEVICE_IDS", raising=False)
    monkeypatch.setattr("worldmodel.train.processes.LEAVE_LIMIT_S", 0.2)
    before = signal.getsignal(signal.SIGTERM)
    assert launch([sys.executable, "-S", "-c", CHILD, kind], 2) == status
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ConfigError, match="--processes 0"):
        launch([sys.executable], 0)


def test_the_command_starts_itself_once_a_process(monkeypatch, capsys) -> None:
    started = []
    monkeypatch.setattr("worldmodel.cli.launch", lambda command, count: started.append((command, count)) or 3)
    arguments = ["train", "cpu-tokenizer", "--processes", "2"]
    assert main(arguments) == 3
    assert started == [([sys.executable, "-m", "worldmodel", *arguments], 2)]
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    assert main(arguments) == BAD_INPUT_STATUS
    assert "ConfigError: JAX_NUM_PROCESSES" in capsys.readouterr().err


# ---------------------------------------------------------------- together


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Learner]:
    """Runs of a linear model; what one of them has compiled, the next ones find."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "JAX_PLATFORMS", "PYTHONPATH", "JAX_COMPILATION_CACHE_DIR"):
            patch.setenv(name, "")  # the learner sets them; here they are put back
        made = Learner("world", tmp_path_factory.mktemp("processes"))
        (made.scratch / "runs").mkdir()
        yield made


def start(learner: Learner, name: str, processes: int, devices: int = 1, **changes) -> tuple[Path, Attempt]:
    run = learner.scratch / "runs" / name
    learner.processes, learner.devices = processes, devices
    changes = {"steps": STEPS, "checkpoint_every": 4, **changes}
    return run, learner.start(run, changes, {"call": ["tests.worldmodel.train.linear:use"]})


def until_checkpoint(run: Path, learner: Learner, attempt: Attempt) -> None:
    """Let it run until a checkpoint of the first half is there, and not to its end."""
    if not attempt.wait_for(lambda: bool(learner.checkpoints(run))):
        raise AssertionError(attempt.end().output)


def ended(learner: Learner, name: str, processes: int, devices: int = 1, **changes) -> tuple[Path, Ended]:
    run, attempt = start(learner, name, processes, devices, **changes)
    end = attempt.end(LIMIT_S)
    assert end.codes == [0] * processes, end.output
    return run, end


def losses(run: Path) -> dict[int, float]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all("stop" not in entry for entry in entries)
    return {entry["step"]: entry["loss"] for entry in entries}


@pytest.fixture(scope="module")
def whole(learner: Learner) -> Path:
    """Two processes to the end."""
    run, end = ended(learner, "whole", 2)
    assert end.output.count(f"\nstep {STEPS} loss") == 1  # one of them speaks
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["hardware"].startswith("2 x cpu")
    return run


def assert_close(a: dict[int, float], b: dict[int, float]) -> None:
    assert a.keys() == b.keys()
    for step, loss in a.items():
        assert b[step] == pytest.approx(loss, rel=2e-4), step


def test_a_stop_signal_to_one_ends_both_and_one_process_goes_on(learner: Learner, whole: Path) -> None:
    run, attempt = start(learner, "stopped", 2)
    if not attempt.wait_for(lambda: (run / "log.jsonl").exists() and losses(run)):
        raise AssertionError(attempt.end().output)
    attempt.send(signal.SIGTERM, [1])
    end = attempt.end(NOTICE_S)
    assert end.codes == [0, 0], end.output
    newest = int(learner.checkpoints(run)[-1].name)
    assert f"stopped by a signal at step {newest}" in end.output
    assert newest == max(losses(run)) < STEPS
    _, end = ended(learner, "stopped", 1)
    assert f"step {newest + 1} loss" in end.output
    assert f"step {newest} loss" not in end.output
    assert_close(losses(whole), losses(run))


def test_a_folder_that_is_no_run_is_refused_by_both(learner: Learner) -> None:
    run, attempt = start(learner, "thesis", 2)
    run.mkdir(exist_ok=True)
    (run / "thesis.tex").write_text("years of work")
    end = attempt.end(LIMIT_S)
    assert end.codes == [2, 2], end.output
    assert end.output.count("ConfigError: ") == 2
    assert [path.name for path in run.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_two_processes_are_one_with_two_devices(learner: Learner, whole: Path) -> None:
    one, _ = ended(learner, "two-devices", 1, devices=2)
    assert_close(losses(whole), losses(one))


@pytest.mark.slow
def test_parameters_split_over_processes(learner: Learner, whole: Path) -> None:
    """`mesh.fsdp` across processes: the same losses, and its checkpoints fit both the same and one process."""
    for newest in (4, 12):
        run, attempt = start(learner, "fsdp", 2, mesh={"fsdp": 2})
        if not attempt.wait_for(lambda run=run, newest=newest: (run / "checkpoints" / str(newest)).exists()):
            raise AssertionError(attempt.end().output)
        attempt.send(signal.SIGKILL, [0, 1])
        end = attempt.end()
        assert f"step {newest} loss" in end.output
    assert "step 4 loss" not in end.output  # the second start went on from the first's checkpoint
    ended(learner, "fsdp", 1)
    assert_close(losses(whole), losses(run))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_leaves_with_a_named_error(learner: Learner, whole: Path, victim: int) -> None:
    name = f"killed-{victim}"
    run, attempt = start(learner, name, 2)
    until_checkpoint(run, learner, attempt)
    attempt.send(signal.SIGKILL, [victim])
    killed_s = time.monotonic()
    end = attempt.end(2 * NOTICE_S)
    assert time.monotonic() - killed_s < NOTICE_S
    assert (end.codes[victim], end.codes[1 - victim]) == (-signal.SIGKILL, 2), end.output
    assert f"TrainingError: process {1 - victim} of 2: another process of the run was lost" in end.output
    assert "goes on from the newest checkpoint" in end.output
    ended(learner, name, 2)
    assert losses(whole) == losses(run)


@pytest.mark.slow
def test_both_pass_over_a_damaged_checkpoint(learner: Learner, whole: Path) -> None:
    run, attempt = start(learner, "damaged", 2)
    if not attempt.wait_for(lambda: len(learner.checkpoints(run)) > 1):
        raise AssertionError(attempt.end().output)
    attempt.send(signal.SIGKILL, [0, 1])
    attempt.end()
    newest = learner.checkpoints(run)[-1]
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    _, end = ended(learner, "damaged", 2)
    assert f"checkpoints/{newest.name}: cannot restore" in end.output
    assert [path.name for path in (run / "checkpoints-damaged").iterdir()] == [f"{newest.name}-0"]
    assert losses(whole) == losses(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("whole", {"seed": 1}, "seed: saved 0, now 1"),
        ("left-out", {"mesh": {"data": 1}}, "takes 1 of the 2 devices of 2 processes"),
        ("uneven", {"batch_size": 7}, "batch_size 7 is not a multiple of the 2 mesh devices"),
    ],
)
def test_what_cannot_be_is_refused_by_both(learner: Learner, whole: Path, name, changes, message) -> None:
    _, attempt = start(learner, name, 2, **changes)
    end = attempt.end(LIMIT_S)
    assert end.codes == [2, 2], end.output
    assert message in end.output


@pytest.mark.slow
def test_the_real_command_joins_and_ends_with_the_status_of_its_processes(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    command = [sys.executable, "-m", "worldmodel", "train", "cpu-tokenizer", "--run-dir", str(tmp_path)]
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    ended = subprocess.run(
        [*command, "--processes", "2", "--mesh.data", "2"], env=environ, cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == BAD_INPUT_STATUS, ended.stderr
    assert ended.stderr.count(f"ConfigError: {tmp_path} is not empty and is not a run folder") == 2
