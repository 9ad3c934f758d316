"""RECIPE.md: what its summary says of finished and unfinished arms, and that the committed file is the program's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from scripts.ablate import analyse, read_spec
from scripts.recipe_search import DOCUMENT, STUDIES, document, main, summary
from scripts.studies import KEPT, PAGES, SPECS, read_kept

SPEC = read_spec(SPECS / "recipe_mini.toml")


def report(
    effects: dict[str, float],
    train_s: dict[str, float],
    missing: tuple[str, int],
    spec=SPEC,
    budget="steps",
    tokens=400_000,
) -> dict:
    """As ablate reports arms whose difference to the reference is their effect, give or take a little."""
    rows = [
        {
            "budget": budget, "arm": arm, "seed": seed, "entry": "jepa_mamba", "first_ce": 6.0, "float_val_bpb": 2.0,
            "val_bpb": 2 + effect * (1 + 0.01 * seed), "train_s": train_s.get(arm, 50.0 * seed), "steps": 200,
            "tokens": tokens, "artifact_bytes": 1, "params": 1, "code_sha256": "c", "latents": None,
        }
        for arm, effect in effects.items() for seed in spec.seeds if (arm, seed) != missing
    ]  # fmt: skip
    return analyse(spec, rows, len(spec.budgets) * len(spec.arms) * len(spec.seeds))


def test_the_summary_has_whole_arms_best_first_with_their_time() -> None:
    effects = {"best_mini": 0.0, "placebo": 0.0, "relu2": 0.02, "ema": -0.01, "parallel": -0.05, "dt_apart": 0.001}
    result = report(effects, {"relu2": 100.0}, missing=("parallel", 2))
    lines = summary({"recipe_mini": result}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    assert [(c[1], c[4], c[5]) for c in cells] == [
        ("ema", "better", "1.00"), ("dt_apart", "null", "1.00"), ("relu2", "worse", "1.22"),
    ]  # fmt: skip
    assert cells[0][2] == "ema_decay 0.97, ema_start_fraction 0.5"
    assert cells[0][3].startswith("-0.0102 [-0.0104")
    assert "No change has run" in summary({})


def test_winners_that_lose_at_more_tokens_are_told_first() -> None:
    whole = report({"best_mini": 0.0, "ema": -0.01}, {}, ("", 0))
    spec = replace(read_spec(SPECS / "together_mini.toml"), seeds=(1, 2, 3))
    for missing, first in ((("", 0), "together"), (("together", 2), "ema")):
        lost = report({"before": 0.0, "together": 0.006}, {}, missing, spec, tokens=3_000_000)
        lines = summary({"recipe_mini": whole, "together_mini": lost}).splitlines()
        top = next(line for line in lines if line.startswith(("| 0.", "| 3.")))
        assert f"| {first} |" in top
        assert ("| worse |" in top) == (first == "together")


def test_the_track_itself_comes_first() -> None:
    spec = read_spec(SPECS / "final_mini.toml")
    final = report({"best_mini": 0.0, "seed_mini": 0.5}, {}, ("", 0), spec, "track")
    whole = report({"best_mini": 0.0, "ema": -0.01}, {}, ("", 0))
    text = summary({"recipe_mini": whole, "final_mini": final})
    assert text.index("| seed_mini | 3 |") < text.index("| 0.4 | ema |")
    assert "No change has run" in summary({"final_mini": final})


def test_pages_are_written_from_kept_reports(tmp_path: Path) -> None:
    (tmp_path / "recipe-mini.json").write_text(json.dumps(report({"best_mini": 0.0, "ema": -0.01}, {}, ("", 0))))
    (tmp_path / "page.md").write_text("before\n<!-- recipe:begin (how) -->\nold\n<!-- recipe:end -->\nafter\n")
    where = ["--kept", str(tmp_path), "--out", str(tmp_path / "x.md"), "--readme", str(tmp_path / "page.md")]
    assert main(where) == 0
    page, text = (tmp_path / "page.md").read_text(), (tmp_path / "x.md").read_text()
    assert (page[:6], page[-6:], "old" in page) == ("before", "after\n", False)
    assert "| 0.4 | ema | ema_decay 0.97" in page
    assert text.count("\nNo runs yet.") == len(STUDIES) - 1
    (tmp_path / "page.md").write_text("no markers")
    assert main(where) == 2


def test_the_committed_page_is_what_the_program_writes() -> None:
    results = read_kept(tuple(STUDIES), KEPT)
    assert DOCUMENT.read_text(encoding="utf-8") == document(results), "stale: make recipe-search"
    readme = (PAGES / "README.md").read_text(encoding="utf-8")
    assert f"-->\n{summary(results)}\n<!--" in readme, "stale: make recipe-search"
