"""Text to tokens and back: bytes, and SentencePiece models, given or trained here.

A tokenizer is *lossless* when decode(encode(text)) == text for every text. The byte tokenizer is, and so is every
model that `train_sentencepiece` makes; FineWeb's are not (their normalizer folds white space and compatibility
characters). The flag is found by trying, not read off a name, because bits per byte mean something else when text was
thrown away.

Letters: N tokens of one text, V entries of the vocabulary.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import TokenizerError
from common.files import write_atomically

TOKENIZER_PAD_ID, TOKENIZER_BOS_ID, TOKENIZER_EOS_ID, TOKENIZER_UNK_ID = 0, 1, 2, 3  # as in the challenge
BYTE_BOS_ID = 255  # 0xFF occurs in no valid UTF-8 text
SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character and cannot tell the two apart
MAX_VOCAB_SIZE = 65536  # shards hold uint16
TRAINER_CHUNK_CHARS = 1000  # one "sentence" of the trainer: whole lines up to this length, newlines inside
TRAINER_MIN_COVERAGE = 0.98
TRAINER_THREADS = 4  # written into the model file: a constant keeps its hash the same on every machine

# Texts that a normalizer, a dummy prefix, a missing byte fallback or SentencePiece's own space mark would change.
LOSSLESS_PROBES = (
    "",
    " ",
    "  two  spaces  inside, before and after  ",
    "\ttab\n\n\r\nlines\r \n trailing \n",
    "\x00\x01\x7f\x80\x85\xa0\xad",
    "".join(map(chr, range(128))),
    "é e\u0301 \u00c5 \u212b ﬁ Ⅷ … ① \uff46\uff55\uff4c\uff4c \u1e9b\u0323 \u3000 \u2028 \u2003",
    f"{SPACE_MARK} {SPACE_MARK}{SPACE_MARK} literal{SPACE_MARK}mark ",
    "\u200b\u200d\ufeff\ufffd\u2047 \u2585 \ue000 \u0378 \uffff \U0001f600 \U0010ffff",
    "漢字かな交じり文 العربية עברית हिन्दी ไทย",
    "<s></s><unk><pad><0x41><0xFF>",
)


def utf8_of_text(text: str) -> bytes:
    """UTF-8 of a text.

    Raises:
        TokenizerError: the text holds a lone surrogate, which UTF-8 cannot express.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, expected "
            "Unicode scalar values only; repair it: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from error


class ByteTokenizer:
    """One token per UTF-8 byte, and 255 as the beginning of a document. Lossless, 256 entries, no file.

    Attributes, of both tokenizers: `name`, `vocab_size`, `bos_id` (None if there is none), `lossless`, `sha256` of what
    defines it, and `strips_first_space`: whether decode drops the first token's leading space.
    """

    name = "byte"
    vocab_size = 256
    bos_id: int | None = BYTE_BOS_ID
    lossless = True
    strips_first_space = False
    sha256 = hashlib.sha256(b"tokens are UTF-8 bytes; 255 begins a document").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a text, uint16 (N,), without the beginning-of-document token."""
        return np.frombuffer(utf8_of_text(text), dtype=np.uint8).astype(np.uint16)

    def decode(self, tokens_N) -> str:
        """Text of tokens in [0, 256); 255 is dropped, bytes that form no UTF-8 become U+FFFD."""
        tokens_N = checked_ids(tokens_N, self.vocab_size)
        return tokens_N[tokens_N != BYTE_BOS_ID].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def piece_bytes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `SentencePieceTokenizer.piece_bytes`."""
        is_control_V = np.arange(self.vocab_size) == BYTE_BOS_ID
        return np.where(is_control_V, 0, 1), np.zeros(self.vocab_size, dtype=bool), is_control_V


class SentencePieceTokenizer:
    """A SentencePiece model, used as it is.

    Args:
        path: the `.model` file.

    Raises:
        TokenizerError: the file is missing, damaged, has more than 65,536 entries, or marks spaces as suffixes.
    """

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        try:
            model_bytes = Path(path).read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"{path}: cannot be read ({error.strerror}); expected a SentencePiece .model file: give its path, "
                "or 'byte' for the byte tokenizer."
            ) from error
        try:
            if not model_bytes:
                raise RuntimeError("the file is empty")
            self._examine(path, model_bytes, sentencepiece.SentencePieceProcessor(model_proto=model_bytes))
        except (RuntimeError, ValueError, IndexError) as error:  # pieces, and its own errors, may be no UTF-8
            raise TokenizerError(
                f"{path}: no SentencePiece model ({error}); expected the .model file that training wrote: "
                "copy or make it again."
            ) from error

    def _examine(self, path: str | Path, model_bytes: bytes, processor: Any) -> None:
        """Learn what a model does, and refuse what cannot be used. Raises TokenizerError, ValueError, RuntimeError."""
        self._processor = processor
        self.vocab_size: int = self._processor.vocab_size()
        if not 0 < self.vocab_size <= MAX_VOCAB_SIZE:
            raise TokenizerError(
                f"{path}: {self.vocab_size} entries, expected 1 to {MAX_VOCAB_SIZE}: shards store uint16; "
                "use a smaller vocabulary."
            )
        for token in range(self.vocab_size):  # every piece is text
            self._processor.id_to_piece(token)
        probe = self._processor.encode("a", out_type=str)
        if probe[-1].endswith(SPACE_MARK):
            raise TokenizerError(
                f"{path}: encodes 'a' as {probe}, with the space mark as a suffix; expected a model trained without "
                "treat_whitespace_as_suffix, because bytes could not be counted: train another."
            )
        self.strips_first_space: bool = self._strips_first_space()
        self.name = f"sentencepiece_{self.vocab_size}"
        self.sha256 = hashlib.sha256(model_bytes).hexdigest()
        bos_id = self._processor.bos_id()
        self.bos_id: int | None = bos_id if bos_id >= 0 else None
        # A literal space mark in the text would come back as a space. Its three byte tokens come back as themselves.
        mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        has_bytes = all(self._processor.is_byte(token) for token in mark_ids)
        self._mark_ids = mark_ids if has_bytes and not self.strips_first_space else None
        self.lossless: bool = all(self.decode(self.encode(text)) == text for text in LOSSLESS_PROBES)
        if not self.lossless:
            self._mark_ids = None  # the model as others use it

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a text, uint16 (N,), without the beginning-of-document token."""
        utf8_of_text(text)
        if self._mark_ids is None or SPACE_MARK not in text:
            return np.array(self._processor.encode(text), dtype=np.uint16)
        first, *others = text.split(SPACE_MARK)
        ids = self._processor.encode(first)
        for part in others:
            ids += self._mark_ids + self._processor.encode(part)
        return np.array(ids, dtype=np.uint16)

    def decode(self, tokens_N) -> str:
        """Text of tokens in [0, vocab_size); control tokens are dropped, bytes that form no UTF-8 become U+FFFD."""
        return self._processor.decode(checked_ids(tokens_N, self.vocab_size).tolist())

    def _strips_first_space(self) -> bool:
        """Whether a text's first space mark is no text: decode drops a dummy prefix, or has stripped texts before."""
        sp = self._processor
        for token in range(self.vocab_size):
            if sp.id_to_piece(token).startswith(SPACE_MARK) and not sp.is_control(token):
                return not sp.decode([token]).startswith(" ")
        return False

    def piece_bytes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What each entry adds to the text.

        Returns:
            UTF-8 bytes without one leading space, int64 (V,); whether the entry has a leading space, bool (V,);
            whether it is a control, unknown or unused entry, bool (V,), which add nothing.
        """
        base_bytes_V = np.zeros(self.vocab_size, dtype=np.int64)
        has_space_V = np.zeros(self.vocab_size, dtype=bool)
        is_control_V = np.zeros(self.vocab_size, dtype=bool)
        for token in range(self.vocab_size):
            sp = self._processor
            if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
                is_control_V[token] = True
            elif sp.is_byte(token):
                base_bytes_V[token] = 1
            else:
                piece = sp.id_to_piece(token)
                has_space_V[token] = piece.startswith(SPACE_MARK)
                # Marks inside a piece (runs of spaces) are one byte of text each, not three.
                base_bytes_V[token] = len(piece.removeprefix(SPACE_MARK).replace(SPACE_MARK, " ").encode())
        return base_bytes_V, has_space_V, is_control_V


def checked_ids(tokens_N, vocab_size: int) -> np.ndarray:
    """Tokens as a flat int64 array.

    Raises:
        TokenizerError: a token is outside [0, vocab_size).
    """
    tokens_N = np.asarray(tokens_N, dtype=np.int64).reshape(-1)
    if tokens_N.size and not 0 <= int(tokens_N.min()) <= int(tokens_N.max()) < vocab_size:
        raise TokenizerError(
            f"tokens from {int(tokens_N.min())} to {int(tokens_N.max())}, expected 0 to {vocab_size - 1}; "
            "decode with the tokenizer that the tokens were made with."
        )
    return tokens_N


def load_tokenizer(spec: str | Path, vocab_size: int | None = None) -> ByteTokenizer | SentencePieceTokenizer:
    """The tokenizer named "byte", or the SentencePiece model at a path.

    Args:
        spec: "byte" or the path of a `.model` file.
        vocab_size: if given, what the tokenizer must have.

    Raises:
        TokenizerError: missing or damaged file, or another vocabulary size.
    """
    tokenizer = ByteTokenizer() if str(spec) == "byte" else SentencePieceTokenizer(spec)
    if vocab_size is not None and tokenizer.vocab_size != vocab_size:
        raise TokenizerError(
            f"{spec}: {tokenizer.vocab_size} entries, expected vocab_size {vocab_size}; "
            f"give the tokenizer that the data was made with, or set vocab_size to {tokenizer.vocab_size}."
        )
    return tokenizer


def trainer_chunks(text: str) -> list[str]:
    """Cut a text into the pieces that the trainer sees: whole lines, joined up to `TRAINER_CHUNK_CHARS` characters.

    Newlines stay inside the pieces, so that the trainer can learn them and the indentation that follows. The space mark
    is cut out: the trainer would take it for a space.
    """
    chunks: list[str] = []
    for part in text.split(SPACE_MARK):
        start = 0
        while start < len(part):
            stop = min(start + TRAINER_CHUNK_CHARS, len(part))
            if stop < len(part):
                newline = part.rfind("\n", start, stop)
                stop = newline + 1 if newline > start else stop
            chunks.append(part[start:stop])
            start = stop
    return chunks


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, out_path: str | Path, *, character_coverage: float = 0.9995
) -> SentencePieceTokenizer:
    """Train a lossless byte-pair tokenizer and write it to a file.

    Identity normalizer, no dummy prefix, runs of spaces as pieces, digits apart, every byte as a fallback, and
    pad/bos/eos/unk = 0/1/2/3. The same texts in the same order give the same file.

    Args:
        texts: training texts. All are held in memory: pass a sample of a large corpus (a few tens of MB are plenty).
        vocab_size: entries, 320 to 65,536.
        out_path: the `.model` file; replaced if it exists.
        character_coverage: share of the characters' occurrences that get an entry of their own, in (0, 1]; fewer do if
            they would take more than half of the vocabulary. The rest is spelled in bytes.

    Raises:
        TokenizerError: a vocabulary that the texts cannot fill, or sizes out of range.
    """
    import sentencepiece

    minimum = 4 + 256 + 60
    if not minimum <= vocab_size <= MAX_VOCAB_SIZE:
        raise TokenizerError(
            f"vocab_size {vocab_size}, expected {minimum} to {MAX_VOCAB_SIZE}: 4 control entries, 256 bytes and some "
            "pieces; choose a size in between, or the byte tokenizer."
        )
    chunks: list[str] = []
    for text in texts:
        utf8_of_text(text)
        chunks += trainer_chunks(text)
    counts: Counter[str] = Counter()
    for chunk in chunks:
        counts.update(chunk)
    total = counts.total()
    if total == 0:
        raise TokenizerError("no text to train a tokenizer on, expected at least a few kilobytes; check the source.")
    kept = sorted(counts, key=lambda c: (-counts[c], c))[: (vocab_size - 260) // 2]
    character_coverage = min(character_coverage, sum(counts[c] for c in kept) / total)
    if character_coverage < TRAINER_MIN_COVERAGE:  # the trainer takes no less, so the rare characters are cut out here
        rare = re.compile(f"[^{re.escape(''.join(kept))}]+")
        chunks = [part for chunk in chunks for part in rare.split(chunk) if part]
        character_coverage = 1.0
    # Without an entry of its own a space would be spelled as the bytes of the space mark, and decode as the mark.
    rare_space = counts[" "] < 0.05 * total
    model = io.BytesIO()
    required: dict[str, Any] = {"required_chars": SPACE_MARK} if rare_space else {}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            character_coverage=character_coverage,
            pad_id=TOKENIZER_PAD_ID,
            bos_id=TOKENIZER_BOS_ID,
            eos_id=TOKENIZER_EOS_ID,
            unk_id=TOKENIZER_UNK_ID,
            max_sentence_length=8 * TRAINER_CHUNK_CHARS,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            num_threads=TRAINER_THREADS,
            minloglevel=2,
            **required,
        )
    except RuntimeError as error:
        raise TokenizerError(
            f"cannot train {vocab_size} entries on {total} characters of text ({error}); "
            "choose a smaller --vocab-size or give more text."
        ) from error
    write_atomically(out_path, model.getvalue())
    tokenizer = SentencePieceTokenizer(out_path)
    assert tokenizer.lossless, "the options above make a lossless tokenizer"
    return tokenizer
