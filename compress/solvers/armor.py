"""ARMOR's factors: `W ≈ A S B`, A and B block-diagonal, S 2:4 (arXiv 2510.05528), in closed-form steps.

The loss is `tr(E H Eᵀ)`, `E = W - A S B`, for any second moment H; the paper's is the special case of a diagonal H.
Matrices are columns first, `[columns, rows]`: `Eᵀ = Wᵀ - Bᵀ Sᵀ Aᵀ`. Every step is a block of exact coordinate descent.
All but the last iterations start from a point beyond where the one before ended (momentum), which takes half as many of
them to the same loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .row_metric import Metric, blocks_times, times_blocks
from .sparse24 import CHUNK, descend_pairs, top_pairs

_MOMENTUM = 0.8  # share of an iteration's way that the next one goes first
_SETTLING = 0.15  # of the iterations, at the end, which go without: momentum leaves the loss above what is near
_CHECK = 5  # iterations between two looks at the loss
_STALLED = 1e-3  # relative gain between two looks, below which there is no point in going on
_PATIENCE = 3  # looks in a row without it, for with momentum the loss rises at times
_RIDGE = 1e-6  # relative to the mean diagonal of what is inverted

# (values, gradient, moment, metric) of some columns of the core, which it improves in place
CoreStep = Callable[[slice, Tensor, Tensor, Tensor, Metric], None]


@dataclass
class Factors:
    """A `[blocks, b, b]` over the rows, S `[columns, rows]`, B `[blocks, b, b]` over the columns."""

    a: Tensor
    core: Tensor
    b: Tensor

    @classmethod
    def start(cls, target: Tensor, importance: Tensor, rows: int, columns: int) -> Factors:
        """`A = B = I` and the target's own values where `target² importance` is largest (NoWag-P's or Wanda's mask).

        Args:
            target: `[columns, rows]`.
            importance: `[columns]`, the diagonal of the moment.
            rows, columns: block sizes.
        """
        keep = top_pairs(target.square() * importance[:, None])
        eye = [torch.eye(n, dtype=target.dtype, device=target.device) for n in (rows, columns)]
        a, b = eye[0].repeat(target.shape[1] // rows, 1, 1), eye[1].repeat(target.shape[0] // columns, 1, 1)
        return cls(a, target * keep, b)

    def product(self) -> Tensor:
        """`(A S B)ᵀ`."""
        return times_blocks(blocks_times(self.b.mT, self.core), self.a.mT)

    def copy(self) -> Factors:
        return Factors(self.a.clone(), self.core.clone(), self.b.clone())

    def beyond(self, before: Factors) -> Factors:
        """Some way farther in the direction that led here; values of the core whose place is new stay."""
        way = 1 + _MOMENTUM
        core = torch.where((self.core != 0) & (before.core != 0), before.core.lerp(self.core, way), self.core)
        return Factors(before.a.lerp(self.a, way), core, before.b.lerp(self.b, way))


def weighed(moment: Tensor, matrix: Tensor, part: slice = slice(None)) -> Tensor:
    """Some rows of `H matrix`; H is `[columns, columns]`, or its diagonal `[columns]`."""
    if moment.dim() == 1:
        return moment[part, None] * matrix[part]
    return (moment[part] @ matrix.to(moment.dtype)).to(matrix.dtype)


def square_part(moment: Tensor, part: slice, dtype: torch.dtype) -> Tensor:
    """H of some columns, `[n, n]`."""
    return (torch.diag(moment[part]) if moment.dim() == 1 else moment[part, part]).to(dtype)


def roots(metric: Tensor, size: int) -> Tensor:
    """R with `Rᵀ R` the diagonal blocks of a metric over the rows, `[blocks, size, size]`."""
    blocks = metric.view(len(metric) // size, size, -1, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return torch.linalg.cholesky(blocks.double()).mT.to(metric.dtype)


def total_loss(error: Tensor, moment: Tensor) -> float:
    return float(torch.linalg.vecdot(weighed(moment, error), error, dim=0).double().sum())


def alternate(
    factors: Factors,
    target: Tensor,
    moment: Tensor,
    iterations: int,
    passed: Callable[[float], None] = lambda share: None,
) -> tuple[Factors, float, float]:
    """Improve A, then B and the core chunk by chunk, in turns; the best state seen is kept.

    Args:
        factors: where to start.
        target: `Wᵀ` `[columns, rows]`.
        moment: H, damped; in bfloat16, gradients of B and the core are computed in bfloat16.
        passed: told now and then what share of the iterations is done.

    Returns:
        The factors, their loss, and the loss of the start.
    """
    error = target - factors.product()
    initial = lowest = total_loss(error, moment)
    best = before = factors
    factors, settling, idle = factors.copy(), False, 0
    for iteration in range(iterations):
        settling = settling or iteration >= min((1 - _SETTLING) * iterations, iterations - 1)
        if iteration and not settling:
            before, factors = factors, factors.beyond(before)
            error = target - factors.product()
        step_a(factors, error, moment)
        round_of_chunks(factors, error, moment, choose_pairs)
        if (iteration + 1) % _CHECK == 0 or iteration + 1 == iterations:
            error = target - factors.product()  # also sheds the rounding of many updates
            loss = total_loss(error, moment)
            passed((iteration + 1) / iterations)
            idle = idle + 1 if loss >= lowest * (1 - _STALLED) else 0
            if loss < lowest:
                best, lowest = factors.copy(), loss
            if settling and idle:
                break
            if idle == _PATIENCE:  # from the best there was, without momentum
                factors, settling, idle = best.copy(), True, 0
                error = target - factors.product()
    return best, lowest, initial


def choose_pairs(part: slice, values: Tensor, gradient: Tensor, moment: Tensor, metric: Metric) -> None:
    """The core step that chooses pairs and values anew."""
    descend_pairs(values, gradient, moment, metric)


def step_a(factors: Factors, error: Tensor, moment: Tensor) -> None:
    """`A_i += E_i H C_iᵀ (C_i H C_iᵀ)⁻¹` with `C = S B`, for all blocks at once; the error follows."""
    count, size, _ = factors.a.shape
    inputs = blocks_times(factors.b.mT, factors.core)  # Cᵀ
    seen = weighed(moment.float() if moment.dim() == 2 else moment, inputs)
    by_block = seen.view(-1, count, size).transpose(0, 1)  # [blocks, columns, b]
    square = damped(inputs.view(-1, count, size).permute(1, 2, 0) @ by_block)
    slope = error.view(-1, count, size).permute(1, 2, 0) @ by_block
    change = torch.linalg.solve(square, slope, left=False)
    factors.a += change
    error -= times_blocks(inputs, change.mT)


def round_of_chunks(
    factors: Factors, error: Tensor, moment: Tensor, core_step: CoreStep, *, move_b: bool = True, chunk: int = CHUNK
) -> None:
    """B's blocks and the core's columns, a chunk of columns at a time; the error follows.

    One product `H E` serves both: within a chunk, gradients are kept up to date.
    """
    size = factors.b.shape[1]
    metric = Metric.of(factors.a)
    span = size * max(1, chunk // size)
    coarse = error if moment.dim() == 1 else error.to(moment.dtype)
    for start in range(0, len(error), span):
        part = slice(start, min(start + span, len(error)))
        blocks = slice(start // size, part.stop // size)
        own = square_part(moment, part, error.dtype)
        gradient = weighed(moment, coarse, part).to(error.dtype)  # of the error, that is -H δ
        if move_b:
            step_b(factors, blocks, error[part], gradient, own, part)
        right, values = factors.b[blocks], factors.core[part]
        moved = blocks_times(right, own).T.contiguous()
        seen = blocks_times(right, moved)  # B H Bᵀ
        slope = times_blocks(blocks_times(right, gradient), factors.a).neg_()
        before = values.clone()
        core_step(part, values, slope, seen, metric)
        error[part] -= times_blocks(blocks_times(right.mT, values - before), factors.a.mT)
        if coarse is not error:
            coarse[part] = error[part]


def step_b(factors: Factors, blocks: slice, error: Tensor, gradient: Tensor, moment: Tensor, part: slice) -> None:
    """`B_j += P_j⁻¹ (A S_j)ᵀ (E H)_j H_jj⁻¹`, `P_j = (A S_j)ᵀ A S_j`, one block after another.

    Args:
        error, gradient: of the chunk's columns; both follow.
        moment: H of the chunk's columns.
    """
    size = factors.b.shape[1]
    outputs = times_blocks(factors.core[part], factors.a.mT)  # (A S)ᵀ
    for number, start in enumerate(range(0, len(error), size)):
        block = slice(start, start + size)
        own = outputs[block]
        change = torch.linalg.solve(damped(own @ own.T), own @ gradient[block].T)
        change = torch.linalg.solve(damped(moment[block, block]), change, left=False)
        factors.b[blocks.start + number] += change
        moved = change.T @ own
        error[block] -= moved
        gradient.addmm_(moment[:, block], moved, alpha=-1)


def damped(square: Tensor) -> Tensor:
    """`[..., n, n]` with a ridge that keeps it invertible, whatever was pruned."""
    mean = square.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    tiny = torch.finfo(square.dtype).tiny
    return square + (_RIDGE * mean + tiny) * torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)
