"""Is a score what it says? Splits, memory of validation text, the clock, bytes, and what a result depends on."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from common.text.bpb import byte_table, token_bytes
from common.text.shards import list_shards, open_shard, write_shard
from common.text.tokenizer import load_tokenizer, train_sentencepiece
from scripts.prepare_text import document_hash, main, split_of_hash
from submissions.jepa_mamba import train_gpt
from tests.submissions.jepa_mamba.conftest import ENTRY, flags

WORDS = ["".join(random.Random(i).choices("abcdefghijklmnop", k=5)) for i in range(80)]


def sentence(seed: object, words: int = 40) -> str:
    return " ".join(random.Random(str(seed)).choices(WORDS, k=words))


def noise(seed: object, letters: int = 160) -> str:
    """Text that nothing but memory can predict."""
    return "".join(random.Random(str(seed)).choices("abcdefghijklmnopqrstuvwxyz", k=letters))


def train(tmp_path: Path, data: Path, name: str, **changes: object) -> Path:
    assert train_gpt.main(flags(data_path=data, runs_dir=tmp_path, run_id=name, **changes)) == 0
    return tmp_path / name


def bits_per_byte_of(run: Path, text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> float:
    """Score of one document by the artifact of a run."""
    document = np.frombuffer(b"\xff" + text.encode(), np.uint8).astype(np.uint16)
    write_shard(folder / "one.bin", document)
    capsys.readouterr()
    arguments = ["--score", str(run / "model.artifact"), "--val", str(folder / "one.bin"), "--device=cpu"]
    assert train_gpt.main(arguments) == 0
    return json.loads(capsys.readouterr().out)["val_bpb"]


def test_a_canary_in_validation_is_not_memorised_and_a_leaked_one_is(tmp_path: Path, capsys) -> None:
    canary = next(text for text in map(noise, range(100)) if split_of_hash(document_hash(text), 0.2) == "val")
    fresh = [noise(f"never shown {i}") for i in range(3)]
    (tmp_path / "text").mkdir()
    for index, text in enumerate([*(sentence(i) for i in range(40)), canary]):
        (tmp_path / "text" / f"{index:03d}.txt").write_text(text, encoding="utf-8")
    data, leaky = tmp_path / "data", tmp_path / "leaky"
    options = ["--source", str(tmp_path / "text"), "--out", str(data), "--tokenizer", "byte", "--val-fraction", "0.2"]
    assert main(options) == 0
    tokens = {s: np.concatenate([open_shard(p) for p in list_shards(data / f"*_{s}_*.bin")]) for s in ("train", "val")}
    held = {split: bytes(values.astype(np.uint8)) for split, values in tokens.items()}
    assert canary.encode() in held["val"]
    assert canary.encode() not in held["train"]
    leaky.mkdir()
    leaked = np.frombuffer(held["train"] + 40 * (b"\xff" + canary.encode()), np.uint8).astype(np.uint16)
    write_shard(leaky / "x_train_000000.bin", leaked)
    write_shard(leaky / "x_val_000000.bin", tokens["val"])
    scores = {}
    for name, folder in (("honest", data), ("leaky", leaky)):
        run = train(tmp_path, folder, name, iterations=150, train_log_every=50, checkpoint_every=0, model_dim=64)
        of_fresh = [bits_per_byte_of(run, text, tmp_path, capsys) for text in fresh]
        scores[name] = bits_per_byte_of(run, canary, tmp_path, capsys) - np.mean(of_fresh), np.ptp(of_fresh)
    noise_bpb = max(0.3, *(2 * spread for _, spread in scores.values()))
    assert abs(scores["honest"][0]) < noise_bpb  # as any text that nobody has seen
    assert scores["leaky"][0] < -noise_bpb  # what it would look like if validation reached training


def documents_of(folder: Path, split: str, bos_id: int) -> set[bytes]:
    """Digests of the documents of a split, cut out of the shards by code that shares nothing with prepare_text."""
    stream = b"".join(path.read_bytes()[1024:] for path in sorted(folder.glob(f"*_{split}_*.bin")))
    parts = np.frombuffer(stream, "<u2").tobytes().split(bos_id.to_bytes(2, "little"))
    assert parts[0] == b""
    return {hashlib.sha256(part).digest() for part in parts[1:]}


def test_splits_share_no_document_whatever_the_order_of_the_folder(tmp_path: Path, monkeypatch) -> None:
    texts = [sentence(i, 10) for i in range(80)] + [sentence(i, 10) for i in range(20)]  # some occur twice
    (tmp_path / "text").mkdir()
    for index, text in enumerate(texts):
        (tmp_path / "text" / f"{index:03d}.txt").write_text(text, encoding="utf-8")
    manifests, listed = [], []
    listdir, walk = os.listdir, os.walk
    for order in (1, 2):
        rng = random.Random(order)

        def shuffled(items: list, rng: random.Random = rng) -> list:
            listed.append(len(items))
            return rng.sample(items, len(items))

        def shuffled_walk(*arguments, shuffled=shuffled, **options):
            for top, folders, files in walk(*arguments, **options):
                folders[:] = shuffled(folders)
                yield top, folders, shuffled(files)

        monkeypatch.setattr(os, "listdir", lambda *a, shuffled=shuffled: shuffled(listdir(*a)))
        monkeypatch.setattr(os, "walk", shuffled_walk)
        out = tmp_path / f"data-{order}"
        options = ["--source", str(tmp_path / "text"), "--out", str(out), "--tokenizer", "byte"]
        assert main([*options, "--val-fraction", "0.2"]) == 0
        monkeypatch.undo()
        manifests.append(json.loads((out / "manifest.json").read_text(encoding="utf-8")))
        train, val = (documents_of(out, split, 0xFF) for split in ("train", "val"))
        assert len(train) + len(val) == 80
        assert not train & val
    assert max(listed) >= 100  # the folder was read in a shuffled order
    assert manifests[0]["splits"] == manifests[1]["splits"]


def test_bytes_are_those_of_the_text_counted_by_sentencepiece_itself(tmp_path: Path) -> None:
    texts = [sentence(i, 12) + "\n  naïve  😀\t12 " + noise(i, 20) for i in range(40)]
    path = tmp_path / "tokenizer.model"
    train_sentencepiece(texts, 400, path)
    tokenizer = load_tokenizer(path)
    table = byte_table(tokenizer)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in texts:
        tokens_N = np.asarray(tokenizer.encode(text))
        previous_N = np.concatenate([[tokenizer.bos_id or 0], tokens_N[:-1]])
        counted = int(token_bytes(table, previous_N, tokens_N).sum())
        assert counted == len(text.encode())
        assert processor.decode(tokens_N.tolist()) == text


def test_the_clock_counts_every_second_between_start_and_stop_and_no_other(monkeypatch) -> None:
    now = {"perf": 100.0, "wall": 1e9}
    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: now["perf"])
    monkeypatch.setattr(train_gpt.time, "time", lambda: now["wall"])
    alone = train_gpt.Ranks(0, 1, torch.device("cpu"))
    clock = train_gpt.Clock(alone, "wall", 7.0, train_gpt.Interruption())
    rng, learned = random.Random(0), 7.0
    readings = []
    for _ in range(50):
        clock.start()
        for _ in range(rng.randrange(4)):
            seconds = rng.uniform(0, 2)
            now["perf"] += seconds
            now["wall"] += rng.uniform(-1e6, 1e6)  # somebody sets the system's time
            learned += seconds
            readings.append(clock.step_done()[0])
            assert readings[-1] == pytest.approx(learned)
        assert clock.stop() == pytest.approx(learned)
        now["perf"] += rng.uniform(0, 100)  # validation, checkpoints
    assert readings == sorted(readings)


def test_a_run_claims_no_more_seconds_than_passed(tmp_path: Path, byte_data: Path) -> None:
    import time

    began_s = time.perf_counter()
    options = {"iterations": 12, "val_loss_every": 4, "train_log_every": 1, "warmup_steps": 1}
    run = train(tmp_path, byte_data, "run", **options)
    passed_s = time.perf_counter() - began_s
    events = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    elapsed = [event["elapsed_s"] for event in events if "elapsed_s" in event]
    assert elapsed == sorted(elapsed)
    assert 0 < elapsed[0] < elapsed[-1] == json.loads((run / "summary.json").read_text())["train_s"] < passed_s


@pytest.fixture(scope="module")
def byte_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    for split, count in (("train", 60), ("val", 4)):
        stream = b"".join(b"\xff" + sentence(f"{split} {i}").encode() for i in range(count))
        write_shard(folder / f"x_{split}_000000.bin", np.frombuffer(stream, np.uint8).astype(np.uint16))
    return folder


def test_a_result_does_not_depend_on_hash_seeds_and_threads_move_it_by_rounding_only(
    tmp_path: Path, byte_data: Path
) -> None:
    """Two environments: other hash seed, other number of threads. Same threads: bit for bit. Others: by rounding."""
    results = {}
    for name, environ in (
        ("a", {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}),
        ("b", {"PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "1"}),
        ("c", {"PYTHONHASHSEED": "3", "OMP_NUM_THREADS": "2"}),
    ):
        arguments = flags(data_path=byte_data, runs_dir=tmp_path, run_id=name, iterations=8, jepa_diagnostics=0)
        environment = {**os.environ, **environ, "PYTHONPATH": str(ENTRY.parents[2])}
        done = subprocess.run([sys.executable, str(ENTRY), *arguments], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        losses = [event["loss"] for event in events if event["event"] == "step"]
        results[name] = (losses, hashlib.sha256((tmp_path / name / "model.artifact").read_bytes()).hexdigest())
    assert results["a"] == results["b"]
    np.testing.assert_allclose(results["c"][0], results["a"][0], rtol=0, atol=1e-5)
