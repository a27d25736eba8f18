"""ARMOR: each matrix becomes block-diagonal × 2:4 core × block-diagonal (arXiv 2510.05528).

- `solver: adam` with `objective: proxy` is the published algorithm: the weight is divided by the norms of its columns
  and rows, starts from NoWag-P, and joint Adam steps alternate with exact updates of sampled groups of the core, on the
  loss `Σ (W̄ - A S B)²_ij ‖x_j‖²`. The norms end up in A and B.
- `solver: als` takes closed-form steps of A, B and the whole core in their place.
- `objective: full` aims at the outputs' error itself, `tr(E H Eᵀ)`, of the weight as it is.
- `objective: model` aims at `tr(M E H Eᵀ)`, M what errors of the outputs cost the answers (`calibrate/curvature.py`),
  of which the blocks on the diagonal count that A has. With `M_ii = Rᵀ R` it is the same problem for `R W_i`, `R A_i`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from ....runtime.errors import RecipeError
from ...events import Event, Fallback, LayerDone
from ..base import Need
from .calibrated import CORRECTION, ROWS, SWEEPS, Calibrated, Correction, plain_floats
from .sparse24 import sparse_operator, sparse_plan

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ....calibrate.stage import StageWork
    from ....runtime.schemes import Armor, Dense, Operator
    from ...solvers.armor import Factors
    from ...solvers.stored_factors import Stored
    from .groups import Group

LARGEST = 128  # block that `auto` takes, which is the published one


class ArmorPass(Calibrated):
    """Factorize each matrix into block-diagonal × 2:4 × block-diagonal."""

    kind: Literal["armor"]
    block_size: Annotated[int, Field(ge=4, strict=True)] | Literal["auto"] = Field(
        "auto",
        description="rows and columns of the diagonal blocks, at most: the largest divisor of the weight's rows (its "
        "columns) that is a multiple of four is taken; auto: up to 128, while A and B take at most half of the bytes "
        "that the 2:4 core saves, all as floats",
    )
    solver: Literal["adam", "als"] = Field(
        "adam", description="how the factors are found: adam: as published; als: closed-form steps, far faster"
    )
    objective: Literal["proxy", "full", "model"] = Field(
        "proxy",
        description="what the factors minimise: proxy: the published loss, diagonal and of the normalised weight; "
        "full: the outputs' error; model: what that does to the answers of the model, found by a walk back from its "
        "end, as far as it is between rows of one block of A (of linears of up to twice as many rows as a hidden state "
        "has numbers; others by the outputs' error)",
    )
    iterations: int | None = Field(
        None,
        ge=1,
        description="most steps of the solver, which stops when the loss no longer falls; default: 20000 with adam, 60 "
        "with als",
    )
    polish: int = Field(0, ge=0, description="Adam steps after solver: als has ended, without choosing other pairs")
    share: bool = Field(
        False, description="store one right factor B for all linears that read the same input: fewer bytes"
    )
    wrapper_bits: Literal[8, 16] = Field(
        16,
        description="bits of a number in the outer factors A and B; 16: floats as the model's; 8: integers with a "
        "scale a row",
    )
    correction: Correction = Field(0.0, description=f"{CORRECTION}; as published: 0")

    @model_validator(mode="after")
    def _nothing_idle(self) -> ArmorPass:
        if self.solver == "adam":
            self._refuse_idle("with solver: adam, which is what it adds to als", "polish")
        if self.objective == "proxy":
            self._refuse_idle("with objective: proxy, whose loss is diagonal", "shrinkage")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | ({"curvature"} if self.objective == "model" else set())

    def planned(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Operator:
        """The factors on `meta`.

        Raises:
            RecipeError: besides the common reasons, the blocks are so large that the factors are more than the weight.
        """
        dense = plain_floats(self.kind, name, operator)
        sizes = [other.shape[0] for other in group.values()] if self.share else [dense.shape[0]]
        asked = self._asked(sizes, dense.shape[1], dense.weight.element_size())
        result = self._outline(name, dense, asked, group)
        if result.nbytes >= dense.nbytes:
            smaller = (self._outline(name, dense, size, group) for size in range(asked, 3, -1))
            pays = next((max(plan.block_sizes) for plan in smaller if plan.nbytes < dense.nbytes), None)
            hint = (
                f"the largest block_size that pays there is {pays}" if pays else "no block size pays there: ignore it"
            )
            raise RecipeError(
                f"{self.kind}: with blocks of {' and '.join(map(str, result.block_sizes))}, the factors of {name} take "
                f"{result.nbytes:,.0f} bytes, not less than its {dense.nbytes:,}; {hint}"
            )
        return result

    def _outline(self, name: str, dense: Dense, block_size: int, group: Mapping[str, Dense]) -> Armor:
        import torch

        from ....runtime.schemes import Armor
        from ...solvers.stored_factors import stored_rows

        core = sparse_plan(self.kind, name, dense)
        rows, columns = dense.shape
        dtype = dense.weight.dtype
        if self.share and any(other.weight.dtype != dtype for other in group.values()):
            raise RecipeError(
                f"{self.kind}: {name} and what reads the same input are stored in different dtypes; no share"
            )
        high = fitting_block([other.shape[0] for other in group.values()] if self.share else [rows], block_size)
        wide = fitting_block([columns], block_size)
        shapes = (rows, high), (columns, wide)
        a, b = (stored_rows(torch.empty(shape, device="meta"), dtype, self.wrapper_bits) for shape in shapes)
        return Armor(a, core, b, *self._shared(list(group)))

    def _asked(self, sizes: Sequence[int], columns: int, itemsize: int) -> int:
        """The size asked for where linears of `sizes` rows have one B."""
        if self.block_size != "auto":
            return self.block_size
        return largest_block(tuple(sizes), columns, itemsize)

    def _shared(self, group: Sequence[str]) -> tuple[str | None, int]:
        return (f"{group[0]}_shared_b", len(group)) if self.share and len(group) > 1 else (None, 1)

    @property
    def rounds(self) -> int:
        """Iterations that apply."""
        return self.iterations or (20000 if self.solver == "adam" else 60)

    def flops(self, rows: int, columns: int) -> float:
        weights = rows * columns
        product = 2.0 * weights * columns if self.objective != "proxy" else 0.0
        block = LARGEST if self.block_size == "auto" else self.block_size
        adam = 3 * product + weights * (18.0 * block + 400.0)
        correcting = self.correcting(rows, columns)
        if self.solver == "adam":
            return correcting + self.rounds * adam
        swept = SWEEPS * (product + 6000.0 * weights) if self.objective != "proxy" else 0.0
        steps = self.rounds * (2 * product + weights * (12.0 * block + 6000.0))
        return correcting + steps + self.polish * adam + swept

    def memory(self, operators: Sequence[Operator]) -> float:
        shapes = [operator.shape for operator in operators]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        largest = rows if self.share else max(shape[0] for shape in shapes)
        copies = 14 if self.solver == "adam" or self.polish else 11  # float32, of the linears that are solved together
        metric = 8.0 * largest**2 if self.objective == "model" else 0.0
        solving = 8.0 * columns**2 + 4.0 * rows * columns + 4.0 * copies * largest * columns + metric
        return max(self.factoring(columns), solving)

    def apply(self, work: StageWork) -> Iterator[Event]:
        import torch

        from ....runtime.processes import spread
        from .groups import groups_of

        for group in groups_of(self, work, act_order=True, together=4, products=torch.float32, pruned=True):
            targets = group.targets()
            numbers = range(len(group.names))
            together = [list(numbers)] if self.share else [[n] for n in numbers]
            jobs = [partial(self._solved, work, group, which, [targets[n] for n in which]) for which in together]
            costs = [float(sum(targets[n].numel() for n in which)) for which in together]
            for which, solved in zip(together, spread(jobs, costs), strict=True):
                yield from self._finish(work, group, which, [targets[n] for n in which], solved)

    def _solved(self, work: StageWork, group: Group, which: list[int], targets: list[Tensor]) -> Solved:
        """Factors of linears that are to have the same B."""
        import torch

        from ...solvers.armor import roots
        from ...solvers.coupled import metric_of

        dtype, sizes = group.originals[which[0]].dtype, [len(target) for target in targets]
        moment = group.system.moment if group.system else group.energy
        goal = torch.cat(targets).T.contiguous()
        asked = self._asked(sizes, len(goal), dtype.itemsize)
        blocks = fitting_block(sizes, asked), fitting_block([len(goal)], asked)
        known = work.curvatures if self.objective == "model" else {}
        metrics = [metric for n in which if (metric := metric_of(known.get(group.names[n]))) is not None]
        outer = torch.cat([roots(metric, blocks[0]) for metric in metrics]) if len(metrics) == len(which) else None
        passed = partial(work.heard, group.names[which[0]], self.kind)
        return self._solve(goal, moment, group, *blocks, dtype, outer, passed)

    def _finish(
        self, work: StageWork, group: Group, which: list[int], targets: list[Tensor], solved: Solved
    ) -> Iterator[Event]:
        from ....runtime.schemes import Armor

        names, dtype = [group.names[n] for n in which], group.originals[which[0]].dtype
        sizes = [len(target) for target in targets]
        start = 0
        for name, size, target in zip(names, sizes, targets, strict=True):
            rows = slice(start, start + size)
            start += size
            core = solved.factors.core[:, rows].T.contiguous()
            result = Armor(
                solved.a.rows(rows), sparse_operator(core.to(dtype), core != 0), solved.b, *self._shared(names)
            )
            work.linears[name] = result
            reason = f"solved as if all inputs mattered alike, for {group.reason}" if group.reason else solved.reason
            if reason:
                yield Fallback(name, self.kind, reason)
            yield LayerDone.of(name, self.kind, group.error(target, result), result, group.tokens)

    def _solve(
        self, goal: Tensor, moment: Tensor, group: Group, high: int, wide: int, dtype: torch.dtype,
        outer: Tensor | None, passed: Callable[[float], None],
    ) -> Solved:  # fmt: skip
        """The factors of `[columns, rows]`, A and B as they will be stored.

        They start from NoWag-P's weight between identities (Wanda's where the loss is the outputs' error). What is
        stored has no larger loss than that of NoWag-P, or of SparseGPT with sweeps: else these are stored. To start
        from the latter ends higher, for its pairs have settled for values without factors around them.
        """
        import torch

        from ...solvers.armor import Factors, alternate, choose_pairs, total_loss
        from ...solvers.armor_adam import RATE, adam
        from ...solvers.armor_codes import store_wrappers
        from ...solvers.row_metric import times_blocks
        from ...solvers.sparse24 import CHUNK, nowag_scales, swept
        from ...solvers.stored_factors import as_blocks, stored_blocks

        inputs, outputs = torch.ones_like(goal[:, :1]), torch.ones_like(goal[0])
        energy, loss = group.energy, group.energy
        if self.objective == "proxy":
            inputs, outputs = nowag_scales(goal)
        elif moment.dim() == 2:
            loss = moment
        target = goal / inputs / outputs
        start = Factors.start(target, energy, high, wide)
        plain = start.copy()
        plain.core = goal * (plain.core != 0)
        if self.objective != "proxy" and group.system is not None:
            plain.core = torch.cat([swept(part, group.system, SWEEPS)[0] for part in goal.split(ROWS, 1)], 1)
        if outer is not None:  # R: what errors of a block's rows cost together is Rᵀ R
            goal, target = times_blocks(goal, outer.mT), times_blocks(target, outer.mT)
            start.a = outer.clone()
        if self.solver == "adam":
            factors, lowest, initial = adam(start, target, loss, self.rounds, rate=RATE, passed=passed)
        else:
            part = 0.5 if self.polish else 1.0
            factors, lowest, initial = alternate(start, target, loss, self.rounds, lambda share: passed(part * share))
            if self.polish:
                factors, lowest, _ = adam(
                    factors, target, loss, self.polish, rate=1e-3, groups=False,
                    passed=lambda share: passed(part + part * share),
                )  # fmt: skip
        assert not lowest > initial, (lowest, initial)
        factors.a *= outputs.view(-1, high, 1)
        factors.b *= inputs.view(-1, 1, wide)
        loss = loss if self.objective != "proxy" else energy / inputs[:, 0].square()
        weights = 1 / outputs

        def store(blocks: Tensor) -> Stored:
            return stored_blocks(blocks, dtype, self.wrapper_bits)

        a, b = store_wrappers(factors, goal, loss, choose_pairs, store, CHUNK, row_weights=weights, outer=outer)
        identities = store(plain.a), store(plain.b)
        plain.a, plain.b = map(as_blocks, identities)
        plain.a = plain.a if outer is None else outer @ plain.a
        lost = []
        for state in (factors, plain):
            state.core = state.core.to(dtype).to(goal.dtype)
            lost.append(total_loss((goal - state.product()) * weights, loss))
        if not lost[0] <= lost[1]:  # also where it is not a number
            return Solved(plain, *identities, "pruned without wrappers, which had the lower loss")
        return Solved(factors, a, b, "")


@dataclass(frozen=True)
class Solved:
    """Factors whose numbers are those that are stored, A and B in that form, and why they are trivial if they are."""

    factors: Factors
    a: Stored
    b: Operator
    reason: str


@cache
def largest_block(sizes: tuple[int, ...], columns: int, itemsize: int) -> int:
    """The largest block up to 128 whose wrappers take at most half of the bytes that a 2:4 core saves.

    Args:
        sizes: rows of the linears that have one B.
        columns: of each.
        itemsize: bytes of a number of the core and of A and B, before any of them is rounded further.
    """
    rows = sum(sizes)
    saved = rows * columns * (itemsize / 2 - 1 / 8)  # half of the numbers, for two bits each of those that stay
    for size in range(LARGEST, 4, -1):
        high, wide = fitting_block(sizes, size), fitting_block([columns], size)
        if itemsize * (rows * high + columns * wide) <= saved / 2:
            return size
    return 4


def fitting_block(sizes: Sequence[int], asked: int) -> int:
    """The largest common divisor up to `asked`; a multiple of four where there is one."""
    common = math.gcd(*sizes)
    divisors = [n for n in range(min(common, asked), 0, -1) if common % n == 0]
    return next((n for n in divisors if n % 4 == 0), divisors[0])
