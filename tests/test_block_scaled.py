"""Numbers of few bits in blocks that share a scale: what they round to, what is stored, and that others read it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.calibrate.stage import StageWork
from compressor.calibrate.statistics import Statistics
from compressor.compress.apply import Job, apply
from compressor.compress.events import Event, LayerDone
from compressor.compress.output.verify import export_dense, verify
from compressor.compress.passes.linear.quantizer import SCHEMES, Name
from compressor.compress.passes.linear.rtn import Rtn
from compressor.compress.plan import make_plan
from compressor.compress.recipe import parse_recipe
from compressor.compress.solvers.grid import RANGES, Steps, range_grid, searched_grid
from compressor.compress.solvers.refine import differences, refine, row_losses
from compressor.compress.solvers.sweep import gptq_codes
from compressor.compress.solvers.system import damped_system
from compressor.kernels.numbers import E2M1, E4M3, ROUNDINGS, Integers, Numbers
from compressor.runtime import load
from compressor.runtime.errors import RecipeError
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.skeleton import Skeleton
from compressor.runtime.schemes import BlockScaled, Dense, Operator, from_tensors, identical, stored_linear
from compressor.runtime.stored import StoredModel

Pico = Callable[..., Path]
IDS = torch.arange(40)[None]
BLOCKS = [
    name
    for name, rounding in ROUNDINGS.items()
    if rounding.columns > 0 and name != "fp8_group" and rounding.scales != "nested"
]
STORED = [name for name, scheme in SCHEMES.items() if scheme.weights in BLOCKS]


def compress(model: Path, out: Path, passes: str, extra: str = "") -> Path:
    text = f"{extra}passes: [{passes}]\n"
    apply(Job(parse_recipe(text), text, (), model, out, str(model)), lambda event: None)
    return out


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(rows, 1, generator=draw))  # rows of all sizes
    return torch.randn(rows, columns, generator=draw) * spread


@pytest.mark.parametrize("numbers", [Integers(4), Integers(8), E2M1, E4M3])
def test_bytes_hold_every_number(numbers: Numbers) -> None:
    reach = torch.linspace(1.1 * numbers.low, 1.1 * numbers.high, 4001)
    reach = torch.cat([reach, reach * 2**-6, reach * 2**-12])
    every = numbers.nearest(reach.clone()).unique()
    assert len(every) == (2**numbers.bits if isinstance(numbers, Integers) else {4: 15, 8: 253}[numbers.bits])
    assert torch.equal(numbers.of_bytes(numbers.as_bytes(every)), every)
    if numbers == E2M1:
        every = every + 0.0  # theirs has a zero with a sign too
        bytewise = numbers.as_bytes(every[None].repeat_interleave(2, 1))
        assert torch.equal(
            pack_fp4_to_uint8(every[None].repeat_interleave(2, 1)), bytewise[:, ::2] | bytewise[:, 1::2] << 4
        )


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8", "fp8_block"])
def test_rows_are_taken_apart(name: str) -> None:
    weight, rounding = torch.randn(300, 256, generator=torch.Generator().manual_seed(0)), ROUNDINGS[name]
    step = Rtn(kind="rtn", scheme=name.replace("_", "-"))  # type: ignore[arg-type]
    made, _ = step._rounded("x", Dense(weight), None, step.steps([weight], rounding, torch.bfloat16))
    for part in (slice(0, 128), slice(128, 300), slice(256, 400)):
        assert torch.equal(made.rows(part).dense(), made.dense()[part])
    if rounding.rows > 1:
        with pytest.raises(NotImplementedError):
            made.rows(slice(5, 128))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**20), wide=st.integers(-30, 30))
def test_scales_are_what_their_dtype_can_hold(seed: int, wide: int) -> None:
    scales = torch.rand(50, generator=torch.Generator().manual_seed(seed)) * 2.0**wide + 1e-12
    powers = Steps(torch.float8_e8m0fnu).storable(scales)
    assert torch.equal(powers.to(torch.float8_e8m0fnu).float(), powers)
    assert ((powers >= scales) & (powers < 2 * scales)).all()
    assert torch.equal(Steps(torch.float8_e8m0fnu).storable(powers), powers)
    rounding = ROUNDINGS["nvfp4"]
    steps = Steps.of(rounding, torch.bfloat16, float(scales.max()) * rounding.numbers.high)
    assert math.frexp(steps.unit)[0] == 0.5
    small = steps.storable(1.5 * scales)  # room for the largest to be 4
    assert torch.equal((small / steps.unit).to(torch.float8_e4m3fn).float() * steps.unit, small)
    near = scales > 2.0**-6 * steps.unit
    torch.testing.assert_close(small[near], 1.5 * scales[near], rtol=1 / 16, atol=0)


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(BLOCKS), rows=st.integers(1, 300), columns=st.integers(1, 6), seed=st.integers(0, 99),
    inputs=st.booleans(),
)  # fmt: skip
def test_round_trip_and_plan(name: str, rows: int, columns: int, seed: int, inputs: bool) -> None:
    weight = random(rows, 32 * columns, seed).to(torch.bfloat16)
    scheme: Name = (
        next(key for key, one in SCHEMES.items() if one.weights == name and (one.inputs is None) != inputs)
        if name in ("nvfp4", "mxfp4", "mxfp8")
        else next(key for key, one in SCHEMES.items() if one.weights == name)
    )
    step = Rtn(kind="rtn", scheme=scheme)
    steps = step.steps([weight], step.rounding(32 * columns, "x"), torch.bfloat16)
    made, _ = step._rounded("x", Dense(weight), None, steps)
    assert isinstance(made, BlockScaled)
    tensors = made.to_tensors()
    again = from_tensors(tensors, json.loads(json.dumps(made.scheme())))
    assert identical(again, made)
    plain = Dense(weight.to("meta"))
    planned = step.plan("x", plain, {"x": plain})
    assert planned.nbytes == made.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert {k: (t.shape, t.dtype) for k, t in planned.to_tensors().items()} == {
        k: (t.shape, t.dtype) for k, t in tensors.items()
    }
    module = stored_linear(tensors, made.scheme(), None, torch.float32)
    x = random(5, 32 * columns, seed + 1)
    torch.testing.assert_close(module(x), made.forward(x))
    beyond = made.forward(x) - x @ made.dense().T
    assert (made.beyond(x) - beyond).norm() < 1e-5 * made.forward(x).norm()
    moved = module.to(torch.bfloat16).to(torch.float32)
    torch.testing.assert_close(moved(x), made.forward(x))
    if rows > 3:
        assert torch.equal(module.decode(slice(2, rows - 1), torch.float32), made.dense()[2 : rows - 1])


@pytest.mark.parametrize("name", BLOCKS)
def test_weights_are_the_nearest_of_their_grid(name: str) -> None:
    """And the largest of a block is among those that bear it: nothing is cut off by more than half a step."""
    rounding, weight = ROUNDINGS[name], random(130, 96).double()
    steps = Steps.of(rounding, torch.float64, float(weight.abs().max()))
    grid = range_grid(weight, rounding, steps)
    numbers = rounding.numbers
    every = numbers.nearest(torch.linspace(numbers.low, numbers.high, 100001, dtype=torch.float64)).unique()
    scales, _ = grid.columns(96)
    exact = torch.stack([every[(row[:, None] - every).abs().argmin(1)] for row in weight / scales])
    found = grid.codes(weight)
    assert ((found - weight / scales).abs() <= (exact - weight / scales).abs() + 1e-12).all()
    assert (weight.abs() <= scales * numbers.high * 1.07).all()
    if rounding.rows > 1:
        assert torch.equal(scales[:128], scales[:1].expand(128, -1))
        assert not torch.equal(scales[0], scales[128])
    if len(RANGES[rounding.scales]) > 1:
        both = searched_grid(weight, None, rounding, steps, RANGES[rounding.scales])
        lost = [((g.values(g.codes(weight)) - weight) ** 2).sum() for g in (both, grid)]
        assert lost[0] < lost[1] or rounding.bits == 8
        assert lost[0] <= lost[1]


@pytest.mark.parametrize("scheme", STORED)
def test_gptq_loses_less_than_rounding(scheme: Name, pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    data = f"data: {{source: '{calibration_text}', samples: 8, sequence_length: 64}}\n"
    lost = []
    for options in ("refinements: 0, search: false", "refinements: 3"):
        text = f"{data}passes: [{{kind: gptq, {options}, scheme: {scheme}, correction: 0, sequential: false}}]\n"
        events: list[Event] = []
        apply(Job(parse_recipe(text), text, (), pico(), tmp_path / str(len(options)), "m"), events.append)
        lost.append(sum(event.error for event in events if isinstance(event, LayerDone)))
    assert lost[1] < lost[0]


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8", "fp8_block"])
def test_the_sweep_is_that_of_any_grid(name: str) -> None:
    """Column by column in float64, as Frantar et al. have it."""
    rounding, weight = ROUNDINGS[name], random(7, 64).double()
    x = random(400, 64, 3).double()
    system = damped_system(x.T @ x, 0.01)
    steps = Steps.of(rounding, torch.float64, float(weight.abs().max()))
    grid = range_grid(weight, rounding, steps)
    codes, losses = gptq_codes(weight.T.contiguous(), grid, system)
    scales, _ = grid.columns(64)
    work, kept, inverse = weight.clone(), torch.zeros_like(weight), torch.linalg.inv(system.moment.double())
    for j in range(64):
        kept[:, j] = rounding.numbers.nearest(work[:, j] / scales[:, j]) * scales[:, j]
        error = (work[:, j] - kept[:, j]) / inverse[j, j]
        work[:, j:] -= error[:, None] * inverse[j, j:]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    torch.testing.assert_close(grid.values(codes.T), kept)
    delta = kept - weight
    torch.testing.assert_close(losses, ((delta @ system.moment.double()) * delta).sum(1))


@pytest.mark.parametrize(("name", "moves"), [("nvfp4", True), ("mxfp4", False), ("fp8_block", False)])
def test_refinement_moves_scales_that_are_one_row_s_and_have_neighbours(name: str, moves: bool) -> None:
    rounding, weight = ROUNDINGS[name], random(140, 256)
    x = random(500, 256, 3)
    moment = x.T @ x
    grid = range_grid(weight, rounding, Steps.of(rounding, torch.bfloat16, float(weight.abs().max())))
    codes, target = grid.codes(weight).T.contiguous(), weight.T.contiguous()
    delta = differences(codes, grid, target)
    before = float(row_losses(delta, moment).sum())
    refined = refine(codes, delta, grid, moment)
    assert float(row_losses(delta, moment).sum()) < before
    torch.testing.assert_close(delta, refined.values(codes.T).T - target, rtol=1e-3, atol=1e-4)
    assert torch.equal(refined.scales, grid.scales) is not moves


def test_linears_that_engines_fuse_have_one_global_scale() -> None:
    step, small, large = Rtn(kind="rtn", scheme="nvfp4a16"), torch.randn(4, 32), 100 * torch.randn(4, 32)
    rounding = ROUNDINGS["nvfp4"]
    both, alone = (step.steps(weights, rounding, torch.bfloat16) for weights in ([small, large], [large]))
    assert both == alone != step.steps([small], rounding, torch.bfloat16)


@pytest.mark.parametrize("scheme", [*(name for name in STORED if SCHEMES[name].weights != "mxint8"), "int-a8"])
def test_stock_transformers_reads_the_weights(scheme: Name, pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    data = f"data: {{source: '{calibration_text}', samples: 4, sequence_length: 64}}\n"
    wide = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_attention_heads": 2}
    # transformers 5.23 decodes all but these to bf16 when they first run, which their scales are exact in.
    dtype = torch.float32 if scheme == "fp8-block" else torch.bfloat16
    model = pico("llama", num_key_value_heads=2, dtype=dtype, **wide)
    out = compress(model, tmp_path / "out", f"{{kind: rtn, scheme: {scheme}}}", data if scheme == "nvfp4" else "")
    config = json.loads((out / "config.json").read_text())
    QuantizationConfig.model_validate(config["quantization_config"])
    assert StoredModel(out).format.name == "compressed-tensors"
    assert verify(out) == []
    stock, report = AutoModelForCausalLM.from_pretrained(out, dtype=dtype, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    export_dense(out, tmp_path / "plain")
    exact = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32))
    logits(stock)
    ours, theirs = logits(load(out, dtype=torch.float32)), logits(torch.nn.Module.float(stock))
    if SCHEMES[scheme].inputs is None:
        assert (ours - exact).norm() < 1e-5 * exact.norm()
        assert (theirs - exact).norm() < 1e-5 * exact.norm()
    else:
        spread = (exact - logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))).norm()
        assert 0 < (ours - exact).norm() < 3 * spread
        if scheme == "int-a8":  # its steps for int8 inputs are smaller by 1/255: other rounding, no less exact
            assert 0.5 < (theirs - exact).norm() / (ours - exact).norm() < 2
        else:
            assert (ours - theirs).norm() < 0.05 * (ours - exact).norm()


def test_inputs_of_factors_are_not_known(pico: Pico, calibration_text: Path) -> None:
    """Nothing is measured between the two, which NVFP4 needs for its inputs."""
    data = f"data: {{source: '{calibration_text}', samples: 4, sequence_length: 64}}\n"
    passes = "{kind: lorc, ratio: .5, rank_step: 16}, {kind: gptq, scheme: nvfp4}"
    skeleton = Skeleton(Checkpoint(pico(head_dim=32)))
    with pytest.raises(RecipeError, match=r"does not know what enters the factors of .*take scheme nvfp4a16"):
        make_plan(parse_recipe(f"{data}passes: [{passes}]"), skeleton)


def test_a_missing_scale_of_inputs_is_missed() -> None:
    weight = random(4, 32).to(torch.bfloat16)
    step = Rtn(kind="rtn", scheme="nvfp4")
    made, _ = step._rounded("x", Dense(weight), None, step.steps([weight], ROUNDINGS["nvfp4"], torch.bfloat16))
    tensors = made.to_tensors()
    del tensors["input_global_scale"]
    with pytest.raises(KeyError):
        from_tensors(tensors, made.scheme())


def test_scales_of_inputs_are_over_what_calibration_met() -> None:
    """A unit that suits the largest input, times room: with one that suits 1, inputs beyond 5 would be cut off."""
    weight, statistics = torch.randn(8, 32).bfloat16(), Statistics.empty(32, ("peak",))
    statistics.add(40 * torch.randn(50, 32))
    originals: dict[str, Operator] = {"x": Dense(weight)}
    work = StageWork(originals, {"x": weight}, [["x"]], {"x": statistics})
    list(Rtn(kind="rtn", scheme="nvfp4").apply(work))
    made, x = work.linears["x"], 40 * torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    exact = x @ made.dense().T
    assert float((made.forward(x) - exact).norm() / exact.norm()) < 0.15
