"""Operators made of others: subproblems against brute force, storage round trips, the modules that run them."""

from __future__ import annotations

import pytest
import torch
from test_armor import COLUMNS, DOUBLE, GROUP, ROWS, armor_pass, factors, stage
from test_sparse import problem
from torch import Tensor

from compressor.calibrate.statistics import Statistics
from compressor.compress.passes.linear.eora import Eora
from compressor.compress.passes.linear.gptq import Gptq
from compressor.compress.passes.linear.rtn import Rtn
from compressor.compress.passes.linear.sparse24 import SparsePass, sparse_operator
from compressor.compress.solvers.grid import Steps
from compressor.compress.solvers.lowrank import best_low_rank, refit_up
from compressor.compress.solvers.stored_factors import stored_blocks
from compressor.runtime.schemes import (
    Armor,
    Dense,
    LowRank,
    Operator,
    Problem,
    WithResidual,
    from_tensors,
    identical,
    stored_linear,
)


def random_armor(seed: int = 0) -> Armor:
    state = factors(seed)
    core = sparse_operator(state.core.T.contiguous(), state.core.T != 0)
    return Armor(stored_blocks(state.a, DOUBLE, 16), core, stored_blocks(state.b, DOUBLE, 16))


def random_residual(base: Operator) -> WithResidual:
    generator = torch.Generator().manual_seed(5)
    up, down = (torch.randn(shape, dtype=DOUBLE, generator=generator) for shape in ((ROWS, 3), (3, COLUMNS)))
    return WithResidual(base, LowRank(Dense(up), Dense(down)))


@pytest.mark.parametrize("operator", [random_armor(), random_residual(Dense(problem(ROWS, COLUMNS)[0]))])
def test_the_loss_of_a_subproblem_is_the_output_error(operator: Armor | WithResidual) -> None:
    """Whatever the inner operator is changed to, the subproblem's loss is the brute-force error of the whole."""
    weight, moment = problem(ROWS, COLUMNS)
    inner = operator.subproblem(Problem(weight, moment))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        changed = torch.randn(operator.inner.shape, dtype=DOUBLE, generator=generator)
        delta = weight - operator.with_inner(Dense(changed)).dense(DOUBLE)
        assert float(inner.loss(changed)) == pytest.approx(float((delta @ moment * delta).sum()), rel=1e-8)


def test_subproblems_nest() -> None:
    """A core beside a residual: two subproblems, one in the other."""
    weight, moment = problem(ROWS, COLUMNS)
    outer = random_residual(random_armor())
    armor = outer.base
    assert isinstance(armor, Armor)
    inner = armor.subproblem(outer.subproblem(Problem(weight, moment)))
    core = torch.randn(ROWS, COLUMNS, dtype=DOUBLE)
    delta = weight - outer.with_inner(armor.with_inner(Dense(core))).dense(DOUBLE)
    assert float(inner.loss(core)) == pytest.approx(float((delta @ moment * delta).sum()), rel=1e-8)


def every_operator() -> dict[str, Operator]:
    weight, moment = problem(64, 48, tokens=300)
    weight = weight.bfloat16()
    made: dict[str, Operator] = {}
    steps = {
        "sparse": [SparsePass(kind="sparse24")],
        "sparse int4": [SparsePass(kind="sparse24"), Gptq(kind="gptq", group_size=16)],
        "sparse asymmetric": [SparsePass(kind="sparse24"), Gptq(kind="gptq", group_size=32, symmetric=False)],
        "armor": [armor_pass(iterations=3)],
        "armor int8": [armor_pass(iterations=3, wrapper_bits=8), Gptq(kind="gptq", group_size=16)],
        "sparse + rank": [SparsePass(kind="sparse24"), Eora(kind="eora", rank=4)],
        "armor + rank int8": [armor_pass(iterations=3), Eora(kind="eora", rank=4, factor_bits=8)],
        "rank, then int4": [SparsePass(kind="sparse24"), Eora(kind="eora", rank=4), Gptq(kind="gptq", group_size=16)],
        "int4 + rank": [Gptq(kind="gptq", group_size=16), Eora(kind="eora", rank=4)],
    }
    for name, chain in steps.items():
        work = stage({"x": weight}, moment)
        planned: Operator = Dense(weight.to("meta"))
        for step in chain:
            planned = step.plan("x", planned, GROUP)  # type: ignore[attr-defined]
            list(step.apply(work))  # type: ignore[attr-defined]
        made[name] = work.linears["x"]
        stored = made[name].to_tensors()
        assert {k: (t.shape, t.dtype) for k, t in planned.to_tensors().items()} == {
            k: (t.shape, t.dtype) for k, t in stored.items()
        }, name
        assert planned.nbytes == made[name].nbytes == sum(t.numel() * t.element_size() for t in stored.values()), name
        assert planned.scheme() == made[name].scheme(), name
    return made


def test_operators_come_back_and_modules_run_them() -> None:
    bias = torch.randn(64)
    for name, operator in every_operator().items():
        again = from_tensors(operator.to_tensors(), operator.scheme())
        exact = operator.dense(DOUBLE)
        assert torch.equal(again.dense(DOUBLE), exact), name
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)):
            x = torch.randn(2, 5, 48).to(dtype)
            expected = x.double() @ exact.T
            reference = operator.forward(x).double()
            assert (reference - expected).norm() < tolerance * expected.norm(), name
            linear = stored_linear(operator.to_tensors(), operator.scheme(), bias, dtype)
            found = linear(x).double() - bias.to(dtype).double()
            assert (found - expected).norm() < tolerance * expected.norm(), (name, dtype)


def test_a_sparse_weight_is_decoded_a_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = every_operator()["sparse int4"]
    linear = stored_linear(operator.to_tensors(), operator.scheme(), None, torch.float32)
    monkeypatch.setattr("compressor.kernels.cpu.TILE_ROWS", 24)
    asked = []
    decode = linear.decode  # type: ignore[operator]
    monkeypatch.setattr(linear, "decode", lambda rows, dtype, room: asked.append(rows) or decode(rows, dtype))
    x = torch.randn(3, 48)
    torch.testing.assert_close(linear(x), operator.forward(x))
    assert [(rows.start, rows.stop) for rows in asked] == [(0, 24), (24, 48), (48, 64)]


@pytest.mark.parametrize(("rows", "columns"), [(20, 12), (12, 20), (16, 16)])
def test_the_low_rank_residual_is_the_best_there_is(rows: int, columns: int) -> None:
    """By the definition: the singular vectors of `M H^½`."""
    matrix, moment = problem(rows, columns)
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.sqrt() @ vectors.T
    left, singular, right = torch.linalg.svd(matrix @ root, full_matrices=False)
    expected = left[:, :5] * singular[:5] @ right[:5] @ torch.linalg.inv(root)
    up, down = best_low_rank(matrix, moment, 5)
    torch.testing.assert_close(up @ down, expected, rtol=1e-6, atol=1e-8)
    metric = problem(rows, rows)[1]
    coupled = torch.linalg.cholesky(metric).T
    left, sizes, right = torch.linalg.svd(coupled @ matrix @ root, full_matrices=False)
    expected = torch.linalg.inv(coupled) @ (left[:, :5] * sizes[:5] @ right[:5]) @ torch.linalg.inv(root)
    above, below = best_low_rank(matrix, moment, 5, metric)
    torch.testing.assert_close(above @ below, expected, rtol=1e-6, atol=1e-8)
    rounded = down.bfloat16().double()
    refitted = refit_up(matrix, moment, rounded, up)

    def loss(found: Tensor) -> float:
        return float(((matrix - found) @ moment * (matrix - found)).sum())

    assert loss(up @ down) == pytest.approx(float(singular[5:].square().sum()), rel=1e-6)
    assert loss(refitted @ rounded) <= loss(up @ rounded)


def test_rounding_weighs_errors_by_what_each_part_meets() -> None:
    """A core meets `B x`, an upper factor what the rounded lower one puts out; neither meets the linear's inputs."""
    step = Rtn(kind="rtn", bits=3, group_size=-1, search=True)
    _, moment = problem(ROWS, COLUMNS)
    met = Statistics(100, {"moment": moment.float()})

    def alone(part: Operator, seen: Tensor) -> Operator:
        return step._rounded("x", part, Statistics(100, {"moment": seen}), Steps(torch.float32))[0]

    armor = random_armor()
    found, _ = step._rounded("x", armor, met, Steps(torch.float32))
    assert isinstance(found, Armor)
    assert identical(found.core, alone(armor.core, armor.seen(met.moment)))
    assert not identical(found.core, alone(armor.core, met.moment))
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=generator) for shape in ((ROWS, 8), (8, COLUMNS)))
    factors, _ = step._rounded("x", LowRank(Dense(up), Dense(down)), met, Steps(torch.float32))
    assert isinstance(factors, LowRank)
    below = factors.down.dense()
    assert identical(factors.down, alone(Dense(down), met.moment))
    assert identical(factors.up, alone(Dense(up), below @ met.moment @ below.T))
    assert not identical(factors.up, alone(Dense(up), torch.eye(8)))
