"""What the passes share that move scales between what feeds linears and these, for a pass behind to round better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import PrivateAttr

from ....runtime.errors import RecipeError
from ...events import Event, Scaled
from ..base import LinearPass, Pass
from .calibrated import ROWS, plain_floats

if TYPE_CHECKING:
    from torch import Tensor

    from ....calibrate.stage import StageWork
    from ....calibrate.statistics import Statistics
    from ....runtime.model.folds import Seam
    from ....runtime.schemes import Dense, Operator
    from ...solvers.scales import Reader

_WORTH = 0.995  # of the cost: what leaves more is not moved


class Scaling(LinearPass):
    """A pass that finds the scales of least cost (`solvers/scales.py`) for each seam of a stage."""

    behind: ClassVar[str]  # which passes may round what it scales
    _later: tuple[Pass, ...] = PrivateAttr(default=())

    def before(self, later: Sequence[Pass]) -> Scaling:
        result = self.model_copy()
        result._later = tuple(later)
        return result

    def rounds(self, step: LinearPass) -> bool:
        """Whether this pass may come before another."""
        raise NotImplementedError

    def reader(self, step: LinearPass, name: str, weight: Tensor, statistics: Statistics) -> Reader:
        """What `step` will round.

        Args:
            name: of the first of some linears that share an input.
            weight: float32 rows of them.
            statistics: of that input.
        """
        raise NotImplementedError

    def rounder(self, name: str) -> LinearPass:
        """The pass that rounds a linear, right behind this one.

        Raises:
            RecipeError: there is none.
        """
        found = next((step for step in self._later if isinstance(step, LinearPass) and step.wants(name)), None)
        if found is None or not self.rounds(found):
            why = "nothing does" if found is None else f"{found.kind} does not as this needs it"
            raise RecipeError(
                f"{self.kind} scales {name} for the pass behind it to round, which {why}: put {self.behind} right "
                f"behind it, or let {self.kind} ignore it"
            )
        return found

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
            alike: dict[LinearPass, list[str]] = {}
            for name in (name for name in members if name in seam.linears and work.statistics[name].informed):
                alike.setdefault(self.rounder(name), []).append(name)
            groups += alike.items()
        found = []
        for step, names in groups:
            rows = some_rows(torch.cat([work.originals[name] for name in names]), max(1, ROWS // len(groups)))
            found.append(self.reader(step, names[0], rows, work.statistics[names[0]]))
        return found
