"""What the passes share that move scales between what feeds linears and these, for a pass behind to round better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from ...events import Event, Scaled
from ..base import LinearPass
from .ahead import Ahead
from .calibrated import ROWS, plain_floats

if TYPE_CHECKING:
    from torch import Tensor

    from ....calibrate.stage import StageWork
    from ....calibrate.statistics import Statistics
    from ....runtime.model.folds import Seam
    from ....runtime.schemes import Dense, Operator
    from ...solvers.scales import Reader

_WORTH = 0.995  # of the cost: what leaves more is not moved


class Scaling(Ahead):
    """A pass that finds the scales of least cost (`solvers/scales.py`) for each seam of a stage."""

    does: ClassVar[str] = "scales"

    def reader(self, step: LinearPass, name: str, weight: Tensor, statistics: Statistics) -> Reader:
        """What `step` will round.

        Args:
            name: of the first of some linears that share an input.
            weight: float32 rows of them.
            statistics: of that input.
        """
        raise NotImplementedError

    def planned(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Operator:
        self.rounder(name)
        return plain_floats(self.kind, name, operator)

    def flops(self, rows: int, columns: int) -> float:
        return 2000.0 * min(rows, ROWS) * columns + columns**3

    def memory(self, operators: Sequence[Operator]) -> float:
        rows, columns = sum(operator.shape[0] for operator in operators), operators[0].shape[1]
        # Scaled rows of all that reads a seam (experts too) twice, what leads back from them, and the weights that are
        # scaled in the end.
        return 24.0 * ROWS * columns + 8.0 * rows * columns + 24.0 * columns**2

    def apply(self, work: StageWork) -> Iterator[Event]:
        from ...solvers.scales import best_scales

        for feeder, seam in work.seams.items():
            if not all(self.wants(name) for name in seam.linears):
                continue
            readers = self._readers(work, seam)
            if not readers:
                continue
            scale, left = best_scales(readers, seam.channels, seam.columns)
            if left < _WORTH:
                work.fold(feeder, scale)
                yield Scaled(seam.linears[0], self.kind, feeder, left, float(scale.min()), float(scale.max()))

    def _readers(self, work: StageWork, seam: Seam) -> list[Reader]:
        """Linears that read a seam, those together that share an input and are rounded alike."""
        import torch

        from ...solvers.scales import some_rows

        groups: list[tuple[LinearPass, list[str]]] = []
        for members in work.groups:
            known = [name for name in members if name in seam.linears and work.statistics[name].informed]
            groups += self.by_rounder(known).items()
        found = []
        for step, names in groups:
            rows = some_rows(torch.cat([work.originals[name] for name in names]), max(1, ROWS // len(groups)))
            found.append(self.reader(step, names[0], rows, work.statistics[names[0]]))
        return found
