"""Recipe × model headers → what will be done to each tensor, before any weight is rewritten."""

from __future__ import annotations

import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..calibrate.chains import BATCH_TOKENS
from ..calibrate.corpus import find_text
from ..runtime.architectures import KEYS, PARTS, VALUES
from ..runtime.checkpoint import Checkpoint, block_index
from ..runtime.errors import RecipeError, ResourceError
from ..runtime.fused import fuse
from ..runtime.operators import Dense, Latent, LowRank, Operator, stored_name
from ..runtime.skeleton import Skeleton
from .formats import PLAIN, as_written, choose_format, describe
from .passes.base import BUFFERS, Cost, Pass, Survey
from .recipe import Recipe


@dataclass(frozen=True)
class LinearPlan:
    """One linear: the passes it goes through and what it becomes (on `meta`)."""

    steps: tuple[str, ...]
    before: int
    operator: Operator


@dataclass(frozen=True)
class Plan:
    """What a recipe does to a model.

    Attributes:
        recipe: with passes prepared for the model.
        skeleton: the model that is written: with fewer experts, if a pass drops some.
        linears: disk name without `.weight` → plan, for every linear of every block, rewritten or not.
        tensors: every tensor of the output in order: name → (dtype, shape).
        format, readers: what is written and who reads it.
        needs: statistics the passes ask for.
        bytes_before, bytes_after: of all weights.
        memory, disk: peak bytes while applying: resident beyond the imports, and in OUT.work.
        flops: of calibration and solving.
        kv_before, kv_after: bytes of the KV cache for each token, in the dtype of the weights.
    """

    recipe: Recipe
    skeleton: Skeleton
    linears: dict[str, LinearPlan]
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    format: str
    readers: tuple[str, ...]
    needs: frozenset[str]
    bytes_before: int
    bytes_after: int
    memory: int
    disk: int
    flops: float
    kv_before: int
    kv_after: int

    @property
    def rewritten(self) -> dict[str, Operator]:
        return {name: plan.operator for name, plan in self.linears.items() if plan.steps}


@dataclass(frozen=True)
class Row:
    """A line of the plan: linears of one folded name that share shape and fate."""

    name: str
    count: int
    parameters: int
    steps: tuple[str, ...]
    becomes: str
    bits: float
    before: int
    after: int


def make_plan(recipe: Recipe, skeleton: Skeleton, *, look: bool = False) -> Plan:
    """Plan a recipe for a model.

    Args:
        look: let passes that need no data survey the weights, to plan what they will find.

    Raises:
        RecipeError: a pass that matches nothing, that would make a tensor larger, or that cannot follow another;
            or a format that cannot hold the result.
    """
    whole = skeleton.checkpoint
    recipe, skeleton, survey = _prepared(recipe, skeleton, look)
    checkpoint = skeleton.checkpoint
    for step in (step for step in recipe.passes if step.needs):
        if (source := step.text or recipe.data.source) != "builtin":
            find_text(Path(source))
    linears: dict[str, LinearPlan] = {}
    matched = [0] * len(recipe.passes)
    for group in input_groups(skeleton):
        linears |= _plan_group(recipe, checkpoint, group, matched)
    for number, count in enumerate(matched):
        if not count and not recipe.passes[number].reshapes:
            example = next(iter(linears))
            raise RecipeError(
                f"passes.{number} ({recipe.passes[number].step}) matches no linear of this model: targets "
                f"{list(recipe.passes[number].targets)}, ignore {list(recipe.passes[number].ignore)}; "
                f"names look like {example}"
            )
    operators = {name: linear.operator for name, linear in linears.items()}
    chosen, readers = choose_format(recipe.output.format, operators, input_groups(skeleton))
    for name, linear in linears.items():
        dtype = checkpoint.tensors[name + ".weight"].dtype
        linears[name] = replace(linear, operator=as_written(linear.operator, chosen, dtype))
    tensors = _output_tensors(checkpoint, linears, chosen)
    needs = frozenset(need for step in recipe.passes for need in step.needs)
    after = sum(_nbytes(dtype, shape) for dtype, shape in tensors.values())
    return Plan(
        recipe, skeleton, linears, tensors, chosen, readers, needs, whole.nbytes, after,
        int(max(_peak_memory(recipe, skeleton, linears, needs), survey.memory)),
        int(max(after + _chain_bytes(recipe, skeleton, needs) + survey.left, survey.disk)),
        _flops(recipe, skeleton, linears, needs) + survey.flops, *_cache_bytes(checkpoint, linears),
    )  # fmt: skip


def _prepared(recipe: Recipe, skeleton: Skeleton, look: bool) -> tuple[Recipe, Skeleton, Cost]:
    """Passes prepared, each for the model that those before it leave; what the last one leaves; cost of the surveys."""
    passes: list[Pass] = []
    costs: list[Cost] = []
    for number, step in enumerate(recipe.passes):
        try:
            if step.reshapes and any(not earlier.reshapes for earlier in passes):
                raise RecipeError(f"{step.step} changes the model itself: put it before all other passes")
            ready = step.prepare(skeleton)
        except RecipeError as error:
            raise RecipeError(f"passes.{number}: {error}") from None
        if look and not ready.needs:
            ready = ready.survey(skeleton, Survey(None, Path(), lambda event: None))
        costs.append(ready.survey_cost(skeleton, recipe.data.samples, recipe.data.sequence_length))
        skeleton = ready.view(skeleton)
        passes.append(ready)
    return recipe.model_copy(update={"passes": tuple(passes)}), skeleton, Cost.of(costs)


def input_groups(skeleton: Skeleton) -> list[list[str]]:
    """Disk names of the linears that read the same input (and that some readers put into one matrix)."""
    return [group for index in range(skeleton.blocks) for group in _groups(skeleton, index)]


def _groups(skeleton: Skeleton, index: int) -> list[list[str]]:
    return [[skeleton.disk_name(index, name) for name in group] for stage in skeleton.stages(index) for group in stage]


def _original(checkpoint: Checkpoint, name: str) -> Dense:
    info = checkpoint.tensors[name + ".weight"]
    return Dense(torch.empty(info.shape, dtype=info.dtype, device="meta"))


def _plan_group(recipe: Recipe, checkpoint: Checkpoint, group: list[str], matched: list[int]) -> dict[str, LinearPlan]:
    """Linears that read the same input through all passes that want them; they are counted in `matched`."""
    originals = {name: _original(checkpoint, name) for name in group}
    plans = {name: LinearPlan((), int(original.nbytes), original) for name, original in originals.items()}
    for number, step in enumerate(recipe.passes):
        wanted = [name for name in group if step.wants(name)]
        matched[number] += len(wanted)
        # Factors are solved on their own, not beside what reads the same input.
        together = {name: originals[name] for name in wanted if not isinstance(plans[name].operator, LowRank)}
        for name in wanted:
            try:
                result = step.plan(name, plans[name].operator, together)
            except RecipeError as error:
                raise RecipeError(f"passes.{number}: {error}") from None
            before = plans[name].before
            if result.nbytes > before and not step.may_grow:
                raise RecipeError(
                    f"passes.{number} ({step.step}) would make {name} larger: {before:,} → "
                    f"{result.nbytes:,.0f} bytes; ignore it, or use fewer bits or larger groups"
                )
            plans[name] = LinearPlan((*plans[name].steps, step.step), before, result)
    return plans


def rows(plan: Plan) -> list[Row]:
    """The plan folded: layer and expert numbers become `*`, equal lines are counted."""
    folded: dict[tuple[str, tuple[str, ...], str, tuple[int, int]], list[tuple[int, float]]] = {}
    blocks: dict[Any, set[int]] = {}
    for name, linear in plan.linears.items():
        short = re.sub(r"\.\d+\.", ".*.", name)
        key = (short, linear.steps, describe(linear.operator), linear.operator.shape)
        folded.setdefault(key, []).append((linear.before, linear.operator.nbytes))
        index = block_index(name + ".weight")
        assert index is not None
        blocks.setdefault(key, set()).add(index)
        blocks.setdefault(short, set()).add(index)
    result = []
    for key, sizes in folded.items():
        name, steps, becomes, shape = key
        if blocks[key] != blocks[name]:
            name = name.replace(".layers.*.", f".layers.{_ranges(blocks[key])}.", 1)
        parameters = len(sizes) * shape[0] * shape[1]
        before, after = (sum(column) for column in zip(*sizes, strict=True))
        result.append(Row(name, len(sizes), parameters, steps, becomes, 8 * after / parameters, before, round(after)))
    return result


def check_disk(plan: Plan, out: Path) -> None:
    """Refuse to start where the disk cannot hold the work folder."""
    folder = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(folder).free
    if free < plan.disk:
        raise ResourceError(
            f"{folder}: {free / 1e9:.2f} GB free, {plan.disk / 1e9:.2f} GB needed (weights and calibration "
            "activations); free some space or write elsewhere"
        )


def _ranges(numbers: set[int]) -> str:
    """`0,2-4` for 0, 2, 3, 4."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def available_memory() -> int | None:
    """Bytes this process may still take, or None where the system does not say."""
    free = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(1024 * int(lines["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        return None
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            free.append(int(Path(limit).read_text()) - int(Path(usage).read_text()))
    return min(free)


def check_memory(plan: Plan) -> None:
    """Refuse to start what the machine cannot hold."""
    free = available_memory()
    if free is not None and free < plan.memory:
        raise ResourceError(
            f"about {plan.memory / 1e9:.2f} GB of memory are needed and {free / 1e9:.2f} GB are available; close other "
            "programs, or run on a larger machine"
        )


def estimated_seconds(plan: Plan) -> float:
    """Time to apply, from the plan's work and the speed of a GEMM measured now."""
    a = torch.randn(1024, 1024)
    a @ a
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    speed = 3 * 2 * 1024**3 / (time.perf_counter() - start)
    blocks = 1 + max(index for name in plan.linears if (index := block_index(name + ".weight")) is not None)
    return plan.flops / speed + plan.disk / 2e8 + 5 + 0.5 * blocks  # reading text, checks, steps too small to count


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _output_tensors(
    checkpoint: Checkpoint, linears: dict[str, LinearPlan], chosen: str
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    tensors: dict[str, torch.Tensor] = {}
    for name, info in checkpoint.tensors.items():
        linear = linears.get(name.removesuffix(".weight"))
        if linear is None or not linear.steps:
            tensors[name] = torch.empty(info.shape, dtype=info.dtype, device="meta")
            continue
        for suffix, tensor in linear.operator.to_tensors().items():
            tensors[stored_name(name.removesuffix(".weight"), suffix)] = tensor
    if chosen == PLAIN:
        tensors = fuse(checkpoint.architecture, tensors)
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _cache_bytes(checkpoint: Checkpoint, linears: dict[str, LinearPlan]) -> tuple[int, int]:
    """Bytes of the KV cache for each token, before and after; 0 for families that cache something else."""
    before = after = 0
    for name, linear in linears.items():
        if name.endswith((KEYS, VALUES)):
            full = linear.operator.shape[0] * checkpoint.dtype.itemsize
            before += full
            latent = linear.operator
            after += latent.cached_bytes(checkpoint.dtype.itemsize) if isinstance(latent, Latent) else full
    return before, after


def _chain_bytes(recipe: Recipe, skeleton: Skeleton, needs: frozenset[str]) -> int:
    """Disk for calibration: two generations of each chain, and a block's inputs that are kept while it is rewritten."""
    if not needs:
        return 0
    kept = 0
    for index in range(skeleton.blocks):
        inner = skeleton.model.model.layers[index]
        modules = dict(inner.named_modules())
        widths = [modules[last].in_features for last in PARTS.values() if last in modules]
        kept = max(kept, sum(widths) * skeleton.dtype.itemsize)
    tokens = recipe.data.samples * recipe.data.sequence_length
    return len(chain_names(needs)) * tokens * (2 * 4 * skeleton.config.hidden_size + kept)


def chain_names(needs: frozenset[str]) -> tuple[str, ...]:
    """Which chains of activations the needs call for."""
    if "cross" in needs:
        return "compressed", "reference"
    return ("compressed",) if "moment" in needs else ("reference",) if needs else ()


def _peak_memory(recipe: Recipe, skeleton: Skeleton, linears: dict[str, LinearPlan], needs: frozenset[str]) -> int:
    """Anonymous bytes beyond the imports at the worst moment: a group being solved, or a block run and measured.

    Weights of the checkpoint are mapped from its files and do not count unless they are converted.
    """
    batch = max(1, BATCH_TOKENS // recipe.data.sequence_length) * recipe.data.sequence_length
    item = skeleton.dtype.itemsize
    converted = item if skeleton.dtype != skeleton.checkpoint.dtype else 0
    hidden = skeleton.config.hidden_size
    chains = len(chain_names(needs))
    peak = 0.0
    at_once = chain_names(needs) == ("reference",)  # moments of all stages, from one run of the block
    for index in range(skeleton.blocks):
        shapes = {name: (w.out_features, w.in_features) for name, w in skeleton.linears(index).items()}
        wanting = {name: [step for step in recipe.passes if step.wants(name)] for name in shapes}
        held = sum(r * c for r, c in shapes.values()) * (converted if needs else 0)
        done = 0
        measured = [
            4 * shapes[group[0]][1] ** 2 if any(step.needs for name in group for step in wanting[name]) else 0
            for group in _groups(skeleton, index)
        ]
        # At the end the output is run once, each block decoded.
        largest = max(r * c for r, c in shapes.values())
        peak = max(peak, sum(r * c for r, c in shapes.values()) * item + 6.0 * largest)
        before = 0
        for stage in skeleton.stages(index):
            groups = _groups(skeleton, index)[before : before + len(stage)]
            moments = sum(measured) if at_once else sum(measured[before : before + len(stage)]) * chains
            before += len(stage)
            widest = max(shapes[name][1] for group in groups for name in group)
            # The widest activations of a forward pass, or one of them measured; the residual stream of both chains.
            running = batch * (max(3 * item, item + 6) * widest + 12 * hidden) if needs else 0
            asked = [
                (step, [linears[name].operator for name in group if step in wanting[name]])
                for group in groups
                for step in recipe.passes
            ]
            solving = max((step.memory(wanted) for step, wanted in asked if wanted), default=0.0)
            peak = max(peak, held + done + moments + (BUFFERS if needs else 0) + max(running, solving))
            rewritten = (shapes[name] for group in groups for name in group if wanting[name])
            done += sum(r * c for r, c in rewritten) * (1 + (item if needs else 0))
    return int(peak)


def _flops(recipe: Recipe, skeleton: Skeleton, linears: dict[str, LinearPlan], needs: frozenset[str]) -> float:
    tokens = recipe.data.samples * recipe.data.sequence_length
    total = 0.0
    for name, plan in linears.items():
        r, c = plan.operator.shape
        if needs:  # about three forward passes per chain, and the statistics
            total += 2.0 * tokens * r * c * 3 * len(chain_names(needs)) + 2.0 * tokens * c * c
        total += sum(step.flops(r, c) for step in recipe.passes if step.wants(name))
    return total
