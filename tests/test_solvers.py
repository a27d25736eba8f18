"""Solvers against slow, unblocked float64 twins written from the equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import known
from torch import Tensor

from compressor.calibrate.stage import StageWork
from compressor.calibrate.statistics import Statistics
from compressor.compress.events import LayerDone
from compressor.compress.passes.linear.gptq import Gptq, Solution
from compressor.compress.passes.linear.groups import Shift, groups_of, held_out_share
from compressor.compress.passes.linear.sparse24 import SparsePass
from compressor.compress.solvers.grid import Grid, Steps, range_grid, searched_grid
from compressor.compress.solvers.lowrank import refit_up
from compressor.compress.solvers.refine import best_scale, differences, refine, row_losses
from compressor.compress.solvers.sweep import best_sweep, by_column, column_sweep, gptq_codes
from compressor.compress.solvers.system import NotSolvable, System, damped_system, inverse_factor, sorted_order
from compressor.kernels.numbers import E2M1, E4M3, Integers, Numbers, Rounding
from compressor.runtime.schemes import Dense, LowRank

DOUBLE = torch.float64
WIDE = torch.linspace(1.1, 0.4, 57).tolist()


def problem(rows: int = 12, columns: int = 40, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and a correlated second moment, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=DOUBLE) / columns**0.5 + torch.eye(columns) * 0.5
    x = torch.randn(tokens, columns, generator=generator, dtype=DOUBLE) @ mix
    return torch.randn(rows, columns, generator=generator, dtype=DOUBLE), x.T @ x


def solved(step: Gptq, weight: Tensor, statistics: Statistics) -> tuple[Solution, str]:
    """What the pass makes of one linear."""
    work = StageWork({"x": Dense(weight)}, {"x": weight}, [["x"]], {"x": statistics})
    (group,) = groups_of(step, work, act_order=step.act_order)
    (target,) = group.targets()
    return step._solve(weight, target, None, step.rounding(weight.shape[1], "x"), group)


def losses_of(delta: Tensor, moment: Tensor) -> Tensor:
    """`diag(Δ H Δᵀ)` for rows first."""
    return row_losses(delta.T, moment)


def values_of(solution: Solution) -> Tensor:
    """float64 `[rows, columns]`."""
    return solution.grid.values(solution.codes.float()).double()


def swept(weight: Tensor, grid: Grid, system: System) -> tuple[Tensor, Tensor]:
    """The sweep's codes `[rows, columns]` and losses."""
    codes, losses = gptq_codes(weight.T.contiguous(), grid, system)
    return codes.T.contiguous(), losses


def sweep_by_the_book(target: Tensor, moment: Tensor, order: Tensor, quantize) -> Tensor:  # type: ignore[no-untyped-def]
    """Optimal brain quantization, column by column: the inverse is recomputed for what remains each time."""
    work, result, remaining = target.clone(), torch.zeros_like(target), order.tolist()
    while remaining:
        inverse = torch.linalg.inv(moment[remaining][:, remaining])
        j = remaining[0]
        result[:, j] = quantize(j, work[:, j])
        error = (work[:, j] - result[:, j]) / inverse[0, 0]
        work[:, remaining] -= error[:, None] * inverse[0][None, :]
        remaining = remaining[1:]
    return result


@pytest.mark.parametrize(
    ("numbers", "all_of_them"),
    [
        (E2M1, torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])),
        (E4M3, torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).float()),
        (Integers(3), torch.arange(5.0)[:4]),
    ],
)
def test_the_nearest_number_is_one_of_those_there_are(numbers: Numbers, all_of_them: Tensor) -> None:
    values = torch.cat([-all_of_them[1:].flip(0), all_of_them])
    if isinstance(numbers, Integers):
        values = torch.cat([values[:1] - 1, values])
    assert (float(values[0]), float(values[-1])) == (numbers.low, numbers.high)
    assert torch.equal(numbers.nearest(values.clone()), values)
    x = 1.2 * numbers.high * torch.randn(4000, generator=torch.Generator().manual_seed(0)).pow(5).clamp(-1, 1)
    found = numbers.nearest(x.clone())
    distances = (x[:, None] - values).abs()
    assert torch.equal((found - x).abs(), distances.amin(1))
    middles = (values[1:] + values[:-1]) / 2
    even = numbers.nearest(middles.clone())
    assert bool(torch.isin(even, values).all())
    if numbers == E4M3:
        assert torch.equal(found, x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
        assert torch.equal(even, middles.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("columns", "group_size"), [(24, 16), (77, 32), (131, -1)])
def test_sweep_gives_the_codes_of_the_unblocked_solver(
    bits: int, symmetric: bool, act_order: bool, columns: int, group_size: int
) -> None:
    weight, moment = problem(columns=columns)
    system = damped_system(moment, 0.01, act_order=act_order)
    grid = range_grid(weight, Rounding.integers(bits, group_size, symmetric), Steps(DOUBLE))
    scales, zeros = grid.columns(columns)

    def quantize(j: int, column: Tensor) -> Tensor:
        zero = 0 if zeros is None else zeros[:, j]
        numbers = Integers(bits)
        return (torch.clamp(torch.round(column / scales[:, j]) + zero, numbers.low, numbers.high) - zero) * scales[:, j]

    expected = sweep_by_the_book(weight, system.moment, system.order, quantize)
    codes, losses = swept(weight, grid, system)
    torch.testing.assert_close(losses, losses_of(expected - weight, system.moment))
    torch.testing.assert_close(grid.values(codes), expected, rtol=0, atol=1e-12)
    assert torch.equal(codes, grid.codes(expected))
    if act_order:
        assert int(system.order[-1]) == int(system.moment.diagonal().argmin())
        falling = system.moment.diagonal().argsort(descending=True)
        ahead = left_alone(system.moment, system.order), left_alone(system.moment, falling)
        assert ahead[0] < ahead[1] if columns > 32 else torch.equal(system.order, falling)
        assert left_alone(system.moment, falling) < left_alone(system.moment, torch.arange(columns))


def left_alone(moment: Tensor, order: Tensor) -> float:
    """What those behind it do not tell of each column, summed up."""
    factor = torch.linalg.cholesky(moment[order.flip(0)][:, order.flip(0)])
    return float(factor.diagonal().square().sum())


def test_sweep_without_rounding_changes_nothing() -> None:
    weight, moment = problem(columns=70)
    seen = torch.empty(70, 12, dtype=DOUBLE)

    def keep(j: int, column: Tensor) -> Tensor:
        seen[j] = column
        return column.clone()

    losses = column_sweep(weight.T.clone(), damped_system(moment).factor, by_column(keep))
    assert torch.equal(seen.T, weight)
    assert not losses.any()


def test_factor_is_that_of_the_inverse() -> None:
    _, moment = problem()
    system = damped_system(moment, 0.05, act_order=True)
    inverse = torch.linalg.inv(system.moment[system.order][:, system.order])
    torch.testing.assert_close(system.factor.T @ system.factor, inverse)
    torch.testing.assert_close(system.solve_right(torch.eye(40, dtype=DOUBLE)), torch.linalg.inv(system.moment))
    assert torch.equal(system.factor, system.factor.triu())


def test_damping_rises_until_the_moment_can_be_factored() -> None:
    columns = 24
    indefinite = torch.eye(columns, dtype=DOUBLE)
    indefinite[0, 1] = indefinite[1, 0] = 1.5  # eigenvalue -0.5
    system = damped_system(indefinite, 0.01)
    assert system.damping == pytest.approx(1.0)
    torch.testing.assert_close(system.moment, indefinite + torch.eye(columns))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_moment_that_is_not_finite_is_refused(value: float) -> None:
    moment = torch.eye(4)
    moment[2, 1] = value
    with pytest.raises(NotSolvable, match="non-finite"):
        damped_system(moment)


def test_one_token_is_enough_to_solve() -> None:
    weight, _ = problem()
    x = torch.randn(1, 40, dtype=DOUBLE)
    system = damped_system(x.T @ x, 0.01, act_order=True)
    grid = range_grid(weight, Rounding.integers(4, 16, True), Steps(DOUBLE))
    codes, _ = swept(weight, grid, system)
    rounded = losses_of(grid.values(grid.codes(weight)) - weight, x.T @ x).sum()
    assert losses_of(grid.values(codes) - weight, x.T @ x).sum() < 0.1 * rounded


def test_dead_columns_are_rounded_to_nearest_and_do_not_disturb_the_others() -> None:
    weight, moment = problem()
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[3, 17, 39]] = True
    moment[dead, :] = 0
    moment[:, dead] = 0
    grid = range_grid(weight, Rounding.integers(3, 8, True), Steps(DOUBLE))
    codes, _ = swept(weight, grid, damped_system(moment, 0.01))
    assert torch.equal(codes[:, dead], grid.codes(weight)[:, dead])
    other = weight.clone()
    other[:, dead] = 0.01 * torch.randn(12, 3, dtype=DOUBLE)
    assert torch.equal(swept(other, grid, damped_system(moment, 0.01))[0][:, ~dead], codes[:, ~dead])


def test_corrected_target_minimises_the_error_against_the_reference_chain() -> None:
    """`‖W X − Q X̃‖² − ‖(V − Q) X̃‖²` must not depend on Q at α = 1, without damping."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 10, generator=generator, dtype=DOUBLE)
    x = torch.randn(300, 10, generator=generator, dtype=DOUBLE)
    moved = x + 0.2 * torch.randn(300, 10, generator=generator, dtype=DOUBLE)
    system = damped_system(moved.T @ moved, 1e-12)
    cross = (x - moved).T @ moved
    target = Shift.of(cross, system, rows=5).moved(weight) + weight
    torch.testing.assert_close(Shift.of(cross, system, rows=10).moved(weight) + weight, target)
    gaps = []
    for _ in range(4):
        q = torch.randn(5, 10, generator=generator, dtype=DOUBLE)
        gaps.append(((x @ weight.T - moved @ q.T) ** 2).sum() - ((moved @ (target - q).T) ** 2).sum())
    torch.testing.assert_close(torch.stack(gaps), gaps[0].expand(4))


@settings(deadline=None, max_examples=25)
@given(
    columns=st.integers(3, 50), bits=st.sampled_from([2, 3, 4]), group_size=st.sampled_from([16, 32, -1]),
    symmetric=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_refinement_lowers_the_loss_of_every_row(
    columns: int, bits: int, group_size: int, symmetric: bool, seed: int
) -> None:
    weight, moment = problem(columns=columns, seed=seed)
    moment = damped_system(moment).moment
    grid = range_grid(weight, Rounding.integers(bits, group_size, symmetric), Steps(torch.bfloat16))
    target, codes = weight.T.contiguous(), grid.codes(weight).T.contiguous()
    delta = differences(codes, grid, target)
    losses = row_losses(delta, moment)
    for _ in range(2):
        grid = refine(codes, delta, grid, moment)
        torch.testing.assert_close(delta, grid.values(codes.T).T - target)
        lower = row_losses(delta, moment)
        assert bool((lower <= losses * (1 + 1e-9)).all())
        losses = lower
    assert codes.min() >= grid.rounding.numbers.low
    assert codes.max() <= grid.rounding.numbers.high
    assert torch.equal(grid.scales, grid.scales.bfloat16().double())


def test_the_best_scale_is_that_of_least_squares() -> None:
    weight, moment = problem(rows=3, columns=32)
    grid = range_grid(weight, Rounding.integers(4, 16, True), Steps(DOUBLE))
    codes = grid.codes(weight)
    gradient = moment @ (grid.values(codes) - weight).T
    root = torch.linalg.cholesky(moment).T  # ‖root δ‖² = δᵀ H δ
    for group in (slice(0, 16), slice(16, 32)):
        number = group.start // 16
        change = best_scale(
            grid.scales[:, number], codes.T[group], gradient[group], moment[group, group], Steps(DOUBLE).storable
        )
        for row in range(3):
            own = torch.zeros(32, dtype=DOUBLE)
            own[group] = codes[row, group]
            others = grid.values(codes)[row] * (own == 0)
            expected = torch.linalg.lstsq(root @ own[:, None], root @ (weight[row] - others)[:, None]).solution[0, 0]
            torch.testing.assert_close(grid.scales[row, number] + change[row], expected)


def test_a_scale_stays_where_none_that_can_be_stored_is_better() -> None:
    """Of some rows, the best one lies between two that can, neither of which is better than what is there."""
    weight, moment = problem(rows=64, columns=16)
    grid = range_grid(weight, Rounding.integers(4, 16, True), Steps(DOUBLE))
    codes = grid.codes(weight)
    delta, scale = (grid.values(codes) - weight).T, grid.scales[:, 0]
    change = best_scale(scale, codes.T, moment @ delta, moment, lambda scales: (64 * scales).round() / 64)
    before, after = (row_losses(delta + codes.T * moved, moment) for moved in (0 * change, change))
    assert (after <= before).all()
    assert change.any()
    finest = best_scale(scale, codes.T, moment @ delta, moment, Steps(DOUBLE).storable)
    assert (finest[change == 0] != 0).any()


@pytest.mark.parametrize(("columns", "group_size"), [(10, -1), (70, 16)])
def test_refinement_ends_where_no_single_code_can_improve(columns: int, group_size: int) -> None:
    weight, moment = problem(rows=2, columns=columns)
    grid = range_grid(weight, Rounding.integers(2, group_size, True), Steps(DOUBLE))
    codes = grid.codes(weight).T.contiguous()
    delta = differences(codes, grid, weight.T)
    for _ in range(60):
        grid = refine(codes, delta, grid, moment)
    best = row_losses(delta, moment)
    for j in range(columns):
        for value in range(grid.rounding.numbers.low, grid.rounding.numbers.high + 1):
            other = codes.T.clone()
            other[:, j] = value
            assert bool((losses_of(grid.values(other) - weight, moment) >= best - 1e-9).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_row_keeps_the_best_of_several_grids(symmetric: bool) -> None:
    weight, moment = problem(rows=30, columns=48)
    system = damped_system(moment, act_order=True)
    options = Rounding.integers(3, 16, symmetric), Steps(torch.bfloat16)
    grids = [range_grid(weight, *options, shrink) for shrink in (1.0, 0.8, 0.6)]
    grid, codes, best = best_sweep(weight.T.contiguous(), grids, system, 4096)
    codes = codes.T
    losses = torch.stack([swept(weight, one, system)[1] for one in grids])
    torch.testing.assert_close(losses_of(grid.values(codes) - weight, system.moment), losses.min(0).values)
    torch.testing.assert_close(best, losses.min(0).values)
    assert len(set(losses.argmin(0).tolist())) > 1


def test_full_range_scales_reach_the_extreme_exactly() -> None:
    weight, _ = problem()
    grid = range_grid(weight, Rounding.integers(4, 8, True), Steps(DOUBLE))
    groups = weight.view(12, 5, 8)
    at = groups.abs().argmax(2, keepdim=True)
    values = grid.values(grid.codes(weight)).view(12, 5, 8)
    torch.testing.assert_close(values.gather(2, at), groups.gather(2, at))
    assert bool((grid.codes(weight).view(12, 5, 8).gather(2, at) == -8).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_rows_and_ragged_groups_stay_finite(symmetric: bool) -> None:
    weight, moment = problem(columns=43)
    weight[4] = 0
    grid = range_grid(weight, Rounding.integers(4, 16, symmetric), Steps(torch.bfloat16))
    codes, _ = swept(weight, grid, damped_system(moment))
    assert bool(torch.isfinite(grid.values(codes)).all())
    assert bool((grid.values(codes)[4] == 0).all())
    assert grid.scales.shape == (12, 3)


def test_searched_ranges_lower_the_weighted_error() -> None:
    weight, moment = problem(rows=32, columns=64)
    importance = moment.diagonal()
    for bits in (2, 3, 4):
        options = Rounding.integers(bits, 16), Steps(torch.bfloat16)
        grids = range_grid(weight, *options), searched_grid(weight, importance, *options, WIDE)
        plain, searched = (grid.values(grid.codes(weight)) - weight for grid in grids)
        assert (searched.square() * importance).sum() < (plain.square() * importance).sum()


def gptq(**options: Any) -> Gptq:
    """The pass on a moment as it is, making up for all errors before it."""
    return Gptq(kind="gptq", **{"correction": 1.0, "shrinkage": 0.0, **options})


def test_better_methods_have_lower_losses() -> None:
    """Rounding > GPTQ > act-order > searched ranges > refined, on one strongly correlated layer."""
    weight, moment = problem(rows=64, columns=128, tokens=1000)
    statistics = Statistics(1000, {"moment": moment.float(), "cross": torch.zeros(128, 128)})
    options = [
        {"act_order": False, "correction": 0.0, "refinements": 0, "search": False},
        {"act_order": True, "correction": 0.0, "refinements": 0, "search": False},
        {"refinements": 0},
        {},
    ]
    grid = range_grid(weight, Rounding.integers(3, 32, True), Steps(DOUBLE))
    losses = [float(losses_of(grid.values(grid.codes(weight)) - weight, moment).sum())]
    for option in options:
        solution, reason = solved(gptq(bits=3, group_size=32, **option), weight.float(), statistics)
        assert not reason
        losses.append(float(losses_of(values_of(solution) - weight, moment).sum()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.6 * losses[0]


def test_no_row_is_worse_than_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose sweep went wrong (here: some are spoilt on purpose) take the nearest values, and only they do."""
    weight, moment = problem(rows=40, columns=64)
    statistics = Statistics(200, {"moment": moment.float()})
    step = gptq(bits=4, group_size=32, refinements=0)
    grid = range_grid(weight.float(), Rounding.integers(4, 32, True), Steps(torch.float32))
    rounded = grid.codes(weight.float())

    def spoilt(target: Tensor, grids: list[Grid], system: System, *_: object):  # type: ignore[no-untyped-def]
        chosen, codes, losses = best_sweep(target, grids, system, 4096)
        codes[:, ::3] = 0
        losses[::3] = row_losses(-target[:, ::3], system.moment)
        return chosen, codes, losses

    monkeypatch.setattr("compressor.compress.solvers.sweep.best_sweep", spoilt)
    solution, reason = solved(step, weight.float(), statistics)
    assert solution.simple[::3].all()
    assert not solution.simple.all()
    assert torch.equal(solution.codes[::3].float(), rounded[::3])
    assert torch.equal(solution.grid.scales[::3], grid.scales[::3])
    assert not reason
    sweep = "compressor.compress.solvers.sweep.best_sweep"
    monkeypatch.setattr(sweep, lambda t, g, *_: (g[0], 0 * t, 1e30 + 0 * t[0]))
    solution, reason = solved(step, weight.float(), statistics)
    assert torch.equal(solution.codes.float(), rounded)
    assert reason == "rounded to nearest, which had the lower loss"


def test_rows_solved_in_parts_are_rows_solved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = problem(rows=30, columns=48)
    statistics = Statistics(200, {"moment": moment.float(), "cross": 0.01 * moment.float()})
    step = gptq(bits=3, group_size=16, symmetric=False)
    whole, _ = solved(step, weight.bfloat16(), statistics)
    monkeypatch.setattr("compressor.compress.passes.linear.gptq.ROWS", 7)
    parts, _ = solved(step, weight.bfloat16(), statistics)
    assert (whole.codes == parts.codes).float().mean() > 0.99  # GEMMs of another shape round differently
    lost = [losses_of(values_of(solution) - weight, moment) for solution in (whole, parts)]
    torch.testing.assert_close(*lost, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_small_weights_are_kept(stored: torch.dtype) -> None:
    weight = 5e-4 * torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    grid = range_grid(weight, Rounding.integers(8, 128, True), Steps(stored))
    assert (grid.values(grid.codes(weight)) - weight).norm() / weight.norm() < 0.01


def test_bfloat16_products_cost_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The true loss, in float64, of what is solved with rounded products against that of float32 products."""
    weight, moment = problem(rows=64, columns=256, tokens=2000)
    cross = 0.02 * moment.float() @ torch.eye(256).roll(1, 0)
    statistics, system = Statistics(2000, {"moment": moment.float(), "cross": cross}), damped_system(moment, 0.01)
    target = Shift.of(cross.double(), system, rows=64).moved(weight) + weight
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr("compressor.compress.passes.linear.groups.products_dtype", lambda _, dtype=dtype: dtype)
        solution, _ = solved(gptq(bits=4, group_size=64), weight.float(), statistics)
        losses.append(float(losses_of(values_of(solution) - target, system.moment).sum()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("along", ["many columns", "one column"])
def test_products_keep_what_is_not_along_one_direction(monkeypatch: pytest.MonkeyPatch, along: str) -> None:
    """A direction with nearly all of the energy, as first tokens have it: products of bfloat16 would lose the rest."""
    weight, moment = problem(rows=64, columns=256, tokens=2000)
    direction = torch.randn(256, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    if along == "one column":
        direction = torch.eye(256, dtype=DOUBLE)[7]
    moment += 1e6 / 256 * moment.trace() * torch.outer(direction, direction) / direction.square().sum()
    statistics, losses = Statistics(2000, {"moment": moment.float()}), []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr("compressor.compress.passes.linear.groups.products_dtype", lambda _, dtype=dtype: dtype)
        solution, _ = solved(gptq(bits=4, group_size=64, damping=1e-4, correction=0.0), weight.float(), statistics)
        losses.append(float(losses_of(values_of(solution) - weight, moment).sum()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    kept = damped_system(moment.float(), 1e-4).to(torch.bfloat16)
    assert kept.moment.dtype == (torch.bfloat16 if along == "one column" else torch.float32)


def test_inputs_that_are_never_there_hardly_count() -> None:
    """Scales and codes of a row serve the columns that are used: nothing changes for these where the others' weights
    are gone and ranges are as they were."""
    weight, moment = problem(rows=64, columns=128, tokens=1000)
    weight = weight.clamp(-2, 2)
    weight[:, ::64] = 2.5  # the range of every group, either way
    unused = torch.arange(128) % 2 == 1
    moment[unused], moment[:, unused] = 0, 0
    statistics, losses = Statistics(1000, {"moment": moment.float()}), []
    for gone in (False, True):
        own = torch.where(unused & torch.tensor(gone), 0.0, weight)
        solution, _ = solved(gptq(bits=3, group_size=64, correction=0.0), own.float(), statistics)
        losses.append(float(losses_of(values_of(solution) - own, moment).sum()))
    assert losses[0] < 1.01 * losses[1]


def test_the_error_that_is_reported_is_of_what_was_measured() -> None:
    """By the definition, on the tokens themselves: without what is added to the moment to solve with it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    weight = torch.randn(24, 64, generator=generator)
    statistics = Statistics(300, {"moment": x.T @ x})
    work = StageWork({"x": Dense(weight)}, {"x": weight}, [["x"]], {"x": statistics})
    step = gptq(bits=4, group_size=32, damping=0.5, correction=0.0)
    (done,) = (event for event in step.apply(work) if isinstance(event, LayerDone))
    missed = x.double() @ (work.linears["x"].dense() - weight).double().T
    assert done.error == pytest.approx(float(missed.square().sum() / (x @ weight.T).double().square().sum()), rel=1e-4)
    factors = LowRank(Dense(torch.randn(24, 8, generator=generator)), Dense(torch.randn(8, 64, generator=generator)))
    work = StageWork({"x": factors}, {"x": factors.dense()}, [["x"]], {"x": statistics})
    done = {event.name: event for event in step.apply(work) if isinstance(event, LayerDone)}
    after, damped = work.linears["x"], damped_system(x.T @ x, 0.5).moment
    assert isinstance(after, LowRank)
    wanted = refit_up(factors.dense(), damped, after.down.dense(), factors.up.dense())
    between = (x @ after.down.dense().T).double()
    missed, whole = (float((between @ part.double().T).square().sum()) for part in (after.up.dense() - wanted, wanted))
    assert done["x.up"].error == pytest.approx(missed / whole, rel=1e-3)
    seen = StageWork({"x": Dense(weight)}, {"x": weight}, [["x"]], {})
    (done,) = (event for event in step.apply(seen) if isinstance(event, LayerDone))
    off = (seen.linears["x"].dense() - weight).double()
    assert done.error == pytest.approx(float(off.square().sum() / weight.double().square().sum()), rel=1e-4)


@pytest.mark.parametrize("drift", ["linear", "half", "noise"])
def test_a_correction_is_as_strong_as_tokens_that_it_has_not_seen_bear(drift: str) -> None:
    """Against a search over the errors of the held-out tokens, one by one; and near one for an error that follows from
    the inputs, near zero for one that does not."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(400, 48, generator=generator, dtype=DOUBLE) for _ in range(2))
    mixed = x @ torch.randn(48, 48, generator=generator, dtype=DOUBLE) / 7
    moved = 0.1 * {"linear": mixed, "half": 0.3 * mixed + noise, "noise": noise}[drift]
    weight = torch.randn(20, 48, generator=generator, dtype=DOUBLE)
    seen, held = slice(300), slice(300, 400)
    system = damped_system(x[seen].T @ x[seen], 1e-6)
    fitted = Shift.of(moved[seen].T @ x[seen], system, rows=20)
    found = held_out_share(weight, fitted, x[held].T @ x[held], moved[held].T @ x[held])
    change = fitted.moved(weight)
    shares = torch.linspace(0, 1, 1001, dtype=DOUBLE)
    losses = [float((moved[held] @ weight.T - a * x[held] @ change.T).square().sum()) for a in shares]
    best = float(shares[int(torch.tensor(losses).argmin())])
    expected = 1 / (1 + (1 / best - 1) * 0.75) if best else 0.0
    assert found == pytest.approx(expected, abs=2e-3)
    assert {"linear": found > 0.99, "half": 0.2 < found < 0.9, "noise": found < 0.2}[drift]


@pytest.mark.parametrize("lent", [False, True])
def test_shares_are_those_of_each_linear_and_of_the_tokens_that_were_held_out(lent: bool) -> None:
    """From sums over tokens to targets: of two linears that read the same input, one sees what drifted."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 32, generator=generator, dtype=DOUBLE)
    moved = torch.randn(400, 32, generator=generator, dtype=DOUBLE)
    moved[:, :4] += 3 * x[:, :4]
    weights = torch.randn(2, 8, 32, generator=generator, dtype=DOUBLE)
    weights[0, :, 4:], weights[1, :, :4] = 0, 0
    seen, held = slice(300), slice(300, 400)
    sums = {
        "moment": x.T @ x,
        "cross": moved.T @ x,
        "held_moment": x[held].T @ x[held],
        "held_cross": moved[held].T @ x[held],
    }
    statistics = Statistics(0 if lent else 400, {name: found.float() for name, found in sums.items()}, 400 * lent)
    dense = {name: Dense(weight.float()) for name, weight in zip("ab", weights, strict=True)}
    originals = {name: operator.weight for name, operator in dense.items()}
    work = StageWork({**dense}, originals, [["a", "b"]], dict.fromkeys("ab", statistics))
    step = gptq(bits=4, correction="auto", shrinkage="auto")
    (group,) = groups_of(step, work, products=torch.float32)

    def shift(rows: slice) -> Tensor:
        moment, tokens = x[rows].T @ x[rows], len(x[rows])
        system = damped_system(moment, step.damping, shrinkage=32 / (32 + tokens))
        return moved[rows].T @ x[rows] @ torch.linalg.inv(system.moment)

    shares = torch.linspace(0, 1, 8001, dtype=DOUBLE)
    for weight, alpha, target in zip(weights, group.alphas, group.targets(), strict=True):
        change = x[held] @ (weight @ shift(seen)).T
        losses = torch.stack([(moved[held] @ weight.T - a * change).square().sum() for a in shares])
        best = float(shares[losses.argmin()])
        assert alpha == pytest.approx(1 / (1 + (1 / best - 1) * 0.75) if best else 0.0, abs=3e-4)
        torch.testing.assert_close(target.double(), weight + alpha * weight @ shift(slice(None)), rtol=1e-3, atol=1e-4)
    assert group.alphas[0] > 0.9 > 0.5 > group.alphas[1]


def test_passes_that_correct_nothing_make_no_second_system(monkeypatch: pytest.MonkeyPatch) -> None:
    _, moment = problem(rows=4, columns=32)
    made = []
    monkeypatch.setattr(
        "compressor.compress.passes.linear.groups.damped_system",
        lambda *args, **options: made.append(None) or damped_system(*args, **options),
    )
    weight = torch.randn(4, 32)
    for method, count in (("wanda", 1), ("sparsegpt", 2)):
        work = StageWork({"x": Dense(weight)}, {"x": weight}, [["x"]], {"x": known(moment)})
        list(SparsePass(kind="sparse24", method=method).apply(work))  # type: ignore[arg-type]
        assert len(made) == count
        made.clear()


def test_a_moment_of_few_tokens_leans_on_its_diagonal() -> None:
    _, moment = problem(rows=4, columns=32, tokens=20)
    found = damped_system(moment, 1e-3, shrinkage=0.25).moment
    damping = 1e-3 * float(moment.diagonal().mean())
    expected = 0.75 * moment + (0.25 * moment.diagonal() + damping).diag_embed()
    torch.testing.assert_close(found, expected)
    step = gptq(bits=4, shrinkage="auto")
    assert [step.shrinkage_for(100, tokens) for tokens in (0, 100, 9900)] == [1, 0.5, 0.01]


@pytest.mark.parametrize("columns", [1, 32, 300, 620])  # fewer and more than are worked out at a time
def test_columns_are_taken_by_what_those_behind_do_not_tell(columns: int) -> None:
    _, moment = problem(columns=columns, tokens=2 * columns)
    found, taken = sorted_order(moment).flip(0), torch.empty(0, dtype=torch.int64)
    for start in range(0, columns, 32):
        rest = torch.tensor(sorted({*range(columns)} - {*taken.tolist()}))
        told = moment[rest][:, taken] @ torch.linalg.solve(moment[taken][:, taken], moment[taken][:, rest])
        left = moment.diagonal()[rest] - told.diagonal()
        expected = rest[left.argsort()[:32]]
        assert torch.equal(found[start : start + 32], expected)
        taken = torch.cat([taken, expected])


@pytest.mark.parametrize("columns", [1, 255, 257, 620])
def test_the_factor_is_of_the_inverse(columns: int) -> None:
    _, moment = problem(columns=columns, tokens=2 * columns)
    moment += 0.01 * moment.trace() / columns * torch.eye(columns, dtype=DOUBLE)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
    factor = inverse_factor(moment, order)
    assert factor is not None
    one = factor @ moment[order][:, order] @ factor.T
    torch.testing.assert_close(one, torch.eye(columns, dtype=DOUBLE), rtol=0, atol=1e-12)
    assert torch.equal(factor, factor.triu())
    assert inverse_factor(moment - 2 * moment.trace() * torch.eye(columns, dtype=DOUBLE), order) is None
