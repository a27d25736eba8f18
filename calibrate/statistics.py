"""What passes learn from calibration data, per group of linears that read the same input.

With x the input in the reference chain and x̃ in the compressed chain (`docs/architecture.md`), rows being tokens:

    moment = Σ w² x̃ x̃ᵀ            cross = Σ w² (x − x̃) x̃ᵀ

where w is the router's coefficient for an expert's row and 1 elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Tokens for each input with which an expert's moment stands on its own: what other tokens add beyond that made 3-bit
# experts worse (tiny-moe, 256 tokens of calibration: KL .0402 alone, .0395 with 1/8, .0414 with 1/4, .0478 with 1).
ENOUGH = 1 / 8
_BLOCK = 256  # columns of the moment multiplied at a time: large enough for a fast GEMM


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Inside, float32 products on the CPU read inputs that were bfloat16 as such again: products are exact, sums stay
    float32, and processors that multiply bfloat16 are several times as fast. Other inputs are rounded to it, which sums
    over many tokens bear."""
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        settings.fp32_precision = before


@dataclass
class Statistics:
    """Sums over tokens; adding two halves gives the whole.

    Attributes:
        tokens: rows seen.
        moment: float32 `[in_features, in_features]`.
        cross: float32 of the same shape, or None where the reference chain was not carried.
        lent: tokens that were not the expert's own, on which the sums lean since it saw too few.
    """

    tokens: int
    moment: Tensor
    cross: Tensor | None = None
    lent: int = 0

    @classmethod
    def empty(cls, in_features: int, *, cross: bool, device: torch.device | str = "cpu") -> Statistics:
        zeros = torch.zeros(in_features, in_features, device=device)
        return cls(0, zeros, zeros.clone() if cross else None)

    def add(self, x: Tensor, weights: Tensor | None = None, reference: Tensor | None = None) -> None:
        """Accumulate a batch.

        Args:
            x: `[..., in_features]`, the compressed chain's input.
            weights: `[rows]` coefficients, or None for ones.
            reference: like x, the reference chain's input for the same tokens; needed when `cross` is kept.
        """
        rows = x.reshape(-1, x.shape[-1])
        self.tokens += rows.shape[0]
        scale = None if weights is None else weights.to(rows.dtype)[:, None]
        scaled = rows.float() if scale is None else (rows * scale).float()
        with exact_products(x.dtype):
            # The moment is symmetric: only blocks on and right of the diagonal are multiplied.
            for start in range(0, rows.shape[1], _BLOCK):
                span = slice(start, start + _BLOCK)
                self.moment[span, start:].addmm_(scaled[:, span].T, scaled[:, start:])
                self.moment[start + _BLOCK :, span] = self.moment[span, start + _BLOCK :].T
            if self.cross is not None:
                assert reference is not None
                moved = reference.reshape(rows.shape) - rows
                self.cross.addmm_((moved if scale is None else moved * scale).float().T, scaled)

    @property
    def informed(self) -> bool:
        """Whether anything was seen at all."""
        return bool(self.tokens or self.lent)

    def lent_to(self, own: Statistics | None) -> Statistics:
        """These statistics of other tokens, with an expert's own (None: it has none) and of their mean size: they count
        for as many tokens as it takes to have `ENOUGH`."""
        if own is None or not own.tokens:
            return Statistics(0, self.moment, self.cross, self.tokens)
        size, other = float(own.moment.trace()) / own.tokens, float(self.moment.trace()) / self.tokens
        share = (
            max(0.0, ENOUGH * len(own.moment) - own.tokens) / self.tokens * (size / other if size > 0 < other else 1.0)
        )
        own.moment.add_(self.moment, alpha=share)
        if own.cross is not None and self.cross is not None:
            own.cross.add_(self.cross, alpha=share)
        return Statistics(own.tokens, own.moment, own.cross, self.tokens)

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both sets of tokens."""
        cross = None
        if self.cross is not None and other.cross is not None:
            cross = self.cross + other.cross
        return Statistics(self.tokens + other.tokens, self.moment + other.moment, cross)
