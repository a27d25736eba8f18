"""AWQ: channels that matter are larger when they are rounded (arXiv:2306.00978), with the best scales there are.

What feeds linears, a norm or a linear, puts out `1 / s` of what it did, and these multiply by s, before a pass behind
this one rounds them. AWQ tries twenty scales of one form and keeps what rounding then costs least; here they are the
minimum of a convex cost of the grid and the inputs that pass has (`compress/solvers/scales.py`), which knows whether it
rounds each weight on its own (`rtn`) or lets columns make up for one another (`gptq`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import PrivateAttr

from ....runtime.errors import RecipeError
from ...events import Event, Scaled
from ..base import LinearPass, Need, Pass
from .calibrated import ROWS, Calibrated, plain_floats
from .quantizer import Quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from ....calibrate.stage import StageWork
    from ....calibrate.statistics import Statistics
    from ....runtime.model.folds import Seam
    from ....runtime.schemes import Dense, Operator
    from ...solvers.scales import Reader

_WORTH = 0.995  # of the cost: what leaves more is not moved


class Awq(LinearPass):
    """Move scales between what feeds linears and these, for the pass behind to round them better."""

    kind: Literal["awq"]
    _later: tuple[Pass, ...] = PrivateAttr(default=())

    def before(self, later: Sequence[Pass]) -> Awq:
        result = self.model_copy()
        result._later = tuple(later)
        return result

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference", "moment"})

    def _quantizer(self, name: str) -> Quantizer:
        """The pass that rounds a linear."""
        found = next((step for step in self._later if isinstance(step, LinearPass) and step.wants(name)), None)
        if not isinstance(found, Quantizer):
            raise RecipeError(
                f"{self.kind} scales {name} for the pass behind it to round, which "
                f"{'nothing does' if found is None else f'{found.kind} does not'}: put rtn or gptq right behind it, or "
                f"let {self.kind} ignore it"
            )
        return found

    def planned(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Operator:
        self._quantizer(name)
        return plain_floats(self.kind, name, operator)

    def flops(self, rows: int, columns: int) -> float:
        return 2000.0 * min(rows, ROWS) * columns + columns**3

    def memory(self, operators: Sequence[Operator]) -> float:
        rows, columns = sum(operator.shape[0] for operator in operators), operators[0].shape[1]
        # Scaled weights twice, what leads back from them, and the weights that are scaled in the end.
        return 24.0 * min(rows, ROWS) * columns + 8.0 * rows * columns + 24.0 * columns**2

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
        """Linears that read a seam, those together that share an input."""
        import torch

        from ...solvers.scales import Reader, some_rows

        groups = [[name for name in members if name in seam.linears] for members in work.groups]
        groups = [names for names in groups if names and work.statistics[names[0]].informed]
        found = []
        for names in groups:
            quantizer = self._quantizer(names[0])
            rows = some_rows(torch.cat([work.originals[name] for name in names]), max(64, ROWS // len(groups)))
            energy = self._energy(quantizer, work.statistics[names[0]])
            found.append(Reader(rows, energy, quantizer.group_for(rows.shape[1]), quantizer.symmetric))
        return found

    def _energy(self, quantizer: Quantizer, statistics: Statistics) -> Tensor:
        """What errors of each column cost, for a pass that rounds it."""
        from ...solvers.scales import conditional_energy
        from ...solvers.system import NotSolvable, damped_system

        moment = statistics.moment
        if not isinstance(quantizer, Calibrated):
            return moment.diagonal().clone()
        share = quantizer.shrinkage_for(len(moment), statistics.tokens + statistics.lent)
        act_order = getattr(quantizer, "act_order", False)
        try:
            system = damped_system(moment, quantizer.damping, act_order=act_order, shrinkage=share)
        except NotSolvable:
            return moment.diagonal().clone()
        return conditional_energy(system.factor, system.order)
