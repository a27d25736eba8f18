"""Recipe × model headers → what will be done to each tensor, before any weight is rewritten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..calibrate.corpus import find_text
from ..runtime.errors import RecipeError
from ..runtime.formats import NATIVE, PLAIN, Around, WrittenFormat, choose_format
from ..runtime.memory import available_memory
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.model.disk_experts import fuse
from ..runtime.model.families import starred
from ..runtime.model.skeleton import Skeleton
from ..runtime.schemes import LOOKUPS, Dense, Operator, rewritten, stored_name
from .passes.base import SURVEYED, Cost, LinearPass, ModelPass, Pass, Survey
from .recipe import TOKENS, Recipe, little_text
from .resources import (
    cache_bytes,
    chain_bytes,
    comparing_memory,
    held_out_windows,
    outer_memory,
    room_for_moments,
    stage_memory,
    tune_cost,
    walk_back_cost,
    widest_input,
    work,
)  # fmt: skip
from .surveys import Text, read_calibration

_MUCH = 0.05  # of all bytes, from which it is told what no pass rewrites
_GROWTH = 1.1  # how many times as large an output may be, so that engines read it


@dataclass(frozen=True)
class LinearPlan:
    """One linear: the passes it goes through, bytes that it had, and what it becomes (on `meta`)."""

    steps: tuple[str, ...]
    before: int
    operator: Operator


@dataclass(frozen=True)
class Plan:
    """What a recipe does to a model.

    Attributes:
        recipe: with passes prepared for the model.
        skeleton: the model that is written: with fewer experts, if a pass drops some.
        linears: disk name without `.weight` → plan, for every linear of every block, rewritten or not, and for what
            lies outside and is rewritten, or not stored as plain weights.
        tensors: every tensor of the output in order: name → (dtype, shape).
        format, readers: what is written and who reads it.
        obstacle: what keeps outside readers from it, or nothing.
        needs: statistics the passes ask for.
        bytes_before, bytes_after: of all weights.
        memory, disk: peak bytes while applying: resident beyond the imports where blocks run, and in OUT.work.
        host: the same as `memory` for the host, where blocks run on a GPU.
        work: part of a run → its floating-point operations; surveys, and what `resources.work` says.
        kv_before, kv_after: bytes of the KV cache for each token, in the dtype of the weights.
        room: bytes of statistics at a time, or None for those of a whole stage.
        warnings: what a person should know before the run, a sentence each.
        left: disk names of the blocks' matrices that stay as they are because the family does not name them.
    """

    recipe: Recipe
    skeleton: Skeleton
    linears: dict[str, LinearPlan]
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    format: WrittenFormat
    readers: tuple[str, ...]
    obstacle: str
    needs: frozenset[str]
    bytes_before: int
    bytes_after: int
    memory: int
    disk: int
    work: Mapping[str, float]
    kv_before: int
    kv_after: int
    room: float | None
    host: int
    left: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @cached_property
    def rewritten(self) -> dict[str, Operator]:
        """Disk name → operator, of the linears that are stored in another form than as plain weights."""
        return rewritten({name: plan.operator for name, plan in self.linears.items()})

    @cached_property
    def stays(self) -> frozenset[str]:
        """Disk names of those that no pass rewrites: they keep the form that they have in the model."""
        return frozenset(name for name in self.rewritten if not self.linears[name].steps)

    @property
    def notes(self) -> list[str]:
        """What the table of linears does not show."""
        tune = self.recipe.tune
        trained = [] if tune is None else [f"tune: scales and norms are trained on {tune.samples} windows"]
        return [f"{step.kind}: {step.note}" for step in self.recipe.passes if step.note] + trained

    def record(self) -> dict[str, Any]:
        """What becomes of the model, for a file."""
        return {
            "rows": [asdict(row) for row in rows(self)],
            "format": self.format.name,
            "readers": list(self.readers),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "kv_bytes_per_token_before": self.kv_before,
            "kv_bytes_per_token_after": self.kv_after,
            "left": list(self.left),
            "notes": self.notes,
        }


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


def make_plan(
    recipe: Recipe, skeleton: Skeleton, *, look: bool = False, memory: float | None = None, all_there_is: bool = False
) -> Plan:
    """Plan a recipe for a model.

    Args:
        all_there_is: whether the text has no more windows than the recipe takes.
        memory: bytes to get by with, if that can be; default: what is available on the skeleton's device.
        look: let passes that need no data survey the weights, to plan what they will find.

    Raises:
        RecipeError: a pass that matches nothing, that would make a tensor larger, or that cannot follow another;
            or a format that cannot hold the result.
    """
    whole, widest = skeleton.checkpoint, widest_input(skeleton)
    recipe = recipe.model_copy(update={"data": recipe.data.sized(widest)})
    recipe, skeleton, survey = _prepared(recipe, skeleton, look)
    checkpoint = skeleton.checkpoint
    for source in {recipe.data.source, *(step.text for step in recipe.passes if step.needs)} - {"builtin", None}:
        find_text(Path(str(source)))
    linears: dict[str, LinearPlan] = {}
    matched = dict.fromkeys(recipe.linear_passes, 0)
    for group in input_groups(skeleton):
        linears |= _plan_group(recipe.linear_passes, checkpoint, group, matched)
    for name, looked_up in skeleton.outer().items():
        named = {number: step for number, step in recipe.linear_passes.items() if step.names(name)}
        linears |= _plan_outer(named, checkpoint, name, matched, looked_up=looked_up) if named else {}
    for number, count in matched.items():
        if not count:
            step = recipe.linear_passes[number]
            raise RecipeError(
                f"passes.{number} ({step.kind}) matches no linear of this model: targets {list(step.targets)}, ignore "
                f"{list(step.ignore)}; names look like {next(iter(linears))}, and outside the blocks are "
                f"{' and '.join(skeleton.outer())}"
            )
    linears |= _stored_outside(checkpoint, linears)
    linears, (chosen, readers, obstacle) = _formed(recipe, skeleton, linears)
    tensors = _output_tensors(checkpoint, linears, chosen)
    needs = frozenset(need for step in recipe.passes for need in step.needs)
    walked = needs - SURVEYED
    stages = stage_memory(recipe, skeleton, linears, walked)
    compared, host = comparing_memory(recipe, skeleton, linears, calibrated=bool(walked))
    room = room_for_moments(stages, memory if memory is not None else available_memory(skeleton.device))
    after = sum(_nbytes(dtype, shape) for dtype, shape in tensors.values())
    outer = outer_memory(recipe, skeleton, linears)
    tuning = tune_cost(recipe, skeleton, linears)
    peak = max(survey.memory, outer, compared, tuning.memory, *(stage.peak(room) for stage in stages))
    return Plan(
        recipe, skeleton, linears, tensors, chosen, readers, obstacle, needs, whole.nbytes, after,
        int(peak),
        int(max(after + max(chain_bytes(recipe, skeleton, walked) + survey.left, tuning.disk), survey.disk)),
        {"surveys": survey.flops, **work(recipe, skeleton, linears, walked), "tune": tuning.flops},
        *cache_bytes(checkpoint, linears), room,
        int(host if skeleton.device.type != "cpu" else peak),
        tuple(name for index in range(skeleton.blocks) for name in skeleton.unnamed(index)),
        (
            *_source_warnings(whole), *_table_warnings(skeleton),
            *_warnings(recipe, widest, whole.parameters, all_there_is), *_untrained(recipe, linears, chosen),
        ),
    )  # fmt: skip


def plan_for_text(
    recipe: Recipe, skeleton: Skeleton, *, look: bool = False, memory: float | None = None
) -> tuple[Plan, Text | None]:
    """`make_plan` for as much calibration text as there is, and that text, if a pass needs any."""
    plan = make_plan(recipe, skeleton, look=look, memory=memory)
    if not plan.needs and recipe.tune is None:
        return plan, None
    data, least = plan.recipe.data, None if recipe.data.samples else 1
    held, beside = held_out_windows(data), 0 if recipe.tune is None else recipe.tune.samples
    text = read_calibration(plan.recipe, skeleton.checkpoint, least=least, held_out=held, tuning=beside)
    if len(text.windows) != data.samples:
        found = recipe.model_copy(update={"data": data.model_copy(update={"samples": len(text.windows)})})
        plan = make_plan(found, skeleton, look=look, memory=memory, all_there_is=True)
    if not len(text.held_out):
        warning = "no text is left beside what calibrates: what was lost is measured on that, and is more than it seems"
        plan = replace(plan, warnings=(*plan.warnings, warning))
    if len(text.tuning) < beside:
        warning = f"tune: the text has {len(text.tuning)} windows beside those that calibrate, of {beside} asked for"
        plan = replace(plan, warnings=(*plan.warnings, warning))
    return plan, text


def _source_warnings(checkpoint: Checkpoint) -> Iterator[str]:
    """Of a model that is not stored as plain weights."""
    forms = Counter(map(checkpoint.form, _made(checkpoint)))
    del forms["dense"]
    if forms:
        told = " and ".join(f"{count:,} as {form}" for form, count in forms.most_common())
        yield (
            f"the model is not stored as plain weights ({told}): what it decodes to counts as the original, and what "
            "was lost before is not measured"
        )


def _table_warnings(skeleton: Skeleton) -> Iterator[str]:
    """Of matrices beside the blocks that no pass rewrites, where they are much of a model (Gemma 3n's and 4's)."""
    outer, checkpoint = skeleton.outer(), skeleton.checkpoint
    inside = f"{skeleton.family.layers}."
    names = [
        name
        for part, tensor in skeleton.decoder.named_parameters()
        if tensor.dim() == 2 and not part.startswith(inside)
        for name in skeleton.family.lying(f"{skeleton.family.decoder}.{part}")
        if name.removesuffix(".weight") not in outer
    ]
    share = sum(map(checkpoint.stored_bytes, names)) / max(checkpoint.nbytes, 1)
    if share > _MUCH:
        yield f"{share:.0%} of the weights stay as they are, for no pass rewrites them: {', '.join(names[:3])}"


def _untrained(recipe: Recipe, linears: Mapping[str, LinearPlan], chosen: WrittenFormat) -> Iterator[str]:
    """What `tune` would leave alone."""
    scaled = chosen is not PLAIN and any(plan.operator.multipliers() for plan in linears.values())
    if recipe.tune is not None and not scaled:
        yield "tune: no linear is stored with scales of integers, so that norms and biases alone are trained"


def _warnings(recipe: Recipe, widest: int, parameters: int, all_there_is: bool) -> Iterator[str]:
    for step in recipe.passes:
        if step.warning:
            yield f"{step.kind}: {step.warning}"
    if not any(step.needs for step in recipe.passes):
        return
    if little_text(recipe, parameters):
        yield "the built-in text is little for a model of this size: name your own under data.source"
    tokens = recipe.data.tokens
    if tokens < TOKENS * widest:
        more = f"data.samples={recipe.data.enough(widest):,} would give {TOKENS} for each"
        if all_there_is:
            more = f"the text has no more; {TOKENS * widest:,} tokens would be {TOKENS} for each"
        yield (
            f"{tokens:,} calibration tokens are {tokens / widest:.1f} for each of the {widest:,} inputs of the widest "
            f"linear, with which passes fit that text rather than the language: {more}"
        )


def _prepared(recipe: Recipe, skeleton: Skeleton, look: bool) -> tuple[Recipe, Skeleton, Cost]:
    """Passes prepared, each for the model that those before it leave; what the last one leaves; cost of the surveys."""
    passes: list[Pass] = []
    costs: list[Cost] = []
    for number, step in enumerate(recipe.passes):
        try:
            if isinstance(step, ModelPass) and any(isinstance(earlier, LinearPass) for earlier in passes):
                raise RecipeError(f"{step.kind} changes the model itself: put it before all other passes")
            ready = step.before(recipe.passes[number + 1 :]).prepare(skeleton)
        except RecipeError as error:
            raise RecipeError(f"passes.{number}: {error}") from None
        if look and not ready.needs:
            ready = ready.survey(skeleton, Survey(None, Path(), lambda event: None))
        length = recipe.data.sequence_length
        costs.append(ready.survey_cost(skeleton, recipe.data.tokens // length, length))
        if isinstance(ready, ModelPass):
            skeleton = ready.view(skeleton)
        passes.append(ready)
    recipe = recipe.model_copy(update={"passes": tuple(passes)})
    costs.append(walk_back_cost(recipe, skeleton))
    return recipe, skeleton, Cost.of(costs)


def around_of(skeleton: Skeleton) -> Around:
    """What a format must know of a model beside the form of its linears."""
    family, groups = skeleton.family, input_groups(skeleton)
    family_names = [*skeleton.outer(), *(name for group in groups for name in group)]
    experts = frozenset(name for group in groups for name in group if family.expert(name) is not None)
    names = {disk: memory for disk in family_names if (memory := family.memory_name(disk)) != disk}
    fused = bool(family.experts.fused)
    return Around(experts, groups, fused, skeleton.outer(), skeleton.tied, names, family.found, family.rebuilt)


def input_groups(skeleton: Skeleton) -> list[list[str]]:
    """Disk names of the linears that read the same input (and that some readers put into one matrix)."""
    return [group for index in range(skeleton.blocks) for group in _groups(skeleton, index)]


def _groups(skeleton: Skeleton, index: int) -> list[list[str]]:
    return [
        [skeleton.disk_name(index, name) for name in group.linears]
        for stage in skeleton.stages(index)
        for group in stage
    ]


def _original(checkpoint: Checkpoint, name: str) -> Dense:
    info = checkpoint.tensors[name + ".weight"]
    return Dense(torch.empty(info.shape, dtype=info.dtype, device="meta"))


def unchanged(checkpoint: Checkpoint, name: str) -> LinearPlan:
    """A linear that no pass rewrites."""
    kept = checkpoint.outline(name)
    operator = _original(checkpoint, name) if isinstance(kept, Dense) else kept
    return LinearPlan((), checkpoint.stored_bytes(name + ".weight"), operator)


def _made(checkpoint: Checkpoint) -> Iterator[str]:
    """Linears whose weights are made when they are read."""
    names = (name for name in checkpoint.tensors if name.endswith(".weight") and checkpoint.made(name))
    return (name.removesuffix(".weight") for name in names)


def _stored_outside(checkpoint: Checkpoint, linears: Mapping[str, LinearPlan]) -> dict[str, LinearPlan]:
    """Linears that are not stored as plain weights and that no pass can rewrite: beyond the last block, or in one where
    the family names them in no group."""
    found = {name: unchanged(checkpoint, name) for name in _made(checkpoint) if name not in linears}
    return {name: plan for name, plan in found.items() if plan.operator.kind != "dense"}


def _formed(
    recipe: Recipe, skeleton: Skeleton, linears: Mapping[str, LinearPlan]
) -> tuple[dict[str, LinearPlan], tuple[WrittenFormat, tuple[str, ...], str]]:
    """Linears as the format has them that is chosen for them, and that.

    What no pass rewrites keeps the form that it has in the model where the format for all else can hold that. Else it
    is decoded, if that format was asked for, or is one that engines read and the output grows by no more than a tenth.
    """
    checkpoint, around, wanted = skeleton.checkpoint, around_of(skeleton), recipe.output.format
    running = {f"{name}.weight" for index in range(skeleton.blocks) for name in skeleton.linears(index)}
    running |= {f"{name}.weight" for name in skeleton.outer()}

    def decoded(which: Callable[[str], bool]) -> dict[str, LinearPlan]:
        plain = {name: _original(checkpoint, name) for name, plan in linears.items() if not plan.steps and which(name)}
        return {name: replace(plan, operator=plain.get(name, plan.operator)) for name, plan in linears.items()}

    def size(some: Mapping[str, LinearPlan]) -> float:
        return sum(plan.operator.nbytes for plan in some.values())

    found: list[tuple[Mapping[str, LinearPlan], tuple[WrittenFormat, tuple[str, ...], str]]] = []
    for kept in (linears, decoded(lambda name: f"{name}.weight" not in running), decoded(lambda name: True)):
        try:
            chosen = choose_format(wanted, {name: plan.operator for name, plan in kept.items()}, around)
        except RecipeError as error:
            refused = error
            continue
        if wanted != "auto" or chosen[0] is not NATIVE:
            if wanted != "auto" or size(kept) <= _GROWTH * size(linears):
                found.insert(0, (kept, chosen))
            break
        found.append((kept, chosen))
        if checkpoint.native:
            break
    if not found:
        raise refused
    kept, chosen = found[0]
    dtypes = {name: checkpoint.tensors[name + ".weight"].dtype for name in kept}
    written = {
        name: replace(plan, operator=chosen[0].as_written(plan.operator, dtypes[name])) for name, plan in kept.items()
    }
    return written, chosen


def _plan_outer(
    steps: Mapping[int, LinearPass], checkpoint: Checkpoint, name: str, matched: dict[int, int], *, looked_up: bool
) -> dict[str, LinearPlan]:
    """The embedding or the head through the passes that name it."""
    for number, step in steps.items():
        if step.blind and "peak" in step.needs:
            raise RecipeError(
                f"passes.{number}: {step.kind} cannot take {name} with scales for its inputs, which are measured "
                "inside blocks; name it in a pass of its own, with a scheme that leaves inputs as they come"
            )
        if step.needs - SURVEYED and not step.blind:
            raise RecipeError(
                f"passes.{number}: {step.kind} cannot take {name}, for it solves on what enters a linear, which is "
                "measured inside blocks; name it in a pass without data, such as rtn"
            )
    found = _plan_group(steps, checkpoint, [name], matched)
    if looked_up and found[name].operator.kind not in {*LOOKUPS, "dense"}:
        raise RecipeError(
            f"passes.{max(steps)}: {name} cannot become {found[name].operator.description}, for its rows are looked "
            "up, and not multiplied; rtn leaves integers, which can be looked up"
        )
    return found


def _plan_group(
    steps: Mapping[int, LinearPass], checkpoint: Checkpoint, group: list[str], matched: dict[int, int]
) -> dict[str, LinearPlan]:
    """Linears that read the same input through passes, by their numbers; they are counted in `matched`."""
    originals = {name: _original(checkpoint, name) for name in group}
    plans = {name: unchanged(checkpoint, name) for name in group}
    for name in group:
        if any(step.wants(name) for step in steps.values()):
            plans[name] = replace(plans[name], operator=originals[name])
    for number, step in steps.items():
        wanted = [name for name in group if step.wants(name)]
        matched[number] += len(wanted)
        # Factors are solved on their own, not beside what reads the same input.
        together = {name: originals[name] for name in wanted if not plans[name].operator.factors}
        for name in wanted:
            try:
                result = step.plan(name, plans[name].operator, together)
            except RecipeError as error:
                raise RecipeError(f"passes.{number}: {error}") from None
            before = originals[name].nbytes
            if result.nbytes > before and not step.may_grow:
                raise RecipeError(
                    f"passes.{number} ({step.kind}) would make {name} larger: {before:,.0f} → "
                    f"{result.nbytes:,.0f} bytes; ignore it, or use fewer bits or larger groups"
                )
            plans[name] = replace(plans[name], steps=(*plans[name].steps, step.kind), operator=result)
    return plans


def rows(plan: Plan) -> list[Row]:
    """The plan folded: layer and expert numbers become `*`, equal lines are counted."""
    folded: dict[tuple[str, tuple[str, ...], str, tuple[int, int]], list[tuple[int, float]]] = {}
    blocks: dict[Any, set[int]] = {}
    for name, linear in plan.linears.items():
        short = starred(name)
        key = (short, linear.steps, linear.operator.description, linear.operator.shape)
        folded.setdefault(key, []).append((linear.before, linear.operator.nbytes))
        index = plan.skeleton.checkpoint.block_index(name + ".weight")
        if index is not None:  # else the embedding or the head
            blocks.setdefault(key, set()).add(index)
            blocks.setdefault(short, set()).add(index)
    result = []
    for key, sizes in folded.items():
        name, steps, becomes, shape = key
        if blocks.get(key) != blocks.get(name):
            name = name.replace(".layers.*.", f".layers.{_ranges(blocks[key])}.", 1)
        parameters = len(sizes) * shape[0] * shape[1]
        before, after = (sum(column) for column in zip(*sizes, strict=True))
        result.append(Row(name, len(sizes), parameters, steps, becomes, 8 * after / parameters, before, round(after)))
    return result


def _ranges(numbers: set[int]) -> str:
    """`0,2-4` for 0, 2, 3, 4."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _output_tensors(
    checkpoint: Checkpoint, linears: dict[str, LinearPlan], chosen: WrittenFormat
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    tensors: dict[str, torch.Tensor] = {}
    for name, info in checkpoint.tensors.items():
        linear = linears.get(name.removesuffix(".weight"))
        if linear is None or (not linear.steps and linear.operator.kind == "dense"):
            tensors[name] = torch.empty(info.shape, dtype=info.dtype, device="meta")
            continue
        for suffix, tensor in chosen.tensors(linear.operator).items():
            tensors[stored_name(name.removesuffix(".weight"), suffix)] = tensor
    if chosen is PLAIN:
        tensors = fuse(checkpoint.family, tensors)
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
