"""The walk over a model on disk, block by block, carrying the calibration activations.

Two chains may be carried (`docs/architecture.md`): the reference chain runs the original blocks, the compressed chain
runs what passes made of them. Both live in memory-mapped files, one generation per block, so resident memory is one
block and its statistics, whatever the depth of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..runtime.model.experts import Expert, Experts
from ..runtime.model.families import Group, Stage
from ..runtime.model.skeleton import Skeleton
from ..runtime.schemes import Dense, Operator
from .artefact import StatisticsFolder
from .chains import Chains, Spill
from .drive import carry
from .probes import output_metrics
from .routing import experts_of
from .statistics import ENOUGH, KINDS, UNPAIRED, Statistics

T = TypeVar("T")


@dataclass
class StageWork:
    """Linears that may be rewritten now: passes replace entries of `linears`.

    Attributes:
        linears: disk name → operator, in execution order.
        originals: disk name → the weight as the checkpoint has it.
        groups: disk names of linears that read the same input.
        statistics: disk name → statistics; linears that read the same input share one object. Empty without data,
            and without an entry for linears that no pass asks about.
        metrics: disk name → Gauss-Newton metric of the block's output (`probes`), where a pass asks for it.
    """

    linears: dict[str, Operator]
    originals: dict[str, Tensor]
    groups: list[list[str]]
    statistics: dict[str, Statistics] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def part(self, numbers: Sequence[int]) -> StageWork:
        """Some of the groups by their numbers, to be rewritten on their own; what comes of it is put back by
        `self.linears.update(part.linears)`."""
        groups = [self.groups[number] for number in numbers]
        names = {name for group in groups for name in group}

        def some(table: dict[str, T]) -> dict[str, T]:
            return {name: value for name, value in table.items() if name in names}

        return StageWork(some(self.linears), some(self.originals), groups, some(self.statistics), some(self.metrics))

    @property
    def starved(self) -> dict[str, int]:
        """Disk name → tokens that came by, of experts whose statistics lean on other tokens."""
        return {name: found.tokens for name, found in self.statistics.items() if found.lent}


def parts(items: Sequence[T], sizes: Sequence[float], room: float | None) -> list[list[T]]:
    """Neighbours together, as long as their sizes add up to no more than `room`; one at least."""
    found: list[list[T]] = []
    left = 0.0
    for item, size in zip(items, sizes, strict=True):
        if not found or (room is not None and size > left):
            found.append([])
            left = float("inf") if room is None else room
        found[-1].append(item)
        left -= size
    return found


class _Captured(Exception):
    """Ends a forward pass once every wanted input has been seen."""


class _Capture:
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


class _Replay(nn.Module):
    """A part of a block that was already computed: its last linear over the inputs that were seen."""

    def __init__(self, name: str, last: Any, inputs: Spill, *, attention: bool) -> None:
        super().__init__()
        self.add_module(name, last)
        self.last, self.inputs, self.rows, self.attention = [last], inputs, slice(0), attention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.last[0](self.inputs[self.rows].to(self.last[0].weight.device))
        return (output, None) if self.attention else output  # attention also returns its weights


class Block:
    """One transformer block on its way through the passes.

    Iterate `stages()` once, letting passes replace `StageWork.linears`; then call `advance()`.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        index: int,
        chains: Chains | None,
        wanted: Mapping[str, Collection[str]],
        probed: Collection[str],
        kept: StatisticsFolder | None,
        room: float | None,
    ) -> None:
        self.skeleton, self.index, self.chains, self.kept, self._room = skeleton, index, chains, kept, room
        self._wanted, self._probed = wanted, probed
        self.linears: dict[str, Operator] = {}
        self._runners: dict[str, Any] = {}
        self._seen: dict[tuple[str, str], Spill] = {}

    def _disk(self, name: str) -> str:
        return self.skeleton.disk_name(self.index, name)

    def stages(self) -> Iterator[StageWork]:
        """Groups of linears in execution order, each with the statistics of what now enters it."""
        sequential = self.chains is not None and "compressed" in self.chains.names
        known: dict[str, Statistics] = {}
        at_once = True
        metrics: dict[str, Tensor] = {}
        if self.kept is not None and self.kept.complete:
            known = self.kept.load(self.index)
        elif self.chains is not None:
            original = self.skeleton.block(self.index)
            if "compressed" in self.chains.names:
                # Weights are shared until a pass replaces them.
                compressed = self.skeleton.block_like(self.index, original)
                self._runners["compressed"] = self.skeleton.runner(self.index, compressed)
            if "reference" in self.chains.names:
                self._runners["reference"] = self.skeleton.runner(self.index, original)
            metrics = self._probe()
            every = [group for stage in self.skeleton.stages(self.index) for group in stage]
            at_once = not sequential and (self.kept is not None or self._fits(every))
            if at_once:
                known = self._collect_reference()
        for stage in (part for whole in self.skeleton.stages(self.index) for part in self._parts(whole)):
            groups = [[self._disk(name) for name in group.linears] for group in stage]
            names = [name for group in groups for name in group]
            originals = {
                name: self.skeleton.checkpoint.tensor(name + ".weight").to(self.skeleton.device) for name in names
            }
            work = StageWork({name: Dense(weight) for name, weight in originals.items()}, originals, groups)
            if self._runners and not at_once:
                work.statistics = self._collect(stage)
            else:
                work.statistics = {name: known.pop(name) for name in names if name in known}
            work.metrics = {name: metrics.pop(name) for name in names if name in metrics}
            before = dict(work.linears)
            yield work
            work.metrics.clear()
            work.statistics.clear()  # the caller still holds the work while the next stage is measured
            self.linears.update(work.linears)
            for group in stage:
                for name in group.linears:
                    operator = work.linears[self._disk(name)]
                    if "compressed" in self._runners and operator is not before[self._disk(name)]:
                        linear = self._runners["compressed"].layers[0].get_submodule(name)
                        weight = operator.dense(self.skeleton.dtype).to(self.skeleton.device)
                        linear.weight = nn.Parameter(weight, requires_grad=False)
                        if any(part.rounds_activations for part in operator.inside()):
                            linear.register_forward_hook(partial(_beyond_weight, operator))
            self._replay()

    def _sizes(self, stage: Stage) -> list[float]:
        """Bytes of each group's statistics."""
        inner = self.skeleton.layers[self.index]
        widths = [inner.get_submodule(group.linears[0]).in_features for group in stage]
        return [
            sum(KINDS[kind].nbytes(width) for kind in self._kinds(group))
            for width, group in zip(widths, stage, strict=True)
        ]

    def _kinds(self, group: Group) -> set[str]:
        """The statistics that are wanted of a group."""
        return {kind for name in group.linears for kind in self._wanted.get(self._disk(name), ())}

    def _fits(self, groups: Sequence[Group]) -> bool:
        return self._room is None or sum(self._sizes(tuple(groups))) <= self._room

    def _parts(self, stage: Stage) -> list[Stage]:
        """A stage in as many parts as there is room for; they are independent of each other."""
        return [tuple(part) for part in parts(stage, self._sizes(stage), self._room)]

    def _probe(self) -> dict[str, Tensor]:
        """Metrics of the linears for which they are wanted, from one micro-batch of what now enters the block."""
        assert self.chains is not None
        names = [name for stage in self.skeleton.stages(self.index) for group in stage for name in group.linears]
        names = [name for name in names if self._disk(name) in self._probed]
        if not names:
            return {}
        chain, runner = next(iter(self._runners.items()))  # the compressed one, if there is one
        found = output_metrics(self.skeleton, runner, self.chains.read(self.index, chain)[: self.chains.batch], names)
        return {self._disk(name): metric for name, metric in zip(names, found, strict=True)}

    def _replay(self) -> None:
        """Of the parts whose last linear is now final, compute only that linear from here on."""
        family = self.skeleton.family
        for (chain, part), inputs in self._seen.items():
            layer, end = self._runners[chain].layers[0], family.ends[part]
            name, attention = end.removeprefix(part + "."), part == family.attention
            setattr(layer, part, _Replay(name, layer.get_submodule(end), inputs, attention=attention))
        self._seen = {}

    def _forward(self, chain: str, rows: slice, capture: _Capture | None = None) -> Any:
        """One micro-batch of a chain through its block: captured inputs with a capture, else the block's output."""
        assert self.chains is not None
        runner, hidden = self._runners[chain], self.chains.read(self.index, chain)[rows]
        for module in runner.layers[0].children():
            if isinstance(module, _Replay):
                module.rows = rows
        if capture is None:
            return self.skeleton.run(runner, hidden)
        seen = capture.run(self.skeleton, runner, hidden)
        ends = {group.linears: x for group, (x, _) in seen.items()}
        for part, last in self.skeleton.family.ends.items():
            if (last,) in ends and capture.output is None:  # cut short: there will be another pass
                x = ends[(last,)]
                if (chain, part) not in self._seen:
                    self._seen[chain, part] = self.chains.scratch(x.shape[-1], self.skeleton.dtype)
                self._seen[chain, part][rows] = x
        return seen

    def _collect(self, stage: Stage) -> dict[str, Statistics]:
        """Statistics of a stage's groups, of the compressed chain if there is one."""
        assert self.chains is not None
        groups = [group for group in stage if self._kinds(group)]
        if not groups:
            return {}
        sums: dict[Group, Statistics] = {}
        self._only(groups)
        with self._captures(groups) as captures:
            for rows in self.chains.batches():
                for group, (x, weights, reference) in self._inputs(rows, captures).items():
                    if group not in sums:
                        sums[group] = Statistics.empty(x.shape[-1], self._kinds(group), x.device)
                    sums[group].add(x, weights, reference)
                del x, weights, reference  # before the next batch needs the room
        self._only(None)
        self._lend(groups, sums)
        return {self._disk(name): sums[group] for group in groups if group in sums for name in group.linears}

    @contextmanager
    def _captures(self, groups: list[Group]) -> Iterator[dict[str, _Capture]]:
        """What watches some groups in each chain."""
        dtype = self.skeleton.dtype
        found = {chain: _Capture(runner.layers[0], groups, dtype) for chain, runner in self._runners.items()}
        yield found
        for capture in found.values():
            capture.close()

    def _inputs(
        self, rows: slice, captures: dict[str, _Capture]
    ) -> dict[Group, tuple[Tensor, Tensor | None, Tensor | None]]:
        """What enters the groups that are watched, of one micro-batch: inputs, coefficients of experts, and inputs in
        the reference chain if there are two; the reference block is routed as the compressed one."""
        lead, both = "compressed" if "compressed" in self._runners else "reference", len(self._runners) == 2
        seen, reference = self._forward(lead, rows, captures[lead]), {}
        if both:
            with _RoutedAs(self._runners[lead], self._runners["reference"]):
                reference = self._forward("reference", rows, captures["reference"])
        return {group: (x, w, reference[group][0] if both else None) for group, (x, w) in seen.items()}

    def _experts(self) -> list[Experts]:
        """The routed experts of all chains, those first that others follow."""
        found = (experts_of(self.skeleton, runner.layers[0]) for runner in self._runners.values())
        return [experts for experts in found if experts is not None]

    def _number(self, group: Group) -> int | None:
        """The routed expert that a group belongs to, if it does."""
        return self.skeleton.family.experts.number(group.linears[0])

    def _only(self, groups: Sequence[Group] | None) -> None:
        """Run no experts but those of some groups, for what the others put out is not asked for; None: run all."""
        numbers = {self._number(group) for group in groups or ()} - {None}
        for experts in self._experts():
            experts.only = numbers or None

    def _lend(self, groups: Sequence[Group], sums: dict[Group, Statistics]) -> None:
        """Let experts that saw next to no tokens lean on what they would make of all tokens."""
        assert self.chains is not None
        inner = self.skeleton.layers[self.index]
        first = next(self.chains.batches())
        for group in groups:
            number, own = self._number(group), sums.get(group)
            enough = ENOUGH * inner.get_submodule(group.linears[0]).in_features
            if number is None or (own is not None and own.tokens >= enough):
                continue
            self._experts()[0].everyone = number
            with self._captures([group]) as captures:
                x, _, reference = self._inputs(first, captures)[group]
            lent = Statistics.empty(x.shape[-1], UNPAIRED if self.kept else self._kinds(group), x.device)
            lent.add(x, None, reference)
            sums[group] = lent.lent_to(own)
            self._experts()[0].everyone = None

    def _collect_reference(self) -> dict[str, Statistics]:
        """Statistics of all stages in one pass over the original block, which also carries the chain on."""
        assert self.chains is not None
        groups = [group for stage in self.skeleton.stages(self.index) for group in stage]
        if self.kept is None:
            groups = [group for group in groups if self._kinds(group)]
        capture = _Capture(self._runners["reference"].layers[0], groups, self.skeleton.dtype, stop=False)
        sums: dict[Group, Statistics] = {}

        def run(rows: slice) -> Tensor:
            for group, (x, weights) in self._forward("reference", rows, capture).items():
                if group not in sums:
                    kinds = UNPAIRED if self.kept is not None else self._kinds(group)
                    sums[group] = Statistics.empty(x.shape[-1], kinds, x.device)
                sums[group].add(x, weights)
            assert capture.output is not None
            return capture.output

        carry(self.chains, "reference", self.index + 1, run)
        capture.close()
        self._lend(groups, sums)
        self._runners.clear()
        self._seen = {}
        found = {self._disk(name): sums[group] for group in groups if group in sums for name in group.linears}
        if self.kept is not None:
            self.kept.save(self.index, found)
        return found

    def advance(self) -> None:
        """Carry the chains over this block into the next generation, synced."""
        if self.chains is None:
            return
        for chain in self._runners:
            carry(self.chains, chain, self.index + 1, partial(self._forward, chain))
        self._runners.clear()
        self.chains.commit(self.index + 1)


def _beyond_weight(operator: Operator, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A linear's output, and what its operator does beside multiplying: rounding of inputs, or in the KV cache."""
    return output + operator.beyond(args[0].float()).to(output.dtype)


class _RoutedAs:
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


def walk(
    skeleton: Skeleton,
    chains: Chains | None,
    wanted: Mapping[str, Collection[str]],
    first: int = 0,
    kept: StatisticsFolder | None = None,
    probed: Collection[str] = (),
    room: float | None = None,
) -> Iterator[Block]:
    """Every block from `first` on; the caller rewrites it through `stages()` and then calls `advance()`.

    Args:
        chains: the calibration activations, or None when no pass needs data.
        wanted: disk name → kinds of statistics (`statistics.KINDS`) that are collected of what enters the linear.
        kept: where statistics of the reference chain are read from, or kept if it is not complete yet.
        probed: disk names of the linears whose metrics are wanted.
        room: bytes of statistics at a time; stages that have more come in parts. Default: no limit.
    """
    for index in range(first, skeleton.blocks):
        yield Block(skeleton, index, chains, wanted, probed, kept, room)
