"""Every kernel compiles for sm_90 at its real shapes, without spills and within shared memory; the check can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: kernels cannot be compiled")

from scripts.bench.aot import SM90_SHARED_BYTES, Compiled, read_ptxas, read_warning
from scripts.bench.catalogue import OPERATIONS
from scripts.bench.sass import Instructions, count_instructions

ROOT = Path(__file__).resolve().parents[3]


def compiled(tmp_path: Path, *options: str, cwd: Path = ROOT) -> tuple[int, list[dict], str]:
    """Exit status, rows and output of `python scripts/bench aot` in a process without the interpreter."""
    path = tmp_path / "aot.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(cwd / "scripts" / "bench"), "aot", *options, "--json", str(path)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "triton")},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return done.returncode, rows, done.stdout + done.stderr


# Two processes, not one an operation: each takes seconds to start.
@pytest.mark.parametrize("operations", [OPERATIONS[::2], OPERATIONS[1::2]], ids="-".join)
def test_kernels_compile_without_spills(operations, tmp_path, record_property):
    status, rows, output = compiled(tmp_path, *operations, "--quick")
    record_property("figures", output)  # printed at the end of a test run: tests/conftest.py
    assert status == 0, output
    assert [row["fault"] for row in rows if row["fault"]] == []
    assert {row["case"].split("/")[0] for row in rows} == set(operations)


@pytest.mark.slow
def test_all_kernels_compile_without_spills(tmp_path, record_property):
    status, _, output = compiled(tmp_path)
    record_property("figures", output)
    assert status == 0, output


PLANTED = '''
import torch

from common.triton_support import tl, triton_kernel
from scripts.bench.catalogue import OpCase, Work


@triton_kernel
def many_kernel(a_ptr, out_ptr, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    kept = tl.load(a_ptr + at)
    total = kept
    for i in range(n):
        total += kept * tl.load(a_ptr + i * SIZE + at)
    tl.store(out_ptr + at, total)


@triton_kernel
def large_kernel(a_ptr, out_ptr, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tile = at[:, None] * SIZE + at[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for i in range(n):
        total = tl.dot(tl.load(a_ptr + i * SIZE + tile), tl.load(a_ptr + i * SIZE * SIZE + tile), total)
    tl.store(out_ptr + tile, total)


def many(a, warps):
    out = torch.empty_like(a)
    many_kernel[(1,)](a, out, 8, SIZE=a.shape[0], num_warps=warps)
    return out


def large(a):
    out = a.new_empty(a.shape, dtype=torch.float32)
    large_kernel[lambda meta: (meta["n"],)](a, out, 8, SIZE=a.shape[0], num_warps=8, num_stages=6)
    return out


def case(name, size, **more):
    inputs = lambda device: {"a": torch.empty(size, device=device), "warps": 1}
    return OpCase(name, inputs, many, many, (), Work(0), **more)


CASES = [
    case("fine", 1024),
    case("spilling", 8192),
    case("excused", 8192, stack_reasons={"many_kernel": "planted"}),
    OpCase(
        "large",
        lambda device: {"a": torch.empty(128, 128, device=device, dtype=torch.bfloat16)},
        large,
        large,
        (),
        Work(0),
        stack_reasons={"large_kernel": "planted"},
    ),
]
'''


def test_spills_and_too_much_shared_memory_are_found(tmp_path):
    for name in ("common", "scripts/bench"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "common").symlink_to(ROOT / "common")
    bench = tmp_path / "scripts" / "bench"
    (bench / "cases").mkdir(parents=True)
    for name in ("__main__.py", "aot.py", "catalogue.py", "sass.py"):
        (bench / name).write_bytes((ROOT / "scripts" / "bench" / name).read_bytes())
    (bench / "cases" / "ssd.py").write_text(PLANTED, encoding="utf-8")
    status, rows, output = compiled(tmp_path, "ssd", cwd=tmp_path)
    by_case = {row["case"]: row for row in rows}
    assert by_case.keys() == {"fine", "spilling", "excused", "large"}, output
    assert status == 1
    assert by_case["fine"]["fault"] == ""
    assert by_case["fine"]["registers"] > 0
    assert by_case["fine"]["grid"] == "1"
    assert by_case["large"]["grid"] == "8"
    assert "SIZE=1024" in by_case["fine"]["constants"]
    assert 0 < by_case["fine"]["loop_instructions"] < by_case["fine"]["instructions"]
    assert by_case["fine"]["loop_barriers"] == 0  # one warp
    assert by_case["large"]["loop_barriers"] > 0  # eight, which hand tiles to each other
    assert "spills" in by_case["spilling"]["fault"]
    assert by_case["excused"]["fault"] == ""
    assert by_case["excused"]["spill_bytes"] == by_case["spilling"]["spill_bytes"]
    assert "shared memory" in by_case["large"]["fault"]
    assert by_case["spilling"]["fault"] in output


def test_fault_of_shared_memory_has_no_excuse():
    row = Compiled("c", "k", "", "1", 4, 3, 255, 0, 0, SM90_SHARED_BYTES + 1, 9, 0, 0, "", "excuse")
    assert "shared memory" in row.fault


def test_the_stack_needs_an_excuse():
    row = Compiled("c", "k", "", "1", 4, 3, 40, 32, 0, 0, 9, 0, 0, "", "")
    assert "32 bytes on the stack" in row.fault
    assert replace(row, reason="excuse").fault == ""


def test_serialized_products_have_no_excuse():
    said = (
        "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non "
        "wgmma instructions in the function 'k'\nptxas info    : Used 40 registers"
    )
    warning = read_warning(said)
    assert warning == "wgmma.mma_async instructions are serialized due to non wgmma instructions"
    assert read_warning("ptxas info    : Used 40 registers") == ""
    row = Compiled("c", "k", "", "1", 4, 3, 40, 0, 0, 0, 9, 0, 0, warning, "excuse")
    assert "serialized" in row.fault


LISTING = """
_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   FADD R1, R1, R2 ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   FADD R1, R1, R2 ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/              @!P1 BRA `(.L_x_2) ;
.L_x_3:
        /*0060*/              @!P2 BRA `(.L_x_1) ;
        /*0070*/               @P3 EXIT ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   NOP;
        /*00a0*/                   BRA `(.L_x_3) ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4);
"""


def test_instructions_are_counted_in_a_listing():
    assert count_instructions(LISTING) == Instructions(total=12, loop=4, barriers=1)
    conditional = LISTING.replace("/*0080*/                   EXIT", "/*0080*/              @!P3 EXIT")
    assert count_instructions(conditional) == count_instructions(LISTING)
    with pytest.raises(ValueError, match="no EXIT"):
        count_instructions("nothing")


def test_ptxas_without_figures_is_an_error():
    said = "0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\nUsed 40 registers, used 1 barriers"
    assert read_ptxas(said) == (40, 0, 20)
    with pytest.raises(RuntimeError, match="ptxas"):
        read_ptxas("nothing")
