"""Scales moved between a norm and what reads it, without changing what the model computes."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .skeleton import Skeleton
from .view import Part


def norms(skeleton: Skeleton, index: int) -> dict[str, list[str]]:
    """The norms of a block whose outputs nothing but matrices read, and these: routers and what weighs shared experts
    among them. All are names inside the block, in memory."""
    experts = skeleton.family.experts
    found: dict[str, list[str]] = {}
    beside: set[str] = set()
    modules = dict(skeleton.layers[index].named_modules())
    for stage in skeleton.stages(index):
        for group in stage:
            if group.reads and not hasattr(modules[group.reads], "in_features"):
                found.setdefault(group.reads, []).extend(group.linears)
                if experts.number(group.linears[0]) is not None:
                    beside.add(group.reads)
    for norm in beside:
        found[norm] += [name for name in (experts.router, *experts.gates) if name in modules]
    return found


def folded(skeleton: Skeleton, index: int, norm: str, scale: Tensor) -> dict[str, Part]:
    """The tensors of a block, by disk name, with which a norm puts out `1 / scale` of what it did, and all that read it
    multiply by `scale`.

    Args:
        norm: one of `norms`.
        scale: positive, `[hidden_size]`.
    """
    divide = partial(_divided, scale=scale, offset=float(skeleton.family.offset_norms))
    parts = {f"{norm}.weight": divide, f"{norm}.bias": partial(_divided, scale=scale, offset=0.0)}
    made = {
        name: make for name, make in parts.items() if skeleton.disk_name(index, name) in skeleton.checkpoint.tensors
    }
    for reader in norms(skeleton, index)[norm]:
        made[f"{reader}.weight"] = partial(_multiplied, scale=scale)
    names = {skeleton.disk_name(index, name): make for name, make in made.items()}
    return {name: Part((name,), make) for name, make in names.items()}


def _divided(weight: Tensor, *, scale: Tensor, offset: float) -> Tensor:
    exact = weight.float() + offset
    return (exact / scale.to(exact.device) - offset).to(weight.dtype)


def _multiplied(weight: Tensor, *, scale: Tensor) -> Tensor:
    return (weight.float() * scale.to(weight.device)).to(weight.dtype)
