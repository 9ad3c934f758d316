"""What a page says of a study: its spec, the command that makes it, and the tables of its kept report.

`scripts/ablate.py SPEC --keep benchmarks/ablations/NAME.json` leaves the report; pages are written from it by
`jepa_answer.py` and `recipe_search.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import DataError, GolfError
from common.files import write_atomically
from scripts.ablate import arm_table, limits_text, prices_text, read_spec
from scripts.readme_tables import replace_between

ROOT = Path(__file__).resolve().parents[1]
SPECS = ROOT / "scripts" / "ablations"
KEPT = ROOT / "benchmarks" / "ablations"
PAGES = ROOT / "submissions" / "jepa_mamba"
Results = Mapping[str, Mapping[str, Any] | None]  # of studies, None for one without runs


def read_kept(studies: Sequence[str], folder: Path) -> dict[str, dict[str, Any] | None]:
    """Kept reports by study, None where there is none. Raises DataError for a file of another study."""
    found: dict[str, dict[str, Any] | None] = {}
    for name in studies:
        spec = read_spec(SPECS / f"{name}.toml")
        path = folder / f"{spec.name}.json"
        found[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        kept = found[name]
        if kept is not None and kept.get("name") != spec.name:
            raise DataError(f"{path} is a report of {kept.get('name')!r}, expected {spec.name!r}; keep it by its name")
    return found


def study(
    name: str,
    result: Mapping[str, Any] | None,
    *,
    data: str,
    make: str,
    intent: str,
    after_budget: Callable[[Mapping[str, Any], str], list[str]] = lambda result, budget: [],
) -> list[str]:
    """The section of one study, in paragraphs of markdown.

    Args:
        name: of scripts/ablations/NAME.toml.
        result: its kept report, None without runs.
        data: folder under data/ that it runs on.
        make: target that writes the page.
        intent: "Preregistered" if the spec was committed before its runs and says what follows from them.
        after_budget: more paragraphs behind the table of a budget.
    """
    path = SPECS / f"{name}.toml"
    spec, file = read_spec(path), path.relative_to(ROOT).as_posix()
    arms = "\n".join(f"| {arm} | {limits_text(changes) or '–'} |" for arm, changes in spec.arms.items())
    every = limits_text({k: v for options in spec.options.values() for k, v in options.items()})
    seeds, placebo = ", ".join(map(str, spec.seeds)), f", placebo `{spec.placebo}`" if spec.placebo else ""
    parts = [
        f"## {spec.name}",
        spec.about,
        f"{intent} in `{file}` (sha256 {spec.sha256[:16]}): seeds {seeds}; smallest effect {spec.minimum_effect_bpb} "
        f"bpb; reference `{spec.reference}`{placebo}; every arm has {every}.",
        f"| arm | options |\n| --- | --- |\n{arms}",
        f"```\nmake ablate SPEC={file} DATA=data/{data} ARGS='--keep benchmarks/ablations/{spec.name}.json'\n"
        f"make {make}\n```",
    ]
    if result is None or not result["finished_runs"]:
        return [*parts, "No runs yet."]
    if result["spec_sha256"] != spec.sha256:
        parts.append(
            f"**The spec was changed after these runs (they had sha256 {result['spec_sha256'][:16]}): they are not "
            f"{intent.lower()} by the file as it is now.**"
        )
    parts.append(f"{result['finished_runs']} of {result['planned_runs']} runs are finished.")
    for budget, part in result["budgets"].items():
        parts.append(f"### {budget}: {limits_text(part['limits'])}")
        if part["placebo"] != "none":
            parts.append(f"Placebo: {part['placebo']}.")
        parts += [*filter(None, [prices_text(part)]), arm_table(result, budget), *after_budget(result, budget)]
    return parts


def write_pages(
    argv: Sequence[str] | None,
    name: str,
    studies: Sequence[str],
    page: Path,
    document: Callable[[Results], str],
    summary: Callable[[Results], str],
) -> int:
    """The command line of a program that writes a page, and its summary between the markers `name` of the README."""
    parser = argparse.ArgumentParser(description=f"Write {page.name} from kept reports.")
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder of reports (benchmarks/ablations)")
    parser.add_argument("--out", type=Path, default=page, help="document to write")
    parser.add_argument("--readme", type=Path, default=PAGES / "README.md", help="page whose summary is rewritten")
    arguments = parser.parse_args(argv)
    try:
        results = read_kept(studies, arguments.kept)
        readme = replace_between(arguments.readme.read_text(encoding="utf-8"), name, summary(results))
        write_atomically(arguments.out, document(results).encode())
        write_atomically(arguments.readme, readme.encode())
        print(arguments.out, arguments.readme, sep="\n")
    except GolfError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0
