"""What the staged runs showed: does the program run, alone, without network, without writing where it may not?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from referee.lint import HARMLESS_PROGRAMS, STAGED
from referee.model import Check, Finding, failed, many, not_checkable, passed
from referee.stage import Ran

QUOTED_LINE = 1000  # characters
NEEDS_GPU = re.compile(r"cuda|nvidia|nccl|gpu|flash_attn|triton", re.IGNORECASE)


def runs_of_case(case: Any) -> list[Ran]:
    observed = case.observed
    runs = [observed.smoke, *(one.ran for one in observed.scores)]
    if observed.dialogue is not None:
        runs.append(observed.dialogue.ran)
    return [ran for ran in runs if ran is not None]


def place_of(ran: Ran, event: dict[str, Any]) -> str:
    """Where an event comes from: the program's line, and in which of the referee's runs."""
    runs = {"smoke": "two training steps", "score": "--score", "hook": "referee_hook"}
    return f"{event.get('place', 'no line of the program')}, in {runs[ran.what]}"


def place_of_error(ran: Ran, entry: str) -> str:
    """The innermost line of the program in the traceback that a process ended with."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', ran.stderr)
    own = [f"{Path(file).name}:{line}" for file, line in lines if file.startswith(ran.stage)]
    return own[-1] if own else entry


def check_smoke(case: Any) -> list[Finding]:
    ran: Ran | None = case.observed.smoke
    if ran is None:
        return [not_checkable(case.observed.why_no_smoke)]
    if ran.status == 0:
        return [passed(f"trained, exported and ended in {ran.seconds:.0f} s")]
    if ran.status is None:
        return [not_checkable(f"two steps did not end within {ran.seconds:.0f} s on this machine's CPU")]
    # A traceback quotes lines of the program; a packed one's spell every short word somewhere.
    tail = "\n".join(line for line in ran.stderr.splitlines()[-12:] if len(line) < QUOTED_LINE)
    missing = re.search(r"No module named '([\w.]+)'", tail)
    if missing:
        return [not_checkable(f"this machine lacks the package {missing.group(1)}")]
    if NEEDS_GPU.search(tail):
        return [not_checkable(f"needs a GPU: {ran.complaint}")]
    if any(event["event"] == "socket" for event in ran.events):
        return [not_checkable("it asked for the network, was refused and ended; see staged.network")]
    mend = "run it in an empty folder with only its requirements installed"
    where = place_of_error(ran, case.submission.entry or "")
    return [failed(f"ended with status {ran.status}: {ran.complaint}", where, mend)]


def check_network(case: Any) -> list[Finding]:
    runs = runs_of_case(case)
    if not runs:
        return [not_checkable("nothing was run")]
    findings = [
        failed(f"{event['what']} of {event['address']}", place_of(ran, event), "bring everything before the run")
        for ran in runs
        for event in ran.events
        if event["event"] == "socket"
    ]
    return findings[:5] or [passed(f"{many(len(runs), 'run')} asked for no network")]


def check_readonly(case: Any) -> list[Finding]:
    runs = runs_of_case(case)
    if not runs:
        return [not_checkable("nothing was run")]
    mend = "write into the current directory or a folder given by an option"
    findings: list[Finding] = []
    for ran in runs:
        source = str(Path(ran.stage) / "source") + "/"
        tried = [e for e in ran.events if e.get("write") and e["path"].startswith(source)]
        if written := sorted({*ran.changed, *(e["path"].removeprefix(source) for e in tried)}):
            where = place_of(ran, tried[0] if tried else {})
            findings.append(failed(f"wrote {', '.join(written[:5])} into the source tree", where, mend))
    return findings or [passed(f"{many(len(runs), 'run')} left every file of the source tree as it was")]


def check_outside(case: Any) -> list[Finding]:
    """Files read or written outside the stage, files of the source tree other than the program, programs started."""
    runs = runs_of_case(case)
    if not runs:
        return [not_checkable("nothing was run")]
    findings: list[Finding] = []
    mend = "everything that the program uses is in it, in a declared package, in the data folder or in the artifact"
    for ran in runs:
        source = str(Path(ran.stage) / "source") + "/"
        allowed = tuple(
            str(Path(ran.stage) / name) + "/" for name in ("data", "smoke", "work", "tmp", "home", "weights")
        )
        seen: set[str] = set()
        for event in ran.events:
            path = event.get("path", "")
            if event["event"] == "spawn":
                words = [w.strip("[]'\"") for w in event["program"].split(",")[0].split()]
                name = words[0].split("/")[-1] if words else "?"
                if name not in HARMLESS_PROGRAMS and name not in seen:
                    seen.add(name)
                    findings.append(failed(f"started {name}", place_of(ran, event), mend))
                continue
            if event["event"] not in ("open", "library") or path.startswith(allowed) or path in seen:
                continue
            if event.get("write") and path.startswith(source):
                continue  # the matter of staged.readonly
            # Python looks for the program's cache beside it; none is staged.
            own = (source + str(case.submission.entry), source + "__pycache__/")
            if path.startswith(own) and not event.get("write"):
                continue
            seen.add(path)
            shown = path.removeprefix(source) if path.startswith(source) else path
            verb = "wrote" if event.get("write") else "read"
            findings.append(failed(f"{verb} {shown}", place_of(ran, event), mend))
    return findings[:8] or [passed(f"{many(len(runs), 'run')} opened only the program, packages, data and weights")]


def check_training_data(case: Any) -> list[Finding]:
    runs = [ran for ran in runs_of_case(case) if ran.what != "smoke"]
    if not runs:
        return [not_checkable("nothing was scored here")]
    if case.data is None or not case.data.train:
        return [not_checkable("no training shards were laid out that it could have read")]
    findings = [
        failed(f"opened {Path(event['path']).name}", place_of(ran, event), "evaluation reads validation data only")
        for ran in runs
        for event in ran.events
        if event["event"] == "open" and "_train_" in Path(event["path"]).name
    ]
    return findings[:3] or [
        passed(f"{many(len(runs), 'scoring run')} opened no training shard, though they lay beside validation")
    ]


CHECKS = (
    *STAGED,
    Check("staged.smoke", "the program trains two steps alone in an empty folder, on a CPU", check_smoke),
    Check("staged.network", "nothing asks for the network", check_network),
    Check("staged.readonly", "the source tree is not written to", check_readonly),
    Check("staged.outside", "nothing outside program, packages, data and weights is opened or started", check_outside),
    Check("staged.training_data", "scoring opens no training shard", check_training_data),
)
