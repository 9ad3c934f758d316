"""The rules between rooms (CONTRIBUTING.md), checked on the syntax tree of every file, and the tests of those checks.

A rule here is a function from the parsed tree of a repository to a list of `path:line: what is wrong` lines, so that
the same function runs over this repository (nothing may be found) and over planted violations (each must be found).
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.architecture import (
    FRAMEWORK_OF,
    FRAMEWORK_OF_ROOM,
    LAZY_ONLY,
    MAY_IMPORT,
    NUMPY_ONLY_EXTRAS,
    PACKAGES,
    REFEREE_SHARES,
    ROOMS,
)

ROOT = Path(__file__).resolve().parents[1]
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
ENTRY = "submissions/jepa_mamba/train_gpt.py"


@dataclass(frozen=True)
class Module:
    path: str  # relative to the repository, with forward slashes
    name: str  # dotted
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.path.split("/")[0]

    @property
    def is_main(self) -> bool:
        return self.path.endswith("/__main__.py")

    def at(self, node: ast.AST, message: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {message}"


@dataclass(frozen=True)
class Import:
    """One imported name: `bound` is what the file calls it, `module` and `attribute` are what it is."""

    node: ast.Import | ast.ImportFrom
    module: str
    attribute: str | None
    bound: str
    level: int
    aliased: bool
    at_top: bool

    @property
    def root(self) -> str:
        return self.module.split(".")[0]


def read_tree(root: Path) -> list[Module]:
    modules = []
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            rel = path.relative_to(root).as_posix()
            name = rel.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            modules.append(Module(rel, name, ast.parse(path.read_text(encoding="utf-8"), filename=rel)))
    return modules


def imports_of(module: Module) -> Iterator[Import]:
    top = set(map(id, module.tree.body))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                yield Import(node, alias.name, None, bound, 0, alias.asname is not None, id(node) in top)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                bound = alias.asname or alias.name
                aliased = alias.asname is not None
                yield Import(node, node.module or "", alias.name, bound, node.level, aliased, id(node) in top)


def bindings_of(body: list[ast.stmt]) -> Iterator[tuple[ast.AST, str]]:
    """Names that the statements of a module bind at top level, imports excepted, also inside if, try, for and with."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield statement, statement.name
            continue
        if isinstance(statement, (ast.If, ast.For, ast.While, ast.With, ast.Try)):
            for inner in ("body", "orelse", "finalbody"):
                yield from bindings_of(getattr(statement, inner, []))
            for handler in getattr(statement, "handlers", []):
                yield from bindings_of(handler.body)
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, (ast.AnnAssign, ast.AugAssign, ast.For)):
            targets = [statement.target]
        elif isinstance(statement, ast.With):
            targets = [item.optional_vars for item in statement.items if item.optional_vars]
        for target in targets:
            for node in ast.walk(target):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node, node.id


def rule_rooms(modules: list[Module]) -> list[str]:
    found = []
    for module in modules:
        for item in imports_of(module):
            if item.level:
                found.append(module.at(item.node, "relative import; write `from common.x.y import name`"))
            elif item.root in ROOMS and item.root not in MAY_IMPORT[module.room]:
                found.append(module.at(item.node, f"{module.room} must not import {item.root}"))
    return found


def rule_frameworks(modules: list[Module]) -> list[str]:
    found = []
    for module in modules:
        if module.room not in PACKAGES:
            continue
        used = {}
        for item in imports_of(module):
            if item.root in FRAMEWORK_OF:
                used.setdefault(FRAMEWORK_OF[item.root], item.node)
        expected = FRAMEWORK_OF_ROOM.get(module.room)
        for framework, node in used.items():
            if expected and framework != expected:
                found.append(module.at(node, f"{module.room} uses {expected}, not {framework}"))
        if len(used) > 1:
            node = list(used.values())[-1]
            found.append(module.at(node, f"two frameworks in one module: {', '.join(sorted(used))}"))
    return found


def _numpy_only_extras(path: str) -> set[str] | None:
    if path.split("/")[-1] == "reference.py":
        return set()
    matches = [prefix for prefix in NUMPY_ONLY_EXTRAS if path.startswith(prefix)]
    return NUMPY_ONLY_EXTRAS[max(matches, key=len)] if matches else None


def rule_numpy_only(modules: list[Module]) -> list[str]:
    found = []
    for module in modules:
        extras = _numpy_only_extras(module.path) if module.room in ("common", "referee") else None
        for item in imports_of(module):
            if module.room == "common" and item.root in LAZY_ONLY and item.at_top:
                found.append(module.at(item.node, f"{item.root} must be imported where it is used, not on top"))
            if module.room == "referee" and item.root == "common" and item.module not in REFEREE_SHARES:
                found.append(module.at(item.node, f"the referee judges by code of its own, not by {item.module}"))
            ours = item.root in ("common", module.room)
            if extras is None or item.level or item.root in sys.stdlib_module_names or ours:
                continue
            if item.root != "numpy" and item.root not in extras:
                found.append(module.at(item.node, f"{item.root} in a module of NumPy and the standard library"))
        if extras is None:
            continue
        by_name = {other.name: other for other in modules}
        for item in imports_of(module):  # NumPy-only files stay so through what they import
            other = by_name.get(item.module)
            if other is not None and other.room == "common" and _numpy_only_extras(other.path) is None:
                found.append(module.at(item.node, f"imports {other.path}, which may use a framework"))
    return found


def rule_inlinable(modules: list[Module]) -> list[str]:
    """What scripts/bundle.py needs: plain `from common.x.y import name` on top, no cycle, nothing tied to a file."""
    found = []
    names = {module.name for module in modules}
    edges: dict[str, list[tuple[str, Module, ast.AST]]] = {}
    for module in modules:
        if module.room not in ("common", "submissions"):
            continue
        for item in imports_of(module):
            if item.level or item.root not in ("common", "submissions"):
                continue
            if item.attribute is None:
                found.append(module.at(item.node, f"`import {item.module}`; write `from {item.module} import name`"))
                continue
            if item.attribute == "*":
                found.append(module.at(item.node, "star import; name what is used"))
            elif item.aliased:
                found.append(module.at(item.node, f"`{item.attribute} as {item.bound}`: names keep their name"))
            elif f"{item.module}.{item.attribute}" in names:
                found.append(module.at(item.node, f"imports the module {item.attribute}; import names out of it"))
            elif item.module not in names:
                found.append(module.at(item.node, f"there is no module {item.module}"))
            if not item.at_top:
                found.append(module.at(item.node, f"{item.module} imported inside a block; imports of ours go on top"))
            edges.setdefault(module.name, []).append((item.module, module, item.node))
        if module.room == "common" and not module.is_main:
            for node in ast.walk(module.tree):
                if isinstance(node, ast.Name) and node.id in ("__file__", "__name__", "__spec__", "__package__"):
                    found.append(module.at(node, f"{node.id} changes when the module is inlined"))
    found += _cycles(edges)
    return found


def _cycles(edges: dict[str, list[tuple[str, Module, ast.AST]]]) -> list[str]:
    found, done = [], set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        for target, module, node in edges.get(name, []):
            if target in path:
                found.append(module.at(node, f"import cycle: {' -> '.join([*path[path.index(target) :], target])}"))
            elif target not in done:
                visit(target, (*path, target))
        done.add(name)

    for name in sorted(edges):
        if name not in done:
            visit(name, (name,))
    return found


def rule_names(modules: list[Module]) -> list[str]:
    """A top-level name means one thing over the whole of `common` and in the entry that is bundled with it."""
    found: list[str] = []
    meaning: dict[str, tuple[str, str]] = {}  # name -> (what it is, where it was first seen)

    def claim(name: str, what: str, where: str) -> None:
        known = meaning.setdefault(name, (what, where))
        if known[0] != what:
            found.append(f"{where}: `{name}` is {what}, but {known[0]} at {known[1]}")

    for module in modules:
        if not (module.room == "common" and not module.is_main) and module.path != ENTRY:
            continue
        for node, name in bindings_of(module.tree.body):
            claim(name, f"defined in {module.path}", module.at(node, "").rstrip(": "))
        for item in imports_of(module):
            if item.level or not item.at_top or item.module == "__future__":
                continue
            if item.root == "common":
                what = f"defined in {item.module.replace('.', '/')}.py"
            elif item.attribute is None:
                what = f"module {item.module if item.aliased else item.bound}"
            else:
                what = f"{item.attribute} of {item.module}"
                if (item.module, item.attribute) == ("torch.nn", "functional"):
                    what = "module torch.nn.functional"
            claim(item.bound, what, module.at(item.node, "").rstrip(": "))
    return found


def rule_init_files_are_empty(modules: list[Module]) -> list[str]:
    return [
        module.at(module.tree.body[0], "an __init__.py of ours stays empty")
        for module in modules
        if module.path.endswith("/__init__.py") and module.tree.body
    ]


def rule_no_code_from_data(modules: list[Module]) -> list[str]:
    """Nothing unpickles and nothing runs text: not the packages, not the scripts, not the tests."""
    found = []
    for module in modules:
        for item in imports_of(module):
            if item.root in UNPICKLERS:
                found.append(module.at(item.node, f"imports {item.root}, which runs code from data"))
            if item.module == "torch" and item.attribute in ("load", "save"):
                found.append(module.at(item.node, f"torch.{item.attribute} is pickle"))
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Call):
                continue
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            target = ast.unparse(node.func)
            if target in ("torch.load", "torch.save", "torch.jit.load", "torch.package.PackageImporter"):
                found.append(module.at(node, f"{target} is pickle"))
            if target.endswith("read_pickle"):
                found.append(module.at(node, f"{target} unpickles"))
            if target in ("eval", "exec", "__import__") and module.room in PACKAGES:
                found.append(module.at(node, f"{target} runs text as code"))
            allow = keywords.get("allow_pickle")
            if allow is not None and not (isinstance(allow, ast.Constant) and allow.value is False):
                found.append(module.at(node, "allow_pickle must be the literal False"))
            if target in ("np.load", "numpy.load") and (allow is None or len(node.args) > 1):
                found.append(module.at(node, "np.load says allow_pickle=False by name"))
    return found


RULES: list[Callable[[list[Module]], list[str]]] = [
    rule_rooms,
    rule_frameworks,
    rule_numpy_only,
    rule_inlinable,
    rule_names,
    rule_init_files_are_empty,
    rule_no_code_from_data,
]


@pytest.fixture(scope="module")
def repository() -> list[Module]:
    modules = read_tree(ROOT)
    assert {"common/errors.py", "tests/test_imports.py"} <= {module.path for module in modules}
    return modules


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_repository_keeps_the_rule(rule, repository):
    assert rule(repository) == []


PLANTED = [
    (rule_rooms, {"common/a.py": "from submissions.x.train_gpt import f"}, "common must not import submissions"),
    (rule_rooms, {"common/a.py": "def f():\n    import worldmodel.cli"}, "common must not import worldmodel"),
    (rule_rooms, {"worldmodel/a.py": "from submissions.x import f"}, "worldmodel must not import submissions"),
    (rule_rooms, {"submissions/a.py": "import worldmodel"}, "submissions must not import worldmodel"),
    (rule_rooms, {"common/a.py": "from scripts.bundle import f"}, "common must not import scripts"),
    (rule_rooms, {"scripts/a.py": "from tests.x import f"}, "scripts must not import tests"),
    (rule_rooms, {"common/ssd/a.py": "from .b import f"}, "relative import"),
    (rule_frameworks, {"common/a.py": "import torch\ndef f():\n    import jax.numpy"}, "two frameworks"),
    (rule_frameworks, {"worldmodel/a.py": "from torch import nn"}, "worldmodel uses jax, not torch"),
    (rule_frameworks, {"submissions/a.py": "import flax"}, "submissions uses torch, not jax"),
    (rule_numpy_only, {"common/ssd/reference.py": "import torch"}, "torch in a module of NumPy"),
    (rule_numpy_only, {"common/text/loader.py": "def f():\n    import torch"}, "torch in a module of NumPy"),
    (rule_numpy_only, {"common/text/shards.py": "import sentencepiece"}, "sentencepiece in a module"),
    (rule_numpy_only, {"common/artifact/a.py": "import safetensors"}, "safetensors in a module"),
    (rule_numpy_only, {"common/text/sources.py": "import pyarrow.parquet"}, "must be imported where it is used"),
    (rule_numpy_only, {"referee/a.py": "def f():\n    import torch"}, "torch in a module of NumPy"),
    (
        rule_numpy_only,
        {"referee/a.py": "from common.text.bpb import f", "common/text/bpb.py": ""},
        "by code of its own, not by common.text.bpb",
    ),
    (rule_rooms, {"referee/a.py": "from submissions.x.train_gpt import f"}, "referee must not import submissions"),
    (rule_rooms, {"common/a.py": "from referee.model import f"}, "common must not import referee"),
    (
        rule_numpy_only,
        {"common/artifact/a.py": "from common.quant.torch_impl import f", "common/quant/torch_impl.py": ""},
        "which may use a framework",
    ),
    (rule_inlinable, {"common/a.py": "import common.b", "common/b.py": ""}, "write `from common.b import name`"),
    (rule_inlinable, {"common/a.py": "from common.b import *", "common/b.py": ""}, "star import"),
    (rule_inlinable, {"common/a.py": "from common.b import x as y", "common/b.py": "x = 1"}, "names keep their name"),
    (rule_inlinable, {"common/a.py": "from common import b", "common/b.py": ""}, "imports the module b"),
    (rule_inlinable, {"common/a.py": "from common.c import x"}, "there is no module common.c"),
    (rule_inlinable, {"common/a.py": "def f():\n    from common.b import x", "common/b.py": ""}, "inside a block"),
    (rule_inlinable, {"common/a.py": "HERE = __file__"}, "__file__ changes"),
    (rule_inlinable, {"common/a.py": "if __name__ == '__main__':\n    pass"}, "__name__ changes"),
    (
        rule_inlinable,
        {
            "common/a.py": "from common.b import x",
            "common/b.py": "from common.c import x",
            "common/c.py": "from common.a import x",
        },
        "import cycle: common.a -> common.b -> common.c -> common.a",
    ),
    (rule_names, {"common/a.py": "_EPS = 1", "common/b.py": "try:\n    _EPS = 2\nexcept OSError:\n    pass"}, "`_EPS`"),
    (rule_names, {"common/a.py": "def f(): pass", "common/b.py": "class f: pass"}, "`f` is defined in common/b.py"),
    (rule_names, {"common/a.py": "import numpy as np", "common/b.py": "import jax.numpy as np"}, "module jax.numpy"),
    (rule_names, {"common/a.py": "from torch import nn", "common/b.py": "nn = 3"}, "`nn`"),
    (rule_names, {"common/a.py": "import time", "common/b.py": "from time import time"}, "time of time"),
    (rule_names, {"common/a.py": "def main(): pass", ENTRY: "def main(): pass"}, "`main`"),
    (rule_init_files_are_empty, {"common/x/__init__.py": "from common.x.y import z"}, "stays empty"),
    (rule_no_code_from_data, {"scripts/a.py": "import pickle"}, "imports pickle"),
    (rule_no_code_from_data, {"tests/a.py": "def f(p):\n    return torch.load(p)"}, "torch.load is pickle"),
    (rule_no_code_from_data, {"common/a.py": "from torch import load"}, "torch.load is pickle"),
    (rule_no_code_from_data, {"common/a.py": "np.load(p)"}, "says allow_pickle=False by name"),
    (rule_no_code_from_data, {"common/a.py": "np.load(p, None, True, allow_pickle=False)"}, "says allow_pickle=False"),
    (rule_no_code_from_data, {"common/a.py": "np.lib.format.read_array(f, allow_pickle=flag)"}, "literal False"),
    (rule_no_code_from_data, {"common/a.py": "eval(text)"}, "eval runs text"),
]


def _plant(root: Path, files: dict[str, str]) -> list[Module]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return read_tree(root)


@pytest.mark.parametrize(("rule", "files", "message"), PLANTED)
def test_planted_violation_is_found(rule, files, message, tmp_path):
    found = rule(_plant(tmp_path, files))
    assert len(found) == 1, found
    assert message in found[0]
    assert found[0].split(":")[0] in files


def test_clean_tree_has_no_finding(tmp_path):
    use = "from common.x.reference import scan_reference\n\nif __name__ == '__main__':\n    scan_reference(1)\n"
    files = {
        "common/x/__init__.py": "",
        "common/x/reference.py": "import math\n\nimport numpy as np\n\n\ndef scan_reference(x):\n    return np.exp(x)",
        "common/x/torch_impl.py": "import torch\nimport torch.nn.functional as F\nfrom torch import Tensor, nn",
        "common/x/__main__.py": use,
        "common/y/__main__.py": "if __name__ == '__main__':\n    main = 1",
        ENTRY: "import torch\n" + use,
        "tests/a.py": "np.load(p, allow_pickle=False)",
    }
    modules = _plant(tmp_path, files)
    assert [line for rule in RULES for line in rule(modules)] == []


# Runs in its own process: imports every module of ours and reports what the imports did.
PROBE = r"""
import collections.abc, importlib, importlib.util, io, json, os, sys, threading

root, names, optional = json.loads(sys.argv[1])
sys.path.insert(0, root)
mine = tuple(os.path.join(root, room) + os.sep for room in ("common", "worldmodel", "submissions"))
plumbing = {os.__file__, collections.abc.__file__, "<frozen os>", "<frozen _collections_abc>", __file__}
reads = []


class Recorder(collections.abc.MutableMapping):
    # Every access of the environment passes here; it counts when the nearest caller outside os.py is a file of ours.
    def __init__(self, real):
        self.real = real

    def note(self, key):
        frame = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename in plumbing:
            frame = frame.f_back
        if frame is not None and frame.f_code.co_filename.startswith(mine):
            reads.append(f"{frame.f_code.co_filename}:{frame.f_lineno}: {key}")

    def __getitem__(self, key):
        self.note(key)
        return self.real[key]

    def __setitem__(self, key, value):
        self.note(key)
        self.real[key] = value

    def __delitem__(self, key):
        self.note(key)
        del self.real[key]

    def __iter__(self):
        self.note("*")
        return iter(self.real)

    def __len__(self):
        self.note("*")
        return len(self.real)

    def copy(self):
        self.note("*")
        return dict(self.real)


os.environ = Recorder(os.environ)
printed = io.StringIO()
stdout, stderr = sys.stdout, sys.stderr
sys.stdout = sys.stderr = printed
skipped = {}
try:
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            package = (error.name or "").split(".")[0]
            if package not in optional or importlib.util.find_spec(package) is not None:
                raise
            skipped[name] = package
finally:
    sys.stdout, sys.stderr = stdout, stderr
devices = []
torch = sys.modules.get("torch")
if torch is not None and torch.cuda.is_initialized():
    devices.append("torch.cuda")
bridge = sys.modules.get("jax._src.xla_bridge")
if bridge is not None and bridge.backends_are_initialized():
    devices.append("jax")
threads = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
report = {"reads": reads, "printed": printed.getvalue(), "devices": devices, "skipped": skipped, "threads": threads}
sys.stdout.write("\n" + json.dumps(report))
"""


def _import_in_fresh_process(root: Path, names: list[str], tmp_path: Path) -> dict:
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE, encoding="utf-8")
    arguments = json.dumps([str(root), names, sorted(set(FRAMEWORK_OF) - {"torch"})])
    done = subprocess.run(
        [sys.executable, str(probe), arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    report["written"] = "".join(done.stdout.splitlines(keepends=True)[:-1]).strip() + done.stderr.strip()
    return report


def test_importing_prints_nothing_reads_no_environment_and_starts_no_device(repository, tmp_path):
    names = [module.name for module in repository if module.room in PACKAGES and not module.is_main]
    report = _import_in_fresh_process(ROOT, names, tmp_path)
    quiet = {"reads": [], "printed": "", "devices": [], "threads": [], "written": ""}
    assert {key: report[key] for key in quiet} == quiet
    assert "common.errors" not in report["skipped"]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("import os\nX = os.environ.get('HOME')", "reads"),
        ("import os\nX = os.getenv('NO_SUCH_NAME')", "reads"),
        ("from os import environ\nX = 'HOME' in environ", "reads"),
        ("import os\nX = {**os.environ}", "reads"),
        ("print('hello')", "printed"),
        ("import os\nos.write(2, b'hello')", "written"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(1,), daemon=True).start()", "threads"),
    ],
)
def test_loud_import_is_found(text, key, tmp_path):
    _plant(tmp_path, {"common/__init__.py": "", "common/loud.py": text})  # a package, to stand before the installed one
    assert _import_in_fresh_process(tmp_path, ["common.loud"], tmp_path)[key]


def test_broken_import_is_not_taken_for_a_missing_framework(tmp_path):
    _plant(tmp_path, {"common/__init__.py": "", "common/broken.py": "import no_such_package_of_ours"})
    with pytest.raises(AssertionError, match="no_such_package_of_ours"):
        _import_in_fresh_process(tmp_path, ["common.broken"], tmp_path)
