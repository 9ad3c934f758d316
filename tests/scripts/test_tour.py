"""scripts/tour: pages are followed as they stand, and every page of ours can be. The pages themselves: slow tests."""

from __future__ import annotations

import importlib
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import DataError, GolfError

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("TOUR.md", "YOUR_TEXT.md", "YOUR_GAME.md", "SUBMIT.md")
tour = importlib.import_module("scripts.tour.__main__")


def write(folder: Path, text: str) -> Path:
    page = folder / "PAGE.md"
    page.write_text(text, encoding="utf-8")
    return page


@pytest.mark.parametrize("name", PAGES)
def test_every_page_can_be_followed(name):
    steps = tour.read_steps(ROOT / "docs" / name)
    assert all(step.text(short=False) == step.script for step in steps)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for step in steps:
        assert set(re.findall(r"^make ([a-z-]+)", step.script, re.MULTILINE)) <= targets
        for path in re.findall(r"\.venv/bin/python (\S+\.py)", step.script):
            assert (ROOT / path).is_file(), path


def test_blocks_and_their_comments(tmp_path):
    comments = "<!-- short: 800 -> 8 -->\n<!-- serves: http://x/ -->\n"
    page = write(tmp_path, f"a\n\n```\nno\n```\n<!-- text: of the page -->\n\n{comments}```sh\nrun 800\n```\n")
    (step,) = tour.read_steps(page)
    assert (step.text(short=False), step.text(short=True), step.serves) == ("run 800\n", "run 8\n", "http://x/")
    for text, message in (
        ("nothing", "no block"),
        ("<!-- short: 9 -> 8 -->\n```sh\nrun\n```\n", "replaces nothing"),
        ("<!-- sorry: 9 -->\n```sh\nrun\n```\n", "expected `serves: URL`"),
    ):
        with pytest.raises(DataError, match=message):
            tour.read_steps(write(tmp_path, text))


def test_a_page_is_followed_in_order_until_a_block_fails(tmp_path, capfd):
    text = "```sh\necho one > seen\n```\n```sh\nfalse | cat\n```\n```sh\necho three > seen\n```\n"
    with pytest.raises(GolfError, match=r"PAGE.md, block 2 ended with status 1"):
        tour.follow(write(tmp_path, text), tmp_path, {"PATH": "/usr/bin:/bin"}, short=False)
    assert (tmp_path / "seen").read_text() == "one\n"
    assert "$ echo one > seen" in capfd.readouterr().out


def test_a_server_is_waited_for_and_ended(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serving = f"{sys.executable} -m http.server {port} --bind 127.0.0.1"
    page = write(tmp_path, f"<!-- serves: http://127.0.0.1:{port}/ -->\n```sh\n{serving}\n```\n")
    ((name, _),) = tour.follow(page, tmp_path, {"PATH": "/usr/bin:/bin"}, short=False)
    assert name == serving[: tour.NAME_CHARACTERS]
    with socket.socket() as probe:  # nobody listens any more
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    with pytest.raises(GolfError, match="ended with status"):
        tour.follow(write(tmp_path, page.read_text().replace(serving, "exit 0")), tmp_path, {}, short=False)


def test_a_clone_is_of_the_last_commit(tmp_path, monkeypatch):
    origin = tmp_path / "origin"
    origin.mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(origin)]
    (origin / "file").write_text("committed")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    (origin / "file").write_text("edited")
    monkeypatch.setattr(tour, "ROOT", origin)
    environment = tour.clone(tmp_path / "clone", Path(sys.prefix))
    assert (tmp_path / "clone" / "file").read_text() == "committed"
    assert (tmp_path / "clone" / ".venv" / "bin").is_dir()
    assert environment["PYTHONPATH"] == str(tmp_path / "clone")


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_the_page_works_in_a_fresh_clone(name):
    """The last commit's page, in its short form, with this environment."""
    command = [sys.executable, str(ROOT / "scripts" / "tour"), "--short", "--venv", sys.prefix, f"docs/{name}"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
