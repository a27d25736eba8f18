"""What watches blocks while they run, and takes the place of parts that need not run again."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.model.experts import Expert, Experts
from ..runtime.model.families import Group
from ..runtime.model.skeleton import Skeleton
from ..runtime.schemes import Operator, from_tensors
from ..runtime.stored import StoredModel
from .chains import Spill

_ROUNDED = 1024  # tokens whose inputs are rounded at a time


class _Captured(Exception):
    """Ends a forward pass once every wanted input has been seen."""


class Capture:
    """Collects the inputs of a stage's groups (and the router's coefficients of experts) during forward passes."""

    def __init__(self, block: nn.Module, groups: list[Group], dtype: torch.dtype, *, stop: bool = True) -> None:
        self._dtype = dtype  # what a linear really multiplies
        self.inputs: dict[Group, tuple[Tensor, Tensor | None]] = {}
        self.output: Tensor | None = None
        self._wanted = len(groups) if stop else -1
        self._weights: Tensor | None = None
        self._handles = []
        for group in groups:
            first = group.linears[0]
            parent = block.get_submodule(first.rpartition(".")[0])
            expert = isinstance(parent, Expert)
            if expert:
                self._handles.append(parent.register_forward_pre_hook(self._remember_weights))
            hook = self._hook(group, expert)
            self._handles.append(block.get_submodule(first).register_forward_pre_hook(hook))

    def _remember_weights(self, module: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        self._weights = args[1]

    def _hook(self, group: Group, expert: bool):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.inputs[group] = (args[0].to(self._dtype), self._weights if expert else None)
            if len(self.inputs) == self._wanted:
                raise _Captured

        return hook

    def run(self, skeleton: Skeleton, runner: nn.Module, hidden: Tensor) -> dict[Group, tuple[Tensor, Tensor | None]]:
        self.inputs, self.output = {}, None
        with suppress(_Captured):
            self.output = skeleton.run(runner, hidden)
        return self.inputs

    def close(self) -> None:
        self.inputs = {}
        for handle in self._handles:
            handle.remove()


class Replay(nn.Module):
    """A part of a block that was already computed: its last linear over the inputs that were seen."""

    def __init__(self, name: str, last: Any, inputs: Spill, scale: Tensor | None, *, attention: bool) -> None:
        super().__init__()
        self.add_module(name, last)
        self.last, self.inputs, self.rows, self.attention = [last], inputs, slice(0), attention
        self.scale = scale  # by which inputs have been divided since

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.inputs[self.rows].to(self.last[0].weight.device)
        output = self.last[0](
            inputs if self.scale is None else (inputs / self.scale.to(inputs.device)).to(inputs.dtype)
        )
        return (output, None) if self.attention else output  # attention also returns its weights


def let_round(linear: nn.Module, operator: Operator) -> Any:
    """Let a linear that has its operator's weight also round inputs, or what is cached, where the operator does: the
    handle of the hook, or None."""
    if any(part.rounds_activations for part in operator.inside()):
        return linear.register_forward_hook(partial(_beyond_weight, operator))
    return None


def as_it_runs(model: Skeleton, index: int, without: Collection[str] = ()) -> Any:
    """A block with its weights, of linears that do more than multiply by these with that.

    Args:
        without: names of linears in memory that get neither.
    """
    block = model.block(index, without=[f"{name}.weight" for name in without])
    stored = model.checkpoint
    if not isinstance(stored, StoredModel):
        return block
    for name in (name for stage in model.stages(index) for group in stage for name in group.linears):
        disk = model.disk_name(index, name)
        rounds = disk in stored.schemes and any(part.rounds_activations for part in stored.outline(disk).inside())
        if rounds and name not in without:
            parts = {key: tensor.to(model.device) for key, tensor in stored.operator_tensors(disk).items()}
            let_round(block.get_submodule(name), from_tensors(parts, stored.schemes[disk]))
    return block


def _beyond_weight(operator: Operator, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    # Rounding takes several times what its inputs do; and where gradients are wanted, it has none.
    parts = args[0].detach().flatten(0, -2).split(_ROUNDED)
    beyond = torch.cat([operator.beyond(part.float()).to(output.dtype) for part in parts])
    return output + beyond.view(output.shape)


class RoutedAs:
    """While active, the experts of `follower` take the routing of the last forward pass of `leader`."""

    def __init__(self, leader: nn.Module, follower: nn.Module) -> None:
        pairs = zip(leader.modules(), follower.modules(), strict=True)
        self._pairs = [(a, b) for a, b in pairs if isinstance(a, Experts) and isinstance(b, Experts)]

    def __enter__(self) -> None:
        for leader, follower in self._pairs:
            follower.forced = leader.routing

    def __exit__(self, *exception: object) -> None:
        for _, follower in self._pairs:
            follower.forced = None
