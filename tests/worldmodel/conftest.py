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


def pytest_configure(config: pytest.Config) -> None:
    """Workers, the processes that tests start and the next run of the tests share what was compiled, in pytest's cache.

    Compilation is most of the time of these tests, and many compile the same tiny models.
    """
    if not config.pluginmanager.has_plugin("cacheprovider"):  # switched off with -p no:cacheprovider
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    for name in ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"):
        os.environ.setdefault(name, "0")
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_dropped():
    """JAX keeps every program that it compiled: without this a worker grows to 5 GB over these tests."""
    yield
    statm = Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > _MOST_RESIDENT_BYTES:
        jax.clear_caches()
