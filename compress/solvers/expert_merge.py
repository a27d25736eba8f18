"""Experts put together: neurons of dropped experts moved to others (DERN), or whole experts averaged (HC-SMoE).

A neuron of a gated MLP is `d · act(g x) (u x)`: a row of the gate, a row of up, a column of down. Its place in the
expert does not matter, nor does a factor that goes from u to d, nor both their signs; what is compared here is free of
all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ROUNDS = 20  # of k-means at most
ALIGNED = 4096  # neurons up to which experts are aligned: an assignment takes minutes beyond, and wide experts mostly
# come from copies of one MLP, whose neurons stand in the same places already
_TILE = 1024  # neurons compared at a time


class Neurons(NamedTuple):
    """Of an expert, or of several: float32 `[neurons, hidden_size]` each, down transposed."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def rows(self, which: Tensor) -> Neurons:
        return Neurons(*(part[which] for part in self))

    def balanced(self) -> Neurons:
        """The same neurons, with up and down of equal norm."""
        up, down = self.up.norm(dim=1).clamp(min=1e-30), self.down.norm(dim=1).clamp(min=1e-30)
        factor = (down / up).sqrt()[:, None]
        return Neurons(self.gate, self.up * factor, self.down / factor)

    def directions(self) -> Tensor:
        """Unit vectors `[neurons, 2 * hidden_size]`; the gate is left out, which serves better (DERN's ablation)."""
        return torch.nn.functional.normalize(torch.cat(self.balanced()[1:], 1), dim=1)


def joined(parts: Sequence[Neurons]) -> Neurons:
    return Neurons(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def aligned(expert: Neurons, like: Neurons) -> Neurons:
    """An expert's neurons in the order, with the signs and the balance of those that are most like them in another."""
    wanted, own = like.directions(), expert.directions()
    order = torch.arange(len(own))
    if len(own) <= ALIGNED:
        order = torch.as_tensor(linear_sum_assignment((wanted @ own.T).abs().cpu().numpy(), maximize=True)[1])
    signs = torch.where((wanted * own[order]).sum(1, keepdim=True) < 0, -1.0, 1.0)
    chosen = expert.balanced().rows(order)
    balance = (like.up.norm(dim=1) / like.down.norm(dim=1).clamp(min=1e-30)).clamp(min=1e-30).sqrt()[:, None]
    return Neurons(chosen.gate, signs * balance * chosen.up, signs * chosen.down / balance)


def averaged(experts: Sequence[Neurons], weights: Sequence[float]) -> Neurons:
    """The weighted mean of experts, aligned to the first; experts of no weight count nothing, all of none equally."""
    total = sum(weights)
    shares = [weight / total for weight in weights] if total > 0 else [1 / len(experts)] * len(experts)
    parts = [experts[0], *(aligned(expert, experts[0]) for expert in experts[1:])]
    means = (torch.stack([share * part for share, part in zip(shares, column, strict=True)]).sum(0)
             for column in zip(*parts, strict=True))  # fmt: skip
    return Neurons(*means)


def clusters(outputs: Tensor, count: int) -> list[list[int]]:
    """Experts by what they put out on the mean, average linkage, Euclidean (HC-SMoE, arXiv:2410.08589).

    Args:
        outputs: `[experts, hidden_size]`.
    """
    if count >= len(outputs):
        return [[number] for number in range(len(outputs))]
    labels = fcluster(linkage(outputs.double().cpu().numpy(), "average"), count, "maxclust")
    groups = [[n for n, label in enumerate(labels) if label == wanted] for wanted in sorted(set(labels))]
    while len(groups) < count:  # equal distances: split the largest
        largest = max(groups, key=len)
        groups.append([largest.pop()])
    return groups


def redistributed(
    experts: Sequence[Neurons], kept: Sequence[int], importance: Tensor, threshold: float
) -> dict[int, Neurons]:
    """The neurons of dropped experts moved to the kept expert that has the most similar one (DERN, arXiv:2509.10377).

    Args:
        importance: of each expert, spread evenly over its neurons.
        threshold: cosine below which a neuron is dropped with its expert; all are below 1.01, say.

    Returns:
        kept expert → as many neurons as before, for those that received any.
    """
    width = len(experts[0].up)
    dropped = [number for number in range(len(experts)) if number not in kept]
    if not dropped:
        return {}
    targets = torch.cat([experts[number].directions() for number in kept])
    weights = importance.float() / width
    received: dict[int, list[tuple[Neurons, Tensor]]] = {}
    for number in dropped:
        similar = [(part @ targets.T).abs().max(1) for part in experts[number].directions().split(_TILE)]
        best, place = (torch.cat(columns) for columns in zip(*similar, strict=True))
        for position, receiver in enumerate(kept):
            moved = torch.where((best > threshold) & (place // width == position))[0]
            if len(moved):
                part = experts[number].rows(moved), weights[number].expand(len(moved))
                received.setdefault(receiver, []).append(part)
    result = {}
    for receiver, parts in received.items():
        own = experts[receiver], weights[receiver].expand(width)
        neurons, shares = zip(own, *parts, strict=True)
        result[receiver] = condensed(joined(neurons), torch.cat(shares), width)
    return result


def condensed(neurons: Neurons, weights: Tensor, count: int) -> Neurons:
    """`count` neurons that stand for more: spherical k-means, each weighted.

    It starts from the first ones, an expert's own. (DERN's start, those with the largest number in the gate, takes both
    of two that are alike, and leaves none for others.) A cluster's neuron has the mean direction and the mean norm of
    its members, a cluster of one stays as it is.
    """
    weights = weights.clamp(min=1e-12)
    directions, whole = neurons.directions(), neurons.balanced()
    centers = directions[:count]
    place = torch.full((len(weights),), -1)
    for _ in range(ROUNDS):
        similar = directions @ centers.T
        best = similar.abs().argmax(1)
        if torch.equal(best, place):
            break
        place = best
        signs = torch.where(similar.gather(1, place[:, None]) < 0, -1.0, 1.0)
        sums = torch.zeros_like(centers).index_add_(0, place, signs * weights[:, None] * directions)
        alive = sums.norm(dim=1, keepdim=True) > 0
        centers = torch.where(alive, torch.nn.functional.normalize(sums, dim=1), centers)
    total = torch.zeros(count).index_add_(0, place, weights)
    shares = (weights / total[place])[:, None]
    norms = torch.zeros(count, 1).index_add_(0, place, shares * whole.up.norm(dim=1, keepdim=True))
    gate = torch.zeros(count, whole.gate.shape[1]).index_add_(0, place, shares * whole.gate)
    up, down = (torch.nn.functional.normalize(part, dim=1) * norms for part in centers.chunk(2, 1))
    alone = torch.bincount(place, minlength=count)[place] == 1
    up[place[alone]], down[place[alone]] = whole.up[alone], whole.down[alone]
    return Neurons(gate, up, down)
