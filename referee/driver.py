"""Runs inside the staged folder: imports its train_gpt.py, asks its `referee_hook` for scores, writes them down.

    python driver.py TRAIN_GPT ARTIFACT WORK_FOLDER

It knows nothing of what is asked or why. It says in one JSON line what the hook offers, waits for a line on standard
input, and answers the request that then lies in the work folder: `request.json` with the scoring mode and length of
each stream, `request.u16` with their tokens one after another. The answer is `answer.f64`, one float64 of nats for
every token but the first of each stream, and a JSON line with what was seen on the way (optimizer steps, reports of
scored tokens).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

FACTS = ("modes", "vocab_size", "bos_id", "isolates_documents", "window", "learns_while_scoring")


def load_program(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("entry_under_test", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules["entry_under_test"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def watch_optimizers(seen: list[list[Any]]) -> None:
    """Every optimizer step of torch, whoever calls it, is written into `seen` before it happens."""
    if "torch" in sys.modules:
        optimizer = importlib.import_module("torch.optim.optimizer")
        optimizer.register_optimizer_step_pre_hook(lambda *_: seen.append(["step"]))


def answer(hook: dict[str, Any], work: Path, seen: list[list[Any]]) -> dict[str, Any]:
    """Score every stream of the request, within its seconds; later streams are left out when they are used up."""
    request = json.loads((work / "request.json").read_text(encoding="utf-8"))
    tokens = np.fromfile(work / "request.u16", dtype="<u2")
    started_s, place, events = time.monotonic(), 0, []
    answered = 0
    with open(work / "answer.f64", "wb") as out:
        for mode, count in request["streams"]:
            if time.monotonic() - started_s > request["limit_s"]:
                break
            stream, place = tokens[place : place + count].copy(), place + count
            seen.clear()
            options: dict[str, Any] = {}
            if hook["learns_while_scoring"]:
                options["on_scored"] = lambda first, end: seen.append(["scored", int(first), int(end)])
            nats = np.asarray(hook["nll"](stream, mode, **options), dtype="<f8").reshape(-1)
            if nats.shape != (count - 1,):
                raise ValueError(f"nll of {count} tokens returned {nats.size} values, expected {count - 1}")
            out.write(nats.tobytes())
            events.append(list(seen))
            answered += 1
    return {"answered": answered, "events": events, "seconds": time.monotonic() - started_s}


def main(arguments: list[str]) -> None:
    program, artifact, work = arguments
    speaks = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the submission prints goes to standard error
    seen: list[list[Any]] = []
    module = load_program(program)
    if not hasattr(module, "referee_hook"):
        print(json.dumps({"missing": "the program has no function referee_hook(artifact)"}), file=speaks, flush=True)
        return
    watch_optimizers(seen)
    hook = module.referee_hook(artifact)
    print(json.dumps({name: hook[name] for name in FACTS}), file=speaks, flush=True)
    for line in sys.stdin:
        if line.strip():
            print(json.dumps(answer(hook, Path(work), seen)), file=speaks, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
