"""Solvers against slow, unblocked float64 twins written from the equations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.calibrate.statistics import Statistics
from compressor.compress.passes.gptq import Gptq, best_sweep, corrected_target, gptq_codes
from compressor.compress.solvers.grid import range_grid, searched_grid
from compressor.compress.solvers.refine import coordinate_descent, refit_scales, row_losses
from compressor.compress.solvers.sweep import column_sweep
from compressor.compress.solvers.system import NotSolvable, damped_system

DOUBLE = torch.float64


def problem(rows: int = 12, columns: int = 40, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and a correlated second moment, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=DOUBLE) / columns**0.5 + torch.eye(columns) * 0.5
    x = torch.randn(tokens, columns, generator=generator, dtype=DOUBLE) @ mix
    return torch.randn(rows, columns, generator=generator, dtype=DOUBLE), x.T @ x


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


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("columns", "group_size", "block_size"), [(40, 16, 8), (44, 32, 128), (37, -1, 5)])
def test_sweep_gives_the_codes_of_the_unblocked_solver(
    bits: int, symmetric: bool, act_order: bool, columns: int, group_size: int, block_size: int
) -> None:
    weight, moment = problem(columns=columns)
    system = damped_system(moment, 0.01, act_order=act_order)
    grid = range_grid(weight, bits, group_size, symmetric, DOUBLE)
    scales, zeros = grid.columns(columns)

    def quantize(j: int, column: Tensor) -> Tensor:
        zero = 0 if zeros is None else zeros[:, j]
        return (torch.clamp(torch.round(column / scales[:, j]) + zero, grid.low, grid.high) - zero) * scales[:, j]

    expected = sweep_by_the_book(weight, system.moment, system.order, quantize)
    codes, losses = gptq_codes(weight, grid, system, block_size)
    torch.testing.assert_close(losses, row_losses(expected - weight, system.moment))
    torch.testing.assert_close(grid.values(codes), expected, rtol=0, atol=1e-12)
    assert torch.equal(codes, grid.codes(expected))
    if act_order:
        assert bool((moment.diagonal()[system.order].diff() <= 0).all())


def test_sweep_without_rounding_changes_nothing() -> None:
    weight, moment = problem()
    system = damped_system(moment)
    result, losses = column_sweep(weight, system.factor, lambda j, column: column.clone())
    assert torch.equal(result, weight)
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
    grid = range_grid(weight, 4, 16, True, DOUBLE)
    codes, _ = gptq_codes(weight, grid, system)
    rounded = row_losses(grid.values(grid.codes(weight)) - weight, x.T @ x).sum()
    assert row_losses(grid.values(codes) - weight, x.T @ x).sum() < 0.1 * rounded


def test_dead_columns_are_rounded_to_nearest_and_do_not_disturb_the_others() -> None:
    weight, moment = problem()
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[3, 17, 39]] = True
    moment[dead, :] = 0
    moment[:, dead] = 0
    grid = range_grid(weight, 3, 8, True, DOUBLE)
    codes, _ = gptq_codes(weight, grid, damped_system(moment, 0.01))
    assert torch.equal(codes[:, dead], grid.codes(weight)[:, dead])
    other = weight.clone()
    other[:, dead] = 0.01 * torch.randn(12, 3, dtype=DOUBLE)
    assert torch.equal(gptq_codes(other, grid, damped_system(moment, 0.01))[0][:, ~dead], codes[:, ~dead])


def test_corrected_target_minimises_the_error_against_the_reference_chain() -> None:
    """`‖W X − Q X̃‖² − ‖(V − Q) X̃‖²` must not depend on Q at α = 1, without damping."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 10, generator=generator, dtype=DOUBLE)
    x = torch.randn(300, 10, generator=generator, dtype=DOUBLE)
    moved = x + 0.2 * torch.randn(300, 10, generator=generator, dtype=DOUBLE)
    system = damped_system(moved.T @ moved, 1e-12)
    target = corrected_target(weight, (x - moved).T @ moved, system, 1.0)
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
    grid = range_grid(weight, bits, group_size, symmetric, torch.bfloat16)
    codes = grid.codes(weight)
    losses = row_losses(grid.values(codes) - weight, moment)
    for _ in range(2):
        grid = refit_scales(codes, grid, moment, weight @ moment)
        refit = row_losses(grid.values(codes) - weight, moment)
        codes = coordinate_descent(weight, codes, grid, moment, block_size=7)
        descended = row_losses(grid.values(codes) - weight, moment)
        assert bool((refit <= losses * (1 + 1e-9)).all())
        assert bool((descended <= refit * (1 + 1e-9)).all())
        losses = descended
    assert codes.min() >= grid.low
    assert codes.max() <= grid.high


def test_refit_scales_are_those_of_least_squares() -> None:
    weight, moment = problem(rows=3, columns=32)
    grid = range_grid(weight, 4, 16, True, DOUBLE)
    codes = grid.codes(weight)
    fitted = refit_scales(codes, grid, moment, weight @ moment)
    root = torch.linalg.cholesky(moment).T  # ‖root δ‖² = δᵀ H δ
    for row in range(3):
        basis = torch.stack([codes[row] * (torch.arange(32) // 16 == g) for g in range(2)], 1)
        expected = torch.linalg.lstsq(root @ basis, root @ weight[row, :, None]).solution[:, 0]
        torch.testing.assert_close(fitted.scales[row], expected, rtol=1e-4, atol=0)


def test_coordinate_descent_ends_where_no_single_code_can_improve() -> None:
    weight, moment = problem(rows=2, columns=10)
    grid = range_grid(weight, 2, -1, True, DOUBLE)
    codes = grid.codes(weight)
    for _ in range(50):
        codes = coordinate_descent(weight, codes, grid, moment, block_size=3)
    best = row_losses(grid.values(codes) - weight, moment)
    for j in range(10):
        for value in range(grid.low, grid.high + 1):
            other = codes.clone()
            other[:, j] = value
            assert bool((row_losses(grid.values(other) - weight, moment) >= best - 1e-9).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_row_keeps_the_best_of_several_grids(symmetric: bool) -> None:
    weight, moment = problem(rows=30, columns=48)
    system = damped_system(moment, act_order=True)
    grids = [range_grid(weight, 3, 16, symmetric, torch.bfloat16, shrink) for shrink in (1.0, 0.8, 0.6)]
    grid, codes, best = best_sweep(weight, grids, system)
    losses = torch.stack([gptq_codes(weight, one, system)[1] for one in grids])
    torch.testing.assert_close(row_losses(grid.values(codes) - weight, system.moment), losses.min(0).values)
    torch.testing.assert_close(best, losses.min(0).values)
    assert len(set(losses.argmin(0).tolist())) > 1


def test_full_range_scales_reach_the_extreme_exactly() -> None:
    weight, _ = problem()
    grid = range_grid(weight, 4, 8, True, DOUBLE)
    groups = weight.view(12, 5, 8)
    at = groups.abs().argmax(2, keepdim=True)
    values = grid.values(grid.codes(weight)).view(12, 5, 8)
    torch.testing.assert_close(values.gather(2, at), groups.gather(2, at))
    assert bool((grid.codes(weight).view(12, 5, 8).gather(2, at) == -8).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_rows_and_ragged_groups_stay_finite(symmetric: bool) -> None:
    weight, moment = problem(columns=43)
    weight[4] = 0
    grid = range_grid(weight, 4, 16, symmetric, torch.bfloat16)
    codes, _ = gptq_codes(weight, grid, damped_system(moment))
    assert bool(torch.isfinite(grid.values(codes)).all())
    assert bool((grid.values(codes)[4] == 0).all())
    assert grid.scales.shape == (12, 3)


def test_searched_ranges_lower_the_weighted_error() -> None:
    weight, moment = problem(rows=32, columns=64)
    importance = moment.diagonal()
    for bits in (2, 3, 4):
        plain, searched = (
            grid.values(grid.codes(weight)) - weight
            for grid in (
                range_grid(weight, bits, 16, True, torch.bfloat16),
                searched_grid(weight, importance, bits, 16, True, torch.bfloat16),
            )
        )
        assert (searched.square() * importance).sum() < (plain.square() * importance).sum()


def test_better_methods_have_lower_losses() -> None:
    """Rounding > GPTQ > act-order > searched ranges > refined, on one strongly correlated layer."""
    weight, moment = problem(rows=64, columns=128, tokens=1000)
    statistics = Statistics(1000, moment.float(), torch.zeros(128, 128))
    options = [
        {"act_order": False, "correction": 0.0, "refinements": 0, "search": False},
        {"act_order": True, "correction": 0.0, "refinements": 0, "search": False},
        {"refinements": 0},
        {},
    ]
    grid = range_grid(weight, 3, 32, True, DOUBLE)
    losses = [float(row_losses(grid.values(grid.codes(weight)) - weight, moment).sum())]
    for option in options:
        solution, reason = Gptq(kind="gptq", bits=3, group_size=32, **option)._solve(
            weight.float(), statistics, torch.float32
        )
        assert not reason
        losses.append(float(solution.losses.sum()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.6 * losses[0]


def test_rows_solved_in_parts_are_rows_solved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = problem(rows=30, columns=48)
    statistics = Statistics(200, moment.float(), 0.01 * moment.float())
    step = Gptq(kind="gptq", bits=3, group_size=16, symmetric=False)
    whole, _ = step._solve(weight.float(), statistics, torch.bfloat16)
    monkeypatch.setattr("compressor.compress.passes.gptq._ROWS", 7)
    parts, _ = step._solve(weight.float(), statistics, torch.bfloat16)
    assert (whole.codes == parts.codes).float().mean() > 0.99  # GEMMs of another shape round differently
    torch.testing.assert_close(whole.losses, parts.losses, rtol=0.05, atol=1e-3)
