"""scripts/reliability.py: what is measured anew replaces what was, and its command goes with its last row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import reliability


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store, page = tmp_path / "store.json", tmp_path / "page.md"
    page.write_text("prose\n<!-- faults:begin -->\n<!-- faults:end -->\n")
    monkeypatch.setattr(reliability, "STORE", store)

    def run(command: str, *rows: tuple[str, str, int]) -> dict[str, Any]:
        document = {"provenance": reliability.provenance(command), "outcomes": [
            {"learner": learner, "fault": fault, "survived": survived} for learner, fault, survived in rows
        ]}  # fmt: skip
        reliability.merged("faults", document, "outcomes", ("learner", "fault"), ["lm", "world"])
        reliability.record("faults", document, "| table |", store=store, page=page)
        return json.loads(store.read_text())["faults"]

    return run


def test_rows_are_replaced_one_by_one_and_commands_with_their_last_row(measure) -> None:
    measure("all of world", ("world", "kill", 1), ("world", "full", 1))
    measure("all of lm", ("lm", "kill", 1))
    kept = measure("kills of world", ("world", "kill", 2))
    assert [made["command"] for made in kept["provenance"]] == ["all of world", "all of lm", "kills of world"]
    assert [made["rows"] for made in kept["provenance"]] == [[["world", "full"]], [["lm", "kill"]], [["world", "kill"]]]
    rows = {(row["learner"], row["fault"]): row["survived"] for row in kept["outcomes"]}
    assert rows == {("lm", "kill"): 1, ("world", "full"): 1, ("world", "kill"): 2}
    assert kept["outcomes"][0]["learner"] == "lm"
    kept = measure("full of world", ("world", "full", 3))
    assert [made["command"] for made in kept["provenance"]] == ["all of lm", "kills of world", "full of world"]


def test_a_campaign_that_tells_what_it_has_so_far_is_named_once(measure) -> None:
    measure("campaign", ("lm", "kill", 1))
    kept = measure("campaign", ("lm", "kill", 1), ("lm", "full", 1))
    assert [made["command"] for made in kept["provenance"]] == ["campaign"]
    assert len(kept["outcomes"]) == 2
