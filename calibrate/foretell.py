"""What changes of single linears will cost the model, before any is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from ..runtime.model.skeleton import Skeleton
from .curvature import BlockBack, Curvature
from .statistics import Statistics


def foretold(
    skeleton: Skeleton,
    back: BlockBack,
    changes: Callable[[str, Statistics], Iterable[Tensor]],
    coupled: Callable[[Curvature], float] | None = None,
    *,
    counted: bool = True,
) -> dict[str, list[float]]:
    """Disk name → KL per token in nats that each of some changes of a linear's weight is expected to cost.

    With g the gradient at a linear's outputs for a token (`curvature`), it is `½ E[‖g‖² ‖Δ x‖²] / rows`: what
    `½ E[(gᵀ Δ x)²]` is where errors have no direction of their own, as those of rounding. Gradients and inputs of one
    token go together in it, for a first token may have both or one of them out of all proportion.

    Args:
        back: a block through which gradients went.
        changes: a linear's disk name and statistics of its inputs → changes Δ of its weight, columns first,
            `[columns, rows]`, one after the other; none for one that is not to be changed.
        coupled: where a pass solves with the curvature, which share of that is left once a linear's rows are coupled
            by its own.
        counted: whether such a pass asks for statistics in which tokens count by place (`sequential`); those here are
            counted about alike.
    """
    found: dict[str, list[float]] = {}
    curvatures = back.found() if coupled is not None else {}
    shares: dict[int, float] = {}  # by metric, of which experts have one
    for inside, (moment, weighed) in back.met.items():
        name = skeleton.disk_name(back.index, inside)
        own = curvatures.get(name)
        losses = [
            float((change * (weighed.moment @ change)).sum()) / change.shape[1] / 2 / back.tokens
            for change in changes(name, by_place(own, moment, weighed) if own is not None and counted else moment)
        ]
        if losses and own is not None and coupled is not None:
            key = id(own.metric)
            if key not in shares:
                shares[key] = coupled(own)
            losses = [shares[key] * loss for loss in losses]
        if losses:
            found[name] = losses
    return found


def by_place(own: Curvature, moment: Statistics, weighed: Statistics) -> Statistics:
    """A moment with tokens by what they count for in a run (`curvature.counts`), each by its own gradient.

    Args:
        moment, weighed: as of `BlockBack.met`.
    """
    cost = 0.0 if own.places is None else float(own.places.mean())
    if not 0 < cost < float("inf"):
        return moment
    return Statistics(moment.tokens, {"moment": (moment.moment + weighed.moment / cost) / 2})
