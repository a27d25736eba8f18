"""What passes learn from calibration data, per group of linears that read the same input.

With x the input in the reference chain and x̃ in the compressed chain (`docs/architecture.md`), rows being tokens:

    moment = Σ w² x̃ x̃ᵀ            cross = Σ w² (x − x̃) x̃ᵀ            peak = max |x̃|

where w is the router's coefficient for an expert's row, the root of what tokens at its place count for where it is
known what errors cost the model, and 1 elsewhere. `sample` is a few of the rows, an expert's times its coefficients.
`held_moment` and `held_cross` are the same sums over a part of the tokens, by which what was fitted to the others can
be judged. Another kind is a row of `KINDS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime import processes

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


SAMPLE = 256  # rows of a sample
HELD = 1 / 4  # of the rows of a batch, which are other windows than the rest where it has several


class Inputs(NamedTuple):
    """A batch of what enters some linears, `[rows, in_features]` each.

    Attributes:
        rows: of the compressed chain, as they come; weighed: the same times w, float32.
        moved: by how much the reference chain's differ, times w, float32; None without that chain.
        coefficients: the router's, `[rows, 1]`, of an expert.
    """

    rows: Tensor
    weighed: Tensor
    moved: Tensor | None
    coefficients: Tensor | None

    @property
    def routed(self) -> Tensor:
        """The rows as a mixture adds them up, float32."""
        return self.rows.float() if self.coefficients is None else (self.rows * self.coefficients).float()

    def held(self) -> Inputs:
        """The rows that are held out, the last ones."""
        rest = slice(len(self.rows) - round(HELD * len(self.rows)), None)
        parts = (None if part is None else part[rest] for part in (self.moved, self.coefficients))
        return Inputs(self.rows[rest], self.weighed[rest], *parts)


@dataclass(frozen=True)
class Kind:
    """A statistic over tokens, float32 `[rows, in_features]`.

    Attributes:
        add: takes a batch into it, in place.
        join: takes another's into it in place, times a share where it is a sum.
        across: takes in those that other processes found, in place.
        divide: makes it, in place, that of inputs that are divided by a scale `[in_features]`.
        work: multiplications it takes, as a share of those of all tokens times the square of `in_features`.
        rows: None for as many as columns; 0 for a vector `[in_features]`.
        paired: whether it serves to compare the two chains.
    """

    add: Callable[[Tensor, Inputs], None]
    join: Callable[[Tensor, Tensor, float], None]
    across: Callable[[Tensor], object]
    divide: Callable[[Tensor, Tensor], object]
    work: float
    rows: int | None = None
    paired: bool = False

    def shape(self, in_features: int) -> tuple[int, ...]:
        if self.rows is None:
            return in_features, in_features
        return (self.rows, in_features) if self.rows else (in_features,)

    def nbytes(self, in_features: int) -> float:
        return 4.0 * math.prod(self.shape(in_features))


def _add_moment(sums: Tensor, inputs: Inputs) -> None:
    x = inputs.weighed
    for start in range(0, x.shape[1], _BLOCK):  # symmetric: only blocks on and right of the diagonal are multiplied
        span = slice(start, start + _BLOCK)
        sums[span, start:].addmm_(x[:, span].T, x[:, start:])
        sums[start + _BLOCK :, span] = sums[span, start + _BLOCK :].T


def _add_cross(sums: Tensor, inputs: Inputs) -> None:
    assert inputs.moved is not None
    sums.addmm_(inputs.moved.T, inputs.weighed)


def _add_held_moment(sums: Tensor, inputs: Inputs) -> None:
    _add_moment(sums, inputs.held())


def _add_held_cross(sums: Tensor, inputs: Inputs) -> None:
    _add_cross(sums, inputs.held())


def _add_peak(sums: Tensor, inputs: Inputs) -> None:
    if len(inputs.rows):
        torch.maximum(sums, inputs.rows.abs().amax(0).float(), out=sums)


def _add_sample(sums: Tensor, inputs: Inputs) -> None:
    _fill(sums, inputs.routed)


def _fill(sums: Tensor, rows: Tensor, share: float = 1.0) -> None:
    """Put some of the rows where there is still room.

    They are drawn by chance: the first tokens of windows, which are unlike others, come at even distances.
    """
    room = (sums == 0).all(1).nonzero()[:, 0]
    rows = rows[rows.any(1)] if len(room) else rows[:0]
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: len(room)].sort().values
    sums[room[: len(drawn)]] = rows[drawn.to(rows.device)]


def _sum(own: Tensor, other: Tensor, share: float) -> None:
    own.add_(other, alpha=share)


def _larger(own: Tensor, other: Tensor, share: float) -> None:
    torch.maximum(own, other, out=own)


def _fill_across(sums: Tensor) -> None:
    for part in processes.gathered(sums)[1:]:
        _fill(sums, part)
    sums.copy_(processes.shared(sums))


def _both_sides(sums: Tensor, scale: Tensor) -> None:
    sums.div_(scale[:, None]).div_(scale)


KINDS: Mapping[str, Kind] = {
    "moment": Kind(_add_moment, _sum, processes.summed, _both_sides, 1 / 2),
    "cross": Kind(_add_cross, _sum, processes.summed, _both_sides, 1.0, paired=True),
    # Of no use but to judge what follows from cross.
    "held_moment": Kind(_add_held_moment, _sum, processes.summed, _both_sides, HELD / 2, paired=True),
    "held_cross": Kind(_add_held_cross, _sum, processes.summed, _both_sides, HELD, paired=True),
    "peak": Kind(_add_peak, _larger, processes.largest, Tensor.div_, 0.0, rows=0),
    "sample": Kind(_add_sample, _fill, _fill_across, Tensor.div_, 0.0, rows=SAMPLE),
}
UNPAIRED = frozenset(name for name, kind in KINDS.items() if not kind.paired)


def paired(kinds: Collection[str]) -> bool:
    """Whether one of some kinds (other names do not count) compares the two chains."""
    return any(KINDS[name].paired for name in KINDS if name in kinds)


@dataclass
class Statistics:
    """Statistics over tokens; joining those of two halves gives those of the whole.

    Attributes:
        tokens: rows seen.
        sums: kind (`KINDS`) → what was found.
        lent: tokens that were not the expert's own, on which they lean since it saw too few.
    """

    tokens: int
    sums: dict[str, Tensor]
    lent: int = 0

    @classmethod
    def empty(cls, in_features: int, kinds: Collection[str], device: torch.device | str = "cpu") -> Statistics:
        shapes = {name: kind.shape(in_features) for name, kind in KINDS.items() if name in kinds}
        return cls(0, {name: torch.zeros(shape, device=device) for name, shape in shapes.items()})

    @property
    def moment(self) -> Tensor:
        return self.sums["moment"]

    @property
    def cross(self) -> Tensor | None:
        return self.sums.get("cross")

    def add(
        self,
        x: Tensor,
        weights: Tensor | None = None,
        reference: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        """Accumulate a batch.

        Args:
            x: `[..., in_features]`, the compressed chain's input.
            weights: `[rows]` coefficients, or None for ones.
            reference: like x, the reference chain's input for the same tokens; needed by kinds that are paired.
            counts: what tokens at each place of a window count for, of rows that are whole windows; default: one.
        """
        rows = x.reshape(-1, x.shape[-1])
        self.tokens += rows.shape[0]
        scale = None if weights is None else weights.to(rows.dtype)[:, None]
        weighed = rows.float() if scale is None else (rows * scale).float()
        moved = None
        if reference is not None and paired(self.sums):
            moved = reference.reshape(rows.shape) - rows
            moved = (moved if scale is None else moved * scale).float()
        if counts is not None:
            roots = counts.sqrt().repeat(len(rows) // len(counts))[:, None]
            weighed = weighed.mul_(roots) if rows.dtype != torch.float32 else weighed * roots
            moved = None if moved is None else moved.mul_(roots)
        with exact_products(x.dtype):
            for name, sums in self.sums.items():
                KINDS[name].add(sums, Inputs(rows, weighed, moved, scale))

    @property
    def met(self) -> bool:
        """Whether they are of any token at all."""
        return bool(self.tokens or self.lent)

    @property
    def informed(self) -> bool:
        """Whether there is a second moment, of anything at all."""
        return "moment" in self.sums and self.met

    def lent_to(self, own: Statistics) -> Statistics:
        """These statistics of other tokens, with an expert's own, if it has any, and of their mean size: they count
        for as many tokens as it takes to have `ENOUGH`."""
        if not own.tokens:
            return Statistics(0, self.sums, self.tokens)
        width = next(iter(self.sums.values())).shape[-1]
        share = max(0.0, ENOUGH * width - own.tokens) / self.tokens
        if "moment" in self.sums:
            size, other = float(own.moment.trace()) / own.tokens, float(self.moment.trace()) / self.tokens
            share *= size / other if size > 0 < other else 1.0
        own.join(self, share)
        return Statistics(own.tokens, own.sums, self.tokens)

    def join(self, other: Statistics, share: float = 1.0) -> None:
        """Take in those of other tokens, which are not counted where they have a share only."""
        for name, sums in self.sums.items():
            KINDS[name].join(sums, other.sums[name], share)

    def across(self) -> None:
        """Take in what other processes found of their tokens."""
        self.tokens = sum(processes.gathered(self.tokens))
        for name, sums in self.sums.items():
            KINDS[name].across(sums)

    def divide(self, scale: Tensor) -> None:
        """Become those of inputs that are divided by a scale `[in_features]`."""
        for name, sums in self.sums.items():
            KINDS[name].divide(sums, scale.to(sums.device))
