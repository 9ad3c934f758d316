"""The built images, run as an evaluation runs them: no network, read-only root, another user. `make container-test`.

An image that is not built, or a part that cannot be exercised here, skips by name: the summary lists all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import GolfError
from scripts.containers import (
    IMAGES,
    LOCKS_DIR,
    Built,
    build,
    check_tools,
    choose_base,
    inspect_image,
    run_line,
)
from scripts.verifier_mutants import make_bench
from tests.containers.conftest import TinyRun
from tests.containers.test_pins import normal
from tests.submissions.jepa_mamba.conftest import flags, losses_of

pytestmark = pytest.mark.container

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ("--entrypoint", "/opt/venv/bin/python")
LARGEST_CPU_BYTES = 3_500_000_000
# The two have one PyTorch build and one CPU: bits per byte differ by nothing, or by what the issue allows.
LARGEST_DIFFERENCE_BPB = 1e-9


@pytest.fixture(scope="module", params=IMAGES)
def image(request: pytest.FixtureRequest) -> str:
    return built(request.param).image


def built(name: str) -> Built:
    try:
        check_tools()
        return inspect_image(name)
    except GolfError as error:
        pytest.skip(f"NOT EXERCISED: {name} image: {error}")


@pytest.fixture(scope="module", params=["cpu"])  # a parameter, so that `-k cpu` finds these tests too
def cpu(request: pytest.FixtureRequest) -> str:
    return built(request.param).image


def run(
    image: str, *arguments: str, mounts: dict[Path, str] | None = None, more: Sequence[str] = (), status: int = 0
) -> subprocess.CompletedProcess[str]:
    line = run_line(image, arguments, mounts or {}, ["--env", "OMP_NUM_THREADS=1", *more])
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def writable(folder: Path) -> Path:
    """A new folder that the container's user may write."""
    folder.mkdir()
    folder.chmod(0o777)
    return folder


def python(image: str, code: str, mounts: dict[Path, str] | None = None) -> str:
    return run(image, "-c", code, mounts=mounts, more=PYTHON).stdout


def score_outside(artifact: Path, data: Path) -> dict:
    line = [sys.executable, str(ROOT / "containers" / "entrypoint.py"), "score"]
    done = subprocess.run(
        [*line, "--artifact", str(artifact), "--val", str(data)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_same_score(inside: dict, outside: dict) -> None:
    assert abs(inside["bpb"] - outside["bpb"]) <= LARGEST_DIFFERENCE_BPB
    assert (inside["tokens"], inside["bytes"]) == (outside["tokens"], outside["bytes"])
    assert re.fullmatch(r"[0-9a-f]{64}", inside["sha256"]["image"])
    assert inside["sha256"] | {"image": None} == outside["sha256"]
    assert inside["hardware"] == outside["hardware"]


def test_cpu_image_is_small(cpu):
    assert inspect_image(cpu).size_bytes <= LARGEST_CPU_BYTES


def test_installed_is_what_the_lock_says(image):
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    installed = {normal(name): version for name, version in json.loads(python(image, code)).items()}
    text = (ROOT / LOCKS_DIR / f"{image}.lock").read_text(encoding="utf-8")
    assert installed == {
        normal(name): version for name, version in re.findall(r"^(\S+)==(\S+) \\$", text, re.MULTILINE)
    }


CLOSED = """
import json, os, socket
def refused(work):
    try:
        work()
    except OSError as error:
        return error.strerror
    return "done"
print(json.dumps({
    "uid": os.getuid(), "gid": os.getgid(),
    "writes": {path: refused(lambda: open(os.path.join(path, "x"), "w")) for path in
               ("/", "/golf", "/opt/venv", "/etc", "/var/tmp", "/run", "/out", "/tmp")},
    "interfaces": sorted(os.listdir("/sys/class/net")),
    "connect": refused(lambda: socket.create_connection(("192.0.2.1", 80), timeout=5)),
}))
"""


def test_nothing_runs_as_root_reaches_a_network_or_writes_but_to_tmp(image):
    found = json.loads(python(image, CLOSED))
    assert (found["uid"], found["gid"]) == (10001, 10001)
    assert found["writes"].pop("/tmp") == "done"
    assert set(found["writes"].values()) == {"Read-only file system"}
    assert found["interfaces"] == ["lo"]
    assert found["connect"] == "Network is unreachable"


def test_manifest_is_of_what_is_in_the_image(image):
    listed = run(image, "/golf/containers/manifest.py", "/opt/venv", "/golf", more=PYTHON).stdout
    stored = python(image, "print(open('/golf/image.manifest').read(), end='')")
    assert listed == stored
    assert len(stored.splitlines()) > 5000


def test_entry_point_answers(image):
    assert "usage: COMMAND" in run(image).stdout
    assert "unknown command 'bash'" in run(image, "bash", status=2).stderr
    if image == "worldmodel":
        assert "score needs torch" in run(image, "score", status=2).stderr
        assert "coinrun" in run(image, "worldmodel", "--help").stdout
    else:
        assert "--preset" in run(image, "train", "--help").stdout
        assert "--no_such" in run(image, "train", "--no_such", "1", status=2).stderr
    if image == "lm":
        assert "coinrun needs jax" in run(image, "coinrun", status=2).stderr


def test_tests_run_inside(image):
    path = "tests/worldmodel/models/test_quantizer.py" if image == "worldmodel" else "tests/common/quant"
    assert re.search(r"\d+ passed", run(image, "test", "-q", f"/golf/{path}").stdout)


def test_score_is_that_of_outside_twice_and_without_a_shell(cpu, tiny_run: TinyRun):
    mounts = {tiny_run.artifact: "/in:ro", tiny_run.data: "/val:ro"}
    first = json.loads(run(cpu, "score", mounts=mounts).stdout)
    no_shell = ["--volume", "/dev/null:/bin/sh:ro", "--volume", "/dev/null:/bin/bash:ro"]
    second = json.loads(run(cpu, "score", mounts=mounts, more=no_shell).stdout)
    assert first | {"seconds": 0} == second | {"seconds": 0}
    assert_same_score(first, score_outside(tiny_run.artifact, tiny_run.data))


def test_demo_inside_and_its_score(cpu, tmp_path):
    """A few steps of `demo`: its model, text and artifact have their real size, its weights are hardly trained."""
    out = writable(tmp_path / "out")
    few = ["--iterations", "4", "--max_wallclock_seconds", "0", "--val_loss_every", "0"]
    assert "xz" in run(cpu, "demo", *few, mounts={out: "/out"}).stdout
    artifact, data = out / "runs" / "demo" / "model.artifact", out / "data" / "stdlib-bpe1024"
    assert artifact.stat().st_size > 500_000
    inside = json.loads(run(cpu, "score", mounts={artifact: "/in:ro", data: "/val:ro"}).stdout)
    assert_same_score(inside, score_outside(artifact, data))


def test_verify_judges_a_mounted_submission(cpu, tmp_path):
    """Every family of checks, staged runs included, on a good submission of three tiny seeds."""
    bench = make_bench(tmp_path / "good")
    out = writable(tmp_path / "out")
    mounts = {bench.dist: "/in:ro", bench.data: "/val:ro", bench.record: "/record:ro", out: "/out"}
    given = ["/in", "--data", "/val", "--against", "/record", "--json", "/out/report.json", "--threads", "1"]
    printed = run(cpu, "verify", *given, mounts=mounts).stdout
    found = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert (found["verdict"], found["count"]["failed"]) == ("passed", 0), printed
    assert found["count"]["passed"] > 30


def test_damaged_input_is_refused(cpu, tiny_run: TinyRun, tmp_path):
    tmp_path.chmod(0o755)
    bad = tmp_path / "model.artifact"
    bad.write_bytes(tiny_run.artifact.read_bytes()[:-1])
    mounts = {tmp_path: "/in:ro", tiny_run.data: "/val:ro"}
    done = run(cpu, "score", mounts=mounts, status=2)
    assert done.stdout == ""
    assert "ArtifactError" in done.stderr
    tmp_path.chmod(0o700)
    assert "user 10001 may not read it" in run(cpu, "score", mounts=mounts, status=2).stderr
    tmp_path.chmod(0o755)


def test_twenty_training_steps_are_bitwise_those_of_outside(cpu, tiny_run: TinyRun, tmp_path):
    out = writable(tmp_path / "out")
    arguments = [*flags(), "--data_path=/data", "--runs_dir=/out", "--run_id=run"]
    run(cpu, "train", *arguments, mounts={tiny_run.data: "/data:ro", out: "/out"})
    inside, outside = losses_of(out / "run"), losses_of(tiny_run.folder)
    assert len(outside) == 20
    assert inside == outside
    assert {path.stat().st_uid for path in out.rglob("*")} == {10001}
    digests = [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (out / "run/model.artifact", tiny_run.artifact)
    ]
    assert digests[0] == digests[1]


@pytest.fixture(scope="module", params=["cpu", "worldmodel"])
def with_games(request: pytest.FixtureRequest) -> str:
    return built(request.param).image


def test_coinrun_in_miniature(with_games):
    """`coinrun` from recording to its page with a tiny profile: the game's library lacks nothing in the image."""
    chosen = ["-q", "-m", "slow", "/golf/tests/worldmodel/test_cli.py", "-k", "coinrun_in_miniature"]
    assert "1 passed" in run(with_games, "test", *chosen, more=["--env", "JAX_PLATFORMS=cpu"]).stdout
    assert "profile" in run(with_games, "coinrun", "--help").stdout


@pytest.mark.parametrize(
    "package", ["torch", "triton", "mamba_ssm", "causal_conv1d", "selective_scan_cuda", "causal_conv1d_cuda"]
)
def test_lm_image_imports(package):
    assert python(built("lm").image, f"import torch, {package}; print('imported')").strip() == "imported"


def test_lm_image_has_the_cuda_build_and_a_compiler():
    code = "import torch, shutil; print(torch.version.cuda, torch.cuda.get_arch_list(), shutil.which('gcc'))"
    version, _, gcc = python(built("lm").image, code).strip().partition(" ")
    assert version.startswith("13.")
    assert gcc.endswith("/usr/bin/gcc")


def test_lm_image_scores_on_a_cpu(tiny_run: TinyRun):
    mounts = {tiny_run.artifact: "/in:ro", tiny_run.data: "/val:ro"}
    inside = json.loads(run(built("lm").image, "score", mounts=mounts).stdout)
    assert abs(inside["bpb"] - tiny_run.summary["val_bpb"]) <= 1e-6  # another build of PyTorch


def test_worldmodel_image_imports():
    names = "jax, flax, grain, orbax.checkpoint, optax, procgen, jax_cuda13_plugin, worldmodel.coinrun"
    code = f"import {names}; print('imported')"
    assert "imported" in python(built("worldmodel").image, code)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lm", "worldmodel"])
def test_images_see_the_gpu(name):
    if shutil.which("nvidia-smi") is None:
        pytest.skip("NOT EXERCISED: CUDA in the images: no NVIDIA GPU here")
    code = {
        "lm": "import torch; print(torch.cuda.is_available())",
        "worldmodel": "import jax; print(jax.devices('gpu'))",
    }
    more = ["--gpus", "all", *PYTHON]
    assert run(built(name).image, "-c", code[name], more=more).stdout.strip() not in ("False", "[]")


def test_building_again_gives_the_same_layers(cpu):
    """Everything built anew, without a cache: the layers of our files and of the environment are the same."""
    if not os.environ.get("CONTAINER_REBUILD"):
        pytest.skip("NOT EXERCISED: a second build from nothing (minutes): CONTAINER_REBUILD=1")
    before = inspect_image(cpu)
    again = build(cpu, ROOT, choose_base(cpu, "", ROOT), os.environ, ["--no-cache"])
    assert replace(again, seconds=0.0).layers == before.layers
