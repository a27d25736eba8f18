"""What changes of single linears will cost the model, before any is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..runtime.model.skeleton import Skeleton
from .curvature import BlockBack
from .statistics import Statistics


def foretold(
    skeleton: Skeleton, back: BlockBack, changes: Callable[[str, Statistics], Sequence[Tensor]]
) -> dict[str, list[float]]:
    """Disk name → KL per token in nats that each of some changes of a linear's weight is expected to cost.

    With g the gradient at a linear's outputs for a token (`curvature`), it is `½ E[‖g‖² ‖Δ x‖²] / rows`: what
    `½ E[(gᵀ Δ x)²]` is where errors have no direction of their own, as those of rounding. Gradients and inputs of one
    token go together in it, for a first token may have both or one of them out of all proportion.

    Args:
        back: a block through which gradients went.
        changes: a linear's disk name and statistics of its inputs → changes Δ of its weight, columns first,
            `[columns, rows]`; none for one that is not to be changed.
    """
    found: dict[str, list[float]] = {}
    for inside, (moment, weighed) in back.met.items():
        name = skeleton.disk_name(back.index, inside)
        for change in changes(name, moment):
            loss = float((change * (weighed.moment @ change)).sum())
            found.setdefault(name, []).append(loss / change.shape[1] / 2 / back.tokens)
    return found
