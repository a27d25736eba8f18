"""What each expert did on calibration data: how often, with what weight, and how much it put out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.skeleton import Skeleton
from .chains import Chains, Spill

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
        self.weights[expert] += g.sum()
        self.norms[expert] += (sizes / g_safe).sum()
        self.weighted[expert] += sizes.sum()
        if len(g):
            self.peak[expert] = max(float(self.peak[expert]), float((products.abs().amax(1) / g_safe).max()))


@dataclass(frozen=True)
class Sample:
    """Tokens that entered the experts of a block, `[tokens, hidden_size]`, and what every expert makes of all of them,
    without coefficients: `[experts, tokens, hidden_size]`."""

    hidden: Tensor
    outputs: Tensor


def observe_routing(
    skeleton: Skeleton,
    windows: Tensor,
    scratch: Path,
    done: Callable[[int], None],
    inspect: Callable[[int, Sample], None] | None = None,
) -> dict[int, Routing]:
    """Block → what its experts did, for every block that has some, in one pass over the original model.

    Args:
        windows: token ids `[samples, tokens]`.
        scratch: a folder to be made and deleted again; holds the activations of two blocks.
        done: told each block that is behind.
        inspect: given a sample of each block's tokens, if there is something to find out on it.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    chains = Chains(scratch, ("routing",), (*windows.shape, skeleton.config.hidden_size))
    batches = [slice(start, start + chains.batch) for start in range(0, len(windows), chains.batch)]
    target = chains.create(0, "routing")
    for rows in batches:
        target[rows] = skeleton.embed(windows[rows])
    found = {}
    for index in range(skeleton.blocks):
        layer = skeleton.block(index)
        experts = _experts(layer, skeleton.architecture.experts)
        seen = Routing.empty(len(experts)) if experts is not None else None
        handles = [expert.register_forward_hook(_recorder(seen, n)) for n, expert in enumerate(experts or ())]
        runner, source = skeleton.runner(index, layer), chains.read(index, "routing")
        target = chains.create(index + 1, "routing")
        for rows in batches:
            target[rows] = skeleton.run(runner, source[rows])
        for handle in handles:
            handle.remove()
        if seen is not None:
            found[index] = seen
            if inspect is not None:
                inspect(index, _sample(skeleton, runner, experts, source))
        chains.drop(index)
        done(index)
    shutil.rmtree(scratch)
    return found


def _sample(skeleton: Skeleton, runner: Any, experts: Any, source: Spill) -> Sample:
    samples = max(1, SAMPLE_TOKENS // source.shape[1])
    entered: list[Tensor] = []
    handle = experts.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    skeleton.run(runner, source[:samples])
    handle.remove()
    hidden = entered[0].float()
    ones = torch.ones(len(hidden), device=hidden.device)
    with torch.no_grad():
        return Sample(hidden, torch.stack([expert.float()(hidden, ones) for expert in experts]))


def _experts(layer: nn.Module, name: str) -> Any:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


def _recorder(seen: Any, number: int):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, args: tuple[Tensor, Tensor], output: Tensor) -> None:
        seen.add(number, args[1], output)

    return hook
