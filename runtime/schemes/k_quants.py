"""The types of llama.cpp called Q2_K to Q6_K: integers whose scales are integers, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import cpu, k_quants
from ...kernels.k_quants import Parts
from ...kernels.numbers import SUPER
from .base import Operator, register
from .linear import RowsLinear


@dataclass(frozen=True)
class KQuantized(Operator):
    """Codes, scales, mins and units of super-blocks (`kernels.k_quants.Parts`), stored byte for byte as in GGUF files.

    Attributes:
        codes: int8 `[out_features, in_features]`.
        scales, mins: int16 `[out_features, groups]`; mins are None where the type has none.
        units: float16 `[out_features, super-blocks, 1 or 2]`.
        name: of the type, in small letters.
    """

    kind: ClassVar[str] = "k_quant"
    codes: Tensor
    scales: Tensor
    mins: Tensor | None
    units: Tensor
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> float:
        return self.shape[0] * (self.shape[1] // SUPER) * k_quants.BYTES[self.name]

    @property
    def parts(self) -> Parts:
        return Parts(self.codes, self.scales, self.mins, self.units)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return k_quants.decoded(self.parts, self.name, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(x.dtype))

    @property
    def description(self) -> str:
        return self.name

    @property
    def scales_rows(self) -> bool:
        return True

    def rows_times(self, scale: Tensor) -> KQuantized:
        return replace(self, units=(self.units.float() * scale[:, None, None]).half())

    def rows(self, which: Tensor | slice) -> KQuantized:
        mins = None if self.mins is None else self.mins[which]
        return replace(self, codes=self.codes[which], scales=self.scales[which], mins=mins, units=self.units[which])

    def to_tensors(self) -> dict[str, Tensor]:
        return {"weight_blocks": k_quants.packed(self.parts, self.name)}

    def scheme(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> KQuantized:
        return cls(*k_quants.unpacked(tensors["weight_blocks"], scheme["name"]), scheme["name"])


class KLinear(RowsLinear):
    """Super-blocks, kept packed.

    Attributes:
        blocks: as stored.
    """

    blocks: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        blocks, self.name = tensors["weight_blocks"], scheme["name"]
        super().__init__(len(blocks), blocks.shape[1] // k_quants.BYTES[self.name] * SUPER)
        self.register_buffer("blocks", blocks, persistent=False)

    def decode(self, rows: slice, dtype: torch.dtype, scratch: cpu.Scratch | None = None) -> Tensor:
        return k_quants.decoded(k_quants.unpacked(self.blocks[rows], self.name), self.name, dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.name}"


class KRows(nn.Module):
    """Rows of super-blocks, kept packed."""

    blocks: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> None:
        super().__init__()
        self.name = scheme["name"]
        self.register_buffer("blocks", tensors["weight_blocks"], persistent=False)

    def forward(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows `[rows, in_features]` of these numbers `[rows]`."""
        return k_quants.decoded(k_quants.unpacked(self.blocks[numbers], self.name), self.name, dtype)


register(KQuantized, KLinear, KRows)
