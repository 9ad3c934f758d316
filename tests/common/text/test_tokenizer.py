"""Tokenizers and the byte table: lossless where they say so, and counted as the golden file counts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common.errors import DataError, TokenizerError
from common.text.bpb import bits_per_byte, byte_table, token_bytes
from common.text.tokenizer import ByteTokenizer, load_tokenizer, train_sentencepiece, trainer_chunks

GOLDEN = Path(__file__).parents[2] / "golden"
# FineWeb's published 8192-entry tokenizer (370 kB), the one that golden/bpb_bytes.json was made with; lossy.
FINEWEB_MODEL = GOLDEN / "fineweb_8192_bpe.model"

TRAINING_TEXTS = [
    f"def function_{i}(self, value):\n    # a comment about {i * 37}\n\tif value is None:\n        return \"{i}\"\r\n\n"
    f"The quick brown fox {i} jumps over the lazy dog, again and again.  Two spaces. café ü € ▁ 漢字\n"
    for i in range(60)
]  # fmt: skip

# Random text that is rich in what tokenizers get wrong.
AWKWARD = st.sampled_from(
    ["▁", "\x00", "\r", "\n", "\r\n", "\t", " ", "  ", "        ", "\u00a0", "\u3000", "\ufeff", "\u200d", "\u0378",
     "\uffff", "\ue000", "😀", "👩\u200d💻", "ﬁ", "e\u0301", "⁇", "\u2585", "<s>", "<0x0A>", "<unk>", "self",
     "return", "12345", "\U0010ffff"]
)  # fmt: skip
TEXTS = st.lists(AWKWARD | st.text(max_size=8), max_size=20).map("".join)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_sentencepiece(TRAINING_TEXTS, 400, tmp_path_factory.mktemp("model") / "tokenizer.model")


@pytest.fixture(scope="module")
def fineweb():
    return load_tokenizer(FINEWEB_MODEL, 8192)


def counted_bytes(tokenizer, text: str) -> int:
    tokens = tokenizer.encode(text)
    return int(token_bytes(byte_table(tokenizer), np.concatenate([[tokenizer.bos_id], tokens])[:-1], tokens).sum())


def assert_lossless(tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint16
    assert tokens.ndim == 1
    assert tokenizer.bos_id not in tokens.tolist()
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode(np.concatenate([[tokenizer.bos_id], tokens])) == text
    assert counted_bytes(tokenizer, text) == len(text.encode())


@given(text=TEXTS)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example("")
@example("▁")
@example(" ▁ ▁▁ x ▁")
@example("\n    \n\t ")
@example("x" * 5000)
def test_trained_model_is_lossless_for_every_text(trained, text):
    assert trained.lossless
    assert_lossless(trained, text)


@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_byte_tokenizer_is_lossless(text):
    assert_lossless(ByteTokenizer(), text)


def test_every_scalar_value_survives(trained):
    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    for start in range(0, len(everything), 100_000):
        text = everything[start : start + 100_000]
        assert trained.decode(trained.encode(text)) == text


def test_trained_model_has_the_challenges_layout_and_learns_layout_of_code(trained):
    assert (trained.vocab_size, trained.bos_id, trained.strips_first_space) == (400, 1, False)
    processor = trained._processor
    assert [processor.id_to_piece(i) for i in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert [processor.is_byte(i) for i in range(4, 260)] == [True] * 256
    pieces = [processor.id_to_piece(i) for i in range(260, 400)]
    assert "▁▁▁▁" in pieces
    assert any("\n" in piece and len(piece) > 1 for piece in pieces)
    assert not any(len(piece) > 1 and any(c.isdigit() for c in piece) for piece in pieces)


def test_training_is_deterministic(trained, tmp_path):
    again = train_sentencepiece(iter(TRAINING_TEXTS), 400, tmp_path / "again.model")
    assert again.sha256 == trained.sha256
    assert [p.name for p in tmp_path.iterdir()] == ["again.model"]
    assert train_sentencepiece(TRAINING_TEXTS, 410, tmp_path / "again.model").sha256 != trained.sha256


def test_many_different_characters_fit_a_small_vocabulary(tmp_path):
    texts = ["".join(chr(0x4E00 + (i * 97 + j) % 9000) for j in range(300)) for i in range(50)] * 2
    tokenizer = train_sentencepiece(texts, 400, tmp_path / "han.model")
    assert_lossless(tokenizer, texts[0])
    assert_lossless(tokenizer, "no space in the training text ▁ but  here ")


def test_trainer_chunks_lose_only_the_space_mark():
    text = "line\n" * 700 + "y" * 2500 + "\n▁ tail ▁"
    chunks = trainer_chunks(text)
    assert "".join(chunks) == text.replace("▁", "")
    assert max(map(len, chunks)) <= 1000
    assert all(chunk.endswith("\n") for chunk in chunks[:3])


@pytest.mark.parametrize(("vocab_size", "told"), [(100, "100"), (70000, "70000"), (20000, "20000 entries")])
def test_impossible_vocabularies(tmp_path, vocab_size, told):
    with pytest.raises(TokenizerError, match=told):
        train_sentencepiece(TRAINING_TEXTS, vocab_size, tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == []


def test_no_text_to_train_on(tmp_path):
    with pytest.raises(TokenizerError, match="no text"):
        train_sentencepiece([""], 400, tmp_path / "t.model")


def test_surrogates_are_refused(trained):
    for tokenizer in (ByteTokenizer(), trained):
        with pytest.raises(TokenizerError, match=r"U\+D800 at character 2.*repair"):
            tokenizer.encode("ab\ud800")


def test_byte_tokenizer():
    tokenizer = load_tokenizer("byte", 256)
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert tokenizer.decode([255, 97, 0xC3]) == "a\ufffd"
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.lossless) == (256, 255, True)


@pytest.mark.parametrize("tokens", [[-1], [256], [3, 700]])
def test_decode_refuses_strangers(tokens):
    with pytest.raises(TokenizerError, match="expected 0 to 255"):
        ByteTokenizer().decode(tokens)


def test_loading_errors(tmp_path, trained):
    with pytest.raises(TokenizerError, match=r"absent\.model.*cannot be read"):
        load_tokenizer(tmp_path / "absent.model")
    for content in (b"", b"hello", b"\x00" * 100, FINEWEB_MODEL.read_bytes()[:1000]):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(TokenizerError, match=r"bad\.model"):
            load_tokenizer(tmp_path / "bad.model")
    with pytest.raises(TokenizerError, match="8192 entries, expected vocab_size 1024"):
        load_tokenizer(FINEWEB_MODEL, 1024)
    with pytest.raises(TokenizerError, match="256 entries"):
        load_tokenizer("byte", 1024)


def train_raw(path: Path, **options):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TRAINING_TEXTS for line in text.split("\n")), model_prefix=str(path),
        vocab_size=400, model_type="bpe", minloglevel=2, **options,
    )  # fmt: skip
    return path.with_suffix(".model")


def test_lossless_flag_follows_behaviour(tmp_path, fineweb):
    assert not fineweb.lossless
    assert fineweb.strips_first_space
    identity = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    assert load_tokenizer(train_raw(tmp_path / "a", add_dummy_prefix=False, **identity)).lossless
    assert not load_tokenizer(
        train_raw(tmp_path / "b", add_dummy_prefix=False, **identity | {"byte_fallback": False})
    ).lossless
    prefixed = load_tokenizer(train_raw(tmp_path / "p", **identity))
    assert prefixed.strips_first_space
    assert counted_bytes(prefixed, " two  words ") == 12
    assert not load_tokenizer(
        train_raw(tmp_path / "c", add_dummy_prefix=False, **identity | {"normalization_rule_name": "nfkc"})
    ).lossless
    assert not load_tokenizer(
        train_raw(tmp_path / "d", add_dummy_prefix=False, **identity | {"remove_extra_whitespaces": True})
    ).lossless


def test_models_without_beginning_and_with_suffix_marks(tmp_path):
    assert load_tokenizer(train_raw(tmp_path / "n", bos_id=-1, eos_id=-1)).bos_id is None
    with pytest.raises(TokenizerError, match="suffix"):
        load_tokenizer(train_raw(tmp_path / "s", treat_whitespace_as_suffix=True))


def test_golden_ids_and_bytes(fineweb):
    golden = json.loads((GOLDEN / "bpb_bytes.json").read_text())
    assert len(golden["cases"]) == 8
    for case in golden["cases"]:
        assert fineweb.encode(case["text"]).tolist() == case["ids"]
        assert fineweb.decode(case["ids"]) == case["decoded"]
        assert counted_bytes(fineweb, case["text"]) == case["decoded_bytes"], case["text"]
        assert len(case["text"].encode()) == case["utf8_bytes"]


@given(text=TEXTS)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lossy_count_is_the_decoded_length(fineweb, text):
    assert counted_bytes(fineweb, text) == len(fineweb.decode(fineweb.encode(text)).encode())


def test_leading_space_after_the_beginning(trained, fineweb):
    space = trained.encode(" ")
    assert token_bytes(byte_table(trained), np.array([1]), space).tolist() == [1]
    word = np.array([fineweb._processor.piece_to_id("▁The")])
    table = byte_table(fineweb)
    assert fineweb.decode(word) == "The"
    assert fineweb.decode([*word, *word]) == "The The"
    assert token_bytes(table, np.array([1]), word[:1]).tolist() == [3]
    assert token_bytes(table, word[:1], word[:1]).tolist() == [4]
    assert token_bytes(table, word[:1], np.array([1])).tolist() == [0]


def test_token_bytes_is_vectorised_over_any_shape(trained):
    table = byte_table(trained)
    x = np.array([[1, 300, 4], [300, 301, 1]])
    y = np.array([[300, 4, 1], [301, 1, 300]])
    flat = [int(token_bytes(table, np.array([a]), np.array([b]))[0]) for a, b in zip(x.flat, y.flat, strict=True)]
    counted = token_bytes(table, x, y)
    assert counted.dtype == np.int64
    assert counted.tolist() == np.array(flat).reshape(2, 3).tolist()
    with pytest.raises(DataError, match=r"\(2, 3\).*\(3,\)"):
        token_bytes(table, x, y[0])


def test_bits_per_byte():
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)
    with pytest.raises(DataError, match="0 bytes"):
        bits_per_byte(1.0, 0)


def test_damaged_models_are_read_or_refused_by_name(tmp_path):
    """Their pieces, and SentencePiece's own messages about them, need not be text."""
    train_sentencepiece(TRAINING_TEXTS, 400, tmp_path / "tokenizer.model")
    sound, rng, refused = (tmp_path / "tokenizer.model").read_bytes(), np.random.default_rng(0), 0
    for _ in range(150):
        data = bytearray(sound[: rng.integers(1, len(sound))] if rng.random() < 0.3 else sound)
        data[rng.integers(min(len(data), 2000))] = rng.integers(128, 256)
        (tmp_path / "x.model").write_bytes(data)
        try:
            load_tokenizer(tmp_path / "x.model")
        except TokenizerError:
            refused += 1
    assert refused > 30
