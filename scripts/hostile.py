"""The hostile input campaign: everything that may come from a stranger, mutated, must be read or refused by name.

    python scripts/hostile.py                        100,000 inputs and more, minutes; writes the table
    python scripts/hostile.py --inputs 2000 --only shard,message --json out.json

Each kind of input starts from sound files and is mutated by someone who knows the format: bytes flipped, cut, spliced
and inserted, fields of headers replaced by odd values, lengths that lie, checksums made to fit again so that the parser
behind them is reached. The first files of each kind are pickles with a command in them. An input whose refusal nobody
has seen before (or that is read) joins the files that are mutated on: so the campaign walks from one check of a parser
to the next.

A kind is read in a process of its own. There, an audit hook notes any process, connection, loaded library or unpickled
name; memory is bounded and every input has ten seconds. What counts as a crash: any exception that is not one of
`common/errors.py` (or the player's MessageError), a signal, the hook, the bound. The campaign's status is 1 if there is
any.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

if __package__ in (None, ""):  # run as a file: the repository root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import ArtifactError, CheckpointError, GolfError
from scripts.fault_runs import lm_arguments, make_lm_data, make_world_data, world_config
from scripts.reliability import ROOT, merged, provenance, record, table

INPUT_LIMIT_S = 10
MEMORY_LIMIT_BYTES = 512 << 20  # of private memory, above what the reader has when it is ready
CORPUS = 200  # files that are mutated on, beside the sound ones
FORBIDDEN = (
    "pickle.find_class", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen",
    "socket.connect", "socket.bind", "socket.getaddrinfo", "ctypes.dlopen", "webbrowser.open", "marshal.loads",
)  # fmt: skip
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 8, 16, 255, 65536, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 62, 1 << 63, 1 << 64,
    10**300, 0.0, -0.0, 1.5, 1e300, "", "w", "int", "fp8_e4m3", "bf16", "f32", "row", "tensor", "none", "raw", "brotli",
    "trellis", "lzma", "zstd", "rans", "cross",
    "pack1", "pack4", "pack8", "planes2", "planes4", "pack0", "\x00", "é" * 40, [], [[]], [0], [1, 1],
    [1 << 31] * 8, [0, 1 << 31], {}, {"a": 1}, [None] * 5,
]  # fmt: skip
# Pickles, and what looks like one, that would make a folder if anything unpickled them.
POISON_NAME = "hostile-was-here"
POISON = [
    f"cos\nmkdir\n(S'{POISON_NAME}'\ntR.".encode(),
    b"\x80\x04\x95" + struct.pack("<Q", 40) + f"\x8c\x02os\x8c\x05mkdir\x93\x8c\x10{POISON_NAME}\x85R.".encode(),
    b"\x93NUMPY\x01\x00F\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }       \n"
    + f"cos\nmkdir\n(S'{POISON_NAME}'\ntR.".encode(),
]

# ---------------------------------------------------------------- mutation


def nodes_of(value: object, path: tuple = ()) -> list[tuple]:
    """Paths of all parts of a JSON value, its own first."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += nodes_of(item, (*path, key))
    return found


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """A JSON value with one to three parts replaced by odd values, nudged, doubled, shuffled or left out."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        paths = nodes_of(tree)[1:]
        if not paths:
            break
        *parents, last = rng.choice(paths)
        node = tree
        for part in parents:
            node = node[part]
        action = rng.random()
        if action < 0.6:
            node[last] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif action < 0.7 and isinstance(node[last], int):
            node[last] += rng.choice((-1, 1))
        elif action < 0.8 and isinstance(node, list):
            node.insert(rng.randrange(len(node) + 1), copy.deepcopy(node[last]))
        elif action < 0.9 and isinstance(node, list):
            rng.shuffle(node)
        else:
            del node[last]
    return tree


def damage(rng: random.Random, data: bytes) -> bytes:
    """Flip bits, overwrite, insert, delete or swap runs."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not damaged:
            break
        start = rng.randrange(len(damaged))
        length = min(rng.choice((1, 1, 2, 4, 16, 64)), len(damaged) - start)
        action = rng.randrange(5)
        if action <= 1:
            damaged[start] ^= 1 << rng.randrange(8)
        elif action == 2:
            damaged[start : start + length] = rng.randbytes(length)
        elif action == 3:
            damaged[start:start] = rng.choice((rng.randbytes(length), b"\0" * length, b"\xff" * length))
        else:
            del damaged[start : start + length]
    return bytes(damaged)


def mutate_bytes(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Damage anywhere, cut, extend, splice with another file, a lying number at a likely place, or poison."""
    action = rng.random()
    if action < 0.5 or not data:
        return damage(rng, data)
    if action < 0.65:
        return data[: rng.randrange(len(data))]
    if action < 0.75:
        return data + rng.randbytes(rng.choice((1, 16, 500)))
    if action < 0.85:
        other = rng.choice(others)
        return data[: rng.randrange(len(data))] + other[rng.randrange(max(len(other), 1)) :]
    if action < 0.98:
        place = 4 * rng.randrange(max(min(len(data), 1024) // 4, 1))
        value = rng.choice((0, 1, 0x7F, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, rng.getrandbits(32)))
        return data[:place] + struct.pack("<I", value) + data[place + 4 :]
    return rng.choice(POISON)


# ---------------------------------------------------------------- kinds of input


class Kind:
    """One kind of input: sound ones, how a stranger would change them, and what reads them.

    Made in the process that reads: a kind may import a framework and build a model.
    """

    share = 0.0  # of the campaign's inputs

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def seeds(self) -> list[bytes]:
        raise NotImplementedError

    def mutate(self, rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        return mutate_bytes(rng, data, corpus)

    def poisoned(self, poison: bytes) -> bytes:
        """A pickle where a file of this kind is expected."""
        return poison

    def read(self, data: bytes) -> None:
        """Read an input as the product does. Named errors pass through."""
        raise NotImplementedError

    def file(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path


def seal_artifact(header: bytes, body: bytes, codec: int, raw_bytes: int) -> bytes:
    """An artifact with any header and body under a fitting length and checksum."""
    file_bytes = 26 + len(header) + len(body) + 16
    content = struct.pack("<8sBBIIQ", b"\x93GOLFART", 2, codec, len(header), raw_bytes, file_bytes) + header + body
    return content + hashlib.blake2b(content, digest_size=16).digest()


class Artifact(Kind):
    """Artifacts, as `python -m common.artifact inspect` and every scorer read them."""

    share = 0.22

    def seeds(self) -> list[bytes]:
        from common.artifact.container import STREAM_CODECS, encode_artifact
        from common.quant.grid import parse_grid_spec, quantize

        rng = np.random.default_rng(0)
        grids = ("int2/clip2", "int3", "int4", "int5/tensor", "int6/clip12.85", "int8", "fp8", "int8/cross", "bf16")
        weights = {grid: quantize(rng.standard_normal((6, 10)), parse_grid_spec(grid)) for grid in grids}
        weights["plain"] = rng.standard_normal((2, 3)).astype(np.float32)  # pyright: ignore[reportArgumentType]
        return [encode_artifact(weights, {"name": "größe"}, (codec,)) for codec in STREAM_CODECS]

    def mutate(self, rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        if rng.random() < 0.35 or len(data) < 42:
            return mutate_bytes(rng, data, corpus)
        import brotli

        from common.artifact.container import ARTIFACT_CODECS

        codec, stored_bytes = data[9], struct.unpack_from("<I", data, 10)[0]
        header, body = data[26 : 26 + stored_bytes], data[26 + stored_bytes : -16]
        if codec == ARTIFACT_CODECS.index("brotli"):
            try:
                header = brotli.decompress(header)
            except brotli.error:
                return mutate_bytes(rng, data, corpus)
        action = rng.random()
        if action < 0.6:
            try:
                tree = mutate_tree(rng, json.loads(header))
                header = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
            except (ValueError, RecursionError, OverflowError):
                header = damage(rng, header)
        elif action < 0.7:
            header = damage(rng, header)
        else:
            body = damage(rng, body)
        return seal_artifact(header, body, 0, rng.choice((len(header),) * 9 + (1 << 31,)))

    def read(self, data: bytes) -> None:
        from common.artifact.container import load_artifact

        load_artifact(self.file("model.artifact", data))


class LmArtifact(Artifact):
    """Artifacts of the entry, into a fresh model: what they say of themselves is a stranger's word too."""

    share = 0.03

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import torch

        from common.text.tokenizer import load_tokenizer
        from submissions.jepa_mamba import train_gpt

        torch.set_num_threads(1)
        self.entry, self.ranks = train_gpt, train_gpt.Ranks(0, 1, torch.device("cpu"))
        config = train_gpt.parse_command(lm_arguments(folder, folder / "run"), {}).config
        trainer = train_gpt.Trainer(config, train_gpt.select_kernels("torch", self.ranks.device), self.ranks)
        path = folder / "seed.artifact"
        train_gpt.export_artifact(path, trainer.masters, config, load_tokenizer("byte"), 1.0)
        self.seed = path.read_bytes()

    def seeds(self) -> list[bytes]:
        return [self.seed]

    def read(self, data: bytes) -> None:
        self.entry.load_model(self.file("model.artifact", data), "torch", self.ranks)


class WorldArtifact(Artifact):
    """Artifacts of the world model, into fresh models."""

    share = 0.015

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        os.environ["JAX_PLATFORMS"] = "cpu"
        from worldmodel.export import load_exported

        self.load = load_exported
        self.seed = (ROOT / "worldmodel" / "play" / "coinrun.artifact").read_bytes()

    def seeds(self) -> list[bytes]:
        return [self.seed]

    def mutate(self, rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        from common.artifact.container import decode_artifact, encode_artifact

        if not hasattr(self, "parts"):
            self.parts = decode_artifact(self.seed)[:2]
        tensors, meta = self.parts
        if rng.random() < 0.5:
            few = dict(rng.sample(sorted(tensors.items()), rng.randrange(4)))
            try:
                return encode_artifact(few, mutate_tree(rng, meta), ("raw",))
            except ArtifactError:  # what the writer would not write is left to the bytes
                return mutate_bytes(rng, data, corpus)
        return super().mutate(rng, data, corpus)

    def read(self, data: bytes) -> None:
        self.load(self.file("world.artifact", data))


class Shard(Kind):
    """Token shards, checked and drawn from."""

    share = 0.12

    def seeds(self) -> list[bytes]:
        from common.text.shards import write_shard

        rng = np.random.default_rng(0)
        for name, count in (("a", 300), ("b", 40)):
            write_shard(self.folder / f"{name}.bin", rng.integers(0, 256, count).astype(np.uint16))
        return [(self.folder / f"{name}.bin").read_bytes() for name in "ab"]

    def mutate(self, rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        mutant = mutate_bytes(rng, data, corpus)
        if rng.random() < 0.4 and len(mutant) > 1024:  # a count that fits the size: on to the tokens
            mutant = mutant[:8] + struct.pack("<I", (len(mutant) - 1024) // 2) + mutant[12:]
        return mutant

    def read(self, data: bytes) -> None:
        from common.text.loader import TokenLoader
        from common.text.shards import open_shard

        path = self.file("x.bin", data)
        open_shard(path, vocab_size=256, deep=True)
        loader = TokenLoader([path], seq_len=16, batch_sequences=2, bos_id=255, vocab_size=256)
        for _ in range(3):
            loader.next_batch()


class Tokenizer(Kind):
    """SentencePiece models."""

    share = 0.015

    def seeds(self) -> list[bytes]:
        from common.text.tokenizer import train_sentencepiece

        rng = random.Random(0)
        words = ["".join(rng.choices("abcdefghij", k=rng.randrange(2, 9))) for _ in range(200)]
        path = self.folder / "seed.model"
        train_sentencepiece([" ".join(rng.choices(words, k=3000))], 330, path)
        return [path.read_bytes()]

    def read(self, data: bytes) -> None:
        from common.text.bpb import byte_table
        from common.text.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self.file("x.model", data))
        byte_table(tokenizer)


class TextManifest(Kind):
    """manifest.json beside shards, as `prepare_text.py --check` reads it."""

    share = 0.05

    def seeds(self) -> list[bytes]:
        from scripts.prepare_text import main

        text = self.folder / "text"
        text.mkdir(exist_ok=True)
        for i in range(30):
            (text / f"{i}.txt").write_text(f"document number {i} of thirty", encoding="utf-8")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        arguments = ["--source", str(text), "--out", str(self.folder / "data"), "--tokenizer", "byte"]
        assert main([*arguments, "--val-fraction", "0.3"]) == 0
        return [(self.folder / "data" / "manifest.json").read_bytes()]

    def mutate(self, rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        return mutate_json(rng, data, corpus)

    def read(self, data: bytes) -> None:
        from scripts.prepare_text import check_disjoint

        self.file("data/manifest.json", data)
        check_disjoint(self.folder / "data")


def mutate_json(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """As a tree four times in five, else as bytes; now and then nested too deep, or a value that JSON has not."""
    action = rng.random()
    if action < 0.8:
        try:
            return json.dumps(mutate_tree(rng, json.loads(data))).encode()
        except (ValueError, RecursionError, OverflowError):
            return mutate_bytes(rng, data, corpus)
    if action < 0.82:
        return b"[" * 100_000
    if action < 0.85:
        return re.sub(rb"\d+", rng.choice((b"NaN", b"Infinity", b"1e999", b"-0")), data, count=1)
    return mutate_bytes(rng, data, corpus)


class Records(Kind):
    """World-model records: one file of a data set whose manifest fits its size again."""

    share = 0.09

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.data = make_world_data(folder / "data")
        self.path = next(self.data.glob("train-*"))
        self.manifest = json.loads((self.data / "manifest.json").read_text(encoding="utf-8"))

    def seeds(self) -> list[bytes]:
        return [self.path.read_bytes()]

    def read(self, data: bytes) -> None:
        from worldmodel.data.records import find_problems, open_dataset

        self.path.write_bytes(data)
        self.manifest["splits"]["train"]["files"][0]["bytes"] = len(data)
        (self.data / "manifest.json").write_text(json.dumps(self.manifest), encoding="utf-8")
        find_problems(self.data)
        dataset = open_dataset(self.data, "train")
        for window in range(0, dataset.num_windows(4), 13):
            dataset.window(window, 4)
        dataset.close()


class RecordContents(Records):
    """Records again, as a stranger writes them: sound containers around hostile groups and indexes."""

    share = 0.08

    def seeds(self) -> list[bytes]:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

        reader = array_record_module.ArrayRecordReader(str(self.path), "")
        parts = reader.read_all()
        reader.close()
        return [b"".join(struct.pack("<I", len(part)) + part for part in parts)]

    def poisoned(self, poison: bytes) -> bytes:
        return struct.pack("<I", len(poison)) + poison

    def mutate(self, rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        import msgpack

        parts = split_parts(data)
        if not parts:
            return damage(rng, data)
        place = rng.choice((len(parts) - 1, rng.randrange(len(parts))))
        part = parts[place]
        if place == len(parts) - 1 and rng.random() < 0.5 and part[:4] != b"":
            try:
                index = msgpack.unpackb(part[4:])
                name = rng.choice(sorted(index))
                value = index[name]
                odd = not isinstance(value, bytes) or rng.random() < 0.3
                hostile = rng.choice(ODD_VALUES) if odd else damage(rng, value)
                parts[place] = part[:4] + (msgpack.packb({**index, name: hostile}) or b"")
            except (ValueError, TypeError, OverflowError, msgpack.UnpackException):
                parts[place] = damage(rng, part)
        else:
            parts[place] = damage(rng, part)
        if rng.random() < 0.1:
            rng.shuffle(parts)
        return b"".join(struct.pack("<I", len(part)) + part for part in parts)

    def read(self, data: bytes) -> None:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

        writer = array_record_module.ArrayRecordWriter(str(self.folder / "made"), "group_size:1,uncompressed")
        for part in split_parts(data):
            writer.write(part)
        writer.close()
        super().read((self.folder / "made").read_bytes())


def split_parts(data: bytes) -> list[bytes]:
    parts, place = [], 0
    while place + 4 <= len(data):
        size = struct.unpack_from("<I", data, place)[0]
        parts.append(data[place + 4 : place + 4 + size])
        place += 4 + size
    return parts


class Tokens(RecordContents):
    """Token sets: the same container with other items."""

    share = 0.04

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from worldmodel.data.tokens import TokenizerInfo, write_token_set

        def encode(frames_BTHWC: np.ndarray) -> np.ndarray:
            return frames_BTHWC[:, :, ::8, ::8, 0].reshape(*frames_BTHWC.shape[:2], 4).astype(np.int64) % 16

        write_token_set(self.data, folder / "tokens", encode, TokenizerInfo("0" * 64, 16, 4), quiet=True)
        self.data = folder / "tokens"
        self.path = next(self.data.glob("train-*"))
        self.manifest = json.loads((self.data / "manifest.json").read_text(encoding="utf-8"))


class RecordManifest(Records):
    """Manifests of data sets."""

    share = 0.05

    def seeds(self) -> list[bytes]:
        return [json.dumps(self.manifest).encode()]

    def mutate(self, rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        return mutate_json(rng, data, corpus)

    def read(self, data: bytes) -> None:
        from worldmodel.data.records import find_problems, open_dataset

        (self.data / "manifest.json").write_bytes(data)
        find_problems(self.data)
        dataset = open_dataset(self.data, "train")
        if dataset.num_windows(4):
            dataset.window(0, 4)
        dataset.close()


class LmCheckpoint(Kind):
    """Checkpoints of the entry: damaged ones, and sealed ones that lie."""

    share = 0.05

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import torch

        from submissions.jepa_mamba import train_gpt

        torch.set_num_threads(1)
        self.torch, self.entry = torch, train_gpt
        ranks = train_gpt.Ranks(0, 1, torch.device("cpu"))
        make_lm_data(folder / "data")
        command = train_gpt.parse_command(lm_arguments(folder / "data", folder / "run"), {})
        run = train_gpt.Run(command, ranks)
        batch = train_gpt.Prefetcher(run.loader, ranks.device)
        run.trainer.step(batch.next(), run.at)
        batch.close()
        run.at = run.at._replace(step=1)
        run.save()
        self.run, self.path = run, run.folder.checkpoint_of(1)
        self.seed = self.path.read_bytes()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def seeds(self) -> list[bytes]:
        return [self.seed]

    def mutate(self, rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        from safetensors.torch import save

        if rng.random() < 0.5:
            return mutate_bytes(rng, data, corpus)
        header, tensors = self.entry.read_checkpoint(self.file("sound.safetensors", self.seed))
        if rng.random() < 0.6:
            header = mutate_tree(rng, header)
        else:
            name = rng.choice(sorted(tensors))
            tensor = tensors.pop(name)
            if rng.random() < 0.7:
                zero = self.torch.zeros(())
                others = (tensor.double(), tensor.reshape(-1)[:1], tensor * float("nan"), zero, tensor.bool())
                tensors[rng.choice((name, "master/x"))] = rng.choice(others).clone()
        state = json.dumps(header)
        return save(tensors, {"state": state, "blake2b": self.entry.checkpoint_digest(state, tensors)})

    def read(self, data: bytes) -> None:
        self.path.write_bytes(data)
        trainer = self.run.trainer
        _, loader_state = self.entry.load_checkpoint(self.run.folder, trainer.masters, trainer.optimizers)
        if loader_state is not None:
            self.run.new_loader().restore(loader_state)


class WorldCheckpoint(Kind):
    """Orbax checkpoints of the world model: one file of one damaged."""

    share = 0.006

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        from worldmodel.train import checkpoint

        self.module, self.config = checkpoint, {"a": 1}
        rng = np.random.default_rng(0)
        weights = jax.numpy.asarray(rng.standard_normal((40, 30)), "float32")
        self.state = {"w": weights, "n": jax.numpy.zeros((), "int32")}
        checkpoints = checkpoint.Checkpoints(folder / "run", keep=2)
        checkpoints.save(1, self.state, config=self.config, loader_state={"given": 3})
        checkpoints.close()
        self.step = folder / "run" / "checkpoints" / "1"
        paths = [path for path in sorted(self.step.rglob("*")) if path.is_file()]
        self.files = {str(path.relative_to(self.step)): path.read_bytes() for path in paths}

    def seeds(self) -> list[bytes]:
        return [name.encode() + b"\0" + data for name, data in self.files.items()]

    def poisoned(self, poison: bytes) -> bytes:
        return next(iter(self.files)).encode() + b"\0" + poison

    def mutate(self, rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        name, _, content = data.partition(b"\0")
        if b'"sealed"' in content and rng.random() < 0.7:  # a stranger can seal what he likes
            try:
                sealed = self.module.seal(mutate_tree(rng, json.loads(json.loads(content)["sealed"])))
                return name + b"\0" + json.dumps(sealed).encode()
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                return name + b"\0" + damage(rng, content)
        others = [other.partition(b"\0")[2] for other in corpus]
        return name + b"\0" + (mutate_json if content[:1] == b"{" else mutate_bytes)(rng, content, others)

    def read(self, data: bytes) -> None:
        import shutil

        name, _, content = data.partition(b"\0")
        shutil.rmtree(self.step.parent.parent, ignore_errors=True)
        for other, sound in self.files.items():
            path = self.step / other
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(sound)
        (self.step / name.decode()).write_bytes(content)
        checkpoints = self.module.Checkpoints(self.folder / "run", keep=2)
        try:
            if checkpoints.latest is None:
                raise CheckpointError("the step is gone")
            _, state, _ = checkpoints.restore(self.state, config=self.config)
            same = all(bool((state[name] == self.state[name]).all()) for name in self.state)
            assert same, "a damaged checkpoint was taken for a sound one"
        finally:
            checkpoints.close()


class Config(Kind):
    """Configurations of the world model in JSON (run folders, artifacts)."""

    share = 0.12

    def seeds(self) -> list[bytes]:
        from worldmodel.config import to_dict

        return [json.dumps(to_dict(world_config(Path("data"), Path("run")))).encode()]

    def mutate(self, rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        return mutate_json(rng, data, corpus)

    def read(self, data: bytes) -> None:
        from worldmodel.config import TrainConfig, from_dict, read_json

        from_dict(TrainConfig, read_json(self.file("config.json", data), what="a config"))


class Options(Kind):
    """Options of the entry: flags and presets."""

    share = 0.05

    def seeds(self) -> list[bytes]:
        preset = (ROOT / "submissions" / "jepa_mamba" / "presets" / "demo.py").read_bytes()
        return [preset, "\n".join(lm_arguments(Path("data"), Path("runs/x"))).encode()]

    def read(self, data: bytes) -> None:
        from submissions.jepa_mamba.train_gpt import parse_command, read_preset

        if data.startswith(b"--"):
            try:
                parse_command(data.decode("utf-8", "replace").replace("\0", "").splitlines(), {})
            except SystemExit as asked:
                if asked.code:  # without: --help
                    raise
        else:
            read_preset(str(self.file("preset.py", data)))


class Message(Kind):
    """WebSocket messages of a browser to the player."""

    share = 0.15

    def seeds(self) -> list[bytes]:
        from worldmodel.play.messages import KINDS

        values = {int: 1, float: 1.0, str: "x", bool: True}
        seeds = []
        for name, kind in KINDS.items():
            hints = get_type_hints(kind)
            fields = {field: (get_args(hint) or (values.get(hint),))[0] for field, hint in hints.items()}
            seeds.append(json.dumps({"type": name, **fields}).encode())
        return seeds

    def mutate(self, rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        return mutate_json(rng, data, corpus)

    def read(self, data: bytes) -> None:
        from worldmodel.play.messages import parse_message

        parse_message(data.decode("utf-8", "surrogateescape"))


KINDS: dict[str, type[Kind]] = {
    "artifact": Artifact, "lm-artifact": LmArtifact, "world-artifact": WorldArtifact, "shard": Shard,
    "tokenizer": Tokenizer, "text-manifest": TextManifest, "records": Records, "record-contents": RecordContents,
    "tokens": Tokens, "record-manifest": RecordManifest, "lm-checkpoint": LmCheckpoint,
    "world-checkpoint": WorldCheckpoint, "config": Config, "options": Options, "message": Message,
}  # fmt: skip


# ---------------------------------------------------------------- reading


@dataclasses.dataclass
class Found:
    """What a kind's inputs did."""

    kind: str
    inputs: int = 0
    poisoned: int = 0
    read: int = 0
    refusals: int = 0  # different ones
    slowest_ms: float = 0.0
    memory_bytes: int = 0
    crashes: list[str] = dataclasses.field(default_factory=list)


def template(message: str) -> str:
    """A refusal without its numbers and names."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+|/\S+", "#", message)[:120]


class TooSlow(BaseException):
    """Raised by the alarm; nothing may catch it."""


def status_bytes(name: str) -> int:
    """A size of this process from the kernel: VmData, VmRSS or VmHWM."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    return int(found.group(1)) << 10 if found else 0


def explore(name: str, count: int, seed: int, folder: str, at: Any, pipe: Any) -> None:
    """Feed mutants to a kind's reader; runs in a process of its own and reports through the pipe."""
    from worldmodel.play.messages import MessageError

    os.chdir(folder)
    kind = KINDS[name](Path(folder))
    sound = kind.seeds()
    for data in sound:  # warm: what is imported or compiled is not the mutants' memory or time
        kind.read(data)
    alarmed: list[str] = []

    def audit(event: str, arguments: tuple) -> None:
        if armed and event in FORBIDDEN:
            alarmed.append(f"{event} {arguments!r}"[:200])

    def too_slow(signum: int, frame: Any) -> None:
        raise TooSlow

    armed = False
    sys.addaudithook(audit)
    signal.signal(signal.SIGPROF, too_slow)
    signal.signal(signal.SIGALRM, too_slow)
    # Not the address space: each thread of a reader reserves 64 MB of that for its heap, and whoever finds none left
    # (a new thread, a stack that grows) is ended by a signal for a fault that is not the input's.
    limit_bytes = status_bytes("VmData") + MEMORY_LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark of memory starts here
    before_bytes = status_bytes("VmRSS")
    found, rng, seen = Found(name), random.Random(f"{seed} {name}"), collections.Counter()
    corpus = list(sound)
    for index in range(count):
        if index < len(POISON):
            data, found.poisoned = kind.poisoned(POISON[index]), index + 1
        else:
            data = kind.mutate(rng, rng.choice(sound) if rng.random() < 0.3 else rng.choice(corpus), corpus)
        Path("input").write_bytes(data)
        at.value = index
        problem, refusal, armed = "", "read", True
        began_s = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, INPUT_LIMIT_S)  # of this process: others take their share of the machine
        signal.alarm(60 * INPUT_LIMIT_S)  # one that waits for ever
        try:
            kind.read(data)
        except (GolfError, MessageError) as error:
            refusal = f"{type(error).__name__} {template(str(error))}"
            if not str(error).strip() or len(str(error)) > 20_000:
                problem = f"a refusal of {len(str(error))} characters"
        except TooSlow:
            problem = "too slow"
        except BaseException as error:  # noqa: BLE001 (whatever it is, it is what this program looks for)
            problem = "".join(traceback.format_exception(error)[-3:])
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        armed = False
        seconds = time.process_time() - began_s
        if alarmed or Path(POISON_NAME).exists():  # the hook is quiet about os.mkdir: every data set is a folder
            problem = f"code ran: {alarmed}"
            alarmed.clear()
        found.inputs += 1
        found.read += refusal == "read" and not problem
        found.slowest_ms = max(found.slowest_ms, 1e3 * seconds)
        if problem:
            kept = Path(f"crash-{index}")
            kept.write_bytes(data)
            found.crashes.append(f"{kept}: {problem}"[:1500])
            if len(found.crashes) >= 20:
                break
        seen[refusal] += 1
        if seen[refusal] == 1 and len(corpus) < len(sound) + CORPUS and len(data) < 1 << 16:
            corpus.append(data)
    found.refusals = len(set(seen) - {"read"})
    found.memory_bytes = max(status_bytes("VmHWM") - before_bytes, 0)
    pipe.send(dataclasses.asdict(found))


def try_kind(name: str, count: int, seed: int, scratch: Path) -> Found:
    """Explore a kind; a reader that dies is a crash, and the rest goes on behind the input that killed it."""
    context = multiprocessing.get_context("spawn")
    total, part = Found(name), 0
    while total.inputs < count and len(total.crashes) < 20:
        folder = scratch / f"{name}-{part}"
        folder.mkdir(parents=True)
        here, there = context.Pipe()
        at = context.Value("q", -1)
        arguments = (name, count - total.inputs, seed + part, str(folder), at, there)
        process = context.Process(target=explore, args=arguments)
        process.start()
        there.close()
        try:
            found = Found(**here.recv())
        except EOFError:  # it died
            found = Found(name)
        process.join()
        if not found.inputs:
            index = at.value
            what = f"{folder / 'input'}: input {index} ended the process with {process.exitcode}"
            found = Found(name, inputs=index + 1, crashes=[what])
            if index < 0:
                raise RuntimeError(f"{name}: the reader did not start; its output is above")
        total.inputs += found.inputs
        total.read += found.read
        total.poisoned += found.poisoned
        total.refusals = max(total.refusals, found.refusals)
        total.slowest_ms = max(total.slowest_ms, found.slowest_ms)
        total.memory_bytes = max(total.memory_bytes, found.memory_bytes)
        total.crashes += found.crashes
        part += 1
    return total


def render(results: Sequence[Found]) -> str:
    """The campaign's table."""
    rows = [
        (f.kind, f"{f.inputs:,}", f"{f.read:,}", f.refusals, len(f.crashes), f"{f.slowest_ms:.0f}",
         f"{f.memory_bytes / 1e6:.0f}")
        for f in results
    ]  # fmt: skip
    rows.append((
        "**all**", f"{sum(f.inputs for f in results):,}", f"{sum(f.read for f in results):,}",
        sum(f.refusals for f in results), sum(len(f.crashes) for f in results),
        f"{max(f.slowest_ms for f in results):.0f}", f"{max(f.memory_bytes for f in results) / 1e6:.0f}",
    ))  # fmt: skip
    return table(("input", "tried", "read", "different refusals", "crashes", "slowest, CPU ms", "memory, MB"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; 1 if anything crashed."""
    parser = argparse.ArgumentParser("python scripts/hostile.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--inputs", type=int, default=110_000, help="mutants in all, shared out by kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--json", type=Path, help="write findings here instead of the table in docs/RELIABILITY.md")
    parser.add_argument("--scratch", type=Path, help="keep inputs here; default: a temporary folder")
    args = parser.parse_args(argv)
    names = [name.strip() for name in args.only.split(",")]
    if unknown := sorted(set(names) - set(KINDS)):
        parser.error(f"--only {unknown[0]}: expected some of {', '.join(KINDS)}")
    shares: Callable[[str], int] = lambda name: max(1, round(args.inputs * KINDS[name].share))  # noqa: E731
    results: list[Found] = []
    words = " ".join(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory(prefix="hostile-") as temporary:
        scratch = (args.scratch or Path(temporary)).resolve()
        for name in names:
            results.append(try_kind(name, shares(name), args.seed, scratch))
            print(render(results[-1:]).splitlines()[2], flush=True)
            for crash in results[-1].crashes:
                print(f"    CRASH {crash}", flush=True)
            keep(results, words, args.json)
    print(render(results))
    return 1 if any(f.crashes for f in results) else 0


def keep(results: Sequence[Found], words: str, path: Path | None) -> None:
    """Write what is known so far."""
    document = {"provenance": provenance(f"python scripts/hostile.py {words}".strip()),
                "kinds": [dataclasses.asdict(f) for f in results]}  # fmt: skip
    if path is not None:
        path.write_text(json.dumps(document, indent=1), encoding="utf-8")
        return
    merged("hostile", document, "kinds", ("kind",), list(KINDS))
    record("hostile", document, render([Found(**values) for values in document["kinds"]]))


if __name__ == "__main__":
    sys.exit(main())
