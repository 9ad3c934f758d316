"""The fault campaign: both learners are disturbed in every way that loses work elsewhere, and must lose none.

    python scripts/faults.py                      the whole campaign: 50 kills a learner, minutes; writes the table
    python scripts/faults.py --kills 4 --only lm --cases kill,sigterm --json out.json

A learner runs tiny on the CPU, as two ranks (torch's or JAX's processes) that meet over gloo. After every
fault the same command is given again, until the run ends. It must end bitwise equal to a run that nothing disturbed
(log without times, weights, optimizer state, artifact), or stop with a named error (status 2, one line) and end bitwise
equal once the cause is gone. What differs is counted in bytes; the campaign's own status is 1 if anything does.

Instants are drawn from --seed. Every third kill waits until a checkpoint is being written, on a disk that takes 30 ms
to sync. Full and read-only disks are small file systems in memory, which need root; without it those cases are listed
as not run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.fault_runs import (
    CHECKPOINT_EVERY,
    PEER_GRACE_S,
    ROOT,
    Attempt,
    Ended,
    Learner,
    differing_bytes,
    lm_arguments,
)
from scripts.reliability import merged, provenance, record, table

NAMED_STATUS = 2
TERM_LIMIT_S = 30.0
RUN_LIMIT_S = 300.0  # for a start that is left alone to end, on a machine that does much else
STEP_PRECISION = 2e-6  # of a step's loss (5 nats) from the same weights with another number of ranks
DRIFT_LIMIT = 0.02  # of any later loss: rounding grows by about 2.5 a step here
ATTEMPTS_A_RUN = 40  # a run that is killed so often makes no progress
ERROR_LINE = re.compile(r"^(\w+Error): .+", re.MULTILINE)


@dataclass
class Outcome:
    """What one kind of fault did to one learner."""

    learner: str
    fault: str
    injected: int = 0
    survived: int = 0
    bytes_lost: int = 0
    resume_s: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def count(self, what: str, differing: int, problem: str = "") -> None:
        """One fault whose run has come to its end."""
        self.injected += 1
        self.bytes_lost += differing
        if differing or problem:
            self.failures.append(f"{what}: {problem or f'{differing} bytes differ'}")
        else:
            self.survived += 1


def errors_of(ended: Ended) -> set[str]:
    """The named errors in which an attempt ended, one a rank; none if any process ended otherwise.

    Status 2 is given for a named error only; a library may have logged its own traceback before that.
    """
    named = all(code in (0, NAMED_STATUS) for code in ended.codes)
    return set(ERROR_LINE.findall(ended.output)) if named else set()


class Campaign:
    """All cases for one learner."""

    def __init__(self, learner: Learner, seed: int, kills: int) -> None:
        self.learner, self.kills, self.grace_s = learner, kills, PEER_GRACE_S[learner.name]
        self.rng = random.Random(f"{seed} {learner.name}")
        self.runs = learner.scratch / "runs"
        self.runs.mkdir(parents=True, exist_ok=True)
        self.outcomes: list[Outcome] = []
        ended = learner.start(self.runs / "compile").end()  # fills caches, so that every run takes the same time
        assert ended.codes == [0] * learner.processes, ended.output
        undisturbed = learner.start(self.runs / "undisturbed").end()
        assert undisturbed.codes == [0] * learner.processes, undisturbed.output
        self.whole_s = undisturbed.seconds
        self.expected = learner.result(self.runs / "undisturbed")

    def outcome(self, fault: str) -> Outcome:
        self.outcomes.append(Outcome(self.learner.name, fault))
        return self.outcomes[-1]

    def folder(self, name: str) -> Path:
        """A fresh run folder."""
        folder = self.runs / name
        if folder.exists():
            shutil.rmtree(folder)
        return folder

    def lost(self, run: Path) -> int:
        return differing_bytes(self.expected, self.learner.result(run))

    def finish(self, outcome: Outcome, run: Path, what: str, problem: str = "", **options: Any) -> Ended:
        """Give the same command until its end, and compare."""
        ended = self.learner.start(run, **options).end(RUN_LIMIT_S)
        if ended.first_step_s is not None:
            outcome.resume_s.append(ended.first_step_s)
        if ended.codes != [0] * self.learner.processes:
            how = f"did not end within {RUN_LIMIT_S:.0f} s" if -signal.SIGKILL in ended.codes else "ended"
            outcome.count(what, 0, problem or f"resumed run {how}, status {ended.codes}: {ended.output[-600:]}")
        else:
            outcome.count(what, self.lost(run), problem)
        return ended

    def until_checkpoints(self, run: Path, count: int, **options: Any) -> Attempt:
        """A run that has written some checkpoints, still running."""
        attempt = self.learner.start(run, **options)
        newest = count * CHECKPOINT_EVERY[self.learner.name]
        reached = attempt.wait_for(lambda: any(_step(p) >= newest for p in self.learner.checkpoints(run)))
        if not reached:
            ended = attempt.end()
            raise AssertionError(f"{run.name}: no checkpoint {newest}, ended with {ended.codes}: {ended.output[-900:]}")
        return attempt

    # ------------------------------------------------------------ processes

    def kill(self) -> None:
        """kill -9 at random instants: of all processes, or of one while the other must notice and leave."""
        everybody, lead = range(self.learner.processes), self.outcome("kill -9 of every process")
        one = self.outcome("kill -9 of one rank") if self.learner.processes > 1 else None
        inside, number, attempts, struck, waiting, notice_s = 0, 0, 0, 0, 0, []
        run, pending = self.folder("killed-0"), []
        while struck < self.kills:
            aimed = self.rng.random() < 1 / 3
            attempt = self.learner.start(run, faults={"slow_disk": True} if aimed else {})
            attempts += 1
            if aimed:
                running = attempt.wait_for(lambda run=run: self.learner.is_writing(run))
                running = running and attempt.wait_s(self.rng.uniform(0, 0.06))
            else:
                running = attempt.wait_s(self.rng.uniform(0, self.whole_s))
            outcome = one if one is not None and struck % 2 else lead
            if running:
                struck += 1
                ranks = everybody if outcome is lead else [self.rng.choice(everybody)]
                attempt.send(signal.SIGKILL, ranks)
                killed_s = time.monotonic()
                ended = attempt.end(self.grace_s)
                inside += self.learner.is_writing(run)
                problem = ""
                if outcome is one:
                    notice_s.append(time.monotonic() - killed_s)
                    survivors = [code for rank, code in enumerate(ended.codes) if rank not in ranks]
                    if -signal.SIGKILL in survivors and ended.first_step_s is None:
                        waiting += 1  # for a rank that died before they had met: ending it is the launcher's part
                        notice_s.pop()
                    elif -signal.SIGKILL in survivors:
                        problem = f"the other rank was still there after {self.grace_s} s"
                    elif not all(code in (0, NAMED_STATUS) for code in survivors):
                        problem = f"the other rank ended with {survivors}: {ended.output[-600:]}"
                pending.append((outcome, f"kill {struck}", problem))
            else:
                ended = attempt.end(self.grace_s)
            if ended.first_step_s is not None and attempts > 1:
                outcome.resume_s.append(ended.first_step_s)
            last = struck == self.kills
            while (last or attempts >= ATTEMPTS_A_RUN) and not self.learner.finished(run):
                ended = self.learner.start(run).end(RUN_LIMIT_S)
                if ended.codes != [0] * self.learner.processes:
                    break
            if self.learner.finished(run):
                differing = self.lost(run)
                for owner, what, problem in pending:
                    owner.count(what, differing, problem)
            elif last or attempts >= ATTEMPTS_A_RUN:
                for owner, what, _ in pending:
                    owner.count(what, 0, f"the run does not end: {ended.codes} {ended.output[-600:]}")
            else:
                continue
            number, attempts, pending = number + 1, 0, []
            run = self.folder(f"killed-{number}")
        lead.notes.append(f"{inside} of {self.kills} instants lay inside the writing of a checkpoint; {number} runs")
        if one is not None and notice_s:
            one.notes.append(
                f"the other rank had left after {max(notice_s):.1f} s at most, with a named error; {waiting} were "
                f"still waiting to meet the killed one after {self.grace_s:.0f} s and were ended, as torchrun does"
            )

    def sigterm(self) -> None:
        """Preemption at random instants: status 0 within 30 s, nothing done twice but the step in flight.

        Every second one goes to a single process of the world model: all must end.
        """
        outcome, slowest_s, wanted = self.outcome("SIGTERM"), 0.0, max(2, self.kills // 5)
        for attempts in range(4 * wanted):  # some end before their instant
            index = outcome.injected
            if index == wanted:
                break
            run = self.folder(f"terminated-{attempts}")
            attempt = self.learner.start(run)
            problem = ""
            if attempt.wait_s(self.rng.uniform(0.1, 0.95) * self.whole_s):
                asked_s = time.monotonic()
                everybody = range(self.learner.processes)
                one = self.learner.name == "world" and index % 2 == 1
                attempt.send(signal.SIGTERM, [self.rng.choice(everybody)] if one else everybody)
                ended = attempt.end(TERM_LIMIT_S)
                slowest_s = max(slowest_s, time.monotonic() - asked_s)
                if ended.codes != [0] * self.learner.processes:
                    problem = f"ended with {ended.codes}: {ended.output[-600:]}"
            elif (ended := attempt.end(self.grace_s)).codes == [0] * self.learner.processes:
                continue
            else:
                problem = f"ended by itself with {ended.codes}: {ended.output[-600:]}"
            if self.learner.finished(run):
                outcome.count(f"SIGTERM {index}", self.lost(run), problem)
            else:
                self.finish(outcome, run, f"SIGTERM {index}", problem)
        whom = ", sent to all or to one in turn" if self.learner.name == "world" else ""
        outcome.notes.append(f"status 0 after {slowest_s:.1f} s at most{whom}")

    def nan(self) -> None:
        """Gradients that are not numbers: skipped and counted, over a kill too; past the limit the run stops."""
        outcome = self.outcome("NaN gradients, skipped")
        nan_steps = [2, 9, 10]
        faults = {"nan_steps": nan_steps}
        whole, killed = self.folder("nan-whole"), self.folder("nan-killed")
        ended = self.learner.start(whole, faults=faults).end(RUN_LIMIT_S)
        attempt = self.until_checkpoints(killed, 2, faults=faults)
        attempt.send(signal.SIGKILL, range(self.learner.processes))
        attempt.end(self.grace_s)
        resumed = self.learner.start(killed, faults=faults).end(RUN_LIMIT_S)
        wanted = [0] * self.learner.processes
        if ended.codes != wanted or resumed.codes != wanted:
            outcome.count("NaN", 0, f"ended with {ended.codes} and {resumed.codes}: {resumed.output[-600:]}")
        else:
            a, b = self.learner.result(whole), self.learner.result(killed)
            events = [json.loads(line) for line in (killed / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            counted = max(event.get("skipped", 0) for event in events)
            finite = all(b"NaN" not in part for name, part in b.items() if name == "log.jsonl")
            problem = "" if counted == len(nan_steps) and finite else f"{counted} steps counted, log finite: {finite}"
            outcome.count("NaN", differing_bytes(a, b), problem)
        outcome.notes.append(f"{len(nan_steps)} steps of a run; killed and resumed between them, the count goes on")
        outcome = self.outcome("NaN gradients, past the limit")
        run = self.folder("nan-limit")
        changes = {"nonfinite_limit": 2}
        ended = self.learner.start(run, changes, faults).end(RUN_LIMIT_S)
        batches = sorted(run.glob("nonfinite_*.npz"))
        problem = "" if "TrainingError" in errors_of(ended) and len(batches) == self.learner.processes else (
            f"ended with {ended.codes}, batches {batches}: {ended.output[-600:]}"
        )  # fmt: skip
        again = self.learner.start(run, {"nonfinite_limit": 10}, faults).end(RUN_LIMIT_S)
        if again.codes != wanted:
            problem = problem or f"with a higher limit ended with {again.codes}: {again.output[-600:]}"
            outcome.count("limit", 0, problem)
        else:
            outcome.count("limit", differing_bytes(self.learner.result(whole), self.learner.result(run)), problem)
        outcome.notes.append("TrainingError, status 2; every rank saves its batch; with a higher limit it goes on")

    def clock(self) -> None:
        """The system's time is set anew twenty times a second, by up to three years either way."""
        outcome = self.outcome("clock jumping by years")
        run = self.folder("clock")
        ended = self.learner.start(run, faults={"clock": 1}).end(RUN_LIMIT_S)
        if self.learner.finished(run):
            outcome.count("clock", self.lost(run))
            return
        named = errors_of(ended)
        self.finish(outcome, run, "clock", "" if named else f"ended with {ended.codes}: {ended.output[-900:]}")
        outcome.notes.append(f"stops: {', '.join(sorted(named))}; goes on once the clock is right")

    # ------------------------------------------------------------ files

    def damaged(self) -> None:
        """The newest checkpoint cut short, emptied or with one bit flipped: the one before it, and saying so."""
        for kind in ("truncated", "bit-flipped", "emptied"):
            outcome = self.outcome(f"newest checkpoint {kind}")
            for index in range(max(1, self.kills // 16)):
                run = self.folder(f"{kind}-{index}")
                attempt = self.until_checkpoints(run, 3)
                attempt.send(signal.SIGKILL, range(self.learner.processes))
                attempt.end(self.grace_s)
                newest = self.learner.checkpoints(run)[-1]
                place = damage(newest, kind, self.rng)
                ended = self.finish(outcome, run, f"{place}")
                # Orbax keeps files that it does not read again: damage to those may pass unsaid, nothing is lost by it.
                said = "trying the one before it" in ended.output
                if not said and (self.learner.name == "lm" or kind == "emptied"):
                    outcome.failures.append(f"{place}: nothing was said of it")
                    outcome.survived -= 1

    def all_damaged(self) -> None:
        """No sound checkpoint left: a named error, nothing started over; with the files back the run goes on."""
        outcome = self.outcome("every checkpoint damaged")
        run = self.folder("all-damaged")
        attempt = self.until_checkpoints(run, 2)
        attempt.send(signal.SIGKILL, range(self.learner.processes))
        attempt.end(self.grace_s)
        kept = run.with_name("all-damaged-kept")
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(run / "checkpoints", kept)
        # Of the files that Orbax keeps some are not read again, more of several processes: there all are emptied.
        kind = "truncated" if self.learner.name == "lm" else "emptied"
        for path in self.learner.checkpoints(run):
            damage(path, kind, self.rng)
        ended = self.learner.start(run).end(RUN_LIMIT_S)
        problem = "" if "CheckpointError" in errors_of(ended) else f"ended with {ended.codes}: {ended.output[-600:]}"
        shutil.rmtree(run / "checkpoints")
        shutil.copytree(kept, run / "checkpoints")
        self.finish(outcome, run, "all damaged", problem)
        outcome.notes.append("CheckpointError, status 2; with the files back it goes on")

    def data(self) -> None:
        """Training data that vanishes: a named error at the next start; with the file back the run goes on."""
        outcome = self.outcome("data file vanishing")
        pattern = "*_train_*.bin" if self.learner.name == "lm" else "train-*.array_record"
        path = next(self.learner.data.glob(pattern))
        away = path.with_name("away")
        run = self.folder("no-data")
        attempt = self.until_checkpoints(run, 1)
        path.rename(away)
        try:
            ended = attempt.end(RUN_LIMIT_S)
            notes = f"a running process keeps the file that it has open ({ended.codes})"
            if not self.learner.finished(run):
                notes = f"the running process stops: {', '.join(sorted(errors_of(ended))) or ended.codes}"
            fresh = self.folder("no-data-fresh")
            ended = self.learner.start(fresh).end(RUN_LIMIT_S)
            named = errors_of(ended)
            problem = "" if named & {"ShardError", "DataError"} else f"ended with {ended.codes}: {ended.output[-600:]}"
        finally:
            away.rename(path)
        self.finish(outcome, fresh, "no data", problem)
        if not self.learner.finished(run):
            self.finish(outcome, run, "no data, resumed")
        else:
            outcome.count("no data, running", self.lost(run))
        outcome.notes += [notes, f"a start without it: {', '.join(sorted(named))}, status 2"]

    # ------------------------------------------------------------ file systems

    def full(self) -> None:
        """No space left: a named error; with space again the run goes on."""
        outcome = self.outcome("disk full")
        with small_disk(self.runs / "full", "16m") as disk:
            if disk is None:
                outcome.notes.append("not run: mounting a file system needs root")
                return
            for index in range(max(1, self.kills // 16)):
                run = disk / f"run-{index}"
                attempt = self.until_checkpoints(run, 1 + index % 3)
                filler = disk / "filler"
                with open(filler, "wb", buffering=0) as file:
                    try:
                        while file.write(b"\0" * 4096):
                            pass
                    except OSError:
                        pass  # it is full now, which is the point
                ended = attempt.end(self.grace_s)
                done = self.learner.finished(run)
                filler.unlink()
                named = done or "StorageError" in errors_of(ended)
                problem = "" if named else f"ended with {ended.codes}: {ended.output[-900:]}"
                if done:
                    outcome.count(f"full {index}", self.lost(run), "the run ended before the disk was full")
                else:
                    self.finish(outcome, run, f"full {index}", problem)
                shutil.rmtree(run)
        outcome.notes.append("StorageError, status 2; the same command goes on once there is space")

    def read_only(self) -> None:
        """A run folder that cannot be written any more: a named error; later the run goes on."""
        outcome = self.outcome("read-only run folder")
        with small_disk(self.runs / "read-only", "64m") as disk:
            if disk is None:
                outcome.notes.append("not run: mounting a file system needs root")
                return
            run = disk / "run"
            attempt = self.until_checkpoints(run, 2)
            attempt.send(signal.SIGKILL, range(self.learner.processes))
            attempt.end(self.grace_s)
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            try:
                ended = self.learner.start(run).end(RUN_LIMIT_S)
            finally:
                subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            problem = "" if "StorageError" in errors_of(ended) else f"ended with {ended.codes}: {ended.output[-900:]}"
            self.finish(outcome, run, "read-only", problem)
        outcome.notes.append("StorageError, status 2")

    # ------------------------------------------------------------ numbers of processes

    def elastic(self) -> None:
        """torchrun starts everything again after a lost worker; other numbers of ranks go on with the same batches."""
        if self.learner.name != "lm":
            return
        outcome = self.outcome("torchrun --max-restarts after a killed worker")
        run = self.folder("elastic")
        with torchrun(self.learner, run, ranks=2, restarts=2) as agent:
            wait_for(lambda: len(self.learner.checkpoints(run)) > 0 or agent.poll() is not None, "a checkpoint")
            worker = self.rng.choice(children_of(agent.pid))
            os.kill(worker, signal.SIGKILL)
            status = agent.wait()
        problem = "" if status == 0 else f"torchrun ended with {status}"
        outcome.count("torchrun", self.lost(run) if self.learner.finished(run) else 0, problem)
        outcome.notes.append("no command given again: the agent restarts both ranks from the newest checkpoint")

        outcome = self.outcome("resumed with another number of ranks: 2, 1, 2")
        # One micro-batch a rank: SIGReg's statistic is over a micro-batch of all ranks together.
        changes = {"micro_batch_tokens": 256}
        whole, run, kept = self.folder("ranks-whole"), self.folder("ranks"), self.folder("ranks-kept")
        stays = self.folder("ranks-stays")
        ended = [self.with_ranks(2, whole, changes)]
        first = self.stopped_behind(2, run, 2, changes)
        second = self.stopped_behind(1, run, 4, changes)
        shutil.copytree(run, kept)
        ended.append(self.with_ranks(1, run, changes))  # the same weights and moments, on one rank to the end
        run.rename(stays)
        kept.rename(run)
        ended.append(self.with_ranks(2, run, changes))
        if problem := next((f"ended with {e.codes}: {e.output[-600:]}" for e in ended if set(e.codes) != {0}), ""):
            outcome.count("ranks", 0, problem)
            return
        a, b, c = losses_of(whole), losses_of(run), losses_of(stays)
        steps = [abs(a[first + 1] - b[first + 1]), abs(b[second + 1] - c[second + 1])]
        drift = max(abs(a[step] - b[step]) for step in a)
        data = {json.dumps(self.loader_state(folder), sort_keys=True) for folder in (whole, run, stays)}
        same = a.keys() == b.keys() == c.keys() and len(data) == 1
        if not same or max(steps) > STEP_PRECISION or drift > DRIFT_LIMIT:
            problem = f"loaders alike: {same}; losses of a step {steps} apart, {drift:.1e} at the end"
        outcome.count("ranks", 0, problem)
        outcome.notes.append(
            f"the same batches; from the same weights the losses of the next step are at most {max(steps):.0e} apart; "
            f"the sum over ranks rounds in another order, which grows through 4-bit weights to {drift:.0e} at most in "
            f"{len(a)} steps"
        )

    def with_ranks(self, ranks: int, run: Path, changes: dict[str, Any]) -> Ended:
        """Give the command with a number of ranks, to its end."""
        self.learner.processes, usual = ranks, self.learner.processes
        try:
            return self.learner.start(run, changes).end(RUN_LIMIT_S)
        finally:
            self.learner.processes = usual

    def stopped_behind(self, ranks: int, run: Path, checkpoints: int, changes: dict[str, Any]) -> int:
        """Run with a number of ranks until some checkpoints, then kill all; the step of the newest."""
        self.learner.processes, usual = ranks, self.learner.processes
        try:
            attempt = self.until_checkpoints(run, checkpoints, changes=changes)
            attempt.send(signal.SIGKILL, range(ranks))
            attempt.end(self.grace_s)
        finally:
            self.learner.processes = usual
        return _step(self.learner.checkpoints(run)[-1])

    def loader_state(self, run: Path) -> dict[str, Any]:
        """Where the data stood at a run's end."""
        from submissions.jepa_mamba.train_gpt import read_checkpoint

        return read_checkpoint(self.learner.checkpoints(run)[-1])[0]["loader"]


def _step(path: Path) -> int:
    return int(re.sub(r"\D", "", path.name))


def losses_of(run: Path) -> dict[int, float]:
    """Loss by step from a run of the language model."""
    events = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {event["step"]: event["loss"] for event in events if event["event"] == "step"}


def damage(checkpoint: Path, kind: str, rng: random.Random) -> str:
    """Damage one file of a checkpoint; says which and where."""
    files = [checkpoint] if checkpoint.is_file() else sorted(p for p in checkpoint.rglob("*") if p.is_file())
    files = [p for p in files if p.stat().st_size > 0]
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    if kind == "truncated":
        del data[place:]
    elif kind == "emptied":
        data.clear()
        for other in files:
            other.write_bytes(b"")
    else:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{kind} {path.relative_to(checkpoint.parent)} at {place}"


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path | None]:
    """A file system in memory of a few megabytes; None without the right to mount one."""
    if os.geteuid() != 0:
        yield None
        return
    path.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode != 0:  # root of a container without the capability
        yield None
        return
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextmanager
def torchrun(learner: Learner, run: Path, *, ranks: int, restarts: int) -> Iterator[subprocess.Popen]:
    """The entry under the real torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [f"--max-restarts={restarts}", str(ROOT / "submissions" / "jepa_mamba" / "train_gpt.py")]
    with open(learner.scratch / f"{run.name}.out", "wb") as log:
        agent = subprocess.Popen([*command, *lm_arguments(learner.data, run)], stdout=log, stderr=log, cwd=ROOT)
        try:
            yield agent
        finally:
            agent.kill()
            agent.wait()


def children_of(pid: int) -> list[int]:
    """Processes that a process has started."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return [int(word) for word in text.split()]


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = 300.0) -> None:
    until_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > until_s:
            raise TimeoutError(f"waited {limit_s} s for {what}")
        time.sleep(0.02)


CASES = ("kill", "damaged", "all_damaged", "full", "read_only", "nan", "data", "clock", "elastic", "sigterm")
NAMES = {"lm": "language model, 2 ranks", "world": "world model, 2 processes"}


def render(outcomes: Sequence[Outcome]) -> str:
    """The campaign's table."""
    rows = []
    for o in outcomes:
        resume = f"{statistics.mean(o.resume_s):.2f}" if o.resume_s else ""
        failures = [f"**failed**: {' '.join(failure.split())[:100]}".replace("|", "/") for failure in o.failures]
        notes = "; ".join([*o.notes, *failures])
        rows.append((NAMES[o.learner], o.fault, o.injected, o.survived, o.bytes_lost, resume, notes))
    injected, survived = sum(o.injected for o in outcomes), sum(o.survived for o in outcomes)
    lost = sum(o.bytes_lost for o in outcomes)
    resumes = [s for o in outcomes for s in o.resume_s]
    mean = f"{statistics.mean(resumes):.2f}" if resumes else ""
    rows.append(("**all**", "", injected, survived, lost, mean, ""))
    return table(("learner", "fault", "injected", "survived", "bytes lost", "mean s to resume", ""), rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; 1 if anything was lost."""
    parser = argparse.ArgumentParser("python scripts/faults.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--kills", type=int, default=50, help="kill -9 instants a learner")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("lm", "world"), help="one learner")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--json", type=Path, help="write outcomes here instead of the table in docs/RELIABILITY.md")
    parser.add_argument("--scratch", type=Path, help="keep the runs here; default: a temporary folder")
    args = parser.parse_args(argv)
    cases = [name.strip() for name in args.cases.split(",")]
    if unknown := sorted(set(cases) - set(CASES)):
        parser.error(f"--cases {unknown[0]}: expected some of {', '.join(CASES)}")
    outcomes: list[Outcome] = []
    words = " ".join(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        scratch = (args.scratch or Path(temporary)).resolve()
        for name in ("lm", "world"):
            if args.only in (None, name):
                campaign = Campaign(Learner(name, scratch), args.seed, args.kills)
                for case in cases:
                    began_s = time.monotonic()
                    before = len(campaign.outcomes)
                    try:
                        getattr(campaign, case)()
                    except (AssertionError, OSError, KeyError, IndexError, subprocess.SubprocessError) as error:
                        broken = campaign.outcome(f"{case}: the campaign itself")
                        broken.count(case, 0, "".join(traceback.format_exception(error)[-2:]))
                    for o in campaign.outcomes[before:]:
                        print(f"{name}: {o.fault}: {o.survived} of {o.injected} survived, {o.bytes_lost} bytes lost "
                              f"({time.monotonic() - began_s:.0f} s); {'; '.join(o.notes)}", flush=True)  # fmt: skip
                        for failure in o.failures:
                            print(f"    FAILED {failure}", flush=True)
                    keep([*outcomes, *campaign.outcomes], words, args.json)
                outcomes += campaign.outcomes
    print(render(outcomes))
    return 1 if any(o.failures for o in outcomes) else 0


def keep(outcomes: Sequence[Outcome], words: str, path: Path | None) -> None:
    """Write what is known so far: a campaign that is stopped has told what it found."""
    document = {"provenance": provenance(f"python scripts/faults.py {words}".strip()),
                "outcomes": [asdict(o) for o in outcomes]}  # fmt: skip
    if path is not None:
        path.write_text(json.dumps(document, indent=1), encoding="utf-8")
        return
    merged("faults", document, "outcomes", ("learner", "fault"), list(NAMES))
    record("faults", document, render([Outcome(**values) for values in document["outcomes"]]))


if __name__ == "__main__":
    sys.exit(main())
