"""A recipe for an output of so many bytes, for whoever is to read it: `compressor apply auto MODEL OUT --fit 12GB`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from ..runtime.errors import RecipeError, human_size
from ..runtime.formats.base import VLLM_CPU, VLLM_GPU

if TYPE_CHECKING:
    from ..runtime.model.skeleton import Skeleton
    from .plan import Plan

Reader = Literal["transformers", "vllm", "vllm-cpu", "llama.cpp", "compressor"]
READERS: dict[Reader, str] = {  # → as plans name them
    "transformers": "transformers", "vllm": VLLM_GPU, "vllm-cpu": VLLM_CPU, "llama.cpp": "", "compressor": "compressor"
}  # fmt: skip
_BITS: dict[Reader, tuple[int, ...]] = {  # of integers that they read
    "transformers": (2, 3, 4, 5, 6, 8), "vllm": (4, 8), "vllm-cpu": (4,), "compressor": (2, 3, 4, 5, 6, 8)
}  # fmt: skip
_GROUPS: dict[Reader, tuple[int, ...]] = {  # columns that may share a scale; vLLM's kernels know no 256
    "transformers": (128, 256), "compressor": (128, 256)
}  # fmt: skip
_FINER = (32, 64, 128)  # of models with experts, whose linears have two forms in all
_K_QUANTS = ("q6_k", "q5_k", "q4_k", "q3_k", "q2_k")
_PARTS = 10**6  # of an average of bits

_SHARED_OUT = ("average_bits", "choices", "group_sizes", "experts_alike")  # keys of bits: mixed alone

Passes = list[dict[str, Any]]


@dataclass(frozen=True)
class Aim:
    """What an output is to fit into.

    Attributes:
        nbytes: of its weights and, for `context` tokens, of its KV cache.
        kv_share: bytes of that cache, as a share of what they were.
    """

    nbytes: float
    reader: Reader = "transformers"
    context: int = 0
    kv_share: float = 1.0


def fitted(skeleton: Skeleton, aim: Aim) -> str:
    """A recipe, as text: bits of every linear found on calibration data where the reader takes several widths, else the
    most bits that fit everywhere.

    Raises:
        RecipeError: nothing that the reader takes is so small, or the model is as it is.
    """
    if aim.kv_share < 1 and aim.reader != "compressor":
        raise RecipeError(f"--kv-share: {aim.reader} caches keys and values as they are; with --for compressor")
    cached = _cached(skeleton)
    if aim.context and not cached:
        raise RecipeError("--context: this model caches something else than keys and values, which is not counted here")
    if (whole := skeleton.checkpoint.nbytes + aim.context * cached) <= aim.nbytes:
        raise RecipeError(f"--fit: the model is {human_size(whole)} as it is, which fits")
    if latents := _latents(aim):
        _planned(latents, skeleton)
    least, why = float("inf"), "it reads no integers of this model"
    for passes in _candidates(skeleton, aim):
        steps = [*latents, *passes]
        try:
            plan = _planned(steps, skeleton)
        except RecipeError as error:
            why = str(error)
            continue
        if READERS[aim.reader] not in ("", *plan.readers):
            continue
        smallest, largest = _sizes(plan, aim)
        if largest <= aim.nbytes:
            return _text([_even(step) for step in steps], aim)
        if smallest <= aim.nbytes:
            return _text(_spread(plan, steps, aim.nbytes - smallest), aim)
        least = min(least, smallest)
    if least == float("inf"):
        raise RecipeError(f"--for {aim.reader}: {why}; name another reader, or a recipe")
    kept = f" with a cache of {aim.context:,} tokens" if aim.context else ""
    raise RecipeError(
        f"--fit: {_rounded_up(least)} is the least that this model becomes for {aim.reader}{kept}; ask for as much"
    )


def beyond(plan: Plan, aim: Aim) -> str:
    """That a plan is larger than asked for, for people; empty where it is not: edits may make it so."""
    size, spread = _size(plan, aim), _mixed(plan)
    if spread is not None:
        size = max(size, size + spread.budget - spread.planned)
    return f"{human_size(size)} are more than --fit {human_size(aim.nbytes)} allows" if size > aim.nbytes else ""


def _rounded_up(nbytes: float) -> str:
    """A size for people that is enough."""
    unit = 10 ** max(0, len(str(int(nbytes))) - 3)
    return human_size(-(-nbytes // unit) * unit)


def _candidates(skeleton: Skeleton, aim: Aim) -> Iterator[Passes]:
    """Passes that a reader takes, those first that lose least."""
    outer, reader, family = list(skeleton.outer()), aim.reader, skeleton.family
    if reader == "llama.cpp":
        for scheme in _K_QUANTS:
            rest = [{"kind": "rtn", "scheme": "q6_k", "targets": outer}] if outer else []
            yield [{"kind": "gptq", "scheme": scheme}, *rest]
        return
    choices, solver = _BITS[reader], {"kind": "gptq", "objective": "model"}
    if len(choices) == 1:
        yield [{**solver, "bits": choices[0]}]
        return
    mixed = {**solver, "bits": "mixed", "average_bits": 16, "choices": list(choices)}
    sizes = _GROUPS.get(reader, ())
    linears = {name: linear for index in range(skeleton.blocks) for name, linear in skeleton.linears(index).items()}
    if reader == "compressor":
        mixed["targets"] = ["*", *outer]
    elif any(family.expert(name) is not None for name in linears):
        mixed["experts_alike"] = True
        widths = {linear.in_features for linear in linears.values()}
        sizes = tuple(size for size in _FINER if not any(columns % size for columns in widths)) if sizes else ()
    if len(sizes) > 1:
        mixed["group_sizes"] = list(sizes)
    if aim.kv_share == 1:
        yield [mixed]
        return
    factors = [f"*.{family.disk_name(name)}" for name in (family.keys, family.values)]  # not what is shared out
    yield [{**mixed, "ignore": factors}, {"kind": "gptq", "bits": 8, "targets": factors}]


def _latents(aim: Aim) -> Passes:
    """What makes the cache smaller."""
    return [{"kind": "lorc", "ratio": aim.kv_share, "calibrated": True, "latent_bits": 8}] if aim.kv_share < 1 else []


def _planned(steps: Sequence[Mapping[str, Any]], skeleton: Skeleton) -> Plan:
    from .plan import make_plan
    from .recipe import Recipe

    return make_plan(Recipe.model_validate({"passes": list(steps)}), skeleton, memory=float("inf"))


def _size(plan: Plan, aim: Aim) -> float:
    """Bytes as planned."""
    from .output.writer import ShardedWriter

    files = ShardedWriter(Path(), plan.tensors, plan.recipe.output.shard_bytes)
    return files.nbytes + aim.context * plan.kv_after


def _sizes(plan: Plan, aim: Aim) -> tuple[float, float]:
    """Bytes at the fewest bits and at the most."""
    now, spread = _size(plan, aim), _mixed(plan)
    if spread is None:
        return now, now
    return now - spread.planned + spread.least, now - spread.planned + spread.most


@dataclass(frozen=True)
class _Spread:
    """What a pass shares out: of how many weights, bytes at the least and the most, as planned, and allowed."""

    weights: int
    least: float
    most: float
    planned: float
    budget: float


def _mixed(plan: Plan) -> _Spread | None:
    """Of the pass that shares bits out; None where there is none."""
    from .passes.linear.mixed import Mixed

    found = (step for step in plan.recipe.passes if isinstance(step, Mixed) and step.to_survey)
    if (step := next(found, None)) is None or step.average_bits is None:
        return None
    planned = sum(linear.operator.nbytes for name, linear in plan.linears.items() if step.wants(name))
    weights, least, most = step.sizes_of(plan.skeleton)
    return _Spread(weights, least, most, planned, min(step.average_bits * weights / 8, most))


def _spread(plan: Plan, steps: Passes, left: float) -> Passes:
    """With as many bits as `left` bytes more than the fewest are."""
    spread = _mixed(plan)
    assert spread is not None
    least, average = (8 * size / spread.weights for size in (spread.least, spread.least + left))
    bits = max(math.floor(average * _PARTS) / _PARTS, math.ceil(least * _PARTS) / _PARTS)
    return [{**step, "average_bits": bits} if step.get("bits") == "mixed" else step for step in steps]


def _cached(skeleton: Skeleton) -> int:
    """Bytes of a token in the KV cache of the model as it is."""
    from .plan import unchanged
    from .resources import cache_bytes

    names = (name for index in range(skeleton.blocks) for name in skeleton.linears(index))
    return cache_bytes(skeleton.checkpoint, {name: unchanged(skeleton.checkpoint, name) for name in names})[0]


def _even(step: Mapping[str, Any]) -> dict[str, Any]:
    """With the most bits everywhere."""
    if step.get("bits") != "mixed":
        return dict(step)
    return {key: value for key, value in step.items() if key not in _SHARED_OUT} | {"bits": max(step["choices"])}


def _text(steps: Passes, aim: Aim) -> str:
    about = f"within {human_size(aim.nbytes)}"
    if aim.context:
        about += f" with a cache of {aim.context:,} tokens"
    recipe = {"version": 1, "description": f"{about}, for {aim.reader}", "passes": steps}
    return str(yaml.safe_dump(recipe, sort_keys=False, width=100))
