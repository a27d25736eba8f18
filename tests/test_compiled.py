"""Compiled loops against the same in torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.compress.solvers import compiled, refine, sweep
from compressor.compress.solvers.grid import Grid, Steps, range_grid
from compressor.compress.solvers.system import damped_system
from compressor.kernels.numbers import ROUNDINGS, Rounding

DOUBLE = torch.float64
ROUNDED = {
    "symmetric": Rounding.integers(3, 32),
    "zero points": Rounding.integers(4, 32, symmetric=False),
    "rows": Rounding.integers(4, -1),
    "nvfp4": ROUNDINGS["nvfp4"],
    "mxfp4": ROUNDINGS["mxfp4"],
    "fp8": ROUNDINGS["fp8"],
    "nested": ROUNDINGS["q4_k"],
    "nested, no zeros": ROUNDINGS["q3_k"],
}


def problem(rounding: Rounding, rows: int = 40) -> tuple[Tensor, Grid, Tensor]:
    """A weight, columns first, its grid, and a correlated second moment."""
    columns, generator = max(96, 256 * (rounding.scales == "nested")), torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator, dtype=DOUBLE) / columns**0.5 + 0.5 * torch.eye(columns)
    inputs = torch.randn(400, columns, generator=generator, dtype=DOUBLE) @ mix
    weight = torch.randn(rows, columns, generator=generator, dtype=DOUBLE)
    return (
        weight.T.contiguous(),
        range_grid(weight, rounding, Steps.of(rounding, torch.float32, 4.0)),
        inputs.T @ inputs,
    )


def half_of(target: Tensor) -> Tensor:
    """bool, alike: which of its entries stay."""
    return torch.rand(target.shape, generator=torch.Generator().manual_seed(1)) < 0.5


def both(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any], *modules: Any) -> tuple[Any, Any]:
    """What comes of the compiled loops, and of torch."""
    first = run()
    for module in modules or (sweep, refine):
        monkeypatch.setattr(module, "compiles", lambda tensor: False)
    return first, run()


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", ROUNDED)
def test_the_sweep_and_the_descent_are_those_of_torch(name: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    target, grid, moment = problem(ROUNDED[name])
    system, keep = damped_system(moment, act_order=True), half_of(target) if kept else None

    def run() -> tuple[Tensor, ...]:
        codes, losses = sweep.gptq_codes(target, grid, system, keep)
        first, delta = codes.clone(), refine.differences(codes, grid, target)
        better = refine.refine(codes, delta, grid, moment, keep)
        return first, losses, codes, delta, better.scales

    for own, twin in zip(*both(monkeypatch, run), strict=True):
        torch.testing.assert_close(own, twin, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [DOUBLE, torch.float32])
def test_rows_and_inputs_of_next_to_nothing_are_no_error(kind: torch.dtype) -> None:
    target, grid, moment = problem(ROUNDED["symmetric"])
    target[:, 3] = 0
    grid = range_grid(target.T, grid.rounding, Steps(torch.bfloat16))
    grid = Grid(grid.scales.to(kind), None, grid.rounding, grid.steps)
    moment, target = 1e-12 * moment.to(kind), target.to(kind)
    codes, _ = sweep.gptq_codes(target, grid, damped_system(moment))
    refine.refine(codes, refine.differences(codes, grid, target), grid, moment)
    assert codes.isfinite().all()
    assert not codes[:, 3].any()


def test_parts_of_rows_go_to_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    target, grid, moment = problem(ROUNDED["symmetric"], rows=300)
    system, used = damped_system(moment), set[int]()
    alone = sweep.gptq_codes(target, grid, system)
    monkeypatch.setattr(compiled, "_ROWS", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    original = compiled._sweep

    def watched(*arguments: Any) -> None:
        used.add(threading.get_ident())
        original(*arguments)

    monkeypatch.setattr(compiled, "_sweep", watched)
    together = sweep.gptq_codes(target, grid, system)
    compiled._workers.cache_clear()
    assert threading.get_ident() not in used
    for own, twin in zip(alone, together, strict=True):
        assert torch.equal(own, twin)


def test_code_is_compiled_anew_where_it_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    real = compiled.njit

    def without_cache(**options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(compiled, "njit", without_cache)
    assert compiled._compiled(lambda x: x + 1)(1) == 2
