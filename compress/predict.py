"""What a recipe is expected to cost, before it is applied: every pass asked at one walk back over the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..runtime.errors import RecipeError
from .events import Event
from .foretelling import Figures, WalkBack
from .passes.base import LinearPass, ModelPass
from .plan import Plan, make_plan

WIDTHS = (2, 3, 4, 5, 6, 8)
FAR = 0.1  # KL in nats beyond which what is left out of second order counts


@dataclass(frozen=True)
class Prediction:
    """KL per token in nats, to second order, errors of linears and passes adding up.

    Attributes:
        passes: kind and cost of each pass that says what it costs.
        unknown: kinds of the others, and `tune` where the recipe has that.
    """

    passes: tuple[tuple[str, float], ...]
    unknown: tuple[str, ...]

    @property
    def kl(self) -> float:
        return sum(cost for _, cost in self.passes)

    def told(self) -> str:
        """For people."""
        if not self.passes:
            return f"no expectation of what is lost: {', '.join(self.unknown)} cannot tell before the run"
        each = ", ".join(f"{kind} {cost:.2g}" for kind, cost in self.passes)
        text = f"KL expected: {self.kl:.2g}" + (f" ({each})" if len(self.passes) > 1 else "")
        if self.unknown:
            text += f"; not counted: {', '.join(self.unknown)}"
        return text + (f"; beyond {FAR:g} such an estimate is a rough one" if self.kl > FAR else "")


@dataclass(frozen=True)
class AtWidth:
    """What a recipe makes of a model with so many bits in the place of those that its integers have: bytes of the
    output, and KL per token in nats, as in `Prediction`."""

    bits: int
    nbytes: float
    kl: float


def at_widths(
    plan: Plan, windows: Tensor, folder: Path, listener: Callable[[Event], None]
) -> tuple[Prediction, list[AtWidth]]:
    """What the planned passes are expected to cost, and what they would with integers of other widths, by one walk.

    Args:
        windows, folder: as of `predicted`.

    Raises:
        RecipeError: no pass rounds to integers of a number of bits.
    """
    steps = plan.recipe.linear_passes
    asked = {number: step for number, step in steps.items() if _has_width(step)}
    if not asked:
        raise RecipeError("--sweep: no pass of the recipe has integers of so many bits, as gptq and rtn have them")
    if any(isinstance(step, ModelPass) and step.to_survey for step in plan.recipe.passes):
        raise RecipeError("--sweep: the recipe chooses experts first, and what the rest costs then cannot be foretold")
    others = {
        (number, bits): step.model_copy(update={"bits": bits}) for number, step in asked.items() for bits in WIDTHS
    }
    labels = {len(plan.recipe.passes) + place: key for place, key in enumerate(others)}
    back = WalkBack(plan.skeleton, windows, folder, None, None, listener)
    found = back.asked(steps | {label: others[key] for label, key in labels.items()})
    now = _summed(plan, found)
    rest = now.kl - sum(sum(found[number].values()) for number in asked)
    rows = []
    for bits in WIDTHS:
        passes = [others.get((number, bits), step) for number, step in enumerate(plan.recipe.passes)]
        changed = make_plan(plan.recipe.model_copy(update={"passes": passes}), plan.skeleton, memory=float("inf"))
        costs = (sum(found[label].values()) for label, key in labels.items() if key[1] == bits)
        rows.append(AtWidth(bits, changed.bytes_after, rest + sum(costs)))
    return now, rows


def _has_width(step: LinearPass) -> bool:
    from .passes.linear.quantizer import Quantizer

    return isinstance(step, Quantizer) and step.scheme == "int" and step.bits != "mixed"


def per_bit(rows: Sequence[AtWidth]) -> float:
    """By what a bit less multiplies KL: the slope of a line through its logarithms, by least squares."""
    pairs = [(row.bits, math.log(row.kl)) for row in rows if row.kl > 0]
    if len(pairs) < 2:
        return 1.0
    middle, level = (sum(part) / len(pairs) for part in zip(*pairs, strict=True))
    slope = sum((bits - middle) * (log - level) for bits, log in pairs) / sum((bits - middle) ** 2 for bits, _ in pairs)
    return math.exp(-slope)


def predicted(plan: Plan, windows: Tensor, folder: Path, listener: Callable[[Event], None]) -> Prediction:
    """What the planned passes are expected to cost the model that they see.

    Args:
        windows: calibration tokens `[samples, tokens]`.
        folder: to be made, for the walk; whoever asks deletes it.
    """
    passes = plan.recipe.passes
    if any(isinstance(step, ModelPass) and step.to_survey for step in passes):  # what the others see is not made yet
        return Prediction((), tuple(step.kind for step in passes))
    back = WalkBack(plan.skeleton, windows, folder, None, None, listener)
    return _summed(plan, back.asked(plan.recipe.linear_passes))


def _summed(plan: Plan, found: Mapping[int, Figures]) -> Prediction:
    """Of what each linear pass foretells."""
    costs, unknown = list[tuple[str, float]](), list[str]()
    for number, step in enumerate(plan.recipe.passes):
        cost = None
        if found.get(number):
            cost = plan.recipe.linear_passes[number].expected(plan.skeleton, found[number])
        if cost is None:
            unknown.append(step.kind)
        else:
            costs.append((step.kind, cost))
    if plan.recipe.tune is not None:
        unknown.append("tune")
    return Prediction(tuple(costs), tuple(unknown))
