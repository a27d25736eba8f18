"""AWQ: channels that matter are larger when they are rounded (arXiv:2306.00978), with the best scales there are.

What feeds linears, a norm or a linear, puts out `1 / s` of what it did, and these multiply by s, before a pass behind
this one rounds them. AWQ tries twenty scales of one form and keeps what rounding then costs least; here they are the
minimum of a convex cost of the grid and the inputs that pass has (`compress/solvers/scales.py`), which knows whether it
rounds each weight on its own (`rtn`) or lets columns make up for one another (`gptq`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from ..base import LinearPass, Need
from .calibrated import Calibrated
from .quantizer import SCHEMES, Quantizer
from .scaling import Scaling

if TYPE_CHECKING:
    from torch import Tensor

    from ....calibrate.statistics import Statistics
    from ...solvers.scales import Reader


class Awq(Scaling):
    """Move scales between what feeds linears and these, for the pass behind to round weights better."""

    behind: ClassVar[str] = "rtn or gptq (with a scheme that leaves inputs as they come)"
    kind: Literal["awq"]

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference", "moment"})

    def rounds(self, step: LinearPass) -> bool:
        return isinstance(step, Quantizer) and SCHEMES[step.scheme].inputs is None

    def reader(self, step: LinearPass, name: str, weight: Tensor, statistics: Statistics) -> Reader:
        from ...solvers.scales import Reader

        assert isinstance(step, Quantizer)
        rounding = step.rounding(weight.shape[1], name)
        return Reader(weight, _energy(step, statistics), rounding.columns, rounding.symmetric)


def _energy(step: Quantizer, statistics: Statistics) -> Tensor:
    """What errors of each column cost, for a pass that rounds it."""
    from ...solvers.scales import conditional_energy
    from ...solvers.system import NotSolvable, damped_system

    moment = statistics.moment
    if not isinstance(step, Calibrated):
        return moment.diagonal().clone()
    share = step.shrinkage_for(len(moment), statistics.tokens + statistics.lent)
    act_order = getattr(step, "act_order", False)
    try:
        system = damped_system(moment, step.damping, act_order=act_order, shrinkage=share)
    except NotSolvable:
        return moment.diagonal().clone()
    return conditional_energy(system.factor, system.order)
