"""What each expert did on calibration data: how often, with what weight, and how much it put out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..runtime.model.experts import Experts
from ..runtime.model.skeleton import Skeleton
from .drive import drive

if TYPE_CHECKING:
    from .folders import RoutingFolder

SAMPLE_TOKENS = 2048  # that are given to every expert


@dataclass
class Routing:
    """Sums over the tokens that the router sent to each expert of a block, float64 `[experts]`.

    g is the coefficient that really multiplies an expert's output f: renormalized, scaled and free of biases.

    Attributes:
        tokens: how many.
        weights: `Σ g`.
        norms: `Σ ‖f‖`.
        weighted: `Σ g ‖f‖`.
        peak: the largest absolute number in any f.
    """

    tokens: Tensor
    weights: Tensor
    norms: Tensor
    weighted: Tensor
    peak: Tensor

    @classmethod
    def empty(cls, experts: int) -> Routing:
        return cls(*(torch.zeros(experts, dtype=torch.float64) for _ in range(5)))

    def add(self, expert: int, weights: Tensor, outputs: Tensor) -> None:
        """Some tokens of an expert.

        Args:
            weights: g `[tokens]`.
            outputs: g f `[tokens, hidden_size]`.
        """
        g, products = weights.double(), outputs.double()
        sizes = products.norm(dim=1)
        g_safe = g.abs().clamp(min=torch.finfo(torch.float32).tiny)
        self.tokens[expert] += len(g)
        self.weights[expert] += float(g.sum())
        self.norms[expert] += float((sizes / g_safe).sum())
        self.weighted[expert] += float(sizes.sum())
        if len(g):
            self.peak[expert] = max(float(self.peak[expert]), float((products.abs().amax(1) / g_safe).max()))


@torch.no_grad()
def expert_outputs(experts: Iterable[Any], hidden: Tensor) -> Tensor:
    """What each expert makes of all tokens `[tokens, hidden_size]`, without coefficients:
    `[experts, tokens, hidden_size]`, float32."""
    members = list(experts)
    result = torch.empty(len(members), *hidden.shape, device=hidden.device)
    for number, expert in enumerate(members):
        result[number] = expert_output(expert, hidden)
    return result


@torch.no_grad()
def expert_output(expert: Any, hidden: Tensor) -> Tensor:
    """One expert for all tokens, `[tokens, hidden_size]`, its weights in float32 for as long."""
    ones = torch.ones(len(hidden), device=hidden.device)
    output: Tensor = copy.deepcopy(expert).float()(hidden.float(), ones)
    return output


def chosen(router: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients and indices of the experts that a router sends tokens `[tokens, hidden_size]` to, `[tokens, top_k]`.

    transformers' routers return three tensors, scores of all experts among them: the indices come last or, in some
    releases, first, and the coefficients always between.
    """
    first, weights, last = router(hidden)
    return weights, first if last.is_floating_point() else last


def observe_routing(
    skeleton: Skeleton, windows: Tensor, scratch: Path, kept: RoutingFolder, done: Callable[[int], None]
) -> None:
    """What the experts of every block do, in one pass over the original model; goes on where it was interrupted.

    Args:
        windows: token ids `[samples, tokens]`.
        scratch: a folder for the activations of two blocks, deleted at the end.
        kept: gets each block's sums, and the first 2,048 of the tokens that entered its experts.
        done: told each block that is behind.
    """
    for index, blocks, _ in drive({"routing": skeleton}, windows, scratch):
        experts = experts_of(skeleton, blocks["routing"].layer)
        seen, entered = Routing.empty(len(experts or ())), list[Tensor]()
        handles = [expert.register_forward_hook(_recorder(seen, n)) for n, expert in enumerate(experts or ())]
        if experts is not None:
            handles.append(experts.register_forward_pre_hook(_keeper(entered)))
        blocks["routing"].carry()
        for handle in handles:
            handle.remove()
        if experts is not None:
            kept.save(index, seen, torch.cat(entered))
        done(index)
    kept.finish(index for index in range(skeleton.blocks) if experts_of(skeleton, skeleton.layers[index]))


def experts_of(skeleton: Skeleton, layer: nn.Module) -> Experts | None:
    """The routed experts of a block, if it has any."""
    try:
        found = layer.get_submodule(skeleton.family.experts.where)
    except AttributeError:
        return None
    assert isinstance(found, Experts)
    return found


def _recorder(seen: Any, number: int):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, args: tuple[Tensor, Tensor], output: Tensor) -> None:
        seen.add(number, args[1], output)

    return hook


def _keeper(entered: list[Tensor]):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        missing = SAMPLE_TOKENS - sum(map(len, entered))
        if missing > 0:
            entered.append(args[0][:missing].float())

    return hook
