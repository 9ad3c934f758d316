"""Triton's kernels are interpreted in every test process on a machine without an NVIDIA driver.

Triton reads TRITON_INTERPRET when a kernel is decorated, hence before any test module is imported; this file is loaded
first in the main process and in every worker of pytest-xdist. So a test of a kernel is an ordinary test: it calls the
public function on tensors of `kernel_device`, runs by name, and on a machine with a GPU runs compiled. Tests that build
kernels ahead of time do so in processes of their own, without the variable.
"""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """Start every test from the same global random state, so that a failure comes back when it is run again."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the legacy global state is what such a draw would come from
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def kernel_device() -> str:
    """Where kernels run here: "cuda" compiled, "cpu" interpreted (keep shapes tiny). Skips without Triton."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: python -m pip install triton (Linux only)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        pytest.skip("an NVIDIA driver without a usable GPU; set TRITON_INTERPRET=1 to interpret the kernels")
    return "cuda"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what passing tests have recorded to be read, also from workers: figures that a log of CI should hold."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "figures":
                terminalreporter.section(report.nodeid)
                terminalreporter.write_line(str(text))
