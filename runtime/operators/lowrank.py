"""Low-rank maps, on their own or beside another operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels import layouts
from ...kernels.reference import grouped_product
from .base import Operator, Problem, below, prefixed, shared


@dataclass(frozen=True)
class LowRank:
    """`W = up down`.

    Attributes:
        up: an operator `[out_features, rank / groups]`; of each group of rows, what its share of `down` feeds.
        down: an operator `[rank, in_features]`.
        groups: of rows that have numbers of their own in between; 1 where all share them.
    """

    kind: ClassVar[str] = "lowrank"
    up: Operator
    down: Operator
    groups: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def nbytes(self) -> float:
        return self.up.nbytes + self.down.nbytes

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        up, down = (part.dense(exact).unflatten(0, (self.groups, -1)) for part in (self.up, self.down))
        return (up @ down).flatten(0, 1).to(dtype)

    def raised(self, latents: Tensor) -> Tensor:
        """What `up` makes of `[..., rank]`."""
        if self.groups == 1:
            return self.up.forward(latents)
        return grouped_product(latents, self.up.dense(latents.dtype), self.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.raised(self.down.forward(x))

    def to_tensors(self) -> dict[str, Tensor]:
        return {**prefixed(self.up.to_tensors(), "up"), **prefixed(self.down.to_tensors(), "down")}

    def scheme(self) -> dict[str, Any]:
        scheme: dict[str, Any] = {"kind": self.kind, "rank": self.rank}
        if self.groups > 1:
            scheme["groups"] = self.groups
        return {**scheme, "up": self.up.scheme(), "down": self.down.scheme()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], inner: Callable[..., Operator]
    ) -> LowRank:
        up, down = (inner(below(tensors, part), scheme[part]) for part in ("up", "down"))
        groups = scheme.get("groups", 1)
        if groups not in range(1, up.shape[0] + 1) or up.shape[0] % groups or down.shape[0] != groups * up.shape[1]:
            raise ValueError(f"up {list(up.shape)} and down {list(down.shape)} do not go together in {groups} groups")
        return cls(up, down, groups)


def cached_bytes(rank: int, bits: int, itemsize: int) -> int:
    """Bytes of a latent of `rank` channels in the KV cache of a model that computes in floats of `itemsize` bytes."""
    return rank * itemsize if bits == 16 else layouts.latent_bytes(rank, bits)


@dataclass(frozen=True)
class Latent(LowRank):
    """A key or value projection of which the KV cache holds the numbers in between, `down x`.

    Attributes:
        bits: of a number in the cache: 16 stands for the model's floats; 8 and 4 for codes (`layouts.pack_latents`).
    """

    kind: ClassVar[str] = "latent"
    bits: int = 16

    def cached_bytes(self, itemsize: int) -> int:
        """Bytes of a token in the cache (`cached_bytes`)."""
        return cached_bytes(self.rank, self.bits, itemsize)

    def cached(self, latents: Tensor) -> Tensor:
        """Latents as they come back from the cache."""
        if self.bits == 16:
            return latents
        return layouts.unpack_latents(layouts.pack_latents(latents, self.bits), self.rank, self.bits, latents.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.raised(self.cached(self.down.forward(x)))

    def scheme(self) -> dict[str, Any]:
        return {**super().scheme(), "bits": self.bits}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], inner: Callable[..., Operator]
    ) -> Latent:
        plain = LowRank.from_tensors(tensors, scheme, inner)
        if scheme["bits"] not in (4, 8, 16):
            raise ValueError(f"latents of {scheme['bits']} bits")
        return cls(plain.up, plain.down, plain.groups, scheme["bits"])


@dataclass(frozen=True)
class WithResidual:
    """`W = base + residual`: what compression left out of `base`, kept at low rank."""

    kind: ClassVar[str] = "residual"
    base: Operator
    residual: LowRank

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def nbytes(self) -> float:
        return self.base.nbytes + self.residual.nbytes

    @property
    def inner(self) -> Operator:
        return self.base

    def with_inner(self, inner: Operator) -> WithResidual:
        return WithResidual(inner, self.residual)

    def subproblem(self, problem: Problem) -> Problem:
        """The base's: it aims at what the residual leaves."""
        return Problem(problem.target - self.residual.dense(problem.target.dtype), problem.moment, problem.metric)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        return (self.base.dense(exact) + self.residual.dense(exact)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base.forward(x) + self.residual.forward(x)

    def to_tensors(self) -> dict[str, Tensor]:
        return {**prefixed(self.base.to_tensors(), "base"), **prefixed(self.residual.to_tensors(), "residual")}

    def scheme(self) -> dict[str, Any]:
        return {"kind": self.kind, "base": self.base.scheme(), "residual": self.residual.scheme()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], inner: Callable[..., Operator]
    ) -> WithResidual:
        base = inner({**below(tensors, "base"), **shared(tensors)}, scheme["base"])
        residual = LowRank.from_tensors(below(tensors, "residual"), scheme["residual"], inner)
        return cls(base, residual)
