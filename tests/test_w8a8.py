"""Weights and inputs of 8 bits: what is stored, who reads it, and what a product is."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from compressor.calibrate.stage import StageWork
from compressor.calibrate.statistics import Statistics
from compressor.compress.apply import Job, apply
from compressor.compress.output.verify import export_dense, verify
from compressor.compress.passes.linear.eora import Eora
from compressor.compress.passes.linear.rtn import Rtn
from compressor.compress.plan import make_plan
from compressor.compress.recipe import parse_recipe
from compressor.kernels import cpu, dispatch, ops, reference
from compressor.kernels.numbers import ROUNDINGS
from compressor.runtime import load
from compressor.runtime.errors import ModelError, RecipeError
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.skeleton import Skeleton
from compressor.runtime.schemes import W8A8, Dense, Operator, W8A8Linear, from_tensors, identical, stored_linear
from compressor.runtime.stored import StoredModel

Pico = Callable[..., Path]
IDS = torch.arange(40)[None]
ALL_FP8 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
ALL_FP8 = ALL_FP8[ALL_FP8.isfinite()]
KINDS = {"int": torch.int8, "float": torch.float8_e4m3fn}
SCHEMES: dict[str, Any] = {"int": "int8", "float": "fp8"}


def compress(model: Path, out: Path, passes: str) -> Path:
    text = f"passes: [{passes}]\n"
    apply(Job(parse_recipe(text), text, (), model, out, str(model)), lambda event: None)
    return out


def logits(model) -> torch.Tensor:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return model(IDS).logits


def operator(kind: str, rows: int, columns: int) -> W8A8:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    codes, scales = reference.quantize_rows(weight, KINDS[kind])
    return W8A8(codes, scales.to(torch.bfloat16)[:, None])


def step(kind: str, more: str = "") -> str:
    return f"{{kind: rtn, scheme: {SCHEMES[kind]}{more}}}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (20, 33), (48, 64)])
def test_round_trip_and_plan(kind: str, rows: int, columns: int) -> None:
    made = operator(kind, rows, columns)
    again = from_tensors(made.to_tensors(), made.scheme())
    assert torch.equal(again.dense(torch.float64), made.codes.double() * made.scales.double())
    planned = Rtn(kind="rtn", scheme=SCHEMES[kind]).plan(
        "x", Dense(torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")), {}
    )
    assert planned.nbytes == made.nbytes == rows * columns + 2 * rows
    assert {k: (t.shape, t.dtype) for k, t in planned.to_tensors().items()} == {
        k: (t.shape, t.dtype) for k, t in made.to_tensors().items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_of_rounded_inputs(
    kind: str, native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By oneDNN's products of bytes, and by decoding: both the sums that float64 gives, of inputs rounded by token."""
    if native and not dispatch.cpu_capability().int8:
        pytest.skip("a processor without them")
    monkeypatch.setattr(dispatch, "cpu_capability", lambda: dispatch.CpuCapability(False, False, native))
    made = operator(kind, 520, 96)
    linear = stored_linear(made.to_tensors(), made.scheme(), torch.ones(520), dtype)
    assert isinstance(linear, W8A8Linear)
    x = torch.randn(3, 100, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, 0] = 0
    inputs, factors = reference.quantize_rows(x.flatten(0, 1), KINDS[kind])
    exact = (inputs.double() * factors.double()[:, None]) @ made.dense(torch.float64).T + 1
    close = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for found in (linear(x).double(), made.forward(x).double() + 1):
        assert (found.view(300, 520) - exact).norm() / exact.norm() < close
    assert torch.equal(linear.whole(dtype), made.dense(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_small_tokens_are_rounded_as_large_ones_are(kind: str) -> None:
    x, small = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), 2.0**-30
    (codes, scales), (found, smaller) = (reference.quantize_rows(part, KINDS[kind]) for part in (x, small * x))
    assert torch.equal(found.float(), codes.float())
    assert torch.equal(smaller, small * scales)
    blocks = ROUNDINGS["fp8_group"]
    assert torch.equal(reference.rounded(small * x, blocks), small * reference.rounded(x, blocks))


def narrow(kind: str, rows: int, columns: int) -> W8A8:
    """One whose sums are exact even where a processor adds pairs of products of bytes in 16 bits."""
    made = operator(kind, rows, columns)
    return W8A8(made.codes.float().clamp_(-63, 63).to(made.codes.dtype), made.scales)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_inputs_have_one_scale_and_are_cut_off_beyond_it(kind: str, dtype: torch.dtype) -> None:
    """By oneDNN's products of bytes, by decoding, and as a GPU's operator rounds them."""
    plain = narrow(kind, 48, 64)
    made = replace(plain, input_scale=torch.tensor([0.03125]).bfloat16())
    again = from_tensors(made.to_tensors(), made.scheme())
    assert identical(again, made)
    assert not identical(again, plain)
    assert made.nbytes == plain.nbytes + 2
    x = torch.randn(3, 100, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, 0, :2] = torch.tensor([30.0, -30.0])
    scaled = x.double() / 0.03125
    if kind == "int":
        rounded = scaled.round().clamp(-128, 127)
    else:
        rounded = scaled.float().clamp(-448, 448).to(torch.float8_e4m3fn).double()
    exact = (0.03125 * rounded) @ made.dense(torch.float64).T
    close = {torch.float32: 1e-5, torch.bfloat16: 4e-3}[dtype]
    linear = stored_linear(made.to_tensors(), made.scheme(), None, dtype)
    for found in (made.forward(x), linear(x), F.linear(x, made.dense(dtype)) + made.beyond(x)):
        assert float((found.double() - exact).norm() / exact.norm()) < (close if found.dtype == dtype else 1e-5)
    if kind == "int":
        found = cpu.bytes_linear(x, made.codes, made.scales[:, 0].float(), torch.tensor([0.03125]))
        assert float((found.double() - exact).norm() / exact.norm()) < close
    cast = linear.to(torch.float16)
    assert isinstance(cast, W8A8Linear)
    assert cast.input_scale is not None
    assert (cast.input_scale.dtype, float(cast.input_scale)) == (torch.float32, 0.03125)
    with pytest.raises(ValueError, match="input_scale is of 2 numbers"):
        from_tensors({**made.to_tensors(), "input_scale": torch.ones(2)}, made.scheme())


@pytest.mark.parametrize("kind", KINDS)
def test_a_static_scale_is_of_the_largest_input_that_was_met(kind: str) -> None:
    weight, statistics = torch.randn(8, 32), Statistics.empty(32, ("peak",))
    x = torch.randn(50, 32)
    statistics.add(x)
    linears: dict[str, Operator] = {"x": Dense(weight)}
    step_ = Rtn(kind="rtn", scheme=SCHEMES[kind], input_scales="tensor")
    assert step_.needs == {"reference", "peak"}
    list(step_.apply(StageWork(linears, {"x": weight}, [["x"]], {"x": statistics})))
    found = linears["x"].to_tensors()["input_scale"]
    assert float(found) == pytest.approx(float(x.abs().max()) / (127 if kind == "int" else 448), rel=1e-6)


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
@pytest.mark.parametrize("kind", KINDS)
def test_static_inputs_are_read_by_stock_transformers(
    kind: str, solver: str, pico: Pico, tmp_path: Path, calibration_text: Path
) -> None:
    """One for linears that read the same."""
    data = f"data: {{source: {calibration_text}, samples: 8, sequence_length: 32}}\n"
    text = data + f"passes: [{{kind: {solver}, scheme: {SCHEMES[kind]}, input_scales: tensor}}]"
    model, out = pico("qwen2", dtype=torch.float32), tmp_path / "out"
    apply(Job(parse_recipe(text), text, (), model, out, str(model)), lambda event: None)
    assert json.loads((out / "compressor.json").read_text())["format"] == "compressed-tensors"
    assert verify(out) == []
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    QuantizationConfig.model_validate(config)
    inputs = config["config_groups"]["group_0"]["input_activations"]
    assert (inputs["strategy"], inputs["dynamic"]) == ("tensor", False)
    stored = StoredModel(out)
    scales = {name: stored.operator(name).to_tensors()["input_scale"] for name in stored.schemes}
    block = "model.layers.0.self_attn."
    assert scales[block + "q_proj"] == scales[block + "k_proj"] == scales[block + "v_proj"] != scales[block + "o_proj"]
    stock, report = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(logits(load(out, dtype=torch.float32)), logits(stock), rtol=1e-4, atol=1e-4)


@pytest.fixture(params=[False, True])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Decoding, or oneDNN's products of bytes, which are slow on some processors, and there for all."""
    able = bool(request.param)
    monkeypatch.setattr(dispatch, "cpu_capability", lambda: dispatch.CpuCapability(False, False, able))
    return able


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_casts_leave_codes_and_scales_alone(kind: str, loaded: torch.dtype, dtype: torch.dtype) -> None:
    made = narrow(kind, 48, 64)
    linear = stored_linear(made.to_tensors(), made.scheme(), torch.ones(48), loaded).to(dtype)
    assert isinstance(linear, W8A8Linear)
    assert torch.equal(linear.codes.view(torch.int8), made.codes.view(torch.int8))
    assert torch.equal(linear.scales, made.scales[:, 0].float())
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, exact = linear(x), made.forward(x.double()) + 1
    assert found.dtype == dtype
    tolerance = {torch.bfloat16: 6e-3, torch.float16: 1e-3}.get(dtype, 1e-5)
    assert (found - exact).norm() / exact.norm() < tolerance
    assert linear.to(device="meta").codes.is_meta


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_is_cast_as_any_other(pico: Pico, tmp_path: Path, kind: str) -> None:
    out = compress(pico(), tmp_path / "out", step(kind))
    assert torch.equal(logits(load(out, "cpu").float()), logits(load(out, "cpu", torch.float32)))
    for dtype in (torch.bfloat16, torch.float16):
        found, expected = (logits(model) for model in (load(out, "cpu").to(dtype), load(out, "cpu", dtype)))
        assert (found - expected).norm() / expected.norm() < 0.1


@pytest.fixture(scope="module")
def eight_bits(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(pico(), tmp_path_factory.mktemp("int8") / "out", step("int"))


@pytest.mark.usefixtures("native")
def test_a_loaded_model_is_copied_and_saved(eight_bits: Path, tmp_path: Path) -> None:
    model = load(eight_bits, "cpu")
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    torch.save(model.model.layers[0].mlp, tmp_path / "saved.pt")
    model.model.layers[0].mlp = torch.load(tmp_path / "saved.pt", weights_only=False)
    assert torch.equal(logits(model), expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles by a compiler of C++")
def test_a_loaded_model_is_compiled_whole(eight_bits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "cpu_capability", lambda: dispatch.CpuCapability(False, False, True))
    linear = load(eight_bits, "cpu").model.layers[0].mlp.up_proj
    compiled = torch.compile(linear, fullgraph=True)
    with torch.no_grad():
        for tokens in (1, 3, 5):
            x = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
            assert torch.equal(compiled(x), linear(x))


def test_a_saved_model_multiplies_as_the_machine_that_opens_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    made = operator("int", 48, 64)
    linear = stored_linear(made.to_tensors(), made.scheme(), None, torch.float32)
    monkeypatch.setattr(dispatch, "cpu_capability", lambda: dispatch.CpuCapability(False, False, False))
    monkeypatch.setattr(cpu, "bytes_linear", None)
    x = torch.randn(3, 64)
    torch.testing.assert_close(pickle.loads(pickle.dumps(linear))(x), made.forward(x))


def test_bytes_are_packed_once_and_not_for_longer_than_they_live(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, pack = [], cpu.pack_int8
    monkeypatch.setattr(cpu, "pack_int8", lambda codes: (packed.append(len(codes)), pack(codes))[1])
    codes, x, before = narrow("int", 48, 64).codes, torch.randn(3, 64), len(cpu._packed_codes)
    products = [cpu.bytes_linear(x, codes, torch.ones(48)) for _ in range(2)]
    assert torch.equal(*products)
    assert (packed, len(cpu._packed_codes)) == ([48], before + 1)
    del codes
    assert len(cpu._packed_codes) == before


class Sums(TorchDispatchMode):
    """How many numbers each of oneDNN's products of bytes gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.onednn.qlinear_pointwise:
            self.seen.append(len(args[0]) * len(args[4]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 48, 128, 256, 257])
def test_few_tokens_take_the_fast_product_to_the_same_bits(rows: int, dtype: torch.dtype) -> None:
    made = narrow("int", rows, 96)
    packed, scales = cpu.pack_int8(made.codes), made.scales[:, 0].float()
    x = torch.randn(300, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    inputs, factors = reference.quantize_rows(x, torch.int8)
    exact = ((inputs.double() @ made.codes.double().T).float() * scales).mul_(factors[:, None]).to(dtype)
    with Sums() as sums:
        for tokens in (1, 2, 5, 256, 257, 300):
            assert torch.equal(cpu.linear_int8(x[:tokens], packed, scales), exact[:tokens])
    assert min(sums.seen) > 256


@pytest.mark.skipif(not dispatch.cpu_capability().int8, reason="the processor multiplies no bytes")
def test_no_product_of_bytes_is_left_to_what_takes_them_one_by_one() -> None:
    script = (
        "import torch\nfrom compressor.kernels import cpu\n"
        "packed = cpu.pack_int8(torch.ones(64, 96, dtype=torch.int8))\n"
        "for tokens in (1, 5, 300):\n    cpu.linear_int8(torch.randn(tokens, 96), packed, torch.ones(64))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "ONEDNN_VERBOSE": "1"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    products = [line.split(",")[6] for line in done.stdout.splitlines() if ",exec,cpu,matmul," in line]
    assert len(products) == 4, "300 tokens come in two parts"
    assert not [name for name in products if name.startswith("ref")]


@pytest.mark.skipif(not dispatch.cpu_capability().int8, reason="the processor multiplies no bytes")
@pytest.mark.parametrize(("limit", "exact"), [("AVX2", False), ("AVX512_CORE_VNNI", True)])
def test_products_of_bytes_that_are_clipped_are_not_used(limit: str, exact: bool) -> None:
    script = "from compressor.kernels import dispatch\nprint(dispatch.cpu_capability().int8)\n"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "ONEDNN_MAX_CPU_ISA": limit}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(exact)]


@pytest.mark.skipif(not dispatch.cpu_capability().int8, reason="the processor multiplies no bytes")
def test_the_processor_is_known_whatever_the_defaults_are() -> None:
    script = (
        "import torch\nfrom compressor.kernels import dispatch\ntorch.set_default_dtype(torch.bfloat16)\n"
        "torch.set_default_device('meta')\nprint(dispatch.cpu_capability().int8)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]


def test_what_follows_the_product_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor, met: None) -> Any:
        return reference.linear_w8a8(x, codes, scales, met) + bias

    made = operator("int", 48, 64)
    linear = stored_linear(made.to_tensors(), made.scheme(), None, torch.bfloat16)
    linear.device_layout = True
    monkeypatch.setattr(ops, "quantized_rows_linear", kernel)
    x, up, down, bias = (torch.randn(*shape).bfloat16() for shape in ((5, 64), (48, 3), (5, 3), (48,)))
    expected = made.forward(x) + down @ up.T + bias
    torch.testing.assert_close(linear.affine(x, bias, up, down), expected, rtol=2e-2, atol=5e-2)


def test_fp8_is_decoded_exactly() -> None:
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn).view(8, 32)
    for room in (None, {}):
        found = cpu.decode_fp8(codes, torch.bfloat16, room)
        assert torch.equal(found.nan_to_num(7), codes.to(torch.bfloat16).nan_to_num(7))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_nearest_of_their_grid(pico: Pico, tmp_path: Path, kind: str) -> None:
    model = Checkpoint(pico(dtype=torch.float32))
    out = StoredModel(compress(model.path, tmp_path / "out", step(kind)))
    for name in out.schemes:
        found, weight = out.operator(name), model.tensor(name + ".weight")
        scales = found.to_tensors()["weight_scale"]
        torch.testing.assert_close(found.dense().abs().amax(1), weight.abs().amax(1))  # no code is wasted
        grid = torch.arange(-128, 128.0) if kind == "int" else ALL_FP8
        nearest = grid[(weight[:, :, None] / scales[:, :, None] - grid).abs().argmin(2)]
        assert ((found.dense() - weight).abs() <= (nearest * scales - weight).abs() * (1 + 1e-5) + 1e-9).all()


def test_stock_transformers_runs_fp8_as_we_do(pico: Pico, tmp_path: Path) -> None:
    out = compress(pico("qwen2", dtype=torch.float32), tmp_path / "out", step("float"))
    stock, report = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(logits(load(out, dtype=torch.float32)), logits(stock), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "kind", "format"),
    [
        ("llama", "int", "compressed-tensors"), ("llama", "float", "compressed-tensors"),
        ("mixtral", "float", "compressed-tensors"), ("qwen3_moe", "float", "compressed-tensors"),
        ("qwen3_moe", "int", "compressor"),
    ],
)  # fmt: skip
def test_stock_transformers_reads_the_weights(pico: Pico, tmp_path: Path, family: str, kind: str, format: str) -> None:
    out = compress(pico(family, dtype=torch.float32), tmp_path / "out", step(kind))
    assert json.loads((out / "compressor.json").read_text())["format"] == format
    assert verify(out) == []
    if format == "compressor":
        return
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    QuantizationConfig.model_validate(config)
    assert config["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"
    stock, report = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    state = stock.state_dict()
    stored = StoredModel(out)
    for name in stored.schemes:
        made = stored.operator(name)
        if ".experts." in name:
            index = int(name.split(".experts.")[1].split(".")[0])
            if name.endswith(("w2", "down_proj")):
                experts = name.split(".experts.")[0].replace("block_sparse_moe", "mlp")
                assert torch.equal(state[experts + ".experts.down_proj"][index], made.dense())
        else:
            found = state[name + ".weight"].float() * state[name + ".weight_scale"].view(-1, 1)
            assert torch.equal(found, made.dense())


def test_other_ways_of_eight_bits_are_refused(pico: Pico, tmp_path: Path) -> None:
    out = compress(pico(), tmp_path / "out", step("int"))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match="rounds its inputs in a way that is not read here: they are rounded as they come"
    ):
        load(out)


def test_it_composes(pico: Pico, tmp_path: Path) -> None:
    """Beside 4-bit linears, and on the factors of low-rank ones; never on what is compressed already."""
    mixed = compress(
        pico(), tmp_path / "a", step("int", ", targets: '*.mlp.*'") + ", {kind: rtn, group_size: 32, ignore: '*.mlp.*'}"
    )
    assert {scheme["kind"] for scheme in StoredModel(mixed).schemes.values()} == {"int", "w8a8"}
    assert json.loads((mixed / "compressor.json").read_text())["format"] == "compressor"
    text = "passes: [{kind: rtn, scheme: int8, targets: '*.mlp.*'}, {kind: rtn, ignore: '*.mlp.*'}]"
    plan = make_plan(parse_recipe(text), Skeleton(Checkpoint(pico()), torch.float32))
    assert plan.obstacle == "weights for products of 8 bits beside others"
    lorc = compress(pico(), tmp_path / "b", "{kind: lorc, ratio: .5, rank_step: 1}, " + step("float"))
    for folder in (mixed, lorc):
        plain = tmp_path / "plain"
        export_dense(folder, plain, overwrite=True)
        exact = logits(load(plain, dtype=torch.float32))
        assert (logits(load(folder, dtype=torch.float32)) - exact).norm() / exact.norm() < 0.1
    with pytest.raises(RecipeError, match=r"rtn cannot take .*, which an earlier pass has compressed"):
        compress(pico(), tmp_path / "c", "{kind: rtn, group_size: 32}, " + step("int"))


def test_which_gpus_multiply_bytes() -> None:
    hopper, ampere = (dispatch.GpuCapability("x", "cuda", arch, 100, 166912) for arch in (90, 80))
    for gpu, codes, dtype, rows, able in (
        (hopper, torch.int8, torch.float16, 64, True),
        (ampere, torch.int8, torch.bfloat16, 64, True),
        (ampere, torch.int8, torch.bfloat16, 60, False),
        (hopper, torch.float8_e4m3fn, torch.bfloat16, 64, True),
        (hopper, torch.float8_e4m3fn, torch.float16, 64, False),
        (ampere, torch.float8_e4m3fn, torch.bfloat16, 64, False),
    ):
        assert dispatch.has_w8a8(codes, dtype, rows, 128, gpu) is able


@pytest.mark.parametrize("kind", ["int", "float"])
def test_a_residual_is_stored_in_the_floats_of_the_model(kind: str) -> None:
    """Not in those of the codes, which are floats too."""
    weight = Dense(torch.empty(64, 96, dtype=torch.bfloat16, device="meta"))
    rounded = Rtn(kind="rtn", scheme=SCHEMES[kind]).plan("x", weight, {})
    planned = Eora(kind="eora", rank=4).plan("x", rounded, {})
    assert {planned.residual.up.weight.dtype, planned.residual.down.weight.dtype} == {torch.bfloat16}
