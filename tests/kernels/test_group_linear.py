"""Group-quantized products: every width, group, shape and path, with what follows them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compressor.kernels import dispatch, ops, reference, swizzles
from compressor.kernels.numbers import E2M1, E4M3

Guard = Callable[[Tensor], Tensor]


def weights(rows: int, columns: int, bits: int, group: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows + columns + bits)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)
    groups = -(-columns // group)
    scales = (torch.rand(rows, groups, generator=generator) - 0.3).to(dtype)
    zeros = torch.randint(-half, half, (rows, groups), generator=generator).to(torch.int8)
    return (codes, scales) if symmetric else (codes, scales, zeros)


def twin(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int, dtype: torch.dtype) -> Tensor:
    weight = reference.dequantize_int(codes, scales, zeros, group, dtype)  # rounded once, as a kernel may
    return x.double() @ weight.double().T


def stored(guarded: Guard, parts: tuple[Tensor, ...], bits: int, group: int, dtype: torch.dtype) -> swizzles.GroupWords:
    codes, scales, *zeros = parts
    words = swizzles.swizzle_int(codes, scales, zeros[0] if zeros else None, bits, group, dtype)
    high = None if words.high is None else guarded(words.high)
    return words._replace(words=guarded(words.words), high=high, pairs=guarded(words.pairs))


@pytest.mark.parametrize(
    ("symmetric", "dtype"),
    [
        (True, torch.bfloat16),
        (False, torch.float16),
        pytest.param(False, torch.bfloat16, marks=pytest.mark.long),
        pytest.param(True, torch.float16, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("kernel", "splits"), [("gemm", 1), ("gemm", 2), ("gemv", 2), ("expand", 1)])
def test_every_width_and_path(
    device: torch.device, guarded: Guard, close: Callable[..., None], kernel: str, splits: int, bits: int,
    symmetric: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    rows, columns, group, tokens = 72, 256, 128, 1 if kernel == "gemv" else 5
    parts = weights(rows, columns, bits, group, symmetric, dtype)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    launch = dispatch.Launch(kernel, dispatch.Tile(16, 64, 4, 2), splits)
    result = ops.run_group_linear(launch, guarded(x), stored(guarded, parts, bits, group, dtype), rows)
    assert result.dtype == dtype
    close(result, twin(x, parts[0], parts[1], parts[2] if len(parts) > 2 else None, group, dtype), kernel)


@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(40, 160, 32), (64, 200, 64), (130, 96, 96), (33, 288, 128), (40, 176, 16)]
)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_ragged_shapes_and_groups(
    device: torch.device, guarded: Guard, close: Callable[..., None], rows: int, columns: int, group: int, bits: int
) -> None:
    dtype = torch.float16
    parts = weights(rows, columns, bits, group, False, dtype)
    weight = stored(guarded, parts, bits, group, dtype)
    for tokens, kernel in ((1, "gemv"), (3, "gemm"), (17, "gemm"), (2, "expand")):
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
        launch = dispatch.Launch(kernel, dispatch.Tile(16, 64, 4, 2), 1)
        result = ops.run_group_linear(launch, guarded(x), weight, rows)
        close(result, twin(x, *parts, group, dtype), f"{kernel} {tokens}")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "group"), [(176, 16), (200, 32), (160, 128), (96, 96)])
def test_floats_of_every_pattern(
    device: torch.device, guarded: Guard, close: Callable[..., None], columns: int, group: int, bits: int
) -> None:
    """All the bits that a number has, the smallest ones and both zeros among them; scales as far apart as E4M3's."""
    rows, generator = 72, torch.Generator().manual_seed(columns + bits)
    codes = torch.arange(rows * columns).view(rows, columns).remainder(2**bits).to(torch.uint8)
    if bits == 8:
        codes[codes & 127 == 127] = 0  # not a number
    groups = -(-columns // group)
    scales = torch.exp2(torch.randint(-20, -2, (rows, groups), generator=generator).float())
    if group != 32:
        scales *= 1 + torch.randint(0, 8, (rows, groups), generator=generator) / 8  # so that products are exact
    scales[5, 0] = 0
    weight = swizzles.swizzle_floats(codes, scales, bits, group)
    assert weight is not None
    weight = weight._replace(words=guarded(weight.words), pairs=guarded(weight.pairs))
    numbers = (E2M1 if bits == 4 else E4M3).of_bytes(codes, torch.float64)
    dense = numbers * reference.expand_groups(scales.double(), columns, group)
    for tokens, kernel, splits in ((3, "gemm", 1), (17, "gemm", 2)):
        x = torch.randn(tokens, columns, generator=generator).to(torch.bfloat16)
        launch = dispatch.Launch(kernel, dispatch.Tile(16, 64, 4, 2), splits)
        result = ops.run_group_linear(launch, guarded(x), weight, rows)
        close(result, x.double() @ dense.T, f"{kernel} {tokens}")
    unit = torch.eye(columns, dtype=torch.bfloat16)
    launch = dispatch.Launch("expand", dispatch.Tile(16, 64, 4, 2), 1)
    assert torch.equal(ops.run_group_linear(launch, guarded(unit), weight, rows).double().cpu().T, dense)


def has_room(codes: Tensor, scales: Tensor, bits: int, group: int) -> bool:
    return swizzles.swizzle_floats(codes, scales, bits, group) is not None


def test_what_the_layout_has_no_room_for() -> None:
    codes = torch.zeros(8, 64, dtype=torch.uint8)

    def scales(group: int, first: float) -> Tensor:
        found = torch.full((8, 64 // group), 0.25)
        found[3, 0] = first
        return found

    for bits, group, first in ((4, 16, 2.0**-20), (4, 16, 0.0), (4, 32, 2.0**-100), (8, 32, 0.0), (8, 64, -0.3125)):
        assert has_room(codes, scales(group, first), bits, group)
    too_far, negative, five_digits, subnormal = 2.0**-40, -0.25, 1.0625, 2.0**-130
    for bits, group, first in (
        (4, 16, too_far), (4, 16, negative), (4, 16, five_digits), (4, 32, 1.5), (4, 32, 4.0), (8, 64, 256.0),
        (8, 64, 1 + 2.0**-9), (8, 64, subnormal),
    ):  # fmt: skip
        assert not has_room(codes, scales(group, first), bits, group), (bits, group, first)
    codes[5, 7] = 0x7F
    assert has_room(codes & 15, scales(16, 0.25), 4, 16)
    assert not has_room(codes, scales(32, 0.25), 8, 32)  # not a number


@pytest.mark.parametrize(("kernel", "splits"), [("gemm", 1), ("gemm", 3), ("expand", 1)])
def test_bias_and_residual(
    device: torch.device, guarded: Guard, close: Callable[..., None], kernel: str, splits: int
) -> None:
    dtype, rows, columns, rank = torch.bfloat16, 72, 384, 24
    parts = weights(rows, columns, 4, 128, True, dtype)
    generator = torch.Generator().manual_seed(3)
    x, bias = torch.randn(6, columns, generator=generator).to(dtype), torch.randn(rows, generator=generator).to(dtype)
    up = torch.randn(rows, rank, generator=generator).to(dtype)
    down = (10 * torch.randn(6, rank, generator=generator)).to(dtype)
    launch = dispatch.Launch(kernel, dispatch.Tile(16, 64, 4, 2), splits)
    weight = stored(guarded, parts, 4, 128, dtype)
    result = ops.run_group_linear(launch, guarded(x), weight, rows, guarded(bias), guarded(up), guarded(down))
    exact = twin(x, *parts, None, 128, dtype) + bias.double() + down.double() @ up.double().T
    close(result, exact, kernel)


def test_operators_run_where_their_inputs_are(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the device that happens to be the current one."""
    entered = []

    def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
        entered.append(tensor)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    parts = weights(64, 128, 4, 64, True, torch.float16)
    words, high, pairs, bits, group, *_ = swizzles.swizzle_int(*parts, None, 4, 64, torch.float16)
    x = torch.ones(3, 128, dtype=torch.float16, device=device)
    ops.group_linear(x, words.to(device), high, pairs.to(device), 64, bits, group, False, 0)
    assert [one.data_ptr() for one in entered] == [x.data_ptr()]


def test_the_operator(device: torch.device, close: Callable[..., None]) -> None:
    dtype, rows, columns = torch.bfloat16, 64, 128
    parts = weights(rows, columns, 4, 64, True, dtype)
    words, high, pairs, bits, group, *_ = swizzles.swizzle_int(*parts, None, 4, 64, dtype)
    x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(4)).to(dtype)
    arguments = (x.to(device), words.to(device), high, pairs.to(device), rows, bits, group, False, 0)
    result = ops.group_linear(*arguments)
    close(result, twin(x, *parts, None, 64, dtype), "operator")
    torch.library.opcheck(
        torch.ops.compressor.group_linear.default, arguments, test_utils=("test_schema", "test_faketensor")
    )

    def inside(x: Tensor) -> Tensor:
        return 2 * ops.group_linear(x + 1, *arguments[1:])

    assert torch.equal(torch.compile(inside, backend="aot_eager", fullgraph=True)(arguments[0]), inside(arguments[0]))
