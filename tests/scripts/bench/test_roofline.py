"""The least times in the READMEs are those of the catalogue."""

from __future__ import annotations

import pytest

from scripts.bench import roofline
from scripts.bench.catalogue import OPERATIONS, Work


@pytest.mark.parametrize("operation", OPERATIONS)
def test_readmes_are_up_to_date(operation):
    text = roofline.readme_of(operation).read_text(encoding="utf-8")
    assert roofline.with_table(text, operation) == text, "run `python scripts/bench roofline --write`"


def test_a_readme_without_markers_is_named():
    with pytest.raises(ValueError, match=r"ssd/README\.md lacks"):
        roofline.with_table("# no markers\n", "ssd")


def test_a_pass_is_bound_by_the_slower_of_both():
    limits = {"copy_bytes_per_s": 10.0, "bfloat16_flops_per_s": 100.0}
    assert roofline.bound(Work(bytes=10, flops=99), limits) == "memory"
    assert roofline.bound(Work(bytes=10, flops=101), limits) == "products"
