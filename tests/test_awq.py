"""Scales that make rounding cost less: the cost by hand, its minimum, and the pass in every kind of family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pico import benchmark
from torch import Tensor

from compressor.calibrate.statistics import Statistics
from compressor.compress.apply import Job, apply, source_skeleton
from compressor.compress.events import Event, LayerDone, Scaled
from compressor.compress.plan import make_plan
from compressor.compress.recipe import parse_recipe
from compressor.compress.solvers.grid import Steps, range_grid
from compressor.compress.solvers.scales import Reader, best_scales, conditional_energy, some_rows
from compressor.compress.solvers.system import damped_system
from compressor.kernels.numbers import Rounding
from compressor.kernels.reference import quantize_rows
from compressor.runtime import load
from compressor.runtime.errors import RecipeError
from compressor.runtime.model.folds import Seam

Pico = Callable[..., Path]


def weights(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the energy of what it reads, both with channels that differ."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(columns, generator=generator)
    energy = (2 * spread + 2 * torch.randn(columns, generator=generator)).exp()
    return torch.randn(rows, columns, generator=generator) * (-0.5 * spread).exp(), energy


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 4])
def test_the_cost_is_what_it_is_said_to_be(group_size: int, symmetric: bool) -> None:
    weight, energy = weights(3, 10)
    scale = torch.rand(10) + 0.5
    span, cost = (10 if group_size < 0 else group_size), 0.0
    for start in range(0, 10, span):
        columns = range(start, min(start + span, 10))
        ranges = 0.0
        for row in weight.double():
            values = [float(row[j] * scale[j]) for j in columns]
            most = max(map(abs, values)) if symmetric else max(0.0, *values) - min(0.0, *values)
            ranges += most**2
        cost += ranges * sum(float(energy[j]) / float(scale[j]) ** 2 for j in columns)
    found = Reader(weight, energy, group_size, symmetric).cost(scale)
    assert float(found) == pytest.approx(cost, rel=1e-5)


def test_rounded_inputs_cost_what_their_tokens_largest_numbers_say() -> None:
    """Weights and inputs in as many steps: with both, the loss of an 8-bit product is a share of the cost, whatever the
    scales."""
    weight, energy = weights(256, 64)
    inputs = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)) * energy.sqrt()
    shares = []
    for scale in (torch.ones(64), energy**0.1, energy**0.25):
        reader = Reader(weight, inputs.square().sum(0), -1, True, inputs[::3], times=3)
        codes, factors = quantize_rows(inputs / scale, torch.int8)
        scaled = weight * scale
        grid = range_grid(scaled, Rounding.integers(8, -1, True), Steps(torch.float32))
        found = (codes.float() * factors[:, None]) @ grid.values(grid.codes(scaled)).T
        shares.append(float((found - inputs @ weight.T).square().sum() / reader.cost(scale)))
    assert max(shares) < 1.25 * min(shares), shares


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_cost_says_what_rounding_does(symmetric: bool) -> None:
    """To the outputs, for inputs that are independent: the ratio of two scales' costs is that of their losses."""
    weight, energy = weights(512, 64)
    losses, costs = [], []
    for scale in (torch.ones(64), weights(512, 64)[1] ** 0.2):
        scaled = weight * scale
        grid = range_grid(scaled, Rounding.integers(4, 32, symmetric), Steps(torch.float32))
        losses.append(float(((grid.values(grid.codes(scaled)) / scale - weight).square() * energy).sum()))
        costs.append(float(Reader(weight, energy, 32, symmetric).cost(scale)))
    assert costs[1] < 0.8 * costs[0]
    assert losses[1] / losses[0] == pytest.approx(costs[1] / costs[0], rel=0.1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_scales_are_the_best_there_are(symmetric: bool) -> None:
    """The cost is convex, so nothing near them may be better; nor any of the scales that AWQ tries."""
    (weight, energy), (other, seen) = weights(48, 32), weights(16, 32, 1)
    tokens = torch.randn(40, 32, generator=torch.Generator().manual_seed(2)) * seen.sqrt()
    readers = [Reader(weight, energy, 16, symmetric), Reader(other, seen, -1, symmetric, tokens, 0.1)]

    def cost(scale: Tensor) -> float:
        return float(sum(reader.cost(scale) for reader in readers))

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        one, two = torch.randn(2, 32, generator=generator)
        assert cost(((one + two) / 2).exp()) <= (cost(one.exp()) + cost(two.exp())) / 2
    scale, left = best_scales(readers, 32, lambda channels: channels)
    lowest = cost(scale)
    assert left == pytest.approx(lowest / cost(torch.ones(32)), rel=1e-5)
    assert float(scale.log().mean()) == pytest.approx(0, abs=1e-6)
    for size in (0.3, 0.1, 0.03):
        for _ in range(20):
            assert cost(scale * (size * torch.randn(32, generator=generator)).exp()) > 0.99 * lowest
    inputs, means = energy.sqrt(), torch.cat([weight, other]).abs().mean(0)
    for ratio in torch.linspace(0, 1, 20):
        assert cost(inputs**ratio / means ** (1 - ratio)) > lowest
        assert cost(inputs**ratio) > lowest


def test_channels_that_several_columns_read_have_one_scale() -> None:
    weight, energy = weights(24, 16)
    seam = Seam("v_proj", (), (), 8, (4, 2), norm=False)
    scale, left = best_scales([Reader(weight, energy, -1, True)], 8, seam.columns)
    assert scale.shape == (8,)
    assert left < 1
    assert float(Reader(weight, energy, -1, True).cost(seam.columns(scale))) == pytest.approx(
        left * float(Reader(weight, energy, -1, True).cost(torch.ones(16))), rel=1e-5
    )


def test_what_is_left_of_an_input_is_its_variance_once_the_rest_is_known() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    system = damped_system(x.T @ x, 1e-6, act_order=True)
    found, moment = conditional_energy(system.factor, system.order), (x.T @ x).double()
    for place, column in enumerate(system.order.tolist()):
        later = system.order[place + 1 :]
        known = moment[column, later] @ torch.linalg.solve(moment[later][:, later], moment[later, column])
        assert float(found[column]) == pytest.approx(float(moment[column, column] - known), rel=1e-3)


def test_each_pass_behind_has_the_cost_of_what_it_does() -> None:
    """GPTQ's columns make up for one another, rounding's do not; and inputs that are rounded too count as they come."""
    statistics = Statistics.empty(16, ("moment", "sample"))
    generator = torch.Generator().manual_seed(0)
    statistics.add(torch.randn(400, 16, generator=generator) @ torch.randn(16, 16, generator=generator))
    weight, plain = torch.randn(8, 16), statistics.moment.diagonal()
    passes = [
        "{kind: rtn, bits: 4, group_size: 16, symmetric: false}",
        "{kind: gptq, bits: 4, group_size: 16, shrinkage: 0, damping: 1.0e-3, act_order: false}",
        "{kind: rtn, scheme: int8}",
    ]
    rtn, gptq, w8a8 = (parse_recipe(f"passes: [{text}]").passes[0] for text in passes)
    awq, smooth = parse_recipe("passes: [{kind: awq}, {kind: smoothquant}]").passes
    reader = awq.reader(rtn, "x", weight, statistics)
    assert (reader.group_size, reader.symmetric, reader.inputs) == (16, False, None)
    assert torch.equal(reader.energy, plain)
    system = damped_system(statistics.moment, 1e-3)
    reader = awq.reader(gptq, "x", weight, statistics)
    torch.testing.assert_close(reader.energy, conditional_energy(system.factor, system.order))
    assert bool((reader.energy < 0.9 * plain)[:12].all())  # the last ones have nothing behind them
    reader = smooth.reader(w8a8, "x", weight, statistics)
    assert torch.equal(reader.energy, plain)
    assert torch.equal(reader.inputs, statistics.sums["sample"])
    assert reader.times == 400 / 256


def test_some_rows_are_no_more_than_asked_for() -> None:
    weight = torch.arange(10.0)[:, None].bfloat16()
    assert some_rows(weight, 4).tolist() == [[0], [3], [6], [9]]
    assert torch.equal(some_rows(weight, 10), weight.float())


DATA = "data: {{source: {}, samples: 8, sequence_length: 32}}\n"


def run(passes: str, model: Path, out: Path, text: Path) -> list[Event]:
    events: list[Event] = []
    recipe = DATA.format(text) + f"passes: [{passes}]"
    apply(Job(parse_recipe(recipe), recipe, (), model, out, "pico"), events.append)
    return events


ROUNDING = {
    "rtn": ("awq", "{kind: rtn, bits: 4, group_size: 32}", 0.8),
    "gptq": ("awq", "{kind: gptq, bits: 4, group_size: 32}", 1.0),
    "w8a8": ("smoothquant", "{kind: rtn, scheme: int8}", 0.6),
}


@pytest.mark.parametrize("rounding", ROUNDING)
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "qwen3_moe", "deepseek_v3"])
def test_models_with_outliers_lose_less(
    family: str, rounding: str, pico: Pico, tmp_path: Path, calibration_text: Path
) -> None:
    """And every seam has moved; what is not rounded (routers, norms) follows."""
    model, ids = tmp_path / "model", torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    benchmark("outliers").write(pico(family, dtype=torch.float32), model, share=0.03)
    scaling, quantizer, most = ROUNDING[rounding]
    exact, errors = load(model, dtype=torch.float32)(input_ids=ids).logits, []
    for name, passes in (("plain", quantizer), ("scaled", f"{{kind: {scaling}}}, {quantizer}")):
        events = run(passes, model, tmp_path / name, calibration_text)
        found = load(tmp_path / name, dtype=torch.float32)(input_ids=ids).logits
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[1] < most * errors[0]
    moved = [event for event in events if isinstance(event, Scaled)]
    rounded = {event.name for event in events if isinstance(event, LayerDone)}
    assert len(moved) > 4
    assert all(event.left < 1 and event.least < 1 < event.most and event.name in rounded for event in moved)


def test_nothing_moves_where_it_is_not_worth_it(pico: Pico, tmp_path: Path, calibration_text: Path) -> None:
    """Not where a pass may not touch every reader, nor before data has been seen."""
    rtn = "{kind: rtn, bits: 4, group_size: 32}"
    events = run(f"{{kind: awq, targets: '*.q_proj'}}, {rtn}", pico(), tmp_path / "out", calibration_text)
    assert not [event for event in events if isinstance(event, Scaled)]
    run(rtn, pico(), tmp_path / "plain", calibration_text)
    found, expected = (tmp_path / name / "model.safetensors" for name in ("out", "plain"))
    assert found.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ("{kind: awq}", r"for the pass behind it to round, which nothing does: put rtn or gptq \(with a scheme"),
        ("{kind: rtn, bits: 4, group_size: 32}, {kind: awq}", "which an earlier pass has compressed|nothing does"),
        (
            "{kind: awq}, {kind: sparse24}, {kind: rtn, bits: 4, group_size: 32}",
            "to round, which sparse24 does not as this needs it: put",
        ),
        ("{kind: awq}, {kind: rtn, scheme: int8}", "which rtn does not as this needs it: put rtn or"),
        ("{kind: smoothquant}, {kind: rtn, scheme: fp8}", r"rtn does not as this needs it: put rtn or gptq \(with"),
        ("{kind: awq}, {kind: rtn, group_size: 32, ignore: '*.v_proj'}", r"awq scales .*\.v_proj for the pass"),
    ],
)
def test_it_asks_for_a_pass_that_rounds_right_behind(passes: str, said: str, pico: Pico) -> None:
    with pytest.raises(RecipeError, match=said):
        make_plan(parse_recipe(f"passes: [{passes}]"), source_skeleton(pico(), "cpu"))
