"""Statistics over tokens: equal to brute force, and those of halves give those of the whole."""

from __future__ import annotations

import pytest
import torch

from compressor.calibrate.statistics import KINDS, Statistics


def test_two_halves_are_the_whole_and_the_whole_is_brute_force() -> None:
    x, reference = torch.randn(2, 50, 6, dtype=torch.float64), torch.randn(2, 50, 6, dtype=torch.float64)
    weights = torch.rand(100)
    whole = Statistics.empty(6, KINDS)
    whole.add(x, weights, reference)
    halves = []
    for part in (0, 1):
        half = Statistics.empty(6, KINDS)
        half.add(x[part], weights[50 * part : 50 * (part + 1)], reference[part])
        halves.append(half)
    assert sum(half.tokens for half in halves) == whole.tokens == 100
    halves[0].join(halves[1])
    rows = list(zip(weights, x.view(-1, 6), reference.view(-1, 6), strict=True))

    def expected(which: list[int]) -> dict[str, torch.Tensor]:
        """Where these are held out."""
        moments = [w**2 * torch.outer(r, r) for w, r, _ in rows]
        crosses = [w**2 * torch.outer(b - r, r) for w, r, b in rows]
        held = {"held_moment": sum(moments[n] for n in which), "held_cross": sum(crosses[n] for n in which)}
        sample = torch.zeros(256, 6, dtype=torch.float64)
        sample[:100] = weights[:, None] * x.view(-1, 6)
        peak = x.abs().view(-1, 6).amax(0)
        return {"moment": sum(moments), "cross": sum(crosses), "peak": peak, "sample": sample, **held}  # type: ignore[dict-item]

    for statistics, held in ((whole, range(75, 100)), (halves[0], [*range(38, 50), *range(88, 100)])):
        known = expected(list(held))
        assert known.keys() == statistics.sums.keys() == KINDS.keys()
        for kind, found in statistics.sums.items():
            assert found.shape == KINDS[kind].shape(6)
            assert KINDS[kind].nbytes(6) == found.nbytes
            torch.testing.assert_close(found.double(), known[kind], rtol=1e-4, atol=1e-4)


def test_a_sample_is_drawn_from_the_first_tokens_that_fill_it() -> None:
    found = Statistics.empty(2, ("sample",))
    rows = torch.arange(1.0, 1201.0)[:, None].expand(-1, 2)
    found.add(rows[:100])
    found.add(rows[100:1000])  # into what 156 rows are left for
    found.add(rows[1000:])
    taken = found.sums["sample"][:, 0].tolist()
    assert taken[:100] == list(range(1, 101))
    assert taken == sorted(set(taken))
    assert all(100 < row <= 1000 for row in taken[100:])
    assert 5 < sum(row % 16 == 1 for row in taken[100:]) < 15  # a sixteenth of 156, whatever lies at even distances


def test_those_of_scaled_inputs_need_no_second_look() -> None:
    x, reference, weights, scale = torch.randn(50, 6), torch.randn(50, 6), torch.rand(50), torch.rand(6) + 0.5
    found, expected = Statistics.empty(6, KINDS), Statistics.empty(6, KINDS)
    found.add(x, weights, reference)
    expected.add(x / scale, weights, reference / scale)
    found.divide(scale)
    assert found.tokens == 50
    for kind, sums in expected.sums.items():
        torch.testing.assert_close(found.sums[kind], sums, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_exact_in_the_dtype_of_the_inputs(dtype: torch.dtype) -> None:
    """bfloat16 inputs lose nothing to fast products, and float32 inputs are never rounded for them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 300, generator=generator).to(dtype)
    reference = (x.float() * (1 + 0.05 * torch.randn(3000, 300, generator=generator))).to(dtype)
    found = Statistics.empty(300, KINDS)
    found.add(x, None, reference)
    assert found.cross is not None
    exact, moved = x.double(), reference.double() - x.double()
    for ours, expected in ((found.moment, exact.T @ exact), (found.cross, moved.T @ exact)):
        # Sums of 3,000 products in float32: of the order of its rounding of the largest, in whatever order they come.
        assert float((ours.double() - expected).abs().max() / expected.abs().max()) < 2e-6


def test_what_is_lent_counts_as_much_as_is_missing() -> None:
    own, other = Statistics.empty(32, KINDS), Statistics.empty(32, KINDS)
    x, y = torch.randn(2, 32), 3 * torch.randn(40, 32)
    own.add(x, None, 2 * x)
    other.add(y, None, 2 * y)
    scale = (x.square().sum() / 2) / (y.square().sum() / 40)
    expected = x.T @ x + (4 - 2) * scale * (y.T @ y) / 40  # four tokens are an eighth of 32 inputs
    found = other.lent_to(own)
    torch.testing.assert_close(found.moment, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.cross, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.sums["peak"], torch.cat([x, y]).abs().amax(0))
    assert (found.tokens, found.lent) == (2, 40)
    alone = other.lent_to(Statistics.empty(32, KINDS))
    assert (alone.tokens, alone.lent) == (0, 40)
    assert torch.equal(alone.moment, other.moment)


def test_groups_of_a_stage_can_be_rewritten_apart() -> None:
    from compressor.calibrate.stage import StageWork
    from compressor.compress.recipe import parse_recipe
    from compressor.runtime.schemes import Dense

    torch.manual_seed(0)
    names = {"a": ["a.q", "a.k"], "b": ["b.q"]}
    originals = {name: torch.randn(8, 32) for group in names.values() for name in group}
    x = {group: torch.randn(200, 32) for group in names}

    def work() -> StageWork:
        statistics = {}
        for group, members in names.items():
            found = Statistics.empty(32, ("moment",))
            found.add(x[group])
            statistics |= dict.fromkeys(members, found)
        linears = {name: Dense(weight) for name, weight in originals.items()}
        return StageWork(dict(linears), originals, list(names.values()), statistics)

    [step] = parse_recipe("passes: [{kind: gptq, bits: 3, group_size: 16, correction: 0}]").linear_passes.values()
    whole, parted = work(), work()
    list(step.apply(whole))
    for number in (1, 0):
        part = parted.part([number])
        assert set(part.linears) == set(part.statistics) == set(list(names.values())[number])
        list(step.apply(part))
        parted.linears.update(part.linears)
    for name, operator in whole.linears.items():
        assert torch.equal(operator.dense(), parted.linears[name].dense())
        assert not torch.equal(operator.dense(), originals[name])
