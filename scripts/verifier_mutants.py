"""Tests the referee by lying to it: plants one fault at a time in a good submission and sees which checks fail.

    python scripts/verifier_mutants.py              # every mutant, minutes on two cores; writes docs/VERIFIER.md
    python scripts/verifier_mutants.py --names leaked_document peeking_model

The submission is our own: three seeds of a tiny model are trained on a small text by the real entry, bundled by
`scripts/bundle.py`, and put beside a record that they beat. A mutant is killed if the check named for it fails. A
fault in the program is *resealed*: sizes in submission.json and sources in the logs follow it, as a careful cheat
would see to.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import GolfError
from common.files import write_atomically
from referee.case import CHECKS, FAMILIES, Case, failures, verify
from referee.data import HEADER, MAGIC, VERSION, read_data
from referee.evidence import runs_of
from referee.folder import read_submission
from referee.logs import split_sources
from referee.model import LIMIT_BYTES
from scripts.bundle import ROOT, write_dist
from scripts.pack import pack_source
from scripts.prepare_text import main as prepare_text

TABLE = ROOT / "docs" / "VERIFIER.md"
SEEDS = (1, 2, 3)
VOCAB_SIZE = 330
TINY = {
    "tokenizer": "bpe", "vocab_size": VOCAB_SIZE, "model_dim": 32, "num_layers": 3, "headdim": 16, "d_state": 8,
    "chunk_size": 16, "embed_dim": 16, "attn_layers": "1", "attn_headdim": 16, "mlp_mult": 2, "train_seq_len": 32,
    "train_batch_tokens": 256, "micro_batch_tokens": 256, "iterations": 30, "warmup_steps": 1,
    "max_wallclock_seconds": 600.0, "warmdown_by": "steps", "sigreg_num_proj": 8, "sigreg_timesteps": 8,
    "val_loss_every": 0, "eval_modes": "carried", "eval_seq_len": 64, "eval_lanes": 2, "temp_calib_tokens": 256,
    "train_log_every": 10, "checkpoint_every": 0, "jepa_diagnostics": False, "document_reset": True,
    "val_batch_size": 2048,
}  # fmt: skip
STATIC = ("bytes", "lineage", "time", "evidence", "lint")
ABOUT = {
    "name": "tiny", "author": "nobody", "github_id": "nobody", "blurb": "a submission to be mutated",
    "date": "2026-01-01", "track": "track_10min_16mb",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# A good submission
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """A submission with all that it is checked against. Mutants change a copy."""

    root: Path

    @property
    def dist(self) -> Path:
        return self.root / "dist"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def record(self) -> Path:
        return self.root / "record"

    def copy(self, target: Path) -> Bench:
        shutil.copytree(self.root, target, symlinks=True)
        return Bench(target)

    # Claims

    def claims(self) -> dict[str, Any]:
        return json.loads((self.dist / "submission.json").read_text(encoding="utf-8"))

    def claim(self, record: dict[str, Any]) -> None:
        (self.dist / "submission.json").write_text(json.dumps(record, indent=2), encoding="utf-8")

    def of_seed(self, seed: int | None, **values: Any) -> None:
        """Change what is claimed of a seed (None: of all); a value may be a function of the old one."""
        record = self.claims()
        for name, one in record["seed_results"].items():
            if seed is None or name == str(seed):
                for key, value in values.items():
                    one[key] = value(one[key]) if callable(value) else value
        self.claim(record)

    def top(self, **values: Any) -> None:
        record = self.claims()
        for key, value in values.items():
            record[key] = value(record[key]) if callable(value) else value
        self.claim(record)

    def mean_again(self) -> None:
        record = self.claims()
        for key in ("val_bpb", "val_loss"):
            values = [one[key] for one in record["seed_results"].values()]
            record[key] = sum(values) / len(values)
        self.claim(record)

    # Logs

    def log(self, seed: int) -> Path:
        return self.dist / f"train_seed{seed}.log"

    def edit_log(self, seed: int | None, old: str, new: str, *, regex: bool = False) -> None:
        """Replace text in the log of a seed (None: in all logs). The text must be there."""
        for number in SEEDS if seed is None else (seed,):
            path = self.log(number)
            text = path.read_text(encoding="utf-8")
            changed = re.sub(old, new, text) if regex else text.replace(old, new)
            assert changed != text, f"{old!r} is not in {path.name}"
            path.write_text(changed, encoding="utf-8")

    # Program

    @property
    def program(self) -> Path:
        return self.dist / "train_gpt.py"

    def reseal(self, before: int) -> None:
        """Sizes in submission.json follow the program's."""
        grown = self.program.stat().st_size - before
        self.top(bytes_code=lambda size: size + grown, bytes_total=lambda size: size + grown)

    def edit_program(self, old: str, new: str, *, in_logs: bool = True) -> None:
        """Replace text of the program, and of the sources in the logs, and set the claimed sizes right."""
        before = self.program.stat().st_size
        text = self.program.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{text.count(old)} times {old!r} in the program, expected 1"
        self.program.write_text(text.replace(old, new), encoding="utf-8")
        self.reseal(before)
        if in_logs:
            self.edit_log(None, old, new)

    def add_to_program(self, text: str, *, in_logs: bool = True) -> None:
        """Put statements before the program's main function."""
        self.edit_program("def main(argv", f"{text}\n\n\ndef main(argv", in_logs=in_logs)

    # Data

    def shard(self, split: str) -> Path:
        return next(self.data.glob(f"*_{split}_*.bin"))

    def tokens(self, split: str) -> np.ndarray:
        return np.fromfile(self.shard(split), dtype="<u2", offset=HEADER.size)

    def write_tokens(self, split: str, tokens: np.ndarray, *, seal: bool = True) -> None:
        path = self.shard(split)
        path.write_bytes(HEADER.pack(MAGIC, VERSION, len(tokens), *[0] * 253) + tokens.astype("<u2").tobytes())
        if seal:
            self.seal_manifest(split)

    def seal_manifest(self, split: str) -> None:
        path = self.data / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        shard = self.shard(split)
        one = manifest["splits"][split]["shards"][0]
        one |= {"sha256": hashlib.sha256(shard.read_bytes()).hexdigest(), "bytes": shard.stat().st_size}
        path.write_text(json.dumps(manifest), encoding="utf-8")

    def seal_claimed_val(self) -> None:
        self.of_seed(None, val_sha256=read_data(self.data).sha256_of_val())


def write_texts(folder: Path) -> None:
    folder.mkdir(parents=True)
    words = ["the", "a", "model", "reads", "text", "and", "bytes", "Ünïcode", "→", "def", "return\n", "22", "  two"]
    for i in range(60):
        rng = random.Random(i)
        text = " ".join(rng.choice(words) for _ in range(60 + 4 * i))
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")


def make_bench(root: Path) -> Bench:
    """Text, shards, three trained seeds, the bundle, its weights and a record that it beats. Raises GolfError."""
    bench = Bench(root)
    write_texts(root / "text")
    preset = root / "tiny.py"
    preset.write_text(f'"""A tiny model."""\n\nPRESET = {TINY!r}\n', encoding="utf-8")
    arguments = ["--source", str(root / "text"), "--out", str(bench.data), "--tokenizer", "bpe", "--vocab-size"]
    if prepare_text([*arguments, str(VOCAB_SIZE), "--val-fraction", "0.2", "--workers", "1"]) != 0:
        raise GolfError("prepare_text made no data")
    common = [
        "--preset",
        str(preset),
        "--data_path",
        str(bench.data),
        "--runs_dir",
        str(root / "runs"),
        "--device",
        "cpu",
    ]
    calls = [[*common, "--seed", str(seed), "--run_id", f"seed{seed}"] for seed in SEEDS]
    program = "import json, sys\nfrom submissions.jepa_mamba.train_gpt import main\n"
    program += "sys.exit(max(main(call) for call in json.loads(sys.argv[1])))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(calls)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise GolfError(f"the tiny runs ended with status {done.returncode}: {done.stderr[-2000:]}")
    write_submission(bench, "plain")
    bench.record.mkdir()
    worse = bench.claims()
    for one in worse["seed_results"].values():
        one["val_bpb"] *= (one["val_loss"] + 3.0) / one["val_loss"]
        one["val_loss"] += 3.0
    (bench.record / "submission.json").write_text(json.dumps(worse), encoding="utf-8")
    return bench


def write_submission(bench: Bench, form: str) -> None:
    """The submission folder anew, as our bundler writes it, with the weights of all seeds."""
    runs = [bench.root / "runs" / f"seed{seed}" for seed in SEEDS]
    write_dist(bench.dist, str(bench.root / "tiny.py"), runs, dict(ABOUT), form=form)
    for seed, run in zip(SEEDS, runs):
        shutil.copyfile(run / "model.artifact", bench.dist / f"model_seed{seed}.artifact")


def alarms_of(bench: Bench, form: str, work: Path, families: Sequence[str] = FAMILIES) -> list[str]:
    """What is found in the good submission in a form of the bundle: nothing, if the referee is right."""
    copy = bench.copy(work / f"good-{form}")
    try:
        write_submission(copy, form)
        return [f"{name}: {found}" for name, found in examine(copy, families).items()]
    finally:
        shutil.rmtree(copy.root)


def examine(bench: Bench, families: Sequence[str] = FAMILIES, threads: int = 1) -> dict[str, list[str]]:
    """Names of failed checks -> what they found."""
    against = runs_of(read_submission(bench.record))
    case = Case(read_submission(bench.dist), read_data(bench.data), against)
    found: dict[str, list[str]] = {}
    for name, finding in failures(verify(case, families, limit_s=300, threads=threads)):
        found.setdefault(name, []).append(finding.found)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Mutants
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """One planted fault. `also` names checks that rightly fail with it."""

    name: str
    check: str
    what: str
    plant: Callable[[Bench], None]
    also: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()  # families that need staged runs: staged, score, causality

    @property
    def families(self) -> tuple[str, ...]:
        return (*STATIC, *self.runs)


def one_byte_over(b: Bench) -> None:
    largest = max(path.stat().st_size for path in b.dist.glob("*.artifact"))
    before = b.program.stat().st_size
    with open(b.program, "ab") as file:
        file.write(b"#" * (LIMIT_BYTES - largest - before) + b"\n")
    b.reseal(before)


def packed_over(b: Bench) -> None:
    pack(b)
    one_byte_over(b)


def helper_module(b: Bench) -> None:
    (b.dist / "helper.py").write_text("VALUE = 1\n", encoding="utf-8")
    b.edit_program("import argparse\n", "import argparse\nimport helper\n", in_logs=False)


def import_by_name(b: Bench) -> None:
    (b.dist / "helper.py").write_text("VALUE = 1\n", encoding="utf-8")
    b.add_to_program('def more() -> Any:\n    return __import__("helper")')


def second_weights(b: Bench) -> None:
    largest = max(path.stat().st_size for path in b.dist.glob("*.artifact"))
    with open(b.dist / "more.npz", "wb") as file:
        file.truncate(LIMIT_BYTES - largest - b.program.stat().st_size + 1)


def exec_of_sibling(b: Bench) -> None:
    (b.dist / "extra.py").write_text("EXTRA = 1\n", encoding="utf-8")
    b.add_to_program('def more() -> None:\n    exec(open("extra.py").read())')


def blob(b: Bench) -> None:
    (b.dist / "table.dat").write_bytes(bytes(range(256)) * 40)


def binary_as_text(b: Bench) -> None:
    (b.dist / "notes.txt").write_bytes(b"see the table\n" + bytes(range(256)) * 40)


def pack(b: Bench, change: Callable[[str], str] = str) -> None:
    """The program in packed form, `change` laid over the packed text; sizes follow."""
    before = b.program.stat().st_size
    b.program.write_text(change(pack_source(b.program.read_text(encoding="utf-8"))), encoding="utf-8")
    b.reseal(before)


def packed(plant: Callable[[Bench], None]) -> Callable[[Bench], None]:
    """A fault in the program, which is then packed."""

    def both(b: Bench) -> None:
        plant(b)
        pack(b)

    return both


def damage(text: str) -> str:
    return text[: len(text) // 2] + text[len(text) // 2 + 5 :]


def unpacks_beside(b: Bench) -> None:
    pack(b, lambda text: text.replace("tempfile.mkdtemp()", "os.path.dirname(os.path.abspath(__file__))").replace(
        "atexit.register(shutil.rmtree,_d)\n", "atexit.register(os.remove,_d+'/train_gpt_unpacked.py')\n"))  # fmt: skip


def obscured(b: Bench) -> None:
    """The program behind a cipher that only running it undoes; the logs open with it."""
    before = b.program.stat().st_size
    hidden = bytes(byte ^ 1 for byte in b.program.read_bytes())
    code = base64.b85encode(hidden).decode()
    text = f"import base64\nexec(bytes(byte ^ 1 for byte in base64.b85decode({code!r})))\n"
    b.program.write_text(text, encoding="utf-8")
    b.reseal(before)
    for seed in SEEDS:
        told = split_sources(b.log(seed).read_text(encoding="utf-8"))[1]
        b.log(seed).write_text(f"{'=' * 40} train_gpt.py\n{text}\n{told}", encoding="utf-8")


def undeclared_package(b: Bench) -> None:
    b.add_to_program("def boosted() -> Any:\n    import xgboost\n\n    return xgboost.Booster")


def requirement_gone(b: Bench) -> None:
    path = b.dist / "requirements.txt"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("safetensors")]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def crash_in_training(b: Bench) -> None:
    b.edit_program("        losses = self.gradients(plan, x_BT, ",
                   "        losses = self.gradients(None, x_BT, ")  # fmt: skip


AT_SCORING = "    started_s = time.perf_counter()\n    given = command.config\n"


def while_scoring(b: Bench, statement: str) -> None:
    b.edit_program(AT_SCORING, AT_SCORING + f"    {statement}\n")


def asks_network(b: Bench) -> None:
    call = '__import__("soc" + "ket").create_connection(("192.0.2.1", 80), 1)'
    while_scoring(b, f"with contextlib.suppress(OSError):\n        {call}")


def writes_source(b: Bench) -> None:
    statement = 'Path(__file__).with_name("cache.txt").write_text("1")'
    while_scoring(b, f"with contextlib.suppress(OSError):\n        {statement}")


def reads_outside(b: Bench) -> None:
    (b.root / "stash").write_text("weights", encoding="utf-8")
    while_scoring(b, f"Path({str(b.root / 'stash')!r}).read_bytes()")


def reads_training_shard(b: Bench) -> None:
    while_scoring(b, 'list_shards(pattern.replace("val", "tr" + "ain"))[0].read_bytes()')


def both_edited(b: Bench) -> None:
    """A better score in JSON and log alike, with loss, bpb, tokens and bytes in agreement."""
    for seed in SEEDS:
        old = b.claims()["seed_results"][str(seed)]["val_bpb"]
        b.of_seed(seed, val_bpb=lambda v: v - 0.02, val_loss=lambda v, old=old: v * (old - 0.02) / old)
        b.edit_log(seed, f"val_bpb {old:.4f} (carried", f"val_bpb {old - 0.02:.4f} (carried")
    b.mean_again()


def generous_score(b: Bench) -> None:
    """The program's --score says less than its model's nats; claims and logs follow it."""
    b.edit_program("    total_nats = float(nll_n.sum())\n", "    total_nats = 0.98 * float(nll_n.sum())\n")
    for seed in SEEDS:
        old = b.claims()["seed_results"][str(seed)]["val_bpb"]
        b.of_seed(seed, val_bpb=lambda v: v * 0.98, val_loss=lambda v: v * 0.98)
        b.edit_log(seed, f"val_bpb {old:.4f} (carried", f"val_bpb {old * 0.98:.4f} (carried")
    b.mean_again()


def wrong_byte_table(b: Bench) -> None:
    line = "    return table.base_bytes_V[tokens_N] + (table.has_space_V[tokens_N] & ~table.is_boundary_V[previous_N])"
    b.edit_program(line, line.replace("tokens_N] + (", "tokens_N] + 1 * (") + " + (tokens_N > 300)")


def claimed_bytes(b: Bench) -> None:
    """More bytes claimed, with bpb to match in JSON and logs."""
    for seed in SEEDS:
        one = b.claims()["seed_results"][str(seed)]
        share = one["val_bytes"] / (one["val_bytes"] + 100)
        b.of_seed(seed, val_bytes=lambda v: v + 100, val_bpb=lambda v, share=share: v * share)
        b.edit_log(seed, f"val_bpb {one['val_bpb']:.4f} (carried", f"val_bpb {one['val_bpb'] * share:.4f} (carried")
    b.mean_again()


def capped_validation(b: Bench) -> None:
    line = "    validation = open_validation(pattern, tokenizer, config.vocab_size)"
    b.edit_program(f"{line}\n    scores = {{", f"{line}.first(512)\n    scores = {{")


def bytes_misstated(b: Bench) -> None:
    """--score prints more bytes than it divides by; nothing is claimed of bytes."""
    line = '        "val_bytes": head["scored_bytes"],\n'
    b.edit_program(line, line.replace("],", "] + 100,"))
    record = b.claims()
    for one in record["seed_results"].values():
        del one["val_bytes"]
    b.claim(record)


def claims_follow(b: Bench) -> None:
    """Claims and logs of the first seed say what the changed program scores, and the mean follows."""
    val, artifact = str(b.data / "*_val_*.bin"), str(b.dist / "model_seed1.artifact")
    command = [sys.executable, str(b.program), "--score", artifact, "--val", val, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=b.root, env=environment, capture_output=True, text=True, check=True)
    scored, old = json.loads(done.stdout.splitlines()[-1]), b.claims()["seed_results"]["1"]["val_bpb"]
    b.of_seed(1, val_bpb=scored["val_bpb"], val_loss=scored["val_loss"])
    b.edit_log(1, f"val_bpb {old:.4f} (carried", f"val_bpb {scored['val_bpb']:.4f} (carried")
    b.mean_again()


def off_by_one_window(b: Bench) -> None:
    b.edit_program("                count = min(width, end - start)\n                nll_n[start",
                   "                count = min(width, end - start) - 1\n                nll_n[start")  # fmt: skip
    claims_follow(b)


def off_by_one_last_window(b: Bench) -> None:
    b.edit_program("range(0, max((end - start for start, end in own), default=0), length)",
                   "range(0, max((end - start for start, end in own), default=0) - length, length)")  # fmt: skip
    claims_follow(b)


def in_nll(b: Bench, statement: str) -> None:
    b.edit_program("        return nll_N.view(y_BT.shape)\n", f"        return {statement}\n")


EMBEDS = "        x_BTD = self.token_embed(ids_BT)\n"


def peeking_model(b: Bench) -> None:
    b.edit_program(EMBEDS, EMBEDS + "        x_BTD = x_BTD + 0.01 * x_BTD.roll(-2, 1)\n")


def peek_in_document(b: Bench) -> None:
    same = "        same_BT = document_ids_BT.roll(-16, 1) == document_ids_BT\n        same_BT[:, -16:] = False\n"
    b.edit_program(EMBEDS, f"{EMBEDS}{same}        x_BTD = x_BTD + 0.01 * x_BTD.roll(-16, 1) * same_BT[..., None]\n")


def target_in_input(b: Bench) -> None:
    b.edit_program(EMBEDS, EMBEDS + "        x_BTD = x_BTD + 0.01 * x_BTD.roll(-1, 1)\n")


def window_statistics(b: Bench) -> None:
    b.edit_program(EMBEDS, EMBEDS + "        x_BTD = x_BTD - 0.01 * x_BTD.mean(1, True)\n")


def shift_over_documents(b: Bench) -> None:
    shifted = "F.pad(x_BTD, (0, 0, 16, 0))[:, : x_BTD.shape[1]]"
    b.edit_program(EMBEDS, EMBEDS + f"        x_BTD = x_BTD + 0.01 * {shifted}\n")


def better_of_two(b: Bench) -> None:
    again = "softcap_nll_torch(rows, weight, bias, y_BT.reshape(-1), cap=self.config.logit_softcap"
    again += ", kind=self.softcap_kind, temperature=1.5 * temperature)"
    in_nll(b, f"torch.minimum(nll_N, {again}).view(y_BT.shape)")


def leaking_state(b: Bench) -> None:
    scan, ids = "            self.D,\n            initial_state_BHPN=", "            document_ids_BT="
    good = f"surviving(state.second, documents) if state else None,\n{ids}documents.now_BT if documents else None,\n"
    b.edit_program(scan + good, f"{scan}state.second if state else None,\n{ids}None,\n")


LEARNER = """def learn_from(lm: Any, tokens: np.ndarray) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        ids = torch.from_numpy(np.asarray(tokens).astype(np.int64))
        bias = torch.zeros(lm.config.vocab_size, requires_grad=True)
        optimizer = torch.optim.SGD([bias], lr=1.0)
        F.cross_entropy(bias.expand(len(ids), -1), ids).backward()
        optimizer.step()
        lm.vocab_bias.data = lm.vocab_bias.data.clone() + bias.detach()"""


# The end of token_nll; that of the mode which learns while it scores differs in its first line.
AT_END_OF_SCORING = """                    pace.check(computed * ranks.world)
    total = ranks.sum(torch.tensor([computed], dtype=torch.int64, device=ranks.device))
    return ranks.sum(nll_n).cpu().numpy(), int(total)"""


def discarded_learner(b: Bench) -> None:
    """Learns after scoring, and throws away what it has learned."""
    b.add_to_program(LEARNER)
    learns = "    kept = lm.vocab_bias.data\n    learn_from(lm, tokens)\n    lm.vocab_bias.data = kept\n"
    b.edit_program(AT_END_OF_SCORING, AT_END_OF_SCORING.replace("    total", learns + "    total"))


def reports_late(b: Bench) -> None:
    discarded_learner(b)
    b.edit_program("    def nll(tokens: np.ndarray, mode: str) -> np.ndarray:\n",
                   "    def nll(tokens: np.ndarray, mode: str, on_scored: Any) -> np.ndarray:\n")  # fmt: skip
    b.edit_program("        return token_nll(\n            lm,\n", "        nats_n = token_nll(\n            lm,\n")
    ends = "            ranks=ranks,\n        )[0]\n"
    b.edit_program(
        f'{ends}\n    return {{\n        "nll"',
        f'{ends}        on_scored(0, len(nats_n))\n        return nats_n\n\n    return {{\n        "nll"',
    )
    b.edit_program('"learns_while_scoring": "ttt" in config.modes(),', '"learns_while_scoring": True,')


def trains_first(b: Bench) -> None:
    b.add_to_program(LEARNER)
    line = "    targets = len(tokens) - 1\n    nll_n = torch.zeros(targets"
    b.edit_program(line, "    learn_from(lm, tokens)\n" + line)


REMEMBER = """SEEN: dict[bytes, float] = {}


def remembered(lm: Any, tokens: np.ndarray) -> float:
    key = np.asarray(tokens).tobytes()
    SEEN[key] = SEEN.get(key, 0.0) + 1.0
    return 1.0 - 0.01 * (SEEN[key] - 1.0)"""


def remembers_a_pass(b: Bench) -> None:
    b.add_to_program(REMEMBER)
    b.edit_program(AT_END_OF_SCORING, AT_END_OF_SCORING.replace("numpy()", "numpy() * remembered(lm, tokens)"))


def leaked_document(b: Bench) -> None:
    val, train = b.tokens("val"), b.tokens("train")
    starts = np.flatnonzero(val == 1)
    path = b.data / "manifest.json"
    b.write_tokens("train", np.concatenate([train, val[starts[0] : starts[1]]]))
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["splits"]["train"]["documents"] += 1
    path.write_text(json.dumps(manifest), encoding="utf-8")


def truncated_shard(b: Bench) -> None:
    path = b.shard("train")
    path.write_bytes(path.read_bytes()[:-1])
    b.seal_manifest("train")


def empty_shard(b: Bench) -> None:
    path = b.shard("train")
    path.write_bytes(b"")
    b.seal_manifest("train")


def token_too_large(b: Bench) -> None:
    tokens = b.tokens("train")
    tokens[100] = VOCAB_SIZE
    b.write_tokens("train", tokens)


def document_lost(b: Bench) -> None:
    tokens = b.tokens("train")
    b.write_tokens("train", tokens[: np.flatnonzero(tokens == 1)[-1]])


def called_fineweb(b: Bench) -> None:
    """A validation of a few documents under the name of FineWeb's."""
    path = b.data / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for split in ("train", "val"):
        shard = b.shard(split)
        name = f"fineweb_{split}_000000.bin"
        shard.rename(shard.with_name(name))
        manifest["splits"][split]["shards"][0]["file"] = name
    path.write_text(json.dumps(manifest), encoding="utf-8")


def no_first_bos(b: Bench) -> None:
    tokens = b.tokens("train")
    path = b.data / "manifest.json"
    b.write_tokens("train", tokens[1:])
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["splits"]["train"]["documents"] -= 1
    path.write_text(json.dumps(manifest), encoding="utf-8")


def changed_shard(b: Bench) -> None:
    tokens = b.tokens("train")
    tokens[100] = 5 if tokens[100] != 5 else 6
    b.write_tokens("train", tokens, seal=False)


def other_tokenizer(b: Bench) -> None:
    with open(b.data / "tokenizer.model", "ab") as file:
        file.write(b"\x9a\x06\x01a")  # an unknown field: the model still loads


def slow_training(b: Bench) -> None:
    b.edit_log(1, r"(trained \d+ steps in) [0-9.]+ s", r"\1 600.40 s", regex=True)
    b.of_seed(1, train_s=600.4)


def slow_logged_evaluation(b: Bench) -> None:
    b.edit_log(3, r"eval_time [0-9.]+ s", "eval_time 612.00 s", regex=True)
    b.of_seed(3, eval_s=612.0)


def learning_warmup(b: Bench) -> None:
    b.edit_program("        with self.rehearsal(at):\n            for _ in range(self.config.warmup_steps)",
                   "        if self.config:\n            for _ in range(self.config.warmup_steps)")  # fmt: skip


def calibration_after_clock(b: Bench) -> None:
    b.edit_log(1, r"(trained \d+ steps in) [0-9.]+ s(.*)\n", r"\1 595.00 s\2\nGPTQ:collected 67 Hessians in 12.7s\n",
               regex=True)  # fmt: skip
    b.of_seed(1, train_s=595.0)


def code_changed_later(b: Bench) -> None:
    b.edit_program("FINE_STEP = 0.02", "FINE_STEP = 0.03", in_logs=False)


def source_in_log_edited(b: Bench) -> None:
    b.edit_log(2, "FINE_STEP = 0.02", "FINE_STEP = 0.03")


def log_removed(b: Bench) -> None:
    b.log(3).unlink()


def log_copied(b: Bench) -> None:
    text = b.log(1).read_text(encoding="utf-8")
    b.log(2).write_text(text.replace('"seed": 1,', '"seed": 2,').replace("seed1", "seed2"), encoding="utf-8")
    one = b.claims()["seed_results"]["1"]
    b.of_seed(2, **{k: one[k] for k in ("val_loss", "val_bpb", "train_s", "eval_s", "steps", "tokens")})
    b.mean_again()


def two_seeds(b: Bench) -> None:
    b.log(3).unlink()
    (b.dist / "model_seed3.artifact").unlink()
    record = b.claims()
    del record["seed_results"]["3"]
    record["seeds"] = [1, 2]
    record["bytes_total"] = record["bytes_code"] + max(o["artifact_bytes"] for o in record["seed_results"].values())
    b.claim(record)
    b.mean_again()


def seed_bpb_edited(b: Bench) -> None:
    b.of_seed(1, val_bpb=lambda v: v - 0.01)
    b.mean_again()


def bpb_by_a_hair(b: Bench) -> None:
    for seed in SEEDS:  # to the log's own four decimals, where that is no worse
        b.of_seed(seed, val_bpb=lambda v: v - 0.4 * (v - (round(v, 4) - 0.00005)))
    b.mean_again()


def result_line_edited(b: Bench) -> None:
    b.edit_log(1, r"val_bpb [0-9.]+ \(carried", "val_bpb 0.9000 (carried", regex=True)


def cut_json(b: Bench) -> None:
    (b.dist / "submission.json").write_text('{"name": "tiny', encoding="utf-8")


def no_gain(b: Bench) -> None:
    """The record to beat has nearly our scores."""
    record = b.claims()
    for one in record["seed_results"].values():
        one["val_loss"] += 0.004
    (b.record / "submission.json").write_text(json.dumps(record), encoding="utf-8")


def add_function(text: str) -> Callable[[Bench], None]:
    return lambda b: b.add_to_program(text)


def late_temperature(b: Bench) -> None:
    b.add_to_program(
        "def finish_up(model: Any, loader: Any, train_loader: Any) -> float:\n"
        "    for batch in loader:\n        model(batch).backward()\n"
        "    return search_temperature(model, *train_loader.next(), 8, None)"
    )


BEHAVIOUR = ("staged", "score", "causality")
WRONG_SCORE = ("score.rescored", "score.own")
MUTANTS = (
    Mutant("one_byte_over", "bytes.counted", "comments fill the budget and one byte more", one_byte_over),
    Mutant("packed_over", "bytes.counted", "packed; comments fill the budget and one byte more",
           packed_over),
    Mutant("second_weights", "bytes.counted", "a second file of weights, one byte too large", second_weights),
    Mutant("code_bytes_off", "bytes.claimed", "bytes_code is one less", lambda b: b.top(bytes_code=lambda v: v - 1)),
    Mutant("total_bytes_off", "bytes.claimed", "bytes_total is 100 less",
           lambda b: b.top(bytes_total=lambda v: v - 100)),
    Mutant("artifact_bytes_off", "bytes.claimed", "one seed's artifact is claimed 10 bytes smaller",
           lambda b: b.of_seed(2, artifact_bytes=lambda v: v - 10)),
    Mutant("helper_module", "bytes.siblings", "the program imports a module beside it", helper_module),
    Mutant("import_by_name", "bytes.siblings", "a function imports a module beside the program by its name",
           import_by_name),
    Mutant("exec_of_sibling", "bytes.siblings", "the program executes a file beside it", exec_of_sibling),
    Mutant("blob", "bytes.blobs", "a binary file without a declared kind", blob),
    Mutant("binary_as_text", "bytes.blobs", "a binary file called notes.txt", binary_as_text),
    Mutant("damaged_pack", "staged.compiled", "a packed program with five characters missing",
           lambda b: pack(b, damage), ("evidence.code", "staged.smoke"), ("staged",)),
    Mutant("obscured", "staged.compiled", "the program is behind a cipher that only running it undoes", obscured,
           runs=("staged",)),
    Mutant("undeclared_package", "staged.imports", "a function imports a package that nobody names", undeclared_package,
           runs=("staged",)),
    Mutant("requirement_gone", "staged.imports", "requirements.txt lacks a package that is imported", requirement_gone,
           runs=("staged",)),
    Mutant("crash_in_training", "staged.smoke", "the first training step raises", crash_in_training, runs=("staged",)),
    Mutant("asks_network", "staged.network", "scoring opens a connection, by a name put together at run time",
           asks_network, runs=("staged",)),
    Mutant("writes_source", "staged.readonly", "scoring leaves a file beside the program", writes_source,
           runs=("staged",)),
    Mutant("unpacks_beside", "staged.readonly", "packed; the program is unpacked beside itself", unpacks_beside,
           ("staged.outside",), ("staged",)),
    Mutant("reads_outside", "staged.outside", "scoring reads a file from elsewhere", reads_outside, runs=("staged",)),
    Mutant("reads_training_shard", "staged.training_data", "scoring reads a training shard, its name put together",
           reads_training_shard, runs=("staged",)),
    Mutant("json_and_log_edited", "score.rescored", "JSON and logs say 0.02 bpb less, in agreement with each other",
           both_edited, runs=("score",)),
    Mutant("generous_score", "score.own", "--score drops 2% of the nats; claims and logs follow", generous_score,
           runs=("score",)),
    Mutant("wrong_byte_table", "score.bytes", "tokens above 300 count a byte too much", wrong_byte_table, WRONG_SCORE,
           ("score",)),
    Mutant("bytes_misstated", "score.bytes", "--score prints 100 bytes more than it divides by", bytes_misstated,
           runs=("score",)),
    Mutant("claimed_bytes", "score.bytes", "100 bytes more are claimed, with bpb, JSON and logs to match",
           claimed_bytes, ("score.rescored",), ("score",)),
    Mutant("capped_validation", "score.coverage", "--score stops after 512 tokens", capped_validation,
           (*WRONG_SCORE, "score.bytes"), ("score",)),
    Mutant("claimed_tokens", "score.coverage", "one token less is claimed than validation has",
           lambda b: b.of_seed(None, val_tokens=lambda v: v - 1), ("score.invariant", "score.rescored"), ("score",)),
    Mutant("off_by_one_window", "score.coverage", "the last token of every window is never scored; claims follow",
           off_by_one_window, runs=("score",)),
    Mutant("last_window_dropped", "score.coverage", "the last window is never scored; claims follow",
           off_by_one_last_window, runs=("score",)),
    Mutant("bpb_by_a_hair", "score.invariant", "bpb is rounded down within the four decimals of the log", bpb_by_a_hair,
           runs=("score",)),
    Mutant("peeking_model", "causality.future", "a hundredth of the embedding two tokens ahead is added", peeking_model,
           ("causality.isolated", "causality.normalised"), ("causality",)),
    Mutant("packed_peek", "causality.future", "packed; a hundredth of the embedding two tokens ahead is added",
           packed(peeking_model), ("causality.isolated", "causality.normalised"), ("causality",)),
    Mutant("target_in_input", "causality.normalised", "a hundredth of the target's own embedding is added",
           target_in_input, runs=("causality",)),
    Mutant("peek_in_document", "causality.future", "a hundredth of the embedding 16 tokens ahead in the same document "
           "is added", peek_in_document, runs=("causality",)),
    Mutant("window_statistics", "causality.future", "the mean embedding of the window is taken off", window_statistics,
           ("causality.isolated",), ("causality",)),
    Mutant("not_normalised", "causality.normalised", "every token costs 2% less",
           lambda b: in_nll(b, "(0.98 * nll_N).view(y_BT.shape)"), runs=("causality",)),
    Mutant("rescored_token", "causality.normalised", "each token gets the better of two scores, at two temperatures",
           better_of_two, runs=("causality",)),
    Mutant("leaking_state", "causality.isolated", "the scan's state survives the end of a document", leaking_state,
           ("causality.normalised",), ("causality",)),
    Mutant("shift_over_documents", "causality.isolated", "a hundredth of the embedding 16 tokens before is added, over "
           "the ends of documents", shift_over_documents, runs=("causality",)),
    Mutant("undeclared_learner", "causality.score_first", "an optimizer steps after scoring, for nothing",
           discarded_learner, runs=("causality",)),
    Mutant("reports_late", "causality.score_first", "learning is declared, but tokens are reported after the step",
           reports_late, runs=("causality",)),
    Mutant("trains_first", "causality.score_first", "an optimizer learns from the stream before it is scored",
           trains_first, ("causality.future", "causality.isolated", "causality.normalised", "causality.once"),
           ("causality",)),
    Mutant("remembers_a_pass", "causality.once", "a stream seen before costs 1% less", remembers_a_pass,
           runs=("causality",)),
    Mutant("leaked_document", "lineage.disjoint", "a validation document is appended to training", leaked_document),
    Mutant("truncated_shard", "lineage.shards", "a shard lacks its last byte", truncated_shard),
    Mutant("empty_shard", "lineage.shards", "a shard of no bytes", empty_shard),
    Mutant("token_too_large", "lineage.shards", "a token outside the vocabulary", token_too_large),
    Mutant("document_lost", "lineage.documents", "the last training document is missing", document_lost),
    Mutant("called_fineweb", "lineage.documents", "a validation called FineWeb's without its 50,000 documents",
           called_fineweb),
    Mutant("no_first_bos", "lineage.documents", "a split does not begin with BOS", no_first_bos),
    Mutant("changed_shard", "lineage.manifest", "one training token is not what the manifest's hash says",
           changed_shard),
    Mutant("other_tokenizer", "lineage.manifest", "another tokenizer file", other_tokenizer, ("lineage.claimed",)),
    Mutant("other_validation", "lineage.claimed", "the claim is about other validation shards",
           lambda b: b.of_seed(1, val_sha256="0" * 64)),
    Mutant("slow_training", "time.train", "600.4 s of training, in log and JSON", slow_training),
    Mutant("claimed_seconds", "time.claimed", "a tenth of a second less is claimed than logged",
           lambda b: b.of_seed(2, train_s=lambda v: v - 0.1)),
    Mutant("claimed_evaluation", "time.claimed", "less evaluation is claimed than logged",
           lambda b: b.of_seed(3, eval_s=lambda v: v - 0.02)),
    Mutant("slow_evaluation", "time.evaluate", "612 s of evaluation", lambda b: b.of_seed(3, eval_s=612.0)),
    Mutant("slow_logged_evaluation", "time.evaluate", "612 s of evaluation, in log and JSON", slow_logged_evaluation),
    Mutant("learning_warmup", "time.outside", "what the warmup steps learn is kept", learning_warmup),
    Mutant("calibration_after_clock", "time.outside", "calibration goes on after 595 s of training",
           calibration_after_clock),
    Mutant("code_changed_later", "evidence.code", "a constant changes after the runs", code_changed_later),
    Mutant("packed_later_code", "evidence.code", "packed; a constant changes after the runs",
           packed(code_changed_later)),
    Mutant("packed_edited_log", "evidence.code", "packed; a constant in one log's source",
           packed(source_in_log_edited)),
    Mutant("source_in_log_edited", "evidence.code", "a constant in one log's source", source_in_log_edited),
    Mutant("other_options", "evidence.config", "all logs are of another learning rate than the program's",
           lambda b: b.edit_log(None, '"matrix_lr": 0.02', '"matrix_lr": 0.03')),
    Mutant("mixed_options", "evidence.config", "one seed ran with another option",
           lambda b: b.edit_log(2, '"muon_wd": 0.04', '"muon_wd": 0.05')),
    Mutant("log_removed", "evidence.seeds", "a claimed seed has no log", log_removed),
    Mutant("log_copied", "evidence.seeds", "one seed's log is a copy of another's", log_copied),
    Mutant("two_seeds", "evidence.seeds", "two seeds on a record track", two_seeds),
    Mutant("seed_bpb_edited", "evidence.numbers", "one seed's bpb is 0.01 less in JSON", seed_bpb_edited,
           ("score.invariant", "score.rescored")),
    Mutant("better_mean", "evidence.numbers", "the headline is below the mean of its seeds",
           lambda b: b.top(val_bpb=lambda v: v - 0.001)),
    Mutant("log_edited", "evidence.numbers", "the result line of one log", result_line_edited),
    Mutant("claimed_steps", "evidence.numbers", "100 steps more are claimed than logged",
           lambda b: b.of_seed(1, steps=lambda v: v + 100)),
    Mutant("author_missing", "evidence.papers", "no author is named", lambda b: b.top(author=None)),
    Mutant("readme_missing", "evidence.papers", "README.md is missing", lambda b: (b.dist / "README.md").unlink()),
    Mutant("json_damaged", "evidence.papers", "submission.json is cut off", cut_json),
    Mutant("no_gain", "evidence.significance", "the gain over the record is 0.004 nats", no_gain),
    Mutant("torch_load", "lint.loading", "torch.load without weights_only",
           add_function("def old_weights(path: str) -> Any:\n    return torch.load(path)")),
    Mutant("packed_torch_load", "lint.loading", "packed; torch.load without weights_only",
           packed(add_function("def old_weights(path: str) -> Any:\n    return torch.load(path)"))),
    Mutant("numpy_pickle", "lint.loading", "np.load with allow_pickle",
           add_function("def old_table(path: str) -> Any:\n    return np.load(path, allow_pickle=True)")),
    Mutant("downloads", "lint.network", "a function downloads from a hub",
           add_function("def fetch() -> Any:\n    from huggingface_hub import hf_hub_download\n\n"
                        '    return hf_hub_download("a/b", "c")')),
    Mutant("eval_reads_training", "lint.training_data", "a scoring function names training shards",
           add_function('def eval_primed(path: str) -> Any:\n    return list_shards(path + "/fineweb_train_*.bin")')),
    Mutant("late_temperature", "lint.training_data", "the temperature is searched on training text after training",
           late_temperature),
    Mutant("starts_compiler", "lint.binaries", "a function starts a compiler",
           add_function('def build() -> None:\n    subprocess.run(["g++", "kernel.cpp"], check=True)')),
    Mutant("starts_anew", "lint.binaries", "a function replaces the process by another program",
           add_function('def again() -> None:\n    os.execv(sys.executable, [sys.executable, "-c", "pass"])')),
    Mutant("libc_dlopen", "lint.binaries", "native code is loaded by the C library that the process has open",
           add_function('def native() -> Any:\n    return ctypes.CDLL(None).dlopen(b"kernel.so", 2)')),
    Mutant("native_library", "lint.binaries", "a function loads native code",
           add_function('def native() -> Any:\n    import ctypes\n\n    return ctypes.CDLL("kernel.so")')),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    failed: tuple[str, ...]

    @property
    def killed(self) -> bool:
        return self.mutant.check in self.failed


def try_mutant(bench: Bench, mutant: Mutant, work: Path) -> Outcome:
    """Plant the fault in a copy and examine it. The copy is removed."""
    target = work / mutant.name
    copy = bench.copy(target)
    try:
        mutant.plant(copy)
        if mutant.runs:  # one seed's weights tell; three take three times as long
            for seed in SEEDS[1:]:
                path = copy.dist / f"model_seed{seed}.artifact"
                if path.exists():
                    path.unlink()
        return Outcome(mutant, tuple(sorted(examine(copy, mutant.families))))
    finally:
        shutil.rmtree(target)


def mutant_table(outcomes: Sequence[Outcome]) -> str:
    lines = ["| mutant | what is planted | caught by | other checks that fail with it |", "| --- | --- | --- | --- |"]
    for one in outcomes:
        others = ", ".join(f"`{name}`" for name in one.failed if name != one.mutant.check) or "–"
        caught = f"`{one.mutant.check}`" if one.killed else "**nothing**"
        lines.append(f"| {one.mutant.name} | {one.mutant.what} | {caught} | {others} |")
    killed = sum(one.killed for one in outcomes)
    return "\n".join([*lines, "", f"{killed} of {len(outcomes)} mutants are killed."])


def check_table() -> str:
    lines = ["| check | rule |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| `{check.name}` | {check.rule} |" for check in CHECKS)])


def put_between(text: str, name: str, content: str) -> str:
    pattern = re.compile(rf"(<!-- {name}:begin[^\n]* -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise GolfError(f"expected one pair of markers {name}:begin and {name}:end")
    return pattern.sub(lambda match: f"{match.group(1)}{content}\n{match.group(2)}", text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Plant faults in a good submission and see the referee find them.")
    parser.add_argument("--names", nargs="*", default=[], help="only these mutants; writes no table")
    parser.add_argument("--work", type=Path, default=None, help="keep the submission and the outcomes here, and go on")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tried at a time, each on one thread")
    arguments = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if not arguments.names or m.name in arguments.names]
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        bench, record = Bench(work / "good"), work / "outcomes.jsonl"
        if not (bench.record / "submission.json").exists():
            bench = make_bench(work / "good")
        known: dict[str, list[str]] = {}
        if record.exists():
            known = dict(json.loads(line) for line in record.read_text(encoding="utf-8").splitlines())

        writes = threading.Lock()

        def outcome(name: str, tries: Callable[[], Sequence[str]]) -> tuple[str, ...]:
            if name not in known:
                found = list(tries())
                with writes, open(record, "a", encoding="utf-8") as file:
                    file.write(json.dumps([name, found]) + "\n")
                known[name] = found
            return tuple(known[name])

        def judge(mutant: Mutant) -> Outcome:
            return Outcome(mutant, outcome(mutant.name, lambda: try_mutant(bench, mutant, Path(temporary)).failed))

        alarms: list[str] = []
        for form in ("plain", "packed"):
            found = outcome(form, lambda form=form: alarms_of(bench, form, Path(temporary)))
            print(f"the good submission, {form}: {list(found) or 'no alarm'}", flush=True)
            alarms += found
        outcomes: list[Outcome] = []
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            for one in pool.map(judge, chosen):
                outcomes.append(one)
                state = "killed" if one.killed else "SURVIVES"
                print(f"{state:8} {one.mutant.name} by {one.mutant.check}; failed: {', '.join(one.failed)}", flush=True)
    if not arguments.names:
        text = put_between(TABLE.read_text(encoding="utf-8"), "mutants", mutant_table(outcomes))
        write_atomically(TABLE, put_between(text, "checks", check_table()).encode())
    survivors = [one.mutant.name for one in outcomes if not one.killed]
    print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} killed{f'; survive: {survivors}' if survivors else ''}")
    return 1 if survivors or alarms else 0


if __name__ == "__main__":
    sys.exit(main())
