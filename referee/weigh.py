"""Bytes: the referee's own count of code and weights, from the files."""

from __future__ import annotations

import ast
import base64
import lzma
from collections.abc import Iterable
from dataclasses import dataclass

from referee.folder import FileFact, Submission, Weights
from referee.model import LIMIT_BYTES, Check, Finding, failed, not_checkable, passed
from referee.unpack import dotted


@dataclass(frozen=True)
class SiblingUse:
    """A file beside the program that the program uses."""

    file: FileFact
    how: str
    where: str


def names_a_file(node: ast.AST) -> str | None:
    """The last path component of a string constant that could be a file's name."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) <= 200:
        last = node.value.replace("\\", "/").split("/")[-1]
        return last if "." in last and not any(c.isspace() for c in last) else None
    return None


IMPORTERS = ("import_module", "__import__", "run_module")


def imported_paths(node: ast.AST) -> list[tuple[str, ...]]:
    """Where an import statement, or a call that imports by name, would find its modules, as path parts."""
    if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in IMPORTERS and node.args:
        name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
        return [tuple(name.split("."))] if isinstance(name, str) else []
    if isinstance(node, ast.Import):
        return [tuple(item.name.split(".")) for item in node.names]
    if isinstance(node, ast.ImportFrom):
        base = tuple((node.module or "").split(".")) if node.module else ()
        return [base, *((*base, item.name) for item in node.names)]
    return []


def siblings_used(submission: Submission) -> list[SiblingUse]:
    """Files of the folder that the program imports or names in a call, and those that these import in turn."""
    by_path = {fact.path: fact for fact in submission.files}
    by_name: dict[str, FileFact] = {}
    for fact in submission.files:
        if fact.path != submission.entry and fact.kind in ("code", "blob", "paper"):
            by_name.setdefault(fact.name, fact)
    used: dict[str, SiblingUse] = {}
    queue: list[tuple[str, Iterable[ast.AST]]] = [(layer.name, layer.nodes) for layer in submission.layers]
    while queue:
        where, nodes = queue.pop()
        for node in nodes:
            found: list[tuple[FileFact, str]] = []
            for parts in imported_paths(node):
                for path in ("/".join(parts) + ".py", "/".join((*parts, "__init__.py"))):
                    if parts and path in by_path and path != submission.entry:
                        found.append((by_path[path], "imports"))
            # Code and blobs are used if they are named at all; papers, which programs also write, if a call gets them.
            if (name := names_a_file(node)) in by_name and by_name[name].kind != "paper":
                found.append((by_name[name], "names"))
            if by_name and isinstance(node, ast.Call):
                inside = [*node.args, *(keyword.value for keyword in node.keywords)]
                constants = [inner for argument in inside for inner in ast.walk(argument)]
                found += [(by_name[n], "names") for c in constants if (n := names_a_file(c)) in by_name]
            for fact, how in found:
                if fact.path not in used:
                    used[fact.path] = SiblingUse(fact, how, f"{where}:{getattr(node, 'lineno', '?')}")
                    if fact.path.endswith(".py"):
                        text = (submission.root / fact.path).read_text(encoding="utf-8", errors="replace")
                        try:
                            queue.append((fact.path, list(ast.walk(ast.parse(text)))))
                        except (SyntaxError, ValueError):
                            continue
    return sorted(used.values(), key=lambda use: use.file.path)


def code_bytes(submission: Submission) -> int:
    """Bytes of the program as it lies in the folder, packed or not."""
    return (submission.root / submission.entry).stat().st_size if submission.entry else 0


def packed_bytes(submission: Submission) -> int:
    """Bytes of the program as it lies there, or of an lzma + base85 wrapper around it if that is smaller."""
    if submission.entry_path is None:
        return 0
    data = submission.entry_path.read_bytes()
    wrapper = len(b"import lzma,base64\nexec(lzma.decompress(base64.b85decode('')))\n")
    squeezed = lzma.compress(data, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}])
    return min(len(data), len(base64.b85encode(squeezed)) + wrapper)


def weight_bytes(submission: Submission) -> tuple[int | None, str]:
    """Bytes of the weights of the largest run, and where that comes from: files, or else logs.

    In the folder, files of weights whose name tells no seed go with every run; files given beside it are one a run.
    """
    inside = [w for w in submission.weights if w.path.is_relative_to(submission.root)]
    of_seed: dict[str | None, list[Weights]] = {}
    for weights in inside:
        of_seed.setdefault(weights.seed, []).append(weights)
    always = of_seed.pop(None, [])
    runs = [[*own, *always] for own in of_seed.values()] or [always]
    runs += [[weights] for weights in submission.weights if weights not in inside]
    if submission.weights:
        largest = max(runs, key=lambda run: sum(w.size_bytes for w in run))
        return sum(w.size_bytes for w in largest), ", ".join(w.label for w in largest)
    stated = [(log.weight_bytes[-1], log.name) for log in submission.logs if log.weight_bytes]
    return max(stated, default=(None, ""))


def check_counted(submission: Submission) -> list[Finding]:
    code = code_bytes(submission)
    siblings = [use.file for use in siblings_used(submission)]
    blobs = [fact for fact in submission.files if fact.kind == "blob" and fact not in siblings]
    beside = sum(fact.size_bytes for fact in [*siblings, *blobs])
    weights, source = weight_bytes(submission)
    if not submission.entry:
        return [not_checkable("no program to count: there is neither train_gpt.py nor another Python file that trains")]
    if weights is None:
        if code + beside > LIMIT_BYTES:
            return [failed(f"{code + beside:,} bytes of code alone", submission.entry, "make it smaller")]
        return [
            not_checkable(f"code is {code + beside:,} bytes; no weights here and no log states theirs; give --weights")
        ]
    total = code + beside + weights
    packed = packed_bytes(submission)
    inside = submission.layers[-1].size_bytes if len(submission.layers) > 1 else 0
    form = f"packed; unpacked {inside:,}" if inside else f"packed it would be {packed:,}"
    parts = f"code {code:,} ({form}) + weights {weights:,} ({source})"
    parts += f" + files beside it {beside:,}" if beside else ""
    if total > LIMIT_BYTES:
        mend = f"{total - LIMIT_BYTES:,} bytes over; fewer parameters, fewer bits or less code"
        if total - code + packed <= LIMIT_BYTES:
            mend += "; or ship the program packed: that alone is enough"
        return [failed(f"{total:,} bytes: {parts}", source, mend)]
    return [passed(f"{total:,} of {LIMIT_BYTES:,} bytes: {parts}", source)]


def check_claimed(submission: Submission) -> list[Finding]:
    claims = submission.claims
    if claims is None or not submission.entry:
        return [not_checkable("no readable submission.json, or no program")]
    findings: list[Finding] = []
    siblings = sum(use.file.size_bytes for use in siblings_used(submission))
    codes = {code_bytes(submission), code_bytes(submission) + siblings}
    mend = "write submission.json with a program that counts (ours: make bundle), after the last edit"
    claimed_code = claims.number("bytes_code", "code_bytes")
    if claimed_code is not None:
        found = f"bytes_code is {claimed_code:,.0f}; {submission.entry} has {min(codes):,}"
        findings.append(passed(found) if claimed_code in codes else failed(found, claims.path, mend))
    seeds = list(claims.seeds) or ["-"]
    known: list[int] = []
    for seed in seeds:
        weights = submission.weights_of(seed)
        log = submission.log_of(seed) or (submission.logs[0] if len(submission.logs) == 1 else None)
        size = weights.size_bytes if weights else (log.weight_bytes[-1] if log and log.weight_bytes else None)
        if size is None:
            continue
        known.append(size)
        logged_totals = set() if weights or log is None else set(log.total_bytes)
        claimed = claims.seeds.get(seed, {}).get("artifact_bytes")
        if isinstance(claimed, (int, float)):
            right = claimed in {size, *(size + code for code in codes)}
            found = f"seed {seed}: artifact_bytes is {claimed:,.0f}; the weights have {size:,}, the code {min(codes):,}"
            logged = " (the log's own total is of other code)" if claimed in logged_totals and not right else ""
            findings.append(passed(found) if right else failed(found + logged, claims.path, mend))
    claimed_total = claims.number("bytes_total")
    if claimed_total is not None and known:
        totals = {size + code for size in known for code in codes}
        largest = max(known) + max(codes)
        right = claimed_total == largest or (claimed_total in totals and claimed_total >= max(known) + min(codes))
        found = f"bytes_total is {claimed_total:,.0f}; code and the largest weights have {max(known) + min(codes):,}"
        findings.append(passed(found) if right else failed(found, claims.path, mend))
    return findings or [not_checkable("nothing of bytes is claimed, or no weights and no log to hold a claim against")]


def check_siblings(submission: Submission) -> list[Finding]:
    if not submission.layers and not submission.unparsed:
        return [not_checkable("no program that can be read")]
    findings = [
        failed(
            f"{use.where} {use.how} {use.file.path} ({use.file.size_bytes:,} bytes)",
            use.file.path,
            "put it into the one program, whose bytes count",
        )
        for use in siblings_used(submission)
    ]
    if not findings and submission.unparsed:
        return [not_checkable(why) for why in submission.unparsed]
    return findings or [passed(f"{submission.entry} uses no file beside it")]


def check_blobs(submission: Submission) -> list[Finding]:
    findings = [
        failed(
            f"{fact.path}: {fact.size_bytes:,} bytes that are no text, weights, tokenizer or picture",
            fact.path,
            "remove it, or name it as weights so that it is counted",
        )
        for fact in submission.files
        if fact.kind == "blob"
    ]
    return findings or [passed(f"each of {len(submission.files)} files is of a declared kind")]


CHECKS = (
    Check("bytes.counted", f"code and compressed weights together are at most {LIMIT_BYTES:,} bytes", check_counted),
    Check("bytes.claimed", "the byte counts in submission.json are those of the files", check_claimed),
    Check("bytes.siblings", "all code is in the one program; no file beside it is imported or opened", check_siblings),
    Check("bytes.blobs", "no undeclared binary file lies in the folder", check_blobs),
)
