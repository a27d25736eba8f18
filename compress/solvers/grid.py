"""Integer grids: the scale and zero point of each group, and rounding to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.reference import expand_groups
from .numbers import Integers, Numbers


@dataclass(frozen=True)
class Grid:
    """The values each weight may take: `(code - zero) * scale`.

    Attributes:
        scales: `[rows, groups]`, rounded to what will be stored, any sign, never zero.
        zeros: `[rows, groups]` integers in the same dtype, or None when symmetric.
        numbers: what codes are.
        group_size: columns that share a scale, the last group may be ragged; -1 for one scale a row.
        stored: the dtype the scales are stored in.
    """

    scales: Tensor
    zeros: Tensor | None
    numbers: Numbers
    group_size: int
    stored: torch.dtype

    def columns(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero of every column: two `[rows, count]`."""
        size = group_span(self.group_size, count)
        zeros = None if self.zeros is None else expand_groups(self.zeros, count, size)
        return expand_groups(self.scales, count, size), zeros

    def rows(self, which: Tensor | slice) -> Grid:
        """The grid of some rows."""
        zeros = None if self.zeros is None else self.zeros[which]
        return Grid(self.scales[which], zeros, self.numbers, self.group_size, self.stored)

    @staticmethod
    def stacked(grids: Sequence[Grid]) -> Grid:
        """One grid of the rows of several, all alike but for scales and zeros."""
        first = grids[0]
        zeros = None if first.zeros is None else torch.cat([grid.zeros for grid in grids if grid.zeros is not None])
        return Grid(torch.cat([grid.scales for grid in grids]), zeros, first.numbers, first.group_size, first.stored)

    def where(self, keep: Tensor, other: Grid) -> Grid:
        """This grid in the rows to `keep`, another of the same kind elsewhere."""
        stacked = Grid.stacked([self, other])
        count = len(keep)
        return stacked.rows(torch.arange(count, device=keep.device) + torch.where(keep, 0, count))

    def with_scales(self, scales: Tensor) -> Grid:
        return Grid(storable(scales, self.stored), self.zeros, self.numbers, self.group_size, self.stored)

    def codes(self, weight: Tensor) -> Tensor:
        """Nearest codes of `[rows, columns]`, as floats."""
        scales, zeros = self.columns(weight.shape[1])
        return self.rounded(weight, scales, zeros)

    def rounded(self, weight: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Nearest codes of weights that have these scales and zeros, elementwise."""
        return self.numbers.nearest(torch.div(weight, scales), zeros)

    def values(self, codes: Tensor) -> Tensor:
        scales, zeros = self.columns(codes.shape[1])
        return codes * scales if zeros is None else (codes - zeros) * scales


def group_span(group_size: int, columns: int) -> int:
    """Columns that really share a scale: `group_size`, or the whole row for -1."""
    return group_size if group_size > 0 else columns


def by_group(matrix: Tensor, group_size: int) -> Tensor:
    """`[rows, columns]` → `[rows, groups, columns per group]`, a ragged last group filled up with zeros."""
    rows, columns = matrix.shape
    span = group_span(group_size, columns)
    return F.pad(matrix, (0, -columns % span)).view(rows, -1, span)


def storable(scales: Tensor, stored: torch.dtype) -> Tensor:
    """Scales as they will be read back: rounded to `stored`, and never zero there."""
    # float16's subnormals are scales like others; those of wider exponents are below what float32 can divide by.
    tiny = 2.0**-24 if stored == torch.float16 else torch.finfo(torch.float32).tiny
    rounded = scales.to(stored).to(scales.dtype)
    return torch.where(rounded.abs() < tiny, torch.full_like(rounded, tiny), rounded)


def range_grid(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, stored: torch.dtype, shrink: Tensor | float = 1.0
) -> Grid:
    """The grid that spans each group's range, times `shrink` (`[rows, groups]` or a number).

    Symmetric: full-range signed scales. With a the entry of largest magnitude, `scale = -a / 2**(bits-1)`, so that a
    itself is the lowest code and no code is wasted. Asymmetric: from min(0, lowest) to max(0, highest).
    """
    padded, numbers = by_group(weight, group_size), Integers(bits)
    highest, lowest = padded.amax(2).clamp(min=0) * shrink, padded.amin(2).clamp(max=0) * shrink
    if symmetric:
        extreme = torch.where(highest > -lowest, highest, lowest)
        return Grid(storable(extreme / numbers.low, stored), None, numbers, group_size, stored)
    scales = storable((highest - lowest) / (2**bits - 1), stored)
    zeros = ((-lowest / scales).round() + numbers.low).clamp(numbers.low, numbers.high)
    return Grid(scales, zeros, numbers, group_size, stored)


def searched_grid(
    weight: Tensor, importance: Tensor, bits: int, group_size: int, symmetric: bool, stored: torch.dtype
) -> Grid:
    """The grid among shrunken and stretched ranges with the least `Σ importance (w - ŵ)²` per group.

    Args:
        importance: `[columns]`, the diagonal of the second moment.
    """
    best_shrink = torch.ones(by_group(weight, group_size).shape[:2], dtype=weight.dtype, device=weight.device)
    best_error = torch.full_like(best_shrink, torch.inf)
    for shrink in torch.linspace(1.1, 0.4, 57).tolist():
        grid = range_grid(weight, bits, group_size, symmetric, stored, shrink)
        error = (grid.values(grid.codes(weight)) - weight).square_().mul_(importance)
        error = by_group(error, group_size).sum(2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_shrink = torch.where(better, shrink, best_shrink)
    return range_grid(weight, bits, group_size, symmetric, stored, best_shrink)
