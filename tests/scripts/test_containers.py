"""scripts/containers.py: what it locks, what it stages, and the commands that it makes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from common.errors import ConfigError, GolfError
from scripts import containers
from scripts.containers import (
    Lock,
    build_line,
    check_audit,
    check_tools,
    choose_base,
    header,
    main,
    pip_setup,
    requirements,
    run_line,
    source_date_epoch,
    stage_context,
)

PROJECT = {
    "project": {
        "name": "golf",
        "optional-dependencies": {
            "a": ["torch==2.0", "numpy==2.1"], "b": ["golf[a]", "jax[cuda13]==0.1"], "c": ["x==1"],
        },
    },
    "build-system": {"requires": ["setuptools==80"]},
    "tool": {"uv": {"dependency-metadata": [{"name": "x", "version": "1"}]}},
}  # fmt: skip


def test_requirements_follow_extras():
    assert requirements(Lock("l", ("b",)), PROJECT, "") == ["jax[cuda13]==0.1", "numpy==2.1", "torch==2.0"]
    assert requirements(Lock("l", ("a",), cpu_torch=True), PROJECT, "") == ["numpy==2.1", "torch==2.0+cpu"]
    assert requirements(Lock("l", build_system=True), PROJECT, "gym==1") == ["setuptools==80"]
    assert requirements(Lock("l", ("c",), coinrun=True), PROJECT, "# why\n\ngym==1\n") == ["gym==1", "x==1"]
    with pytest.raises(ConfigError, match="no extra 'd'"):
        requirements(Lock("l", ("d",)), PROJECT, "")


def test_header_changes_with_every_input():
    lock = Lock("l", ("a",))
    heads = {header(lock, PROJECT, pins) for pins in ([], ["a==1"], ["a==2"])}
    other = PROJECT | {"tool": {"uv": {"dependency-metadata": []}}}
    assert len(heads | {header(lock, other, [])}) == 4


def test_source_date_epoch(tmp_path):
    assert source_date_epoch({"SOURCE_DATE_EPOCH": "12"}, tmp_path) == 12
    assert source_date_epoch({}, tmp_path) == 0
    with pytest.raises(ConfigError, match="'soon' is not a number"):
        source_date_epoch({"SOURCE_DATE_EPOCH": "soon"}, tmp_path)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    (root / "sub").mkdir(parents=True)
    for name in ("a.py", "sub/run.sh", "gone.py", "untracked.py"):
        (root / name).write_text(name, encoding="utf-8")
    (root / "sub" / "run.sh").chmod(0o777)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "a.py", "sub", "gone.py"], [*identity, "commit", "-q", "-m", "one"]):
        dated = os.environ | {"GIT_COMMITTER_DATE": "@1700000000 +0000"}
        subprocess.run(["git", *words], cwd=root, check=True, env=dated)
    (root / "gone.py").unlink()
    (root / "a.py").chmod(0o600)
    return root


def test_context_has_tracked_files_with_plain_modes_and_one_date(checkout, tmp_path):
    assert source_date_epoch({}, checkout) == 1700000000
    into = tmp_path / "context"
    into.mkdir()
    assert stage_context(checkout, into, 1000) == ["a.py", "sub/run.sh"]
    found = {path.relative_to(into).as_posix(): path.stat() for path in into.rglob("*")}
    assert {name: oct(stat.st_mode & 0o777) for name, stat in found.items()} == {
        "a.py": "0o644", "sub": "0o755", "sub/run.sh": "0o755",
    }  # fmt: skip
    assert {stat.st_mtime for stat in found.values()} == {1000.0}
    assert (into / "a.py").read_text(encoding="utf-8") == "a.py"


def test_context_needs_git(tmp_path):
    (tmp_path / "plain").mkdir()
    with pytest.raises(ConfigError, match="not a git checkout"):
        stage_context(tmp_path / "plain", tmp_path, 0)


def test_pip_setup_takes_addresses_and_local_folders():
    listed = (
        ":env:.find-links='/opt/wheels'\nglobal.cert='/etc/ssl/all.crt'\nglobal.timeout='60'\nglobal.find-links='/opt/wheels'\n"
        "global.extra-index-url='https://example.org/simple file:///opt/index/simple'\n"
    )
    flags, certificates, paths = pip_setup(listed)
    assert flags == ["--find-links=/opt/wheels", "--extra-index-url=https://example.org/simple"]
    assert certificates == ["PIP_CERT=/etc/ssl/all.crt", "SSL_CERT_FILE=/etc/ssl/all.crt"]
    assert paths == [Path("/etc/ssl/all.crt"), Path("/opt/wheels")]
    assert pip_setup("") == ([], [], [])


def test_build_lines():
    with_buildah = build_line("cpu", Path("/c"), "localhost/base", 77, ["-v", "/a:/a"], uses_docker=False)
    assert with_buildah[0] == "buildah"
    assert with_buildah[-3:] == ["-v", "/a:/a", "/c"]
    joined = " ".join(with_buildah)
    for words in ("--isolation chroot", "--layers", "--timestamp 77", "--build-arg BASE=localhost/base"):
        assert words in joined
    with_docker = " ".join(build_line("lm", Path("/c"), "", 77, [], uses_docker=True))
    start = "docker buildx build --file /c/containers/lm.Dockerfile"
    for words in (start, "SOURCE_DATE_EPOCH=77", "rewrite-timestamp=true"):
        assert words in with_docker
    assert "BASE" not in with_docker


def test_base_is_the_pinned_one_where_it_can_be_had(monkeypatch, tmp_path, capsys):
    (tmp_path / "containers").mkdir()
    (tmp_path / "containers" / "cpu.Dockerfile").write_text("ARG BASE=a:1@sha256:2\nFROM ${BASE}\n", encoding="utf-8")
    ran: list[list[str]] = []

    def run(line, **_):
        ran.append(line)
        return subprocess.CompletedProcess(line, status, "", "no such host")

    monkeypatch.setattr(containers, "docker_answers", lambda: False)
    monkeypatch.setattr(containers.subprocess, "run", run)
    monkeypatch.setattr(containers, "build_stand_in", lambda: "localhost/stand-in")
    status = 0
    assert choose_base("cpu", "mine", tmp_path) == "mine"
    assert ran == []
    assert choose_base("cpu", "", tmp_path) == ""
    assert ran[0][-1] == "a:1@sha256:2"
    assert capsys.readouterr().out == ""
    status = 1
    assert choose_base("cpu", "", tmp_path) == "localhost/stand-in"
    printed = capsys.readouterr().out
    assert "a:1@sha256:2 cannot be pulled (no such host)" in printed
    assert "NOT EXERCISED: the pinned base" in printed


@pytest.mark.parametrize("docker", [True, False])
def test_images_run_closed(docker, monkeypatch, tmp_path):
    monkeypatch.setattr(containers, "docker_answers", lambda: docker)
    line = run_line("cpu", ["score"], {tmp_path: "/val:ro"}, ["--env", "A=1"])
    assert line[0] == ("docker" if docker else "podman")
    joined = " ".join(line)
    for words in ("--network none", "--read-only", "--tmpfs /tmp", f"--volume {tmp_path}:/val:ro"):
        assert words in joined
    assert line[-4:] == ["--env", "A=1", "localhost/latent-golf:cpu", "score"]


def test_audit_that_left_packages_out_is_an_error():
    audited = {"name": "a", "version": "1", "vulns": []}
    check_audit({"dependencies": [audited]}, "x")
    with pytest.raises(GolfError, match="1 of 2 packages were not audited, the first b"):
        check_audit({"dependencies": [audited, {"name": "b", "skip_reason": "not found"}]}, "x")


def test_missing_tools_are_named(monkeypatch):
    monkeypatch.setattr(containers, "docker_answers", lambda: False)
    monkeypatch.setattr(containers.shutil, "which", lambda name: None if name == "buildah" else "/bin/x")
    with pytest.raises(ConfigError, match=r"buildah is not installed.*apt-get install"):
        check_tools()


def test_wrong_arguments(capsys):
    assert main(["build", "gpu"]) == 2
    assert "unknown image 'gpu'" in capsys.readouterr().err
    assert main(["lock", "--upgrad"]) == 2
    assert "unknown argument '--upgrad'" in capsys.readouterr().err
