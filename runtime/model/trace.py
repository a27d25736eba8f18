"""What a block does, found by running it: which linears read the same tensor, from which norm or linear it comes, and
what has to be final before."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .families import Group, starred

# Operators of ATen whose result has its argument's numbers in another place, or some of them.
_MOVED = frozenset({
    "view", "_unsafe_view", "_reshape_alias", "transpose", "permute", "t", "expand", "slice", "select", "index",
    "index_select", "gather", "unsqueeze", "squeeze", "clone", "_to_copy", "detach", "alias", "split", "unbind",
    "split_with_sizes", "as_strided", "repeat",
})  # fmt: skip
_PARTS = frozenset(
    {"split", "split_with_sizes", "slice"}
)  # of which those along the last dimension take channels apart
_TIMES, _PRODUCTS = frozenset({"mul", "div"}), frozenset({"bmm", "mm", "matmul"})
_ATTENTION = re.compile(r"_scaled_dot_product_\w+|scaled_dot_product_attention")


@dataclass
class _Source:
    """Where numbers come from.

    Attributes:
        linear: linears → whether, channel by channel, they are that linear's outputs times something else. Of one whose
            outputs are taken apart, the last ones go by its name and `#`, the others by its name and `#` and a place.
        norm: the norm that put them out, if nothing has happened since.
        from_linear: the linear that put them out, likewise.
    """

    linear: dict[str, bool] = field(default_factory=dict)
    norm: str = ""
    from_linear: str = ""

    def bent(self) -> _Source:
        """After an operator that is not linear."""
        return _Source(dict.fromkeys(self.linear, False))

    def part(self, place: str) -> _Source:
        """Some of the channels; what is a part already is told from others no more."""
        return _Source(
            {
                name if "#" in name else f"{name}#{place}": linearly and "#" not in name
                for name, linearly in self.linear.items()
            }
        )


class Trace(TorchDispatchMode):
    """While active, follows what the modules of a block make of each other's outputs.

    Attributes:
        reads: linear → what it read; in the order in which they ran.
        inputs: linear → what its input is known by.
        ends: part of the block → the linear that put out what the part did.
        mixing: parts that return more than a tensor.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.reads: dict[str, _Source] = {}
        self.inputs: dict[str, tuple[int, int]] = {}
        self.ends: dict[str, str] = {}
        self.mixing: list[str] = []
        self._known: dict[tuple[int, int], _Source] = {}
        self._alive: list[Tensor] = []  # so that no address is used twice
        self._handles: list[Any] = []
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                self._handles.append(module.register_forward_pre_hook(self._before(name)))
                self._handles.append(module.register_forward_hook(self._after(name)))
            elif is_norm(module):
                self._handles.append(module.register_forward_hook(self._normed(name)))
        for name, module in block.named_children():
            self._handles.append(module.register_forward_hook(self._ended(name)))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _of(self, tensor: Tensor) -> _Source:
        return self._known.get(_place(tensor), _Source())

    def _tell(self, tensor: Tensor, source: _Source) -> None:
        self._alive.append(tensor)
        self._known[_place(tensor)] = source

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.reads[name], self.inputs[name] = self._of(args[0]), _place(args[0])
            self._alive.append(args[0])

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            if isinstance(output, Tensor):  # some routers are linears that put out more
                self._tell(output, _Source({**self._of(args[0]).bent().linear, name: True}, from_linear=name))

        return hook

    def _normed(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                self._tell(output, _Source(self._of(output).bent().linear, norm=name))

        return hook

    def _ended(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(output, tuple) and len(output) != 2:
                return  # more than one tensor and weights, which nothing stands in for
            end = self._of(first).from_linear if isinstance(first, Tensor) else ""
            if end.rpartition(".")[0] == name:
                self.ends[name] = end
                if isinstance(output, tuple):
                    self.mixing.append(name)

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        source = self._made(name.rstrip("_") if not name.startswith("_") else name, given)
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        parts = [source] * len(made)
        if name in _PARTS and made and (channels := given[0].shape[-1]) != made[0].shape[-1]:
            ends = [(one.data_ptr() - given[0].data_ptr()) // one.element_size() + one.shape[-1] for one in made]
            parts = [source.part("" if end == channels else str(end)) for end in ends]
        for tensor, part in zip(made, parts, strict=True):
            self._tell(tensor, part)
        return found

    def _made(self, name: str, given: Sequence[Tensor]) -> _Source:
        sources = [self._of(tensor) for tensor in given]
        if name in _MOVED and sources:
            return sources[0]
        every = dict.fromkeys((linear for source in sources for linear in source.linear), False)
        if name in _TIMES and len(given) <= 2 and sources:
            scaled = sources if name == "mul" else sources[:1]
        elif name in _PRODUCTS and len(given) == 2:
            scaled = sources[1:]  # of the first factor, channels are added up
        elif _ATTENTION.fullmatch(name) and len(given) >= 3:
            scaled = sources[2:3]
        else:
            scaled = []
        for source in scaled:
            twice = [linear for linear in source.linear if sum(linear in other.linear for other in sources) > 1]
            every |= {linear: linearly and linear not in twice for linear, linearly in source.linear.items()}
        return _Source(every)


def _place(tensor: Tensor) -> tuple[int, int]:
    """By which a tensor is known, whatever its shape: where it begins, and how many numbers it has."""
    return tensor.data_ptr(), tensor.numel()


def is_norm(module: nn.Module) -> bool:
    """Whether a module is what normalizes, and multiplies by a weight for each channel."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1


def groups_of(traces: Sequence[Trace], left: Sequence[str]) -> list[list[Group]]:
    """Stages of groups that serve all the blocks that were traced.

    Args:
        left: modules whose linears are none of it.
    """
    found: dict[tuple[str, ...], _Source] = {}
    for trace in traces:
        together: dict[tuple[tuple[int, int], str], list[str]] = {}
        for name in trace.reads:
            if not f"{name}.".startswith(tuple(f"{one}." for one in left)):
                together.setdefault((trace.inputs[name], name.rpartition(".")[0]), []).append(name)
        for names in together.values():
            key = tuple(starred(name) for name in names)
            found.setdefault(key, trace.reads[names[0]])
    found = _unequal(found)
    member = {name: key for key in found for name in key}
    needs = {
        key: {member[name] for name in map(_whole, source.linear) if name in member} - {key}
        for key, source in found.items()
    }
    levels: dict[tuple[str, ...], int] = {}

    def level(key: tuple[str, ...]) -> int:
        if key not in levels:
            levels[key] = 0  # of groups that need each other in different blocks
            levels[key] = max((level(other) + 1 for other in needs[key]), default=0)
        return levels[key]

    stages: list[list[Group]] = []
    for key, source in found.items():
        feeders = [name for name, linearly in source.linear.items() if linearly]
        last = len(feeders) == 1 and not feeders[0].partition("#")[2]
        reads = source.norm or (_whole(feeders[0]) if last else "")
        while len(stages) <= level(key):
            stages.append([])
        stages[level(key)].append(Group(key, starred(reads)))
    return [stage for stage in stages if stage]


def _unequal(found: Mapping[tuple[str, ...], _Source]) -> dict[tuple[str, ...], _Source]:
    """Without groups that are parts of others, as in blocks that lack some of their linears."""
    whole = [set(key) for key in found]
    return {key: source for key, source in found.items() if not any(set(key) < other for other in whole)}


def _whole(name: str) -> str:
    """The linear that a source is, or has a part of."""
    return starred(name.partition("#")[0])


@torch.no_grad()
def traced(block: nn.Module, run: Any) -> Trace:
    """What a block does while `run` runs it."""
    trace = Trace(block)
    with trace:
        run()
    trace.close()
    return trace
