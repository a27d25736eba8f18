"""Operators: what is stored comes back, plans on `meta` tell the truth, arithmetic equals float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.compress.passes.linear.gptq import Gptq
from compressor.compress.passes.linear.rtn import Rtn
from compressor.compress.solvers.grid import Steps, range_grid
from compressor.kernels import cpu, dispatch
from compressor.kernels.layouts import pack_codes
from compressor.kernels.numbers import Rounding
from compressor.runtime.schemes import (
    Dense,
    IntLinear,
    IntQuantized,
    LowRank,
    Operator,
    Sparse24,
    WithResidual,
    bits_per_weight,
    from_tensors,
    identical,
    stored_linear,
)


def make(rows: int, columns: int, bits: int, group_size: int, symmetric: bool) -> IntQuantized:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    grid = range_grid(weight, Rounding.integers(bits, group_size, symmetric), Steps(torch.bfloat16))
    operator = Rtn(kind="rtn").quantized(grid.codes(weight).to(torch.int8), grid, Dense(weight))
    assert isinstance(operator, IntQuantized)
    return operator


def stored_bytes(operator: Operator) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in operator.to_tensors().values())


def module(operator: IntQuantized, dtype: torch.dtype, bias: torch.Tensor | None = None) -> IntLinear:
    linear = stored_linear(operator.to_tensors(), operator.scheme(), bias, dtype)
    assert isinstance(linear, IntLinear)
    return linear


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 20), columns=st.integers(1, 90), bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group_size=st.sampled_from([16, 32, -1]), symmetric=st.booleans(),
)  # fmt: skip
def test_round_trip_and_plan(rows: int, columns: int, bits: int, group_size: int, symmetric: bool) -> None:
    operator = make(rows, columns, bits, group_size if group_size <= columns else -1, symmetric)
    again = from_tensors(operator.to_tensors(), operator.scheme())
    assert isinstance(again, IntQuantized)
    assert torch.equal(again.dense(torch.float64), operator.dense(torch.float64))
    assert identical(again, operator)
    again.codes[-1, -1] ^= 1
    assert not identical(again, operator)
    step = Gptq(kind="gptq", bits=bits, group_size=group_size, symmetric=symmetric)
    planned = step.plan("x", Dense(torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")), {})
    assert planned.nbytes == operator.nbytes == stored_bytes(operator)
    assert {k: (t.shape, t.dtype) for k, t in planned.to_tensors().items()} == {
        k: (t.shape, t.dtype) for k, t in operator.to_tensors().items()
    }


def test_bits_per_weight_counts_the_stored_bytes() -> None:
    operator = make(64, 256, 4, 128, symmetric=False)
    assert bits_per_weight(operator) * 64 * 256 / 8 == stored_bytes(operator)


def test_scales_are_found_and_replaced_wherever_they_are() -> None:
    core, up, down = (make(rows, columns, 4, 16, symmetric=True) for rows, columns in ((8, 32), (8, 4), (4, 32)))
    whole = WithResidual(core, LowRank(up, down))
    found = whole.multipliers()
    assert found.keys() == {"base.scales", "residual.up.scales", "residual.down.scales"}
    assert identical(whole.multiplied(found), whole)
    assert not Dense(torch.ones(2, 2)).multipliers()
    changed = whole.multiplied(found | {"residual.up.scales": 2 * found["residual.up.scales"]})
    expected = core.dense(torch.float64) + 2 * up.dense(torch.float64) @ down.dense(torch.float64)
    torch.testing.assert_close(changed.dense(torch.float64), expected)


def test_dense_is_the_definition() -> None:
    operator = make(6, 40, 4, 16, symmetric=False)
    assert operator.zeros is not None
    for row in range(6):
        for column in range(40):
            group = column // 16
            code, zero = int(operator.codes[row, column]), int(operator.zeros[row, group])
            assert float(operator.dense(torch.float64)[row, column]) == (code - zero) * float(
                operator.scales[row, group]
            )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "rows", "columns", "group_size"),
    [(4, 48, 256, 32), (4, 50, 256, 64), (4, 48, 172, 128), (4, 33, 300, -1), (4, 48, 192, 16), (3, 48, 256, 128),
     (2, 20, 96, 96), (3, 16, 100, 40)],
)  # fmt: skip
def test_native_int4_kernel_agrees_with_the_reference(
    bits: int, rows: int, columns: int, group_size: int, symmetric: bool
) -> None:
    operator = make(rows, columns, bits, group_size, symmetric=symmetric)
    linear = module(operator, torch.bfloat16, torch.randn(rows))
    x = (torch.randn(3, 5, columns) + 0.5).to(torch.bfloat16)  # a mean, in which errors of zero points add up
    exact = x.double() @ operator.dense(torch.float64).T
    native = cpu.pack_int4(operator.codes, operator.scales, operator.zeros, operator.span)
    found = cpu.linear_int4(x, native).double()
    assert (found - exact).norm() / exact.norm() < 4e-3  # bf16 output
    whole = linear(x).double()
    assert linear.bias is not None
    assert (whole - exact - linear.bias.double()).norm() / exact.norm() < 6e-3


@pytest.mark.parametrize("fast", [False, True])
def test_prompts_take_the_native_kernel_where_bf16_is_slow(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "cpu_capability", lambda: dispatch.CpuCapability(fast, fast, fast))
    operator = make(48, 256, 4, 64, symmetric=True)
    linear, before = module(operator, torch.bfloat16), len(cpu._native_int4)
    x = torch.randn(70, 256).to(torch.bfloat16)
    found, exact = linear(x).double(), x.double() @ operator.dense(torch.float64).T
    assert (found - exact).norm() / exact.norm() < 6e-3
    assert len(cpu._native_int4) == before + (not fast)


def test_the_native_copy_is_made_on_demand_and_dies_with_its_weight() -> None:
    """A model that is saved, or moved to another device, carries none along."""
    linear = module(make(48, 256, 4, 64, symmetric=True), torch.bfloat16)
    x, before = torch.randn(3, 256).to(torch.bfloat16), len(cpu._native_int4)
    assert len(pickle.dumps(linear)) < 48 * 256
    expected = linear(x)
    assert len(cpu._native_int4) == before + 1
    assert len(pickle.dumps(linear)) < 48 * 256
    again = copy.deepcopy(linear)
    assert torch.equal(again(x), expected)
    assert torch.equal(linear.float()(x), expected)
    assert len(cpu._native_int4) == before + 2
    linear.to("meta")
    assert len(cpu._native_int4) == before + 1
    del again
    assert len(cpu._native_int4) == before


def test_values_of_a_sparse_weight_have_no_native_copy() -> None:
    values = make(96, 512, 4, 64, symmetric=True)
    operator = Sparse24(values, torch.full((96, 256), 0 | 1 << 2, dtype=torch.uint8))
    linear = stored_linear(operator.to_tensors(), operator.scheme(), None, torch.bfloat16)
    before = len(cpu._native_int4)
    linear(torch.randn(3, 1024).to(torch.bfloat16))
    assert len(cpu._native_int4) == before
    assert len(pickle.dumps(linear)) < 96 * 1024 / 2


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [0, 1, 3, 70])
def test_inputs_need_not_be_contiguous(bits: int, tokens: int) -> None:
    linear = module(make(48, 256, bits, 64, symmetric=True), torch.bfloat16, None)
    hidden = torch.randn(tokens, 7, 256).to(torch.bfloat16)
    for x in (hidden[:, -1], hidden[:, -1:], torch.randn(tokens, 512).to(torch.bfloat16)[:, ::2]):
        assert torch.equal(linear(x), linear(x.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 70])
def test_inputs_have_derivatives(bits: int, tokens: int) -> None:
    """As adapters that are trained in front of a compressed linear need them."""
    operator = make(48, 128, bits, 32, symmetric=False)
    x = torch.randn(tokens, 128, dtype=torch.bfloat16, requires_grad=True)
    module(operator, torch.bfloat16)(x).sum().backward()
    assert x.grad is not None
    exact = operator.dense(torch.float64).sum(0).expand(tokens, -1)
    assert (x.grad.double() - exact).norm() / exact.norm() < 8e-3


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 16), (3, 64), (4, 128), (5, 32), (8, 64)])
def test_decoding_is_exact_in_bfloat16(bits: int, group_size: int, symmetric: bool) -> None:
    operator = make(20, 256, bits, group_size, symmetric=symmetric)
    scratch: cpu.Scratch = {}
    for rows in (slice(0, 12), slice(12, 20)):  # the second in the room of the first
        packed = pack_codes(operator.codes[rows], bits)
        zeros = None if operator.zeros is None else operator.zeros[rows]
        found = cpu.decode_packed(packed, operator.scales[rows], zeros, bits, 256, group_size, torch.bfloat16, scratch)
        assert torch.equal(found, operator.dense(torch.bfloat16)[rows])


@pytest.mark.parametrize(
    ("bits", "columns", "group_size"),
    [(4, 172, 128), (3, 96, 32), (8, 64, -1), (4, 96, 32), (4, 160, 64), (2, 96, 64)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_forward_agrees_with_float64(bits: int, columns: int, group_size: int, dtype: torch.dtype) -> None:
    operator = make(24, columns, bits, group_size, symmetric=bits != 3)
    x = torch.randn(200, columns).to(dtype)
    exact = x.double() @ operator.dense(torch.float64).T
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    for result in (operator.forward(x), module(operator, dtype)(x)):
        assert (result.double() - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize("tokens", [1, 64, 65, 700])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_batch_size_gives_the_same_answer(tokens: int, symmetric: bool) -> None:
    operator = make(560, 128, 4, 32, symmetric)  # more rows than a tile
    x = torch.randn(tokens, 128).to(torch.bfloat16)
    exact = x.double() @ operator.dense(torch.float64).T
    assert (module(operator, torch.bfloat16)(x).double() - exact).norm() / exact.norm() < 8e-3


def test_fast_decoding_rounds_like_the_reference() -> None:
    operator = make(70, 256, 4, 64, symmetric=True)
    packed = operator.to_tensors()["weight_packed"]
    decoded = cpu.decode_packed(packed, operator.scales, None, 4, 256, 64, torch.bfloat16)
    assert torch.equal(decoded, operator.dense(torch.bfloat16))
    assert torch.equal(
        module(operator, torch.bfloat16).decode(slice(None), torch.bfloat16), operator.dense(torch.bfloat16)
    )
