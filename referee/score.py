"""Score: the artifact scored again, by the program in a fresh process and by the referee's own arithmetic.

The referee's own bits per byte come from the nats of every token that the program's hook gives and from the bytes
that the referee counts itself.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from referee.data import Data, decoded_bytes, documents, pieces_of, table_bytes
from referee.folder import Submission
from referee.model import Check, Finding, failed, not_checkable, passed

CPU_TOLERANCE_BPB = 5e-5  # other thread counts and kernels add in another order
GPU_TOLERANCE_BPB = 2e-3  # bfloat16 there, float32 here
SAME_SUM = 1e-9  # relative: the same nats added twice
INVARIANT_TOLERANCE = 1e-3  # relative; claims are often printed with four decimals
DECODE_AT_MOST_TOKENS = 2_000_000
# FineWeb's first 50,000 documents: about 151.08 million bytes in every tokenizer of the challenge.
BYTES_PER_TOKEN = {1024: 151.08e6 / 62_021_632, 8192: 151.08e6 / 40_540_160}
VOCABULARY_NAMES = {1024: ("sp1024", "sp-1024", "1024 bpe"), 8192: ("sp8192", "sp-8192", "8192 bpe", "8192_bpe")}


def claimed_runs(case: Any) -> list[tuple[str, dict[str, Any]]]:
    """(seed, what is claimed of it); the top level stands for a lone run without seeds."""
    claims = case.submission.claims
    if claims is None:
        return []
    return list(claims.seeds.items()) or [("-", claims.raw)]


def check_rescored(case: Any) -> list[Finding]:
    """val_bpb and val_loss of each seed's weights, scored by the program in a fresh process, against the claim."""
    if not case.observed.scores:
        return [not_checkable(case.observed.why_no_scores)]
    findings: list[Finding] = []
    for one in case.observed.scores:
        if one.result is None:
            findings.append(not_checkable(one.why_not, one.weights.label))
            continue
        mend = "claim what the artifact scores: read back from disk, on all validation tokens"
        result = one.result
        runs = claimed_runs(case)
        claimed = next((c for seed, c in runs if seed in (one.weights.seed, "-")), runs[0][1] if len(runs) == 1 else {})
        log = case.submission.log_of(one.weights.seed or "") or next(iter(case.submission.logs), None)
        tolerance = GPU_TOLERANCE_BPB if log is not None and log.on_gpu else CPU_TOLERANCE_BPB
        compared = False
        for key, scale in (("val_bpb", 1.0), ("val_loss", 3.0)):
            if isinstance(claimed.get(key), (int, float)):
                compared = True
                found = f"{key} {claimed[key]:.6f} claimed, {result[key]:.6f} scored again"
                right = abs(claimed[key] - result[key]) <= tolerance * scale
                where = one.weights.label
                findings.append(passed(found, where) if right else failed(found, where, mend))
        for key in ("val_tokens", "val_bytes"):
            if isinstance(claimed.get(key), (int, float)) and claimed[key] != result[key]:
                found = f"{key} {claimed[key]:,} claimed, {result[key]:,} scored again"
                findings.append(failed(found, one.weights.label, mend))
        if not compared:
            findings.append(not_checkable("no claim is about these weights", one.weights.label))
    return findings


def own_bytes(data: Data) -> int:
    return table_bytes(pieces_of(data), data.val_N)


def check_own(case: Any) -> list[Finding]:
    """The program's `--score` against the referee's sum over the hook's nats and its own count of bytes."""
    dialogue, data = case.observed.dialogue, case.data
    if dialogue is None or dialogue.validation_nats is None or data is None:
        return [not_checkable(dialogue.why_not if dialogue and dialogue.why_not else case.observed.why_no_dialogue)]
    nats_N = dialogue.validation_nats
    scored = next((one.result for one in case.observed.scores if one.weights == case.observed.asked), None)
    total, size = float(nats_N.sum()), own_bytes(data)
    manifest_bytes = (data.manifest or {}).get("splits", {}).get("val", {}).get("original_bytes")
    if scored is not None and scored.get("byte_source") == "original" and manifest_bytes:
        size = int(manifest_bytes)
    bpb = total / (math.log(2.0) * size)
    if scored is None:
        return [not_checkable(f"the program has no --score; the hook's nats give {bpb:.6f} bpb")]
    found = f"{bpb:.9f} bpb by the referee's sum and bytes, {scored['val_bpb']:.9f} by the program's --score"
    mend = "--score must add up what the model gives every token, over the bytes of the text"
    if abs(bpb - scored["val_bpb"]) <= SAME_SUM * bpb + 1e-12 * len(nats_N):
        return [passed(found)]
    return [failed(found, case.submission.entry or "", mend)]


def check_bytes(case: Any) -> list[Finding]:
    """The referee's byte table against decoded text, then the program's and the claimed bytes against the table."""
    data: Data | None = case.data
    if data is None:
        return [not_checkable("no data here; give --data FOLDER with the validation shards")]
    if any(shard.fault for shard in data.val) or int(data.val_N.max()) >= data.vocab_size:
        return [not_checkable("the validation shards are faulty; see lineage.shards")]
    pieces, findings = pieces_of(data), []
    spelled, counted, looked, skipped = 0, 0, 0, 0
    for document_N in documents(data.val, data.bos_id):
        size = decoded_bytes(data, document_N)
        looked += len(document_N)
        if size is None:
            skipped += 1
        else:
            spelled += size
            counted += table_bytes(pieces, document_N)
        if looked >= DECODE_AT_MOST_TOKENS:
            break
    note = f", {skipped} documents of bytes that are no text left out" if skipped else ""
    where = str(data.tokenizer or "bytes")
    if spelled == counted:
        findings.append(passed(f"the byte table gives the {spelled:,} bytes of {looked:,} decoded tokens{note}", where))
    else:
        found = f"the byte table gives {counted:,} bytes for text of {spelled:,}{note}"
        findings.append(not_checkable(f"{found}: this tokenizer's decoding is not the challenge's rule", where))
    right = table_bytes(pieces, data.val_N)
    allowed = {right}
    original = (data.manifest or {}).get("splits", {}).get("val", {}).get("original_bytes")
    if original:
        allowed.add(int(original))
    shown = " or ".join(f"{value:,}" for value in sorted(allowed))
    mend = "count the UTF-8 bytes of each piece without its leading space, plus one for a space that is text"
    for seed, claimed in claimed_runs(case):
        if isinstance(claimed.get("val_bytes"), (int, float)):
            found = f"seed {seed}: val_bytes {claimed['val_bytes']:,} claimed, the text has {shown}"
            good = claimed["val_bytes"] in allowed
            findings.append(passed(found) if good else failed(found, case.submission.claims.path, mend))
    for one in case.observed.scores:
        if one.result is not None and one.result.get("val_bytes") not in allowed:
            found = f"--score divides by {one.result.get('val_bytes'):,} bytes, the text has {shown}"
            findings.append(failed(found, case.submission.entry or "", mend))
    return findings


def vocabulary_named(submission: Submission) -> int | None:
    """Vocabulary of FineWeb's tokenizers that the configuration, claims or papers name; None if it is another's."""
    if any(fact.kind == "tokenizer" and "fineweb" not in fact.name for fact in submission.files):
        return None
    if any("caseops" in fact.path.lower() or "lossless_caps" in fact.path.lower() for fact in submission.files):
        return None
    for log in submission.logs:
        if str(log.config.get("vocab_size", "")).isdecimal():
            data = str(log.config.get("data_path") or log.config.get("datasets_dir") or "")
            return int(log.config["vocab_size"]) if "fineweb" in data else None
    claims = submission.claims
    text = (
        f"{submission.root.name} {claims.raw.get('name') if claims else ''} {claims.raw.get('blurb') if claims else ''}"
    )
    for log in submission.logs:
        text += log.text[:20_000]
    named = [size for size, names in VOCABULARY_NAMES.items() if any(name in text.lower() for name in names)]
    return named[0] if len(named) == 1 else None


def check_invariant(case: Any) -> list[Finding]:
    """tokens x loss / (ln 2 x bpb) is the bytes of the text, whoever says the three numbers."""
    submission: Submission = case.submission
    findings: list[Finding] = []
    mend = "loss, bpb, tokens and bytes must be of one scoring pass over the whole validation text"
    known = BYTES_PER_TOKEN.get(vocabulary_named(submission) or 0)
    stated: list[tuple[str, dict[str, Any], str]] = []
    if submission.claims is not None:
        where = submission.claims.path
        stated = [(f"seed {seed}: ", one, where) for seed, one in submission.claims.seeds.items()]
        if not submission.claims.seeds:
            stated.append(("", submission.claims.raw, where))
    for label, one, where in stated:
        loss, bpb, tokens, size = (one.get(name) for name in ("val_loss", "val_bpb", "val_tokens", "val_bytes"))
        if not isinstance(loss, (int, float)) or not isinstance(bpb, (int, float)) or bpb <= 0:
            continue
        per_token = loss / (math.log(2.0) * bpb)
        if isinstance(tokens, int) and isinstance(size, int) and tokens > 0 and size > 0:
            found = (
                f"{label}{tokens:,} tokens x loss / (ln 2 x bpb) = {tokens * per_token:,.1f} bytes; {size:,} claimed"
            )
            right = abs(tokens * per_token - size) <= 1e-6 * size
            findings.append(passed(found, where) if right else failed(found, where, mend))
        elif known is not None:
            found = f"{label}loss / (ln 2 x bpb) = {per_token:.4f} bytes a token; FineWeb's validation has {known:.4f}"
            right = abs(per_token / known - 1.0) <= INVARIANT_TOLERANCE
            findings.append(passed(found, where) if right else failed(found, where, mend))
    if not findings and known is not None:
        for log in submission.logs:
            finals = [r for r in log.results if not r.periodic and r.loss is not None and float(r.bpb) > 0]
            if finals:
                per_token = float(finals[-1].loss or 0) / (math.log(2.0) * float(finals[-1].bpb))
                found = f"loss / (ln 2 x bpb) = {per_token:.4f} bytes a token; FineWeb's validation has {known:.4f}"
                right = abs(per_token / known - 1.0) <= INVARIANT_TOLERANCE
                where = f"{log.name}:{finals[-1].line}"
                findings.append(passed(found, where) if right else failed(found, where, mend))
    why = "no claim has loss and bpb of a known text (FineWeb's sp1024 or sp8192, or own counts)"
    return findings or [not_checkable(why)]


def check_coverage(case: Any) -> list[Finding]:
    """Every validation token scored once, the last window too, without a cap."""
    findings: list[Finding] = []
    data: Data | None = case.data
    mend = "score every token once: no limit of tokens, and a last window as short as the text leaves it"
    if data is not None:
        expected = len(data.val_N) - 1
        for seed, claimed in claimed_runs(case):
            if isinstance(claimed.get("val_tokens"), (int, float)):
                found = f"seed {seed}: {claimed['val_tokens']:,} tokens claimed, validation has {expected:,} to score"
                good = claimed["val_tokens"] == expected
                findings.append(passed(found) if good else failed(found, case.submission.claims.path, mend))
        for one in case.observed.scores:
            if one.result is not None and one.result.get("val_tokens") != expected:
                found = f"--score covers {one.result.get('val_tokens'):,} of {expected:,} tokens"
                findings.append(failed(found, case.submission.entry or "", mend))
        dialogue = case.observed.dialogue
        if dialogue is not None and dialogue.validation_nats is not None:
            nats_N = dialogue.validation_nats
            silent = np.flatnonzero(~(nats_N > 0.0) | ~np.isfinite(nats_N))
            if len(silent):
                found = f"{len(silent):,} tokens have no score (0 nats or none), the first is {silent[0] + 1:,}"
                findings.append(failed(found, f"referee_hook, mode {dialogue.mode}", mend))
            else:
                findings.append(
                    passed(
                        f"each of {len(nats_N):,} tokens costs more than 0 nats", f"referee_hook, mode {dialogue.mode}"
                    )
                )
    full = {1024: 62_021_632, 8192: 40_540_160}.get(vocabulary_named(case.submission) or 0)
    for log in case.submission.logs:
        if log.val_tokens is not None and full is not None:
            found = f"validation of {log.val_tokens:,} tokens; the full one has {full:,}"
            good = full - 4096 <= log.val_tokens <= full + 1
            findings.append(passed(found, log.name) if good else failed(found, log.name, mend))
    return findings or [not_checkable("no data here and no count of tokens in claim or log; give --data")]


CHECKS = (
    Check("score.rescored", "the artifact, scored again in a fresh process, gives what is claimed", check_rescored),
    Check("score.own", "the program's score is the sum over its model's nats, over the bytes of the text", check_own),
    Check("score.bytes", "bytes are those of the text that the tokens spell", check_bytes),
    Check("score.invariant", "tokens x loss / (ln 2 x bpb) is the number of bytes of the text", check_invariant),
    Check("score.coverage", "every validation token is scored once, the last window too; no cap", check_coverage),
)
