"""Catalogue entries of `fake_quantize`."""

from __future__ import annotations

from scripts.bench.catalogue import OpCase

CASES: list[OpCase] = []
