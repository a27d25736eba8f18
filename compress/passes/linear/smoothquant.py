"""SmoothQuant: outliers of inputs move into the weights that read them (arXiv:2211.10438), as far as serves both.

Where inputs are rounded too, each token in steps that are a share of its largest number, a channel of outliers makes
the steps of all others coarse. SmoothQuant divides it by `max|x|^α / max|w|^(1-α)`, one α for the whole model; here
scales are the minimum of a convex cost, of rounding the weights and of rounding a sample of the inputs
(`compress/solvers/scales.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from ..base import LinearPass, Need
from .quantizer import SCHEMES, Quantizer
from .scaling import Scaling

if TYPE_CHECKING:
    from torch import Tensor

    from ....calibrate.statistics import Statistics
    from ...solvers.scales import Reader


class SmoothQuant(Scaling):
    """Move scales between what feeds linears and these, for the pass behind to round weights and inputs better."""

    behind: ClassVar[str] = "rtn or gptq (with scheme: int8 or int-a8)"
    kind: Literal["smoothquant"]

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference", "moment", "sample"})

    def rounds(self, step: LinearPass) -> bool:
        # Steps of float8 are a share of each number.
        return isinstance(step, Quantizer) and SCHEMES[step.scheme].inputs == "int8"

    def reader(self, step: LinearPass, name: str, weight: Tensor, statistics: Statistics) -> Reader:
        from ...solvers.scales import Reader

        sample = statistics.sums["sample"]
        times = (statistics.tokens or statistics.lent) / max(1, int(sample.any(1).sum()))
        assert isinstance(step, Quantizer)
        rounding = step.rounding(weight.shape[1], name)
        times *= 4.0 ** (rounding.bits - 8)  # of weights in fewer steps
        energy = statistics.moment.diagonal().clone()
        return Reader(weight, energy, rounding.columns, rounding.symmetric, sample, times)
