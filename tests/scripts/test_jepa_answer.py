"""TO_JEPA_OR_NOT.md: the decision rule, what is said without runs, and that the committed file is the program's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import DataError
from scripts.ablate import analyse, read_spec
from scripts.jepa_answer import DOCUMENT, STUDIES, answer, document, main, summary
from scripts.studies import KEPT, PAGES, SPECS, read_kept

MAIN = read_spec(SPECS / "jepa_mini.toml")


def report(spec, effect: dict[str, float], seeds=None) -> dict[str, Any]:
    """What ablate would report if every arm's difference to the reference were its effect, give or take a little."""
    rows = []
    for budget in spec.budgets:
        for arm in spec.arms:
            for i, seed in enumerate(seeds or spec.seeds):
                bpb = 1.7 + 0.01 * i + effect.get(arm, 0.0) * (1 + 0.01 * i)
                rows.append({
                    "budget": budget, "arm": arm, "seed": seed, "entry": "jepa_mamba", "val_bpb": bpb, "first_ce": 6.0,
                    "float_val_bpb": bpb, "steps": 300, "tokens": 1, "train_s": 300.0, "artifact_bytes": 1, "params": 1,
                    "code_sha256": "c", "latents": None if arm in ("off", "placebo") else {
                        "jepa_gradient_over_ce": 0.25, "z_temporal_variance": 0.5},
                })  # fmt: skip
    return analyse(spec, rows, len(spec.budgets) * len(spec.arms) * len(spec.seeds))


def test_without_runs_it_says_so() -> None:
    text = document({})
    assert "**No runs yet.**" in text
    assert text.count("\nNo runs yet.") == 4
    assert "| stop_gradient | jepa_weight 0.1, sigreg_lambda 0.1, detach_targets 1 |" in text
    assert "seeds 1, 2, 3, 4, 5; smallest effect 0.002 bpb" in text


def test_the_decision_rule() -> None:
    assert "**To JEPA**: `weight_001` met" in answer({"jepa_mini": report(MAIN, {"weight_001": -0.01})})
    for effect in ({}, {"weight_001": 0.01}, {"weight_001": -0.001}, {"shuffled": -0.01}, {"sigreg_only": -0.02},
                   {"weight_001": -0.01, "placebo": 0.01}):  # fmt: skip
        assert "**Not to JEPA**" in answer({"jepa_mini": report(MAIN, effect)}), effect
    assert "**Not decided yet**" in answer({"jepa_mini": report(MAIN, {"weight_001": -0.01}, seeds=(1, 2))})
    forms, confirm = (read_spec(SPECS / f"jepa_forms_{name}.toml") for name in ("mini", "confirm"))
    searched = {"jepa_mini": report(MAIN, {}), "jepa_forms_mini": report(forms, {"four_ahead": -0.01})}
    assert "The search names four_ahead, not confirmed." in answer(searched)
    confirmed, other = (report(confirm, {arm: -0.01}) for arm in ("four_ahead", "pooled"))
    assert "**To JEPA**: `four_ahead`" in answer({**searched, "jepa_forms_confirm": confirmed})
    assert "**Not to JEPA**" in answer({**searched, "jepa_forms_confirm": other})  # it was no candidate
    fruitless = {"jepa_mini": report(MAIN, {}), "jepa_forms_mini": report(forms, {"pooled": 0.01, "decayed": -0.001})}
    assert "Of 8 other forms, with 3 seeds, none teaches more in as many steps." in answer(fruitless)
    undecided = report(forms, {"decayed": -0.01, "placebo": 0.01})  # a broken placebo: nobody wins under `time`
    found = answer({"jepa_mini": report(MAIN, {}), "jepa_forms_mini": undecided})
    assert "Of 8 other forms, with 3 seeds, decayed in the mean teaches more in as many steps." in found


def test_what_equal_steps_say_is_told_for_complete_budgets_alone() -> None:
    none = {"jepa_mini": report(MAIN, {})}
    assert "At equal steps (300 and 900) none of them beat the reference." in answer(none)
    assert (
        "| arm against `off` | at equal time, bpb | | at 300 equal steps, bpb | | at 900 equal steps, bpb | |"
        in summary(none)
    )
    free = report(MAIN, {"weight_001": -0.01, "shuffled": -0.01})
    for budget in ("time", "steps"):
        free["budgets"][budget] = none["jepa_mini"]["budgets"][budget]
    said = answer({"jepa_mini": free})
    assert "**Not to JEPA**" in said  # the rule is of equal time
    assert "At equal steps (300) none of them beat the reference. At equal steps (900) `weight_001` beat" in said
    free["budgets"]["steps_long"]["arms"]["shuffled"]["seeds"] = [1, 2]
    assert "900" not in answer({"jepa_mini": free}) + summary({"jepa_mini": free})


def test_studies_are_told_with_their_latents_and_a_changed_spec_shows() -> None:
    result = report(MAIN, {"weight_001": -0.01})
    text = document({"jepa_mini": result})
    assert "| weight_001 | 5 |" in text
    assert "| stop_gradient | 0.25 | – | – | 0.5 | – |" in text
    assert "not preregistered" not in text
    changed = copy.deepcopy(result) | {"spec_sha256": "0" * 64}
    assert "**The spec was changed after these runs" in document({"jepa_mini": changed})


def test_kept_reports_are_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "jepa-mini.json").write_text(json.dumps(report(MAIN, {})))
    (tmp_path / "page.md").write_text("before\n<!-- jepa:begin (how) -->\nold\n<!-- jepa:end -->\nafter\n")
    where = ["--kept", str(tmp_path), "--out", str(tmp_path / "x.md"), "--readme", str(tmp_path / "page.md")]
    assert main(where) == 0
    assert "**Not to JEPA**" in (tmp_path / "x.md").read_text()
    page = (tmp_path / "page.md").read_text()
    assert (page[:6], page[-6:], "old" in page) == ("before", "after\n", False)
    assert "| stop_gradient | +0.0000 [+0.0000, +0.0000] | null | +0.0000 [+0.0000, +0.0000] | null |" in page
    (tmp_path / "jepa-mini.json").write_text(json.dumps(report(MAIN, {}) | {"name": "other"}))
    with pytest.raises(DataError, match="report of 'other'"):
        read_kept(STUDIES, tmp_path)


def test_the_committed_answer_is_what_the_program_writes() -> None:
    results = read_kept(STUDIES, KEPT)
    assert DOCUMENT.read_text(encoding="utf-8") == document(results), "stale: make jepa-answer"
    readme = (PAGES / "README.md").read_text(encoding="utf-8")
    assert f"-->\n{summary(results)}\n<!--" in readme, "stale: make jepa-answer"
