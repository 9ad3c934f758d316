#!/usr/bin/env python3
"""nvcc for one architecture: mamba-ssm and causal-conv1d hard-code nine in setup.py, and an H100 runs one of them.

torch's build system calls the program that PYTORCH_NVCC names in place of nvcc. This one drops every `-gencode` pair
from the command, asks for sm_90 alone, and becomes nvcc.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

SM_90 = ("-gencode", "arch=compute_90,code=sm_90")


def for_sm90(arguments: Sequence[str]) -> list[str]:
    """The same nvcc arguments with sm_90 as the only architecture."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in ("-gencode", "--generate-code"):
            next(words, None)
        elif not word.startswith(("-gencode=", "--generate-code=", "-arch=", "--gpu-architecture=")):
            kept.append(word)
    return [*kept, *SM_90] if any(word.endswith((".cu", ".cpp", ".cc")) for word in kept) else kept


def main() -> int:
    home = os.environ.get("CUDA_HOME")
    if not home:
        print("nvcc_sm90: CUDA_HOME is not set; it is the folder whose bin/nvcc compiles", file=sys.stderr)
        return 2
    nvcc = os.path.join(home, "bin", "nvcc")
    os.execv(nvcc, [nvcc, *for_sm90(sys.argv[1:])])


if __name__ == "__main__":
    sys.exit(main())
