"""How many latent channels each key and value projection gets.

A share is of a projection's full width. What is distributed are steps of channels, so that kernels see round ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Cost = Callable[[int], float]  # of a rank
FLOOR = 1e-6  # of the largest singular value: smaller ones are rounding, not signal


def log_condition(singular: Tensor) -> float:
    """`ln(σ_max / σ_min)` of singular values, those below the floor left out."""
    values = singular.double()
    largest = values.max()
    if not largest > 0:
        return 0.0
    return float((largest / values[values >= FLOOR * largest].min()).log())


def progressive(conditions: Sequence[float], highest: float, lowest: float) -> list[float]:
    """LoRC's share of each layer (arXiv:2410.03111), from the cumulative condition numbers `κ̃_l = Π_{j≥l} κ_j`.

    `d_l = d_max (1 - (max ln κ̃ - ln κ̃_l) / (max ln κ̃ - min ln κ̃) (1 - d_min / d_max))`: all condition numbers are at
    least one, so shares fall from the first layer, `highest`, to the last, `lowest`.

    Args:
        conditions: `ln κ(W_k) + ln κ(W_v)` of each layer, in order.
    """
    logs = torch.tensor(conditions, dtype=torch.float64).flip(0).cumsum(0).flip(0)
    spread = logs.max() - logs.min()
    if not spread > 0:
        return [highest] * len(conditions)
    return (highest - (logs.max() - logs) / spread * (highest - lowest)).tolist()


def bisected(conditions: Sequence[float], highest: float, ratio: float) -> list[float]:
    """Progressive shares whose mean is `ratio`; all of them smaller where even a lowest of 0 would make it more."""
    low, high = 0.0, highest
    for _ in range(60):
        middle = (low + high) / 2
        shares = progressive(conditions, highest, middle)
        low, high = (middle, high) if sum(shares) / len(shares) < ratio else (low, middle)
    shares = progressive(conditions, highest, (low + high) / 2)
    excess = max(1.0, sum(shares) / len(shares) / ratio)
    return [share / excess for share in shares]


def rounded(
    wanted: Mapping[str, float], steps: Mapping[str, int], widths: Mapping[str, int], cost: Cost, budget: float
) -> dict[str, int]:
    """Ranks as multiples of each projection's step, near what is wanted and within the budget, but for one step each.

    Every projection gets its share rounded down, and the largest remainders are rounded up while the budget lasts.
    """
    ranks = {
        name: min(max(steps[name], int(share / steps[name] + 1e-9) * steps[name]), widths[name])
        for name, share in wanted.items()
    }
    left = budget - sum(cost(rank) for rank in ranks.values())
    for name in sorted(wanted, key=lambda name: (ranks[name] - wanted[name]) / steps[name]):
        more = min(ranks[name] + steps[name], widths[name])
        price = cost(more) - cost(ranks[name])
        if 0 < price <= left + 1e-6:
            ranks[name] = more
            left -= price
    return ranks


def greedy(losses: Mapping[str, Tensor], steps: Mapping[str, int], cost: Cost, budget: float) -> dict[str, int]:
    """The ranks of least total loss within a budget.

    What is lost at a rank falls ever more slowly with it, so taking the step that saves most for what it costs, again
    and again, is optimal up to the last step.

    Args:
        losses: name → `[width + 1]`, what is lost when 0, 1, ..., width channels are kept; convex.
        steps: channels that are given at a time.
        cost: of a rank, in the budget's unit.
        budget: every projection gets one step even beyond it.
    """
    offers: list[tuple[float, str, int, int]] = []
    ranks = {}
    for name, curve in losses.items():
        width, step = len(curve) - 1, steps[name]
        ranks[name] = min(step, width)
        for start in range(ranks[name], width, step):
            end = min(start + step, width)
            offers.append((float(curve[start] - curve[end]) / (end - start), name, start, end))
    left = budget - sum(cost(rank) for rank in ranks.values())
    for _, name, start, end in sorted(offers, key=lambda offer: (-offer[0], offer[2])):
        price = cost(end) - cost(start)
        if start == ranks[name] and price <= left + 1e-6:  # else an earlier step of this one did not fit
            ranks[name] = end
            left -= price
    return ranks
