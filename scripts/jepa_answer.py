"""Write submissions/jepa_mamba/TO_JEPA_OR_NOT.md, and its summary in the README beside it: `make jepa-answer`.

The studies are preregistered in scripts/ablations/jepa_*.toml; `scripts/ablate.py SPEC --keep FILE` leaves what is read
here, benchmarks/ablations/jepa-*.json. The answer follows the decision rule of those files; nothing is typed in but the
words between the figures.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.ablate import interval_text
from scripts.studies import PAGES, Results, study, write_pages

DOCUMENT = PAGES / "TO_JEPA_OR_NOT.md"
PRIMARY = "time"  # the budget in which an arm pays for its objective
STUDIES = ("jepa_mini", "jepa_forms_mini", "jepa_forms_confirm", "jepa_h200")
CONTROLS = ("placebo", "shuffled", "sigreg_only")  # arms that cannot make latent prediction the default
LATENTS = {
    "jepa_gradient_over_ce": "JEPA / CE gradient", "sigreg_gradient_over_ce": "SIGReg / CE gradient",
    "jepa_r2_over_copy": "R² over copying", "z_temporal_variance": "temporal share of var z",
    "sigreg_excess": "SIGReg over its floor",
}  # fmt: skip


def winners(result: Mapping[str, Any]) -> list[str]:
    """Arms that meet the decision rule under the primary budget."""
    part = result["budgets"].get(PRIMARY, {"arms": {}, "placebo": "waiting"})
    if part["placebo"] != "null":
        return []
    return [
        arm
        for arm, found in part["arms"].items()
        if arm not in CONTROLS and found.get("verdict") == "better" and found.get("p_holm", 1.0) < 0.05
    ]


def complete(result: Mapping[str, Any], budget: str = PRIMARY) -> bool:
    """Is every arm of a budget there with every seed?"""
    arms = result["budgets"].get(budget, {"arms": {}})["arms"]
    return set(arms) == set(result["arms"]) and all(arms[arm]["seeds"] == sorted(result["seeds"]) for arm in arms)


def answer(results: Results) -> str:
    """The answer as far as the studies go. A search only names candidates: they need the seeds of a confirmation."""
    main = results.get("jepa_mini")
    if main is None or not main["finished_runs"]:
        return "**No runs yet.** The `best_*` presets have it off until a study says otherwise."
    if not complete(main):
        done = f"{main['finished_runs']} of {main['planned_runs']}"
        return f"**Not decided yet**: {done} runs of the main study are finished; `best_*` have it off until all are."
    found = {name: winners(result) for name, result in results.items() if result is not None}
    candidates = found.get("jepa_forms_mini", [])
    confirmed = [arm for arm in found.get("jepa_forms_confirm", []) if arm in candidates]
    best = [*found["jepa_mini"], *confirmed]
    at_size = f" On one H200: {', '.join(found['jepa_h200']) or 'none'}." if "jepa_h200" in found else ""
    if best:
        return f"**To JEPA**: {', '.join(f'`{arm}`' for arm in best)} met the preregistered rule.{at_size}"
    more = f" The search names {', '.join(candidates)}, not confirmed." if candidates else searched(results)
    rule = "**Not to JEPA**: no arm of the main study met the preregistered rule. `best_*` have it off."
    return f"{rule}{if_free(main)}{more}{at_size}"


def if_free(result: Mapping[str, Any]) -> str:
    """Which arms a study finds better at equal steps, where the objective costs nothing; complete budgets only."""
    steps: dict[str, list[str]] = {}  # by what won
    for budget in result["budgets"]:
        if budget == PRIMARY or not complete(result, budget):
            continue
        arms = result["budgets"][budget]["arms"]
        better = [arm for arm in arms if arm not in CONTROLS and arms[arm].get("verdict") == "better"]
        steps.setdefault(", ".join(f"`{arm}`" for arm in better) or "none of them", []).append(steps_of(result, budget))
    return "".join(
        f" At equal steps ({' and '.join(counts)}) {arms} beat the reference." for arms, counts in steps.items()
    )


def steps_of(result: Mapping[str, Any], budget: str) -> str:
    """How many steps the arms of a budget of equal steps make, for a heading."""
    return str(result["budgets"][budget]["limits"]["iterations"])


def searched(results: Results) -> str:
    """What the search among other forms found at equal steps, once all of them have run; empty before."""
    search = results.get("jepa_forms_mini")
    if search is None or not complete(search, "steps"):
        return ""
    found = search["budgets"]["steps"]["arms"]
    forms = [arm for arm in found if arm not in (*CONTROLS, search["reference"])]
    least = -search["minimum_effect_bpb"]
    better = [arm for arm in forms if found[arm]["val_bpb_difference"]["mean"] <= least]
    said = f"{', '.join(better)} in the mean" if better else "none"
    return f" Of {len(forms)} other forms, with {len(search['seeds'])} seeds, {said} teaches more in as many steps."


def latent_table(result: Mapping[str, Any], budget: str) -> str:
    """What the latent objectives did, by arm: means over seeds of the last measurement of each run."""
    lines = [f"| arm | {' | '.join(LATENTS.values())} |", f"|{' --- |' * (1 + len(LATENTS))}"]
    for arm in result["arms"]:
        measured = [r["latents"] for r in result["rows"] if (r["arm"], r["budget"]) == (arm, budget) and r["latents"]]
        if not measured:
            continue
        cells = []
        for name in LATENTS:
            values = [m[name] for m in measured if name in m]
            cells.append(f"{math.fsum(values) / len(values):.4g}" if values else "–")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def latent_part(result: Mapping[str, Any], budget: str) -> list[str]:
    table = latent_table(result, budget)
    return ["The latent objectives at the last measurement of a run, means over seeds:", table] if table else []


LIMITS = """## Limits of the evidence

- The `mini` track is a small, undertrained model on technical English. It says how the objectives act on optimisation
  at that scale, not what they do to a model of 30 million weights after 3 billion tokens.
- A difference below the smallest effect of interest is called null, not zero.
- Equal time counts processor seconds of our implementation: an objective that is cheaper elsewhere is judged too hard
  there, which `steps` shows.
- The same validation text serves every study; the intervals are over seeds, not over texts."""


def document(results: Results) -> str:
    """TO_JEPA_OR_NOT.md."""
    parts = [
        "# To JEPA or not",
        "Written by `make jepa-answer`. Does latent prediction with SIGReg, as a training-only objective, lower the "
        "bits per byte of the artifact?",
        answer(results),
        "Differences are in bits per byte of the artifact read back from disk, paired by seed; brackets are 95% "
        "intervals of the paired t test over seeds. An arm counts only if its interval lies below 0, its mean reaches "
        f"the smallest effect and its p adjusted by Holm is below 0.05, all under `{PRIMARY}`, and the placebo is null;"
        " controls cannot win.",
    ]
    for name in STUDIES:
        data = "english-docs-bpe8192" if name.endswith("h200") else "english-docs-ablate"
        parts += study(
            name, results.get(name), data=data, make="jepa-answer", intent="Preregistered", after_budget=latent_part
        )
    return "\n\n".join([*parts, LIMITS]) + "\n"


def summary(results: Results) -> str:
    """The answer and the main study's arms in one table."""
    main = results.get("jepa_mini")
    if main is None or not main["finished_runs"]:
        return answer(results)
    others = [budget for budget in main["budgets"] if budget != PRIMARY and complete(main, budget)]
    told = {PRIMARY: "equal time", **{budget: f"{steps_of(main, budget)} equal steps" for budget in others}}
    heads = "".join(f" at {name}, bpb | |" for name in told.values())
    lines = [f"| arm against `{main['reference']}` |{heads}", f"|{' --- |' * (1 + 2 * len(told))}"]
    for arm in main["arms"]:
        if arm == main["reference"]:
            continue
        line = f"| {arm} |"
        for budget in told:
            found = main["budgets"].get(budget, {"arms": {}})["arms"].get(arm, {})
            line += f" {interval_text(found.get('val_bpb_difference'))} | {found.get('verdict', '–')} |"
        lines.append(line)
    about = (
        f"Differences of the artifact's bits per byte, paired over {len(main['seeds'])} seeds, 95% intervals; the "
        f"smallest effect that counts is {main['minimum_effect_bpb']}. The whole study, its rule and its limits: "
        f"[{DOCUMENT.name}]({DOCUMENT.name})."
    )
    return "\n\n".join([answer(results), "\n".join(lines), about])


def main(argv: Sequence[str] | None = None) -> int:
    return write_pages(argv, "jepa", STUDIES, DOCUMENT, document, summary)


if __name__ == "__main__":
    sys.exit(main())
