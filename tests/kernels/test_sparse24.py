"""2:4 sparse products, on their own and between block-diagonal ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compressor.kernels import dispatch, layouts, ops, reference, swizzles

Guard = Callable[[Tensor], Tensor]


def sparse(rows: int, columns: int, bits: int, group: int, dtype: torch.dtype) -> tuple[swizzles.SparseWords, Tensor]:
    """A weight in the kernels' layout, and dense in float64."""
    generator = torch.Generator().manual_seed(rows + columns + bits)
    keep = torch.rand(rows, columns // 4, 4, generator=generator).argsort(2).argsort(2) < 2
    dense = torch.randn(rows, columns, generator=generator).to(dtype)
    values, indices = layouts.compress24(dense, keep.view(rows, columns))
    if bits == 16:
        words = swizzles.swizzle_sparse24(values, indices, None, None, 16, 0, dtype)
        return words, layouts.expand24(values, indices).double()
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, values.shape, generator=generator).to(torch.int8)
    scales = (torch.rand(rows, -(-columns // 2 // group), generator=generator) - 0.3).to(dtype)
    zeros = torch.randint(-half, half, scales.shape, generator=generator).to(torch.int8)
    words = swizzles.swizzle_sparse24(codes, indices, scales, zeros, bits, group, dtype)
    return words, layouts.expand24(reference.dequantize_int(codes, scales, zeros, group, dtype), indices).double()


def on(guarded: Guard, words: swizzles.SparseWords) -> swizzles.SparseWords:
    return words._replace(values=guarded(words.values), kept=guarded(words.kept), pairs=guarded(words.pairs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
@pytest.mark.parametrize(("bits", "group"), [(16, 0), (4, 64), (4, 32), (3, 256), (8, 64), (5, 32)])
@pytest.mark.parametrize(("rows", "columns"), [(72, 512), (40, 192), (64, 384)])
def test_every_value_and_shape(
    device: torch.device, guarded: Guard, close: Callable[..., None], rows: int, columns: int, bits: int, group: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    words, dense = sparse(rows, columns, bits, group, dtype)
    for kernel, splits, tokens in (("gemm", 1, 3), ("gemm", 2, 17), ("expand", 1, 3)):
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
        launch = dispatch.Launch(kernel, dispatch.Tile(16, 64, 4, 2), splits)
        planes = ops.four_planes(guarded(x), None, None)
        result = ops.run_sparse_linear(launch, planes, on(guarded, words), rows)
        close(result, x.double() @ dense.T, f"{kernel} {tokens}")


def blocks(size: int, block: int, codes: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    """Diagonal blocks as stored, their scales, and as the twin takes them."""
    generator = torch.Generator().manual_seed(size + block)
    plain = (torch.randn(size, block, generator=generator) / 4).to(dtype)
    if not codes:
        return plain, None, plain.double().view(-1, block, block)
    whole = torch.randint(-127, 128, (size, block), generator=generator).to(torch.int8)
    scales = (torch.rand(size, generator=generator) / 256).to(dtype)
    return whole, scales, (whole.double() * scales.double()[:, None]).view(-1, block, block)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(("block_a", "block_b"), [(16, 32), (64, 16), (128, 64)])
@pytest.mark.parametrize(("kernel", "splits"), [("gemm", 1), ("gemm", 2), ("expand", 1)])
def test_between_block_diagonals(
    device: torch.device, guarded: Guard, close: Callable[..., None], kernel: str, splits: int, block_a: int,
    block_b: int, codes: bool,
) -> None:  # fmt: skip
    dtype, rows, columns, tokens = torch.float16, 128, 512, 5
    words, dense = sparse(rows, columns, 4, 64, dtype)
    a, a_scales, left = blocks(rows, block_a, codes, dtype)
    b, b_scales, right = blocks(columns, block_b, codes, dtype)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    bias, up = (10 * torch.randn(rows, *tail, generator=generator).to(dtype) for tail in ((), (16,)))
    down = torch.randn(tokens, 16, generator=generator).to(dtype)
    planes = ops.four_planes(guarded(x), guarded(b), None if b_scales is None else guarded(b_scales))
    z = reference.block_diagonal(x.double(), right).to(dtype)  # as it is handed on
    close(planes, z.view(tokens, -1, 4).permute(2, 0, 1).double(), "planes")
    launch = dispatch.Launch(kernel, dispatch.Tile(16, 64, 4, 2), splits)
    result = ops.run_sparse_linear(
        launch, planes, on(guarded, words), rows, guarded(a), None if a_scales is None else guarded(a_scales),
        guarded(bias), guarded(up), guarded(down),
    )  # fmt: skip
    exact = reference.block_diagonal(z.double() @ dense.T, left) + bias.double() + down.double() @ up.double().T
    close(result, exact, kernel)


def test_the_operator(device: torch.device, close: Callable[..., None]) -> None:
    words, dense = sparse(64, 256, 16, 0, torch.bfloat16)
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    values, kept, pairs, bits, group, width = words
    arguments = (x.to(device), values.to(device), kept.to(device), pairs.to(device), 64, bits, group, width)
    close(ops.sparse_linear(*arguments), x.double() @ dense.T, "operator")
    torch.library.opcheck(
        torch.ops.compressor.sparse_linear.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
