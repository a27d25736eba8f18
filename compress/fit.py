"""A recipe for an output of so many bytes, for whoever is to read it: `compressor apply auto MODEL OUT --fit 12GB`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
_K_QUANTS = ("q6_k", "q5_k", "q4_k", "q3_k", "q2_k")
_HEADER = 200  # bytes that a file says of each of its tensors

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
    whole = skeleton.checkpoint.nbytes + aim.context * _cached(skeleton)
    if whole <= aim.nbytes:
        raise RecipeError(f"--fit: the model is {human_size(whole)} as it is, which fits")
    least: float | None = None
    for passes in _candidates(skeleton, aim.reader):
        steps = [*_latents(aim), *passes]
        plan = _planned(steps, skeleton)
        if plan is None or READERS[aim.reader] not in ("", *plan.readers):
            continue
        smallest, largest = _sizes(plan, aim)
        if largest <= aim.nbytes:
            return _text([_even(step) for step in steps], aim)
        if smallest <= aim.nbytes:
            return _text(_spread(plan, steps, aim.nbytes - smallest), aim)
        least = smallest if least is None else min(least, smallest)
    if least is None:
        raise RecipeError(f"--for {aim.reader}: it reads no integers of this model; name another reader, or a recipe")
    cached = f" with a cache of {aim.context:,} tokens" if aim.context else ""
    raise RecipeError(
        f"--fit: {human_size(least)} is the least that this model becomes for {aim.reader}{cached}; ask for as much"
    )


def _candidates(skeleton: Skeleton, reader: Reader) -> Iterator[Passes]:
    """Passes that a reader takes, those first that lose least."""
    outer = list(skeleton.outer())
    if reader == "llama.cpp":
        for scheme in _K_QUANTS:
            rest = [{"kind": "rtn", "scheme": "q6_k", "targets": outer}] if outer else []
            yield [{"kind": "gptq", "scheme": scheme}, *rest]
        return
    widths, solver = _BITS[reader], {"kind": "gptq", "objective": "model"}
    sparse = any(
        skeleton.family.expert(name) is not None for n in range(skeleton.blocks) for name in skeleton.linears(n)
    )
    alike = len(widths) == 1 or (sparse and reader != "compressor")  # engines take experts of one form
    if not alike:
        named = {"targets": ["*", *outer]} if reader == "compressor" else {}
        yield [{**solver, "bits": "mixed", "average_bits": 16, "choices": list(widths), **named}]
        return
    for bits in reversed(widths):
        beside = sorted({max(widths), bits}, reverse=True) if sparse else [bits]
        for other in beside:
            if other == bits:
                yield [{**solver, "bits": bits}]
            else:
                yield [
                    {**solver, "bits": bits, "targets": ["*.experts.*"]},
                    {**solver, "bits": other, "ignore": ["*.experts.*"]},
                ]


def _latents(aim: Aim) -> Passes:
    """What makes the cache smaller."""
    return [{"kind": "lorc", "ratio": aim.kv_share, "calibrated": True, "latent_bits": 8}] if aim.kv_share < 1 else []


def _planned(steps: Sequence[Mapping[str, Any]], skeleton: Skeleton) -> Plan | None:
    """None where a form cannot be stored."""
    from .plan import make_plan
    from .recipe import Recipe

    try:
        return make_plan(Recipe.model_validate({"passes": list(steps)}), skeleton, memory=float("inf"))
    except RecipeError:
        return None


def _sizes(plan: Plan, aim: Aim) -> tuple[float, float]:
    """Bytes at the fewest bits and at the most."""
    most = plan.bytes_after + _HEADER * len(plan.tensors) + aim.context * plan.kv_after
    spread = _mixed(plan)
    return (most if spread is None else most - spread[1][-1] + spread[1][0]), most


def _mixed(plan: Plan) -> tuple[int, list[float]] | None:
    """Weights and bytes at each choice of the pass that shares bits out; None where there is none."""
    from .passes.linear.mixed import Mixed

    found = (step for step in plan.recipe.passes if isinstance(step, Mixed) and step.bits == "mixed")
    step = next(found, None)
    return None if step is None else step.sizes_of(plan.skeleton)


def _spread(plan: Plan, steps: Passes, left: float) -> Passes:
    """With as many bits as `left` bytes more than the fewest are."""
    spread = _mixed(plan)
    assert spread is not None
    weights, sizes = spread
    average = 8 * (sizes[0] + left) / weights
    return [
        {**step, "average_bits": int(average * 1e4) / 1e4} if step.get("bits") == "mixed" else step for step in steps
    ]


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
    return {key: value for key, value in step.items() if key not in ("average_bits", "choices")} | {
        "bits": max(step["choices"])
    }


def _text(steps: Passes, aim: Aim) -> str:
    about = f"within {human_size(aim.nbytes)}"
    if aim.context:
        about += f" with a cache of {aim.context:,} tokens"
    recipe = {"version": 1, "description": f"{about}, for {aim.reader}", "passes": steps}
    return str(yaml.safe_dump(recipe, sort_keys=False, width=100))
