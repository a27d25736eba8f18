"""ARMOR and low-rank residuals: every closed-form step against brute force in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from pico import known
from test_sparse import is_24, pattern, problem
from torch import Tensor

from compressor.calibrate.curvature import Curvature
from compressor.calibrate.stage import StageWork
from compressor.compress.events import LayerDone
from compressor.compress.passes.linear.armor import ArmorPass, fitting_block, largest_block
from compressor.compress.passes.linear.calibrated import SWEEPS
from compressor.compress.passes.linear.eora import Eora
from compressor.compress.passes.linear.gptq import Gptq
from compressor.compress.passes.linear.sparse24 import SparsePass
from compressor.compress.solvers.armor import (
    Factors,
    alternate,
    choose_pairs,
    roots,
    round_of_chunks,
    step_a,
    total_loss,
)
from compressor.compress.solvers.armor_adam import adam, gradients, sampled_groups
from compressor.compress.solvers.armor_codes import store_wrappers
from compressor.compress.solvers.coupled import damped_metric
from compressor.compress.solvers.sparse24 import nowag_scales, swept, top_pairs
from compressor.compress.solvers.stored_factors import stored_blocks
from compressor.compress.solvers.system import damped_system
from compressor.runtime.errors import RecipeError
from compressor.runtime.schemes import (
    Armor,
    Dense,
    IntQuantized,
    Sparse24,
    from_tensors,
)  # fmt: skip

DOUBLE = torch.float64
ROWS, COLUMNS, BLOCK = 16, 24, 8
GROUP = {"x": Dense(torch.empty(1, 1))}  # whatever reads the same input: of no importance without share


def factors(seed: int = 0) -> Factors:
    """Random factors, float64; the core `[columns, rows]`."""
    generator = torch.Generator().manual_seed(seed)
    eye = torch.eye(BLOCK, dtype=DOUBLE)
    a, b = (
        eye + 0.3 * torch.randn(n // BLOCK, BLOCK, BLOCK, dtype=DOUBLE, generator=generator) for n in (ROWS, COLUMNS)
    )
    core = torch.randn(ROWS, COLUMNS, dtype=DOUBLE, generator=generator) * pattern(ROWS, COLUMNS, seed)
    return Factors(a, core.T.contiguous(), b)


def dense_product(state: Factors) -> Tensor:
    """`A S B` by the book, `[rows, columns]`."""
    return torch.block_diag(*state.a) @ state.core.T @ torch.block_diag(*state.b)


def test_the_product_is_that_of_the_dense_factors() -> None:
    state = factors()
    torch.testing.assert_close(state.product().T, dense_product(state))


def loss_of(state: Factors, weight: Tensor, moment: Tensor) -> Tensor:
    delta = weight - dense_product(state)
    return (delta @ moment * delta).sum()


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_step_of_a_reaches_the_minimum_over_a(diagonal: bool) -> None:
    weight, moment = problem(ROWS, COLUMNS)
    state = factors()
    metric = moment.diagonal().clone() if diagonal else moment
    whole = torch.diag(metric) if diagonal else moment
    step_a(state, weight.T - state.product(), metric)
    a = state.a.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(Factors(a, state.core, state.b), weight, whole), a)
    assert gradient.abs().max() < 1e-4 * float(loss_of(state, weight, whole))


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_last_block_of_b_reaches_its_minimum(diagonal: bool) -> None:
    """Blocks of B are solved one after another: at the end the last one is optimal for the others."""
    weight, moment = problem(ROWS, COLUMNS)
    state = factors()
    metric = moment.diagonal().clone() if diagonal else moment
    whole = torch.diag(metric) if diagonal else moment
    error = weight.T - state.product()
    before = loss_of(state, weight, whole)
    round_of_chunks(state, error, metric, lambda *_: None)
    torch.testing.assert_close(error, weight.T - state.product())
    b = state.b.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(Factors(state.a, state.core, b), weight, whole), b)
    assert gradient[-1].abs().max() < 1e-4 * float(before)
    assert loss_of(state, weight, whole) < before


@pytest.mark.parametrize("diagonal", [False, True])
def test_every_iteration_lowers_the_loss(diagonal: bool) -> None:
    weight, moment = problem(ROWS, COLUMNS)
    metric = moment.diagonal().clone() if diagonal else moment
    state = Factors.start(weight.T.contiguous(), moment.diagonal(), BLOCK, BLOCK)
    error = weight.T - state.product()
    losses = [total_loss(error, metric)]
    for _ in range(15):
        step_a(state, error, metric)
        losses.append(total_loss(error, metric))
        round_of_chunks(state, error, metric, choose_pairs, chunk=BLOCK)
        losses.append(total_loss(error, metric))
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(losses))
    torch.testing.assert_close(error, weight.T - state.product())
    assert is_24(state.core.T)
    assert losses[-1] < 0.5 * losses[0]


def test_adam_descends_along_the_gradient_of_the_loss() -> None:
    weight, moment = problem(ROWS, COLUMNS)
    state = factors()
    mask = state.core != 0
    for metric in (moment.diagonal().clone(), moment):
        error = weight.T - state.product()
        pull = metric[:, None] * error if metric.dim() == 1 else metric @ error
        found = gradients(state, mask, pull)
        parts = [part.clone().requires_grad_() for part in (state.a, state.core, state.b)]
        whole = torch.diag(metric) if metric.dim() == 1 else metric
        expected = torch.autograd.grad(loss_of(Factors(*parts), weight, whole), parts)
        for mine, theirs, kept in zip(found, expected, (1, mask, 1), strict=True):
            torch.testing.assert_close(2 * mine, theirs * kept)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_sampled_group_takes_its_best_pair(diagonal: bool) -> None:
    """One block only, so that a single group changes: its loss is the least over all six pairs, by least squares."""
    weight, moment = problem(BLOCK, BLOCK)
    whole = factors()
    state = Factors(whole.a[:1], whole.core[:BLOCK, :BLOCK].clone(), whole.b[:1])
    metric = moment.diagonal().clone() if diagonal else moment
    full = torch.diag(metric) if diagonal else moment
    before = state.core.clone()
    keep = state.core != 0
    sampled_groups(state, keep, weight.T - state.product(), metric, torch.Generator().manual_seed(1))
    assert torch.equal(keep, state.core != 0)
    changed = (state.core != before).nonzero()
    row, group = int(changed[0, 1]), int(changed[0, 0]) // 4 * 4
    assert bool((changed[:, 1] == row).all())
    assert bool((changed[:, 0] // 4 * 4 == group).all())
    lowest = torch.inf
    for first in range(4):
        for second in range(first + 1, 4):
            trial = Factors(state.a, before.clone(), state.b)
            trial.core[group : group + 4, row] = 0
            basis = []
            for column in (group + first, group + second):
                unit = torch.zeros_like(before)
                unit[column, row] = 1
                basis.append(dense_product(Factors(state.a, unit, state.b)))
            rest = weight - dense_product(trial)
            gram = torch.stack([torch.stack([(x @ full * y).sum() for y in basis]) for x in basis])
            best = torch.linalg.solve(gram, torch.stack([(rest @ full * x).sum() for x in basis]))
            delta = rest - best[0] * basis[0] - best[1] * basis[1]
            lowest = min(lowest, float((delta @ full * delta).sum()))
    assert float(loss_of(state, weight, full)) == pytest.approx(lowest, rel=1e-6)


def test_both_solvers_end_below_nowag_and_als_is_as_good() -> None:
    weight, moment = problem(64, 64, tokens=400)
    target = weight.float().T.contiguous()
    inputs, outputs = nowag_scales(target)
    target, diagonal = target / inputs / outputs, moment.diagonal().float()
    start = Factors.start(target, diagonal, BLOCK, BLOCK)
    slow, published, initial = adam(start.copy(), target, diagonal, 1500)
    fast, closed, also = alternate(start.copy(), target, diagonal, 60)
    assert initial == pytest.approx(also)
    assert total_loss(target - slow.product(), diagonal) == pytest.approx(published, rel=1e-4)
    assert total_loss(target - fast.product(), diagonal) == pytest.approx(closed, rel=1e-4)
    assert published < 0.7 * initial
    assert closed < 1.02 * published
    assert is_24(slow.core.T)
    assert is_24(fast.core.T)


def test_a_run_that_gets_worse_keeps_its_best() -> None:
    weight, moment = problem(16, 16)
    target, diagonal = weight.float().T.contiguous(), moment.diagonal().float()
    start = Factors.start(target, diagonal, BLOCK, BLOCK)
    found, loss, initial = adam(start, target, diagonal, 60, rate=1.0)  # a rate that throws everything about
    assert loss <= initial
    assert total_loss(target - found.product(), diagonal) == pytest.approx(loss, rel=1e-4)


def stage(weights: dict[str, Tensor], moment: Tensor | None) -> StageWork:
    statistics = {}
    if moment is not None:
        statistics = dict.fromkeys(weights, known(moment))
    return StageWork({n: Dense(w) for n, w in weights.items()}, dict(weights), [list(weights)], statistics)


def armor_pass(**options: object) -> ArmorPass:
    return ArmorPass(**{"kind": "armor", "block_size": 8, "solver": "als", "objective": "full", **options})  # type: ignore[arg-type]


def damped(moment: Tensor) -> Tensor:
    return moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment))


def output_loss(found: Tensor, weight: Tensor, moment: Tensor) -> float:
    delta = found.double() - weight.double()
    return float((delta @ moment * delta).sum() / (weight.double() @ moment * weight.double()).sum())


def test_better_objectives_bring_the_outputs_closer() -> None:
    weight, moment = problem(64, 64, tokens=600)
    weight = weight.bfloat16()
    losses = {}
    for name, step in {
        "published": armor_pass(solver="adam", objective="proxy", iterations=3000),
        "proxy": armor_pass(objective="proxy"),
        "full": armor_pass(),
        "polished": armor_pass(iterations=20, polish=100),
        "int8": armor_pass(wrapper_bits=8),
        "sweep": SparsePass(kind="sparse24", correction=0),
    }.items():
        work = stage({"x": weight}, moment)
        (event,) = step.apply(work)
        assert isinstance(event, LayerDone)
        operator = work.linears["x"]
        losses[name] = output_loss(operator.dense(DOUBLE), weight, moment)
        assert event.error == pytest.approx(losses[name], rel=1e-3)
        assert operator.nbytes == sum(t.numel() * t.element_size() for t in operator.to_tensors().values())
        planned = step.plan("x", Dense(weight.to("meta")), GROUP)
        assert {k: (t.shape, t.dtype) for k, t in planned.to_tensors().items()} == {
            k: (t.shape, t.dtype) for k, t in operator.to_tensors().items()
        }
    assert losses["full"] < 0.8 * min(losses["published"], losses["proxy"])
    assert losses["full"] < 0.8 * losses["sweep"]
    assert losses["int8"] < 1.1 * losses["full"]


def blocks_of(metric: Tensor, size: int) -> Tensor:
    """Its blocks on the diagonal alone."""
    return metric * torch.block_diag(*[torch.ones(size, size)] * (len(metric) // size))


@pytest.mark.parametrize("bits", [8, 16])
def test_errors_go_where_the_answers_bear_them(bits: int) -> None:
    weight, moment = problem(64, 64, tokens=600)
    weight = weight.bfloat16()
    found = torch.randn(400, 64, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    found = found @ torch.randn(64, 64, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    curvature = Curvature(1.0, (found.T @ found / 400).float(), 10**9)
    metric = blocks_of(damped_metric(curvature.metric, 0.1, 10**9), 8).double()
    lost, tensors = {}, {}
    for name, objective, there in [("full", "full", True), ("model", "model", True), ("none", "model", False)]:
        work = stage({"x": weight}, moment)
        work.curvatures = {"x": curvature} if there else {}
        step = armor_pass(objective=objective, wrapper_bits=bits)
        (event,) = step.apply(work)
        delta = work.linears["x"].dense(DOUBLE) - weight.double()
        assert event.error == pytest.approx(output_loss(delta + weight, weight, moment), rel=1e-3)
        lost[name] = float((metric @ delta @ damped(moment) * delta).sum())
        tensors[name] = work.linears["x"].to_tensors()
    system = damped_system(moment.float(), 0.01, act_order=True, together=4)
    delta = swept(weight.float().T.contiguous(), system, SWEEPS)[0].T.double() - weight.double()
    assert lost["model"] < 0.9 * lost["full"] < float((metric @ delta @ damped(moment) * delta).sum())
    assert all(torch.equal(tensor, tensors["none"][name]) for name, tensor in tensors["full"].items())


def test_roots_of_a_metric_are_those_of_its_blocks() -> None:
    x = torch.randn(100, 24, dtype=DOUBLE)
    metric = x.T @ x
    found = roots(metric, 8)
    torch.testing.assert_close(torch.block_diag(*(found.mT @ found)), blocks_of(metric, 8))


@pytest.mark.parametrize(
    "options", [{"solver": "adam", "objective": "proxy", "iterations": 200}, {"objective": "proxy"}]
)
def test_what_is_stored_is_no_worse_than_nowag_however_uneven_the_rows(options: dict[str, object]) -> None:
    """In the published loss, that of the normalised weight, over rows that differ a hundredfold."""
    weight, moment = problem(32, 32)
    weight = (weight * torch.logspace(-1, 1, 32, dtype=DOUBLE)[:, None]).float()
    work = stage({"x": weight}, moment)
    list(armor_pass(**options).apply(work))
    inputs, outputs = nowag_scales(weight.T)
    energy = moment.diagonal().float()
    start = Factors.start(weight.T / inputs / outputs, energy, 8, 8)
    delta = (work.linears["x"].dense() - weight).T / inputs / outputs
    solve = adam if options.get("solver") == "adam" else alternate
    _, lowest, initial = solve(start, weight.T / inputs / outputs, energy, int(str(options.get("iterations", 60))))
    assert total_loss(delta, energy) < 1.01 * lowest < 0.9 * initial  # float32 is stored: nothing is lost at the end


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("objective", ["proxy", "full"])
def test_what_is_stored_is_no_worse_than_what_it_started_from(bits: int, objective: str) -> None:
    """NoWag-P in the published loss, SparseGPT with sweeps in the outputs' error, whatever rounding does to wrappers of
    weights whose rows and columns differ a thousandfold."""
    better = 0
    for seed in range(8):
        weight, moment = problem(32, 32, seed=seed)
        scales = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed)).mul(3).exp()
        weight = (weight.float() * scales[0][:, None] * scales[1]).bfloat16()
        work = stage({"x": weight}, moment)
        list(armor_pass(objective=objective, wrapper_bits=bits, iterations=60).apply(work))
        exact = weight.float()
        inputs, outputs = nowag_scales(exact.T) if objective == "proxy" else (torch.ones(32, 1), torch.ones(32))
        if objective == "proxy":
            loss = moment.diagonal().float()
            keep = top_pairs((exact.T / inputs / outputs).square() * loss[:, None])
            start = (exact.T * keep).T
        else:
            loss = damped(moment).float()
            system = damped_system(moment.float(), 0.01, act_order=True, together=4)
            start = swept(exact.T.contiguous(), system, SWEEPS)[0].T.bfloat16().float()
        lost, least = (
            total_loss(((found - exact).T / inputs / outputs).contiguous(), loss)
            for found in (work.linears["x"].dense(), start)
        )
        assert lost <= 1.001 * least, seed
        better += lost < 0.9 * least
    assert better > {("proxy", 8): -1, ("full", 8): 0}.get((objective, bits), 4)  # columns so uneven eat all codes of B


@pytest.mark.parametrize(
    ("rows", "columns", "block"),
    [(4096, 4096, 128), (1024, 4096, 128), (14336, 4096, 128), (576, 576, 63), (192, 576, 31), (64, 64, 7)],
)
def test_blocks_are_as_large_as_the_saving_of_the_core_allows(rows: int, columns: int, block: int) -> None:
    asked = largest_block((rows,), columns, 2)
    assert asked <= block
    high, wide = fitting_block([rows], block), fitting_block([columns], block)
    assert (high, wide) == (fitting_block([rows], asked), fitting_block([columns], asked))
    saved = rows * columns * 7 / 8
    assert 2 * (rows * high + columns * wide) <= saved / 2 or block == 4
    planned = ArmorPass(kind="armor").plan("x", Dense(torch.empty(rows, columns, dtype=torch.bfloat16)), GROUP)
    assert planned.block_sizes == [high, wide]


def test_the_core_makes_up_for_rounded_wrappers() -> None:
    weight, moment = problem(ROWS, COLUMNS, tokens=400)
    target, moment = weight.T.float().contiguous(), moment.float()
    state, _, _ = alternate(Factors.start(target, moment.diagonal(), BLOCK, BLOCK), target, moment, 30)
    losses = []
    for step in (choose_pairs, lambda *_: None):
        trial = state.copy()
        store_wrappers(trial, target, moment, step, lambda blocks: stored_blocks(blocks, torch.float32, 4), 128)
        losses.append(total_loss(target - trial.product(), moment))
    assert losses[0] < 0.9 * losses[1]


STEPS = {
    "sparsegpt_sweep": SparsePass(kind="sparse24"),
    "wanda": SparsePass(kind="sparse24", method="wanda"),
    "full": ArmorPass(kind="armor", block_size=8, solver="als", objective="full"),
    "proxy": ArmorPass(kind="armor", block_size=8, solver="als"),
    "adam": ArmorPass(kind="armor", block_size=8, iterations=60),
}


@pytest.mark.parametrize("name", list(STEPS))
def test_inputs_that_are_always_zero_take_nothing_from_the_others(name: str) -> None:
    """With three eighths of the inputs dead, the result is that of a weight without these columns."""
    weight, moment = problem(32, 32)
    dead = torch.arange(32) % 8 < 3
    moment[dead] = 0
    moment[:, dead] = 0
    losses = []
    for given in (weight.float(), weight.float() * ~dead):
        work = stage({"x": given}, moment)
        event = list(STEPS[name].apply(work))[-1]
        found = work.linears["x"].dense(DOUBLE)
        assert torch.isfinite(found).all()
        losses.append(output_loss(found, weight, moment))
        assert isinstance(event, LayerDone)
        assert event.error < 0.2
        list(Gptq(kind="gptq", bits=8, group_size=-1).apply(work))
        assert output_loss(work.linears["x"].dense(DOUBLE), weight, moment) < 1.2 * losses[-1] + 1e-3
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("name", list(STEPS))
def test_weights_and_inputs_without_energy(name: str) -> None:
    weight, moment = problem(16, 16)
    for given, seen in ((0 * weight, moment), (weight, 0 * moment)):
        work = stage({"x": given.float()}, seen)
        events = list(STEPS[name].apply(work))
        assert torch.isfinite(work.linears["x"].dense()).all()
        if not seen.any():
            assert "its inputs were all zero" in str(events[0])
            assert output_loss(work.linears["x"].dense(), weight, torch.eye(16, dtype=DOUBLE)) < 0.5


def test_an_exact_weight_ends_the_search_at_once() -> None:
    state = factors()
    state.a, state.b = torch.eye(8).repeat(2, 1, 1), torch.eye(8).repeat(3, 1, 1)
    state.core = state.core.float()
    calls = []
    target = state.product()
    moment = problem(ROWS, COLUMNS)[1].float()

    def counted(*args: Any) -> None:
        calls.append(None)
        choose_pairs(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.compress.solvers.armor.choose_pairs", counted)
        _, loss, _ = alternate(state, target, moment, 300)
    assert loss < 1e-6
    assert len(calls) < 30


def test_a_rise_on_the_way_ends_no_search() -> None:
    """With momentum the loss rises at times, which is not the end: more iterations still bring more."""
    for seed in range(4):
        weight, moment = problem(64, 64, seed=seed)
        target, energy = weight.T.float().contiguous(), moment.diagonal().float()
        start = Factors.start(target, energy, 16, 16)
        before = start.copy()
        some, more = (alternate(start, target, energy, iterations)[1] for iterations in (60, 200))
        assert more < 0.6 * some
        assert torch.equal(start.core, before.core)


@pytest.mark.parametrize("diagonal", [False, True])
def test_momentum_gets_farther_in_half_of_the_iterations(diagonal: bool) -> None:
    weight, moment = problem(64, 64)
    target = weight.T.float().contiguous()
    moment = (moment.diagonal().clone() if diagonal else moment).float()
    start = Factors.start(target, moment if diagonal else moment.diagonal(), 16, 16)
    plain = start.copy()
    error = target - plain.product()
    for _ in range(60):
        step_a(plain, error, moment)
        round_of_chunks(plain, error, moment, choose_pairs)
    _, lowest, initial = alternate(start, target, moment, 30)
    assert lowest < total_loss(error, moment) < initial


def test_a_shared_b_needs_blocks_that_fit_all_its_linears() -> None:
    group = {
        name: Dense(torch.empty(rows, 64, dtype=torch.bfloat16, device="meta")) for name, rows in (("q", 96), ("k", 40))
    }
    step = armor_pass(share=True)
    for name, dense in group.items():
        assert step.plan(name, dense, group).scheme()["block_sizes"] == [8, 8]
    moment = problem(8, 64)[1]
    work = stage({name: torch.randn(dense.shape) for name, dense in group.items()}, moment)
    list(step.apply(work))
    for name, dense in group.items():
        assert work.linears[name].scheme() == step.plan(name, dense, group).scheme() | {}
    group["k"] = Dense(group["k"].weight.float())
    with pytest.raises(RecipeError, match="different dtypes"):
        step.plan("q", group["q"], group)


def test_without_tokens_the_factors_are_those_of_the_weight_itself() -> None:
    weight, _ = problem(32, 32)
    work = stage({"x": weight.float()}, None)
    events = list(armor_pass().apply(work))
    assert "no calibration token" in str(events[0])
    assert output_loss(work.linears["x"].dense(), weight, torch.eye(32, dtype=DOUBLE)) < 0.1


def test_a_shared_b_is_stored_once() -> None:
    weight, moment = problem(48, 32)
    weights = {"a.q": weight[:32].float(), "a.k": weight[32:].float()}
    step = armor_pass(share=True)
    work = stage(weights, moment)
    list(step.apply(work))
    first, second = (work.linears[name] for name in weights)
    tensors = [operator.to_tensors() for operator in (first, second)]
    assert torch.equal(tensors[0]["/a.q_shared_b.weight"], tensors[1]["/a.q_shared_b.weight"])
    stored = {f"{n}{k}": t for n, part in zip("qk", tensors, strict=True) for k, t in part.items() if k[0] != "/"}
    stored["b"] = tensors[0]["/a.q_shared_b.weight"]
    assert first.nbytes + second.nbytes == sum(t.numel() * t.element_size() for t in stored.values())
    for name, operator in work.linears.items():
        again = from_tensors(operator.to_tensors(), operator.scheme())
        assert torch.equal(again.dense(DOUBLE), operator.dense(DOUBLE))
        assert output_loss(operator.dense(), weights[name], moment) < 0.2
    before = first.b.dense()  # type: ignore[union-attr]
    list(Gptq(kind="gptq", group_size=32).apply(work))
    assert torch.equal(work.linears["a.q"].b.dense(), before)  # type: ignore[union-attr]


@pytest.mark.parametrize("wrapper_bits", [16, 8])
def test_gptq_quantizes_the_core_and_moves_its_wrappers(wrapper_bits: int) -> None:
    weight, moment = problem(64, 64, tokens=600)
    work = stage({"x": weight.float()}, moment)
    list(armor_pass(wrapper_bits=wrapper_bits).apply(work))
    before = work.linears["x"]
    assert isinstance(before, Armor)
    assert isinstance(before.core, Sparse24)
    step = Gptq(kind="gptq", bits=4, group_size=32)
    (event,) = step.apply(work)
    after = work.linears["x"]
    assert isinstance(after, Armor)
    assert isinstance(after.core, Sparse24)
    assert isinstance(after.core.values, IntQuantized)
    assert torch.equal(after.core.indices, before.core.indices)
    assert isinstance(after.a, IntQuantized if wrapper_bits == 8 else Dense)
    rounded = step.plan("x", before, GROUP)
    assert rounded.nbytes == after.nbytes
    from compressor.compress.passes.linear.rtn import Rtn

    naive = stage({"x": weight.float()}, moment)
    naive.linears["x"] = before
    list(Rtn(kind="rtn", bits=4, group_size=32).apply(naive))
    exact, solved, nearest = (
        output_loss(operator.dense(DOUBLE), weight, moment) for operator in (before, after, naive.linears["x"])
    )
    assert solved - exact < 0.4 * (nearest - exact)
    assert isinstance(event, LayerDone)
    assert event.error == pytest.approx(solved, rel=1e-3)


def test_the_budget_of_a_residual_is_kept() -> None:
    weight, moment = problem(64, 48)
    for bits in (16, 8):
        step = Eora(kind="eora", budget=0.2, factor_bits=bits)  # type: ignore[arg-type]
        work = stage({"x": weight.bfloat16()}, moment)
        list(SparsePass(kind="sparse24").apply(work))
        before = work.linears["x"].nbytes
        list(step.apply(work))
        spent = work.linears["x"].nbytes - before
        assert 0.1 * 64 * 48 * 2 < spent <= 0.2 * 64 * 48 * 2
    with pytest.raises(ValueError, match="either rank or budget"):
        Eora(kind="eora")


def test_blocks_divide_the_layer() -> None:
    sizes = ((4096,), 128), ((172,), 16), ((64,), 16), ((86,), 16), ((7,), 4), ((1536, 576), 128), ((512, 192), 128)
    assert [fitting_block(*pair) for pair in sizes] == [128, 4, 16, 2, 1, 96, 64]


def test_blocks_that_do_not_pay_are_refused_and_the_largest_that_does_is_named() -> None:
    weight = Dense(torch.empty(256, 256, dtype=torch.bfloat16, device="meta"))
    with pytest.raises(RecipeError, match=r"blocks of 128 and 128.*the largest block_size that pays there is 32"):
        armor_pass(block_size=128).plan("x", weight, GROUP)
    assert armor_pass(block_size=32).plan("x", weight, GROUP).nbytes < weight.nbytes
    assert armor_pass(block_size=63).plan("x", weight, GROUP).scheme()["block_sizes"] == [32, 32]
    narrow = Dense(torch.empty(4, 4, dtype=torch.bfloat16, device="meta"))
    with pytest.raises(RecipeError, match="no block size pays there: ignore it"):
        armor_pass().plan("x", narrow, GROUP)
    odd = Dense(torch.empty(64, 66, dtype=torch.bfloat16, device="meta"))
    with pytest.raises(RecipeError, match="66 columns are not groups of four"):
        armor_pass().plan("x", odd, GROUP)
