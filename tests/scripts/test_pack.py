"""Packing a program: it stays the program, it lands in a real file, and it says no where it cannot."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import ConfigError
from scripts.pack import PACKED_NAME, pack_source, strip_source

PROGRAM = '''"""Docstring of the file."""

from __future__ import annotations

import inspect
import sys  # a comment

TEXT = """kept # not a comment

  three lines"""


# gone
def only_documented():
    """Nothing else."""


class Kept:
    """Gone."""

    value = "# kept"  # gone

    def method(self):
        """Gone,

        all of it.
        """
        return f"{self.value!r} # kept"


def main():
    print(TEXT, Kept().method(), only_documented(), sys.argv[1:])
    print(inspect.getsource(Kept.method))
    print(__file__)


if __name__ == "__main__":
    main()
    sys.exit(7)
'''
TRAPS = """A = '''
# one

'''
B = 'x' \\
    '# y'
C = (1,  # no
     2)
"""


def test_comments_docstrings_and_empty_lines_go_and_nothing_else():
    stripped = strip_source(PROGRAM)
    assert "ocstring" not in stripped
    assert "gone" not in stripped.lower()
    for kept in ("kept # not a comment\n\n  three lines", '"# kept"', "} # kept", "def only_documented():\n    pass\n"):
        assert kept in stripped
    assert strip_source(stripped) == stripped
    assert len(ast.parse(stripped).body) == len(ast.parse(PROGRAM).body) - 1  # the docstring


def test_strings_that_hold_what_looks_like_a_comment_stay():
    stripped = strip_source(TRAPS)
    assert "\n# one\n\n" in stripped
    assert "# no" not in stripped
    assert ast.dump(ast.parse(stripped)) == ast.dump(ast.parse(TRAPS))


def test_a_docstring_beside_code_is_refused():
    with pytest.raises(ConfigError, match="line 1: a docstring shares its line"):
        strip_source("def f(): 'doc'\n")


def run(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True, check=False)


def test_the_packed_file_runs_as_a_real_file_with_its_arguments_and_status(tmp_path):
    plain, packed = tmp_path / "plain.py", tmp_path / "train_gpt.py"
    plain.write_text(PROGRAM, encoding="utf-8")
    packed.write_text(pack_source(PROGRAM), encoding="ascii")
    assert pack_source(PROGRAM) == pack_source(PROGRAM)
    (tmp_path / PACKED_NAME).write_text("raise SystemExit('an old file')", encoding="utf-8")
    expected, done = run(plain, "a", "b c"), run(packed, "a", "b c")
    assert done.returncode == expected.returncode == 7
    assert done.stderr == ""
    assert done.stdout.splitlines()[:3] == expected.stdout.splitlines()[:3]
    assert "def method(self):" in done.stdout  # inspect has found the source
    assert done.stdout.splitlines()[-1] == str(tmp_path / PACKED_NAME)
    assert (tmp_path / PACKED_NAME).read_text(encoding="utf-8") == strip_source(PROGRAM)
    assert {path.name for path in tmp_path.iterdir()} == {"plain.py", "train_gpt.py", PACKED_NAME}
