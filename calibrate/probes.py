"""How errors of single linears move a block's output: the Gauss-Newton metric, by random probes.

With `y` the block's output and `k` what a linear puts out for a token, an error `e` of k moves y by `J e` to first
order; `M = E[Jᵀ J]` says how much in the mean. For a probe v of independent standard normal numbers,
`E[(Jᵀ v)(Jᵀ v)ᵀ] = Jᵀ J`, and `Jᵀ v` is one backward pass. It sees all that is between: norms of heads, rotary
embedding, softmax, output projection, MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.model.skeleton import Skeleton

PROBES = 4  # backward passes for each token


def output_metrics(
    skeleton: Skeleton, runner: Any, hidden: Tensor, names: Sequence[str], seed: int = 0
) -> list[Tensor]:
    """M of each linear, float32 `[out_features, out_features]`, the mean over tokens.

    Args:
        runner: of the block (`Skeleton.runner`).
        hidden: `[samples, tokens, hidden_size]` entering it.
        names: linears inside the block, by their names in memory.
    """
    generator = torch.Generator().manual_seed(seed)
    layer, leaves = runner.layers[0], dict[str, Tensor]()
    handles = [layer.get_submodule(name).register_forward_hook(_cut(leaves, name)) for name in names]
    sums: list[Tensor] = []
    for sample in hidden.split(1):
        with torch.enable_grad():
            output = skeleton.forward(runner, sample)
        for number in range(PROBES):
            probe = torch.randn(output.shape, generator=generator).to(output.device)
            found = torch.autograd.grad(output, [leaves[n] for n in names], probe, retain_graph=number < PROBES - 1)
            rows = [gradient.flatten(0, -2).float() for gradient in found]
            sums = sums or [torch.zeros(x.shape[1], x.shape[1], device=x.device) for x in rows]
            for total, x in zip(sums, rows, strict=True):
                total.addmm_(x.T, x)
    for handle in handles:
        handle.remove()
    return [total / (PROBES * hidden.shape[0] * hidden.shape[1]) for total in sums]


def _cut(leaves: dict[str, Tensor], name: str):  # type: ignore[no-untyped-def]
    """A hook that lets gradients begin at a linear's output."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        leaves[name] = output.detach().float().requires_grad_(True)
        return leaves[name].to(output.dtype)

    return hook
