"""Which experts together stand best for all of them (NAEE, arXiv:2402.14800)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Route = Callable[[Sequence[int]], tuple[Tensor, Tensor]]  # experts there are → coefficients and places among them
MOST = 1000  # subsets that are all tried


def mixed(route: Route, outputs: Tensor, numbers: Sequence[int]) -> Tensor:
    """What a block's experts put out when only some are there, `[tokens, hidden_size]`.

    Args:
        route: as the router chooses among those: `[tokens, top_k]` coefficients and indices into `numbers`.
        outputs: of every expert for every token, `[experts, tokens, hidden_size]`.
    """
    weights, places = route(numbers)
    chosen = torch.as_tensor(numbers, device=outputs.device)[places]
    tokens = torch.arange(outputs.shape[1], device=outputs.device)[:, None]
    return torch.einsum("tkh,tk->th", outputs[chosen, tokens].float(), weights.float())


def subset_losses(route: Route, outputs: Tensor, subsets: Sequence[Sequence[int]]) -> list[float]:
    """`‖F(X) - F_C(X)‖²` for each subset C."""
    whole = mixed(route, outputs, range(len(outputs)))
    return [float((mixed(route, outputs, numbers) - whole).double().square().sum()) for numbers in subsets]


def few_enough(count: int, keep: int, groups: int) -> bool:
    """Whether all subsets are tried."""
    return math.comb(count // groups, keep // groups) ** groups <= MOST


def best_subset(route: Route, outputs: Tensor, keep: int, groups: int = 1) -> tuple[int, ...]:
    """The `keep` experts, as many of each group, that come nearest to all of them: of all subsets where these are few,
    else one expert after the other goes, the one that is missed least."""
    count = len(outputs)
    if few_enough(count, keep, groups):
        size = count // groups
        parts = [
            list(itertools.combinations(range(start, start + size), keep // groups)) for start in range(0, count, size)
        ]
        subsets = [tuple(itertools.chain(*choice)) for choice in itertools.product(*parts)]
        losses = subset_losses(route, outputs, subsets)
        return subsets[losses.index(min(losses))]
    left = tuple(range(count))
    while len(left) > keep:
        subsets = [tuple(n for n in left if n != gone) for gone in left]
        losses = subset_losses(route, outputs, subsets)
        left = subsets[losses.index(min(losses))]
    return left
