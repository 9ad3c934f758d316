"""Behavioural causality and normalisation: what changes, and what may not, when tokens are changed.

The referee knows one thing of the model: a function from a stream of tokens to the nats of every token but the first
(docs/VERIFIER.md, the hook). `plan` lays out streams; the staged program scores them; `judge` looks at the answers.

* Suffixes: the same stream with all tokens from j on replaced. The nats of targets before j must be bitwise the same.
* Candidates: one context with every entry of the vocabulary as the next token. The probabilities must sum to one. This
  also catches a model that learns from a token before it scores it, or picks the better of two scores.
* Isolation: documents; every other one's text is replaced. The nats of those between must stay, but for rounding.
* Repetition: a stream twice. A second pass over remembered text would be cheaper.

Letters: N tokens of a stream, V entries of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from referee.model import Check, Finding, failed, not_checkable, passed

SUM_TOLERANCE = 1e-4
# A chunked scan adds up decays over a whole chunk and takes differences: rounding, but no state, crosses its documents.
ISOLATION_TOLERANCE_NATS = 1e-4
MOST_CANDIDATES_ONE_BY_ONE = 2048
CANDIDATE_DOCUMENT = 8  # tokens of a candidate's document where all go into one stream
LONGEST_PROBE = 4096
ISOLATED_PAIRS = 16
SUFFIX_DRAWS = 2  # a peek at one bit of a token shows in half of the draws


@dataclass(frozen=True)
class Probe:
    """One stream to be scored. `of` is the index of the probe that it is compared with."""

    kind: str  # base, suffix, token, repeat, isolation-base, isolation, candidates, candidate
    mode: str
    tokens_N: np.ndarray
    of: int = -1
    place: int = 0  # suffix and token: first changed position
    kept: tuple[tuple[int, int], ...] = ()  # isolation: ranges of nats that may not change
    context: int = 0  # candidates: which context


def other_tokens(tokens_N: np.ndarray, vocab_size: int, banned: set[int], rng: np.random.Generator) -> np.ndarray:
    """Each token replaced by another ordinary one; banned ones (BOS, controls) stay and are not put in."""
    allowed = np.array([v for v in range(vocab_size) if v not in banned])
    out_N = allowed[rng.integers(0, len(allowed), len(tokens_N))].astype(np.uint16)
    same = out_N == tokens_N
    out_N[same] = allowed[(np.searchsorted(allowed, out_N[same]) + 1) % len(allowed)]
    keep = np.isin(tokens_N, list(banned))
    return np.where(keep, tokens_N, out_N).astype(np.uint16)


def suffix_places(length: int, window: int) -> list[int]:
    """Positions at which a suffix begins: around window boundaries, the middle and both ends."""
    wanted = [2, window // 2, window - 1, window, window + 1, window + 2, length // 2, 2 * window + 1, length - 2]
    return sorted({place for place in wanted if 2 <= place < length - 1})


def plan(facts: dict[str, Any], text_N: np.ndarray, mode: str, banned: set[int], seed: int = 0) -> list[Probe]:
    """The probes for one scoring mode.

    Args:
        facts: what the hook says of itself.
        text_N: real tokens, used as the base stream; random ones where there are too few.
        banned: entries that are no ordinary text (BOS and other controls).
    """
    rng = np.random.default_rng(seed)
    vocab, bos, window = int(facts["vocab_size"]), facts["bos_id"], max(8, int(facts["window"]))
    banned = banned | ({bos} if bos is not None else set())
    allowed = np.array([v for v in range(vocab) if v not in banned])
    length = min(LONGEST_PROBE, 2 * window + window // 2 + 3)
    base_N = np.asarray(text_N[:length], dtype=np.uint16)
    if len(base_N) < length:
        fill_N = allowed[rng.integers(0, len(allowed), length - len(base_N))].astype(np.uint16)
        base_N = np.concatenate([base_N, fill_N])
    if bos is not None:  # documents of uneven lengths, so that boundaries fall inside windows
        base_N = base_N.copy()
        base_N[0] = bos
        base_N[window // 3], base_N[window + window // 3] = bos, bos
    probes = [Probe("base", mode, base_N)]
    for place in suffix_places(length, window) * SUFFIX_DRAWS:
        changed_N = base_N.copy()
        changed_N[place:] = other_tokens(base_N[place:], vocab, banned, rng)
        probes.append(Probe("suffix", mode, changed_N, of=0, place=place))
    for place in (window // 2 + 1, window + 3):
        changed_N = base_N.copy()
        changed_N[place] = other_tokens(base_N[place : place + 1], vocab, banned, rng)[0]
        probes.append(Probe("token", mode, changed_N, of=0, place=place))
    probes.append(Probe("repeat", mode, base_N, of=0))
    if facts["isolates_documents"] and bos is not None:
        probes += isolation_probes(len(probes), mode, window, bos, vocab, allowed, banned, rng)
    return probes + candidate_probes(facts, base_N, mode, allowed, rng)


def isolation_probes(
    offset: int, mode: str, window: int, bos: int, vocab: int, allowed: np.ndarray, banned: set[int],
    rng: np.random.Generator,
) -> list[Probe]:  # fmt: skip
    """Many short documents, twice; the second time every other one has another text.

    Many, because a scorer may run documents side by side: some that stay must follow one that changes in the same lane.
    A document that stays repeats the text before it: what is remembered of that would help most.
    """
    before: list[np.ndarray] = []
    after: list[np.ndarray] = []
    kept: list[tuple[int, int]] = []
    place = 0
    for pair in range(ISOLATED_PAIRS):
        text_N = allowed[rng.integers(0, len(allowed), max(6, window // 8) + pair % 5)].astype(np.uint16)
        other_N = other_tokens(text_N, vocab, banned, rng)
        mark = np.array([bos], dtype=np.uint16)
        before += [mark, text_N, mark, text_N]
        after += [mark, other_N, mark, text_N]
        place += len(text_N) + 1
        kept.append((place, place + len(text_N)))  # nats[i] is of token i + 1
        place += len(text_N) + 1
    return [
        Probe("isolation-base", mode, np.concatenate(before)),
        Probe("isolation", mode, np.concatenate(after), of=offset, kept=tuple(kept)),
    ]


def candidate_probes(
    facts: dict[str, Any], base_N: np.ndarray, mode: str, allowed: np.ndarray, rng: np.random.Generator
) -> list[Probe]:
    vocab, bos, window = int(facts["vocab_size"]), facts["bos_id"], max(8, int(facts["window"]))
    size = CANDIDATE_DOCUMENT
    if facts["isolates_documents"] and bos is not None and window % size == 0:
        # One document per candidate, of a length that no window cuts. Isolation is checked by its own probe.
        probes = []
        for context in range(2):
            head_N = np.concatenate([[bos], allowed[rng.integers(0, len(allowed), size - 2)]]).astype(np.uint16)
            rows_VN = np.concatenate([np.tile(head_N, (vocab, 1)), np.arange(vocab, dtype=np.uint16)[:, None]], axis=1)
            stream_N = np.concatenate([rows_VN.reshape(-1), [bos]]).astype(np.uint16)
            probes.append(Probe("candidates", mode, stream_N, context=context))
        return probes
    if vocab > MOST_CANDIDATES_ONE_BY_ONE:
        return []
    context_N = base_N[: min(size, window)]
    return [
        Probe("candidate", mode, np.append(context_N, np.uint16(candidate)), place=candidate)
        for candidate in range(vocab)
    ]


def first_change(before_N: np.ndarray, after_N: np.ndarray) -> int | None:
    """Index of the first nats that are not bitwise equal; None if all are."""
    different = np.flatnonzero(before_N.view(np.uint64) != after_N.view(np.uint64))
    return int(different[0]) if len(different) else None


def judge_future(probes: list[Probe], answers: list[np.ndarray]) -> list[Finding]:
    findings: list[Finding] = []
    compared, moved = 0, False
    mend = (
        "a score may depend on earlier tokens only: look for masks, windows, convolutions and statistics over the whole"
    )
    for probe, nats_N in zip(probes, answers):
        if probe.kind not in ("suffix", "token"):
            continue
        before_N = answers[probe.of]
        kept = probe.place - 1  # nats[i] is of token i + 1
        compared += 1
        change = first_change(before_N[:kept], nats_N[:kept])
        if change is not None:
            found = f"changing token {probe.place} changes the score of token {change + 1}"
            difference = float(abs(nats_N[change] - before_N[change]))
            findings.append(failed(f"{found} by {difference:.3g} nats", f"referee_hook, mode {probe.mode}", mend))
        moved = moved or first_change(before_N[kept:], nats_N[kept:]) is not None
    if compared and not moved:
        findings.append(failed("no score depends on any token", "referee_hook", "score the tokens that are given"))
    if not compared:
        return [not_checkable("no changed stream was scored in time")]
    return findings or [passed(f"{compared} changed streams: every earlier score is bitwise the same")]


def judge_sum(probes: list[Probe], answers: list[np.ndarray], vocab_size: int) -> list[Finding]:
    sums: dict[int, float] = {}
    singles: dict[int, float] = {}
    for probe, nats_N in zip(probes, answers):
        if probe.kind == "candidates":
            last_V = nats_N[CANDIDATE_DOCUMENT - 2 :: CANDIDATE_DOCUMENT][:vocab_size]
            sums[probe.context] = float(np.exp(-last_V).sum())
        elif probe.kind == "candidate":
            singles[probe.place] = float(np.exp(-nats_N[-1]))
    if len(singles) == vocab_size:
        sums[0] = sum(singles.values())
    if not sums:
        why = "not every candidate was scored in time" if singles else (
            f"{vocab_size:,} candidates one by one would take too long, and documents are not isolated"
        )  # fmt: skip
        return [not_checkable(why)]
    mend = "score with a full softmax over the vocabulary, once, before anything learns from the token"
    findings = [
        failed(f"the probabilities of all {vocab_size:,} next tokens sum to {total:.6f}", f"context {context}", mend)
        for context, total in sums.items()
        if not abs(total - 1.0) <= SUM_TOLERANCE
    ]
    shown = ", ".join(f"{total:.7f}" for total in sums.values())
    return findings or [passed(f"the probabilities of all {vocab_size:,} next tokens sum to {shown}")]


def judge_isolation(facts: dict[str, Any], probes: list[Probe], answers: list[np.ndarray]) -> list[Finding]:
    if not facts["isolates_documents"]:
        return [not_checkable("the entry does not claim that documents are isolated")]
    for probe, nats_N in zip(probes, answers):
        if probe.kind != "isolation":
            continue
        before_N = answers[probe.of]
        moves = [float(np.abs(nats_N[start:end] - before_N[start:end]).max()) for start, end in probe.kept]
        count, most = sum(end - start for start, end in probe.kept), max(moves)
        shown = "bitwise the same" if most == 0.0 else f"the same but for rounding ({most:.1g} nats)"
        if most <= ISOLATION_TOLERANCE_NATS:
            return [passed(f"other texts before them leave {count:,} scores of {len(moves)} documents {shown}")]
        mend = "reset state, convolution inputs and attention at every document, or do not claim isolation"
        moved = sum(not move <= ISOLATION_TOLERANCE_NATS for move in moves)
        found = f"another text of the document before moves scores of {moved} of {len(moves)} documents"
        return [failed(f"{found}, by up to {most:.3g} nats", f"referee_hook, mode {probe.mode}", mend)]
    return [not_checkable("no pair of documents was scored in time")]


def judge_order(facts: dict[str, Any], probes: list[Probe], events: list[list[list[Any]]]) -> list[Finding]:
    """Optimizer steps while scoring: only if declared, and every token reported as scored, once, before the step."""
    findings: list[Finding] = []
    steps = sum(event[0] == "step" for of_probe in events for event in of_probe)
    if steps and not facts["learns_while_scoring"]:
        mend = "declare learns_while_scoring and report every scored range through on_scored before stepping"
        return [failed(f"{steps} optimizer steps while scoring, without declaration", "referee_hook", mend)]
    if not facts["learns_while_scoring"]:
        return [passed("no optimizer stepped while scoring")]
    mend = "score a chunk, report it, then learn from it; never score it again"
    for probe, of_probe in zip(probes, events):
        scored, fresh, targets = 0, False, len(probe.tokens_N) - 1
        for event in of_probe:
            if event[0] == "scored":
                if event[1] != scored:
                    found = f"tokens {event[1]} to {event[2]} reported as scored after {scored}"
                    findings.append(failed(found, f"referee_hook, probe {probe.kind}", mend))
                scored, fresh = event[2], True
            elif not fresh:
                findings.append(
                    failed(
                        f"a step before any token was scored (at {scored})", f"referee_hook, probe {probe.kind}", mend
                    )
                )
        if scored != targets and not findings:
            findings.append(
                failed(f"{scored} of {targets} tokens reported as scored", f"referee_hook, probe {probe.kind}", mend)
            )
        if findings:
            break
    return findings or [passed(f"{steps} optimizer steps, each after the tokens that it learns from were scored once")]


def judge_repeat(probes: list[Probe], answers: list[np.ndarray]) -> list[Finding]:
    for probe, nats_N in zip(probes, answers):
        if probe.kind == "repeat":
            change = first_change(answers[probe.of], nats_N)
            if change is None:
                return [passed("the same stream scored again gives bitwise the same scores")]
            gain = float((answers[probe.of] - nats_N).sum())
            mend = "forget everything between two calls: one pass, each token once"
            found = f"scored again, a stream costs {gain:+.4g} nats less; token {change + 1} is the first to differ"
            return [failed(found, f"referee_hook, mode {probe.mode}", mend)]
    return [not_checkable("the stream was not scored twice in time")]


def probed(case: Any, judge: Any) -> list[Finding]:
    dialogue = case.observed.dialogue
    if dialogue is None or dialogue.why_not:
        return [not_checkable(dialogue.why_not if dialogue else case.observed.why_no_dialogue)]
    probes = case.observed.probes
    return judge(dialogue.facts, probes[: len(dialogue.answers)], dialogue.answers, dialogue.events)


CHECKS = (
    Check(
        "causality.future", "changing a token leaves the scores of all earlier tokens bitwise unchanged",
        lambda case: probed(case, lambda f, p, a, e: judge_future(p, a)),
    ),
    Check(
        "causality.normalised", "the probabilities of all next tokens sum to one",
        lambda case: probed(case, lambda f, p, a, e: judge_sum(p, a, int(f["vocab_size"]))),
    ),
    Check(
        "causality.isolated", "where documents are said to be isolated, no state crosses their boundary",
        lambda case: probed(case, lambda f, p, a, e: judge_isolation(f, p, a)),
    ),
    Check(
        "causality.score_first", "test-time training learns only from tokens already scored",
        lambda case: probed(case, lambda f, p, a, e: judge_order(f, p, e)),
    ),
    Check(
        "causality.once", "each token is scored once: nothing is remembered from an earlier pass",
        lambda case: probed(case, lambda f, p, a, e: judge_repeat(p, a)),
    ),
)  # fmt: skip
