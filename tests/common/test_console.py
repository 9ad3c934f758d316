"""common/console.py: a bar on a terminal, lines elsewhere, JSON for machines; the same fields for both learners."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from common.console import TrainingConsole, peak_memory_bytes, progress_text

ROOT = Path(__file__).resolve().parents[2]
ENTRY = {"step": 1200, "loss": 2.5, "train_bpb": 1.25, "tokens_per_s": 5300.4, "eta_s": 80.9, "memory_bytes": 812e6}


def test_a_line_holds_the_same_fields_for_both_learners():
    assert progress_text(ENTRY) == "step 1,200 loss 2.5000 bpb 1.2500 5,300 tokens/s ETA 1:20 memory 812 MB"
    world = {"step": 3, "loss": 1.0, "bits_per_frame": 30.25, "frames_per_s": 99.0, "eta_s": 7260, "memory_bytes": 2e9}
    assert progress_text(world) == "step 3 loss 1.0000 30.25 bits/frame 99 frames/s ETA 2:01:00 memory 2,000 MB"


def test_lines_where_there_is_no_terminal(capsys):
    console = TrainingConsole()
    with console.live("train"):
        console.waiting("compiling")
        console.progress(ENTRY, 0.5)
        console.entry(ENTRY)
    assert capsys.readouterr().out == f"compiling\n{progress_text(ENTRY)}\n"


def test_json_is_the_entries_and_nothing_else(capsys):
    console = TrainingConsole(as_json=True)
    with console.live("train"):
        console.waiting("compiling")
        console.say("text")
        console.progress(ENTRY, 0.5)
        console.entry(ENTRY)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [ENTRY]


def test_a_rank_that_does_not_speak_is_silent(capsys):
    for as_json in (False, True):
        console = TrainingConsole(speaks=False, as_json=as_json)
        with console.live("train"):
            console.waiting("compiling")
            console.progress(ENTRY, 0.5)
            console.entry(ENTRY)
    assert capsys.readouterr().out == ""


def test_memory_is_that_of_this_process():
    assert 5e6 < peak_memory_bytes() < 1e12


SHOW = """
import importlib.util, sys
from common.console import TrainingConsole
if sys.argv[1] == "without rich":
    importlib.util.find_spec = lambda name: None
    sys.modules["rich"] = None
console = TrainingConsole()
with console.live("train"):
    console.waiting("compiling the first step")
    console.progress({"step": 7, "loss": 1.5, "eta_s": 3, "memory_bytes": 1e6}, 0.5)
    console.say("a line meanwhile")
print("after")
"""


@pytest.mark.parametrize("rich", ["with rich", "without rich"])
def test_a_bar_on_a_terminal_and_lines_where_rich_is_missing(rich, tmp_path):
    script = tmp_path / "show.py"
    script.write_text(SHOW, encoding="utf-8")
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, str(script), rich], stdout=theirs, env=env)
    os.close(theirs)
    shown = bytearray()
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # what Linux says when the other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    for wanted in ("compiling the first step", "step 7 loss 1.5000 ETA 0:03 memory 1 MB", "a line meanwhile", "after"):
        assert wanted in text
    assert ("50%" in text) == ("\x1b[" in text) == (rich == "with rich")
