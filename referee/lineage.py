"""Data lineage: are the shards whole, is validation the whole validation, and is none of it in training?"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from referee.data import Data, documents
from referee.model import Check, Finding, failed, not_checkable, passed

FINEWEB_DOCUMENTS = 50_000
NO_DATA = "no data here; give --data FOLDER with the shards"


def check_shards(case: Any) -> list[Finding]:
    data: Data | None = case.data
    if data is None:
        return [not_checkable(NO_DATA)]
    shards = [*data.train, *data.val]
    findings = [
        failed(shard.fault, str(shard.path), "delete it and make or download it again")
        for shard in shards
        if shard.fault
    ]
    for shard in shards:
        tokens_N = shard.tokens_N()
        if len(tokens_N) and int(tokens_N.max()) >= data.vocab_size:
            place = int(np.argmax(tokens_N >= data.vocab_size))
            found = f"token {int(tokens_N[place])} at {place:,}; the tokenizer has {data.vocab_size:,} entries"
            findings.append(failed(found, str(shard.path), "use the tokenizer that made the shards"))
    total = sum(shard.size_bytes for shard in shards)
    return findings or [passed(f"{len(data.train)} training and {len(data.val)} validation shards, {total:,} bytes")]


def check_documents(case: Any) -> list[Finding]:
    """Every split begins with a document; BOS counts are the manifest's; FineWeb's validation has 50,000 documents."""
    data: Data | None = case.data
    if data is None:
        return [not_checkable(NO_DATA)]
    findings: list[Finding] = []
    mend = "make the shards again: BOS before every document"
    for name, shards in (("train", data.train), ("val", data.val)):
        counts = [int((shard.tokens_N() == data.bos_id).sum()) for shard in shards]
        if not shards or any(shard.fault for shard in shards):
            continue
        where, count = str(shards[0].path), sum(counts)
        first = int(shards[0].tokens_N()[0])
        if first != data.bos_id:
            found = f"the split {name} begins with token {first}, not with BOS {data.bos_id}"
            findings.append(failed(found, where, mend))
        expected: dict[str, int] = {}
        named = (data.manifest or {}).get("splits", {}).get(name, {}).get("documents")
        if isinstance(named, int):
            expected["the manifest"] = named
        if name == "val" and "fineweb" in shards[0].path.name:
            expected["FineWeb's validation"] = FINEWEB_DOCUMENTS
        wrong = [f"{source} {number:,}" for source, number in expected.items() if count != number]
        if wrong:
            found = f"the split {name} has {count:,} documents, {' and '.join(wrong)}"
            findings.append(failed(found, where, "use the whole split, as it was made"))
        elif first == data.bos_id:
            said = f", the number of {' and of '.join(expected)}" if expected else ""
            findings.append(passed(f"{name}: {count:,} documents{said}", where))
    return findings or [not_checkable("every split has a faulty shard; see lineage.shards")]


def document_hashes(data: Data, split: str) -> dict[bytes, int]:
    """Hash of the tokens of each document (without BOS) -> its number in the split."""
    shards = data.train if split == "train" else data.val
    return {
        hashlib.blake2b(one[one != data.bos_id].astype("<u2").tobytes(), digest_size=16).digest(): number
        for number, one in enumerate(documents(shards, data.bos_id))
        if (one != data.bos_id).any()
    }


def check_disjoint(case: Any) -> list[Finding]:
    data: Data | None = case.data
    if data is None:
        return [not_checkable(NO_DATA)]
    if not data.train:
        return [not_checkable("no training shards here, so nothing to compare validation with", str(data.root))]
    train, val = document_hashes(data, "train"), document_hashes(data, "val")
    both = sorted((val[key], train[key]) for key in val.keys() & train.keys())
    if both:
        found = f"{len(both)} documents are in both splits; validation's number {both[0][0]} is training's {both[0][1]}"
        return [failed(found, str(data.root), "take validation's documents out of training and train again")]
    return [passed(f"{len(val):,} validation documents, none among {len(train):,} of training")]


def check_manifest(case: Any) -> list[Finding]:
    data: Data | None = case.data
    if data is None:
        return [not_checkable(NO_DATA)]
    if data.manifest is None:
        return [not_checkable("no manifest.json beside the shards", str(data.root))]
    findings: list[Finding] = []
    mend = "make the data again, or use the folder that the manifest was written for"
    present = {shard.path.name: shard.path for shard in (*data.train, *data.val)}
    for split in data.manifest.get("splits", {}).values():
        for one in split.get("shards", []):
            path = present.pop(one["file"], None)
            if path is None:
                findings.append(failed(f"{one['file']} of the manifest is not here", str(data.root), mend))
            elif hashlib.sha256(path.read_bytes()).hexdigest() != one["sha256"]:
                findings.append(failed("not the bytes that the manifest names", str(path), mend))
    findings += [failed("a shard that the manifest does not name", str(path), mend) for path in present.values()]
    named = data.manifest.get("tokenizer", {}).get("sha256")
    if data.tokenizer is not None and hashlib.sha256(data.tokenizer.read_bytes()).hexdigest() != named:
        findings.append(failed("not the tokenizer that the manifest names", str(data.tokenizer), mend))
    return findings or [passed("shards and tokenizer have the hashes of manifest.json")]


def check_claimed_data(case: Any) -> list[Finding]:
    """Hashes of validation and tokenizer that submission.json claims, against the data given."""
    data: Data | None = case.data
    if data is None:
        return [not_checkable(NO_DATA)]
    findings: list[Finding] = []
    mend = "score on the validation shards that the claim is about"
    claims = case.submission.claims
    own = {"val_sha256": data.sha256_of_val()}
    if data.tokenizer is not None:
        own["tokenizer_sha256"] = hashlib.sha256(data.tokenizer.read_bytes()).hexdigest()
    for seed, one in claims.seeds.items() if claims else ():
        for name, right in own.items():
            if isinstance(one.get(name), str):
                found = f"seed {seed}: {name} {one[name][:12]}... claimed, {right[:12]}... in {data.root.name}"
                findings.append(passed(found) if one[name] == right else failed(found, claims.path, mend))
    return findings or [not_checkable("submission.json names neither val_sha256 nor tokenizer_sha256")]


CHECKS = (
    Check("lineage.shards", "every shard is whole: header, size, tokens below the vocabulary", check_shards),
    Check("lineage.documents", "splits begin with BOS and hold all their documents", check_documents),
    Check("lineage.disjoint", "no validation document is in training", check_disjoint),
    Check("lineage.manifest", "the data are those that the manifest names", check_manifest),
    Check("lineage.claimed", "the claim is about these validation shards and this tokenizer", check_claimed_data),
)
