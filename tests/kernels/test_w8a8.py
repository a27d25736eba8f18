"""Products of 8-bit activations and weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compressor.kernels import ops, reference

Guard = Callable[[Tensor], Tensor]


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(("biased", "static"), [(False, False), (True, False), (True, True)])
def test_int8(
    device: torch.device,
    guarded: Guard,
    close: Callable[..., None],
    tokens: int,
    biased: bool,
    static: bool,
    dtype: torch.dtype,
) -> None:
    met = torch.tensor([0.02]) if static else None
    rows, columns = 48, 96
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, tokens, columns, generator=generator).to(dtype)
    codes = torch.randint(-127, 128, (rows, columns), generator=generator).to(torch.int8)
    scales, bias = torch.rand(rows, generator=generator), 30 * torch.randn(rows, generator=generator).to(dtype)
    inputs, factors = reference.quantize_rows(x.flatten(0, 1), torch.int8, met)
    exact = (inputs.double() * factors.double()[:, None]) @ (codes.double() * scales.double()[:, None]).T
    arguments = (
        guarded(x),
        guarded(codes),
        guarded(scales),
        guarded(bias) if biased else None,
        None if met is None else guarded(met),
    )
    result = ops.quantized_rows_linear(*arguments)
    close(result, (exact + bias.double() if biased else exact).view(2, tokens, rows), "int8")
    torch.library.opcheck(
        torch.ops.compressor.quantized_rows_linear.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("static", [False, True])
def test_fp8(device: torch.device, guarded: Guard, close: Callable[..., None], static: bool) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("a GPU without fp8, or none")
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(size, 256, generator=generator).bfloat16() for size in (20, 64))
    met = torch.tensor([0.01]) if static else None
    (inputs, factors), (codes, scales) = (
        reference.quantize_rows(part, torch.float8_e4m3fn, scale) for part, scale in ((x, met), (weight, None))
    )
    exact = (inputs.double() * factors.double()[:, None]) @ (codes.double() * scales.double()[:, None]).T
    result = ops.quantized_rows_linear(
        guarded(x), codes.to(device), guarded(scales), None, None if met is None else guarded(met)
    )
    close(result, exact, "fp8")
