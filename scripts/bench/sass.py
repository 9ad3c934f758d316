"""What a kernel executes: its instructions as the GPU gets them, counted in NVIDIA's disassembly of a compiled kernel.

Without a GPU this is the nearest thing to a time. A multiprocessor of an H100 issues at most four instructions a clock
(each for the 32 threads of a warp), so a kernel takes at least warps x instructions / (4 x 132 x clock), and one whose
warps mostly wait for each other at barriers takes much longer.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instructions:
    """Counts of one kernel; a warp executes those of a loop once a turn.

    Attributes:
        total: all of the code.
        loop: of them in the largest loop.
        barriers: of these such where the warps of a block wait for each other.
    """

    total: int
    loop: int
    barriers: int


def disassemble(cubin: bytes) -> str:
    """nvdisasm's listing of a compiled kernel; nvdisasm comes with Triton."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", str(path)], capture_output=True, text=True, timeout=120, check=True
        )
    return done.stdout


def count_instructions(listing: str) -> Instructions:
    """Counts instructions and finds the largest loop: from the label of a branch backwards to that branch.

    Code after the last EXIT (the last unconditional one, if there is any) is left out of loops: there stand subroutines
    and the slow ways of a wait, which end with a branch back to it.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"^(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(.+?)\s*;", line):
            instructions.append(code[1])
    exits = [at for at, code in enumerate(instructions) if code == "EXIT"]
    exits = exits or [at for at, code in enumerate(instructions) if code.endswith(" EXIT")]
    if not exits:
        raise ValueError(f"the disassembly holds {len(instructions)} instructions and no EXIT; is it one of a kernel?")
    first, last = 0, -1
    for at, code in enumerate(instructions[: exits[-1]]):
        branch = re.search(r"\bBRA\b.*`\((\.L\w+)\)", code)
        start = labels.get(branch[1], at + 1) if branch else at + 1
        if start <= at and at - start > last - first:
            first, last = start, at
    loop = instructions[first : last + 1]
    return Instructions(len(instructions), len(loop), sum(" BAR." in f" {code}" for code in loop))
