"""Experts that lie in one three-dimensional tensor on disk, seen as a matrix of each, and back.

`[experts, rows, columns]` holds the linears of an expert one below the other, in equal parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .families import Architecture


@dataclass(frozen=True)
class Slice:
    """Where one expert's linear lies: in which tensor, at which number, in which rows."""

    stored: str
    expert: int
    rows: slice

    def of(self, tensor: Tensor) -> Tensor:
        return tensor[self.expert, self.rows]


def slices(architecture: Architecture, stored: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Slice]]:
    """The linears' weights (disk names) of a tensor on disk; none if it is no fused one."""
    for ending, linears in architecture.fused.items():
        if not stored.endswith("." + ending) or len(shape) != 3:
            continue
        size = shape[1] // len(linears)
        for expert in range(shape[0]):
            for number, linear in enumerate(linears):
                name = _name(architecture, stored.removesuffix(ending), expert, linear)
                yield name, Slice(stored, expert, slice(number * size, (number + 1) * size))


def fuse(architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole blocks' tensors under the names of linears → as such models lie on disk."""
    if not architecture.fused:
        return dict(tensors)
    left, found = dict(tensors), dict[str, Tensor]()
    marker = f".{architecture.experts}.0."
    for start in sorted({name.split(marker)[0] + "." for name in tensors if marker in name}):
        for ending, linears in architecture.fused.items():
            experts: list[Tensor] = []
            while all(_name(architecture, start, len(experts), linear) in left for linear in linears):
                names = [_name(architecture, start, len(experts), linear) for linear in linears]
                experts.append(torch.cat([left.pop(name) for name in names]))
            found[start + ending] = torch.stack(experts)
    return {**left, **found}


def _name(architecture: Architecture, start: str, expert: int, linear: str) -> str:
    return f"{start}{architecture.disk_name(architecture.experts)}.{expert}.{architecture.disk_name(linear)}.weight"
