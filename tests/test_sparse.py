"""2:4: layouts against torch's own, solvers against brute force in float64, and a pattern that nothing breaks."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import known
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from compressor.calibrate.stage import StageWork
from compressor.compress.events import Fallback
from compressor.compress.passes.linear.gptq import Gptq
from compressor.compress.passes.linear.sparse24 import SparsePass, sparse_operator
from compressor.compress.solvers.row_metric import Metric
from compressor.compress.solvers.sparse24 import descend_pairs, sparsegpt, sweep_pairs, top_pairs
from compressor.compress.solvers.system import damped_system
from compressor.kernels import layouts
from compressor.runtime.schemes import Dense, IntQuantized, Sparse24

DOUBLE = torch.float64
PAIRS = list(itertools.combinations(range(4), 2))


def pattern(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A random mask, two of every four."""
    scores = torch.rand(columns, rows, generator=torch.Generator().manual_seed(seed))
    return top_pairs(scores).T.contiguous()


def problem(rows: int = 6, columns: int = 24, tokens: int = 100, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and a correlated second moment, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=DOUBLE) / columns**0.5 + 0.4 * torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator, dtype=DOUBLE) @ mix
    return torch.randn(rows, columns, generator=generator, dtype=DOUBLE), x.T @ x / tokens


def is_24(weight: Tensor) -> bool:
    return bool(((weight != 0).view(len(weight), -1, 4).sum(2) <= 2).all())


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 9), groups=st.integers(1, 30), seed=st.integers(0, 9))
def test_what_is_compressed_comes_back(rows: int, groups: int, seed: int) -> None:
    keep = pattern(rows, 4 * groups, seed)
    weight = torch.randn(rows, 4 * groups)
    values, indices = layouts.compress24(weight, keep)
    assert torch.equal(layouts.expand24(values, indices), weight * keep)
    assert torch.equal(layouts.kept24(indices), keep)
    packed = layouts.pack_indices(indices)
    assert packed.shape[1] == layouts.packed_indices(groups)
    assert torch.equal(layouts.unpack_indices(packed, groups), indices)


def test_the_bits_on_disk_are_those_of_the_format() -> None:
    weight = torch.tensor([[0.0, 5, 0, 7, 1, 2, 0, 0, 0, 0, 3, 4]])
    values, indices = layouts.compress24(weight, weight != 0)
    assert values.tolist() == [[5, 7, 1, 2, 3, 4]]
    assert layouts.pack_indices(indices).tolist() == [[(1 | 3 << 2) | (0 | 1 << 2) << 4, 2 | 3 << 2]]


def test_a_pattern_that_is_not_one_is_not_stored() -> None:
    weight = torch.tensor([[9.0, 1, 8, 0.5]])
    with pytest.raises(ValueError, match="exactly two"):
        layouts.compress24(weight, weight != 0)
    with pytest.raises(ValueError, match="more than two"):
        sparse_operator(weight, weight != 0)


def test_no_negative_zero_is_stored() -> None:
    weight = torch.tensor([[-0.0, 0.0, -1.0, -0.0]])
    values, _ = layouts.compress24(weight, torch.tensor([[True, False, True, False]]))
    assert not torch.signbit(values[values == 0]).any()


@pytest.mark.parametrize(
    ("dtype", "rows", "columns"), [(torch.bfloat16, 64, 128), (torch.float16, 32, 96), (torch.int8, 48, 256)]
)
def test_the_cutlass_layout_is_torchs(dtype: torch.dtype, rows: int, columns: int) -> None:
    keep = pattern(rows, columns)
    weight = torch.randint(1, 100, (rows, columns)).to(dtype) * keep
    values, indices = layouts.compress24(weight, keep)
    metadata = layouts.cutlass_metadata(indices, dtype.itemsize)
    theirs = sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(values, theirs[0])
    assert torch.equal(metadata, theirs[1])
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, metadata), weight)
    assert torch.equal(layouts.from_cutlass_metadata(metadata), indices)


def test_sparsegpt_is_the_unblocked_algorithm() -> None:
    """Optimal brain surgery column by column, the inverse recomputed for what remains; pairs by saliency."""
    weight, moment = problem(columns=72)
    for ordered in (False, True):
        system = damped_system(moment, 0.01, act_order=ordered, together=4)
        work, expected = weight.clone(), torch.zeros_like(weight)
        remaining = system.order.tolist()
        assert not ordered or remaining != sorted(remaining)
        while remaining:
            group = remaining[:4]
            # What each of the four costs if it goes when its turn comes: w² over the pivot of the inverse.
            pivots = [float(torch.linalg.inv(system.moment[remaining[k:]][:, remaining[k:]])[0, 0]) for k in range(4)]
            keep = top_pairs((work[:, group].square() / torch.tensor(pivots, dtype=DOUBLE)).T).T
            for k in range(4):
                inverse = torch.linalg.inv(system.moment[remaining][:, remaining])
                j = remaining[0]
                expected[:, j] = work[:, j] * keep[:, k]
                error = (work[:, j] - expected[:, j]) / inverse[0, 0]
                work[:, remaining] -= error[:, None] * inverse[0][None]
                remaining = remaining[1:]
        found = sparsegpt(weight.T.contiguous(), system).T
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def brute_force_group(target: Tensor, values: Tensor, moment: Tensor, group: slice) -> Tensor:
    """The best pair of a group of one row and its best values, all else fixed: all six tried by least squares."""
    best, lowest = values.clone(), torch.inf
    for pair in PAIRS:
        which = [group.start + k for k in pair]
        trial = values.clone()
        trial[group] = 0
        rest = moment[which] @ (target - trial)
        trial[which] = torch.linalg.solve(moment[which][:, which], rest)
        loss = float((target - trial) @ moment @ (target - trial))
        if loss < lowest:
            best, lowest = trial, loss
    return best


def test_a_sweep_is_exact_coordinate_descent_over_groups() -> None:
    weight, moment = problem(rows=5, columns=68)
    start = weight * pattern(5, 68)
    expected = start.clone()
    for row in range(5):
        for k in range(0, 68, 4):
            expected[row] = brute_force_group(weight[row], expected[row], moment, slice(k, k + 4))
    values = start.T.contiguous()
    delta = values - weight.T
    sweep_pairs(values, delta, moment)
    torch.testing.assert_close(values.T, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(delta, values - weight.T)


def test_steps_never_raise_the_loss_whatever_couples_the_rows() -> None:
    """With a metric, blocks of rows move at once: the loss still falls, group after group."""
    weight, moment = problem(rows=24, columns=40)
    left = torch.randn(3, 8, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(3)) + torch.eye(8, dtype=DOUBLE)
    metric = Metric.of(left)
    whole = torch.block_diag(*metric.blocks)
    target = weight.T.contiguous()
    values = target * pattern(24, 40).T
    losses = []
    for _ in range(6):
        delta = values - target
        losses.append(float((delta.T @ moment @ delta @ whole).trace()))
        descend_pairs(values, moment @ delta @ whole, moment, metric)
        assert is_24(values.T)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_one_group_and_a_metric_agree_with_brute_force() -> None:
    """A block of one row: the metric is a number, and changes nothing but the scale of the gradient."""
    weight, moment = problem(rows=4, columns=4)
    start = weight * pattern(4, 4)
    metric = Metric.of(torch.tensor([0.5, 1, 2, 3], dtype=DOUBLE).view(4, 1, 1))
    values = start.T.contiguous()
    descend_pairs(values, moment @ (values - weight.T) * metric.diagonal, moment, metric)
    for row in range(4):
        torch.testing.assert_close(values[:, row], brute_force_group(weight[row], start[row], moment, slice(0, 4)))


def run(step: SparsePass | Gptq, work: StageWork) -> list[object]:
    return list(step.apply(work))


def stage(weight: Tensor, moment: Tensor | None, tokens: int = 10**9) -> StageWork:
    statistics = {} if moment is None else {"x": known(moment, tokens)}
    return StageWork({"x": Dense(weight)}, {"x": weight}, [["x"]], statistics)


METHODS = ("magnitude", "wanda", "nowag", "sparsegpt", "sparsegpt_sweep")


def test_methods_differ_as_they_should() -> None:
    weight, moment = problem(rows=40, columns=128)
    losses = {}
    for method in METHODS:
        work = stage(weight.float(), moment)
        (event,) = run(SparsePass(kind="sparse24", method=method, correction=0), work)
        operator = work.linears["x"]
        assert isinstance(operator, Sparse24)
        dense = operator.dense(DOUBLE)
        assert is_24(dense)
        losses[method] = float(((dense - weight) @ moment * (dense - weight)).sum() / (weight @ moment * weight).sum())
        assert event.error == pytest.approx(losses[method], rel=1e-3)  # type: ignore[attr-defined]
    kept = weight.float() * top_pairs((weight.square() * moment.diagonal()).T).T
    work = stage(weight.float(), moment)
    run(SparsePass(kind="sparse24", method="wanda"), work)
    assert torch.equal(work.linears["x"].dense(), kept)
    assert losses["sparsegpt_sweep"] < 0.9 * losses["sparsegpt"] < 0.9 * losses["wanda"] < losses["magnitude"]


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_inputs_that_are_never_there_are_not_kept(method: str) -> None:
    weight, moment = problem(rows=8, columns=64)
    unused = torch.arange(64) % 4 == 2
    moment[unused], moment[:, unused] = 0, 0
    work = stage(weight.float(), moment)
    run(SparsePass(kind="sparse24", method=method), work)
    kept = work.linears["x"].dense() != 0
    assert int(kept.sum()) == 8 * 64 // 2
    assert not kept[:, unused].any()


def test_rows_are_taken_apart() -> None:
    weight, moment = problem(rows=8, columns=64)
    work = stage(weight.float(), moment)
    run(SparsePass(kind="sparse24"), work)
    whole = work.linears["x"]
    assert torch.equal(whole.rows(slice(3, 6)).dense(), whole.dense()[3:6])


def test_without_tokens_pruning_is_by_magnitude_and_says_so() -> None:
    weight = torch.randn(8, 16)
    work = stage(weight, None)
    events = run(SparsePass(kind="sparse24"), work)
    assert any(isinstance(event, Fallback) for event in events)
    assert torch.equal(work.linears["x"].dense(), weight * top_pairs(weight.abs().T).T)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (3, True), (8, True)])
def test_gptq_keeps_every_zero(bits: int, symmetric: bool) -> None:
    weight, moment = problem(rows=24, columns=96)
    work = stage(weight.float(), moment)
    run(SparsePass(kind="sparse24"), work)
    before = work.linears["x"]
    assert isinstance(before, Sparse24)
    step = Gptq(kind="gptq", bits=bits, group_size=32, symmetric=symmetric)
    run(step, work)
    after = work.linears["x"]
    assert isinstance(after, Sparse24)
    assert isinstance(after.values, IntQuantized)
    assert torch.equal(after.indices, before.indices)
    dense = after.dense()
    assert not dense[~before.keep].any()
    assert (after.values.shape, after.values.group_size) == ((24, 48), 16)
    # Better than rounding the values: the codes were solved for together, beside zeros that do not move.
    rounded = stage(weight.float(), moment)
    rounded.linears["x"] = before
    from compressor.compress.passes.linear.rtn import Rtn

    run(Rtn(kind="rtn", bits=bits, group_size=32, symmetric=symmetric), rounded)  # type: ignore[arg-type]

    def loss(found: Tensor) -> float:
        delta = found.double() - weight
        return float((delta @ (moment + 0.01 * moment.diagonal().mean() * torch.eye(96)) * delta).sum())

    assert loss(dense) < loss(rounded.linears["x"].dense())
    planned = step.plan(
        "x",
        SparsePass(kind="sparse24").plan("x", Dense(weight.float().to("meta")), {"x": Dense(weight)}),
        {"x": Dense(weight)},
    )
    assert planned.nbytes == after.nbytes == sum(t.numel() * t.element_size() for t in after.to_tensors().values())
