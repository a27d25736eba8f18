"""Kernels compiled for GPUs that are not here: no spills, memory that fits, matrix instructions.

One width of codes for every tile that dispatch can ask for; `benchmarks/aot.py` has all of them. Compilers take long:
`make test` compiles for Hopper, `.ci/run` for the others too.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from pico import benchmark

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("a process either interprets or compiles", allow_module_level=True)
aot = benchmark("aot")


def elsewhere(*values: object) -> Any:
    """A case that takes its time and differs in the target alone."""
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize("target", [elsewhere("sm_80"), "sm_90"])
def test_products_with_integers(target: str) -> None:
    for case in aot.group_cases(target, 4, 128, torch.bfloat16):
        found = aot.check(case, target)
        assert found.instructions["I2F"] <= 3, case.name  # decoding converts no integers; divisions of sizes may


@pytest.mark.parametrize(
    ("target", "bits", "group"), [elsewhere("sm_80", 4, 32), ("sm_90", 4, 16), elsewhere("sm_90", 8, 128)]
)
def test_products_with_floats(target: str, bits: int, group: int) -> None:
    for case in aot.group_cases(target, bits, group, torch.bfloat16, floats=True):
        found = aot.check(case, target)
        assert found.instructions["I2F"] <= 3, case.name


@pytest.mark.parametrize(("target", "bits"), [elsewhere("sm_80", 16), elsewhere("sm_89", 16), ("sm_90", 4)])
def test_products_with_sparse_weights(target: str, bits: int) -> None:
    for case in aot.sparse_cases(target, bits, 32, torch.bfloat16):
        aot.check(case, target)


@pytest.mark.parametrize("target", [elsewhere("sm_80"), elsewhere("sm_89"), "sm_90"])
@pytest.mark.parametrize("codes", [False, True])
def test_attention_over_latents(target: str, codes: bool) -> None:
    for case in aot.attention_cases(target, codes, torch.bfloat16):
        aot.check(case, target)


@pytest.mark.long
@pytest.mark.parametrize("bits", [4, 8])
def test_products_without_instructions_of_nvidia(bits: int) -> None:
    """Decoding by shifts, for AMD's GPUs."""
    for case in aot.group_cases("gfx942", bits, 128, torch.float16 if bits == 8 else torch.bfloat16):
        aot.check(case, "gfx942")


def test_what_follows_a_product() -> None:
    for case in aot.ending_cases("sm_90", torch.bfloat16):
        aot.check(case, "sm_90")


def test_a_single_token_is_a_constant() -> None:
    case = next(iter(aot.group_cases("sm_90", 4, 128, torch.bfloat16)))
    aot.check(case._replace(constants={**case.constants, "M": 1}), "sm_90")


def test_the_gate_can_fail() -> None:
    case = next(iter(aot.group_cases("sm_80", 4, 128, torch.bfloat16)))
    with pytest.raises(AssertionError, match="spills"):
        aot.check(case._replace(constants={**case.constants, "BM": 128, "BN": 128}, stages=12), "sm_80")
    gemv = next(case for case in aot.group_cases("sm_80", 4, 128, torch.bfloat16) if not case.matrix)
    with pytest.raises(AssertionError, match="no matrix instruction"):
        aot.check(gemv._replace(matrix=True), "sm_80")
