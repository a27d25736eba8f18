"""Which inputs of a linear can go, and what the others make up for (optimal brain surgeon, in groups)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...calibrate.refit import damped_inverse


def eliminated(
    weight: Tensor, moment: Tensor, keep: int, ridge: float, metric: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The columns that stay of a linear, and its weight with those only, `[rows, keep]`.

    With H the damped moment, leaving out column j costs `w_jᵀ M w_j / [H⁻¹]_jj` once all others have made up for it,
    which they do alike by any metric M. The cheapest sixteenth of what is still to go is left out at a time, and costs
    are counted anew.

    Args:
        weight: `[rows, columns]`.
        moment: `[columns, columns]`.
        ridge: what is added to the diagonal.
        metric: `[rows, rows]`, what errors of the outputs cost; None: all the same.
    """
    inverse = damped_inverse(moment, ridge)
    left, numbers = weight.double(), torch.arange(weight.shape[1])
    priced = left if metric is None else metric.double() @ left
    while len(numbers) > keep:
        costs = (left * priced).sum(0) / inverse.diagonal()
        excess = len(numbers) - keep
        gone = costs.topk(max(1, excess // 16), largest=False).indices
        stays = torch.ones(len(numbers), dtype=torch.bool, device=gone.device)
        stays[gone] = False
        lifted = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stays])
        whole = left is priced
        left = left[:, stays] - left[:, gone] @ lifted
        priced = left if whole else priced[:, stays] - priced[:, gone] @ lifted
        inverse = inverse[stays][:, stays] - inverse[stays][:, gone] @ lifted
        numbers = numbers[stays.cpu()]
    return numbers, left.to(weight.dtype)


def strongest(weight: Tensor, moment: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """As `eliminated`: the columns of largest `E[x_j²] ‖w_j‖²`, as they are."""
    scores = moment.diagonal() * weight.float().square().sum(0)
    numbers = scores.topk(keep).indices.sort().values
    return numbers, weight[:, numbers]
