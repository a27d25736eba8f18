"""Which of several widths each of some weights gets, for the least that a model loses in so many bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

_FEW = 10_000  # combinations


def allocated(
    losses: Mapping[str, Sequence[float]], costs: Mapping[str, Sequence[float]], budget: float
) -> dict[str, int]:
    """The number of the choice that each name gets.

    Choices that a straight line between two others is below are left aside; of the rest, the step that saves most for
    what it costs is taken again and again, which is the optimum for every budget that it passes through. What is left
    in the end goes to the steps that save most of those that still fit. Where combinations are few, all are tried.

    Args:
        losses, costs: name → of each choice.
        budget: of all costs; the cheapest choices are taken even beyond it.
    """
    orders = {name: sorted(range(len(own)), key=own.__getitem__) for name, own in costs.items()}
    losses = {name: [losses[name][number] for number in order] for name, order in orders.items()}
    costs = {name: [costs[name][number] for number in order] for name, order in orders.items()}
    few = math.prod(map(len, costs.values())) <= _FEW
    found = (_tried if few else _allocated)(losses, costs, budget)
    return {name: orders[name][place] for name, place in found.items()}


def _tried(
    losses: Mapping[str, Sequence[float]], costs: Mapping[str, Sequence[float]], budget: float
) -> dict[str, int]:
    """The best of all combinations."""
    every = itertools.product(*(range(len(own)) for own in costs.values()))
    fitting = [
        combination
        for combination in every
        if sum(own[number] for own, number in zip(costs.values(), combination, strict=True)) <= budget
    ] or [(0,) * len(costs)]

    def lost(combination: Iterable[int]) -> float:
        return sum(losses[name][number] for name, number in zip(costs, combination, strict=True))

    return dict(zip(costs, min(fitting, key=lost), strict=True))


def _allocated(
    losses: Mapping[str, Sequence[float]], costs: Mapping[str, Sequence[float]], budget: float
) -> dict[str, int]:
    """The same where costs rise."""
    found = dict.fromkeys(losses, 0)
    left = budget - sum(costs[name][0] for name in losses)
    offers = []
    for name in losses:
        corners = _hull(costs[name], losses[name])
        for start, end in pairwise(corners):
            price = costs[name][end] - costs[name][start]
            offers.append(((losses[name][start] - losses[name][end]) / price, name, start, end))
    for _, name, start, end in sorted(offers, key=lambda offer: (-offer[0], offer[2])):
        price = costs[name][end] - costs[name][start]
        if found[name] == start and price <= left:
            found[name], left = end, left - price
    while True:
        steps = [
            ((losses[name][now] - losses[name][end]) / (costs[name][end] - costs[name][now]), name, end)
            for name, now in found.items()
            for end in range(now + 1, len(costs[name]))
            if 0 < costs[name][end] - costs[name][now] <= left
        ]
        gain, name, end = max(steps, default=(0.0, "", 0))
        if gain <= 0:
            return found
        left -= costs[name][end] - costs[name][found[name]]
        found[name] = end


def _hull(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Numbers of the points on the lower left edge of the convex hull, from the cheapest on."""
    corners = [0]
    for number in range(1, len(costs)):
        if losses[number] >= losses[corners[-1]]:
            continue
        while len(corners) > 1:
            before, last = corners[-2:]
            straight = (losses[before] - losses[number]) / (costs[number] - costs[before])
            if (losses[before] - losses[last]) / (costs[last] - costs[before]) > straight:
                break
            corners.pop()
        corners.append(number)
    return corners
