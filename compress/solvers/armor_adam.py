"""ARMOR as published (arXiv 2510.05528): joint Adam steps, and exact updates of sampled groups of the core.

Of each block (i, j) of the core, one group of four is sampled in every iteration in proportion to the L1 norm of its
gradient, and takes the best of its six pairs. Beyond the paper: the best state is kept, the 2 × 2 systems are damped
relatively, and any second moment will do (the paper's is diagonal).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .armor import Factors, total_loss, weighed
from .row_metric import blocks_times, times_blocks
from .sparse24 import best_pairs_each

RATE = 1e-4
_PATIENCE, _GAIN = 100, 1e-6  # give up after so many iterations that did not lower the loss by this share
_SNAPSHOT = 50  # iterations between two copies of the best state
_TOLD = 20  # iterations between two words on how far it is


def adam(
    factors: Factors, target: Tensor, moment: Tensor, iterations: int, *, rate: float = RATE, groups: bool = True,
    seed: int = 0, passed: Callable[[float], None] = lambda share: None,
) -> tuple[Factors, float, float]:  # fmt: skip
    """Improve all factors at once.

    Args:
        factors: where to start; overwritten.
        target: `Wᵀ` `[columns, rows]`.
        moment: `[columns]` for the paper's loss, `[columns, columns]` for the full one.
        groups: also choose pairs anew, one group a block and iteration.
        seed: of the sampling.
        passed: told now and then what share of the iterations is done.

    Returns:
        The best factors, their loss, and the loss of the start.
    """
    generator = torch.Generator(device=target.device).manual_seed(seed)
    parameters = [factors.a, factors.core, factors.b]
    optimizer = torch.optim.Adam(parameters, lr=rate, fused=True)
    error = target - factors.product()
    initial = lowest = total_loss(error, moment)
    scale = float(torch.linalg.vecdot(weighed(moment, target), target, dim=0).sum())
    if not initial or not scale:  # exact already
        return factors, initial, initial
    keep = factors.core != 0
    best, reference, stale = factors.copy(), initial, 0
    for iteration in range(iterations):
        pull = weighed(moment, error)
        loss = float(torch.linalg.vecdot(pull, error, dim=0).sum())
        if not loss < reference * (1 - _GAIN):
            stale += 1
        else:
            reference, stale = loss, 0
        if (iteration + 1) % _SNAPSHOT == 0 and loss < lowest:
            best, lowest = factors.copy(), loss
        if iteration % _TOLD == 0:
            passed(iteration / iterations)
        if stale >= _PATIENCE:
            break
        for parameter, gradient in zip(parameters, gradients(factors, keep, pull), strict=True):
            parameter.grad = gradient.mul_(2 / scale)
        optimizer.step()
        factors.core.mul_(keep)  # what was kept once still has momentum, as in the published code, but stays out
        error = target - factors.product()
        if groups:
            sampled_groups(factors, keep, error, moment, generator)
            error = target - factors.product()
    loss = total_loss(error, moment)
    if loss < lowest:
        best, lowest = factors, loss
    return best, lowest, initial


def gradients(factors: Factors, keep: Tensor, pull: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Half the derivatives of the loss by A, S (where it is kept) and B, given `H Eᵀ` `[columns, rows]`."""
    count, size, _ = factors.a.shape
    inputs = blocks_times(factors.b.mT, factors.core)
    by_rows = pull.view(-1, count, size).permute(1, 2, 0)
    left = -(by_rows @ inputs.view(-1, count, size).transpose(0, 1))
    core = core_gradient(factors, pull).mul_(keep)
    outputs = times_blocks(factors.core, factors.a.mT)
    wide = len(factors.b), factors.b.shape[1], -1
    right = -(outputs.view(*wide) @ pull.view(*wide).mT)
    return left, core, right


def core_gradient(factors: Factors, pull: Tensor) -> Tensor:
    """With respect to every entry of S, kept or not."""
    return times_blocks(blocks_times(factors.b, pull), factors.a).neg_()


def sampled_groups(factors: Factors, keep: Tensor, error: Tensor, moment: Tensor, generator: torch.Generator) -> None:
    """One sampled group of each block of the core takes its best pair; the core and its pattern are overwritten.

    With a full moment, blocks that share inputs' correlations or rows move at once as if they were alone, which the
    caller's record of the best state makes harmless.
    """
    gradient = core_gradient(factors, weighed(moment, error))
    (down, high, _), (across, wide, _) = factors.b.shape, factors.a.shape
    # [B's block, A's block, group in the block, row in the block]
    scores = gradient.view(down, high // 4, 4, across, wide).abs().sum(2).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    chosen = torch.multinomial(scores + torch.finfo(scores.dtype).tiny, 1, generator=generator)[:, 0]
    block = torch.arange(down * across, device=chosen.device)
    j, i, group, row = block // across, block % across, chosen // wide, chosen % wide
    columns = (j * high + 4 * group)[:, None] + torch.arange(4, device=chosen.device)
    rows = i * wide + row
    right = factors.b[j[:, None], (4 * group)[:, None] + torch.arange(4, device=chosen.device)]
    right = right.view(down, across, 4, high)
    if moment.dim() == 1:
        seen = right * moment.view(down, 1, 1, high)
    else:
        each = torch.arange(down, device=chosen.device)
        seen = right @ moment.view(down, high, down, high)[each, :, each][:, None].to(right.dtype)
    quads = (seen @ right.mT).flatten(0, 1)
    weight = factors.a.square().sum(1)[i, row]
    values = factors.core[columns, rows[:, None]]
    wanted = (quads @ values[..., None])[..., 0] * weight[:, None] - gradient[columns, rows[:, None]]
    found = best_pairs_each(wanted, quads) / weight.clamp(min=1e-30)[:, None]
    factors.core[columns, rows[:, None]] = found
    keep[columns, rows[:, None]] = found != 0
