"""Experts that lie in one three-dimensional tensor on disk, seen as a matrix of each, and back.

`[experts, rows, columns]` holds the linears of an expert one below the other, in equal parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .families import Family


@dataclass(frozen=True)
class Slice:
    """Where one expert's linear lies: in which tensor, at which number, in which rows."""

    stored: str
    expert: int
    rows: slice

    def of(self, tensor: Tensor) -> Tensor:
        return tensor[self.expert, self.rows]


def slices(family: Family, stored: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Slice]]:
    """The linears' weights (disk names) of a tensor on disk; none if it is no fused one."""
    for ending, linears in family.experts.fused.items():
        if not stored.endswith("." + ending) or len(shape) != 3:
            continue
        size = shape[1] // len(linears)
        for expert in range(shape[0]):
            for number, linear in enumerate(linears):
                name = _name(family, stored.removesuffix(ending), expert, linear)
                yield name, Slice(stored, expert, slice(number * size, (number + 1) * size))


def fuse(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole blocks' tensors under the names of linears → as such models lie on disk."""
    if not family.experts.fused:
        return dict(tensors)
    left, found = dict(tensors), dict[str, Tensor]()
    marker = f".{family.experts.where}.0."
    for start in sorted({name.split(marker)[0] + "." for name in tensors if marker in name}):
        for ending, linears in family.experts.fused.items():
            experts: list[Tensor] = []
            while all(_name(family, start, len(experts), linear) in left for linear in linears):
                names = [_name(family, start, len(experts), linear) for linear in linears]
                experts.append(torch.cat([left.pop(name) for name in names]))
            found[start + ending] = torch.stack(experts)
    return {**left, **found}


def _name(family: Family, start: str, expert: int, linear: str) -> str:
    return f"{start}{family.disk_name(family.experts.where)}.{expert}.{family.disk_name(linear)}.weight"
