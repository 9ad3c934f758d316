"""containers/nvcc_sm90.py: the packages' nvcc commands with sm_90 as the only architecture, all else untouched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from containers.nvcc_sm90 import SM_90, for_sm90

SCRIPT = Path(__file__).resolve().parents[2] / "containers" / "nvcc_sm90.py"


def test_architectures_are_replaced():
    many = ["-O3", "-gencode", "arch=compute_75,code=sm_75", "-gencode", "arch=compute_90,code=sm_90", "--threads", "4",
            "-gencode=arch=compute_120,code=sm_120", "--generate-code", "arch=compute_80,code=sm_80", "-arch=sm_80",
            "-c", "a.cu", "-o", "a.o"]  # fmt: skip
    assert for_sm90(many) == ["-O3", "--threads", "4", "-c", "a.cu", "-o", "a.o", *SM_90]


@pytest.mark.parametrize("words", [["-V"], ["--version"], ["a.o", "-shared", "-o", "a.so"]])
def test_commands_that_compile_nothing_are_left_alone(words):
    assert for_sm90(words) == words


def test_it_becomes_nvcc(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\nsys.exit(7)\n", encoding="utf-8")
    nvcc.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_HOME"}
    line = [sys.executable, str(SCRIPT), "-gencode", "arch=compute_75,code=sm_75", "x.cu"]
    with_home = environment | {"CUDA_HOME": str(tmp_path)}
    done = subprocess.run(line, env=with_home, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (7, str(["x.cu", *SM_90]))
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "CUDA_HOME is not set" in done.stderr
    assert os.access(SCRIPT, os.X_OK)
