"""Text sources: every format gives the same documents, damaged input is named, downloads are verified."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
from pathlib import Path

import pytest
import zstandard

from common.errors import DataError
from common.text.sources import (
    FINEWEB_VARIANTS,
    MirrorFolder,
    RemoteFile,
    fetch_remote_file,
    fineweb_files,
    open_source,
    stdlib_files,
    verify_remote_file,
)

DOCUMENTS = [
    "first\ndocument", "zweites – ünïcode 😀", "  spaces\t\r\nand returns ", "x" * 200_000, "ümläut" * 30_000, "last",
]  # fmt: skip


def json_lines(documents: list[str]) -> bytes:
    return b"".join(json.dumps({"id": i, "text": d}).encode() + b"\n" for i, d in enumerate(documents))


def two_frames(data: bytes) -> bytes:
    return zstandard.compress(data[: len(data) // 2]) + zstandard.compress(data[len(data) // 2 :])


def write_parquet(path: Path, documents: list[str | None], column: str = "text") -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({column: documents, "id": list(range(len(documents)))})
    pyarrow.parquet.write_table(table, path, row_group_size=2)


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".jsonl", bytes), (".jsonl.xz", lzma.compress), (".jsonl.gz", gzip.compress), (".jsonl.zst", zstandard.compress),
     (".jsonl.zst", two_frames)],
)  # fmt: skip
def test_json_lines_of_every_packing(tmp_path, suffix, pack):
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(pack(json_lines(DOCUMENTS)))
    source = open_source(path)
    assert source.name == "corpus"
    assert list(source) == DOCUMENTS
    assert list(source) == DOCUMENTS  # again
    assert source.done_bytes == source.size_bytes == path.stat().st_size


def test_last_line_without_newline_and_blank_lines_and_mark(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json_lines(DOCUMENTS).replace(b"\n", b"\n\n  \n").rstrip())
    assert list(open_source(path)) == DOCUMENTS
    path = tmp_path / "c.jsonl.zst"
    path.write_bytes(zstandard.compress(json_lines(DOCUMENTS).rstrip()))
    assert list(open_source(path)) == DOCUMENTS


def test_parquet(tmp_path):
    path = tmp_path / "c.parquet"
    write_parquet(path, [*DOCUMENTS, None])
    source = open_source(path)
    assert list(source) == DOCUMENTS
    assert source.skipped == {"empty": 1}
    write_parquet(path, DOCUMENTS, column="content")
    assert list(open_source(path, text_field="content")) == DOCUMENTS
    with pytest.raises(DataError, match=r"c\.parquet.*content.*--text-field"):
        list(open_source(path))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"c\.parquet"):
        list(open_source(path))


def test_folder_is_sorted_and_exact(tmp_path):
    files = {"b/z.txt": DOCUMENTS[2], "a.md": DOCUMENTS[0], "c.py": DOCUMENTS[1], ".hid/x": "no", ".h": "no"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    (tmp_path / "d.jsonl").write_bytes(json_lines(["from", "lines"]))
    (tmp_path / "e.empty").write_bytes(b"")
    source = open_source(tmp_path)
    assert list(source) == [DOCUMENTS[0], DOCUMENTS[2], DOCUMENTS[1], "from", "lines"]
    assert source.skipped == {"empty": 1}
    print_before = source.fingerprint()
    (tmp_path / "a.md").write_text("changed")
    assert open_source(tmp_path).fingerprint() != print_before


def test_undecodable_text_is_counted_named_or_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("fine")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "lone \\ud800 surrogate"}\n{"text": "\xff"}\n{"text": "good"}\n')
    source = open_source(tmp_path)
    assert list(source) == ["fine", "good"]
    assert source.skipped == {"undecodable": 3}
    assert source.first_skipped["undecodable"].endswith("a.txt")
    with pytest.raises(DataError, match=r"a\.txt.*--strict"):
        list(open_source(tmp_path, strict=True))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"c\.jsonl line 1"):
        list(open_source(tmp_path, strict=True))


@pytest.mark.parametrize(
    ("line", "told"),
    [(b"{not json", "line 2: no JSON"), (b"[1]", "line 2: list"), (b'{"body": "x"}', "line 2.*'body'.*--text-field"),
     (b'{"text": 5}', "line 2.*int"), (b'{"text": null}', "line 2.*NoneType"), (b"[" * 100_000, "line 2: no JSON")],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path, line, told):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "ok"}\n' + line + b"\n")
    with pytest.raises(DataError, match=told) as caught:
        list(open_source(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "pack"), [("xz", lzma.compress), ("gz", gzip.compress), ("zst", zstandard.compress)]
)
def test_damaged_compression_is_named(tmp_path, suffix, pack):
    path = tmp_path / f"c.jsonl.{suffix}"
    good = pack(json_lines([f"{i} {hashlib.sha256(bytes([i])).hexdigest()}" for i in range(200)]))
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=rf"c\.jsonl\.{suffix}"):
        list(open_source(path))
    path.write_bytes(b"nonsense" * 20)
    with pytest.raises(DataError, match=rf"c\.jsonl\.{suffix}"):
        list(open_source(path))


@pytest.mark.parametrize("document_bytes", [4, 5, 7, 50, 10_000])
def test_plain_text_is_cut_at_lines_without_loss(tmp_path, document_bytes):
    path = tmp_path / "book.txt"
    text = "short line\nzwei ümläute 😀😀\n\n" * 20 + "漢字" * 100 + "\nend"
    path.write_text(text, newline="")
    source = open_source(path, document_bytes=document_bytes)
    pieces = list(source)
    assert "".join(pieces) == text
    assert not source.skipped
    assert max(len(piece.encode()) for piece in pieces) <= document_bytes + 3
    if document_bytes == 50:
        assert pieces[0] == "short line\nzwei ümläute 😀😀\n\nshort line\n"


def test_documents_hold_a_character(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="document_bytes 3"):
        open_source(tmp_path, document_bytes=3)


def test_stdlib_leaves_out_what_distributions_move(tmp_path):
    kept = ["abc.py", "json/decoder.py", "email/mime/text.py"]
    left_out = ["site-packages/x.py", "dist-packages/x.py", "test/test_abc.py", "unittest/test/x.py",
                "idlelib/y.py", "_sysconfigdata__linux.py", "config-3.11-x/c.py", "lib2to3/z.py",
                "sitecustomize.py", "abc.txt"]  # fmt: skip
    for name in kept + left_out:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [p.relative_to(tmp_path).as_posix() for p in stdlib_files(tmp_path)] == sorted(kept)


def test_stdlib_is_there():
    source = open_source("stdlib")
    assert source.name == "stdlib"
    texts = iter(source)
    assert len(next(texts)) > 0
    assert source.size_bytes > 2_000_000


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.*stdlib"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no text file"):
        open_source(tmp_path)


class FlakyRemote:
    """A repository that gives wrong bytes the first `failures` times."""

    def __init__(self, content: bytes, failures: int) -> None:
        self.content, self.failures, self.downloads = content, failures, 0

    def files(self) -> list[RemoteFile]:
        raise AssertionError("not asked here")

    def download(self, path: str, folder: Path) -> Path:
        self.downloads += 1
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.content if self.downloads > self.failures else b"?" * len(self.content))
        return target


def identities(content: bytes) -> list[RemoteFile]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return [
        RemoteFile("a/b.bin", len(content), sha256=hashlib.sha256(content).hexdigest()),
        RemoteFile("a/b.bin", len(content), git_blob_id=blob),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_downloads_are_verified_tried_again_and_not_repeated(tmp_path, which):
    expected = identities(b"content")[which]
    target = tmp_path / "b.bin"
    remote = FlakyRemote(b"content", failures=1)
    assert fetch_remote_file(remote, expected, target)
    assert target.read_bytes() == b"content"
    assert remote.downloads == 2
    assert not fetch_remote_file(remote, expected, target)
    assert remote.downloads == 2
    target.write_bytes(b"contenX")  # damaged later
    assert fetch_remote_file(remote, expected, target)
    assert target.read_bytes() == b"content"
    with pytest.raises(DataError, match=r"a/b\.bin: downloaded sha"):
        fetch_remote_file(FlakyRemote(b"content", failures=9), expected, tmp_path / "other.bin")
    assert not (tmp_path / "other.bin").exists()


def test_size_is_checked_where_there_is_no_hash(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"1234")
    assert verify_remote_file(path, RemoteFile("f", 4)) is None
    assert verify_remote_file(path, RemoteFile("f", 5)) == "4 bytes, expected 5"


def mirror(root: Path, variant: str, train: int, val: int) -> MirrorFolder:
    layout = FINEWEB_VARIANTS[variant]
    names = [f"{layout.folder}fineweb_{s}_{i:06d}.bin" for s, n in (("train", train), ("val", val)) for i in range(n)]
    for name in [*names, *([layout.tokenizer_file] if layout.tokenizer_file else []), "datasets/manifest.json"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return MirrorFolder(root)


@pytest.mark.parametrize("variant", sorted(FINEWEB_VARIANTS))
def test_fineweb_files_of_every_variant(tmp_path, variant):
    remote = mirror(tmp_path, variant, 3, 1)
    train, val, tokenizer = fineweb_files(remote, FINEWEB_VARIANTS[variant], 2)
    assert [Path(f.path).name for f in train] == ["fineweb_train_000000.bin", "fineweb_train_000001.bin"]
    assert [Path(f.path).name for f in val] == ["fineweb_val_000000.bin"]
    assert (tokenizer is None) == (variant == "bytes")
    assert len(fineweb_files(remote, FINEWEB_VARIANTS[variant], None)[0]) == 3
    with pytest.raises(DataError, match="3 training shards, expected 4"):
        fineweb_files(remote, FINEWEB_VARIANTS[variant], 4)


def test_incomplete_mirrors(tmp_path):
    with pytest.raises(DataError, match="--mirror"):
        MirrorFolder(tmp_path / "absent").files()
    with pytest.raises(DataError, match="fineweb_val"):
        fineweb_files(mirror(tmp_path / "a", "sp1024", 1, 0), FINEWEB_VARIANTS["sp1024"], None)
    remote = mirror(tmp_path / "b", "sp1024", 1, 1)
    (tmp_path / "b" / str(FINEWEB_VARIANTS["sp1024"].tokenizer_file)).unlink()
    with pytest.raises(DataError, match=r"fineweb_1024_bpe\.model"):
        fineweb_files(remote, FINEWEB_VARIANTS["sp1024"], None)
