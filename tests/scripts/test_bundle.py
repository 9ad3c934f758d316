"""scripts/bundle.py: what it inlines, what it refuses, what it writes, and that the bundle is the entry."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from common.errors import ConfigError, DataError, GolfError
from scripts.bundle import (
    ENTRY,
    ROOT,
    compare,
    differences,
    make_bundle,
    observe_bundled,
    observe_readable,
    read_runs,
    requirements,
    submission_record,
    timeless,
    write_dist,
)
from submissions.jepa_mamba.train_gpt import Config, read_preset

ABOUT = {"name": "n", "author": None, "github_id": None, "blurb": "b", "date": None, "track": "t"}
FAKE = {
    "entry.py": '''"""Does it.

Really.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from common.a import first
from common.sub.b import SECOND, second

# Replaced.
BUNDLED_PRESET: dict[str, Any] | None = None


def main():
    """Say   it."""
    text = """one


    three blank lines above"""
    return first(), second(), SECOND, math.pi, np.__name__, BUNDLED_PRESET, len(text), __doc__.split("\\n")[0]


if __name__ == "__main__":
    print(main())
''',
    "common/a.py": '''"""First things.

Letters: N rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import (
    Callable,
    Iterator,
)

from common.sub.b import second


@functools.cache
def first() -> float:
    # Why.
    return math.floor(second()) + 0.5


kind: Callable | Iterator | None = None
''',
    "common/sub/b.py": '"""Second."""\n\nimport math\nfrom collections.abc import Iterator\n\nSECOND = 2\n\n\n'
    "def second() -> float:\n    return SECOND + math.e\n\n\nother: Iterator | None = None\n",
    "common/unused.py": "raise RuntimeError('never')\n",
}


def plant(root: Path, changes: dict[str, str] | None = None) -> Path:
    for name, text in (FAKE | (changes or {})).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_inlines_in_order_once_and_runs_alone(tmp_path):
    made = make_bundle(plant(tmp_path), "entry.py", {"width": 3, "name": "x", "flag": True})
    assert made.modules == ("common/sub/b.py", "common/a.py", "entry.py")
    assert made.imports == ("numpy",)
    assert made.source.startswith('"""Does it.\n\nReally.\n"""\n\nfrom __future__ import annotations\n')
    assert made.source.count("__future__") == 1
    assert made.source.count("import math\n") == 1
    assert "from collections.abc import Callable, Iterator\n" in made.source
    assert "common import" not in made.source
    assert "from common" not in made.source
    assert "never" not in made.source
    for kept in ("# First things.", "# Letters: N rows.", "    # Why.", "# Replaced.", "one\n\n\n    three blank"):
        assert kept in made.source
    alone = tmp_path / "alone" / "train_gpt.py"
    alone.parent.mkdir()
    alone.write_text(made.source, encoding="utf-8")
    done = subprocess.run([sys.executable, str(alone)], cwd=alone.parent, capture_output=True, text=True, check=True)
    expected = (4.5, 2 + 2.718281828459045, 2, 3.141592653589793, "numpy", {"width": 3, "name": "x", "flag": True})
    assert ast.literal_eval(done.stdout) == (*expected, 33, "Does it.")


def test_is_deterministic_and_keeps_the_order_of_options(tmp_path):
    preset = dict.fromkeys("zyxwvutsrqponm", 1)
    sources = {make_bundle(plant(tmp_path / str(i)), "entry.py", preset).source for i in range(2)}
    assert len(sources) == 1
    tree = ast.parse(sources.pop())
    assigned = {ast.unparse(node.target): node.value for node in tree.body if isinstance(node, ast.AnnAssign)}
    value = assigned["BUNDLED_PRESET"]
    assert value is not None
    assert list(ast.literal_eval(value)) == list(preset)
    assert "BUNDLED_PRESET: dict[str, Any] | None = None" in make_bundle(tmp_path / "0", "entry.py", None).source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"common/sub/b.py": "SECOND = 2\ndef second(): pass\nfirst = 1\n"}, "`first` is defined in common/a.py"),
        ({"common/sub/b.py": "import numpy as math\nSECOND = 2\ndef second(): pass\n"}, "`math` is module math"),
        ({"common/sub/b.py": "SECOND = 2\ndef second(): pass\ndef len(x): pass\n"}, "builtin"),
        ({"common/sub/b.py": "from common.a import first\nSECOND = 2\n"}, "import cycle: common/a.py"),
        ({"common/a.py": "def first():\n    from common.sub.b import second\n    return second()\n"}, "inside a block"),
        ({"common/a.py": "from common.sub.b import second as first\n"}, "alias"),
        ({"common/a.py": "from common.sub.b import *\n"}, "star"),
        ({"common/a.py": "from .sub.b import second\n"}, "relative import"),
        ({"common/a.py": "import common.sub.b\n"}, "`import common.sub.b`"),
        ({"common/a.py": "from common.sub import b\n"}, "common.sub is not a file"),
        ({"common/a.py": "import math; X = 1\n"}, "shares its line"),
        ({"common/a.py": "X = 1; import math\n"}, "shares its line"),
        ({"entry.py": "from common.sub.b import SECOND\n"}, "one top-level assignment of BUNDLED_PRESET, found 0"),
        ({"entry.py": "BUNDLED_PRESET = None\nBUNDLED_PRESET = 1\n"}, "found 2"),
    ],
)
def test_refuses_what_one_file_cannot_mean(changes, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        make_bundle(plant(tmp_path, changes), "entry.py", {"a": 1})
    assert message in str(caught.value)


def test_requirements_are_the_pins_of_what_is_imported():
    text = requirements(ROOT, ("brotli", "mamba_ssm", "numpy", "torch"))
    lines = text.splitlines()
    assert [line.split("==")[0] for line in lines] == ["brotli", "numpy", "torch", lines[3], "# mamba-ssm"]
    assert lines[3].startswith("# Used where")
    pinned = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{line.removeprefix("# ")}"' in pinned for line in lines if "==" in line)
    with pytest.raises(ConfigError, match="imports requests"):
        requirements(ROOT, ("requests",))


@pytest.fixture(scope="module")
def real_bundle():
    return make_bundle(ROOT, ENTRY, read_preset("seed_bpe"))


def test_the_real_bundle_has_no_undefined_or_doubled_name(real_bundle, tmp_path):
    path = tmp_path / "train_gpt.py"
    path.write_text(real_bundle.source, encoding="utf-8")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F811,F821,F822,F823", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert real_bundle.modules[-1] == ENTRY
    assert "common/text/sources.py" not in real_bundle.modules
    assert requirements(ROOT, real_bundle.imports)


def fake_run(folder: Path, seed: int, **changes) -> Path:
    folder.mkdir(parents=True)
    config = asdict(Config()) | read_preset("seed_bpe") | {"seed": seed, "run_id": folder.name} | changes
    summary = {
        "config": config, "seed": seed, "val_loss": 3.0 + seed / 10, "val_bpb": 1.2 + seed / 10, "val_tokens": 10,
        "val_bytes": 40, "eval_mode": "standard", "artifact_bytes": 15_000_000 + seed, "steps": 6000, "tokens": 9,
        "train_s": 599.0, "eval_s": 40.0, "world_size": 8,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (folder / "train.log").write_text(f"log of seed {seed}\n", encoding="utf-8")
    return folder


def test_papers_of_three_runs(tmp_path):
    runs = [fake_run(tmp_path / f"r{seed}", seed) for seed in (3, 1, 2)]
    out = tmp_path / "dist"
    out.mkdir()
    (out / "train_seed9.log").write_text("stale", encoding="utf-8")
    made, record = write_dist(out, "seed_bpe", runs, ABOUT)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "requirements.txt", "submission.json", "train_gpt.py",
        "train_seed1.log", "train_seed2.log", "train_seed3.log",
    ]  # fmt: skip
    assert json.loads((out / "submission.json").read_text(encoding="utf-8")) == record
    assert record["seeds"] == [1, 2, 3]
    assert record["val_bpb"] == pytest.approx(1.4)
    assert record["val_loss"] == pytest.approx(3.2)
    assert record["bytes_code"] == (out / "train_gpt.py").stat().st_size == made.code_bytes
    assert record["bytes_total"] == 15_000_003 + record["bytes_code"]
    assert record["seed_results"]["2"]["val_bpb"] == 1.4
    assert record["date"] is not None
    assert (out / "train_seed2.log").read_text(encoding="utf-8") == "log of seed 2\n"
    readme = (out / "README.md").read_text(encoding="utf-8")
    assert "| 1 | 1.30000 | 3.10000 | 15,000,001 |" in readme
    assert "no score" not in readme


def test_papers_without_runs_say_so(tmp_path):
    _, record = write_dist(tmp_path / "dist", "seed_bpe", [], ABOUT)
    assert record["val_bpb"] is None
    assert record["seed_results"] == {}
    assert "no score" in record["note"]
    assert "no score" in (tmp_path / "dist" / "README.md").read_text(encoding="utf-8")
    expected = "name github_id author blurb date val_loss val_bpb bytes_total bytes_code track seeds seed_results"
    assert set(expected.split()) <= set(record)


def test_runs_that_do_not_belong_together_are_refused(tmp_path):
    preset = read_preset("seed_bpe")
    with pytest.raises(DataError, match=r"summary\.json is missing"):
        read_runs([tmp_path], "seed_bpe", preset)
    good = fake_run(tmp_path / "a", 1, data_path="elsewhere", device="cuda")
    assert len(read_runs([good], "seed_bpe", preset)) == 1
    with pytest.raises(DataError, match="seed 1 was given twice"):
        read_runs([good, fake_run(tmp_path / "b", 1)], "seed_bpe", preset)
    with pytest.raises(DataError, match="num_layers is 3, not"):
        read_runs([fake_run(tmp_path / "c", 2, num_layers=3)], "seed_bpe", preset)
    assert submission_record(ABOUT | {"date": "2030-01-01"}, [], 5)["date"] == "2030-01-01"


def test_differences_name_the_place_and_times_do_not_count():
    assert differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) == []
    assert differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == ["a[1].b: 2 readable, 3 bundled"]
    assert differences({"a": 1}, {}) == ["a: 1 readable, None bundled"]
    assert differences([1], [1, 2]) == [": [1] readable, [1, 2] bundled"]
    assert timeless({"elapsed_s": 1, "x": [{"seconds": 2, "y": 3}]}) == {"x": [{"y": 3}]}


@pytest.fixture(scope="module")
def readable_run():
    return observe_readable("seed_bpe")


@pytest.mark.parametrize("form", ["plain", "packed"])
def test_the_bundle_is_the_entry_bit_for_bit(real_bundle, readable_run, form, tmp_path):
    path = tmp_path / "train_gpt.py"
    path.write_text(real_bundle.in_form(form).counted, encoding="utf-8")
    compare(readable_run, observe_bundled(path))
    assert [event["step"] for event in readable_run["log"] if event.get("event") == "step"] == [1, 2, 3, 4]
    assert any(event.get("event") == "validation" for event in readable_run["log"])
    assert set(readable_run["score"]["scores"]) == {"standard", "sliding", "carried"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("beta2: float = option(0.95", "beta2: float = option(0.9", r"config\.beta2: 0\.95 readable, 0\.9 bundled"),
        ("def momentum_at(step: int, config: Config) -> float:\n", "\\g<0>    return 0.5\n", r"log\[2\].*readable"),
    ],
    ids=["option", "code"],
)
def test_a_bundle_that_computes_something_else_is_found(real_bundle, readable_run, old, new, message, tmp_path):
    changed, count = re.subn(re.escape(old), new, real_bundle.source)
    assert count == 1
    path = tmp_path / "train_gpt.py"
    path.write_text(changed, encoding="utf-8")
    with pytest.raises(GolfError, match=message):
        compare(readable_run, observe_bundled(path))


def test_a_bundle_that_imports_common_is_found(real_bundle, tmp_path):
    path = tmp_path / "train_gpt.py"
    path.write_text(real_bundle.source.replace("import argparse\n", "import argparse\nimport common.errors\n", 1))
    with pytest.raises(GolfError, match="the bundle must not import common"):
        observe_bundled(path)


# Triton reads a kernel's source out of its file; here that is the bundle. A step takes all of our kernels.
STEP = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("bundled", sys.argv[1])
entry = sys.modules["bundled"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(entry)
torch = entry.torch
config = entry.Config(**json.loads(sys.argv[2]))
device = torch.device("cpu")
trainer = entry.Trainer(config, entry.select_kernels("triton", device), entry.Ranks(0, 1, device))
trainer.masters.publish(True)
tokens_BT = torch.arange(32).view(2, 16)
losses = trainer.step(entry.StepBatch(tokens_BT, tokens_BT + 1, tokens_BT.int(), {}), entry.Progress(0, 0.0))
print(json.dumps({name: float(value) for name, value in losses.items()}))
"""


@pytest.mark.slow
def test_kernels_run_out_of_the_bundle(real_bundle, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    plain, packed = tmp_path / "plain.py", tmp_path / "packed.py"
    for path, form in ((plain, "plain"), (packed, "packed")):
        path.write_text(real_bundle.in_form(form).counted, encoding="utf-8")
    config = {
        "tokenizer": "byte", "vocab_size": 256, "model_dim": 16, "num_layers": 1, "d_state": 16, "headdim": 16,
        "embed_dim": 16, "chunk_size": 16, "mlp_mult": 1, "train_seq_len": 16, "train_batch_tokens": 32,
        "sigreg_knots": 3, "sigreg_timesteps": 2, "jepa_steps": 1, "predictor_hidden_mult": 1, "muon_backend_steps": 1,
        "sigreg_num_proj": 8,
    }  # fmt: skip
    found = []
    for file in (plain, packed, ROOT / ENTRY):
        done = subprocess.run(
            [sys.executable, "-c", STEP, str(file), json.dumps(config)],
            env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT) if file == ROOT / ENTRY else ""},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1] == found[2]
    assert found[0]["loss"] > 0


def test_the_smallest_form_is_counted(real_bundle):
    plain, packed = real_bundle.in_form("plain"), real_bundle.in_form("packed")
    assert plain.counted == real_bundle.source
    assert packed.code_bytes == len(packed.counted.encode()) < 0.3 * plain.code_bytes
    assert real_bundle.in_form("smallest") == packed


def test_a_check_without_steps_is_no_check():
    with pytest.raises(GolfError, match="no training step"):
        compare({"log": []}, {"log": []})
