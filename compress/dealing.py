"""A stage of a block, shared out among the processes that work on a model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..calibrate.stage import StageWork
from ..runtime import processes
from ..runtime.schemes import Operator
from .events import Event
from .passes.base import LinearPass


def rewritten(step: LinearPass, work: StageWork) -> Iterator[Event]:
    """What a pass says that rewrites a stage; the same in every process, as is what becomes of the stage.

    Groups that may come apart, experts above all, are dealt out where each process can have one; else all processes are
    at each of them together, and the pass deals out linears or rows, or has all do the same.
    """
    if not step.apart or processes.size() == 1:
        yield from step.apply(work)
        return
    parts = [work.part([number]) for number in range(len(work.groups))]
    costs = [_cost(step, part) for part in parts]
    for linears, events in processes.spread([partial(_applied, step, part) for part in parts], costs, divisible=True):
        work.linears.update(linears)
        yield from events


def _cost(step: LinearPass, part: StageWork) -> float:
    """Operations that rewriting takes."""
    return sum(step.flops(*operator.shape) for name, operator in part.linears.items() if step.wants(name))


def _applied(step: LinearPass, part: StageWork) -> tuple[dict[str, Operator], list[Event]]:
    before = dict(part.linears)
    events = list(step.apply(part))
    return {name: operator for name, operator in part.linears.items() if operator is not before[name]}, events
