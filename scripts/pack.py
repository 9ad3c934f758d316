"""A Python file in few bytes: comments and docstrings taken out, compressed, unpacking itself into a real file.

The packed file writes the code that it holds beside itself (or into a temporary folder where it may not write) and
starts it there in its own place, same process, same arguments. Triton and torch.compile read the source of functions
through `inspect`: they find the real file.
"""

from __future__ import annotations

import ast
import base64
import io
import lzma
import tokenize

from common.errors import ConfigError

PACKED_NAME = "train_gpt_unpacked.py"
_LZMA = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4}]}

# What the packed file does: nothing is kept from before, nothing is looked up. {code} has no quote and no backslash.
STUB = """import base64,lzma,os,sys,tempfile
s=lzma.decompress(base64.b85decode("{code}"),lzma.FORMAT_RAW,None,[{{"id":lzma.FILTER_LZMA2,"preset":{preset},"lc":4}}])
f=os.path.join(os.path.dirname(os.path.abspath(__file__)),"{name}")
try:
 t=f"{{f}}.{{os.getpid()}}";open(t,"wb").write(s);os.replace(t,f)
except OSError:f=os.path.join(tempfile.mkdtemp(),"{name}");open(f,"wb").write(s)
os.execv(sys.executable,[sys.executable,f,*sys.argv[1:]])
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
    """The packed form of a program that is started as a file. Deterministic; plain ASCII. Raises ConfigError."""
    stored = lzma.compress(strip_source(source).encode(), **_LZMA)
    code = base64.b85encode(stored).decode("ascii")
    return STUB.format(code=code, name=PACKED_NAME, preset=9 | lzma.PRESET_EXTREME)
