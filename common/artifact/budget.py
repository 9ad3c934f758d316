"""Where the bytes of an artifact go, and whether they fit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import ArtifactError

# Code plus compressed weights, decimal megabytes: the rule of the parameter-golf challenge.
CHALLENGE_BUDGET_BYTES = 16_000_000


@dataclass(frozen=True)
class TensorSize:
    """Bytes of one tensor in the file.

    Args:
        name: of the tensor.
        shape: of the tensor.
        grid: label of its grid (GridSpec.label).
        n_weights: number of elements.
        code_bytes: its share of the compressed stream that its codes are in.
        scale_bytes: its share of the compressed stream that its scales are in.
    """

    name: str
    shape: tuple[int, ...]
    grid: str
    n_weights: int
    code_bytes: int
    scale_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.code_bytes + self.scale_bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total_bytes / self.n_weights if self.n_weights else 0.0


@dataclass(frozen=True)
class StreamSize:
    """One compressed stream: its layout and codec, its size before and after."""

    layout: str
    codec: str
    raw_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class SizeReport:
    """Every byte of an artifact, once.

    Args:
        file_bytes: size of the file.
        frame_bytes: fixed prefix and checksum.
        header_bytes: names, shapes, grids, stream table and meta, as stored.
        tensors: bytes of each tensor. A stream shared by several tensors is divided by the entropy of what each put
            in, in whole bytes, so that the parts add up to file_bytes exactly.
        streams: the same bytes as tensors, by stream.
    """

    file_bytes: int
    frame_bytes: int
    header_bytes: int
    tensors: tuple[TensorSize, ...]
    streams: tuple[StreamSize, ...]

    def __post_init__(self) -> None:
        in_tensors = sum(tensor.total_bytes for tensor in self.tensors)
        in_streams = sum(stream.stored_bytes for stream in self.streams)
        assert in_tensors == in_streams == self.file_bytes - self.overhead_bytes, "a byte is counted twice or never"

    @property
    def overhead_bytes(self) -> int:
        return self.frame_bytes + self.header_bytes

    @property
    def n_weights(self) -> int:
        return sum(tensor.n_weights for tensor in self.tensors)


def apportion_bytes(total_bytes: int, weights: Sequence[int]) -> list[int]:
    """Divide a number of bytes in proportion to weights, in whole bytes that add up exactly (largest remainders)."""
    sum_weights = sum(weights)
    if not weights or sum_weights == 0:
        weights = [1] * len(weights)
        sum_weights = len(weights)
    if not weights:
        assert total_bytes == 0, "bytes without an owner"
        return []
    shares = [total_bytes * weight // sum_weights for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda index: (-(total_bytes * weights[index] % sum_weights), index))
    for index in by_remainder[: total_bytes - sum(shares)]:
        shares[index] += 1
    return shares


def check_budget(total_bytes: int, budget_bytes: int = CHALLENGE_BUDGET_BYTES) -> None:
    """Refuse a total over the budget.

    Raises:
        ArtifactError: total_bytes exceeds budget_bytes, if only by one.
    """
    if total_bytes > budget_bytes:
        raise ArtifactError(
            f"{total_bytes:,} bytes are {total_bytes - budget_bytes:,} over the budget of {budget_bytes:,}: "
            "use coarser grids or a smaller model"
        )


def format_text_table(rows: Sequence[Sequence[str]], left_columns: int) -> str:
    """Rows of cells as aligned text; the first left_columns columns are set left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < left_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def tensor_group(name: str) -> str:
    """A tensor's name with its numbers starred: one group for the same place of all layers ("blocks.*.up.weight")."""
    return re.sub(r"(?<![^._/])\d+(?![^._/])", "*", name)


def format_size_table(
    report: SizeReport, code_bytes: int | None = None, budget_bytes: int | None = CHALLENGE_BUDGET_BYTES
) -> str:
    """Table of an artifact's bytes: one line a group of tensors, then overhead, code, total and margin.

    Args:
        report: what save_artifact or read_artifact gave.
        code_bytes: size of the code that is counted with it; None leaves its line out.
        budget_bytes: to compare the total with; None leaves the margin out.
    """
    groups: dict[tuple[str, str], list[TensorSize]] = {}
    for tensor in report.tensors:
        groups.setdefault((tensor_group(tensor.name), tensor.grid), []).append(tensor)
    rows = [["tensors", "grid", "count", "weights", "bits/weight", "bytes"]]
    for (group, grid), members in groups.items():
        n_weights = sum(member.n_weights for member in members)
        n_bytes = sum(member.total_bytes for member in members)
        bits = f"{8 * n_bytes / n_weights:.3f}" if n_weights else "-"
        rows.append([group, grid, str(len(members)), f"{n_weights:,}", bits, f"{n_bytes:,}"])
    overall_bits = f"{8 * report.file_bytes / report.n_weights:.3f}" if report.n_weights else "-"
    rows.append(["header, checksum", "", "", "", "", f"{report.overhead_bytes:,}"])
    rows.append(
        ["artifact", "", str(len(report.tensors)), f"{report.n_weights:,}", overall_bits, f"{report.file_bytes:,}"]
    )
    total_bytes = report.file_bytes
    if code_bytes is not None:
        total_bytes += code_bytes
        rows.append(["code", "", "", "", "", f"{code_bytes:,}"])
        rows.append(["total", "", "", "", "", f"{total_bytes:,}"])
    if budget_bytes is not None:
        rows.append(["budget", "", "", "", "", f"{budget_bytes:,}"])
        rows.append(["margin", "", "", "", "", f"{budget_bytes - total_bytes:,}"])
    return format_text_table(rows, left_columns=2)
