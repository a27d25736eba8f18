"""2:4 sparsity in place: of every four neighbours in a row, two stay.

- `magnitude`: the two largest.
- `wanda`: the largest `|W_ij| ‖x_j‖` (arXiv:2306.11695).
- `nowag`: the largest after dividing by the norms of columns and rows (NoWag-P, arXiv:2504.14569).
- `sparsegpt`: the column sweep, which picks pairs as it goes and lets later columns make up for what went
  (arXiv:2301.00774).
- `sparsegpt_sweep`: the same, and then rounds of exact coordinate descent on groups of four that choose pairs anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ....runtime.errors import RecipeError
from ...events import Event, Fallback, LayerDone
from ..base import Need
from .calibrated import ROWS, SWEEPS, Calibrated, parts_of, plain_floats

if TYPE_CHECKING:
    from torch import Tensor

    from ....calibrate.curvature import BlockBack, Curvature
    from ....calibrate.stage import StageWork
    from ....calibrate.statistics import Statistics
    from ....runtime.model.skeleton import Skeleton
    from ....runtime.schemes import Dense, Operator, Sparse24
    from .groups import Group

Method = Literal["magnitude", "wanda", "nowag", "sparsegpt", "sparsegpt_sweep"]


class SparsePass(Calibrated):
    """Prune to 2:4: half of the values and two bits for each that stays."""

    kind: Literal["sparse24"]
    method: Method = Field(
        "sparsegpt_sweep",
        description="which two of four stay: the largest (magnitude), the largest times the size of their inputs "
        "(wanda; nowag: of the normalised weight), or those of a sweep over columns whose values make up for what "
        "goes (sparsegpt; sparsegpt_sweep: then chosen anew, group by group)",
    )
    objective: Literal["layer", "model"] = Field(
        "layer",
        description="what sparsegpt and sparsegpt_sweep minimise: layer: the error of the linear's own outputs; model: "
        "what that costs the answers, found by a walk back from the model's end, but for experts' first linears and "
        "what has more rows than two hidden sizes",
    )
    sweeps: int = Field(SWEEPS, ge=1, le=100, description="how often sparsegpt_sweep goes over all groups of four")

    @model_validator(mode="after")
    def _nothing_idle(self) -> SparsePass:
        if self.method != "sparsegpt_sweep":
            self._refuse_idle(f"with method: {self.method}", "sweeps")
        if not self.method.startswith("sparsegpt"):
            self._refuse_idle(
                f"with method: {self.method}, which changes no value", "correction", "shrinkage", "objective"
            )
        if self.method == "magnitude":
            self._refuse_idle("with method: magnitude, which takes no data", "damping", "sequential")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        if self.method == "magnitude":
            return frozenset()
        asked: set[Need] = {"curvature"} if self.objective == "model" else set()
        needed = super().needs | asked
        return needed if self.method.startswith("sparsegpt") else needed - {"cross", "held_moment", "held_cross"}

    def planned(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Operator:
        return sparse_plan(self.kind, name, plain_floats(self.kind, name, operator))

    def foretell(self, skeleton: Skeleton, back: BlockBack) -> dict[str, float]:
        from ....calibrate.foretell import foretold
        from ...solvers.coupled import coupled_share
        from ...solvers.sparse24 import swept, top_pairs
        from ...solvers.system import NotSolvable, damped_system

        def changes(name: str, statistics: Statistics) -> list[Tensor]:
            if not self.wants(name):
                return []
            weight = skeleton.checkpoint.tensor(f"{name}.weight").to(skeleton.device).float().T.contiguous()
            share = self.shrinkage_for(len(weight), statistics.tokens)
            if not self.method.startswith("sparsegpt"):
                energy = 1.0 if self.method == "magnitude" else statistics.moment.diagonal()[:, None]
                return [weight * top_pairs(weight.square() * energy) - weight]
            try:
                system = damped_system(statistics.moment, self.damping, act_order=True, together=4, shrinkage=share)
            except NotSolvable:
                return [weight * top_pairs(weight.abs()) - weight]
            return [swept(weight, system, self.sweeps if self.method == "sparsegpt_sweep" else 0)[1]]

        coupled = coupled_share if self.objective == "model" else None
        found = foretold(skeleton, back, changes, coupled, counted=self.sequential)
        return {name: costs[0] for name, costs in found.items()}

    def expected(self, skeleton: Skeleton, foretold: Mapping[str, float]) -> float | None:
        return sum(foretold.values())

    def flops(self, rows: int, columns: int) -> float:
        if not self.method.startswith("sparsegpt"):
            return 50.0 * rows * columns
        sweeps = self.sweeps if self.method == "sparsegpt_sweep" else 0
        sweeps *= 1 + (self.objective == "model")
        products = (1 + 2 * sweeps) * rows * columns**2 + self.correcting(rows, columns)
        return 2.0 * columns**3 + products + (3000.0 + 6000.0 * sweeps) * rows * columns

    def memory(self, operators: Sequence[Operator]) -> float:
        shapes = [operator.shape for operator in operators]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        alone = max(self.factoring(columns), 8.0 * columns**2 + 8.0 * rows * columns + 24.0 * min(rows, ROWS) * columns)
        if self.objective == "layer":
            return alone
        largest = max(shape[0] for shape in shapes)  # its metric in four copies, one of float64 while it is factored
        return max(alone, 8.0 * columns**2 + 8.0 * rows * columns + 28.0 * largest**2 + 28.0 * largest * columns)

    def apply(self, work: StageWork) -> Iterator[Event]:
        from ....runtime.processes import spread
        from .groups import groups_of

        for group in groups_of(self, work, act_order=True, together=4, pruned=True):
            corrected = self.method.startswith("sparsegpt")
            weights = [group.alive(original.float()) for original in group.originals]
            targets = group.targets() if corrected else weights
            reason = f"pruned by magnitude, for {group.reason}" if group.reason and self.method != "magnitude" else ""
            known = work.curvatures if self.objective == "model" else {}
            jobs = [
                partial(self._pruned, weight.T, target.T.contiguous(), group, known.get(name))
                for name, weight, target in zip(group.names, weights, targets, strict=True)
            ]
            pruned = spread(jobs, [float(target.numel()) for target in targets], divisible=True)
            for name, target, sparse in zip(group.names, targets, pruned, strict=True):
                result = sparse_operator(sparse.T.contiguous().to(group.originals[0].dtype), (sparse != 0).T)
                work.linears[name] = result
                if reason:
                    yield Fallback(name, self.kind, reason)
                yield LayerDone.of(name, self.kind, group.error(target, result), result, group.tokens)

    def _pruned(self, weight: Tensor, target: Tensor, group: Group, curvature: Curvature | None) -> Tensor:
        """The sparse weight for a stored one and its target, all `[columns, rows]`."""
        import torch

        from ....runtime.processes import spread
        from ...solvers.coupled import coupled_losses, coupled_pairs, metric_of
        from ...solvers.refine import row_losses
        from ...solvers.sparse24 import nowag_scales, swept, top_pairs

        system = group.system
        if system is None or self.method == "magnitude":
            return weight * top_pairs(weight.abs())
        scored = weight
        if self.method == "nowag":
            inputs, outputs = nowag_scales(weight)
            scored = weight / inputs / outputs
        sparse = weight * top_pairs(scored.square() * group.energy[:, None])
        if not self.method.startswith("sparsegpt"):
            return sparse
        losses = row_losses(sparse - target, system.moment)

        def better(rows: slice) -> Tensor:
            values, delta = swept(target[:, rows], system, self.sweeps if self.method == "sparsegpt_sweep" else 0)
            return torch.where(row_losses(delta, system.moment) < losses[rows], values, sparse[:, rows])

        parts = parts_of(weight.shape[1])
        sparse = torch.cat(spread([partial(better, rows) for rows in parts], [1.0] * len(parts)), 1)
        if (metric := metric_of(curvature)) is None:
            return sparse
        values = coupled_pairs(target, system, metric, self.sweeps if self.method == "sparsegpt_sweep" else 0)
        before, after = (coupled_losses(found - target, system.moment, metric).sum() for found in (sparse, values))
        return sparse if before <= after else values


def sparse_plan(step: str, name: str, dense: Dense) -> Sparse24:
    """A 2:4 weight of the shape of a plain one, on `meta`.

    Raises:
        RecipeError: its columns are not a multiple of four.
    """
    import torch

    from ....kernels.layouts import compress24
    from ....runtime.schemes import Dense, Sparse24

    rows, columns = dense.shape
    if columns % 4:
        raise RecipeError(f"{step} cannot take {name}: its {columns} columns are not groups of four; ignore it")
    weight = torch.empty(rows, columns, dtype=dense.weight.dtype, device="meta")
    values, indices = compress24(weight, weight)
    return Sparse24(Dense(values), indices)


def sparse_operator(weight: Tensor, nonzero: Tensor) -> Sparse24:
    """A weight `[rows, columns]` with at most two non-zeros in every four; where there are fewer, zeros are stored.

    Raises:
        ValueError: there are more.
    """
    import torch

    from ....kernels.layouts import compress24
    from ....runtime.schemes import Dense, Sparse24
    from ...solvers.sparse24 import top_pairs

    if bool((nonzero.reshape(len(weight), -1, 4).sum(2) > 2).any()):
        raise ValueError("a group of four has more than two non-zeros")
    values, indices = compress24(weight, top_pairs(nonzero.T.to(torch.uint8)).T)
    return Sparse24(Dense(values), indices)
