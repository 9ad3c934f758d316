"""Packing a program: it stays the program, it lands in a real file, and it says no where it cannot."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import ConfigError
from scripts.pack import UNPACKED_NAME, pack_source, strip_source

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


def start(path: Path, *arguments: str, temporary: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(path), *arguments]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def packed(tmp_path) -> Path:
    """The packed program, alone in a folder; its temporary files go to `tmp` beside the folder."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "alone").mkdir()
    path = tmp_path / "alone" / "train_gpt.py"
    path.write_text(pack_source(PROGRAM), encoding="ascii")
    return path


def test_the_packed_file_is_the_program_in_its_own_place_with_arguments_and_status(packed, tmp_path):
    plain = tmp_path / "plain.py"
    plain.write_text(PROGRAM, encoding="utf-8")
    assert pack_source(PROGRAM) == packed.read_text(encoding="ascii")
    ranks = [start(path, "a", "b c", temporary=tmp_path / "tmp") for path in (plain, packed, packed, packed, packed)]
    outs = [(*rank.communicate(), rank.returncode) for rank in ranks]  # ranks of one machine, at once
    (expected, _, _), *others = outs
    for out, err, status in others:
        assert (err, status) == ("", 7)
        assert out.splitlines()[:3] == expected.splitlines()[:3]
        assert "def method(self):" in out  # inspect has found the source
        assert out.splitlines()[-1] == str(packed)  # __file__: what counts, and what a run logs
    assert [path.name for path in packed.parent.iterdir()] == ["train_gpt.py"]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_source_lies_in_a_real_file_while_it_runs(packed, tmp_path):
    packed.write_text(pack_source(PROGRAM.replace("    print(__file__)\n", "    input()\n")), encoding="ascii")
    rank = start(packed, temporary=tmp_path / "tmp")
    assert rank.stdout is not None
    while "def method" not in rank.stdout.readline():
        pass
    (folder,) = (tmp_path / "tmp").iterdir()
    text = (folder / UNPACKED_NAME).read_text(encoding="utf-8")
    _, err = rank.communicate()  # closes its standard input: the program ends with an error
    assert text == strip_source(PROGRAM.replace("    print(__file__)\n", "    input()\n"))
    assert f'{UNPACKED_NAME}", line' in err
    assert "    input()" in err  # a traceback shows the line


def test_the_packed_file_can_be_imported(packed, tmp_path):
    code = f"""import importlib.util, inspect, sys
spec = importlib.util.spec_from_file_location("packed", {str(packed)!r})
module = sys.modules["packed"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.Kept().method(), inspect.getsource(module.main))
"""
    script = tmp_path / "imports.py"
    script.write_text(code, encoding="utf-8")
    out, err = start(script, temporary=tmp_path / "tmp").communicate()
    assert err == ""
    assert "'# kept' # kept def main():" in out
