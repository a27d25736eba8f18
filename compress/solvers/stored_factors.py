"""Small factors beside a large one, in the form they are stored in."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.numbers import Rounding
from ...runtime.schemes import Dense, IntQuantized, Operator
from .grid import Steps, range_grid

Stored = Dense | IntQuantized


def stored_rows(rows: Tensor, dtype: torch.dtype, bits: int) -> Stored:
    """A matrix `[rows, n]` as an operator (shapes only on `meta`).

    Args:
        dtype: of the floats, or of the scales.
        bits: 16 for floats, whatever their width; else those of codes with a scale a row.
    """
    if bits == 16:
        return Dense(rows.to(dtype) + 0)
    if rows.is_meta:
        scales = torch.empty(len(rows), 1, dtype=dtype, device="meta")
        return IntQuantized(torch.empty(rows.shape, dtype=torch.int8, device="meta"), scales, None, bits, -1)
    grid = range_grid(rows.float(), Rounding.integers(bits, -1), Steps(dtype))
    return IntQuantized(grid.codes(rows.float()).to(torch.int8), grid.scales.to(dtype), None, bits, -1)


def stored_blocks(blocks: Tensor, dtype: torch.dtype, bits: int) -> Stored:
    """Blocks `[count, b, b]` one below the other, as `stored_rows`."""
    return stored_rows(blocks.reshape(-1, blocks.shape[-1]), dtype, bits)


def as_blocks(operator: Operator) -> Tensor:
    """The inverse of `stored_blocks`, float32."""
    rows = operator.dense()
    return rows.view(-1, rows.shape[1], rows.shape[1])
