"""Columns of outliers stay floats, and a quantizer gets the rest.

LLM.int8() (arXiv:2208.07339) does that for inputs that are rounded when the model runs: each token in steps that are a
share of its largest number, so that a few large channels make the steps of all others coarse. OWQ (arXiv:2306.02272)
does it for weights of few bits: the columns go that rounding would cost most, by the energy of their inputs. The
columns are chosen once, from calibration. `gptq` behind this lets them make up for the errors of all others
(`docs/architecture.md`), which neither does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ....runtime.errors import RecipeError
from ...events import Event, Fallback
from ..base import LinearPass, Need
from .ahead import Ahead
from .calibrated import plain_floats
from .quantizer import SCHEMES, Quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from ....calibrate.stage import StageWork
    from ....calibrate.statistics import Statistics
    from ....runtime.schemes import Dense, Operator, WithColumns


class OutlierColumns(Ahead):
    """Keep the columns that meet the largest inputs as floats, for the pass behind to quantize the rest."""

    behind: ClassVar[str] = "rtn or gptq"
    does: ClassVar[str] = "splits"
    may_grow: ClassVar[bool] = True  # until the rest is rounded
    kind: Literal["outlier_columns"]
    share: float = Field(
        0.01, gt=0, le=0.25, description="share of the columns of each linear that stay floats; at least one"
    )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference", "moment", "peak"})

    def rounds(self, step: LinearPass) -> bool:
        return isinstance(step, Quantizer)

    def plan(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Operator:
        if operator.factors:
            raise RecipeError(f"{self.kind} cannot take {name}, whose latents are to be cached; let it ignore it")
        return super().plan(name, operator, group)

    def planned(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Operator:
        import torch

        self.rounder(name)
        weight = plain_floats(self.kind, name, operator).weight
        index = torch.empty(max(1, round(self.share * weight.shape[1])), dtype=torch.int32, device="meta")
        return split(weight, index)

    def memory(self, operators: Sequence[Operator]) -> float:
        return 12.0 * max(rows * columns for rows, columns in (operator.shape for operator in operators))

    def apply(self, work: StageWork) -> Iterator[Event]:
        import torch

        for members in work.groups:
            for step, names in self.by_rounder([name for name in members if self.wants(name)]).items():
                weights = [work.originals[name] for name in names]
                count = max(1, round(self.share * weights[0].shape[1]))
                statistics = work.statistics.get(names[0])
                known = statistics is not None and statistics.informed
                index = torch.arange(count, dtype=torch.int32, device=weights[0].device)
                if statistics is not None and known:
                    cost = self._cost(step, statistics, weights)
                    index = torch.topk(cost, count).indices.sort().values.to(torch.int32)
                for name, weight in zip(names, weights, strict=True):
                    if not known:
                        yield Fallback(name, self.kind, "the first columns, for no calibration token came by")
                    work.linears[name] = split(weight, index)

    def _cost(self, step: LinearPass, statistics: Statistics, weights: Sequence[Tensor]) -> Tensor:
        """`[columns]`, what comes of rounding a column of some linears or its inputs."""
        assert isinstance(step, Quantizer)
        if SCHEMES[step.scheme].inputs is not None:
            return statistics.sums["peak"]
        return statistics.moment.diagonal() * sum(weight.float().square().sum(0) for weight in weights)


def split(weight: Tensor, index: Tensor) -> WithColumns:
    """A weight `[rows, columns]` with those columns apart that `index` names."""
    from ....runtime.schemes import Dense, WithColumns

    where = index.long()
    return WithColumns(Dense(weight.index_fill(1, where, 0)), Dense(weight.index_select(1, where)), index)
