"""Experts as separate linears, so that each is a matrix with a name, an input and a stored form of its own."""

from __future__ import annotations

from collections.abc import Callable, Container

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One gated MLP; `weights` are the router's coefficients of the rows."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.activation = activation

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x `[tokens, hidden_size]`, weights `[tokens]` → `[tokens, hidden_size]`."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x)) * weights[:, None]


class Experts(nn.ModuleList):
    """Drop-in for the fused experts module of transformers 5; runs only the experts that tokens are routed to.

    Attributes:
        routing: `(top_k_index, top_k_weights)` of the last call.
        forced: a routing to use in place of the router's, or None.
        everyone: the number of an expert to which all tokens go, with a coefficient of one, or None.
        only: numbers of experts that are run, or None for all.
    """

    def __init__(
        self, count: int, hidden_size: int, intermediate_size: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(Expert(hidden_size, intermediate_size, activation) for _ in range(count))
        self.routing: tuple[Tensor, Tensor] | None = None
        self.forced: tuple[Tensor, Tensor] | None = None
        self.everyone: int | None = None
        self.only: Container[int | None] | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states `[tokens, hidden_size]`; index and weights `[tokens, top_k]`."""
        if self.forced is not None:
            top_k_index, top_k_weights = self.forced
        if self.everyone is not None:
            top_k_index = torch.full_like(top_k_index[:, :1], self.everyone)
            top_k_weights = torch.ones_like(top_k_weights[:, :1])
        self.routing = (top_k_index, top_k_weights)
        result = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            if self.only is not None and number not in self.only:
                continue
            token, slot = torch.where(top_k_index == number)
            output = self[number](hidden_states[token], top_k_weights[token, slot])
            result.index_add_(0, token, output.to(result.dtype))
        return result


def unfuse_experts(model: nn.Module) -> None:
    """Replace every fused experts module of a model on `meta` by `Experts` of the same sizes."""
    fused = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
    ]
    for name, module in fused:
        count, double, hidden_size = module.gate_up_proj.shape
        parent, _, child = name.rpartition(".")
        with torch.device(module.gate_up_proj.device):
            experts = Experts(count, hidden_size, double // 2, module.act_fn).to(module.gate_up_proj.dtype)
        setattr(model.get_submodule(parent), child, experts)
