"""A Python file in few bytes: comments and docstrings taken out, compressed, unpacking itself into a real file.

The packed file runs the code that it holds in its own place: same process, same module, same `__file__`. So torchrun
can start it, a referee can import it, and its own bytes are what a run logs and counts. Triton and torch.compile
read the source of functions through `inspect`; for them the code also lies in a real file, in a temporary folder of
this process: ranks do not share it, nothing beside the program is written, and it is removed at exit.
"""

from __future__ import annotations

import ast
import base64
import io
import lzma
import tokenize

from common.errors import ConfigError

UNPACKED_NAME = "train_gpt_unpacked.py"
_LZMA = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4}]}

# What the packed file does. {code} has no quote and no backslash.
STUB = """import atexit,base64,lzma,os,shutil,tempfile
_s=lzma.decompress(base64.b85decode("{code}"),lzma.FORMAT_RAW,None,[{{"id":lzma.FILTER_LZMA2,"preset":{preset},"lc":4}}])
_d=tempfile.mkdtemp()
atexit.register(shutil.rmtree,_d)
_f=os.path.join(_d,"{name}")
with open(_f,"wb") as _o:_o.write(_s)
exec(compile(_s,_f,"exec"))
"""


def _without_docstrings(tree: ast.Module) -> tuple[ast.Module, list[tuple[ast.Expr, bool]]]:
    """The tree without docstrings (a body of nothing else gets `pass`), and what was taken out, and if it was all."""
    taken: list[tuple[ast.Expr, bool]] = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or not node.body:
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            alone = len(node.body) == 1 and not isinstance(node, ast.Module)
            taken.append((first, alone))
            node.body = [ast.Pass()] if alone else node.body[1:]
    return tree, taken


def strip_source(source: str) -> str:
    """The same program without comments, docstrings and empty lines; every other line stays as it is.

    Raises ConfigError if what is left is not the same program (checked on the syntax trees).
    """
    wanted, docstrings = _without_docstrings(ast.parse(source))
    lines = source.splitlines()
    kept_inside: set[int] = set()  # lines within strings that span lines: their white space counts
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (row, column), (last_row, _) = token.start, token.end
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column].rstrip()
        elif last_row > row and token.type not in (tokenize.NEWLINE, tokenize.NL):
            kept_inside |= set(range(row, last_row + 1))
    for node, alone in docstrings:
        last_row = node.end_lineno or node.lineno
        kept_inside -= set(range(node.lineno, last_row + 1))
        indent = lines[node.lineno - 1][: node.col_offset]
        if indent.strip():
            raise ConfigError(f"line {node.lineno}: a docstring shares its line with other code; split them")
        lines[node.lineno - 1 : last_row] = [f"{indent}pass" if alone else ""] + [""] * (last_row - node.lineno)
    text = "\n".join(line for row, line in enumerate(lines, start=1) if line.strip() or row in kept_inside) + "\n"
    if ast.dump(ast.parse(text)) != ast.dump(wanted):
        raise ConfigError("the stripped source is another program; a string or a comment was taken for the other")
    return text


def pack_source(source: str) -> str:
    """The packed form of a program. Deterministic; plain ASCII. Raises ConfigError."""
    stored = lzma.compress(strip_source(source).encode(), **_LZMA)
    code = base64.b85encode(stored).decode("ascii")
    return STUB.format(code=code, name=UNPACKED_NAME, preset=9 | lzma.PRESET_EXTREME)
