"""A good submission, made once: three trained seeds, bundled. And a small one in NumPy, for tests of the staging."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.verifier_mutants import Bench, make_bench

# A byte model that counts: bigrams with one added, over the document so far. It has every interface that the referee
# uses and needs no framework.
TOY = '''"""A counting model."""
import argparse, glob, json, math, os, sys
import numpy as np

V, BOS = 256, 255


def nll(tokens, mode, on_scored=None):
    counts, totals, out = np.ones((V, V)), np.full(V, float(V)), np.zeros(len(tokens) - 1)
    for i, (x, y) in enumerate(zip(tokens[:-1].tolist(), tokens[1:].tolist())):
        if x == BOS:
            counts, totals = np.ones((V, V)), np.full(V, float(V))
        out[i] = -math.log(counts[x, y] / totals[x])
        counts[x, y] += 1.0
        totals[x] += 1.0
    return out


def referee_hook(artifact):
    return {"nll": nll, "modes": ["plain"], "vocab_size": V, "bos_id": BOS, "isolates_documents": True, "window": 16,
            "learns_while_scoring": False}


def score(pattern):
    tokens = np.concatenate([np.fromfile(p, "<u2", offset=1024) for p in sorted(glob.glob(pattern))])
    nats, size = nll(tokens, "plain"), int((tokens[1:] != BOS).sum())
    loss = float(nats.sum()) / len(nats)
    bpb = float(nats.sum()) / math.log(2) / size
    return {"val_bpb": bpb, "val_loss": loss, "val_tokens": len(nats), "val_bytes": size}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--score")
    parser.add_argument("--val")
    parser.add_argument("--device")
    arguments = parser.parse_args()
    if arguments.score:
        print(json.dumps(score(arguments.val)))
    else:
        print("trained", os.environ["ITERATIONS"], "steps on", os.environ["DATA_PATH"])
'''


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("bench") / "good")


def write_shard_bytes(path: Path, texts: list[str]) -> None:
    tokens = np.concatenate([np.append(np.uint16(255), np.frombuffer(t.encode(), np.uint8)) for t in texts])
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


@pytest.fixture
def toy(tmp_path) -> Path:
    """`submission/` with the counting model and its claim, `data/` with byte shards."""
    folder, data = tmp_path / "submission", tmp_path / "data"
    folder.mkdir()
    data.mkdir()
    write_shard_bytes(data / "toy_train_000000.bin", [f"the {n} trains of the town\n" * 3 for n in range(20)])
    write_shard_bytes(data / "toy_val_000000.bin", [f"a {n} tram in a town — at dusk\n" * 4 for n in range(5)])
    (folder / "train_gpt.py").write_text(TOY, encoding="utf-8")
    (folder / "model.artifact").write_bytes(b"weights")
    (folder / "README.md").write_text("# Toy\n", encoding="utf-8")
    claim = {"name": "toy", "author": "a", "github_id": "g", "date": "2026-01-01", "track": "non_record_16mb"}
    (folder / "submission.json").write_text(json.dumps(claim), encoding="utf-8")
    return tmp_path
