"""What a recipe is expected to cost, before it is applied: every pass asked at one walk back over the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .events import Event
from .foretelling import WalkBack
from .passes.base import ModelPass
from .plan import Plan

FAR = 0.1  # KL in nats beyond which what is left out of second order counts


@dataclass(frozen=True)
class Prediction:
    """KL per token in nats, to second order, errors of linears and passes adding up.

    Attributes:
        passes: kind and cost of each pass that says what it costs.
        unknown: kinds of the others.
        coupled: kinds that aim at the end of the model, while what they are expected to cost is of rows on their own.
    """

    passes: tuple[tuple[str, float], ...]
    unknown: tuple[str, ...]
    coupled: tuple[str, ...] = ()

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
        if self.coupled:
            text += f"; of {' and '.join(self.coupled)} with objective: model, .6 to .9 of it were measured to be left"
        return text + (f"; beyond {FAR:g} such an estimate is a rough one" if self.kl > FAR else "")


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
    found = back.asked(plan.recipe.linear_passes)
    costs, unknown = list[tuple[str, float]](), list[str]()
    for number, step in enumerate(passes):
        cost = None
        if found.get(number):
            cost = plan.recipe.linear_passes[number].expected(plan.skeleton, found[number])
        if cost is None:
            unknown.append(step.kind)
        else:
            costs.append((step.kind, cost))
    known = [kind for kind, _ in costs]
    steps = (step for step in plan.recipe.linear_passes.values() if getattr(step, "objective", "") == "model")
    coupled = dict.fromkeys(step.kind for step in steps if step.kind in known and step.kind != "lorc")
    return Prediction(tuple(costs), tuple(unknown), tuple(coupled))
