"""The walk over a model on disk, block by block, carrying the calibration activations.

Two chains may be carried (`docs/architecture.md`): the reference chain runs the original blocks, the compressed chain
runs what passes made of them. Both live in memory-mapped files, one generation per block, so resident memory is one
block and its statistics, whatever the depth of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime import processes
from ..runtime.model.experts import Experts
from ..runtime.model.families import Group, Stage
from ..runtime.model.folds import changes, seams
from ..runtime.model.skeleton import Skeleton
from ..runtime.schemes import Dense, Operator
from .capture import Capture, Replay, RoutedAs, let_round
from .chains import Chains, Spill
from .curvature import Curvature, counts
from .drive import carry
from .folders import CurvatureFolder, StatisticsFolder
from .probes import output_metrics
from .routing import experts_of
from .stage import StageWork, split_to_fit
from .statistics import ENOUGH, KINDS, UNPAIRED, Statistics


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
        folder: StatisticsFolder | None,
        room: float | None,
        stays: frozenset[str],
        curvature: CurvatureFolder | None,
        aimed: Collection[str],
    ) -> None:
        self.skeleton, self.index, self.chains, self.folder, self._room = skeleton, index, chains, folder, room
        self._curvature, self._aimed = curvature, aimed
        self._wanted, self._probed, self._stays = wanted, probed, stays
        self.linears: dict[str, Operator] = {}
        self.tensors: dict[str, Tensor] = {}  # by disk name: what is no longer as the checkpoint has it, linears aside
        self._seams = seams(skeleton, index)
        self._hooks: dict[str, Any] = {}
        self._runners: dict[str, Any] = {}
        self._seen: dict[tuple[str, str], Spill] = {}
        self._counts: dict[Group, Tensor] = {}  # what tokens count for, by their places

    def _disk(self, name: str) -> str:
        return self.skeleton.disk_name(self.index, name)

    def stages(self) -> Iterator[StageWork]:
        """Groups of linears in execution order, each with the statistics of what now enters it."""
        sequential = self.chains is not None and "compressed" in self.chains.names
        known: dict[str, Statistics] = {}
        curvatures = {} if self._curvature is None else self._curvature.load(self.index, self.skeleton.device)
        curvatures = {name: own for name, own in curvatures.items() if name in self._aimed}
        if sequential:  # others are kept for passes that aim elsewhere, too
            self._count(curvatures)
        at_once = True
        metrics: dict[str, Tensor] = {}
        if self.folder is not None and self.folder.complete:
            known = self.folder.load(self.index, self.skeleton.device)
        elif self.chains is not None:
            original = self.skeleton.block(self.index)
            if "compressed" in self.chains.names:
                # Weights are shared until a pass replaces them.
                compressed = self.skeleton.block_like(self.index, original)
                self._runners["compressed"] = self.skeleton.runner(self.index, compressed, compressed=True)
            if "reference" in self.chains.names:
                self._runners["reference"] = self.skeleton.runner(self.index, original)
            metrics = self._probe()
            every = [group for stage in self.skeleton.stages(self.index) for group in stage]
            at_once = not sequential and (self.folder is not None or self._fits(every))
            if at_once:
                known = self._collect_reference()
        for whole in self.skeleton.stages(self.index):
            names = {self._disk(name) for group in whole for name in group.linears}
            offered = {
                feeder: seam
                for feeder, seam in self._seams.items()
                if names.issuperset(seam.linears)
                and self._stays.isdisjoint(seam.linears)
                and (seam.norm or self.linears[self._disk(feeder)].scales_rows)
            }
            folded: dict[str, Tensor] = {}
            for number, stage in enumerate(self._parts(whole)):
                work = self._work(stage)
                if self._runners and not at_once:
                    work.statistics = self._collect(stage)
                else:
                    work.statistics = {name: known.pop(name) for name in work.linears if name in known}
                work.metrics = {name: metrics.pop(name) for name in work.linears if name in metrics}
                work.curvatures = {name: curvatures.pop(name) for name in work.linears if name in curvatures}
                before = dict(work.linears)
                work.seams = {} if number else offered
                for feeder, scale in folded.items():  # which the stage's first part decided
                    work.scale(offered[feeder], scale)
                yield work
                folded |= work.folded
                work.metrics.clear()
                work.curvatures.clear()
                work.statistics.clear()  # the caller still holds the work while the next stage is measured
                self.linears.update(work.linears)
                for name in (name for group in stage for name in group.linears):
                    operator = work.linears[self._disk(name)]
                    rounds = any(part.rounds_activations for part in operator.inside())
                    if rounds or operator is not before[self._disk(name)]:
                        self._put(name)
            self._fold(folded)
            self._replay(folded)

    def _count(self, curvatures: Mapping[str, Curvature]) -> None:
        """Let tokens count by their places where it is known what errors there cost; experts have none."""
        for group in (group for stage in self.skeleton.stages(self.index) for group in stage):
            known = [own for name in group.linears if (own := curvatures.get(self._disk(name))) is not None]
            if (found := counts([own.places for own in known if own.places is not None])) is not None:
                self._counts[group] = found

    def _work(self, stage: Stage) -> StageWork:
        groups = [[self._disk(name) for name in group.linears] for group in stage]
        names = [name for group in groups for name in group]
        originals = {name: self.skeleton.checkpoint.tensor(name + ".weight").to(self.skeleton.device) for name in names}
        checkpoint = self.skeleton.checkpoint
        linears = {name: checkpoint.operator(name) if name in self._stays else Dense(originals[name]) for name in names}
        return StageWork(linears, originals, groups)

    def _put(self, name: str) -> None:
        """Let the compressed chain run what became of a linear, by its name in memory."""
        if "compressed" not in self._runners:
            return
        operator, linear = self.linears[self._disk(name)], self._runners["compressed"].layers[0].get_submodule(name)
        if (earlier := self._hooks.pop(name, None)) is not None:
            earlier.remove()
        weight = operator.dense(self.skeleton.dtype).to(self.skeleton.device)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        self._hooks[name] = let_round(linear, operator)

    def _fold(self, scales: Mapping[str, Tensor]) -> None:
        """Let what feeds a stage, and readers that passes do not rewrite, follow the scales that were moved."""
        for feeder, scale in scales.items():
            seam, source = self._seams[feeder], self._disk(feeder)
            if not seam.norm:
                above = torch.ones(self.linears[source].shape[0] - seam.channels, device=scale.device)
                self.linears[source] = self.linears[source].rows_times(
                    1 / torch.cat([above, scale]).to(self.skeleton.device)
                )
                self._put(feeder)
            for name, change in changes(self.skeleton, self.index, seam, scale).items():
                module, kind = name.rsplit(".", 1)
                if kind == "weight" and self._disk(module) in self.linears:
                    continue
                self.tensors[self._disk(name)] = change(self.skeleton.checkpoint.tensor(self._disk(name)))
                if "compressed" in self._runners:
                    found = self._runners["compressed"].layers[0].get_submodule(module)
                    setattr(found, kind, nn.Parameter(change(getattr(found, kind)), requires_grad=False))

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
        return [tuple(part) for part in split_to_fit(stage, self._sizes(stage), self._room)]

    def _probe(self) -> dict[str, Tensor]:
        """Metrics of the linears for which they are wanted, from one micro-batch of what now enters the block."""
        assert self.chains is not None
        names = [name for stage in self.skeleton.stages(self.index) for group in stage for name in group.linears]
        names = [name for name in names if self._disk(name) in self._probed]
        if not names:
            return {}
        chain, runner = next(iter(self._runners.items()))  # the compressed one, if there is one
        hidden = self.chains.read(self.index, chain)[next(self.chains.batches())]
        found = processes.once(lambda: output_metrics(self.skeleton, runner, hidden, names))
        return {self._disk(name): metric for name, metric in zip(names, found, strict=True)}

    def _replay(self, scales: Mapping[str, Tensor]) -> None:
        """Of the parts whose last linear is now final, compute only that linear from here on.

        Args:
            scales: that were moved into it, by what feeds it.
        """
        family = self.skeleton.family
        moved = {
            reader: self._seams[feeder].columns(scale)
            for feeder, scale in scales.items()
            for reader in self._seams[feeder].readers
        }
        for (chain, part), inputs in self._seen.items():
            layer, end = self._runners[chain].layers[0], family.ends[part]
            name, attention = end.removeprefix(part + "."), part == family.attention
            scale = moved.get(end) if chain == "compressed" else None
            setattr(layer, part, Replay(name, layer.get_submodule(end), inputs, scale, attention=attention))
        self._seen = {}

    def _forward(self, chain: str, rows: slice, capture: Capture | None = None) -> Any:
        """One micro-batch of a chain through its block: captured inputs with a capture, else the block's output."""
        assert self.chains is not None
        runner, hidden = self._runners[chain], self.chains.read(self.index, chain)[rows]
        for module in runner.layers[0].children():
            if isinstance(module, Replay):
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
        sums = {group: self._empty(group, self._kinds(group)) for group in groups}
        self._only(groups)
        with self._captures(groups) as captures:
            for rows in self.chains.batches():
                self._add(sums, rows, captures)
        self._only(None)
        return self._whole(groups, sums)

    def _add(self, sums: Mapping[Group, Statistics], rows: slice, captures: dict[str, Capture]) -> None:
        """Take in a micro-batch, of which nothing is left when the next needs the room."""
        for group, (x, weights, reference) in self._inputs(rows, captures).items():
            sums[group].add(x, weights, reference, self._counts.get(group))

    def _empty(self, group: Group, kinds: Collection[str]) -> Statistics:
        width = self.skeleton.layers[self.index].get_submodule(group.linears[0]).in_features
        return Statistics.empty(width, kinds, self.skeleton.device)

    def _whole(self, groups: Sequence[Group], sums: dict[Group, Statistics]) -> dict[str, Statistics]:
        """By disk name, what all processes found; of groups that no token came by only what others lend them."""
        for group in groups:
            sums[group].across()
        self._lend(groups, sums)
        return {self._disk(name): sums[group] for group in groups if sums[group].met for name in group.linears}

    @contextmanager
    def _captures(self, groups: list[Group]) -> Iterator[dict[str, Capture]]:
        """What watches some groups in each chain."""
        dtype = self.skeleton.dtype
        found = {chain: Capture(runner.layers[0], groups, dtype) for chain, runner in self._runners.items()}
        yield found
        for capture in found.values():
            capture.close()

    def _inputs(
        self, rows: slice, captures: dict[str, Capture]
    ) -> dict[Group, tuple[Tensor, Tensor | None, Tensor | None]]:
        """What enters the groups that are watched, of one micro-batch: inputs, coefficients of experts, and inputs in
        the reference chain if there are two; the reference block is routed as the compressed one."""
        lead, both = "compressed" if "compressed" in self._runners else "reference", len(self._runners) == 2
        seen, reference = self._forward(lead, rows, captures[lead]), {}
        if both:
            with RoutedAs(self._runners[lead].layers[0], self._runners["reference"].layers[0]):
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
        first = next(self.chains.batches())
        for group in groups:
            number, own = self._number(group), sums[group]
            width = self.skeleton.layers[self.index].get_submodule(group.linears[0]).in_features
            if number is not None and own.tokens < ENOUGH * width:
                sums[group] = processes.once(partial(self._of_others, group, number, own.sums, first)).lent_to(own)

    def _of_others(self, group: Group, number: int, kinds: Collection[str], rows: slice) -> Statistics:
        """What an expert would make of all tokens of a micro-batch."""
        self._experts()[0].everyone = number
        with self._captures([group]) as captures:
            x, _, reference = self._inputs(rows, captures)[group]
        lent = self._empty(group, kinds)
        lent.add(x, None, reference)
        self._experts()[0].everyone = None
        return lent

    def _collect_reference(self) -> dict[str, Statistics]:
        """Statistics of all stages in one pass over the original block, which also carries the chain on."""
        assert self.chains is not None
        groups = [group for stage in self.skeleton.stages(self.index) for group in stage]
        if self.folder is None:
            groups = [group for group in groups if self._kinds(group)]
        sums = {group: self._empty(group, UNPAIRED if self.folder else self._kinds(group)) for group in groups}
        capture = Capture(self._runners["reference"].layers[0], groups, self.skeleton.dtype, stop=False)

        def run(rows: slice) -> Tensor:
            for group, (x, weights) in self._forward("reference", rows, capture).items():
                sums[group].add(x, weights)
            assert capture.output is not None
            return capture.output

        carry(self.chains, "reference", self.index + 1, run)
        capture.close()
        found = self._whole(groups, sums)
        self._runners.clear()
        self._seen = {}
        if self.folder is not None:
            self.folder.save(self.index, found)
        return found

    def advance(self) -> None:
        """Carry the chains over this block into the next generation, synced."""
        if self.chains is None:
            return
        for chain in self._runners:
            carry(self.chains, chain, self.index + 1, partial(self._forward, chain))
        self._runners.clear()
        self.chains.commit(self.index + 1)


def walk(
    skeleton: Skeleton,
    chains: Chains | None,
    wanted: Mapping[str, Collection[str]],
    first: int = 0,
    folder: StatisticsFolder | None = None,
    probed: Collection[str] = (),
    room: float | None = None,
    stays: frozenset[str] = frozenset(),
    curvature: CurvatureFolder | None = None,
    aimed: Collection[str] = (),
) -> Iterator[Block]:
    """Every block from `first` on; the caller rewrites it through `stages()` and then calls `advance()`.

    Args:
        chains: the calibration activations, or None when no pass needs data.
        wanted: disk name → kinds of statistics (`statistics.KINDS`) that are collected of what enters the linear.
        folder: where statistics of the reference chain are read from, or kept if it is not complete yet.
        probed: disk names of the linears whose metrics are wanted.
        room: bytes of statistics at a time; stages that have more come in parts. Default: no limit.
        stays: disk names of linears that keep the form in which the checkpoint has them.
        curvature: what errors of the linears' outputs cost, where a pass asks for it.
        aimed: disk names of the linears for which one does. With the compressed chain, tokens count in their statistics
            by what errors at their places cost (`curvature.counts`).
    """
    for index in range(first, skeleton.blocks):
        skeleton.checkpoint.expect(index, index + 1)
        yield Block(skeleton, index, chains, wanted, probed, folder, room, stays, curvature, aimed)
