"""What each expert did on calibration data: how often, with what weight, and how much it put out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..runtime import processes
from ..runtime.model.drafting import Drafter, drafters
from ..runtime.model.experts import Experts
from ..runtime.model.skeleton import Skeleton
from .chains import Chains
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

    def across(self) -> None:
        """Take in what other processes found of their tokens."""
        for sums in (self.tokens, self.weights, self.norms, self.weighted):
            processes.summed(sums)
        processes.largest(self.peak)


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
        kept: gets each block's sums, and the first 2,048 of the tokens that entered its experts; those of layers that
            draft tokens, too.
        done: told each block that is behind.
    """
    further = drafters(skeleton)
    for index, blocks, chains in drive({"routing": skeleton}, windows, scratch):
        block = blocks["routing"]
        _observed(skeleton, block.layer, block.carry, partial(kept.save, index))
        for number in further if index == skeleton.blocks - 1 else ():
            drafter = Drafter(skeleton, number)
            _observed(
                skeleton,
                drafter.layer,
                partial(_draft, drafter, chains, skeleton.blocks, windows),
                partial(kept.save, number),
            )
        done(index)
    inside = [index for index in range(skeleton.blocks) if experts_of(skeleton, skeleton.layers[index])]
    kept.finish([*inside, *further])


def _draft(drafter: Drafter, chains: Chains, blocks: int, windows: Tensor) -> None:
    """Run a layer that drafts tokens over what left the last block."""
    hidden = chains.read(blocks, "routing")
    for rows in chains.batches():
        drafter.run(hidden[rows], windows[rows])


def _observed(skeleton: Skeleton, layer: nn.Module, run: Callable[[], object], save: Callable[..., None]) -> None:
    """Run a layer over the text, and save what its experts did, if it has any."""
    experts = experts_of(skeleton, layer)
    if experts is None:
        run()
        return
    seen, entered = Routing.empty(len(experts)), list[Tensor]()
    handles = [expert.register_forward_hook(_recorder(seen, n)) for n, expert in enumerate(experts)]
    handles.append(experts.register_forward_pre_hook(_keeper(entered)))
    run()
    for handle in handles:
        handle.remove()
    seen.across()
    save(seen, torch.cat(processes.gathered(torch.cat(entered)))[:SAMPLE_TOKENS])


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


def routed_share(skeleton: Skeleton, linears: Iterable[str]) -> float:
    """Of tokens, how many a routed expert sees on the average.

    Args:
        linears: disk names, those of all experts of a block or of several among them.
    """
    numbers = {skeleton.family.expert(name) for name in linears} - {None}
    return skeleton.experts_per_token / len(numbers) if numbers else 1.0
