"""scripts/bench load: small sizes, and that what it watches is what was taken."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from scripts.bench import load
from scripts.bench.load import Watch, apart, main, own_bytes, render_cost


def hold(megabytes: int) -> dict[str, int]:
    held = np.ones(megabytes << 17)
    time.sleep(0.3)
    return {"sum": int(held.sum())}


def test_memory_of_a_process_apart_is_seen() -> None:
    small, large = apart(hold, 1), apart(hold, 120)
    assert large["sum"] == 120 << 17
    assert 110 << 20 < large["memory_bytes"] - small["memory_bytes"] < 140 << 20


def test_pages_of_files_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(64 << 20))
    before = own_bytes(os.getpid())
    mapped = np.memmap(path, np.uint8, "r")
    assert int(mapped.sum()) == 0
    assert own_bytes(os.getpid()) - before < 16 << 20


def test_small_inputs_are_measured_and_leave_nothing(tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    options = ["--gigabytes", "0.002", "--seconds", "0.2", "--parts", "text", "world", "--scratch", str(tmp_path)]
    assert main([*options, "--json", str(out)]) == 0
    document = json.loads(out.read_text(encoding="utf-8"))
    text, world = document["text"][0], document["world"][0]
    assert 0.002 <= text["gigabytes"] < 0.0021
    assert text["documents"] > 400
    assert text["loader"]["tokens_per_s"] > 0
    assert world["loader"]["frames_per_s"] > 0
    assert 1e6 < text["prepare_memory_bytes"] < load.MEMORY_LIMIT_BYTES
    assert [path.name for path in tmp_path.iterdir()] == ["load.json"]


def text_row(gigabytes: float, rate: float) -> dict:
    loader = {"tokens_per_s": 1.0, "tokens_per_cpu_s": 8.0, "memory_bytes": 1, "first_batch_s": 0.1}
    return {"gigabytes": gigabytes, "documents": 3, "prepare_mb_per_s": 1.0, "prepare_mb_per_cpu_s": rate,
            "prepare_memory_bytes": 1, "loader": loader}  # fmt: skip


def test_a_campaign_keeps_the_parts_that_it_does_not_measure(tmp_path: Path) -> None:
    store, page = tmp_path / "reliability.json", tmp_path / "page.md"
    page.write_text("a\n<!-- load:begin -->\n<!-- load:end -->\nb\n", encoding="utf-8")

    def made(command: str) -> list[dict[str, str]]:
        return [{"command": command, "date": "today", "machine": "this"}]

    text = [text_row(0.1, 20.0), text_row(10.0, 19.0)]
    load.keep({"text": text[:1], "provenance": made("first")}, None, store=store, page=page)
    assert "Rate a CPU second" not in page.read_text(encoding="utf-8")
    load.keep({"text": text, "provenance": made("second")}, None, store=store, page=page)
    loader = {"frames_per_s": 1.0, "frames_per_cpu_s": 1.0, "memory_bytes": 1, "first_batch_s": 0.1}
    writer = {"write_mb_per_s": 1.0, "memory_bytes": 1}
    world = [{"gigabytes": 0.1, "disk_bytes": 1, "writer": writer, "loader": loader}]
    load.keep({"world": world, "provenance": made("third")}, None, store=store, page=page)
    kept = json.loads(store.read_text(encoding="utf-8"))["load"]
    assert (kept["text"], kept["world"]) == (text, world)
    assert [line["command"] for line in kept["provenance"]] == ["second", "third"]
    shown = page.read_text(encoding="utf-8")
    assert "`second`, today, this  \n`third`, today, this  \n" in shown
    assert "at 10.00 GB over that at 0.10 GB: prepare_text 0.95, loader 1.00" in shown
    assert shown.startswith("a\n")
    assert shown.endswith("b\n")


def test_too_much_memory_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"prepare_memory_bytes": load.MEMORY_LIMIT_BYTES + 1, "loader": {"memory_bytes": 1}}
    monkeypatch.setattr(load, "measure_text", lambda *arguments: row)
    monkeypatch.setattr(load, "render_loads", lambda document: "")
    options = ["--gigabytes", "1", "--parts", "text", "--scratch", str(tmp_path), "--json", str(tmp_path / "x.json")]
    assert main(options) == 1


def test_the_arithmetic_of_the_projection() -> None:
    world = {"dynamics": {"multiplying": 10, "tokens": 16, "flops_a_frame": 960}}
    cost = {"lm": {"multiplying": 10**7, "flops_a_token": 6 * 10**7, "tokens_per_s_8_gpus": 1e6}, "world": world,
            "gpu_flops": 1e15, "gpu_usd_an_hour": 2.0}  # fmt: skip
    text = render_cost(cost)
    assert "| FineWeb, 10B sample | 1e+10 | 2.78 | 0.35 | 44 |" in text  # 10^10 tokens / 10^6 a second = 2.78 hours
    assert "60 TFLOP/s, 0.8% of the eight" in text
    assert "6 x 10 x 16 = 960" in text


def test_a_watch_sees_children() -> None:
    with Watch(os.getpid()) as watch:
        apart(hold, 60)
    assert watch.peak_bytes > own_bytes(os.getpid()) + (50 << 20)
