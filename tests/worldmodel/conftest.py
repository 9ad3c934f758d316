"""Eight CPU devices for the mesh tests, and compilation that suits tests: set before JAX starts its backend."""

import os
from pathlib import Path

import jax
import pytest

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
# Tiny shapes run once or twice: optimizing their machine code costs a third of the time of these tests.
for _flag in ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"):
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

_MOST_RESIDENT_BYTES = 2_000_000_000


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_dropped():
    """JAX keeps every program that it compiled: without this a worker grows to 5 GB over these tests."""
    yield
    statm = Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > _MOST_RESIDENT_BYTES:
        jax.clear_caches()
