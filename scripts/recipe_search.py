"""Write submissions/jepa_mamba/RECIPE.md, and its summary in the README beside it: `make recipe-search`.

What single changes to `best_mini` did, from the kept reports of the studies; losers stay in the table. Nothing is typed
in but the words between the figures.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.ablate import interval_text, limits_text, read_spec
from scripts.studies import PAGES, SPECS, Results, study, write_pages

DOCUMENT = PAGES / "RECIPE.md"
# Study -> folder of data that it ran on. The first two search, one change at a time.
STUDIES = {
    "recipe_mini": "english-docs-recipe", "batches_mini": "english-docs-recipe", "together_mini": "english-docs-recipe",
    "scout_mini": "english-docs-ablate",
    "sixth_mini": "english-docs-ablate", "final_mini": "english-docs-bpe1024",
    "free_steps_mini": "english-docs-ablate",
}  # fmt: skip
SEARCH = ("recipe_mini", "batches_mini")


def relative_time(result: Mapping[str, Any], budget: str, arm: str) -> float:
    """Processor seconds of training over the reference's, mean over the seeds that both have."""
    rows = {(r["arm"], r["seed"]): r["train_s"] for r in result["rows"] if r["budget"] == budget}
    seeds = result["budgets"][budget]["arms"][arm]["seeds"]
    return math.fsum(rows[arm, seed] / rows[result["reference"], seed] for seed in seeds) / len(seeds)


def together(results: Results) -> str:
    """What became of the winners at more steps; empty before that has run with all its seeds."""
    result, spec = results.get("together_mini"), read_spec(SPECS / "together_mini.toml")
    found = {} if result is None else result["budgets"]["steps"]["arms"].get("together", {})
    if found.get("seeds") != sorted(spec.seeds):
        return ""
    return (
        f"The winners together ({limits_text(spec.arms['together'])}) at {found['steps']:,.0f} steps: "
        f"{interval_text(found['val_bpb_difference'])} bpb, **{found['verdict']}** "
        "(`scripts/ablations/together_mini.toml`)."
    )


def summary(results: Results) -> str:
    """One table of every change that has all its seeds, the best first."""
    rows = []
    for name in SEARCH:
        result, spec = results.get(name), read_spec(SPECS / f"{name}.toml")
        if result is None:
            continue
        budget = next(iter(result["budgets"]))
        for arm, found in result["budgets"][budget]["arms"].items():
            if arm in (spec.reference, spec.placebo) or found["seeds"] != sorted(spec.seeds):
                continue
            difference = found["val_bpb_difference"]
            cells = [arm, limits_text(spec.arms[arm]), interval_text(difference), found["verdict"]]
            rows.append((difference["mean"], [*cells, f"{relative_time(result, budget, arm):.2f}"]))
    if not rows:
        return "No change has run with all its seeds yet."
    head = ("change", "options", "bpb, artifact", "verdict", "training time")
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    lines += [f"| {' | '.join(cells)} |" for _, cells in sorted(rows)]
    about = (
        "Single changes to `best_mini` as it was at the search, in as many tokens: difference of the artifact's bits "
        "per byte, paired over 3 seeds, with its 95% interval; *better* and *worse* exclude 0 and reach 0.002. The "
        "training time is processor time over the reference's, noisy by some percent."
    )
    return "\n\n".join(filter(None, [about, "\n".join(lines), together(results)]))


def document(results: Results) -> str:
    """RECIPE.md."""
    parts = [
        "# The recipe search on the mini track",
        "Written by `make recipe-search`.",
        summary(results),
        "At these steps a run has seen a small part of what the track's 600 seconds allow: what wins here because it "
        "learns faster early need not win there, and what needs time (averages, weight decay, slow schedules) is "
        "judged too hard.",
    ]
    for name, data in STUDIES.items():
        parts += study(name, results.get(name), data=data, make="recipe-search", intent="Set out")
    return "\n\n".join(filter(None, parts)) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    return write_pages(argv, "recipe", tuple(STUDIES), DOCUMENT, document, summary)


if __name__ == "__main__":
    sys.exit(main())
