"""Low-rank maps, and those of which the KV cache holds what lies in between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels import layouts
from ...kernels.reference import grouped_product
from .base import Operator, below, build, from_tensors, prefixed, register
from .linear import StoredLinear


@dataclass(frozen=True)
class LowRank(Operator):
    """`W = up down`.

    Attributes:
        up: an operator `[out_features, rank / groups]`; of each group of rows, what its share of `down` feeds.
        down: an operator `[rank, in_features]`.
        groups: of rows that have numbers of their own in between; 1 where all share them.
    """

    kind: ClassVar[str] = "lowrank"
    ends: ClassVar[tuple[str, ...]] = ("up",)
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

    @property
    def factors(self) -> tuple[str, ...]:
        """`down` and `up`; one in groups, which is small, stays as it is."""
        return ("down", "up") if self.groups == 1 else ("down",)

    def between(self, moment: Tensor) -> Tensor:
        down = self.down.dense()
        return down @ moment @ down.T

    @property
    def description(self) -> str:
        stored = "" if self.down.kind == "dense" else f" {self.down.description.split()[0]}"
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"rank {self.rank}{groups}{stored}"

    def to_tensors(self) -> dict[str, Tensor]:
        return {**prefixed(self.up.to_tensors(), "up"), **prefixed(self.down.to_tensors(), "down")}

    def scheme(self) -> dict[str, Any]:
        scheme: dict[str, Any] = {"kind": self.kind, "rank": self.rank}
        if self.groups > 1:
            scheme["groups"] = self.groups
        return {**scheme, "up": self.up.scheme(), "down": self.down.scheme()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> LowRank:
        up, down = (from_tensors(below(tensors, part), scheme[part]) for part in ("up", "down"))
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

    @property
    def rounds_activations(self) -> bool:
        return self.bits < 16

    def beyond(self, x: Tensor) -> Tensor:
        if any(part.rounds_activations for factor in (self.up, self.down) for part in factor.inside()):
            return super().beyond(x)
        latents = self.down.forward(x)
        return self.raised(self.cached(latents) - latents)

    @property
    def description(self) -> str:
        return super().description + (f", cached int{self.bits}" if self.bits < 16 else "")

    def scheme(self) -> dict[str, Any]:
        return {**super().scheme(), "bits": self.bits}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> Latent:
        plain = LowRank.from_tensors(tensors, scheme)
        if scheme["bits"] not in (4, 8, 16):
            raise ValueError(f"latents of {scheme['bits']} bits")
        return cls(plain.up, plain.down, plain.groups, scheme["bits"])


class LowRankLinear(StoredLinear):
    """Down to a few numbers, and up again."""

    up: StoredLinear
    down: StoredLinear

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        up, down = (build(below(tensors, part), scheme[part], dtype) for part in ("up", "down"))
        super().__init__(up.out_features, down.in_features)
        self.up, self.down, self.groups = up, down, scheme.get("groups", 1)

    def raised(self, latents: Tensor) -> Tensor:
        """`[..., rank]` → `[..., out_features]`."""
        if self.groups == 1:
            return self.up.product(latents)
        return grouped_product(latents, self.up.whole(latents.dtype), self.groups)

    def product(self, x: Tensor) -> Tensor:
        return self.raised(self.down.product(x))


class LatentLinear(LowRankLinear):
    """A key or value projection: what attention caches is `packed`.

    Attributes:
        bits: of a number in the cache.
        dtype: of activations.
    """

    keeps_latents = True

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__(tensors, scheme, dtype)
        self.bits, self.rank, self.dtype = scheme["bits"], self.down.out_features, dtype

    def packed(self, x: Tensor) -> Tensor:
        """`[..., in_features]` → what is cached of it."""
        latents = self.down.product(x)
        return latents if self.bits == 16 else layouts.pack_latents(latents, self.bits)

    def unpacked(self, cached: Tensor, dtype: torch.dtype) -> Tensor:
        """What is cached → `[..., rank]`."""
        if self.bits == 16:
            return cached.contiguous().view(dtype)
        return layouts.unpack_latents(cached, self.rank, self.bits, dtype)

    def product(self, x: Tensor) -> Tensor:
        return self.raised(self.unpacked(self.packed(x), x.dtype))


register(LowRank, LowRankLinear)
register(Latent, LatentLinear)
