"""Experts as separate linears, so that each is a matrix with a name, an input and a stored form of its own."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import ops
from ...kernels.swizzles import stacked_rows
from ..schemes import IntLinear


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


class PackedExperts(nn.Module):
    """Quantized experts of a layer as one stack that a kernel runs, in place of `Experts`.

    Attributes:
        gate_up_words, gate_up_high, gate_up_pairs: `[experts, ...]` as `swizzles.GroupWords` has them, gate above up.
        down_words, down_high, down_pairs: alike.
        dtype: of the activations that the kernel takes.
    """

    def __init__(self, experts: Sequence[Any]) -> None:
        super().__init__()
        gate, down = (getattr(experts[0], name) for name in ("gate_proj", "down_proj"))
        self.intermediate_size, self.dtype = gate.out_features, gate.dtype
        self.bits, self.group_sizes = ([gate.layout[i], down.layout[i]] for i in (0, 1))
        stacks = {
            "gate_up": [stacked_rows([one.gate_proj.stored, one.up_proj.stored]) for one in experts],
            "down": [one.down_proj.stored for one in experts],
        }
        for name, members in stacks.items():
            for part in ("words", "high", "pairs"):
                tensors = [getattr(member, part) for member in members]
                stack = None if tensors[0] is None else torch.stack(tensors)
                self.register_buffer(f"{name}_{part}", stack, persistent=False)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `Experts.forward`."""
        x = hidden_states.to(self.dtype)
        result: Tensor = ops.int_experts(
            x, top_k_index, top_k_weights.contiguous(), self.gate_up_words, self.gate_up_high,
            self.gate_up_pairs, self.down_words, self.down_high, self.down_pairs, self.intermediate_size, self.bits,
            self.group_sizes,
        )  # fmt: skip
        return result.to(hidden_states.dtype)


def _can_be_packed(experts: Sequence[Any]) -> bool:
    """Whether a kernel runs all experts at once: weights in its layout, of one scheme, and gates with SiLU."""
    linears = [part for one in experts for part in (one.gate_proj, one.up_proj, one.down_proj)]
    if not all(
        isinstance(part, IntLinear) and part.device_layout and part.bias is None and part.inputs is None
        for part in linears
    ):
        return False
    first, activation = experts[0], experts[0].activation
    alike = all(
        one.gate_proj.layout == one.up_proj.layout == first.gate_proj.layout
        and one.down_proj.layout == first.down_proj.layout
        for one in experts
    )
    return alike and getattr(activation, "__name__", type(activation).__name__) in ("silu", "SiLUActivation")


def pack_experts(model: nn.Module) -> None:
    """Stack the experts of a loaded model where a kernel runs them."""
    for name in [name for name, module in model.named_modules() if isinstance(module, Experts)]:
        parent, _, child = name.rpartition(".")
        experts: Any = model.get_submodule(name)  # held by nothing else: memory is needed for those of one layer twice
        if _can_be_packed(experts):
            experts = PackedExperts(experts)
            setattr(model.get_submodule(parent), child, experts)


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
