"""Scales of channels that make rounding the weights that read them cost less.

With scales s, columns of the weights are multiplied by s and inputs divided, which changes nothing until weights are
rounded. A group of a row is rounded in steps that are a share of its range, and an error of weight j costs by the
energy of input j, so that what rounding costs is, up to a factor that has no part in it,

    f(s) = Σ_groups [Σ_rows range_j(w_j s_j)²] [Σ_j e_j / s_j²]

Where every weight is rounded on its own, e is the diagonal of the second moment. Where columns that follow make up for
what rounding one costs (GPTQ), it is what is left of that input once those are known, `1 / U_jj²` with `H⁻¹ = Uᵀ U`.
Ranges are largest entries, so that in log s each bracket is a sum of exponentials of convex functions, and f is convex:
descent finds the best scales there are. AWQ (arXiv:2306.00978) takes the best of twenty candidates, powers of the mean
inputs over those of the mean weights, by what rounding does to the outputs.

Where inputs x are rounded too, a token at a time in as many steps, that costs

    [Σ_tokens max_j (x_j / s_j)²] [Σ_rows Σ_j (w_j s_j)²]

more, which is convex as well. SmoothQuant (arXiv:2211.10438) has one form of scales for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import by_group

_POWERS = 11  # of the inputs' sizes, from 0 to 1, the best of which is where descent begins
_STEPS, _RATE = 60, 0.05  # of Adam on log s


@dataclass(frozen=True)
class Reader:
    """Weights that read one input.

    Attributes:
        weight: float32 `[rows, columns]`, or some of the rows.
        energy: e `[columns]`.
        group_size: columns that are rounded in the same steps; -1: a row.
        symmetric: whether a range is twice the largest magnitude; else from the lowest (or 0) to the highest (or 0).
        inputs: `[tokens, columns]`, where they are rounded in steps as many as those of the weights; a sample of them.
        times: how many tokens each of these stands for.
    """

    weight: Tensor
    energy: Tensor
    group_size: int
    symmetric: bool
    inputs: Tensor | None = None
    times: float = 1.0

    def cost(self, scale: Tensor) -> Tensor:
        """f for scales of the columns."""
        pieces = by_group(self.weight * scale, self.group_size)
        highest, lowest = pieces.amax(2).clamp(min=0), pieces.amin(2).clamp(max=0)
        spans = highest.maximum(-lowest) if self.symmetric else highest - lowest
        seen = by_group((self.energy / scale.square())[None], self.group_size)[0].sum(1)
        cost = spans.square().sum(0) @ seen
        if self.inputs is not None:
            tops = (self.inputs / scale).abs().amax(1).square().sum()
            cost = cost + self.times * tops * (self.weight.square().sum(0) @ scale.square())
        return cost


def some_rows(weight: Tensor, most: int) -> Tensor:
    """At most so many rows, evenly spaced, as float32."""
    return weight[:: -(-len(weight) // most)].float()


def conditional_energy(factor: Tensor, order: Tensor) -> Tensor:
    """What is left of the energy of each input once those that come after it in the order are known.

    Args:
        factor, order: of a `System`.
    """
    found = torch.empty(len(order), dtype=torch.float32, device=factor.device)
    found[order] = factor.diagonal().float().square().reciprocal()
    return found


def best_scales(readers: Sequence[Reader], channels: int, columns: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
    """The scales of least cost, and what share of the cost without any is left.

    Args:
        channels: that have a scale.
        columns: a number for each channel → one for each column of the readers, which all have the same columns.

    Returns:
        `[channels]` with a geometric mean of one, and a number that is not above one.
    """
    size = _sizes(readers, channels, columns)

    def cost(logs: Tensor) -> Tensor:
        return torch.stack([reader.cost(columns(logs.exp())) for reader in readers]).sum()

    tried = [size * power for power in torch.linspace(0, 1, _POWERS).tolist()]
    costs = [float(cost(logs)) for logs in tried]
    first, lowest = costs[0], min(costs)
    if not 0 < first < float("inf"):
        return torch.ones_like(size), 1.0
    best = tried[costs.index(lowest)]
    logs = best.clone().requires_grad_(True)
    adam = torch.optim.Adam([logs], _RATE, foreach=False)
    for step in range(_STEPS):
        with torch.enable_grad():
            value = cost(logs)
        [logs.grad] = torch.autograd.grad(value / first, logs)
        if float(value.detach()) < lowest:
            best, lowest = logs.detach().clone(), float(value.detach())
        adam.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
        adam.step()
    return (best - best.mean()).exp(), lowest / first


def _sizes(readers: Sequence[Reader], channels: int, columns: Callable[[Tensor], Tensor]) -> Tensor:
    """Half the logarithm of each channel's energy, of all readers and columns together."""
    energy = torch.stack([reader.energy for reader in readers]).sum(0)
    numbers = torch.arange(channels, dtype=torch.float32, device=energy.device)
    found = torch.zeros(channels, device=energy.device).index_add_(0, columns(numbers).long(), energy)
    return found.clamp(min=1e-6 * float(found.max()) + torch.finfo(found.dtype).tiny).log() / 2
