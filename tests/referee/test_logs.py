"""Both known shapes of logs are read, and nothing makes the reader fail."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from referee.logs import parse_log

PROGRAM = "import os\n" + "x = 1  # a line of the program that trained\n" * 60
BASELINE = f"""{PROGRAM}{"=" * 100}
val_loader:shards pattern=./data/fineweb_val_*.bin tokens:62021632
seed:1337
warmup_step:20/20
step:100/20000 train_loss:3.1 train_time:4000ms step_avg:40.00ms
step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:599038ms step_avg:43.54ms
stopping_early: wallclock_cap train_time:599038ms step:13780/20000
Code size: 2660 bytes
Serialized model int8+zlib: 15815847 bytes (payload:17178912)
Total submission size int8+zlib: 15818507 bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
"""
DESCENDANT = """Hyperparameters:
  beta2: 0.95
  max_wallclock_seconds: 600.0
  seed: 42
  vocab_size: 8192
4550/20000 val_loss: 2.8119 val_bpb: 1.0886
4550/20000 train_loss: 2.7622 train_time: 9.7m tok/s: 6095957
stopping_early: wallclock_cap train_time: 588047ms step: 4550/20000
GPTQ:collected 67 Hessians in 12.7s
Serialized model quantized+brotli: 15975300 bytes
Total submission size quantized+brotli: 15991930 bytes
quantized_ttt val_loss:2.79180191 val_bpb:1.08079352 eval_time:366525ms
"""


def test_baseline_shape():
    log = parse_log("train.log", BASELINE)
    assert log.sources == {"train_gpt.py": PROGRAM}
    assert (log.seed, log.warmup_steps, log.steps, log.val_tokens) == ("1337", 20, 13780, 62021632)
    assert log.train is not None
    assert log.train.seconds == 599.038
    assert (log.code_bytes, log.weight_bytes, log.total_bytes) == (2660, (15815847,), (15818507,))
    assert [(r.bpb, r.loss, r.periodic) for r in log.results] == [
        ("1.2172", "2.0606", True), ("1.2244", "2.0727", False), ("1.22436570", "2.07269931", False),
    ]  # fmt: skip
    assert [span.seconds for span in log.evaluations] == [1.401]
    lines = BASELINE.splitlines()
    assert "step:13780/20000 val_loss" in lines[log.results[0].line - 1]
    assert "stopping_early" in lines[log.train.line - 1]


def test_descendants_shape():
    log = parse_log("train_seed42.log", DESCENDANT)
    assert log.sources == {}
    assert log.config["max_wallclock_seconds"] == "600.0"
    assert (log.seed, log.steps) == ("42", 4550)
    assert log.train is not None
    assert log.train.seconds == 588.047
    assert [span.seconds for span in log.after_clock] == [12.7]
    assert [r.periodic for r in log.results] == [True, False]
    assert [span.seconds for span in log.evaluations] == [366.525]


def test_own_shape(bench):
    log = parse_log("train_seed1.log", bench.log(1).read_text(encoding="utf-8"))
    summary = json.loads((bench.root / "runs" / "seed1" / "summary.json").read_text(encoding="utf-8"))
    assert {"train_gpt.py", "common/artifact/container.py"} <= set(log.sources)
    assert all(text.endswith("\n") for text in log.sources.values())
    assert log.config == summary["config"]
    assert (log.seed, log.steps, log.warmup_steps) == ("1", summary["steps"], 1)
    assert log.train is not None
    assert log.train.seconds == pytest.approx(summary["train_s"], abs=0.0051)
    assert log.weight_bytes == (summary["artifact_bytes"],)
    assert [r.bpb for r in log.results if not r.periodic] == [f"{summary['val_bpb']:.4f}"]
    assert not log.on_gpu


@given(st.text())
def test_any_text_is_a_log(text):
    assert parse_log("train.log", text).name == "train.log"


@pytest.mark.parametrize("whole", [BASELINE, DESCENDANT])
def test_cut_logs_are_read(whole):
    for end in range(0, len(whole), 101):
        parse_log("train.log", whole[:end])
