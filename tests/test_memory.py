"""Peak memory against what the plan promised."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "memory.py"
_spec = importlib.util.spec_from_file_location("memory_benchmark", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)


@pytest.mark.parametrize("case", ["hidden 512", "32 experts", "hidden 1024, rtn", "hidden 1024, lorc"])
def test_peak_memory_is_within_a_tenth_of_the_plan(case: str) -> None:
    predicted, measured, base, _ = benchmark.measure(case)
    assert predicted + base == pytest.approx(measured + base, rel=0.1)
