"""Time: what the logs say of training and evaluation, and what happened inside and outside the clock."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from referee.folder import Submission
from referee.logs import Log, Span
from referee.model import LIMIT_S, Check, Finding, failed, not_checkable, passed
from referee.unpack import Layer

RESTORES = ("load_state_dict", "copy_", "restore")
LEARNS = ("step", "backward")


def declared_limit_s(log: Log) -> float | None:
    """The run's own limit of training seconds, if its configuration states one above zero."""
    try:
        limit = float(log.config.get("max_wallclock_seconds") or 0)
    except (TypeError, ValueError):
        return None
    return limit if limit > 0 else None


def limit_of(submission: Submission, log: Log | None) -> float | None:
    own = declared_limit_s(log) if log else None
    if submission.record_track:
        return min(own or LIMIT_S, LIMIT_S)
    return own


def claimed_seconds(submission: Submission, kind: str) -> list[tuple[float, str]]:
    """(seconds, where) of `kind` ("train" or "eval") that submission.json states."""
    if submission.claims is None:
        return []
    names = {
        "train": ("train_s", "train_time_s", "train_time_seconds", "wallclock_seconds", "training_s"),
        "eval": ("eval_s", "eval_time_s", "eval_time_seconds", "ttt_time_s"),
    }[kind]
    milliseconds = {"train": ("train_time_ms",), "eval": ("eval_time_ms", "ttt_time_ms")}[kind]
    found = []
    for label, one in [("", submission.claims.raw), *submission.claims.seeds.items()]:
        where = submission.claims.path + (f", seed {label}" if label else "")
        for scale, group in ((1.0, names), (0.001, milliseconds)):
            found += [(float(one[n]) * scale, where) for n in group if isinstance(one.get(n), (int, float))]
    return found


def judge_seconds(kind: str, stated: list[tuple[float, str, float | None]]) -> list[Finding]:
    """Findings for (seconds, where, limit) triples."""
    findings: list[Finding] = []
    for seconds, where, limit in stated:
        if limit is None:
            findings.append(not_checkable(f"{kind} took {seconds:.3f} s; neither track nor run names a limit", where))
        elif seconds > limit:
            mend = "stop earlier: predict the last step's end, and keep the rest of the work inside the limit"
            findings.append(failed(f"{kind} took {seconds:.3f} s, over {limit:.3f} s", where, mend))
        else:
            findings.append(passed(f"{kind} took {seconds:.3f} s of {limit:.3f} s", where))
    return findings


def check_train(submission: Submission) -> list[Finding]:
    stated = [
        (log.train.seconds, f"{log.name}:{log.train.line}", limit_of(submission, log))
        for log in submission.logs
        if log.train is not None
    ]
    fallback = next((limit for log in submission.logs if (limit := limit_of(submission, log))), None)
    fallback = fallback if fallback is not None or not submission.record_track else LIMIT_S
    stated += [(seconds, where, fallback) for seconds, where in claimed_seconds(submission, "train")]
    return judge_seconds("training", stated) or [
        not_checkable("neither a log nor submission.json states training time")
    ]


def check_claimed_seconds(submission: Submission) -> list[Finding]:
    """Seconds in submission.json against those of the seed's log; of evaluations the log may state several."""
    findings: list[Finding] = []
    mend = "write both from the same run, with a program"
    for seed, one in submission.claims.seeds.items() if submission.claims else ():
        log = submission.log_of(seed)
        if log is None:
            continue
        claimed = one.get("train_s", one.get("train_time_s"))
        if log.train is not None and isinstance(claimed, (int, float)):
            found = f"seed {seed}: {claimed:.3f} s of training claimed, {log.train.seconds:.3f} s logged"
            where = f"{log.name}:{log.train.line}"
            agrees = abs(claimed - log.train.seconds) <= 0.0051
            findings.append(passed(found, where) if agrees else failed(found, where, mend))
        claimed, longest = one.get("eval_s", one.get("eval_time_s")), longest_evaluation(log, "eval_time")
        if longest is not None and isinstance(claimed, (int, float)):
            found = f"seed {seed}: {claimed:.3f} s of evaluation claimed, at least {longest.seconds:.3f} s logged"
            where = f"{log.name}:{longest.line}"
            agrees = claimed >= longest.seconds - 0.0051
            findings.append(passed(found, where) if agrees else failed(found, where, mend))
    return findings or [not_checkable("no seed has both claimed and logged seconds")]


def longest_evaluation(log: Log, word: str = "") -> Span | None:
    """The longest evaluation that a log states in a line with `word`, those during training aside."""
    spans = [span for span in log.evaluations if "step:" not in span.what and word in span.what]
    return max(spans, key=lambda span: span.seconds, default=None)


def check_evaluate(submission: Submission) -> list[Finding]:
    limit = LIMIT_S if submission.record_track else None
    stated = [(seconds, where, limit) for seconds, where in claimed_seconds(submission, "eval")]
    for log in submission.logs:
        longest = longest_evaluation(log)
        if longest is not None:
            stated.append((longest.seconds, f"{log.name}:{longest.line}", limit))
    return judge_seconds("evaluation", stated) or [not_checkable("no log or claim states the time of evaluation")]


def calls_any(nodes: Iterable[ast.AST], names: tuple[str, ...]) -> bool:
    called = (node.func for top in nodes for node in ast.walk(top) if isinstance(node, ast.Call))
    return any(isinstance(function, ast.Attribute) and function.attr in names for function in called)


def block_of(parent: ast.AST, child: ast.AST) -> list[ast.stmt]:
    """The list of statements of `parent` that `child` is in."""
    for name in ("body", "orelse", "finalbody"):
        block = getattr(parent, name, None)
        if isinstance(block, list) and any(statement is child for statement in block):
            return block
    return []


def warmup_loops(layer: Layer) -> list[tuple[ast.For, bool]]:
    """Loops over warmup steps that train, and whether what they changed is put back.

    Put back means: after the loop in a block that it is in, or in the context manager or `finally` around it, state is
    loaded or copied.
    """
    loops = [
        node
        for node in layer.nodes
        if isinstance(node, ast.For) and "warmup_step" in ast.unparse(node.iter) and calls_any([node], LEARNS)
    ]
    if not loops:
        return []
    parents = {id(child): parent for parent in layer.nodes for child in ast.iter_child_nodes(parent)}
    functions = {node.name: node for node in layer.nodes if isinstance(node, ast.FunctionDef)}

    def undone(node: ast.AST, parent: ast.AST) -> bool:
        block = block_of(parent, node)
        after = block[[statement is node for statement in block].index(True) + 1 :] if block else []
        if calls_any(after, RESTORES):
            return True
        if isinstance(parent, ast.Try) and calls_any(parent.finalbody, RESTORES):
            return True
        for item in parent.items if isinstance(parent, ast.With) else ():
            if isinstance(item.context_expr, ast.Call):
                called = item.context_expr.func
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                if name in functions and calls_any(functions[name].body, RESTORES):
                    return True
        return False

    found: list[tuple[ast.For, bool]] = []
    for loop in loops:
        node: ast.AST = loop
        safe = False
        while not safe and id(node) in parents and not isinstance(node, ast.FunctionDef):
            safe = undone(node, parents[id(node)])
            node = parents[id(node)]
        found.append((loop, safe))
    return found


def check_outside(submission: Submission) -> list[Finding]:
    """Warmup that learns before the clock, and work on the model after it."""
    findings: list[Finding] = []
    warm = max((log.warmup_steps for log in submission.logs), default=0)
    loops = [(layer, *one) for layer in submission.layers for one in warmup_loops(layer)]
    for layer, loop, restored in loops:
        where = f"{layer.name}:{loop.lineno}"
        if restored:
            findings.append(passed("warmup steps are undone before the clock starts", where))
        elif warm:
            mend = "copy weights and optimizer state before the warmup and restore them, or count its seconds"
            findings.append(failed(f"{warm} warmup steps train the model outside the clock", where, mend))
    if warm and not loops:
        findings.append(not_checkable(f"logs show {warm} warmup steps, but no such loop was found in the program"))
    for log in submission.logs:
        limit = limit_of(submission, log)
        if not log.after_clock or log.train is None:
            continue
        extra = sum(span.seconds for span in log.after_clock)
        total = log.train.seconds + extra
        span = log.after_clock[0]
        found = f"{log.train.seconds:.3f} s of training, then {extra:.1f} s of: {span.what}"
        where = f"{log.name}:{span.line}"
        if limit is None:
            findings.append(not_checkable(f"{found}; no limit is named", where))
        elif total > limit:
            mend = f"together {total:.3f} s; reserve the time of calibration inside the limit of {limit:.0f} s"
            findings.append(failed(found, where, mend))
        else:
            findings.append(passed(f"{found}; together {total:.3f} s of {limit:.0f} s", where))
    if not findings and (submission.layers or submission.logs):
        findings.append(passed("no warmup that trains and no work on the model after the clock was found"))
    return findings or [not_checkable("no program and no log")]


CHECKS = (
    Check("time.train", f"training takes at most {LIMIT_S:.3f} s, or the limit that the run names", check_train),
    Check("time.claimed", "the seconds in submission.json are the log's", check_claimed_seconds),
    Check("time.evaluate", f"on a record track evaluation takes at most {LIMIT_S:.3f} s", check_evaluate),
    Check("time.outside", "nothing that teaches the model happens outside the clock", check_outside),
)
