"""The sweep with several choices side by side, against all choices there are."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from test_compiled import ROUNDED, both, half_of, problem
from torch import Tensor

from compressor.compress.solvers import beam
from compressor.compress.solvers.grid import Steps, range_grid
from compressor.compress.solvers.refine import differences, row_losses
from compressor.compress.solvers.sweep import gptq_codes
from compressor.compress.solvers.system import damped_system
from compressor.kernels.numbers import E2M1, E4M3, Integers, Numbers, Rounding

DOUBLE = torch.float64
ALL_FP8 = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).double()


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", ROUNDED)
def test_the_compiled_search_is_that_of_torch(name: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    target, grid, moment = problem(ROUNDED[name])
    system, keep = damped_system(moment, act_order=True), half_of(target) if kept else None
    own, twin = both(monkeypatch, lambda: beam.beam_codes(target, grid, system, 4, keep), beam)
    assert torch.equal(own, twin)
    free = own if keep is None else own[keep]
    assert grid.rounding.numbers.nearest(free.clone()).equal(free)
    if keep is not None:
        assert not grid.values(own.T).T[~keep].any()
    swept, _ = gptq_codes(target, grid, system, keep)
    assert torch.equal(beam._codes(target, grid, system, 1, keep), swept)
    before, after = (row_losses(differences(codes, grid, target), system.moment) for codes in (swept, own))
    assert after.sum() < before.sum()


def test_codes_are_one_choice_from_the_first_column_to_the_last() -> None:
    """Every code is next to what those before it leave, whatever other choices have been followed on the way."""
    target, grid, moment = problem(ROUNDED["symmetric"], rows=400)
    system, numbers = damped_system(moment, act_order=True), grid.rounding.numbers
    found, (scales, _) = beam.beam_codes(target, grid, system, 8), grid.columns(len(target))
    left = target[system.order].clone()
    for j, place in enumerate(system.order.tolist()):
        exact, code = left[j] / scales[:, place], found[place]
        nearest = numbers.nearest(exact.clone())
        assert ((code == nearest) | (code == numbers.beside(exact, nearest))).all(), j
        error = (left[j] - code * scales[:, place]) / system.factor[j, j]
        left[j:] -= system.factor[j, j:, None] * error


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_search_as_wide_as_the_tree_finds_the_best_of_it(symmetric: bool) -> None:
    """All 256 ways to take one of the two numbers next to what is left, column after column, by hand."""
    columns, rows, generator = 8, 5, torch.Generator().manual_seed(0)
    x = torch.randn(30, columns, generator=generator, dtype=DOUBLE) @ torch.randn(
        columns, columns, generator=generator, dtype=DOUBLE
    )
    weight = torch.randn(rows, columns, generator=generator, dtype=DOUBLE)
    grid = range_grid(weight, Rounding.integers(3, -1, symmetric), Steps(DOUBLE))
    system = damped_system(x.T @ x, act_order=True)
    found = beam.beam_codes(weight.T.contiguous(), grid, system, 128)
    least = row_losses(differences(found, grid, weight.T), system.moment)
    for row in range(rows):
        scale, zero = float(grid.scales[row, 0]), 0.0 if grid.zeros is None else float(grid.zeros[row, 0])
        best = torch.inf
        for choices in product((0, 1), repeat=columns):
            left, lost = weight[row, system.order].clone(), 0.0
            for j, other in enumerate(choices):
                exact = float(left[j]) / scale + zero
                code = min(max(round(exact - zero) + zero, -4), 3)
                if other:
                    code = min(max(code + (1 if exact > code else -1), -4), 3)
                error = (left[j] - (code - zero) * scale) / system.factor[j, j]
                left[j:] -= error * system.factor[j, j:]
                lost += float(error) ** 2
            best = min(best, lost)
        assert float(least[row]) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(
    ("numbers", "all_of_them"),
    [
        (Integers(3), torch.arange(-4.0, 4).double()),
        (E2M1, torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=DOUBLE)),
        (E4M3, torch.cat([-ALL_FP8.flip(0)[:-1], ALL_FP8])),
    ],
)
def test_the_number_beside_the_nearest_is_on_the_other_side(numbers: Numbers, all_of_them: Tensor) -> None:
    top = float(all_of_them[-1])
    values = torch.linspace(-1.2, 1.2, 4001, dtype=DOUBLE) * top
    nearest = numbers.nearest(values.clone())
    found = numbers.beside(values, nearest)
    place = torch.searchsorted(all_of_them, nearest)
    expected = all_of_them[(place + torch.where(values > nearest, 1, -1)).clamp(0, len(all_of_them) - 1)]
    assert torch.equal(found, expected)


def test_no_row_is_worse_for_a_search() -> None:
    """Not from the sweep's codes, nor from better ones than the search finds."""
    target, grid, moment = problem(ROUNDED["symmetric"])
    system = damped_system(moment, act_order=True)
    codes, better = gptq_codes(target, grid, system)[0], grid
    for width in (2, 16, 2):
        before = row_losses(differences(codes, better, target), system.moment)
        codes, better = beam.improved(codes, target, better, system, None, width, 2)
        after = row_losses(differences(codes, better, target), system.moment)
        assert (after <= before).all()
        assert width == 2 or (after < before).any()
