"""Catalogue entries of `causal_conv1d`."""

from __future__ import annotations

from scripts.bench.catalogue import OpCase

CASES: list[OpCase] = []
