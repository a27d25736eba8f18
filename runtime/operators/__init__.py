"""Linear maps in the form they are stored in, and the algebra of putting them together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .armor import Armor
from .base import Composite, Operator, Problem, bits_per_weight, identical, stored_name
from .leaves import W8A8, Dense, IntQuantized
from .lowrank import Latent, LowRank, WithResidual, cached_bytes
from .sparse import Sparse24

__all__ = [
    "W8A8", "Armor", "Composite", "Dense", "IntQuantized", "Latent", "LowRank", "Operator", "Problem", "Sparse24",
    "WithResidual", "bits_per_weight", "cached_bytes", "from_tensors", "identical", "shared_prefixes", "stored_name",
]  # fmt: skip

KINDS: dict[str, Any] = {
    kind.kind: kind for kind in (Dense, IntQuantized, W8A8, Sparse24, Armor, LowRank, Latent, WithResidual)
}


def from_tensors(tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> Operator:
    """Rebuild any operator from its stored tensors and its scheme."""
    return KINDS[scheme["kind"]].from_tensors(tensors, scheme, from_tensors)


def shared_prefixes(scheme: Mapping[str, Any]) -> list[str]:
    """Names that the operator's shared tensors start with."""
    found = [scheme["shared"]] if "shared" in scheme else []
    return found + [name for part in scheme.values() if isinstance(part, Mapping) for name in shared_prefixes(part)]
