"""Write submissions/jepa_mamba/RECIPE.md, and its summary in the README beside it: `make recipe-search`.

What single changes to `best_mini` did, from the kept reports of the studies; losers stay in the table. Nothing is typed
in but the words between the figures.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.ablate import arm_table, interval_text, limits_text, read_spec
from scripts.studies import PAGES, SPECS, Results, study, write_pages

DOCUMENT = PAGES / "RECIPE.md"
# Study -> folder of data that it ran on. The first three search.
STUDIES = {
    "recipe_mini": "english-docs-recipe", "batches_mini": "english-docs-recipe", "together_mini": "english-docs-recipe",
    "scout_mini": "english-docs-ablate",
    "sixth_mini": "english-docs-ablate", "final_mini": "english-docs-bpe1024",
    "free_steps_mini": "english-docs-ablate",
}  # fmt: skip
SEARCH = ("recipe_mini", "batches_mini", "together_mini")
FEWEST_PAIRS = 3  # seeds that a change needs to be in the table


def track(results: Results) -> str:
    """`best_mini` and what it has to beat, by the rules of the track; empty before anything has run."""
    result = results.get("final_mini")
    if result is None or not result["finished_runs"]:
        return ""
    about = (
        "The track itself, 600 s on two cores by the wall clock, artifacts read back from disk, the whole validation "
        "text, paired by seed (`scripts/ablations/final_mini.toml`). The bars: 0.20 bpb between `best_mini` and the "
        "published recipe, 0.10 between it and the plain transformer, which has small batches here too and is scored "
        "with a sliding window (windows side by side, as the challenge scores its own, are in LOG.md)."
    )
    return f"{about}\n\n{arm_table(result, 'track')}"


def relative_time(result: Mapping[str, Any], budget: str, arm: str) -> float:
    """Processor seconds of training over the reference's, mean over the seeds that both have."""
    rows = {(r["arm"], r["seed"]): r["train_s"] for r in result["rows"] if r["budget"] == budget}
    seeds = result["budgets"][budget]["arms"][arm]["seeds"]
    return math.fsum(rows[arm, seed] / rows[result["reference"], seed] for seed in seeds) / len(seeds)


def summary(results: Results) -> str:
    """The track's own table, and one of every change that has seeds enough: most tokens first, then the best."""
    rows = []
    for name in SEARCH:
        result, spec = results.get(name), read_spec(SPECS / f"{name}.toml")
        if result is None:
            continue
        budget = next(iter(result["budgets"]))
        for arm, found in result["budgets"][budget]["arms"].items():
            difference = found.get("val_bpb_difference")
            if arm == spec.placebo or difference is None or difference["n"] < FEWEST_PAIRS:
                continue
            millions = f"{found['tokens'] / 1e6:.1f}"
            cells = [millions, arm, limits_text(spec.arms[arm]), interval_text(difference), found["verdict"]]
            order = (-float(millions), difference["mean"])
            rows.append((order, [*cells, f"{relative_time(result, budget, arm):.2f}"]))
    head = ("M tokens", "change", "options", "bpb, artifact", "verdict", "training time")
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    lines += [f"| {' | '.join(cells)} |" for _, cells in sorted(rows)]
    about = (
        "Changes to `best_mini` as it was at the search, in as many tokens: difference of the artifact's bits per "
        f"byte, paired over {FEWEST_PAIRS} seeds or more, with its 95% interval; *better* and *worse* exclude 0 and "
        "reach 0.002. The training time is processor time over the reference's, noisy by some percent."
    )
    changes = [about, "\n".join(lines)] if rows else [f"No change has run with {FEWEST_PAIRS} seeds yet."]
    return "\n\n".join(filter(None, [track(results), *changes]))


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
