"""Catalogue entries of `sigreg`."""

from __future__ import annotations

from scripts.bench.catalogue import OpCase

CASES: list[OpCase] = []
