"""Catalogue entries of `ffn`."""

from __future__ import annotations

from scripts.bench.catalogue import OpCase

CASES: list[OpCase] = []
