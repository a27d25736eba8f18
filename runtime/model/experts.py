"""Experts as separate linears, so that each is a matrix with a name, an input and a stored form of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate
from transformers.pytorch_utils import Conv1D

from ...kernels import ops
from ...kernels.swizzles import stacked_rows
from ..schemes import IntLinear


@dataclass(frozen=True)
class Form:
    """How transformers keeps the matrices of all experts of a block: in tensors of three dimensions.

    Attributes:
        transposed: whether a matrix is `[in, out]`.
        interleaved: whether rows of gate and up come in turns, not one below the other.
        bias: whether there are biases.
        gated: whether there is a gate.
        scaled: whether the router's coefficient multiplies what enters an expert, not what leaves it.
        combine: what the module makes of `[tokens, rows]` that gate and up put out; None for the activation of the one
            times the other (or the activation of up alone).
    """

    transposed: bool
    interleaved: bool
    bias: bool
    gated: bool
    scaled: bool
    combine: Callable[[Tensor], Tensor] | None

    @classmethod
    def of(cls, module: Any) -> Form | None:
        """That of a module; None where it holds no experts."""
        gated = _fused(module, "gate_up_proj")
        if not _fused(module, "down_proj") or not (gated or _fused(module, "up_proj")):
            return None
        own = getattr(type(module), "_apply_gate", _default_apply_gate) is not _default_apply_gate
        return cls(
            transposed=bool(getattr(module, "is_transposed", gated and _lies_transposed(module))),
            interleaved=not getattr(module, "is_concatenated", True),
            bias=bool(getattr(module, "has_bias", False)),
            gated=gated,
            scaled=len(inspect.signature(module.forward).parameters) == 1,
            combine=module._apply_gate if gated and own else None,
        )

    def sizes(self, module: Any) -> tuple[int, int, int]:
        """How many experts a module has, and the width of what enters them and of what lies within."""
        count, one, other = module.down_proj.shape
        hidden, inner = (other, one) if self.transposed else (one, other)
        return count, hidden, inner

    def parts(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """One expert's gate and up, `[rows, ...]` each, of the tensor that has both."""
        rows = tensor.T if self.transposed and tensor.dim() == 2 else tensor
        if self.interleaved:
            return rows[0::2], rows[1::2]
        return rows[: len(rows) // 2], rows[len(rows) // 2 :]

    def joined(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """What is made of an expert's gate and up, where it is not the activation of the one times the other."""
        if self.combine is None:
            return None
        combine = self.combine
        if self.interleaved:
            return lambda gate, up: combine(torch.stack([gate, up], dim=-1).flatten(-2))
        return lambda gate, up: combine(torch.cat([gate, up], dim=-1))


def _lies_transposed(module: Any) -> bool:
    """Whether matrices are `[in, out]`, of a module that does not say."""
    _, inner, hidden = module.down_proj.shape
    return tuple(module.gate_up_proj.shape[1:]) == (hidden, 2 * inner)


def _fused(module: Any, name: str) -> bool:
    tensor = getattr(module, name, None)
    return isinstance(tensor, nn.Parameter) and tensor.dim() == 3


class Expert(nn.Module):
    """One MLP; `weights` are the router's coefficients of the rows.

    Attributes:
        plain: whether it is `down(activation(gate) * up)`, without biases.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: Callable[[Tensor], Tensor] | None,
        *,
        bias: bool = False,
        gated: bool = True,
        combine: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if gated:
            self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.activation, self.combine = activation, combine
        self.plain = gated and not bias and combine is None

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x `[tokens, hidden_size]`, weights `[tokens]` → `[tokens, hidden_size]`."""
        return self.down_proj(self.within(x)) * weights[:, None]

    def within(self, x: Tensor) -> Tensor:
        """What enters the last linear, `[tokens, intermediate_size]`."""
        up: Tensor = self.up_proj(x)
        if self.combine is not None:
            return self.combine(self.gate_proj(x), up)
        assert self.activation is not None
        return self.activation(self.gate_proj(x)) * up if hasattr(self, "gate_proj") else self.activation(up)


class Experts(nn.ModuleList):
    """Drop-in for the fused experts module of transformers 5; runs only the experts that tokens are routed to.

    Attributes:
        routing: `(top_k_index, top_k_weights)` of the last call.
        forced: a routing to use in place of the router's, or None.
        everyone: the number of an expert to which all tokens go, with a coefficient of one, or None.
        only: numbers of experts that are run, or None for all.
    """

    def __init__(
        self,
        count: int,
        hidden_size: int,
        intermediate_size: int,
        activation: Callable[[Tensor], Tensor] | None,
        form: Form | None = None,
    ) -> None:
        options: dict[str, Any] = {}
        if form is not None:
            options = {"bias": form.bias, "gated": form.gated, "combine": form.joined()}
        self.scaled = form is not None and form.scaled
        super().__init__(Expert(hidden_size, intermediate_size, activation, **options) for _ in range(count))
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
            entering, coefficients = hidden_states[token], top_k_weights[token, slot]
            if self.scaled:
                entering, coefficients = entering * coefficients[:, None], torch.ones_like(coefficients)
            output = self[number](entering, coefficients)
            result.index_add_(0, token, output.to(result.dtype))
        return result


class ScaledMixture(nn.Module):
    """A mixture whose experts get what their router's scores multiply, of many tokens for each expert, most of them
    zeros (Llama 4): the same with experts that run the tokens which go to them."""

    router: Any
    shared_expert: Any

    def __init__(self, source: Any, experts: Experts) -> None:
        super().__init__()
        for name, module in source.named_children():
            setattr(self, name, module)
        self.top_k = source.top_k
        self.experts = experts

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., hidden_size]` → `[tokens, hidden_size]`, and the router's logits."""
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, logits = self.router(hidden)
        scores, index = logits.topk(self.top_k, dim=1)
        return self.shared_expert(hidden) + self.experts(hidden, index, scores.float().sigmoid().to(hidden)), logits


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


def _can_be_packed(experts: Any) -> bool:
    """Whether a kernel runs all experts at once: weights in its layout, of one scheme, and gates with SiLU."""
    if experts.scaled or not all(one.plain for one in experts):
        return False
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
    fused = [(name, module, form) for name, module in model.named_modules() if (form := Form.of(module)) is not None]
    for name, module, form in fused:
        parent, _, child = name.rpartition(".")
        down: Any = module.down_proj
        with torch.device(down.device):
            experts = Experts(*form.sizes(module), _activation(module), form).to(down.dtype)
        if form.scaled:
            model.set_submodule(parent, ScaledMixture(model.get_submodule(parent), experts))
        else:
            setattr(model.get_submodule(parent), child, experts)


def plain_linears(model: nn.Module) -> None:
    """Put linears in place of modules that hold the same with their weights transposed."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, Conv1D):
            columns, rows = module.weight.shape
            with torch.device("meta"):
                linear = nn.Linear(columns, rows)
            linear.weight = nn.Parameter(module.weight.T, requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name, linear)


def _activation(module: Any) -> Callable[[Tensor], Tensor] | None:
    found: Callable[[Tensor], Tensor] | None = getattr(module, "act_fn", None)
    return found
