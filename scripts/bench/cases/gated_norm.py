"""Catalogue entries of `gated_norm`."""

from __future__ import annotations

from scripts.bench.catalogue import OpCase

CASES: list[OpCase] = []
