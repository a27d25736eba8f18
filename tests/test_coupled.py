"""Rows that a metric couples, against brute force in float64."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.calibrate.curvature import Curvature
from compressor.compress.apply import Job, apply
from compressor.compress.recipe import parse_recipe
from compressor.compress.solvers.coupled import (
    coupled,
    coupled_descent,
    coupled_losses,
    coupled_pairs,
    coupled_share,
    coupled_sweep,
    damped_metric,
    metric_of,
)
from compressor.compress.solvers.grid import Grid, Steps, range_grid
from compressor.compress.solvers.refine import differences
from compressor.compress.solvers.sparse24 import swept
from compressor.compress.solvers.sweep import gptq_codes
from compressor.compress.solvers.system import System, damped_system
from compressor.kernels.numbers import ROUNDINGS, Rounding
from compressor.runtime.stored import StoredModel

DOUBLE = torch.float64
INTEGERS, ZEROS = Rounding.integers(3, 16), Rounding.integers(3, 16, symmetric=False)


def test_the_share_that_coupled_rows_leave() -> None:
    """Rows as they come, each error made up for by what lies behind it: `δ_i − Σ_j<i u_ji δ_j`, of `δ` all alike."""
    generator = torch.Generator().manual_seed(0)
    own = Curvature(1.0, correlated(24, 400, generator).float(), 10**9)
    metric = metric_of(own)
    assert metric is not None
    unit = torch.linalg.cholesky(metric.double())
    unit = unit / unit.diagonal()  # M = L D Lᵀ: errors that are made up for are L⁻ᵀ δ
    made_up = torch.linalg.inv(unit.mT) @ torch.randn(24, 200_000, generator=generator, dtype=DOUBLE)
    left = (made_up * (metric.double() @ made_up)).sum(0).mean() / metric.double().trace()
    assert coupled_share(own) == pytest.approx(float(left), rel=0.01)
    assert coupled_share(own) < 0.9
    assert coupled_share(replace(own, metric=torch.eye(24))) == pytest.approx(1.0)
    assert coupled_share(replace(own, metric=None)) == 1.0


def correlated(size: int, tokens: int, generator: torch.Generator) -> Tensor:
    """A second moment whose entries go together."""
    mix = torch.randn(size, size, generator=generator, dtype=DOUBLE) + 2 * torch.randn(
        size, 1, generator=generator, dtype=DOUBLE
    )
    x = torch.randn(tokens, size, generator=generator, dtype=DOUBLE) @ mix
    return x.T @ x / tokens


def problem(
    rounding: Rounding, rows: int = 48, columns: int = 64, seed: int = 0
) -> tuple[Tensor, Grid, System, Tensor]:
    """A target, columns first, its grid, the system of its inputs and a damped metric of its rows."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=DOUBLE)
    grid = range_grid(weight, rounding, Steps.of(rounding, torch.float32, 4.0))
    system = damped_system(correlated(columns, 500, generator), act_order=True)
    metric = damped_metric(correlated(rows, 500, generator), 0.05, 10**9)
    return weight.T.contiguous(), grid, system, metric


def loss(delta: Tensor, moment: Tensor, metric: Tensor) -> float:
    """`tr(M Δ H Δᵀ)` from the definition, Δ columns first."""
    return float(torch.einsum("rs,is,ij,jr->", metric, delta, moment, delta))


def test_losses_of_rows_add_up_to_that_of_the_definition() -> None:
    target, grid, system, metric = problem(INTEGERS)
    delta = differences(gptq_codes(target, grid, system)[0], grid, target)
    assert float(coupled_losses(delta, system.moment, metric).sum()) == pytest.approx(
        loss(delta, system.moment, metric)
    )


def test_rows_that_are_not_coupled_are_swept_as_ever() -> None:
    target, grid, system, _ = problem(INTEGERS)
    codes, _ = gptq_codes(target, grid, system)
    identity = torch.eye(target.shape[1], dtype=DOUBLE)
    assert torch.equal(coupled_sweep(target, grid, system, identity), codes)


@pytest.mark.parametrize("rounding", [INTEGERS, ZEROS])
def test_several_choices_lose_less_where_rows_are_coupled(rounding: Rounding) -> None:
    target, grid, system, metric = problem(rounding)
    found = [coupled_sweep(target, grid, system, metric, width=width) for width in (1, 16)]
    lost = [loss(differences(codes, grid, target), system.moment, metric) for codes in found]
    assert lost[1] < lost[0]
    start = gptq_codes(target, grid, system)[0]
    ends = [coupled(start, target, grid, system, metric, None, 0, width)[0] for width in (1, 16)]
    assert torch.equal(ends[1], found[1])
    assert torch.equal(ends[0], found[0])


def test_later_rows_make_up_for_earlier_ones_as_well_as_they_can() -> None:
    """Where all but the first block of rows are all but exact, the loss is the least that the first one allows."""
    target, grid, system, metric = problem(Rounding.integers(24, 16))
    first = torch.arange(target.shape[1]) % 16 == 0
    grid = replace(grid, scales=torch.where(first[:, None], 0.5, 1e-6).expand_as(grid.scales).to(DOUBLE))
    codes = coupled_sweep(target, grid, system, metric)
    delta = differences(codes, grid, target)
    rest, own = ~first, delta[:, first]
    # What is best for the other rows, given the errors of the first block.
    answer = -torch.linalg.solve(metric[rest][:, rest], metric[rest][:, first])
    best = delta.clone()
    best[:, rest] = own @ answer.T
    least = loss(best, system.moment, metric)
    assert loss(delta, system.moment, metric) == pytest.approx(least, rel=1e-6)
    alone = differences(gptq_codes(target, grid, system)[0], grid, target)
    assert least < 0.8 * loss(alone, system.moment, metric)


def test_rows_that_are_pruned_make_up_for_one_another() -> None:
    target, _, system, metric = problem(INTEGERS)
    system = damped_system(system.moment, act_order=True, together=4)
    alone, delta = swept(target, system, 3)
    values = coupled_pairs(target, system, metric, 3)
    assert int((values.view(-1, 4, target.shape[1]) != 0).sum(1).max()) == 2
    assert loss(values - target, system.moment, metric) < 0.8 * loss(delta, system.moment, metric)
    identity = torch.eye(target.shape[1], dtype=DOUBLE)
    torch.testing.assert_close(coupled_pairs(target, system, identity, 3), alone)


OBJECTIVES = {
    "gptq": "{kind: gptq, bits: 3, group_size: 32",
    "sparse24": "{kind: sparse24",
    "eora": "{kind: rtn, bits: 2, group_size: 32, targets: '*.v_proj'}, {kind: eora, rank: 2",
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_pass_aims_at_the_end_of_the_model_where_it_is_asked_to(
    kind: str, pico: Callable[..., Path], calibration_text: Path, tmp_path: Path
) -> None:
    """And not where only another pass is."""
    model, name = pico("llama"), "model.layers.0.self_attn.v_proj"
    other = "{kind: gptq, bits: 8, targets: '*.down_proj', objective: model}"
    made = {}
    for number, (own, beside) in enumerate((("layer", ""), ("layer", other), ("model", ""))):
        passes = f"{OBJECTIVES[kind]}, objective: {own}, targets: '*.v_proj'}}, {beside}"
        recipe = f"data: {{source: '{calibration_text}', samples: 4, sequence_length: 64}}\n"
        recipe += f"passes: [{passes}]\nlimits: {{kl: null}}\n"
        apply(Job(parse_recipe(recipe), recipe, (), model, tmp_path / str(number), str(model)), lambda event: None)
        made[number] = StoredModel(tmp_path / str(number)).operator(name).dense()
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("name", ["integers", "zeros", "rows", "nvfp4", "fp8_block", "q2_k", "q3_k", "q4_k"])
def test_no_round_of_the_descent_raises_the_loss(name: str) -> None:
    known = {"integers": INTEGERS, "zeros": ZEROS, "rows": Rounding.integers(4, -1)}
    rounding = known.get(name) or ROUNDINGS[name]
    target, grid, system, metric = problem(rounding, columns=256 if rounding.scales == "nested" else 64)
    keep = torch.rand(target.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    if rounding.scales == "nested":  # whose zeros are no codes
        keep = torch.ones_like(keep)
    codes, _ = gptq_codes(target, grid, system, keep)
    before, delta = codes.clone(), differences(codes, grid, target)
    losses = [loss(delta, system.moment, metric)]
    for _ in range(4):
        grid = coupled_descent(codes, delta, grid, system.moment, metric, keep)
        stored = rounding.numbers.of_bytes(rounding.numbers.as_bytes(codes), DOUBLE)
        assert torch.equal(stored, codes)
        torch.testing.assert_close(delta, differences(codes, grid, target))
        losses.append(loss(delta, system.moment, metric))
    assert all(after <= former * (1 + 1e-12) for former, after in pairwise(losses))
    assert losses[-1] < 0.95 * losses[0]
    assert torch.equal(codes[~keep], before[~keep])
    assert not torch.equal(codes, before)


def test_where_the_descent_ends_no_other_code_is_better() -> None:
    target, grid, system, metric = problem(INTEGERS, 12, 16)
    codes, _ = gptq_codes(target, grid, system)
    delta = differences(codes, grid, target)
    for _ in range(50):
        scales = grid.scales.clone()
        before = codes.clone()
        grid = coupled_descent(codes, delta, grid, system.moment, metric)
        if torch.equal(before, codes) and torch.equal(scales, grid.scales):
            break
    least = loss(delta, system.moment, metric)
    for column, row in product(range(16), range(12)):
        for code in range(-4, 4):
            other = codes.clone()
            other[column, row] = code
            assert loss(differences(other, grid, target), system.moment, metric) >= least * (1 - 1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_what_was_there_stays_where_it_is_better(seed: int) -> None:
    target, grid, system, metric = problem(INTEGERS, seed=seed)
    codes, _ = gptq_codes(target, grid, system)
    found, better = coupled(codes, target, grid, system, metric, None, 2)
    first = loss(differences(codes, grid, target), system.moment, metric)
    last = loss(differences(found, better, target), system.moment, metric)
    assert last < 0.75 * first
    again, same = coupled(found, target, better, system, metric, None, 0)  # a sweep alone is worse than all that
    assert loss(differences(again, same, target), system.moment, metric) <= last


def test_few_tokens_move_a_metric_to_its_diagonal() -> None:
    metric = correlated(20, 5, torch.Generator().manual_seed(0))
    damped = damped_metric(metric, 0.0, 5)
    assert float(damped.diagonal().mean()) == pytest.approx(1)
    off = ~torch.eye(20, dtype=torch.bool)
    torch.testing.assert_close(damped[off], 0.2 * metric[off] / metric.diagonal().mean())


def test_a_block_that_puts_out_nothing_is_no_error(
    pico: Callable[..., Path], calibration_text: Path, tmp_path: Path
) -> None:
    """As of models that were made deeper; of no error there, the model's end feels anything."""
    source, model = pico("llama"), tmp_path / "model"
    shutil.copytree(source, model)
    tensors = load_file(source / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{name}.weight"].zero_()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    recipe = f"data: {{source: '{calibration_text}', samples: 4, sequence_length: 64}}\n"
    recipe += "passes: [{kind: gptq, bits: 3, group_size: 32, objective: model}]\nlimits: {kl: null}\n"
    apply(Job(parse_recipe(recipe), recipe, (), model, tmp_path / "out", str(model)), lambda event: None)
    assert StoredModel(tmp_path / "out").schemes["model.layers.1.mlp.up_proj"]["bits"] == 3
