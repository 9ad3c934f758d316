"""Locks, images and bills of materials: `containers.py lock | build | sbom`. containers/README.md has the recipes.

Builds use docker where its engine answers, otherwise buildah (chroot isolation, so that neither an engine nor a network
bridge is needed) and podman to run. An image is built from a folder of the tracked files with plain modes and one date,
so the same commit gives the same layer of our files on every machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError, GolfError
from common.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
LOCKS_DIR = "containers/locks"
NO_DEPS = "containers/coinrun.no-deps.txt"
PYTHON_VERSION = "3.11"
PLATFORM = "x86_64-manylinux_2_28"
IMAGES = ("cpu", "lm", "worldmodel")
# What replaces the base of the Dockerfiles where no image registry can be reached: Debian 12 with its own Python 3.11
# and the headers that Triton and the packages' sources include.
STAND_IN = "localhost/golf-base:bookworm"
STAND_IN_PACKAGES = "ca-certificates,python3-venv,libpython3.11-dev"
# Lock files of Debian packages: compilers for Triton and the CUDA sources; what procgen's library is linked to.
DEBIAN_LOCKS = {"debian-toolchain.txt": ("g++",), "debian-coinrun.txt": ("libgl1", "libglib2.0-0")}


@dataclass(frozen=True)
class Lock:
    """One lock file: which parts of pyproject.toml it pins with hashes."""

    name: str
    extras: tuple[str, ...] = ()
    build_system: bool = False
    coinrun: bool = False  # with the packages of coinrun.no-deps.txt
    cpu_torch: bool = False


LOCKS = (
    Lock("installer", ("installer",)),
    Lock("build", build_system=True),
    Lock("cpu", ("lm", "worldmodel", "coinrun", "test"), coinrun=True, cpu_torch=True),
    Lock("lm", ("lm", "gpu", "test")),
    Lock("worldmodel", ("worldmodel", "worldmodel-gpu", "coinrun", "test"), coinrun=True),
    Lock("cuda-build", ("cuda-build",)),
)


# ---------------------------------------------------------------------------------------------------------------------
# Locks
# ---------------------------------------------------------------------------------------------------------------------


def requirements(lock: Lock, project: Mapping[str, Any], no_deps: str) -> list[str]:
    """The pins that a lock starts from, sorted.

    Args:
        lock: which extras.
        project: pyproject.toml, parsed.
        no_deps: text of coinrun.no-deps.txt.

    Raises:
        ConfigError: an extra is not in pyproject.toml.
    """
    extras = project["project"]["optional-dependencies"]
    found = set(project["build-system"]["requires"]) if lock.build_system else set()
    waiting = list(lock.extras)
    while waiting:
        extra = waiting.pop()
        if extra not in extras:
            raise ConfigError(f"pyproject.toml has no extra {extra!r}, which {lock.name}.lock is to pin")
        for requirement in extras[extra]:
            own = re.fullmatch(rf"{re.escape(project['project']['name'])}\[(.+)\]", requirement)
            waiting += own[1].split(",") if own else []
            found |= set() if own else {requirement}
    if lock.coinrun:
        found |= {line.strip() for line in no_deps.splitlines() if line.strip() and not line.startswith("#")}
    if lock.cpu_torch:
        found = {re.sub(r"^(torch==[^+]+)$", r"\1+cpu", requirement) for requirement in found}
    return sorted(found)


def header(lock: Lock, project: Mapping[str, Any], pins: Sequence[str]) -> str:
    """First lines of a lock: what it is, and the digest of everything that it was resolved from."""
    metadata = project["tool"]["uv"]["dependency-metadata"]
    inputs = [*pins, *sorted(map(repr, metadata)), PYTHON_VERSION, PLATFORM]
    digest = hashlib.sha256("\n".join(inputs).encode()).hexdigest()
    parts = ", ".join([*lock.extras, *(["build-system"] if lock.build_system else [])])
    return (
        f"# Written by `make lock` from pyproject.toml ({parts}); Python {PYTHON_VERSION}, {PLATFORM}.\n"
        f"# inputs: sha256:{digest}\n"
    )


def write_lock(lock: Lock, root: Path, more: Sequence[str]) -> Path:
    """Resolve a lock with uv. Versions of an existing lock are kept unless `more` says --upgrade. Raises GolfError."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    pins = requirements(lock, project, (root / NO_DEPS).read_text(encoding="utf-8"))
    target = root / LOCKS_DIR / f"{lock.name}.lock"
    # Only the CPU lock may look beside the ordinary index, or the CUDA locks would take torch's CPU build as well.
    beside = set() if lock.cpu_torch else {"UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS"}
    environment = {name: value for name, value in os.environ.items() if name not in beside}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / target.name
        if target.exists():
            shutil.copy(target, out)
        line = [sys.executable, "-m", "uv", "pip", "compile", "-", "--generate-hashes", "--output-file", str(out)]
        quiet = ["--quiet", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
        done = subprocess.run(
            [*line, *quiet, "--python-version", PYTHON_VERSION, "--python-platform", PLATFORM, *more],
            cwd=root,
            env=environment,
            input="\n".join(pins) + "\n",
            stdout=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            hint = " (torch's CPU build: name the index or folder that holds it in UV_INDEX or UV_FIND_LINKS)"
            raise GolfError(f"uv could not resolve {target.name}; its message is above{hint if lock.cpu_torch else ''}")
        body = out.read_text(encoding="utf-8")
    write_atomically(target, (header(lock, project, pins) + body).encode())
    return target


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def tag(image: str) -> str:
    return f"localhost/latent-golf:{image}"


def docker_answers() -> bool:
    """Whether a docker engine can be reached, not only its command line."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


def storage() -> list[str]:
    return ["--storage-driver", "overlay"]


def podman(*words: str) -> list[str]:
    return ["podman", *storage(), "--cgroup-manager", "cgroupfs", "--runtime", "runc", *words]


def engine(*words: str) -> list[str]:
    """A docker or podman command of the same words."""
    return ["docker", *words] if docker_answers() else podman(*words)


def check_tools() -> None:
    """Raises ConfigError when neither a docker engine nor buildah, podman and runc are here."""
    missing = [name for name in ("buildah", "podman", "runc") if shutil.which(name) is None]
    if missing and not docker_answers():
        raise ConfigError(
            f"no docker engine answers and {', '.join(missing)} is not installed; on Debian or Ubuntu: "
            "apt-get install buildah podman runc mmdebstrap"
        )


def source_date_epoch(environ: Mapping[str, str], root: Path) -> int:
    """SOURCE_DATE_EPOCH, or the date of the last commit (0 outside git), in seconds. Raises ConfigError."""
    given = environ.get("SOURCE_DATE_EPOCH")
    if given is not None:
        if not given.isdecimal():
            raise ConfigError(f"SOURCE_DATE_EPOCH={given!r} is not a number of seconds")
        return int(given)
    asked = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=root, capture_output=True, text=True, check=False)
    return int(asked.stdout) if asked.returncode == 0 and asked.stdout.strip() else 0


def revision(root: Path) -> str:
    """The commit, with `-dirty` when tracked files differ from it; `unknown` outside git."""

    def ask(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    return "unknown" if commit is None else commit + ("-dirty" if ask("status", "--porcelain", "-uno") else "")


def stage_context(root: Path, into: Path, epoch: int) -> list[str]:
    """Copy the tracked files, as they are in the working tree, with plain modes and one date.

    Args:
        root: a git checkout.
        into: empty folder.
        epoch: date of every file and folder, in seconds.

    Returns:
        their paths.

    Raises:
        ConfigError: not a git checkout.
    """
    listed = subprocess.run(["git", "ls-files", "-z", "--stage"], cwd=root, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        raise ConfigError(f"{root} is not a git checkout: images hold the tracked files, and git lists none")
    paths = []
    for entry in filter(None, listed.stdout.split("\0")):
        fields, path = entry.split("\t", 1)
        source, target = root / path, into / path
        if not source.is_file():
            continue  # deleted in the working tree, not yet in the index
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755 if fields.startswith("100755") else 0o644)
        os.utime(target, (epoch, epoch))
        paths.append(path)
    for folder, _, _ in os.walk(into, topdown=False):
        os.chmod(folder, 0o755)
        os.utime(folder, (epoch, epoch))
    return sorted(paths)


def pip_setup(configured: str) -> tuple[list[str], list[str], list[Path]]:
    """What pip is configured with on this machine, for the pip and the uv of a build.

    Args:
        configured: output of `pip config list`.

    Returns:
        index options that both know; build arguments for certificates, by the names that the two read from their
        environment; the local paths in all of these.
    """
    flags: list[str] = []
    certificates: list[str] = []
    paths: list[Path] = []
    for line in configured.splitlines():
        key, _, quoted = line.partition("=")
        name = key.rsplit(".", 1)[-1]
        if name not in ("index-url", "extra-index-url", "find-links", "cert"):
            continue
        for value in quoted.strip("'\"").split():
            if value.startswith("file://") or f"--{name}={value}" in flags:
                continue  # a local index holds links out of its folder: mount it with BUILD_FLAGS where it is needed
            if name == "cert":
                certificates = [f"PIP_CERT={value}", f"SSL_CERT_FILE={value}"]
            else:
                flags.append(f"--{name}={value}")
            if value.startswith("/"):
                paths.append(Path(value))
    return flags, certificates, sorted(set(paths))


@dataclass(frozen=True)
class Built:
    """A built image: seconds that the build took, bytes that it has, digests of its layers."""

    image: str
    seconds: float
    size_bytes: int
    layers: tuple[str, ...]


def inspect_image(image: str, seconds: float = 0.0) -> Built:
    """Size and layers of a built image. Raises GolfError when it is not there."""
    form = "{{.Size}}{{range .RootFS.Layers}} {{.}}{{end}}"
    asked = subprocess.run(engine("image", "inspect", "--format", form, tag(image)), capture_output=True, text=True)
    if asked.returncode != 0:
        raise GolfError(f"there is no image {tag(image)}: {asked.stderr.strip()}; make containers")
    size, *layers = asked.stdout.split()
    return Built(image, seconds, int(size), tuple(layers))


def build_stand_in() -> str:
    """Make the stand-in base from Debian's archive, where it is not there yet. Returns its tag. Raises GolfError."""
    if subprocess.run(podman("image", "exists", STAND_IN), capture_output=True, check=False).returncode == 0:
        return STAND_IN
    with tempfile.TemporaryDirectory() as folder:
        tar = str(Path(folder) / "base.tar")
        run_or_raise(["mmdebstrap", "--quiet", "--variant=minbase", f"--include={STAND_IN_PACKAGES}", "bookworm", tar])
        run_or_raise(podman("import", tar, STAND_IN))
    return STAND_IN


def choose_base(image: str, given: str, root: Path) -> str:
    """The base to build on: the one given, else "" for the pinned one where it can be had, else the stand-in.

    The last is said aloud: such an image tests everything of ours but not the pinned base.
    """
    if given or docker_answers():
        return given
    text = (root / "containers" / f"{image}.Dockerfile").read_text(encoding="utf-8")
    pinned = re.findall(r"^ARG BASE=(\S+)", text, re.MULTILINE)[0]
    pulled = subprocess.run(["buildah", *storage(), "pull", "-q", pinned], capture_output=True, text=True, check=False)
    if pulled.returncode == 0:
        return ""
    print(f"containers: {pinned} cannot be pulled ({pulled.stderr.strip()[-160:]})")
    print(f"containers: NOT EXERCISED: the pinned base. {STAND_IN}, made from Debian's archive, stands in for it.")
    return build_stand_in()


def run_or_raise(line: Sequence[str]) -> None:
    """Run a command, its output on ours. Raises GolfError."""
    if subprocess.run(line, check=False).returncode != 0:
        raise GolfError(f"`{shlex.join(line)}` failed; its message is above")


def build_line(image: str, context: Path, base: str, epoch: int, more: Sequence[str], uses_docker: bool) -> list[str]:
    """The command that builds an image from a staged context.

    Args:
        image: cpu, lm or worldmodel.
        base: another base image, or "" for the one that the Dockerfile pins.
        epoch: date of every file in the layers, in seconds.
        more: flags added, such as mounts.
        uses_docker: docker's own builder, otherwise buildah.
    """
    dockerfile = ["--file", str(context / "containers" / f"{image}.Dockerfile"), "--tag", tag(image)]
    arguments = ["--build-arg", f"BASE={base}"] if base else []
    if uses_docker:
        output = ["--output", f"type=docker,name={tag(image)},rewrite-timestamp=true"]
        dates = ["--build-arg", f"SOURCE_DATE_EPOCH={epoch}"]
        return ["docker", "buildx", "build", *dockerfile, *output, *dates, *arguments, *more, str(context)]
    how = ["--isolation", "chroot", "--layers", "--timestamp", str(epoch)]
    return ["buildah", *storage(), "bud", *how, *dockerfile, *arguments, *more, str(context)]


def build(image: str, root: Path, base: str, environ: Mapping[str, str], more: Sequence[str]) -> Built:
    """Build one image. Raises GolfError."""
    uses_docker = docker_answers()
    configured = subprocess.check_output([sys.executable, "-m", "pip", "config", "list"], text=True)
    flags, certificates, paths = pip_setup(configured)
    flags += shlex.split(environ.get("PIP_FLAGS", ""))
    labels = {"revision": revision(root), "base.name": base or "pinned in the Dockerfile"}
    given = [word for value in (f"PIP_FLAGS={shlex.join(flags)}", *certificates) for word in ("--build-arg", value)]
    given += [word for key, value in labels.items() for word in ("--label", f"org.opencontainers.image.{key}={value}")]
    if uses_docker:
        if paths:
            print(f"containers: docker's builder mounts nothing; pip cannot see {', '.join(map(str, paths))} in there")
    else:
        given += [word for path in paths if path.exists() for word in ("--volume", f"{path}:{path}:ro")]
    epoch = source_date_epoch(environ, root)
    with tempfile.TemporaryDirectory() as folder:
        context = Path(folder)
        stage_context(root, context, epoch)
        began_s = time.perf_counter()
        run_or_raise(build_line(image, context, base, epoch, [*given, *more], uses_docker))
        seconds = time.perf_counter() - began_s
    return inspect_image(image, seconds)


def run_line(image: str, arguments: Sequence[str], mounts: Mapping[Path, str], more: Sequence[str] = ()) -> list[str]:
    """The command that runs an image as an evaluation does: no network, nothing writable but /tmp and what is mounted.

    Args:
        mounts: folder or file here -> `PATH:ro` or `PATH` in the container.
        more: further flags of the engine.
    """
    # Podman alone makes /run and /var/tmp writable under --read-only unless told not to.
    own = ["--read-only-tmpfs=false", "--ulimit", "nofile=1024:20000", "--ulimit", "nproc=4096:4096"]
    limits = [] if docker_answers() else own
    closed = ["--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp", *limits]
    volumes = [word for here, there in mounts.items() for word in ("--volume", f"{here.resolve()}:{there}")]
    return engine("run", *closed, *volumes, *more, tag(image), *arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Debian packages and bills of materials
# ---------------------------------------------------------------------------------------------------------------------


# Run in a base: install, then list with versions what was asked for and everything that it depends on.
CLOSURE = """set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq >&2
apt-get install -qq -y --no-install-recommends "$@" >&2
apt-cache depends --recurse --installed --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
    --no-enhances "$@" | grep -E '^[a-z0-9]' | sort -u |
    xargs dpkg-query -W -f '${db:Status-Abbrev} ${Package}=${Version}\n' 2>/dev/null | sed -n 's/^ii *//p' | sort -u
"""


def write_debian_lock(name: str, root: Path) -> Path:
    """Pin Debian packages and all that they depend on, at the versions of Debian's archive today. Raises GolfError."""
    base = build_stand_in()
    line = ["buildah", *storage(), "from", base]
    container = subprocess.check_output(line, text=True).strip()
    try:
        run = ["buildah", *storage(), "run", "--isolation", "chroot", container, "--", "sh", "-c", CLOSURE, "sh"]
        listed = subprocess.run([*run, *DEBIAN_LOCKS[name]], stdout=subprocess.PIPE, text=True, check=False)
    finally:
        subprocess.run(["buildah", *storage(), "rm", container], stdout=subprocess.DEVNULL, check=False)
    if listed.returncode != 0 or not listed.stdout.strip():
        raise GolfError("Debian's packages could not be listed; the message is above")
    date = time.strftime("%Y-%m-%d", time.gmtime())
    head = (
        f"# Written by `make lock ARGS=--debian`: {' '.join(DEBIAN_LOCKS[name])} on Debian 12, amd64, as of {date}.\n"
        "# When a version has left the archive, give the archive of that date as APT_MIRROR (containers/README.md).\n"
    )
    target = root / LOCKS_DIR / name
    write_atomically(target, (head + listed.stdout).encode())
    return target


def check_audit(report: Mapping[str, Any], name: str) -> None:
    """Raises GolfError when pip-audit left packages out, which it takes for success."""
    skipped = [entry["name"] for entry in report["dependencies"] if "skip_reason" in entry]
    if skipped:
        raise GolfError(
            f"{name}: {len(skipped)} of {len(report['dependencies'])} packages were not audited, the first "
            f"{skipped[0]}: the vulnerability service does not answer for them here"
        )


def write_sbom(lock: Lock, root: Path, out: Path, audit: bool) -> list[Path]:
    """CycloneDX bill of materials of a lock and, when asked for, pip-audit's report. Raises GolfError."""
    out.mkdir(parents=True, exist_ok=True)
    source, target = root / LOCKS_DIR / f"{lock.name}.lock", out / f"{lock.name}.cdx.json"
    # Not the machine's index: addresses do not belong into a bill of materials.
    form = ["--output-reproducible", "--of", "JSON", "--short-PURLs", "--pyproject", str(root / "pyproject.toml")]
    run_or_raise([sys.executable, "-m", "cyclonedx_py", "requirements", str(source), *form, "-o", str(target)])
    if not audit:
        return [target]
    found = out / f"{lock.name}.audit.json"
    tool = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "--format", "json"]
    run_or_raise([*tool, "--output", str(found), "--requirement", str(source)])
    check_audit(json.loads(found.read_text(encoding="utf-8")), found.name)
    return [target, found]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Locks, images and bills of materials.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    lock = commands.add_parser(
        "lock", allow_abbrev=False, help="resolve pyproject.toml into containers/locks (needs uv)"
    )
    lock.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    lock.add_argument("--debian", action="store_true", help="Debian's packages too (needs buildah, mmdebstrap)")
    make = commands.add_parser("build", allow_abbrev=False, help="build images; unknown flags go to the builder")
    make.add_argument("images", nargs="*", metavar="IMAGE", help=f"of {', '.join(IMAGES)} (default: cpu)")
    make.add_argument("--base", default="", help="base image instead of the pinned one")
    sbom = commands.add_parser("sbom", allow_abbrev=False, help="CycloneDX bills of materials (needs cyclonedx-bom)")
    sbom.add_argument("--out", type=Path, default=ROOT / "dist" / "sbom", help="folder")
    sbom.add_argument("--audit", action="store_true", help="known vulnerabilities too (needs a network)")
    given, more = parser.parse_known_args(argv)
    try:
        if more and given.command != "build":
            raise ConfigError(f"unknown argument {more[0]!r} (--help lists all)")
        if given.command == "lock":
            for one in LOCKS:
                print(write_lock(one, ROOT, ["--upgrade"] if given.upgrade else []).relative_to(ROOT))
            if given.debian:
                for name in DEBIAN_LOCKS:
                    print(write_debian_lock(name, ROOT).relative_to(ROOT))
        elif given.command == "build":
            unknown = sorted(set(given.images) - set(IMAGES))
            if unknown:
                raise ConfigError(f"unknown image {unknown[0]!r}; there are {', '.join(IMAGES)}")
            check_tools()
            if not docker_answers():
                print("containers: NOT EXERCISED: docker. No engine of it answers: buildah builds and podman runs.")
            for image in given.images or ["cpu"]:
                built = build(image, ROOT, choose_base(image, given.base, ROOT), os.environ, more)
                print(f"{tag(image)}: built in {built.seconds:.0f} s, {built.size_bytes / 1e9:.2f} GB")
        else:
            for one in LOCKS:
                for path in write_sbom(one, ROOT, given.out, given.audit):
                    print(path)
            if not given.audit:
                print("known vulnerabilities were not looked up: that needs a network (make sbom ARGS=--audit)")
    except GolfError as error:
        print(f"containers: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
