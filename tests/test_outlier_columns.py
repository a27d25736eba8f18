"""Columns that stay floats: the operator and its module, what is solved for beside them, the pass in models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pico import benchmark, known
from safetensors.torch import load_file, save_file
from test_sparse import problem
from torch import Tensor

from compressor.calibrate.stage import StageWork
from compressor.calibrate.statistics import Statistics
from compressor.compress.apply import Job, apply, source_skeleton
from compressor.compress.events import Event, LayerDone
from compressor.compress.passes.linear.gptq import Gptq
from compressor.compress.passes.linear.outlier_columns import OutlierColumns, split
from compressor.compress.plan import make_plan
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.errors import ModelError, RecipeError
from compressor.runtime.schemes import Dense, Operator, Problem, WithColumns, from_tensors, identical, stored_linear

Pico = Callable[..., Path]
DOUBLE = torch.float64
ROWS, COLUMNS = 24, 48


def stage(statistics: Statistics, *weights: Tensor) -> StageWork:
    originals = {str(number): weight for number, weight in enumerate(weights)}
    linears: dict[str, Operator] = {name: Dense(weight) for name, weight in originals.items()}
    return StageWork(linears, originals, [list(originals)], dict.fromkeys(originals, statistics))


def passes(text: str) -> list[OutlierColumns | Gptq]:
    steps = parse_recipe(f"passes: [{text}]").passes
    return [step.before(steps[number + 1 :]) for number, step in enumerate(steps)]  # type: ignore[misc]


def solved(text: str, statistics: Statistics, *weights: Tensor, events: list[Event] | None = None) -> list[WithColumns]:
    """Weights behind `outlier_columns` and another pass, which left what they had planned and said what they did."""
    work, steps = stage(statistics, *weights), passes(text)
    planned = {name: Dense(weight.to("meta")) for name, weight in work.originals.items()}
    group = dict(planned)
    for step in steps:
        planned = {name: step.plan(name, operator, group) for name, operator in planned.items()}  # type: ignore[misc]
        done = list(step.apply(work))
        if events is not None:
            events += done
    for name, operator in work.linears.items():
        shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in operator.to_tensors().items()}
        assert shapes == {key: (tensor.shape, tensor.dtype) for key, tensor in planned[name].to_tensors().items()}
        assert planned[name].scheme() == operator.scheme()
    return list(work.linears.values())  # type: ignore[arg-type]


QUANTIZERS = {
    "3 bits": "{kind: gptq, bits: 3, group_size: 16, damping: 1.0e-6, shrinkage: 0}",
    "nearest": "{kind: rtn, bits: 4, group_size: 16}",
    "int8, inputs too": "{kind: gptq, scheme: int8}",
    "nvfp4, inputs too": "{kind: gptq, scheme: nvfp4}",
}


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_it_is_stored_and_run_as_what_it_is(quantizer: str) -> None:
    weight, moment = problem(ROWS, COLUMNS)
    met = known(moment)
    met.sums["peak"] = torch.linspace(1, 2, COLUMNS).index_fill(0, torch.tensor([5, 17]), 60.0)
    met.sums["moment"][5, 5] += 1e4
    met.sums["moment"][17, 17] += 1e4
    [operator] = solved(f"{{kind: outlier_columns, share: .04}}, {QUANTIZERS[quantizer]}", met, weight.bfloat16())
    assert operator.index.tolist() == [5, 17]
    assert operator.description.endswith(" + 2 columns")
    stored = operator.to_tensors()
    assert operator.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    again = from_tensors(stored, operator.scheme())
    assert identical(again, operator)
    x = torch.randn(3, 5, COLUMNS, dtype=DOUBLE)
    x[..., [5, 17]] *= 40
    rest = x.index_fill(-1, operator.index.long(), 0)
    expected = operator.base.forward(rest) + x[..., [5, 17]] @ operator.columns.dense(DOUBLE).T
    torch.testing.assert_close(operator.forward(x), expected)
    torch.testing.assert_close(x @ operator.dense(DOUBLE).T + operator.beyond(x), expected, rtol=1e-6, atol=1e-6)
    bias, up, down = torch.randn(ROWS), torch.randn(ROWS, 3), torch.randn(3, 5, 3)
    linear = stored_linear(stored, operator.scheme(), bias, torch.float32)
    found = linear.affine(x.float(), bias, up, down)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, (expected + bias + down @ up.T).float(), rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(linear(x.float()), found - down @ up.T, rtol=1e-4, atol=1e-5 * scale)
    if "inputs" in quantizer:
        assert float((operator.forward(x) - x @ weight.T).norm()) < 0.2 * float((x @ weight.T).norm())


def test_the_others_are_solved_for_what_the_columns_leave() -> None:
    """Their loss for Schur's complement is that of the whole, once the columns are a least-squares fit."""
    weight, moment = problem(ROWS, COLUMNS)
    met = known(moment)
    met.sums["moment"][7] *= 30
    met.sums["moment"][:, 7] *= 30
    met.sums["peak"] = torch.ones(COLUMNS)
    both = weight, torch.randn(ROWS, COLUMNS, dtype=DOUBLE)
    events: list[Event] = []
    text = f"{{kind: outlier_columns, share: .1}}, {QUANTIZERS['3 bits']}"
    found = solved(text, met, *(weight.float() for weight in both), events=events)
    work = stage(met, *(w.float() for w in both))
    list(passes(QUANTIZERS["3 bits"])[0].apply(work))
    exact = met.moment.double()
    for operator, target, plain, event in zip(found, both, work.linears.values(), events, strict=True):
        where = operator.index.long()
        assert 7 in where.tolist()
        problem_ = Problem(target, exact)
        lost = problem_.loss(operator.dense(DOUBLE))
        slope = (target - operator.dense(DOUBLE)) @ exact
        assert float(slope[:, where].norm()) < 1e-3 * float(slope.norm())
        for change in torch.randn(5, ROWS, len(where), dtype=DOUBLE):
            moved = operator.dense(DOUBLE).index_add(1, where, 0.1 * change)
            assert problem_.loss(moved) > lost
        rest = [column for column in range(COLUMNS) if column not in where.tolist()]
        cross = exact[where][:, rest]
        left = exact[rest][:, rest] - cross.T @ torch.linalg.solve(exact[where][:, where], cross)
        delta = (target - operator.dense(DOUBLE))[:, rest]
        assert float((delta @ left * delta).sum()) == pytest.approx(float(lost), rel=1e-3)
        assert isinstance(event, LayerDone)
        assert event.error == pytest.approx(float(lost / problem_.loss(torch.zeros_like(target))), rel=1e-3)
        assert float(lost) < 0.8 * float(problem_.loss(plain.dense(DOUBLE)))


def test_which_columns_stay_depends_on_what_is_rounded() -> None:
    weight, other = torch.ones(4, 50), torch.ones(2, 50)
    weight[:, 3], weight[:, 9] = 8, 4
    statistics = Statistics.empty(50, ("moment", "peak"))
    x = torch.ones(100, 50)
    x[:, 3], x[:, 9], x[0, 20] = 0.1, 2, 9
    statistics.add(x)
    chosen = {}
    for name, text in {"weights": "{kind: rtn, bits: 4}", "inputs": "{kind: rtn, scheme: fp8}"}.items():
        first, second = solved(f"{{kind: outlier_columns, share: .001}}, {text}", statistics, weight, other)
        assert torch.equal(first.index, second.index)
        chosen[name] = first.index.tolist()
    assert chosen == {"weights": [9], "inputs": [20]}
    work = stage(Statistics.empty(50, ("moment", "peak")), weight)
    [step, _] = passes("{kind: outlier_columns}, {kind: rtn, bits: 4}")
    assert "no calibration token came by" in str(list(step.apply(work)))


DATA = "data: {{source: {}, samples: 8, sequence_length: 32}}\n"


@pytest.mark.parametrize("quantizer", ["{kind: rtn, scheme: int8}", "{kind: gptq, scheme: int8}"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_models_with_outliers_lose_less(
    family: str, quantizer: str, pico: Pico, tmp_path: Path, calibration_text: Path
) -> None:
    model, ids = tmp_path / "model", torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    benchmark("outliers").write(pico(family, dtype=torch.float32), model, share=0.03)
    exact, errors = load(model, dtype=torch.float32)(input_ids=ids).logits, []
    for name, steps in (("plain", quantizer), ("split", f"{{kind: outlier_columns, share: .04}}, {quantizer}")):
        recipe = DATA.format(calibration_text) + f"passes: [{steps}]"
        apply(Job(parse_recipe(recipe), recipe, (), model, tmp_path / name, "pico"), lambda event: None)
        found = load(tmp_path / name, dtype=torch.float32)(input_ids=ids).logits
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("{kind: outlier_columns}", "outlier_columns splits .* to round, which nothing does: put rtn or gptq right"),
        ("{kind: outlier_columns}, {kind: sparse24}", "which sparse24 does not as this needs it"),
        ("{kind: rtn, bits: 4}, {kind: outlier_columns}, {kind: rtn}", "an earlier pass has compressed"),
        (
            "{kind: lorc, ratio: .5}, {kind: outlier_columns}, {kind: rtn}",
            "whose latents are to be cached; let it ignore it",
        ),
    ],
)
def test_what_it_cannot_take(steps: str, said: str, pico: Pico) -> None:
    with pytest.raises(RecipeError, match=said):
        make_plan(parse_recipe(f"passes: [{steps}]"), source_skeleton(pico(), "cpu"))


def test_damaged_columns_are_refused(pico: Pico, tmp_path: Path, calibration_text: Path) -> None:
    recipe = DATA.format(calibration_text) + "passes: [{kind: outlier_columns, share: .04}, {kind: rtn, bits: 4}]"
    out = tmp_path / "out"
    apply(Job(parse_recipe(recipe), recipe, (), pico(), out, "pico"), lambda event: None)
    file = out / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.index"))
    count = tensors[name.replace("index", "columns.weight")].shape[1]
    assert count > 1
    for index in (tensors[name].flip(0), tensors[name] - 1000, tensors[name] + 1000, tensors[name][:-1]):
        save_file({**tensors, name: index.contiguous()}, file)
        with pytest.raises(ModelError, match="q_proj"):
            load(out)


def test_a_split_weight_is_the_weight() -> None:
    weight = torch.randn(6, 10).bfloat16()
    operator = split(weight, torch.tensor([2, 7], dtype=torch.int32))
    assert torch.equal(operator.dense(torch.bfloat16), weight)
    assert not operator.base.dense()[:, [2, 7]].any()
