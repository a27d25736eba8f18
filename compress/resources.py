"""What a run takes: memory, disk, time; and what the machine has."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..calibrate.chains import BATCH_TOKENS
from ..calibrate.curvature import curvature_cost, walked_samples
from ..calibrate.routing import routed_share
from ..calibrate.stage import split_to_fit
from ..calibrate.statistics import KINDS, paired
from ..calibrate.tuning import GRAPH_TOKENS
from ..calibrate.tuning import LOGITS as TUNED_LOGITS
from ..runtime.errors import ResourceError, human_size
from ..runtime.memory import HOST, available_memory
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.model.rotations import ROWS
from ..runtime.model.skeleton import HEAD_ROWS, Skeleton, calibration_dtype
from .evaluate.blocks import evaluation_memory
from .passes.base import BUFFERS, SURVEYED, Cost
from .recipe import Data, Recipe

if TYPE_CHECKING:
    from .plan import LinearPlan, Plan

# Tokens that are held out of calibration text, one for so many that are not: a small part of a run, and enough to tell
# whether it went well.
LEAST, MOST, SHARE = 1024, 2048, 24
_ROUNDING = 600.0  # operations for each number that is rounded in the best of some ranges
_TARGETS = 7.0  # bytes for each number of a matrix outside blocks, beside what the pass that solves it counts
_MAKING = 16.0  # bytes for each number of a matrix that is made when it is read, ROWS at a time
LENGTH = 512  # tokens of a window to measure on, at most
Linears = Mapping[str, "LinearPlan"]


def held_out_tokens(data: Data) -> int:
    """Of calibration text, to compare the output with the original."""
    return min(max(data.tokens // SHARE, LEAST), MOST)


def held_out_windows(data: Data) -> int:
    """The same in windows."""
    return max(1, held_out_tokens(data) // min(data.sequence_length, LENGTH))


def measured_tokens(data: Data) -> int:
    """On which that is done: those, and half as many that calibrated."""
    return held_out_tokens(data) * 3 // 2


def widest_input(skeleton: Skeleton) -> int:
    """Columns of the widest linear of all blocks."""
    return max(linear.in_features for index in range(skeleton.blocks) for linear in skeleton.linears(index).values())


def chain_names(needs: frozenset[str]) -> tuple[str, ...]:
    """Which chains of activations the needs call for."""
    if paired(needs):
        return "compressed", "reference"
    if "compressed" in needs:
        return ("compressed",)
    return ("reference",) if "reference" in needs else ()


@dataclass(frozen=True)
class StageMemory:
    """Bytes beyond the imports while the groups of a stage are measured and solved: statistics of each group of the
    stage, those of the whole block if they are taken in one run, and all else."""

    moments: list[float]
    block: list[float]
    rest: float

    def peak(self, room: float | None) -> float:
        """With at most so many bytes of moments at a time, if that can be."""
        together = self.block if self.block and (room is None or sum(self.block) <= room) else self.moments
        if together is self.block:
            return self.rest + sum(self.block)
        return self.rest + max((sum(part) for part in split_to_fit(self.moments, self.moments, room)), default=0.0)


def stage_memory(recipe: Recipe, skeleton: Skeleton, linears: Linears, needs: frozenset[str]) -> list[StageMemory]:
    """Of every stage of every block, on the device where these run.

    Weights of the checkpoint are mapped from its files and do not count unless they are converted, or copied to a GPU.
    """
    at_once = chain_names(needs) == ("reference",)
    stays = {name for name, plan in linears.items() if not plan.steps and plan.operator.kind != "dense"}
    found: list[StageMemory] = []
    for index in range(skeleton.blocks):
        shapes = {name: (w.out_features, w.in_features) for name, w in skeleton.linears(index).items()}
        wanting = {name: [step for step in recipe.linear_passes.values() if step.wants(name)] for name in shapes}
        item = skeleton.dtype.itemsize
        sizes = {name: r * c for name, (r, c) in shapes.items()}
        converted = item if skeleton.copies and needs else 0
        original = _original(skeleton)
        held, block = float(sum(sizes.values()) * converted), list[float]()
        for stage in skeleton.stages(index):
            groups = [[skeleton.disk_name(index, name) for name in group.linears] for group in stage]
            kinds = [{need for name in group for step in wanting[name] for need in step.needs} for group in groups]
            moments = [
                sum(kind.nbytes(shapes[group[0]][1]) for name, kind in KINDS.items() if name in asked)
                for group, asked in zip(groups, kinds, strict=True)
                if asked
            ]
            block += moments if at_once else []
            working = _working(recipe, skeleton, linears, needs, groups)
            working += float(original * sum(sizes[name] for group in groups for name in group))
            working = max(working, _MAKING * max(sizes.values()) * skeleton.checkpoint.anew)
            found.append(StageMemory(moments, block, held + working + (BUFFERS if needs else 0)))
            held += sum(
                sizes[name] * (1 + (item if needs else 0) if wanting[name] else 1 if name in stays else original)
                for group in groups
                for name in group
            )
    return found


def comparing_memory(recipe: Recipe, skeleton: Skeleton, linears: Linears, *, calibrated: bool) -> tuple[float, float]:
    """While the output is run beside the original, a block of each decoded: on the device, and on the host if that is
    another."""
    item, decoded = skeleton.dtype.itemsize, calibration_dtype(skeleton.checkpoint).itemsize
    linears_of = [list(skeleton.linears(index).values()) for index in range(skeleton.blocks)]
    sizes = [[linear.in_features * linear.out_features for linear in block] for block in linears_of]
    block = max(map(sum, sizes))
    decoding = block * decoded + 6.0 * max(map(max, sizes))
    tokens = measured_tokens(recipe.data) if calibrated else LEAST
    running = _running(skeleton, min(tokens, BATCH_TOKENS), max(w.in_features for block in linears_of for w in block))
    head = set(linears).intersection(skeleton.outer())
    beside = max(running, evaluation_memory(skeleton, tokens, decoded=bool(head)))
    if _on_host(skeleton):
        together = decoding + block * item * skeleton.copies + beside
        return together, together
    return 2 * block * item + beside, decoding + 2 * 4.0 * tokens * skeleton.width


def walk_back_cost(recipe: Recipe, skeleton: Skeleton) -> Cost:
    """Of finding what errors of linears cost the model, and what passes ask of that, if any does.

    Args:
        recipe: with prepared passes.
    """
    steps = list(recipe.linear_passes.values())
    asking = [step for step in steps if step.foretells is not None]
    metrics = any("curvature" in step.needs for step in steps)
    if not (asking or metrics):
        return Cost()
    length = recipe.data.sequence_length
    samples, met = recipe.data.tokens // length, 0.0
    memory, disk, left, flops = curvature_cost(skeleton, samples, length, metrics=metrics)
    seen = walked_samples(skeleton, samples, length) * length
    for index in range(skeleton.blocks):
        held, solving = 0.0, 0.0
        for name, linear in skeleton.linears(index).items():
            rows, columns = linear.weight.shape
            each = [step.foretelling(rows, columns) for step in asking if step.wants(name)]
            held += 2 * 4.0 * columns**2 * bool(each)
            solving = max([solving, *(needed for needed, _ in each)])
            flops += seen * 2.0 * columns**2 * bool(each) + sum(spent for _, spent in each)
        met = max(met, held + solving)
    return Cost(BUFFERS + memory + met, disk - left, left, flops)


def tune_cost(recipe: Recipe, skeleton: Skeleton, linears: Linears) -> Cost:
    """Of the recipe's `tune`."""
    if recipe.tune is None:
        return Cost()
    length, item, width = recipe.data.sequence_length, skeleton.dtype.itemsize, skeleton.width
    seen, step = recipe.tune.samples * length, recipe.tune.batch * length
    inside = [list(skeleton.linears(index).values()) for index in range(skeleton.blocks)]
    sizes = [[linear.weight.numel() for linear in block] for block in inside]
    widest = max(max(linear.weight.shape) for block in inside for linear in block)
    vocabulary, hidden = skeleton.config.vocab_size, skeleton.config.hidden_size
    block = max(map(sum, sizes)) * (2 * item + 1)  # its weights, their gradients, and codes
    graph = max(GRAPH_TOKENS, length) * (6.0 * item * widest + 4.0 * 12 * width)
    gathering = 16.0 * max(map(max, sizes))  # one matrix in float32 with what its gradient goes through
    logits = 6 * 4.0 * max(TUNED_LOGITS, 32 * vocabulary) + 2 * 4.0 * hidden * min(vocabulary, HEAD_ROWS)
    kept = step * width * (skeleton.blocks * (item if skeleton.wide is None else 4) + 3 * 4.0)
    trained = (scales for plan in linears.values() for scales in plan.operator.multipliers().values())
    state = 4.0 * sum(scales.numel() for scales in trained)
    reached = sum(
        linear.weight.numel() * (1.0 if skeleton.family.expert(name) is None else routed_share(skeleton, own))
        for own in map(skeleton.linears, range(skeleton.blocks))
        for name, linear in own.items()
    )
    # Of a weight: once in the original, forward twice and back twice in what is trained.
    flops = seen * (10.0 * reached + 8.0 * vocabulary * hidden)
    head = (
        skeleton.checkpoint.dtype.itemsize * vocabulary * hidden if set(linears).intersection(skeleton.outer()) else 0
    )
    peak = BUFFERS + max(block + graph, block + gathering, logits) + kept + head + 6 * state
    return Cost(peak, 2 * 4.0 * seen * width + 7 * state, 0.0, flops)


def _original(skeleton: Skeleton) -> int:
    """Bytes that a number of the checkpoint takes once it is read."""
    return skeleton.checkpoint.dtype.itemsize if skeleton.checkpoint.anew or not _on_host(skeleton) else 0


def _on_host(skeleton: Skeleton) -> bool:
    return skeleton.device.type == "cpu"


def _running(skeleton: Skeleton, tokens: int, widest: int) -> float:
    """A batch on its way through a block: its widest activations, or one of them measured, and the residual stream of
    both chains."""
    item = skeleton.dtype.itemsize
    return float(tokens * (max(3 * item, item + 6) * widest + 12 * skeleton.width))


def outer_memory(recipe: Recipe, skeleton: Skeleton, linears: Linears) -> float:
    """While the embedding and the head are rewritten, then packed and written, and each unpacked to compare."""
    held = peak = packed = largest = 0.0
    original, hidden = _original(skeleton), skeleton.config.hidden_size
    if any(skeleton.checkpoint.made(f"{name}.weight") for name in skeleton.outer()):  # written one at a time
        peak = (
            original * skeleton.checkpoint.vocabulary + _MAKING * min(ROWS, skeleton.checkpoint.vocabulary)
        ) * hidden
    for name in (name for name in skeleton.outer() if name in linears and linears[name].steps):
        operator = linears[name].operator
        steps = [step for step in recipe.linear_passes.values() if step.names(name)]
        held += original * math.prod(operator.shape)
        solving = _TARGETS * math.prod(operator.shape) if any(step.needs - SURVEYED for step in steps) else 0.0
        peak = max(peak, held + solving + max(step.memory([operator]) for step in steps))
        held += math.prod(operator.shape)  # codes, not packed yet
        packed, largest = packed + operator.nbytes, max(largest, math.prod(operator.shape))
    return max(peak, held + packed + largest)


def _working(
    recipe: Recipe, skeleton: Skeleton, linears: Linears, needs: frozenset[str], groups: Sequence[Sequence[str]]
) -> float:
    """The larger of running a block and solving a group."""
    batch = max(1, BATCH_TOKENS // recipe.data.sequence_length) * recipe.data.sequence_length
    widest = max(linears[name].operator.shape[1] for group in groups for name in group)
    running = _running(skeleton, batch, widest) if needs else 0.0
    experts = (name for group in groups for name in group if skeleton.family.expert(name) is not None)
    if needs and any(experts):  # every expert's inputs are kept
        running += len(chain_names(needs)) * batch * skeleton.experts_per_token * widest * skeleton.dtype.itemsize
    steps = recipe.linear_passes.values()
    asked = [(step, [name for name in group if step.wants(name)]) for group in groups for step in steps]
    solving = (step.memory([linears[name].operator for name in names]) for step, names in asked if names)
    return max(running, *solving, 0.0)


def room_for_moments(stages: Sequence[StageMemory], budget: float | None) -> float | None:
    """Bytes of statistics at a time with which a run stays within a budget, if it can; None: all of a stage."""
    if budget is None or all(stage.peak(None) <= budget for stage in stages):
        return None
    budget *= 0.95  # what is predicted is not exact, and what is available changes
    tight = [stage for stage in stages if stage.peak(None) > budget]
    return max(1.0, min(budget - stage.rest for stage in tight))


def chain_bytes(recipe: Recipe, skeleton: Skeleton, needs: frozenset[str]) -> int:
    """Disk for calibration: two generations of each chain, and a block's inputs that are kept while it is rewritten."""
    if not needs:
        return 0
    kept, tokens = 0, recipe.data.tokens
    for layer in skeleton.layers:
        modules = dict(layer.named_modules())
        widths = [modules[last].in_features for last in skeleton.family.ends.values() if last in modules]
        kept = max(kept, sum(widths) * skeleton.dtype.itemsize)
    return len(chain_names(needs)) * tokens * (2 * 4 * skeleton.width + kept)


def _running_work(recipe: Recipe, skeleton: Skeleton, needs: frozenset[str]) -> float:
    """Floating-point operations of running blocks, and of summing statistics of what enters each group: in every chain
    each linear once, and where passes see what others made of earlier ones, that in which attention ends twice more,
    for the two stages of the MLP."""
    tokens, chains, total = recipe.data.tokens, chain_names(needs), 0.0
    repeated = skeleton.family.ends.get(skeleton.family.attention) if "compressed" in chains else None
    for index in range(skeleton.blocks):
        inside = skeleton.linears(index)
        routed = routed_share(skeleton, inside)
        for group in (group for stage in skeleton.stages(index) for group in stage):
            names = [skeleton.disk_name(index, name) for name in group.linears]
            passes = [step for step in recipe.linear_passes.values() if any(map(step.wants, names))]
            asked = {need for step in passes for need in step.needs}
            run = sum(
                inside[name].weight.numel() * (3 if inner == repeated else 1)
                for name, inner in zip(names, group.linears, strict=True)
            )
            summed = inside[names[0]].in_features ** 2 * sum(
                kind.work for kind_name, kind in KINDS.items() if kind_name in asked
            )
            share = 1.0 if skeleton.family.expert(names[0]) is None else routed
            total += 2.0 * tokens * share * (len(chains) * run + summed)
    return total


def work(recipe: Recipe, skeleton: Skeleton, linears: Linears, needs: frozenset[str]) -> dict[str, float]:
    """Floating-point operations of running blocks and summing statistics, of passes, and of comparing the output with
    the original."""
    compared = measured_tokens(recipe.data) if needs else LEAST
    outer = skeleton.outer()
    routed = routed_share(skeleton, [name for name in linears if name not in outer])
    running, solving = _running_work(recipe, skeleton, needs) if needs else 0.0, 0.0
    comparing = 4.0 * compared * skeleton.config.vocab_size * skeleton.config.hidden_size
    for name, plan in linears.items():
        index = skeleton.checkpoint.block_index(f"{name}.weight")
        if name not in outer and (index is None or index >= skeleton.blocks):
            continue  # which is not run
        r, c = plan.operator.shape
        if name in outer:
            steps = (step for step in recipe.linear_passes.values() if step.names(name))
            solving += sum(min(step.flops(r, c), _ROUNDING * r * c) for step in steps)  # nothing is solved for there
            continue
        comparing += 4.0 * compared * r * c * (1.0 if skeleton.family.expert(name) is None else routed)
        solving += sum(step.flops(r, c) for step in recipe.linear_passes.values() if step.wants(name))
    return {"blocks": running, "passes": solving, "comparing": comparing}


def check_memory(plan: Plan, limit: float | None) -> None:
    """Refuse to start what the machine, or the limit that was set, cannot hold."""
    device = plan.skeleton.device
    if limit is not None and limit < plan.memory:
        raise ResourceError(
            f"about {human_size(plan.memory)} of memory are needed, --memory allows {human_size(limit)}; allow more, "
            "or take a cheaper pass"
        )
    for place, needed in {device: plan.memory, HOST: plan.host}.items():
        free, where = available_memory(place), "memory" if place == HOST else f"memory of {place}"
        if free is not None and free < needed:
            raise ResourceError(
                f"about {human_size(needed)} of {where} are needed and {human_size(free)} are available; close other "
                "programs, or run on a larger machine"
            )


def estimated_seconds(plan: Plan) -> dict[str, float]:
    """Time that each part of a run takes, from the plan's work and the speed of a GEMM measured now."""
    a = torch.randn(1024, 1024, device=plan.skeleton.device)
    float((a @ a)[0, 0])
    start = time.perf_counter()
    for _ in range(3):
        float((a @ a)[0, 0])  # waits for a GPU
    speed = 3 * 2 * 1024**3 / (time.perf_counter() - start)
    small = 5 + 0.5 * plan.skeleton.blocks  # reading text, checks, steps too small to count
    return {part: count / speed for part, count in plan.work.items()} | {"files": plan.disk / 2e8 + small}


def check_disk(plan: Plan, out: Path) -> None:
    """Refuse to start where the disk cannot hold the work folder."""
    folder = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(folder).free
    if free < plan.disk:
        raise ResourceError(
            f"{folder}: {human_size(free)} free, {human_size(plan.disk)} needed (weights and calibration "
            "activations); free some space or write elsewhere"
        )


def cache_bytes(checkpoint: Checkpoint, linears: Linears) -> tuple[int, int]:
    """Bytes of the KV cache for each token, before and after; 0 for families that cache something else."""
    before = after = 0
    cached = (checkpoint.family.keys, checkpoint.family.values)
    for name, linear in linears.items():
        if checkpoint.block_index(f"{name}.weight") is not None and checkpoint.family.inside(name) in cached:
            full = linear.operator.shape[0] * checkpoint.dtype.itemsize
            before += full
            after += linear.operator.cached_bytes(checkpoint.dtype.itemsize)
    return before, after
