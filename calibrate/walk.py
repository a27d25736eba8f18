"""The walk over a model on disk, block by block, carrying the calibration activations.

Two chains may be carried (`docs/architecture.md`): the reference chain runs the original blocks, the compressed chain
runs what passes made of them. Both live in memory-mapped files, one generation per block, so resident memory is one
block and its statistics, whatever the depth of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.architectures import PARTS, Stage
from ..runtime.experts import Expert, Experts
from ..runtime.operators import Dense, Latent, Operator
from ..runtime.skeleton import Skeleton
from .artefact import StatisticsFolder
from .chains import Chains, Spill
from .probes import output_metrics
from .statistics import Statistics


@dataclass
class StageWork:
    """Linears that may be rewritten now: passes replace entries of `linears`.

    Attributes:
        linears: disk name → operator, in execution order.
        originals: disk name → the weight as the checkpoint has it.
        groups: disk names of linears that read the same input.
        statistics: disk name → statistics; linears that read the same input share one object. Empty without data,
            and without an entry for an expert no token was routed to.
        metrics: disk name → Gauss-Newton metric of the block's output (`probes`), where a pass asks for it.
    """

    linears: dict[str, Operator]
    originals: dict[str, Tensor]
    groups: list[list[str]]
    statistics: dict[str, Statistics] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)


class _Captured(Exception):
    """Ends a forward pass once every wanted input has been seen."""


class _Capture:
    """Collects the inputs of a stage's groups (and the router's coefficients of experts) during forward passes."""

    def __init__(
        self, block: nn.Module, groups: list[tuple[str, ...]], dtype: torch.dtype, *, stop: bool = True
    ) -> None:
        self._dtype = dtype  # what a linear really multiplies
        self.inputs: dict[tuple[str, ...], tuple[Tensor, Tensor | None]] = {}
        self.output: Tensor | None = None
        self._wanted = len(groups) if stop else -1
        self._weights: Tensor | None = None
        self._handles = []
        for group in groups:
            parent = block.get_submodule(group[0].rpartition(".")[0])
            expert = isinstance(parent, Expert)
            if expert:
                self._handles.append(parent.register_forward_pre_hook(self._remember_weights))
            hook = self._hook(group, expert)
            self._handles.append(block.get_submodule(group[0]).register_forward_pre_hook(hook))

    def _remember_weights(self, module: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        self._weights = args[1]

    def _hook(self, group: tuple[str, ...], expert: bool):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.inputs[group] = (args[0].to(self._dtype), self._weights if expert else None)
            if len(self.inputs) == self._wanted:
                raise _Captured

        return hook

    def run(
        self, skeleton: Skeleton, runner: nn.Module, hidden: Tensor
    ) -> dict[tuple[str, ...], tuple[Tensor, Tensor | None]]:
        self.inputs, self.output = {}, None
        with suppress(_Captured):
            self.output = skeleton.run(runner, hidden)
        return self.inputs

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Replay(nn.Module):
    """A part of a block that was already computed: its last linear over the inputs that were seen."""

    def __init__(self, part: str, last: nn.Module, inputs: Spill) -> None:
        super().__init__()
        self.add_module(PARTS[part].rpartition(".")[2], last)
        self.last, self.inputs, self.rows, self.attention = [last], inputs, slice(0), part == "self_attn"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.last[0](self.inputs[self.rows])
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
        wanted: set[str],
        probed: Collection[str],
        kept: StatisticsFolder | None,
    ) -> None:
        self.skeleton, self.index, self.chains, self.kept = skeleton, index, chains, kept
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
            if not sequential:
                known = self._collect_reference()
        for stage in self.skeleton.stages(self.index):
            groups = [[self._disk(name) for name in group] for group in stage]
            names = [name for group in groups for name in group]
            originals = {name: self.skeleton.checkpoint.tensor(name + ".weight") for name in names}
            work = StageWork({name: Dense(weight) for name, weight in originals.items()}, originals, groups)
            if sequential:
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
                for name in group:
                    operator = work.linears[self._disk(name)]
                    if "compressed" in self._runners and operator is not before[self._disk(name)]:
                        linear = self._runners["compressed"].layers[0].get_submodule(name)
                        weight = operator.dense(self.skeleton.dtype).to(self.skeleton.device)
                        linear.weight = nn.Parameter(weight, requires_grad=False)
                        if isinstance(operator, Latent) and operator.bits < 16:
                            linear.register_forward_hook(_through_cache(operator))
            self._replay()

    def _probe(self) -> dict[str, Tensor]:
        """Metrics of the linears for which they are wanted, from one micro-batch of what now enters the block."""
        assert self.chains is not None
        names = [name for stage in self.skeleton.stages(self.index) for group in stage for name in group]
        names = [name for name in names if self._disk(name) in self._probed]
        if not names:
            return {}
        chain, runner = next(iter(self._runners.items()))  # the compressed one, if there is one
        found = output_metrics(self.skeleton, runner, self.chains.read(self.index, chain)[: self.chains.batch], names)
        return {self._disk(name): metric for name, metric in zip(names, found, strict=True)}

    def _replay(self) -> None:
        """Of the parts whose last linear is now final, compute only that linear from here on."""
        for (chain, part), inputs in self._seen.items():
            layer = self._runners[chain].layers[0]
            setattr(layer, part, _Replay(part, layer.get_submodule(PARTS[part]), inputs))
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
        for part, last in PARTS.items():
            if (last,) in seen and capture.output is None:  # cut short: there will be another pass
                x = seen[(last,)][0]
                if (chain, part) not in self._seen:
                    self._seen[chain, part] = self.chains.scratch(x.shape[-1], self.skeleton.dtype)
                self._seen[chain, part][rows] = x
        return seen

    def _collect(self, stage: Stage) -> dict[str, Statistics]:
        assert self.chains is not None
        groups = [group for group in stage if any(self._disk(name) in self._wanted for name in group)]
        if not groups:
            return {}
        lead = "compressed" if "compressed" in self._runners else "reference"
        both = len(self._runners) == 2
        captures = {
            chain: _Capture(runner.layers[0], groups, self.skeleton.dtype) for chain, runner in self._runners.items()
        }
        sums: dict[tuple[str, ...], Statistics] = {}
        for rows in self.chains.batches():
            seen = self._forward(lead, rows, captures[lead])
            reference = {}
            if both:
                with _RoutedAs(self._runners[lead], self._runners["reference"]):
                    reference = self._forward("reference", rows, captures["reference"])
            for group, (x, weights) in seen.items():
                if group not in sums:
                    sums[group] = Statistics.empty(x.shape[-1], cross=both, device=x.device)
                sums[group].add(x, weights, reference[group][0] if both else None)
        for capture in captures.values():
            capture.close()
        return {self._disk(name): sums[group] for group in groups if group in sums for name in group}

    def _collect_reference(self) -> dict[str, Statistics]:
        """Statistics of all stages in one pass over the original block, which also carries the chain on."""
        assert self.chains is not None
        groups = [group for stage in self.skeleton.stages(self.index) for group in stage]
        if self.kept is None:
            groups = [group for group in groups if any(self._disk(name) in self._wanted for name in group)]
        capture = _Capture(self._runners["reference"].layers[0], groups, self.skeleton.dtype, stop=False)
        target = self.chains.create(self.index + 1, "reference")
        sums: dict[tuple[str, ...], Statistics] = {}
        for rows in self.chains.batches():
            for group, (x, weights) in self._forward("reference", rows, capture).items():
                if group not in sums:
                    sums[group] = Statistics.empty(x.shape[-1], cross=False, device=x.device)
                sums[group].add(x, weights)
            assert capture.output is not None
            target[rows] = capture.output
        capture.close()
        self._runners.clear()
        self._seen = {}
        found = {self._disk(name): sums[group] for group in groups if group in sums for name in group}
        if self.kept is not None:
            self.kept.save(self.index, found)
        return found

    def advance(self) -> None:
        """Carry the chains over this block into the next generation, synced."""
        if self.chains is None:
            return
        for chain in self._runners:
            target = self.chains.create(self.index + 1, chain)
            for rows in self.chains.batches():
                target[rows] = self._forward(chain, rows)
        self._runners.clear()
        self.chains.commit(self.index + 1)


def _through_cache(operator: Latent):  # type: ignore[no-untyped-def]
    """A hook that adds what rounding in the KV cache does to a projection's outputs."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        latents = operator.down.forward(args[0].float())
        return output + operator.raised(operator.cached(latents) - latents).to(output.dtype)

    return hook


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
    wanted: set[str],
    first: int = 0,
    kept: StatisticsFolder | None = None,
    probed: Collection[str] = (),
) -> Iterator[Block]:
    """Every block from `first` on; the caller rewrites it through `stages()` and then calls `advance()`.

    Args:
        chains: the calibration activations, or None when no pass needs data.
        wanted: disk names of the linears whose statistics are collected.
        kept: where statistics of the reference chain are read from, or kept if it is not complete yet.
        probed: disk names of the linears whose metrics are wanted.
    """
    for index in range(first, skeleton.blocks):
        yield Block(skeleton, index, chains, wanted, probed, kept)
