"""What a learner imports is in the lock of its image: an import through `common` counts like one of its own."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STARTS = {
    "worldmodel": ["worldmodel/__main__.py", *(f"worldmodel/configs/{name}.py" for name in ("cpu", "gpu", "paper"))],
    "lm": ["submissions/jepa_mamba/train_gpt.py", "submissions/baseline/train_gpt.py", "scripts/prepare_text.py"],
}
OURS = ("common", "worldmodel", "submissions", "referee", "scripts")


def imported_at_once(path: Path) -> set[str]:
    """Dotted names that a file imports when it is imported; what it tries, or imports in a function, may be missing."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def third_party(starts: list[str], root: Path = ROOT) -> dict[str, str]:
    """Top-level modules of others that our files import at once, from some files on; each with one file that does."""
    waiting, seen, found = [root / start for start in starts], set(), {}
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imported_at_once(path):
            top = name.split(".")[0]
            if top in OURS:
                place = root / name.replace(".", "/")
                waiting += [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
            elif top not in sys.stdlib_module_names:
                found[top] = path.relative_to(root).as_posix()
    return found


@pytest.mark.parametrize("image", STARTS)
def test_everything_that_is_imported_is_in_the_lock(image: str) -> None:
    text = (ROOT / "containers" / "locks" / f"{image}.lock").read_text(encoding="utf-8")
    locked = {name.lower().replace("_", "-") for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)}
    distributions = importlib.metadata.packages_distributions()
    imported = third_party(STARTS[image])
    assert len(imported) >= 4  # else nothing was followed
    for module, where in imported.items():
        names = {name.lower().replace("_", "-").replace(".", "-") for name in distributions[module]}
        assert names & locked, f"{where} imports {module} ({names}), which {image}.lock does not have"


def test_an_import_through_another_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "worldmodel").mkdir()
    (tmp_path / "common").mkdir()
    tried = "try:\n    import maybe\nexcept ImportError:\n    pass\n"
    (tmp_path / "worldmodel/a.py").write_text(f"import json\nfrom common import b\n{tried}")
    (tmp_path / "common/b.py").write_text("import brotli\ndef f():\n    import lazy\n")
    assert third_party(["worldmodel/a.py"], tmp_path) == {"brotli": "common/b.py"}
