"""What passes are handed of a block: linears that may be rewritten now, and what is known of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from ..runtime.model.folds import Seam, multiplied
from ..runtime.schemes import Dense, Operator
from .curvature import Curvature
from .statistics import Statistics

T = TypeVar("T")


@dataclass
class StageWork:
    """Linears that may be rewritten now: passes replace entries of `linears`.

    Attributes:
        linears: disk name → operator, in execution order.
        originals: disk name → the weight as the checkpoint has it, times scales that were moved into it.
        groups: disk names of linears that read the same input.
        statistics: disk name → statistics; linears that read the same input share one object. Empty without data,
            and without an entry for linears that no pass asks about.
        metrics: disk name → Gauss-Newton metric of the block's output (`probes`), where a pass asks for it.
        curvatures: disk name → what errors of its outputs cost the model, where a pass asks for it.
        seams: what feeds linears of the stage, and nothing else → where a scale can be moved between the two (`fold`).
        folded: feeder → scale that was moved, for each channel.
        unseen: why linears without statistics have none.
        heard: told the linear that a pass is long at work on, the pass, and the share of it that is done.
    """

    linears: dict[str, Operator]
    originals: dict[str, Tensor]
    groups: list[list[str]]
    statistics: dict[str, Statistics] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    curvatures: dict[str, Curvature] = field(default_factory=dict)
    seams: dict[str, Seam] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)
    unseen: str = "no calibration token came by (more data.samples?)"
    heard: Callable[[str, str, float], None] = lambda name, step, share: None

    def fold(self, feeder: str, scale: Tensor) -> None:
        """Let what feeds linears put out `1 / scale` of what it did, and let these multiply by it.

        Weights and statistics here are of the new form at once; the feeder follows when the stage is done, and so do
        readers that are not at hand now (routers; linears of the stage's other parts, which come scaled).

        Args:
            feeder: a key of `seams`, whose linears no pass has compressed yet.
            scale: positive, `[channels]` (`Seam.columns` and `Seam.largest` lead from channels to columns and back).

        Raises:
            ValueError: it is not positive and finite.
        """
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise ValueError(f"{feeder}: scales that are moved have to be positive and finite")
        self.scale(self.seams[feeder], scale)
        self.folded[feeder] = scale * self.folded.get(feeder, 1.0)

    def scale(self, seam: Seam, scale: Tensor) -> None:
        """Let the linears here that read a feeder multiply by what it was divided by."""
        columns, done = seam.columns(scale), set[int]()
        for name in (name for name in seam.linears if name in self.linears):
            assert isinstance(self.linears[name], Dense)
            weight = multiplied(self.originals[name], columns=columns)
            self.originals[name], self.linears[name] = weight, Dense(weight)
            found = self.statistics.get(name)
            if found is not None and id(found) not in done:  # linears that read the same input share one
                found.divide(columns)
                done.add(id(found))

    def part(self, numbers: Sequence[int]) -> StageWork:
        """Some of the groups by their numbers, to be rewritten on their own, without moving scales; what comes of it is
        put back by `self.linears.update(part.linears)`."""
        groups = [self.groups[number] for number in numbers]
        names = {name for group in groups for name in group}

        def some(table: dict[str, T]) -> dict[str, T]:
            return {name: value for name, value in table.items() if name in names}

        return StageWork(
            some(self.linears),
            some(self.originals),
            groups,
            some(self.statistics),
            some(self.metrics),
            some(self.curvatures),
            unseen=self.unseen,
            heard=self.heard,
        )

    @property
    def starved(self) -> dict[str, int]:
        """Disk name → tokens that came by, of experts whose statistics lean on other tokens."""
        return {name: found.tokens for name, found in self.statistics.items() if found.lent}


def split_to_fit(items: Sequence[T], sizes: Sequence[float], room: float | None) -> list[list[T]]:
    """Neighbours together, as long as their sizes add up to no more than `room`; one at least."""
    found: list[list[T]] = []
    left = 0.0
    for item, size in zip(items, sizes, strict=True):
        if not found or (room is not None and size > left):
            found.append([])
            left = float("inf") if room is None else room
        found[-1].append(item)
        left -= size
    return found
