"""Scales moved between what feeds linears and these, without changing what the model computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .skeleton import Skeleton
from .view import Derived


@dataclass(frozen=True)
class Seam:
    """Where a scale can be moved: what a norm or a linear puts out is multiplied by matrices, and by nothing else.

    Attributes:
        feeder: the norm, or the linear in whose last rows what is read is linear; a name inside the block, in memory.
        readers: linears that read it, routers, and what weighs shared experts; names alike.
        linears: disk names of those of the readers that passes may rewrite.
        channels: numbers that the feeder puts out for them.
        heads: of queries, and of keys and values, where each of the latter is read by several; (1, 1) elsewhere.
        norm: whether the feeder is a norm.
    """

    feeder: str
    readers: tuple[str, ...]
    linears: tuple[str, ...]
    channels: int
    heads: tuple[int, int]
    norm: bool

    def columns(self, scale: Tensor) -> Tensor:
        """A number for each channel → one for each column of a reader."""
        queries, kept = self.heads
        return scale.view(kept, -1).repeat_interleave(queries // kept, 0).flatten()

    def largest(self, columns: Tensor) -> Tensor:
        """A number for each column of a reader → the largest of those of each channel."""
        queries, kept = self.heads
        return columns.view(kept, queries // kept, -1).amax(1).flatten()


def seams(skeleton: Skeleton, index: int) -> dict[str, Seam]:
    """Feeder → the seam behind it, of a block."""
    family, config = skeleton.family, skeleton.config
    modules = dict(skeleton.layers[index].named_modules())
    readers: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    for group in (group for stage in skeleton.stages(index) for group in stage if group.reads):
        readers.setdefault(group.reads, []).extend(group.linears)
        others.setdefault(group.reads, []).extend(group.beside)
    found = {}
    for feeder, names in readers.items():
        norm, beside = not hasattr(modules[feeder], "in_features"), others[feeder]
        if norm and any(family.experts.number(name) is not None for name in names):
            beside = [*beside, *(name for name in (family.experts.router, *family.experts.gates) if name in modules)]
        channels, heads = modules[names[0]].in_features, (1, 1)
        if not norm and names[0].startswith(family.attention + "."):
            heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
            channels = channels // heads[0] * heads[1]
        disk = tuple(skeleton.disk_name(index, name) for name in names)
        found[feeder] = Seam(feeder, (*names, *beside), disk, channels, heads, norm)
    return found


def changes(skeleton: Skeleton, index: int, seam: Seam, scale: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Tensor of a block, by its name in memory → what becomes of it when the feeder puts out `1 / scale` of what it
    did, and all that read it multiply by `scale`.

    Args:
        scale: positive, `[channels]`.
    """
    offset = float(seam.norm and skeleton.family.offset_norms)
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for kind, extra in (("weight", offset), ("bias", 0.0)):
        name = f"{seam.feeder}.{kind}"
        if skeleton.disk_name(index, name) in skeleton.checkpoint.tensors:
            found[name] = partial(_divided, scale=scale, offset=extra)
    times = partial(multiplied, columns=seam.columns(scale))
    return found | {f"{reader}.weight": times for reader in seam.readers}


def folded(skeleton: Skeleton, index: int, seam: Seam, scale: Tensor) -> dict[str, Derived]:
    """The same for a view: disk names → what they are there."""
    made = {skeleton.disk_name(index, name): make for name, make in changes(skeleton, index, seam, scale).items()}
    return {name: Derived((name,), make) for name, make in made.items()}


def _divided(tensor: Tensor, *, scale: Tensor, offset: float) -> Tensor:
    """A norm's numbers, or the last rows of a linear's."""
    exact = tensor.float() + offset
    factor = torch.cat([torch.ones(len(tensor) - len(scale), device=scale.device), scale]).to(exact.device)
    return (exact / factor.view(-1, *[1] * (tensor.dim() - 1)) - offset).to(tensor.dtype)


def multiplied(weight: Tensor, *, columns: Tensor) -> Tensor:
    """A reader's weight `[rows, columns]` times the scale of its columns."""
    return (weight.float() * columns.to(weight.device)).to(weight.dtype)
