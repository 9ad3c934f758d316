"""What a packed train_gpt.py holds, found without running it.

Packers write the real program as a compressed literal and hand it to `exec`, or to a file that is then run. Here the
expressions that do so are evaluated by a small interpreter that knows constants, names bound to constants, the decoders
of base64 and the decompressors of the codec libraries, and nothing else. Decompression is bounded.
"""

from __future__ import annotations

import ast
import base64
import bz2
import lzma
import platform
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import brotli
import zstandard

MAX_LAYER_BYTES = 1 << 24  # no program is larger than the whole budget
MAX_LAYERS = 5
MIN_LAYER_BYTES = 64


class CannotUnpack(Exception):
    """The expression is not one of a packer's, or its data are damaged."""


@dataclass(frozen=True)
class Layer:
    """One program text: the file itself (depth 0) or what was found packed in the layer above."""

    name: str
    text: str
    tree: ast.Module

    @property
    def size_bytes(self) -> int:
        return len(self.text.encode())

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """Every node of the tree: most checks look at all of them."""
        return tuple(ast.walk(self.tree))

    @cached_property
    def calls(self) -> tuple[tuple[ast.Call, str], ...]:
        """Every call with the dotted name of what it calls, aliases undone."""
        aliases = aliases_of(self.nodes)
        return tuple((node, resolved(node.func, aliases)) for node in self.nodes if isinstance(node, ast.Call))


def _bounded_lzma(data: bytes, format: int = lzma.FORMAT_AUTO, _limit: Any = None, filters: Any = None) -> bytes:
    return lzma.LZMADecompressor(format, filters=filters).decompress(data, MAX_LAYER_BYTES)


def _bounded_zlib(data: bytes, wbits: int = zlib.MAX_WBITS) -> bytes:
    return zlib.decompressobj(wbits).decompress(data, MAX_LAYER_BYTES)


def _bounded_brotli(data: bytes) -> bytes:
    decoder, out = brotli.Decompressor(), b""
    for start in range(0, len(data), 4096):
        out += decoder.process(data[start : start + 4096])
        if len(out) > MAX_LAYER_BYTES:
            raise CannotUnpack("a packed program of more than 16 MiB")
    return out


DECODERS: dict[str, Callable[..., Any]] = {
    "lzma.decompress": _bounded_lzma,
    "zlib.decompress": _bounded_zlib,
    "gzip.decompress": lambda data: _bounded_zlib(data, 31),
    "bz2.decompress": lambda data: bz2.BZ2Decompressor().decompress(data, MAX_LAYER_BYTES),
    "brotli.decompress": _bounded_brotli,
    "zstandard.decompress": lambda data: zstandard.ZstdDecompressor().decompress(data, MAX_LAYER_BYTES),
    "base64.b64decode": base64.b64decode,
    "base64.b85decode": base64.b85decode,
    "base64.a85decode": base64.a85decode,
    "base64.b32decode": base64.b32decode,
    "bytes.fromhex": bytes.fromhex,
    "binascii.unhexlify": bytes.fromhex,
}
DECOMPRESSORS = tuple(name for name in DECODERS if name.endswith(".decompress"))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of names and attributes; '' for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def aliases_of(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """What each imported name stands for: {'L': 'lzma', 'b85decode': 'base64.b85decode'}."""
    known: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for item in node.names:
                known[item.asname or item.name.split(".")[0]] = item.name if item.asname else item.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for item in node.names:
                known[item.asname or item.name] = f"{node.module}.{item.name}"
    return known


def resolved(node: ast.AST, aliases: dict[str, str]) -> str:
    """The dotted name of what an expression means, aliases undone."""
    name = dotted(node)
    first, _, rest = name.partition(".")
    return ".".join(filter(None, (aliases.get(first, first), rest)))


class Interpreter:
    """Evaluates a packer's expressions. Raises CannotUnpack for everything else."""

    def __init__(self, layer: Layer) -> None:
        self.aliases = aliases_of(layer.nodes)
        self.bound: dict[str, list[ast.Assign]] = {}
        for node in layer.tree.body:
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                self.bound.setdefault(node.targets[0].id, []).append(node)
        stored = [node for node in layer.nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)]
        self.stores = Counter(node.id for node in stored)
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        self.in_functions = {id(i) for node in layer.nodes if isinstance(node, kinds) for i in ast.walk(node)}

    def assigned(self, node: ast.Name) -> ast.expr:
        """What a name stands for where it is used. Raises CannotUnpack if that depends on the order of execution."""
        assignments = self.bound.get(node.id, [])
        if self.stores[node.id] != len(assignments):
            raise CannotUnpack(f"line {node.lineno}: {node.id} is also assigned inside a function, loop or block")
        if len(assignments) > 1:
            here = (node.lineno, node.col_offset)
            assignments = [a for a in assignments if (a.end_lineno or 0, a.end_col_offset or 0) <= here]
            if not assignments or id(node) in self.in_functions:
                raise CannotUnpack(f"line {node.lineno}: {node.id} is assigned more than once")
        if not assignments:
            raise CannotUnpack(f"line {node.lineno}: {node.id} is no constant of the file")
        return assignments[-1].value

    def value(self, node: ast.AST, depth: int = 0) -> Any:
        if depth > 20:
            raise CannotUnpack("nested too deeply")
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.value(self.assigned(node), depth + 1)
        if isinstance(node, (ast.List, ast.Tuple)):
            return [self.value(item, depth + 1) for item in node.elts]
        if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
            keys = [self.value(key, depth + 1) for key in node.keys if key is not None]
            return dict(zip(keys, (self.value(item, depth + 1) for item in node.values)))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self.value(node.left, depth + 1), self.value(node.right, depth + 1)
            if type(left) is type(right) and isinstance(left, (str, bytes)):
                return left + right
        if isinstance(node, ast.Attribute):
            name = resolved(node, self.aliases)
            if name.startswith("lzma.") and name.split(".")[1].startswith(("FILTER_", "FORMAT_", "PRESET_")):
                return getattr(lzma, name.split(".")[1])
        if isinstance(node, ast.Call):
            return self.call(node, depth)
        raise CannotUnpack(f"line {getattr(node, 'lineno', '?')}: {ast.unparse(node)[:60]} is no packer's expression")

    def call(self, node: ast.Call, depth: int) -> Any:
        name = resolved(node.func, self.aliases)
        if name == "compile" and node.args:
            return self.value(node.args[0], depth + 1)  # whatever its file is called
        if name in DECODERS:
            arguments = [self.value(item, depth + 1) for item in node.args]
            options = {item.arg: self.value(item.value, depth + 1) for item in node.keywords if item.arg}
            try:
                return DECODERS[name](*arguments, **options)
            except (ValueError, TypeError, EOFError, OSError, lzma.LZMAError, zlib.error, brotli.error) as error:
                raise CannotUnpack(f"line {node.lineno}: {name} fails ({error})") from error
            except zstandard.ZstdError as error:
                raise CannotUnpack(f"line {node.lineno}: {name} fails ({error})") from error
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("decode", "encode", "strip", "replace", "join"):
            owner = self.value(node.func.value, depth + 1)
            if isinstance(owner, (str, bytes)) and hasattr(owner, node.func.attr):
                try:
                    return getattr(owner, node.func.attr)(*(self.value(item, depth + 1) for item in node.args))
                except (ValueError, TypeError, LookupError) as error:
                    raise CannotUnpack(f"line {node.lineno}: {node.func.attr} fails ({error})") from error
        raise CannotUnpack(f"line {node.lineno}: calls {name or ast.unparse(node.func)[:40]}")


@dataclass(frozen=True)
class Unpacked:
    """The programs of a file, outermost first, and what kept others from being read.

    closed: packed expressions that could not be opened. unparsed: program text that was opened but is written for
    another version of Python than this one.
    """

    layers: tuple[Layer, ...]
    closed: tuple[str, ...]
    unparsed: tuple[str, ...]


def text_of(value: Any) -> str | None:
    """A value as program text, if it is text of more than a few statements' size."""
    try:
        text = value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return None
    return text if isinstance(text, str) and len(text) >= MIN_LAYER_BYTES else None


def parsed(text: str, name: str) -> tuple[ast.Module | None, str]:
    """(tree, '') or (None, why this interpreter does not parse it)."""
    try:
        return ast.parse(text), ""
    except (SyntaxError, ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        version = platform.python_version()
        return None, f"{name}: Python {version} does not parse line {line} ({getattr(error, 'msg', error)})"


@lru_cache(maxsize=8)
def unpack(data: bytes, name: str) -> Unpacked:
    """The program in a file and those packed in it, without running anything."""
    text = text_of(data + b"\n" * MIN_LAYER_BYTES)
    if text is None:
        return Unpacked((), (f"{name} is no UTF-8 text",), ())
    tree, why = parsed(text, name)
    if tree is None:
        return Unpacked((), (), (why,))
    layers = [Layer(name, data.decode("utf-8"), tree)]
    closed: list[str] = []
    unparsed: list[str] = []
    for layer in layers:
        inside = Interpreter(layer)
        inner_of_others: set[int] = set()
        for node, called in layer.calls:
            if id(node) in inner_of_others:
                continue
            runs_text = called in ("exec", "eval", "builtins.exec")
            if called not in DECOMPRESSORS and not runs_text:
                continue
            try:
                value = inside.value(node.args[0] if runs_text and node.args else node)
            except CannotUnpack as why:
                if runs_text:
                    closed.append(f"{layer.name}: {why}")
                continue
            inner_of_others |= {id(inner) for inner in ast.walk(node)}
            text, inner_name = text_of(value), f"{layer.name} > {called} at line {node.lineno}"
            if text is None:
                if runs_text:
                    closed.append(f"{layer.name}: line {node.lineno}: {called} of something that is no program text")
                continue
            if any(text == known.text for known in layers):
                continue  # decompressed in one place, run in another
            tree, why = parsed(text, inner_name)
            if tree is not None and len(layers) < MAX_LAYERS:
                layers.append(Layer(inner_name, text, tree))
            elif runs_text:
                unparsed.append(why or f"{inner_name}: more than {MAX_LAYERS} layers")
    return Unpacked(tuple(layers), tuple(closed), tuple(unparsed))
