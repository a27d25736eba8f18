"""Ways to store a linear map, one file each: its operator, the module that runs it, and a short name for people.

Operators are put together: a 2:4 pattern holds integers, a residual stands beside a sparse core. A new scheme is a file
and its line here.
"""

from __future__ import annotations

from .armor import Armor, ArmorLinear
from .base import (
    LOOKUPS,
    Composite,
    Operator,
    Problem,
    bits_per_weight,
    from_tensors,
    identical,
    looked_up,
    rewritten,
    shared_prefixes,
    stored_linear,
    stored_name,
    with_factors,
)
from .block_scaled import BlockScaled, BlockScaledLinear
from .columns import ColumnsLinear, WithColumns
from .dense import Dense, DenseLinear
from .integers import IntLinear, IntQuantized
from .k_quants import KQuantized
from .linear import RowsLinear, StoredEmbedding, StoredLinear
from .lowrank import Latent, LatentLinear, LowRank, LowRankLinear, cached_bytes
from .residual import ResidualLinear, WithResidual
from .sparse24 import Sparse24, Sparse24Linear
from .w8a8 import W8A8, W8A8Linear

__all__ = [
    "LOOKUPS",
    "W8A8",
    "Armor",
    "ArmorLinear",
    "BlockScaled",
    "BlockScaledLinear",
    "ColumnsLinear",
    "Composite",
    "Dense",
    "DenseLinear",
    "IntLinear",
    "IntQuantized",
    "KQuantized",
    "Latent",
    "LatentLinear",
    "LowRank",
    "LowRankLinear",
    "Operator",
    "Problem",
    "ResidualLinear",
    "RowsLinear",
    "Sparse24",
    "Sparse24Linear",
    "StoredEmbedding",
    "StoredLinear",
    "W8A8Linear",
    "WithColumns",
    "WithResidual",
    "bits_per_weight",
    "cached_bytes",
    "from_tensors",
    "identical",
    "looked_up",
    "rewritten",
    "shared_prefixes",
    "stored_linear",
    "stored_name",
    "with_factors",
]  # fmt: skip
