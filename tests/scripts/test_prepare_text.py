"""prepare_text: the manifest is true, splits are disjoint, runs are repeatable, restartable and refuse well."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError, DataError, GolfError, ShardError, TokenizerError
from common.text.bpb import byte_table, token_bytes
from common.text.shards import list_shards, open_shard, write_shard
from common.text.sources import FINEWEB_VARIANTS
from common.text.tokenizer import ByteTokenizer, load_tokenizer
from scripts.prepare_text import (
    HashTable,
    check_disjoint,
    document_hash,
    main,
    parse_args,
    prepare,
    sample_chunks,
    split_of_hash,
    whole_documents,
)

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "prepare_text.py"
FINEWEB_MODEL = ROOT / "tests" / "golden" / "fineweb_8192_bpe.model"  # FineWeb's published 8192-entry tokenizer, lossy


def documents(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["the", "value", "of", "self", "return", "naïve", "▁", "x  y", "\n    ", "\t", "12", "😀"]
    return [f"document {seed} {i} " + " ".join(rng.choices(words, k=rng.randrange(1, 60))) for i in range(count)]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def source(tmp_path):
    return write_lines(tmp_path / "my corpus.jsonl", documents(300))


def run(*options: object) -> int:
    return main([str(option) for option in options])


def texts_of(folder: Path, split: str) -> list[str]:
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["tokenizer"]
    tokenizer = load_tokenizer("byte" if entry["file"] is None else folder / entry["file"])
    return [tokenizer.decode(d) for d in whole_documents(list_shards(folder / f"*_{split}_*.bin"), entry["bos_id"])]


@pytest.mark.parametrize("tokenizer", [["byte"], ["bpe", "--vocab-size", "340"]])
@pytest.mark.parametrize("workers", [1, 2])
def test_shards_hold_exactly_the_documents(tmp_path, source, tokenizer, workers):
    out = tmp_path / "out"
    assert run("--source", source, "--out", out, "--tokenizer", *tokenizer, "--val-fraction", 0.2, "--workers", workers,
               "--shard-tokens", 5000) == 0  # fmt: skip
    manifest = json.loads((out / "manifest.json").read_text())
    expected = {"train": [], "val": []}
    for text in documents(300):
        expected[split_of_hash(document_hash(text), 0.2)].append(text)
    for split, texts in expected.items():
        facts = manifest["splits"][split]
        assert texts_of(out, split) == texts
        assert facts["documents"] == len(texts)
        assert facts["original_bytes"] == facts["decoded_bytes"] == sum(len(text.encode()) for text in texts)
        digests = sorted(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
        assert (out / f"{split}.hashes").read_bytes() == b"".join(digests)
        assert facts["hashes_sha256"] == hashlib.sha256(b"".join(digests)).hexdigest()
        assert [shard["file"] for shard in facts["shards"]] == [p.name for p in list_shards(out / f"*_{split}_*.bin")]
        for shard in facts["shards"]:
            content = (out / shard["file"]).read_bytes()
            assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
            assert shard["tokens"] <= 5000
        assert facts["tokens"] == sum(shard["tokens"] for shard in facts["shards"])
    assert len(manifest["splits"]["train"]["shards"]) > 1
    assert list_shards(out / "*.bin")[0].name == "my_corpus_train_000000.bin"
    assert (out / "tokenizer.model").exists() == (tokenizer[0] == "bpe")
    assert not (out / ".partial").exists()
    assert check_disjoint(out) == {
        "train_documents": len(expected["train"]), "val_documents": len(expected["val"]), "hashes_recomputed": True,
        "documents_in_both": 0,
    }  # fmt: skip


def test_number_of_processes_changes_nothing(tmp_path, source):
    for workers in (1, 3):
        assert run("--source", source, "--out", tmp_path / str(workers), "--tokenizer", "bpe", "--vocab-size", 340,
                   "--val-fraction", 0.2, "--workers", workers) == 0  # fmt: skip
    for path in sorted((tmp_path / "1").iterdir()):
        assert path.read_bytes() == (tmp_path / "3" / path.name).read_bytes(), path.name


def test_split_and_tokenizer_do_not_depend_on_order(tmp_path, source):
    shuffled = documents(300)
    random.Random(5).shuffle(shuffled)
    other = write_lines(tmp_path / "shuffled.jsonl", shuffled)
    for number, path in enumerate((source, other)):
        run("--source", path, "--out", tmp_path / str(number), "--tokenizer", "bpe", "--vocab-size", 340,
            "--workers", 1, "--val-fraction", 0.2, "--tokenizer-sample-bytes", "20K")  # fmt: skip
    for name in ("train.hashes", "val.hashes", "tokenizer.model"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_duplicates_are_kept_once(tmp_path):
    texts = documents(100)
    source = write_lines(tmp_path / "s.jsonl", texts + texts[:40] + [texts[3]] * 5)
    run("--source", source, "--out", tmp_path / "out", "--workers", 1, "--val-fraction", 0.3)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["duplicates_dropped"] == 45
    assert sorted(texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")) == sorted(texts)


def test_validation_source_wins_over_equal_training_documents(tmp_path):
    train, val = documents(80), documents(20, seed=1) + documents(80)[10:15]
    run("--source", write_lines(tmp_path / "t.jsonl", train), "--val-source", write_lines(tmp_path / "v.jsonl", val),
        "--out", tmp_path / "out", "--workers", 1)  # fmt: skip
    assert texts_of(tmp_path / "out", "val") == val
    assert texts_of(tmp_path / "out", "train") == train[:10] + train[15:]
    assert check_disjoint(tmp_path / "out")["documents_in_both"] == 0


def test_limits(tmp_path, source):
    run("--source", source, "--out", tmp_path / "out", "--workers", 1, "--val-fraction", 0.3,
        "--max-train-bytes", "10K", "--max-val-bytes", 2000)  # fmt: skip
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert 9000 < manifest["splits"]["train"]["original_bytes"] <= 10_000
    assert 1500 < manifest["splits"]["val"]["original_bytes"] <= 2000
    assert manifest["cut_at_train_limit"]
    assert manifest["dropped_over_val_limit"] > 0


def test_given_lossy_model_tells_both_byte_counts(tmp_path, source, capsys):
    out = tmp_path / "out"
    assert run("--source", source, "--out", out, "--tokenizer", FINEWEB_MODEL, "--workers", 1) == 0
    assert "LOSSY" in capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tokenizer"]["lossless"] is False
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(FINEWEB_MODEL.read_bytes()).hexdigest()
    facts = manifest["splits"]["train"]
    assert facts["decoded_bytes"] == sum(len(text.encode()) for text in texts_of(out, "train"))
    assert facts["decoded_bytes"] < facts["original_bytes"]
    assert check_disjoint(out)["hashes_recomputed"] is False


def test_second_run_does_nothing_and_other_settings_need_overwrite(tmp_path, source, capsys):
    out = tmp_path / "out"
    first = ["--source", source, "--out", out, "--workers", 1]
    run(*first)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert run(*first) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    other = ["--source", source, "--out", out, "--workers", 1, "--tokenizer", "bpe", "--vocab-size", 340]
    assert run(*other) == 2
    assert "tokenizer 'byte' -> 'bpe'" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert run(*other, "--overwrite", "--name", "renamed") == 0
    assert {p.name.split("_")[0] for p in list_shards(out / "*.bin")} == {"renamed"}
    check_disjoint(out)


def test_foreign_folders_are_never_touched(tmp_path, source, capsys):
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.doc").write_text("precious")
    assert run("--source", source, "--out", out, "--overwrite") == 2
    assert "thesis.doc" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["thesis.doc"]
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shard(shards / "a_train_000000.bin", np.array([1]))
    assert run("--source", source, "--out", shards) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("--source", source, "--out", tmp_path / "my corpus.jsonl") == 2


def test_a_finished_folder_may_hold_other_files(tmp_path, source, capsys):
    out = tmp_path / "out"
    command = ("--source", source, "--out", out, "--tokenizer", "byte")
    assert run(*command) == 0
    (out / "notes.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run(*command) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    capsys.readouterr()
    assert run(*command, "--max-train-bytes", "1000", "--overwrite") == 2
    assert "never touched" in capsys.readouterr().err


def test_killed_at_any_moment_restarts_cleanly(tmp_path, source):
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), "--source", str(source), "--out", str(out), "--tokenizer", "bpe",
               "--vocab-size", "340", "--workers", "2", "--val-fraction", "0.2"]  # fmt: skip
    kills = 0
    for delay_s in (0.3, 0.5, 0.7, 0.9):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
        time.sleep(delay_s)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (out / "manifest.json").exists():
            check_disjoint(out)  # a manifest is never half a truth
            shutil.rmtree(out)
    assert kills
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bars where there is no terminal
    check_disjoint(out)
    clean = tmp_path / "clean"
    run("--source", source, "--out", clean, "--tokenizer", "bpe", "--vocab-size", 340, "--workers", 1,
        "--val-fraction", 0.2)  # fmt: skip
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in clean.iterdir())
    for path in clean.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_killed_while_moving_files_into_place(tmp_path, source, monkeypatch):
    reference = tmp_path / "reference"
    options = ["--source", source, "--workers", 1, "--shard-tokens", 5000, "--tokenizer", "bpe", "--vocab-size", 340]
    run(*options, "--out", reference)
    moves = len(list(reference.iterdir()))
    real = os.replace
    for stop in range(moves):
        out = tmp_path / f"out{stop}"
        count = 0

        def replace(a, b, out=out, stop=stop):
            nonlocal count
            if Path(b).parent == out:
                if count == stop:
                    raise KeyboardInterrupt
                count += 1
            real(a, b)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            run(*options, "--out", out)
        monkeypatch.setattr(os, "replace", real)
        assert not (out / "manifest.json").exists()
        assert run(*options, "--out", out) == 0
        for path in reference.iterdir():
            assert path.read_bytes() == (out / path.name).read_bytes()
        assert not (out / ".partial").exists()


def test_two_runs_at_once(tmp_path, source, capsys):
    import fcntl

    out = tmp_path / "out"
    (out / ".partial").mkdir(parents=True)
    with open(out / ".partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run("--source", source, "--out", out) == 2
    assert "another run" in capsys.readouterr().err


@pytest.fixture
def prepared(tmp_path, source):
    run("--source", source, "--out", tmp_path / "data", "--workers", 1, "--val-fraction", 0.2)
    return tmp_path / "data"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_check_finds_every_change(prepared, tmp_path, capsys):
    shard = list_shards(prepared / "*_train_*.bin")[0]
    attacks = {
        "sha256": lambda f: flip(f / shard.name, 2000),
        "truncated": lambda f: (f / shard.name).write_bytes((f / shard.name).read_bytes()[:-2]),
        "cannot be read": lambda f: (f / shard.name).unlink(),
        "train.hashes: sha256": lambda f: flip(f / "train.hashes", 5),
        "val.hashes: missing": lambda f: (f / "val.hashes").unlink(),
        "train.hashes: 3": lambda f: edit_manifest(f, lambda m: m["splits"]["train"].update(documents=7)),
        "decoded_bytes": lambda f: edit_manifest(f, lambda m: m["splits"]["val"].update(decoded_bytes=7)),
        "manifest.json: missing": lambda f: (f / "manifest.json").unlink(),
        "format": lambda f: edit_manifest(f, lambda m: m.update(format="x")),
        "cannot be read (": lambda f: (f / "manifest.json").write_text("{"),
    }
    for number, (told, attack) in enumerate(attacks.items()):
        folder = tmp_path / f"attack{number}"
        shutil.copytree(prepared, folder)
        attack(folder)
        assert run("--check", folder) == 2, told
        assert told in capsys.readouterr().err
    assert run("--check", prepared) == 0
    assert "0 in both" in capsys.readouterr().out


def test_check_finds_a_training_document_in_validation_despite_a_fitting_manifest(prepared):
    tokenizer = ByteTokenizer()
    leaked = texts_of(prepared, "train")[0]
    val = list_shards(prepared / "*_val_*.bin")[0]
    tokens = np.concatenate([open_shard(val), np.array([255]), tokenizer.encode(leaked)])
    write_shard(val, tokens)
    hashes = np.frombuffer((prepared / "val.hashes").read_bytes() + document_hash(leaked), dtype="S16").copy()

    def fit(manifest):
        facts = manifest["splits"]["val"]
        facts["tokens"] = facts["shards"][0]["tokens"] = len(tokens)
        facts["shards"][0]["sha256"] = hashlib.sha256(val.read_bytes()).hexdigest()
        facts["documents"] += 1
        facts["decoded_bytes"] += len(leaked.encode())

    edit_manifest(prepared, fit)
    with pytest.raises(DataError, match=r"val\.hashes"):
        check_disjoint(prepared)  # the hash file lacks it
    hashes.sort()
    (prepared / "val.hashes").write_bytes(hashes.tobytes())
    digest = hashlib.sha256(hashes.tobytes()).hexdigest()
    edit_manifest(prepared, lambda m: m["splits"]["val"].update(hashes_sha256=digest))
    with pytest.raises(DataError, match="1 documents are in both splits"):
        check_disjoint(prepared)
    other = document_hash("another text")
    hashes[hashes == document_hash(leaked)] = other
    hashes.sort()
    (prepared / "val.hashes").write_bytes(hashes.tobytes())
    digest = hashlib.sha256(hashes.tobytes()).hexdigest()
    edit_manifest(prepared, lambda m: m["splits"]["val"].update(hashes_sha256=digest))
    with pytest.raises(DataError, match="not the hashes of the documents"):
        check_disjoint(prepared)  # a hash file that lies about the shards


def test_check_names_a_foreign_tokenizer(tmp_path, source):
    out = tmp_path / "out"
    run("--source", source, "--out", out, "--tokenizer", "bpe", "--vocab-size", 340, "--workers", 1)
    flip(out / "tokenizer.model", -1)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        check_disjoint(out)


# ---------------------------------------------------------------- published shards


def make_mirror(root: Path, variant: str, tokenizer, overlap: bool = False) -> dict[str, list[str]]:
    layout = FINEWEB_VARIANTS[variant]
    val = documents(30, seed=1)
    splits = {"val": val, "train": documents(200, seed=2) + (val[:3] if overlap else [])}
    (root / layout.folder).mkdir(parents=True)
    if layout.tokenizer_file:
        (root / layout.tokenizer_file).parent.mkdir(parents=True)
        shutil.copyfile(FINEWEB_MODEL, root / layout.tokenizer_file)
    for split, texts in splits.items():
        stream = np.concatenate([np.concatenate([[tokenizer.bos_id], tokenizer.encode(text)]) for text in texts])
        for number, start in enumerate(range(0, len(stream), 3000)):  # documents run over from shard to shard
            write_shard(root / layout.folder / f"fineweb_{split}_{number:06d}.bin", stream[start : start + 3000])
    return splits


@pytest.mark.parametrize(("variant", "overlap"), [("sp8192", False), ("bytes", False), ("sp8192", True)])
def test_published_shards_from_a_mirror(tmp_path, variant, overlap, capsys):
    tokenizer = load_tokenizer("byte" if variant == "bytes" else FINEWEB_MODEL)
    splits = make_mirror(tmp_path / "mirror", variant, tokenizer, overlap)
    out = tmp_path / "out"
    command = ["--source", f"fineweb:{variant}", "--mirror", tmp_path / "mirror", "--out", out]
    assert run(*command) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    table = byte_table(tokenizer)
    for split, texts in splits.items():
        facts = manifest["splits"][split]
        encoded = [tokenizer.encode(text).astype(np.int64) for text in texts]
        n_bytes = sum(int(token_bytes(table, np.array([tokenizer.bos_id, *e[:-1]]), e).sum()) for e in encoded)
        assert facts["documents"] == len(texts)
        assert facts["tokens"] == sum(len(e) + 1 for e in encoded)
        assert (facts["original_bytes"], facts["decoded_bytes"]) == (None, n_bytes)
        for path in list_shards(out / f"fineweb_{split}_*.bin"):
            published = tmp_path / "mirror" / FINEWEB_VARIANTS[variant].folder / path.name
            assert path.read_bytes() == published.read_bytes()
    assert check_disjoint(out)["documents_in_both"] == (3 if overlap else 0)
    capsys.readouterr()
    assert run(*command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run(*command, "--train-shards", 1) == 2
    assert run(*command, "--train-shards", 1, "--overwrite") == 0
    assert len(list_shards(out / "*_train_*.bin")) == 1


def test_download_continues_where_it_stopped(tmp_path):
    make_mirror(tmp_path / "mirror", "sp8192", load_tokenizer(FINEWEB_MODEL))
    from scripts.prepare_text import MirrorFolder

    class Stopping(MirrorFolder):
        def __init__(self, root, allowed):
            super().__init__(root)
            self.allowed, self.names = allowed, []

        def download(self, path, folder):
            if self.allowed == 0:
                raise DataError("the line went dead")
            self.allowed -= 1
            self.names.append(path)
            return super().download(path, folder)

    args = parse_args(["--source", "fineweb:sp8192", "--out", str(tmp_path / "out")])
    first, second = Stopping(tmp_path / "mirror", 3), Stopping(tmp_path / "mirror", 99)
    with pytest.raises(DataError, match="dead"):
        prepare(args, first)
    assert not (tmp_path / "out" / "manifest.json").exists()
    prepare(args, second)
    assert len(first.names) == 3
    assert not set(first.names) & set(second.names)
    assert check_disjoint(tmp_path / "out")["documents_in_both"] == 0
    assert not list((tmp_path / "out").glob("download*"))


def test_damaged_published_shard_is_not_taken(tmp_path):
    make_mirror(tmp_path / "mirror", "sp8192", load_tokenizer(FINEWEB_MODEL))
    shard = next((tmp_path / "mirror").rglob("fineweb_val_000000.bin"))
    shard.write_bytes(shard.read_bytes()[:-4])
    mirror = str(tmp_path / "mirror")
    args = parse_args(["--source", "fineweb:sp8192", "--out", str(tmp_path / "out"), "--mirror", mirror])
    with pytest.raises(ShardError, match="truncated"):
        prepare(args)


def test_published_documents_are_tokenized_here(tmp_path):
    (tmp_path / "mirror" / "datasets").mkdir(parents=True)
    write_lines(tmp_path / "mirror" / "datasets" / "docs_selected.jsonl", documents(100))
    assert run("--source", "fineweb:docs", "--mirror", tmp_path / "mirror", "--out", tmp_path / "out", "--workers", 1,
               "--val-fraction", 0.2) == 0  # fmt: skip
    assert list_shards(tmp_path / "out" / "fineweb_val_*.bin")
    assert sorted(texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")) == sorted(documents(100))


# ---------------------------------------------------------------- small parts and the command line


def test_hash_table_is_a_set():
    rng = random.Random(1)
    table, reference = HashTable(), set()
    keys = [rng.randbytes(16) for _ in range(9000)] + [b"\0" * 16, b"\0" * 15 + b"\1"]
    for key in keys + rng.choices(keys, k=9000):
        assert table.add(key) == (key not in reference)
        reference.add(key)
    assert len(table) == len(reference) == 9002


def test_sample_is_bounded_and_from_training_only():
    splits = ["val" if i % 3 == 0 else "train" for i in range(200)]
    texts = [(split, document_hash(str(i)), f"{split}{i:05d}" * (100 + 3 * i)) for i, split in enumerate(splits)]
    chunks = sample_chunks(texts, 50_000)
    assert 50_000 <= sum(map(len, chunks)) < 51_000
    assert not any("val" in chunk for chunk in chunks)
    assert chunks == sample_chunks(reversed(texts), 50_000)
    assert sorted("".join(sample_chunks(texts, 10**9))) == sorted("".join(t for s, _, t in texts if s == "train"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "--source is missing"),
        (["--source", "stdlib"], "--out is missing"),
        (["--source", "stdlib", "--out", "x", "--vocab-sise", "5"], "did you mean --vocab-size"),
        (["--source", "fineweb:sp819", "--out", "x"], "did you mean fineweb:sp8192|did you mean sp8192"),
        (["--source", "fineweb:sp8192", "--out", "x", "--tokenizer", "bpe"], "ready-made"),
        (["--source", "nowhere", "--out", "x"], "nowhere"),
        (["--source", "stdlib", "--out", "x", "--tokenizer", "gone.model"], "gone.model"),
        (["--source", "stdlib", "--out", "x", "--tokenizer", str(FINEWEB_MODEL), "--vocab-size", "7"], "8192 entries"),
        (["--source", "stdlib", "--out", "x", "--vocab-size", "512"], "--tokenizer bpe"),
        (["--source", "stdlib", "--out", "x", "--tokenizer", "bpe", "--vocab-size", "-3"], "at least 1"),
        (["--source", "stdlib", "--out", "x", "--val-fraction", "1.5"], "between 0 and 1"),
        (["--source", "stdlib", "--out", "x", "--val-fraction", "0.1", "--val-source", "y"], "one of them"),
        (["--source", "stdlib", "--out", "x", "--max-train-bytes", "many"], "50M"),
        (["--source", "stdlib", "--out", "x", "--mirror", "m"], "only for fineweb"),
        (["--source", "stdlib", "--out", "x", "--train-shards", "3"], "--max-train-bytes"),
        (["--source", "stdlib", "--out", "x", "--name", "../up"], "--name"),
        (["--check", "x", "--source", "stdlib"], "--check alone"),
        (["--check", "nowhere"], "manifest.json"),
    ],
)
def test_bad_command_lines(tmp_path, monkeypatch, capsys, options, told):
    monkeypatch.chdir(tmp_path)
    assert main(options) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert any(part in message for part in told.split("|")), message
    assert not Path("x").exists()


def test_one_document_cannot_be_split(tmp_path, capsys):
    path = tmp_path / "book.txt"
    path.write_text("line of a book\n" * 500)
    assert run("--source", path, "--out", tmp_path / "out", "--workers", 1) == 2
    assert "--document-bytes" in capsys.readouterr().err
    assert run("--source", path, "--out", tmp_path / "out", "--workers", 1, "--document-bytes", 100) == 2  # all equal
    path.write_text("".join(f"line {i} of a book\n" for i in range(500)))
    assert run("--source", path, "--out", tmp_path / "out", "--workers", 1, "--document-bytes", 100) == 0
    assert len(texts_of(tmp_path / "out", "val")) > 0


def test_error_in_a_process_is_told_and_leaves_no_manifest(tmp_path, source, monkeypatch, capsys):
    import scripts.prepare_text as module

    def fail(self, texts):
        raise TokenizerError("planted")

    monkeypatch.setattr(module.Encoder, "encode", fail)
    assert run("--source", source, "--out", tmp_path / "out", "--workers", 1) == 2
    assert "planted" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_runs_as_a_file_from_anywhere_and_prints_help(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--val-source" in done.stdout
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--source", "absent", "--out", "x"], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("DataError: absent")


def test_every_error_is_one_of_ours():
    assert issubclass(ConfigError, GolfError)
    with pytest.raises(ConfigError):
        parse_args(["--source", "fineweb:none", "--out", "x"])
