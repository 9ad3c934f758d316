"""Packed programs are opened without being run, and what cannot be opened is named."""

from __future__ import annotations

import base64
import bz2
import lzma
import zlib

import brotli
import pytest
import zstandard

from referee import unpack as module
from referee.unpack import unpack
from scripts.pack import pack_source, strip_source

PROGRAM = 'import os\nos.environ["PACKED_PROGRAM_RAN"] = "1"\n' + "value = 1  # padding\n" * 10
DATA = PROGRAM.encode()
RAW = [{"id": lzma.FILTER_LZMA2, "preset": 9}]


def b85(data: bytes) -> str:
    return repr(base64.b85encode(data).decode())


WRAPPERS = {
    "lzma b85": f"import lzma as L,base64 as B\nexec(L.decompress(B.b85decode({b85(lzma.compress(DATA))})))",
    "raw lzma": "import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("
    f"{b85(lzma.compress(DATA, format=lzma.FORMAT_RAW, filters=RAW))}"
    '),format=L.FORMAT_RAW,filters=[{"id":L.FILTER_LZMA2,"preset":9}]))',
    "zlib b64": "import zlib\nfrom base64 import b64decode as d\n"
    f"S={base64.b64encode(zlib.compress(DATA)).decode()!r}\n"
    "exec(compile(zlib.decompress(d(S)).decode(), 'x', 'exec'), globals())",
    "brotli": f"import brotli\nblob = {brotli.compress(DATA)!r}\nexec(brotli.decompress(blob))",
    "bz2 in parts": f"import bz2\nA={bz2.compress(DATA)[:40]!r}\nC={bz2.compress(DATA)[40:]!r}\n"
    "exec(bz2.decompress(A+C))",
    "zstandard": f"import zstandard\nexec(zstandard.decompress({zstandard.compress(DATA)!r}))",
    "written to a file": f"import zlib, runpy, pathlib\ntext = zlib.decompress({zlib.compress(DATA)!r})\n"
    "pathlib.Path('full.py').write_bytes(text)\nrunpy.run_path('full.py')",
    "plain text": f"exec({PROGRAM!r})",
    "step by step": f"import base64, lzma\nS={b85(lzma.compress(DATA))}\nS=base64.b85decode(S)\nS=lzma.decompress(S)\n"
    "exec(S)",
    "a real file meanwhile": f"import lzma,tempfile\ns=lzma.decompress({lzma.compress(DATA)!r},lzma.FORMAT_AUTO,None)\n"
    "f=tempfile.mkdtemp()+'/full.py'\nopen(f,'wb').write(s)\nexec(compile(s,f,'exec'))",
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_program_inside_is_found_and_not_run(name, monkeypatch):
    monkeypatch.delenv("PACKED_PROGRAM_RAN", raising=False)
    found = unpack(WRAPPERS[name].encode(), "train_gpt.py")
    assert [layer.text for layer in found.layers][1:] == [PROGRAM]
    assert found.closed == found.unparsed == ()
    import os

    assert "PACKED_PROGRAM_RAN" not in os.environ


def test_program_packed_twice_is_opened_twice():
    inner = WRAPPERS["lzma b85"]
    outer = f"import zlib\nexec(zlib.decompress({zlib.compress(inner.encode())!r}))"
    assert [layer.text for layer in unpack(outer.encode(), "a.py").layers] == [outer, inner, PROGRAM]


def test_our_packed_form_is_opened():
    packed = pack_source(PROGRAM)
    found = unpack(packed.encode(), "train_gpt.py")
    assert [layer.text for layer in found.layers] == [packed, strip_source(PROGRAM)]
    assert found.closed == found.unparsed == ()


def test_what_a_name_stands_for_is_what_it_stands_for_when_it_runs():
    hidden = PROGRAM.replace("value", "hidden")
    text = f"S={hidden!r}\nexec(S)\nS={PROGRAM!r}\n"
    assert [layer.text for layer in unpack(text.encode(), "a.py").layers] == [text, hidden]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("exec(open('other.py').read())" + " " * 80, "calls open"),
        ("import lzma\nexec(lzma.decompress(b'not lzma'))" + " " * 80, "lzma.decompress fails"),
        ("import base64\nexec(base64.b64decode('AAAA'))" + " " * 80, "no program text"),
        ("exec(input())" + " " * 80, "calls input"),
        (f"S='x=1'\ndef run():\n    exec(S)\nrun()\nS={PROGRAM!r}", "S is assigned more than once"),
        (f"S={PROGRAM!r}\ndef f():\n    global S\n    S='x=1'\nf()\nexec(S)", "S is also assigned inside"),
        ("exec(T)" + " " * 80, "T is no constant"),
    ],
)
def test_what_stays_closed_is_named(text, reason):
    (why,) = unpack(text.encode(), "a.py").closed
    assert reason in why


def test_text_for_another_python_is_no_packing_fault():
    inner = "def f(:\n" + "# padding\n" * 20
    found = unpack(f"import zlib\nexec(zlib.decompress({zlib.compress(inner.encode())!r}))".encode(), "a.py")
    assert found.closed == ()
    assert "does not parse line 1" in found.unparsed[0]


def test_a_bomb_does_not_fill_memory(monkeypatch):
    monkeypatch.setattr(module, "MAX_LAYER_BYTES", 1 << 12)
    bomb = b"#" * (1 << 22)
    for name, packed in (("zlib", zlib.compress(bomb)), ("lzma", lzma.compress(bomb)), ("bz2", bz2.compress(bomb))):
        found = unpack(f"import {name}\nexec({name}.decompress({packed!r}))".encode(), f"{name}.py")
        assert max(layer.size_bytes for layer in found.layers[1:]) <= 1 << 12
    found = unpack(f"import brotli\nexec(brotli.decompress({brotli.compress(bomb)!r}))".encode(), "b.py")
    assert "more than" in found.closed[0]


def test_binary_is_no_program():
    assert unpack(b"\xff\xfe\x00" * 50, "a.py").layers == ()
