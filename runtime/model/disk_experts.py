"""Matrices that lie on disk in another way than models hold them here, and back: transposed ones, and experts in one
three-dimensional tensor.

`[experts, rows, columns]` (or transposed) holds the linears of an expert one below the other, in equal parts, or row by
row in turns; `[experts, rows]` their biases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .families import Family, starred

BIAS = "_bias"  # how names end of tensors of biases


@dataclass(frozen=True)
class Slice:
    """Where a linear lies: in which tensor, for experts at which number, in which rows, of what shape."""

    stored: str
    expert: int | None
    rows: slice
    shape: tuple[int, ...]
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        own = tensor if self.expert is None else tensor[self.expert]
        return (own.T if self.transposed else own)[self.rows]


def as_published(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> Family:
    """A family as a folder has it whose experts lie in one tensor, as transformers holds them, though it writes them
    one by one.

    Args:
        shapes: of the folder's tensors, by name.
    """
    experts, place = family.experts, family.disk_name(family.experts.where)
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
    fused = {
        f"{place}.{part}{kind}": linears
        for part, linears in parts.items()
        for kind, dimensions in (("", 3), (BIAS, 2))
        if any(name.endswith(f".{place}.{part}{kind}") and len(shape) == dimensions for name, shape in shapes.items())
    }
    return replace(family, experts=replace(experts, fused=fused)) if fused and not experts.fused else family


def slices(family: Family, stored: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Slice]]:
    """The linears' weights or biases (disk names) of a tensor on disk; none if it is held as it lies."""
    experts = family.experts
    if _transposed(family, stored):
        yield stored, Slice(stored, None, slice(None), (shape[-1], *shape[:-1]), transposed=True)
    for ending, linears in experts.fused.items():
        if not stored.endswith("." + ending) or len(shape) != (2 if ending.endswith(BIAS) else 3):
            continue
        transposed = experts.transposed and len(shape) == 3
        rows, columns = (shape[2], shape[1:2]) if transposed else (shape[1], shape[2:])
        size = rows // len(linears)
        for expert in range(shape[0]):
            for number, linear in enumerate(linears):
                part = slice(number * size, (number + 1) * size)
                if experts.interleaved and len(linears) > 1:
                    part = slice(number, None, len(linears))
                name = _name(family, stored.removesuffix(ending), expert, linear, ending)
                yield name, Slice(stored, expert, part, (size, *columns), transposed)


def fuse(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole blocks' tensors under the names of linears → as such models lie on disk."""
    experts = family.experts
    left = {name: tensor.T if _transposed(family, name) else tensor for name, tensor in tensors.items()}
    if not experts.fused:
        return left
    found = dict[str, Tensor]()
    marker = f".{experts.where}.0."
    for start in sorted({name.split(marker)[0] + "." for name in tensors if marker in name}):
        for ending, linears in experts.fused.items():
            each: list[Tensor] = []
            while all(_name(family, start, len(each), linear, ending) in left for linear in linears):
                parts = [left.pop(_name(family, start, len(each), linear, ending)) for linear in linears]
                if experts.interleaved and len(parts) > 1:
                    joined = torch.stack(parts, dim=1).flatten(0, 1)
                else:
                    joined = torch.cat(parts)
                each.append(joined.T if experts.transposed and joined.dim() == 2 else joined)
            found[start + ending] = torch.stack(each)
    return {**left, **found}


def _transposed(family: Family, stored: str) -> bool:
    """Whether a tensor is a weight that lies transposed in plain folders."""
    inside = stored.startswith(family.blocks) and stored.endswith(".weight")
    return inside and starred(family.inside(stored.removesuffix(".weight"))) in family.transposed


def _name(family: Family, start: str, expert: int, linear: str, ending: str) -> str:
    kind = "bias" if ending.endswith(BIAS) else "weight"
    return f"{start}{family.disk_name(family.experts.where)}.{expert}.{family.disk_name(linear)}.{kind}"
