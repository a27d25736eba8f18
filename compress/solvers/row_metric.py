"""Rows that are not independent: the blocks in which a factor to the left couples them.

Matrices are columns first, `[columns, rows]`. With a metric M (symmetric, in diagonal blocks over the rows) the loss of
a difference δ is `tr(δᵀ H δ M)`; without one, M is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def times_blocks(matrix: Tensor, blocks: Tensor) -> Tensor:
    """`[columns, rows]` times a block-diagonal matrix over the rows, blocks `[count, b, b]`."""
    count, size, _ = blocks.shape
    return torch.bmm(matrix.view(-1, count, size).transpose(0, 1), blocks).transpose(0, 1).reshape(matrix.shape)


def blocks_times(blocks: Tensor, matrix: Tensor) -> Tensor:
    """A block-diagonal matrix over the columns, blocks `[count, b, b]`, times `[columns, rows]`."""
    count, size, _ = blocks.shape
    return torch.bmm(blocks, matrix.view(count, size, -1)).view(matrix.shape)


@dataclass(frozen=True)
class Metric:
    """M as blocks `[count, b, b]`, and its diagonal `[rows]`."""

    blocks: Tensor
    diagonal: Tensor

    @classmethod
    def of(cls, left: Tensor) -> Metric:
        """`Aᵀ A` of the blocks of A."""
        blocks = left.mT @ left
        diagonal = blocks.diagonal(dim1=1, dim2=2).reshape(-1)
        return cls(blocks, diagonal.clamp(min=torch.finfo(diagonal.dtype).tiny))


def settle(change: Tensor, gradient: Tensor, moment: Tensor, metric: Metric | None) -> Tensor:
    """What a change of some columns does to the gradient of others: `change M`.

    All rows of a block move at once, each by what is best for it alone. A block that would be worse off stays as it
    was.

    Args:
        change: `[n, rows]`; overwritten by what is done.
        gradient: `H δ M` of these columns.
        moment: H of these columns `[n, n]`.
    """
    if metric is None:
        return change
    spread = times_blocks(change, metric.blocks)
    gains = (change * (2 * gradient + moment @ spread)).view(len(change), len(metric.blocks), -1).sum((0, 2))
    refused = gains > 0
    if not bool(refused.any()):
        return spread
    change.mul_((~refused).to(change.dtype).repeat_interleave(metric.blocks.shape[1]))
    return times_blocks(change, metric.blocks)
