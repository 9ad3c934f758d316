"""Training logs of the challenge's common shapes, parsed into what they state.

Two shapes are known: those of the challenge's baseline and its descendants (the code, a rule of `=`, then lines such as
`step:100/200 train_loss:..`, `final_... val_loss:.. val_bpb:.. eval_time:..ms`), and those of latent-golf (the source
of every module under a rule with its name, JSON lines with versions and configuration, then `trained N steps in S
s`).
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECTION = re.compile(r"^={40} (\S+\.py)$", re.MULTILINE)
RULE = re.compile(r"^={80,}$", re.MULTILINE)
NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
BPB = re.compile(rf"val_bpb[:=]? ?{NUMBER}")
LOSS = re.compile(rf"val_loss[:=]? ?{NUMBER}")
INTEGER = r"([0-9][0-9,]*)"
OPTION = re.compile(r"^ {1,4}([a-z][a-z0-9_]*): (.*)$", re.MULTILINE)
STEP_LABEL = re.compile(r"^\s*(?:\d+ )?(?:step[: ]?)?\d+(?:/\d+)?[: ]")


@dataclass(frozen=True)
class Result:
    """A score that a log states; `label` is the text before it, `periodic` whether it is of a training step."""

    label: str
    bpb: str  # as written: its decimals are its precision
    loss: str | None
    line: int
    periodic: bool


@dataclass(frozen=True)
class Span:
    """Seconds that a log states, and of what."""

    what: str
    seconds: float
    line: int


@dataclass(frozen=True)
class Log:
    name: str
    text: str  # without the sources
    first_line: int  # of `text` in the file
    sources: dict[str, str]
    config: dict[str, Any]
    seed: str | None
    results: tuple[Result, ...]
    train: Span | None
    evaluations: tuple[Span, ...]
    after_clock: tuple[Span, ...]  # work on the model after the training clock stopped
    warmup_steps: int
    steps: int | None
    code_bytes: int | None
    weight_bytes: tuple[int, ...]
    total_bytes: tuple[int, ...]
    val_tokens: int | None
    on_gpu: bool
    damaged: tuple[str, ...] = field(default=())


def split_sources(text: str) -> tuple[dict[str, str], str]:
    """(sources that the log opens with, the rest of the log)."""
    heads = list(SECTION.finditer(text))
    if heads and heads[0].start() == 0:
        sources = {}
        for head, following in zip(heads, [*heads[1:], None]):
            if following is not None:
                sources[head.group(1)] = text[head.end() + 1 : following.start() - 1]
                continue
            # The last source ends where the JSON line with the versions begins.
            tail = re.compile(r'^\{"python": ', re.MULTILINE).search(text, head.end())
            end = tail.start() if tail else len(text)
            sources[head.group(1)] = text[head.end() + 1 : end - 1]
            return sources, text[end:]
    rule = RULE.search(text)
    if rule is not None:
        code = text[: rule.start()]
        try:
            if len(code) > 2000 and ast.parse(code).body:
                return {"train_gpt.py": code}, text[rule.end() :]
        except (SyntaxError, ValueError, RecursionError):
            return {}, text
    return {}, text


def _json_lines(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        if line.startswith("{") and line.endswith("}"):
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                found.append(value)
    return found


def _last(pattern: str, text: str) -> re.Match[str] | None:
    found = list(re.finditer(pattern, text, re.MULTILINE))
    return found[-1] if found else None


def _line_of(text: str, place: int, first_line: int) -> int:
    return text.count("\n", 0, place) + first_line


def _seconds(value: str, unit: str) -> float:
    number = float(value.replace(",", ""))
    return number / 1000.0 if unit == "ms" else number * {"s": 1.0, "m": 60.0}[unit]


def _whole(value: Any) -> int:
    return int(value) if str(value).isdecimal() else 0


def parse_log(name: str, whole: str) -> Log:
    """What a log states. Never fails: what is not there is None or empty."""
    sources, text = split_sources(whole)
    first_line = whole.count("\n", 0, len(whole) - len(text)) + 1
    config: dict[str, Any] = {}
    for value in _json_lines(text):
        if {"seed", "iterations"} <= set(value):
            config = value
    if not config:
        config = {key: value.strip() for key, value in OPTION.findall(text)}
    results = []
    for number, line in enumerate(text.splitlines(), start=first_line):
        bpb = BPB.search(line)
        if bpb is None:
            continue
        loss = LOSS.search(line)
        label = line[: min(m.start() for m in (bpb, loss) if m is not None)].strip(" :")
        periodic = bool(STEP_LABEL.match(line)) or "step:" in label
        results.append(Result(label, bpb.group(1), loss.group(1) if loss else None, number, periodic))

    train = None
    stated = _last(rf"trained {INTEGER} steps in {NUMBER} (s)\b", text)
    if stated is not None:
        train = Span("training", _seconds(stated.group(2), "s"), _line_of(text, stated.start(), first_line))
    else:
        stated = _last(rf"train_time:? ?{NUMBER}(ms|s|m)\b", text)
        if stated is not None:
            train = Span("training", _seconds(*stated.groups()), _line_of(text, stated.start(), first_line))
    evaluations = []
    for match in re.finditer(rf"^(.*?)\b(?:total_)?(?:eval_)?time:? ?{NUMBER} ?(ms|s)\b", text, re.MULTILINE):
        if "train_time" in match.group(0) and "eval_time" not in match.group(0):
            continue
        line = _line_of(text, match.start(), first_line)
        evaluations.append(Span(match.group(0).strip(), _seconds(match.group(2), match.group(3)), line))
    after = []
    ended = stated.start() if stated is not None else len(text)
    learns = rf"^(.*(?:GPTQ|gptq|Hessian|calibrat|self-gen|SWA|EMA).*?)\b(?:in|took|time[:=]?) ?{NUMBER} ?(ms|s)\b"
    for match in re.finditer(learns, text[ended:], re.MULTILINE):
        line = _line_of(text, ended + match.start(), first_line)
        after.append(Span(match.group(0).strip()[:80], _seconds(match.group(2), match.group(3)), line))

    def integers(pattern: str) -> tuple[int, ...]:
        return tuple(int(m.group(1).replace(",", "")) for m in re.finditer(pattern, text, re.MULTILINE))

    own_total = integers(rf"read back from disk\).*, {INTEGER} bytes of code and weights")
    seed = re.search(r"seed[_-]?(\d+)", Path(name).stem)
    stated_seed = config.get("seed") or next(iter(re.findall(r"\bseed:\s*(\d+)", text)), None)
    in_name = seed.group(1) if seed else next(iter(re.findall(r"_(\d+)$", Path(name).stem)), None)
    steps = re.search(rf"trained {INTEGER} steps", text) or _last(r"step:? ?(\d+)/\d+", text)
    val_tokens = re.search(r"val_loader:.*tokens:\s*(\d+)", text) or re.search(r"val_tokens:\s*(\d+)", text)
    return Log(
        name=name,
        text=text,
        first_line=first_line,
        sources=sources,
        config=config,
        seed=str(stated_seed) if stated_seed is not None else in_name,
        results=tuple(results),
        train=train,
        evaluations=tuple(evaluations),
        after_clock=tuple(after),
        warmup_steps=max([0, *integers(r"^warmup_step: ?(\d+)/"), _whole(config.get("warmup_steps"))]),
        steps=int(steps.group(1).replace(",", "")) if steps else None,
        code_bytes=next(iter(integers(rf"^Code size: {INTEGER}") or integers(rf"^code +{INTEGER}$")), None),
        weight_bytes=integers(rf"^Serialized model \S+: {INTEGER}") or integers(rf"^artifact .* {INTEGER}$"),
        total_bytes=integers(rf"^Total submission size \S+: {INTEGER}") or own_total,
        val_tokens=int(val_tokens.group(1)) if val_tokens else None,
        on_gpu=bool(re.search(r"NCCL|H100|H200|A100|^kernels: .*; device cuda", text, re.MULTILINE)),
    )
