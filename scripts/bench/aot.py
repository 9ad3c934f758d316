"""Compile every kernel of the catalogue for sm_90 without a GPU; registers, stack, shared memory, instructions of each.

    python scripts/bench aot [OPERATION ...]

Nothing is written down twice: each operation is called on tensors without values (device "meta") through its public
function, forward and backward, and every launch is compiled as it would be launched, with the same types, constants,
warps, stages and divisibility. What ptxas -v says is read from Triton's own call of it (tensor-core products that it
serializes are a fault); instructions are counted in the disassembly: all, those of the largest loop, and the barriers
among these. That a whole operation runs on tensors without values also shows that it never waits for the device.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common.files import write_atomically
from scripts.bench.catalogue import OPERATIONS, OpCase, cases_of, run_with_gradients
from scripts.bench.sass import count_instructions, disassemble

SM90_SHARED_BYTES = 227 * 1024  # most that one block may have on an H100 or H200


@dataclass(frozen=True)
class Compiled:
    """One launch of one kernel as compiled."""

    case: str
    kernel: str
    constants: str
    grid: str
    warps: int
    stages: int
    registers: int
    stack_bytes: int  # spilled registers among them
    spill_bytes: int  # stores and loads
    shared_bytes: int
    instructions: int
    loop_instructions: int
    loop_barriers: int
    warning: str  # what ptxas calls a potential loss of performance; empty: nothing
    reason: str  # why it may use the stack; empty: it may not

    @property
    def fault(self) -> str:
        """What is wrong with it, or nothing."""
        if (self.stack_bytes or self.spill_bytes) and not self.reason:
            return (
                f"{self.case}: {self.kernel} ({self.constants}) has {self.stack_bytes} bytes on the stack and spills "
                f"{self.spill_bytes} bytes"
            )
        if self.warning:
            return f"{self.case}: {self.kernel} ({self.constants}): {self.warning}"
        if self.shared_bytes > SM90_SHARED_BYTES:
            return f"{self.case}: {self.kernel} ({self.constants}) needs {self.shared_bytes} bytes of shared memory"
        return ""


class Sm90Driver:
    """Stands in for the CUDA driver: one H100, nothing can be launched."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def read_ptxas(log: str) -> tuple[int, int, int]:
    """(registers, bytes of stack, bytes of spill stores and loads) out of what ptxas -v says about one kernel."""
    registers = re.findall(r"Used (\d+) registers", log)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if len(registers) != 1 or not frames:
        raise RuntimeError(f"ptxas -v said nothing about one kernel; got {log!r}")
    stack, stores, loads = (sum(int(frame[i]) for frame in frames) for i in range(3))
    return int(registers[0]), stack, stores + loads


def read_warning(log: str) -> str:
    """ptxas's reason why tensor-core products of a kernel wait for one another, or nothing."""
    found = re.search(r"Potential Performance Loss: (.+?)(?: in the function.*)?$", log, re.MULTILINE)
    return found[1] if found else ""


@contextlib.contextmanager
def compiling_only(found: list[tuple[Any, Any, Any]], logs: dict[str, str]) -> Iterator[None]:
    """Launches inside are compiled for sm_90 and put into `found` (function, compiled kernel, grid), each kernel once.

    `logs` receives what ptxas said of each kernel by the kernel's hash; a kernel met again is not compiled again.
    """
    import triton
    from triton import knobs
    from triton.runtime.driver import driver

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted here; unset it to compile them")
    launch = triton.JITFunction.run
    seen = set()

    def compile_launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel: Any = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            own = {key: value for key, value in kwargs.items() if key in self.arg_names}
            size: Any = grid(self.signature.bind_partial(*args, **own).arguments) if callable(grid) else grid
            logs.setdefault(kernel.hash, log.getvalue())
            found.append((self, kernel, tuple(size)))
        return kernel

    before = knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile
    active = driver._active
    try:
        triton.JITFunction.run = compile_launch  # pyright: ignore[reportAttributeAccessIssue]
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        driver.set_active(Sm90Driver())  # pyright: ignore[reportArgumentType]
        yield
    finally:
        triton.JITFunction.run = launch
        knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile = before
        driver._active = active


def constants_of(kernel: Any) -> str:
    """The constants that a kernel was compiled with, without those that a missing or unit argument became."""
    names = kernel.src.fn.arg_names
    values = {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
    return " ".join(f"{name}={value}" for name, value in values.items() if name.isupper() and value is not None)


def compile_case(case: OpCase, logs: dict[str, str]) -> list[Compiled]:
    """Compile what one operation launches at its real shapes, forward and backward; `logs` as in `compiling_only`."""
    found: list[tuple[Any, Any, Any]] = []
    with compiling_only(found, logs):
        run_with_gradients(case.triton_form, case.inputs(torch.device("meta")), case.gradients)
    if not found:
        raise RuntimeError(f"{case.name} launched no kernel on tensors without values")
    rows = []
    for function, kernel, grid in found:
        registers, stack_bytes, spill_bytes = read_ptxas(logs[kernel.hash])
        counted = count_instructions(disassemble(kernel.asm["cubin"]))
        name = function.fn.__name__
        rows.append(
            Compiled(
                case=case.name,
                kernel=name,
                constants=constants_of(kernel),
                grid="x".join(str(int(n)) for n in grid),
                warps=kernel.metadata.num_warps,
                stages=kernel.metadata.num_stages,
                registers=registers,
                stack_bytes=stack_bytes,
                spill_bytes=spill_bytes,
                shared_bytes=kernel.metadata.shared,
                instructions=counted.total,
                loop_instructions=counted.loop,
                loop_barriers=counted.barriers,
                warning=read_warning(logs[kernel.hash]),
                reason=case.stack_reasons.get(name, ""),
            )
        )
    return rows


def table_of(rows: Sequence[Compiled]) -> str:
    """A markdown table."""
    head = ["case", "kernel", "grid", "warps", "stages", "registers", "stack", "spill bytes", "shared bytes"]
    head += ["instructions", "in the loop", "barriers", "constants"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        cells = [row.case, row.kernel, row.grid, row.warps, row.stages, row.registers, row.stack_bytes]
        cells += [row.spill_bytes, f"{row.shared_bytes:,}", row.instructions, row.loop_instructions, row.loop_barriers]
        cells += [row.constants + (f" (spills: {row.reason})" if row.reason else "")]
        lines.append(" | ".join(str(cell) for cell in cells))
    return "\n".join(f"| {line} |" for line in lines)


def as_records(rows: Sequence[Compiled]) -> list[dict[str, Any]]:
    return [asdict(row) | {"fault": row.fault} for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns 1 if a kernel has a fault."""
    parser = argparse.ArgumentParser(
        "python scripts/bench aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operations", nargs="*", metavar="OPERATION", help=f"of {', '.join(OPERATIONS)}; none: all")
    parser.add_argument("--quick", action="store_true", help="leave out what compiles slowly")
    parser.add_argument("--json", type=Path, help="where the figures go as JSON")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.operations) - set(OPERATIONS)
    if unknown:
        parser.error(f"no operation {', '.join(sorted(unknown))}; there are {', '.join(OPERATIONS)}")
    rows: list[Compiled] = []
    logs: dict[str, str] = {}
    for case in cases_of(arguments.operations or OPERATIONS):
        if not (arguments.quick and case.compile_slowly):
            rows += compile_case(case, logs)
    print(table_of(rows))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.json, (json.dumps(as_records(rows), indent=1) + "\n").encode())
    faults = [row.fault for row in rows if row.fault]
    if faults:
        print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0
