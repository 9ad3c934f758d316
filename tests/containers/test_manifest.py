"""containers/manifest.py: every file, mode, link and package is in the list, and any change of them changes it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from containers.entrypoint import IMAGE_MANIFEST
from containers.manifest import MANIFEST_NAME, debian_lines, file_lines, main, manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "golf"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "b.py").write_bytes(b"b")
    (root / "a.py").write_bytes(b"a")
    (root / "a.py").chmod(0o644)
    (root / "link").symlink_to("a.py")
    (root / MANIFEST_NAME).write_bytes(b"itself")
    return root


def test_lines(folder):
    (folder / "sub" / "b.py").chmod(0o755)
    lines = list(file_lines(folder))
    assert lines == [
        f"{hashlib.sha256(b'a').hexdigest()}  644  {folder}/a.py",
        f"symlink  a.py  {folder}/link",
        f"{hashlib.sha256(b'b').hexdigest()}  755  {folder}/sub/b.py",
    ]


def test_every_change_changes_it(folder):
    def fresh() -> list[str]:
        return list(file_lines(folder))

    seen = [fresh()]
    (folder / "a.py").chmod(0o600)
    seen.append(fresh())
    (folder / "a.py").write_bytes(b"c")
    seen.append(fresh())
    (folder / "link").unlink()
    (folder / "link").symlink_to("sub/b.py")
    seen.append(fresh())
    (folder / "new").touch()
    seen.append(fresh())
    assert len({tuple(lines) for lines in seen}) == len(seen)
    (folder / MANIFEST_NAME).write_bytes(b"other")
    assert fresh() == seen[-1]


def test_whole_list_and_command(folder, capsys):
    assert main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed == manifest([folder])
    assert "  interpreter  " in printed
    assert [line for line in printed.splitlines() if line.startswith("debian  ")] == debian_lines()
    assert main([]) == 2
    assert main([str(folder / "absent")]) == 2
    assert "absent" in capsys.readouterr().err


def test_entry_point_reads_what_the_build_writes():
    assert IMAGE_MANIFEST == MANIFEST_NAME
    for path in (Path(__file__).parents[2] / "containers").glob("*.Dockerfile"):
        assert f"/golf/{MANIFEST_NAME}" in path.read_text(encoding="utf-8")
