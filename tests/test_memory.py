"""Peak memory against what the plan promised."""

from __future__ import annotations

import pytest
from pico import benchmark

memory = benchmark("memory")


@pytest.mark.parametrize(
    "case",
    [
        "both ends",
        "both ends, gptq",
        "hidden 1024, rtn",
        *(
            pytest.param(case, marks=pytest.mark.long)
            for case in (
                "hidden 512",
                "32 experts",
                "hidden 1024, lorc",
                "turned",
                "hidden 1024, stored in fp8, one layer kept",
                "hidden 1024, rtn, tuned",
            )
        ),
    ],
)
def test_peak_memory_is_within_a_tenth_of_the_plan(case: str) -> None:
    predicted, measured, base, _ = memory.measure(case)
    assert predicted + base == pytest.approx(measured + base, rel=0.1)
