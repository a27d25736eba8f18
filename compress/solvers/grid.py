"""Grids: the scale and zero point of each group, and rounding to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.numbers import E4M3, SUPER, Integers, Rounding
from ...kernels.reference import expand_groups

# Shares of its range that a group may be given, the best of which it takes. Of floats of 4 bits the largest may be
# their 6 or their 4, whose neighbours lie closer (four over six, arXiv:2512.02010); powers of two leave two to choose.
RANGES = {"float": (1.0,), "e4m3": (1.0, 1.5), "e8m0": (1.0, 0.5), "nested": (1.0,)}
_LEAST = 2.0**-24  # of half precision


@dataclass(frozen=True)
class Steps:
    """How scales are stored.

    Attributes:
        dtype: a float; or float8_e8m0fnu, powers of two; or float8_e4m3fn.
        unit: what scales of float8_e4m3fn are times, a power of two.
    """

    dtype: torch.dtype
    unit: float = 1.0

    @classmethod
    def of(cls, rounding: Rounding, model: torch.dtype, largest: float = 1.0) -> Steps:
        """
        Args:
            model: the dtype of the model.
            largest: magnitude among the weights that share a unit.
        """
        if rounding.scales == "float":
            return cls(model)
        if rounding.scales == "nested":
            return cls(torch.float16)
        if rounding.scales == "e8m0":
            return cls(torch.float8_e8m0fnu)
        top = max(largest, 1e-30) / rounding.numbers.high * max(RANGES["e4m3"])
        return cls(torch.float8_e4m3fn, 2.0 ** math.ceil(math.log2(top / E4M3.high)))

    @property
    def signed(self) -> bool:
        return self.dtype.itemsize > 1

    @property
    def coarse(self) -> bool:
        """Whether a scale has no neighbour that is nearer than half of it."""
        return self.dtype == torch.float8_e8m0fnu

    def storable(self, scales: Tensor) -> Tensor:
        """Scales as they will be read back: rounded (powers of two up), and never zero there."""
        if self.dtype == torch.float8_e8m0fnu:
            mantissa, exponent = torch.frexp(scales)
            return torch.ldexp(torch.ones_like(scales), (exponent - (mantissa == 0.5).int()).clamp_(-126, 127))
        if self.dtype == torch.float8_e4m3fn:
            return E4M3.nearest(scales / self.unit).clamp_(min=2.0**-9).mul_(self.unit)
        # float16's subnormals are scales like others; those of wider exponents are below what float32 can divide by.
        tiny = 2.0**-24 if self.dtype == torch.float16 else torch.finfo(torch.float32).tiny
        rounded = scales.to(self.dtype).to(scales.dtype)
        return torch.where(rounded.abs() < tiny, torch.full_like(rounded, tiny), rounded)


@dataclass(frozen=True)
class Grid:
    """The values each weight may take: `(code - zero) * scale`.

    Attributes:
        scales: `[rows, groups]`, rounded to what will be stored, never zero.
        zeros: `[rows, groups]` integers in the same dtype (any numbers where scales are nested); None when symmetric.
        rounding: what codes are, and which share a scale.
        steps: how scales are stored.
        units: of nested scales, `[rows, super-blocks, 1 or 2]`: what scales are multiples of, and with zero points what
            `(zero - lowest code) * scale` is.
    """

    scales: Tensor
    zeros: Tensor | None
    rounding: Rounding
    steps: Steps
    units: Tensor | None = None

    def columns(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero of every column: two `[rows, count]`."""
        size = self.rounding.span(count)
        zeros = None if self.zeros is None else expand_groups(self.zeros, count, size)
        return expand_groups(self.scales, count, size), zeros

    def rows(self, which: Tensor | slice) -> Grid:
        """The grid of some rows."""
        zeros, units = (None if part is None else part[which] for part in (self.zeros, self.units))
        return Grid(self.scales[which], zeros, self.rounding, self.steps, units)

    @staticmethod
    def stacked(grids: Sequence[Grid]) -> Grid:
        """One grid of the rows of several, all alike but for scales and zeros."""
        first = grids[0]
        zeros = None if first.zeros is None else torch.cat([grid.zeros for grid in grids if grid.zeros is not None])
        units = None if first.units is None else torch.cat([grid.units for grid in grids if grid.units is not None])
        return Grid(torch.cat([grid.scales for grid in grids]), zeros, first.rounding, first.steps, units)

    def where(self, keep: Tensor, other: Grid) -> Grid:
        """This grid in the rows to `keep`, another of the same kind elsewhere."""
        stacked = Grid.stacked([self, other])
        count = len(keep)
        return stacked.rows(torch.arange(count, device=keep.device) + torch.where(keep, 0, count))

    def turned(self) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros to be changed in place, `[groups, rows]`."""
        zeros = None if self.zeros is None else self.zeros.T.clone(memory_format=torch.contiguous_format)
        return self.scales.T.clone(memory_format=torch.contiguous_format), zeros

    def moved(self, scales: Tensor, zeros: Tensor | None) -> Grid:
        """This grid with other scales, and with nested ones other zero points: those that `refine_chunk` left."""
        scales = scales if self.units is not None else self.steps.storable(scales)
        return Grid(scales, zeros, self.rounding, self.steps, self.units)

    def storable(self, scales: Tensor, group: int) -> Tensor:
        """Scales `[rows]` of a group as they will be read back."""
        if self.units is None:
            return self.steps.storable(scales)
        return nearest_levels(scales, self.unit(group, 0), self.rounding, scales=True)

    def levels(self) -> tuple[Tensor, Tensor | None]:
        """Nested scales, and what is in the place of zero points, as integers: int16 `[rows, groups]`."""
        assert self.units is not None
        units = self.units.repeat_interleave(self.scales.shape[1] // self.units.shape[1], 1)
        scales = (self.scales / units[..., 0]).round().to(torch.int16)
        if self.zeros is None:
            return scales, None
        offsets = (self.zeros - self.rounding.numbers.low) * self.scales
        return scales, (offsets / units[..., 1]).round().to(torch.int16)

    def unit(self, group: int, which: int) -> Tensor:
        """Of a group's nested scales (0) or zero points (1), `[rows]`."""
        assert self.units is not None
        return self.units[:, group // (self.scales.shape[1] // self.units.shape[1]), which]

    def codes(self, weight: Tensor) -> Tensor:
        """Nearest codes of `[rows, columns]`, as floats."""
        scales, zeros = self.columns(weight.shape[1])
        return self.rounded(weight, scales, zeros)

    def rounded(self, weight: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Nearest codes of weights that have these scales and zeros, elementwise."""
        moved = torch.div(weight, scales)
        if self.units is not None and zeros is not None:  # which are no integers
            return self.rounding.numbers.nearest(moved.add_(zeros))
        return self.rounding.numbers.nearest(moved, zeros)

    def values(self, codes: Tensor) -> Tensor:
        scales, zeros = self.columns(codes.shape[1])
        return codes * scales if zeros is None else (codes - zeros) * scales


def by_group(matrix: Tensor, group_size: int) -> Tensor:
    """`[rows, columns]` → `[rows, groups, columns per group]`, a ragged last group filled up with zeros."""
    rows, columns = matrix.shape
    span = group_size if group_size > 0 else columns
    return F.pad(matrix, (0, -columns % span)).view(rows, -1, span)


def range_grid(weight: Tensor, rounding: Rounding, steps: Steps, shrink: Tensor | float = 1.0) -> Grid:
    """The grid that spans each group's range, times `shrink` (`[rows, groups]` or a number).

    Integers without zero points have full-range signed scales: with a the entry of largest magnitude,
    `scale = -a / 2**(bits-1)`, so that a itself is the lowest code and no code is wasted. With zero points they reach
    from min(0, lowest) to max(0, highest). Others reach from minus the largest magnitude to it.
    """
    padded, numbers = by_group(weight, rounding.columns), rounding.numbers
    highest, lowest = padded.amax(2).clamp(min=0), padded.amin(2).clamp(max=0)
    if isinstance(numbers, Integers) and not rounding.symmetric:
        highest, lowest = highest * shrink, lowest * shrink
        if rounding.scales == "nested":
            return nested_grid((highest - lowest) / (2**numbers.bits - 1), -lowest, rounding, steps)
        scales = steps.storable((highest - lowest) / (2**numbers.bits - 1))
        zeros = ((-lowest / scales).round() + numbers.low).clamp(numbers.low, numbers.high)
        return Grid(scales, zeros, rounding, steps)
    if isinstance(numbers, Integers) and steps.signed:
        extreme = torch.where(highest > -lowest, highest, lowest) * shrink
        if rounding.scales == "nested":
            return nested_grid(extreme / numbers.low, None, rounding, steps)
        return Grid(steps.storable(extreme / numbers.low), None, rounding, steps)
    largest = highest.maximum(-lowest)
    if rounding.rows > 1:
        largest = _shared(largest, rounding.rows)
    return Grid(steps.storable(largest * shrink / numbers.high), None, rounding, steps)


def nested_grid(scales: Tensor, offsets: Tensor | None, rounding: Rounding, steps: Steps) -> Grid:
    """The grid whose nested scales are next to some, and so what it takes away from each group.

    Args:
        scales, offsets: `[rows, groups]`, of either sign without offsets; offsets are not negative.
    """
    groups = SUPER // rounding.columns
    tops = [scales] if offsets is None else [scales, offsets]
    units = torch.stack([_unit(top.unflatten(1, (-1, groups)), rounding) for top in tops], 2)
    wide = units.repeat_interleave(groups, 1)
    scales = nearest_levels(scales, wide[..., 0], rounding, scales=True)
    if offsets is None:
        return Grid(scales, None, rounding, steps, units)
    offsets = nearest_levels(offsets, wide[..., 1], rounding, scales=False)
    return Grid(scales, offsets / scales + rounding.numbers.low, rounding, steps, units)


def _unit(values: Tensor, rounding: Rounding) -> Tensor:
    """What the largest of each super-block `[rows, super-blocks, groups]` is the highest multiple of, as stored."""
    if not rounding.symmetric:
        unit = values.amax(2) / (2**rounding.levels - 1)
    else:
        unit = values.gather(2, values.abs().argmax(2, keepdim=True))[..., 0] / -(2 ** (rounding.levels - 1))
    unit = unit.half().to(values.dtype)
    return torch.where(unit.abs() < _LEAST, _LEAST, unit)


def nearest_levels(values: Tensor, unit: Tensor, rounding: Rounding, *, scales: bool) -> Tensor:
    """The nearest multiples of units that are stored: of scales, none is zero."""
    if rounding.symmetric:
        low, high = -(2 ** (rounding.levels - 1)), 2 ** (rounding.levels - 1) - 1
    else:
        low, high = int(scales), 2**rounding.levels - 1
    levels = (values / unit).round_().clamp_(low, high)
    return (torch.where(levels == 0, 1.0, levels) if scales else levels) * unit


def _shared(largest: Tensor, rows: int) -> Tensor:
    """Of each so many rows of `[rows, groups]` the largest, in the place of all."""
    found = F.pad(largest, (0, 0, 0, -len(largest) % rows)).unflatten(0, (-1, rows)).amax(1)
    return found.repeat_interleave(rows, 0)[: len(largest)]


def searched_grid(
    weight: Tensor, importance: Tensor | None, rounding: Rounding, steps: Steps, ranges: Sequence[float]
) -> Grid:
    """The grid among those of some shares of the ranges with the least `Σ importance (w - ŵ)²` per group.

    Args:
        importance: `[columns]`, the diagonal of the second moment; None for ones.
    """
    if len(ranges) == 1:
        return range_grid(weight, rounding, steps, ranges[0])
    best_shrink = torch.ones(by_group(weight, rounding.columns).shape[:2], dtype=weight.dtype, device=weight.device)
    best_error = torch.full_like(best_shrink, torch.inf)
    for shrink in ranges:
        grid = range_grid(weight, rounding, steps, shrink)
        error = (grid.values(grid.codes(weight)) - weight).square_()
        error = by_group(error if importance is None else error.mul_(importance), rounding.columns).sum(2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_shrink = torch.where(better, shrink, best_shrink)
    return range_grid(weight, rounding, steps, best_shrink)
