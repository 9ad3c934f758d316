"""Code + weights against the 16,000,000 bytes of the challenge: `make verify-artifact-size [ARTIFACT=file]`.

Bundles the entry for a preset and adds an artifact: the one given, or what a trained model of that preset is predicted
to weigh. The prediction takes the preset's shapes and grids and what artifacts of trained models had (a file of
`python -m common.artifact measure`); nothing is drawn at random and nothing is trained. With free steps the file
fills what the budget leaves, whatever the model. The weight of a trained model is its own artifact's. Exits with status
1 if the total is over the limit, 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from common.artifact.budget import CHALLENGE_BUDGET_BYTES, check_budget, format_size_table
from common.artifact.container import read_artifact
from common.artifact.predict import predict_size, read_measured
from common.errors import ArtifactError, ConfigError, GolfError
from common.files import write_atomically
from common.quant.grid import GridSpec
from scripts.bundle import ENTRY, ROOT, make_bundle
from submissions.jepa_mamba.train_gpt import Config, LanguageModel, read_preset, select_kernels, storage_spec

MEASURED = ROOT / "benchmarks" / "artifact-sizes.json"


def preset_layout(preset: str) -> dict[str, tuple[tuple[int, ...], GridSpec]]:
    """Shape and grid of every tensor that a preset ships. Raises ConfigError."""
    config = replace(Config(), **read_preset(preset))
    if config.free_steps:
        raise ConfigError(f"preset {preset} has free_steps: its artifact fills its budget, there is nothing to predict")
    with torch.device("meta"):
        lm = LanguageModel(config, select_kernels("torch", torch.device("cpu")))
    return {name: (tuple(p.shape), storage_spec(name, p, config)) for name, p in lm.named_parameters()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Code + weights against the challenge's 16,000,000 bytes.")
    parser.add_argument("--artifact", type=Path, default=None, help="artifact to weigh (default: predict one)")
    parser.add_argument("--preset", default="seed_bpe", help="preset to bundle and, without --artifact, to predict")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="sizes of trained artifacts (%(default)s)")
    parser.add_argument("--layout", type=Path, default=None, help="write shapes and grids as JSON, for --predict")
    parser.add_argument("--budget_bytes", type=int, default=CHALLENGE_BUDGET_BYTES, help="limit for code + artifact")
    arguments = parser.parse_args(argv)
    try:
        code_bytes = make_bundle(ROOT, ENTRY, read_preset(arguments.preset)).code_bytes
        if arguments.artifact is not None:
            print(f"{arguments.artifact}, with the code of preset {arguments.preset}")
            report = read_artifact(arguments.artifact)[2]
        else:
            layout = preset_layout(arguments.preset)
            if arguments.layout is not None:
                rows = {name: {"shape": shape, "grid": spec.label} for name, (shape, spec) in layout.items()}
                write_atomically(arguments.layout, json.dumps(rows, indent=1).encode() + b"\n")
            measured = read_measured(arguments.measured)
            print(f"{arguments.preset} as predicted from {len(measured)} trained artifacts")
            report = predict_size(layout, measured)
        print(format_size_table(report, code_bytes, arguments.budget_bytes))
    except GolfError as error:
        print(f"verify_artifact_size: {error}", file=sys.stderr)
        return 2
    try:
        check_budget(report.file_bytes + code_bytes, arguments.budget_bytes)
    except ArtifactError as error:
        print(f"verify_artifact_size: {error}", file=sys.stderr)
        return 1
    print(f"fits: {report.file_bytes + code_bytes:,} of {arguments.budget_bytes:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
