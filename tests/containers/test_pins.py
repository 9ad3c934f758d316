"""What images are made from is pinned: bases by digest, packages by hash, Debian's by version, locks current."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from scripts.containers import DEBIAN_LOCKS, LOCKS, LOCKS_DIR, NO_DEPS, Lock, header, requirements

ROOT = Path(__file__).resolve().parents[2]
DIGEST = re.compile(r"^[^\s@]+:[^\s@]+@sha256:[0-9a-f]{64}$")
FETCHERS = re.compile(r"\b(curl|wget|git clone|git\+|apt-get install|apt install|npm|uv(?! pip uninstall))\b")
PIP = re.compile(r"\bpip3?\b.*\s(install|wheel|download)\b")


def instructions(text: str) -> list[tuple[str, str]]:
    """Instruction and argument of each logical line of a Dockerfile."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    found = [line.strip().split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(words[0].upper(), words[1] if len(words) > 1 else "") for words in found]


def dockerfile_problems(text: str) -> list[str]:
    """What in a Dockerfile is not pinned."""
    problems = []
    arguments: dict[str, str] = {}
    stages: set[str] = set()
    for name, rest in instructions(text):
        if name == "ARG" and not stages:
            key, _, value = rest.partition("=")
            arguments[key] = value
        elif name == "FROM":
            words = rest.split()
            base = re.sub(r"\$\{?(\w+)\}?", lambda match: arguments.get(match[1], ""), words[0])
            if base not in stages and not DIGEST.match(base):
                problems.append(f"FROM {words[0]}: {base or 'nothing'} is not name:tag@sha256:digest")
            stages.add(words[2] if len(words) > 2 else "")
        elif name in ("COPY", "ADD"):
            source = re.search(r"--from=(\S+)", rest)
            if source and source[1] not in stages and not DIGEST.match(source[1]):
                problems.append(f"{name} {source[0]}: not a stage of this file and not pinned")
            if "://" in rest:
                problems.append(f"{name} {rest}: fetches an address")
        elif name == "RUN":
            for mounted in re.findall(r"--mount=\S*\bfrom=([^\s,]+)", rest):
                if mounted not in stages and not DIGEST.match(mounted):
                    problems.append(f"RUN --mount from={mounted}: not a stage of this file and not pinned")
            for command in re.split(r"&&|\|\||;", rest):
                if PIP.search(command) and not re.search(r"--require-hashes|--no-index", command):
                    problems.append(f"pip without hashes: {command.strip()}")
                if not PIP.search(command) and FETCHERS.search(command):
                    problems.append(f"fetches without a pin: {command.strip()}")
    if "" not in stages:
        problems.append("no final stage")
    return problems


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lock_problems(lock: Lock, project: dict, no_deps: str, text: str) -> list[str]:
    """Where a lock is not what `make lock` would write from this pyproject.toml, or is not hashed."""
    pins = requirements(lock, project, no_deps)
    problems = []
    if not text.startswith(header(lock, project, pins)):
        problems.append(f"{lock.name}.lock was written from other pins: make lock")
    locked: dict[str, str] = {}
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for entry in re.sub(r" *\\\n *", " ", body).splitlines():
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)((?: --hash=sha256:[0-9a-f]{64})+)", entry.strip())
        if match is None:
            problems.append(f"{lock.name}.lock: not name==version with hashes: {entry.strip()[:60]}")
        else:
            locked[normal(match[1])] = match[2]
    for pin in pins:
        name, version = re.sub(r"\[.*\]|;.*", "", pin).strip().split("==")
        if locked.get(normal(name)) != version:
            problems.append(f"{lock.name}.lock has {name} {locked.get(normal(name))}, pyproject.toml {version}")
    return problems


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def no_deps() -> str:
    return (ROOT / NO_DEPS).read_text(encoding="utf-8")


def lock_text(lock: Lock) -> str:
    return (ROOT / LOCKS_DIR / f"{lock.name}.lock").read_text(encoding="utf-8")


DOCKERFILES = sorted((ROOT / "containers").glob("*.Dockerfile"))
GOOD_FROM = f"FROM a/b:1@sha256:{'0' * 64}\n"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_is_pinned(path):
    assert dockerfile_problems(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM python:3.11-slim\n", "is not name:tag@sha256"),
        ("ARG BASE=python:3.11\nFROM ${BASE}\n", "is not name:tag@sha256"),
        ("ARG BASE\nFROM $BASE\n", "nothing is not"),
        ("FROM python@sha256:12\n", "is not name:tag@sha256"),
        (f"FROM scratch AS a\n{GOOD_FROM}", "FROM scratch"),
        (f"{GOOD_FROM}COPY --from=alpine:3 /bin /bin\n", "not a stage"),
        (f"{GOOD_FROM}RUN --mount=type=bind,from=alpine:3,target=/x true\n", "not a stage"),
        (f"{GOOD_FROM}ADD https://example.org/x /x\n", "fetches an address"),
        (f"{GOOD_FROM}RUN pip install torch==2.13.0\n", "pip without hashes"),
        (f"{GOOD_FROM}RUN a --require-hashes && \\\n    /p/pip --python x wheel -r y\n", "pip without hashes"),
        (f"{GOOD_FROM}RUN /x/uv pip install -r y.lock\n", "pip without hashes"),
        (f"{GOOD_FROM}RUN uv tool install x\n", "fetches without a pin"),
        (f"{GOOD_FROM}RUN python3 -m pip install --no-deps -r a.lock\n", "pip without hashes"),
        (f"{GOOD_FROM}RUN apt-get update && apt-get install -y g++\n", "fetches without a pin"),
        (f"{GOOD_FROM}RUN curl -LO https://example.org/a.whl\n", "fetches without a pin"),
        (f"FROM a:1@sha256:{'0' * 64} AS only\n", "no final stage"),
    ],
)
def test_unpinned_dockerfile_is_found(text, message):
    found = dockerfile_problems(text)
    assert len(found) == 1, found
    assert message in found[0]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_lock_is_hashed_and_matches_pyproject(lock):
    assert lock_problems(lock, project(), no_deps(), lock_text(lock)) == []


def test_lock_that_does_not_match_is_found():
    lock = next(lock for lock in LOCKS if lock.name == "cpu")
    text, pins = lock_text(lock), project()
    newer = project()
    extra = newer["project"]["optional-dependencies"]["worldmodel"]
    extra[extra.index("flax==0.12.8") if "flax==0.12.8" in extra else 1] = "flax==99.0"
    found = lock_problems(lock, newer, no_deps(), text)
    assert len(found) == 2
    assert "other pins" in found[0]
    assert "pyproject.toml 99.0" in found[1]
    added = project()
    added["project"]["optional-dependencies"]["test"].append("no-such-package==1")
    assert any("no-such-package None" in line for line in lock_problems(lock, added, no_deps(), text))
    assert lock_problems(lock, pins, no_deps().replace("gym3==", "gym3==9"), text)
    unhashed = re.sub(r"^(tqdm==\S+) \\\n(    --hash.*\n)+", r"\1\n", text, flags=re.MULTILINE)
    assert unhashed != text
    assert [line for line in lock_problems(lock, pins, no_deps(), unhashed) if "tqdm" in line]
    for line in ("--index-url https://example.org/simple\n", "-e .\n", "a @ file:///tmp/a.whl\n"):
        assert lock_problems(lock, pins, no_deps(), text + line), line


def test_cuda_locks_hold_no_cpu_build():
    for lock in LOCKS:
        assert ("+cpu" in lock_text(lock)) == lock.cpu_torch


def test_every_lock_is_used_and_every_used_lock_is_there():
    used = {name for path in DOCKERFILES for name in re.findall(r"containers/locks/(\S+)", path.read_text("utf-8"))}
    assert used == {path.name for path in (ROOT / LOCKS_DIR).iterdir()}
    assert used == {f"{lock.name}.lock" for lock in LOCKS} | set(DEBIAN_LOCKS)


@pytest.mark.parametrize("name", DEBIAN_LOCKS)
def test_debian_packages_have_versions(name):
    lines = (ROOT / LOCKS_DIR / name).read_text(encoding="utf-8").splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert [line for line in packages if not re.fullmatch(r"[a-z0-9.+-]+=[0-9][A-Za-z0-9.+:~-]*", line)] == []
    assert {*DEBIAN_LOCKS[name], "libc6"} <= {line.split("=")[0] for line in packages}


def test_versions_agree_between_pyproject_and_uv_metadata():
    """The metadata that `make lock` resolves with is of the versions that are pinned."""
    pins = {pin for extra in project()["project"]["optional-dependencies"].values() for pin in extra}
    pins |= set(no_deps().splitlines())
    for entry in project()["tool"]["uv"]["dependency-metadata"]:
        assert f"{entry['name']}=={entry['version']}" in pins


def test_cuda_compiler_and_libraries_are_of_one_version():
    """What the CUDA sources are compiled with is installed over what they run with: shared packages agree."""
    locked = [
        dict(re.findall(r"^(\S+)==(\S+) \\$", lock_text(lock), re.MULTILINE))
        for lock in LOCKS
        if "cuda-build" in lock.extras or "gpu" in lock.extras
    ]
    shared = set(locked[0]) & set(locked[1])
    assert "nvidia-cuda-runtime" in shared
    assert {name: locked[0][name] for name in shared} == {name: locked[1][name] for name in shared}
