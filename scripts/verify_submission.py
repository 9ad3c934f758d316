"""The referee: is a parameter-golf submission folder what it claims to be?

    python scripts/verify_submission.py dist/jepa_mamba --runs runs/a runs/b runs/c --data data/fineweb-sp8192

Reads the folder, runs its program staged (a copy, no network, a read-only source tree), scores its weights again,
probes its causality, and prints one row per check. Exit status: 0 nothing failed, 1 a check failed, 2 the input
cannot be used. docs/VERIFIER.md lists every check, the hook that a program may expose, and the mutants that this
referee was tested with.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.errors import GolfError
from common.files import write_atomically
from referee.case import FAMILIES, RUN_LIMIT_S, Case, verify
from referee.data import read_data
from referee.evidence import runs_of
from referee.folder import read_submission
from referee.model import Row, Verdict

STYLES = {Verdict.PASSED: "green", Verdict.FAILED: "bold red", Verdict.NOT_CHECKABLE: "yellow"}


def report(folder: Path, rows: Sequence[Row], seconds: float) -> dict:
    """The JSON report: verdict, counts, and every finding with its rule and how to mend it."""
    count = {str(verdict): sum(row.verdict == verdict for row in rows) for verdict in Verdict}
    return {
        "folder": str(folder),
        "verdict": str(Verdict.FAILED if count["failed"] else Verdict.PASSED),
        "count": count,
        "seconds": round(seconds, 1),
        "checks": [
            {
                "name": row.check.name,
                "verdict": str(row.verdict),
                "rule": row.check.rule,
                "findings": [
                    {"verdict": str(f.verdict), "found": f.found, "where": f.where, "mend": f.mend}
                    for f in row.findings
                ],
            }
            for row in rows
        ],
    }


def show(console: Console, rows: Sequence[Row], *, everything: bool) -> None:
    table = Table(show_lines=False, pad_edge=False)
    for name in ("check", "verdict", "found"):
        table.add_column(name, overflow="fold")
    for row in rows:
        own = [f for f in row.findings if f.verdict == row.verdict]
        shown = row.findings if everything else own[:1]
        more = f" (+{len(own) - 1} more)" if not everything and len(own) > 1 else ""
        text = "\n".join(f.found for f in shown) + more
        table.add_row(row.check.name, f"[{STYLES[row.verdict]}]{row.verdict}[/]", text.replace("[", "\\["))
    console.print(table)
    for row in rows:
        for f in row.findings:
            if f.verdict == Verdict.FAILED:
                console.print(f"\n[bold red]{row.check.name}[/]: {row.check.rule}", highlight=False, soft_wrap=True)
                for label, text in (("found", f.found), ("where", f.where), ("mend", f.mend)):
                    console.print(f"  {label}: {text}", highlight=False, markup=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check a parameter-golf submission folder.")
    parser.add_argument("folder", type=Path, help="folder with train_gpt.py, submission.json and logs")
    parser.add_argument(
        "--data", type=Path, default=None, help="folder of the shards and tokenizer that it was scored on"
    )
    parser.add_argument(
        "--runs", type=Path, nargs="*", default=[], help="run folders whose model.artifact it was made of"
    )
    parser.add_argument(
        "--weights", type=Path, nargs="*", default=[], help="files of weights, with seedN in their names"
    )
    parser.add_argument("--against", type=Path, default=None, help="folder of the record to beat")
    parser.add_argument("--track", default=None, help="track, where submission.json does not say it")
    parser.add_argument("--only", nargs="*", choices=FAMILIES, default=list(FAMILIES), help="families of checks")
    parser.add_argument("--json", type=Path, default=None, help="write the report here")
    parser.add_argument("--limit_s", type=float, default=RUN_LIMIT_S, help="seconds for each staged run")
    parser.add_argument("--threads", type=int, default=2, help="threads of staged runs")
    parser.add_argument("--all", action="store_true", help="show every finding, not only the first of a row")
    arguments = parser.parse_args(argv)
    started_s = time.monotonic()
    try:
        submission = read_submission(arguments.folder, arguments.weights, arguments.runs, arguments.track)
        data = read_data(arguments.data) if arguments.data is not None else None
        against = runs_of(read_submission(arguments.against)) if arguments.against is not None else None
        rows = verify(Case(submission, data, against), arguments.only, arguments.limit_s, arguments.threads)
        result = report(arguments.folder, rows, time.monotonic() - started_s)
        if arguments.json is not None:
            write_atomically(arguments.json, (json.dumps(result, indent=1) + "\n").encode())
    except GolfError as error:
        print(f"verify_submission: {error}", file=sys.stderr)
        return 2
    show(Console(), rows, everything=arguments.all)
    count = result["count"]
    print(
        f"\n{arguments.folder}: {count['passed']} passed, {count['failed']} failed, "
        f"{count['not checkable']} not checkable, in {result['seconds']:.0f} s"
    )
    return 1 if count["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
