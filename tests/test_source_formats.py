"""Formats that models come in and that are not written here, against other decoders or by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import benchmark
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from compressor.compress.apply import Job, apply
from compressor.compress.output.verify import verify
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.errors import ModelError, RecipeError
from compressor.runtime.schemes import IntQuantized
from compressor.runtime.stored import StoredModel, open_model

Pico = Callable[..., Path]
IDS = torch.arange(40)[None]
GATE = "model.layers.0.mlp.gate_proj"
LINEAR = "_proj.weight"


@pytest.fixture
def folder(pico: Pico, tmp_path: Path) -> Path:
    """A pico Llama whose hidden width and MLP are of several blocks of 128, the last ones not whole."""
    wide = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 4, "head_dim": 48}
    return Path(shutil.copytree(pico("llama", **wide), tmp_path / "model"))


def restored(model: Path, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]) -> Path:
    """A folder with other tensors, and what config.json says of them."""
    save_file(dict(tensors), model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": dict(quantization)}))
    return model


def e4m3(weight: Tensor, scales: Tensor) -> Tensor:
    return (weight.float() / scales).clamp(-448, 448).to(torch.float8_e4m3fn)


def over(scales: Tensor, shape: torch.Size, block: int = 128) -> Tensor:
    """A scale for each number."""
    wide = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return wide[: shape[0], : shape[1]]


def in_fp8(model: Path, form: str) -> dict[str, Tensor]:
    """Its tensors in one of FP8's forms, and what the weights decode to by the words of that form's authors."""
    stored, decoded = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in load_file(model / "model.safetensors").items():
        if not name.endswith(LINEAR):
            stored[name] = tensor
            continue
        rows, columns = tensor.shape
        if form == "row":
            scales = (torch.rand(rows, 1) + 0.5) / 4096
            stored[name], stored[name + "_scale"] = e4m3(tensor, scales), scales
            decoded[name] = (stored[name].float() * scales).bfloat16()
        elif form.startswith("one"):
            scale = ((torch.rand(()) + 0.5) / 4096).bfloat16()
            stored[name], stored[name + "_scale_inv"] = e4m3(tensor, scale.float()), scale
            stored[name.replace(".weight", ".activation_scale")] = torch.tensor(0.02, dtype=torch.bfloat16)
            decoded[name] = (stored[name].float() * scale.float()).bfloat16()
        else:
            scales = (torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5) / 4096
            if form == "blocks, powers of two":
                scales = scales.log2().round().exp2()
            wide = over(scales, tensor.shape)
            stored[name] = e4m3(tensor, wide)
            stored[name + "_scale_inv"] = scales.to(torch.float8_e8m0fnu) if "powers" in form else scales
            decoded[name] = (stored[name].float() * wide).bfloat16()
    blocks = {"weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    told = {
        "row": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
        "one": {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": False},
        "blocks": blocks,
        "blocks, powers of two": {**blocks, "scale_fmt": "ue8m0"},
    }
    restored(model, stored, told[form])
    return decoded


@pytest.mark.parametrize("form", ["row", "one", "blocks", "blocks, powers of two"])
def test_fp8_decodes_bit_by_bit(folder: Path, form: str, tmp_path: Path) -> None:
    before = load_file(folder / "model.safetensors")
    decoded = in_fp8(folder, form)
    model = open_model(folder)
    assert set(model.tensors) == set(before)
    for name in model.tensors:
        assert model.tensors[name].dtype == torch.bfloat16
        assert torch.equal(model.tensor(name), decoded.get(name, before[name])), name
    with torch.no_grad():  # with rounded inputs, as it is meant to run
        logits, exact = (
            load(folder, dtype=torch.float32)(IDS).logits,
            run(decoded | before_without(before, decoded), folder),
        )
    assert (logits - exact).norm() / exact.norm() < 0.2
    text = "passes: [{kind: rtn, bits: 4, group_size: 32, ignore: ['*.q_proj']}]"
    apply(Job(parse_recipe(text), text, (), folder, tmp_path / "out", "pico"), lambda event: None)
    out = StoredModel(tmp_path / "out")
    assert verify(tmp_path / "out") == []
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(out.tensor(name), decoded[name])


def before_without(before: Mapping[str, Tensor], decoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in before.items() if name not in decoded}


def run(tensors: Mapping[str, Tensor], folder: Path) -> Tensor:
    """Logits of plain tensors in stock transformers."""
    plain = Path(shutil.copytree(folder, folder.with_name("plain")))
    save_file(dict(tensors), plain / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        found: Tensor = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(IDS).logits
    return found


def test_fp8_in_blocks_is_what_transformers_decodes(pico: Pico, tmp_path: Path) -> None:
    whole = {
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "head_dim": 64,
        "num_key_value_heads": 2,
    }
    model = Path(shutil.copytree(pico("llama", **whole), tmp_path / "model"))
    in_fp8(model, "blocks")
    config = FineGrainedFP8Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, quantization_config=config).state_dict()
    ours = open_model(model)
    for name in ours.tensors:
        assert torch.equal(ours.tensor(name), theirs[name]), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fmt": "e5m2"}, r"quantization_config\.fmt is 'e5m2', which is not read here"),
        ({"weight_block_size": [64, 128]}, "weight_block_size is .64, 128., which is not read here"),
        ({"transposed": True}, "transposed is True, which is not read here"),
    ],
)
def test_fp8_in_another_form_is_refused(folder: Path, change: dict[str, Any], words: str) -> None:
    in_fp8(folder, "blocks")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words):
        open_model(folder)


def test_fp8_whose_scales_do_not_fit_is_refused(folder: Path) -> None:
    in_fp8(folder, "blocks")
    tensors = load_file(folder / "model.safetensors")
    tensors[GATE + ".weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match="gate_proj is not whole"):
        open_model(folder)
    del tensors[GATE + ".weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"gate_proj\.weight is of 8 bits, and its scale is missing"):
        open_model(folder)


@pytest.mark.parametrize("form", ["nf4-nested", "nf4-plain", "fp4-nested", "int8"])
def test_what_bitsandbytes_stored_decodes_as_it_does(pico: Pico, tmp_path: Path, form: str) -> None:
    """data/bitsandbytes.safetensors is what bitsandbytes 0.50.2 makes of random matrices, and what it makes of that."""
    model = Path(shutil.copytree(pico(), tmp_path / "model"))
    made = load_file(Path(__file__).parent / "data" / "bitsandbytes.safetensors")
    parts = {name.removeprefix(form + "/"): tensor for name, tensor in made.items() if name.startswith(form + "/")}
    decoded, tensors = parts.pop("decoded"), load_file(model / "model.safetensors")
    before = tensors.pop(GATE + ".weight")
    assert before.shape == decoded.shape
    restored(
        model, tensors | {f"{GATE}.{part}": tensor for part, tensor in parts.items()}, {"quant_method": "bitsandbytes"}
    )
    found = StoredModel(model)
    assert torch.equal(found.tensor(GATE + ".weight"), decoded)
    assert found.stored_bytes(GATE + ".weight") == sum(part.nbytes for part in parts.values())
    assert bool(load(model)(IDS).logits.isfinite().all())
    parts["weight"] = parts["weight"][:-1]
    restored(
        model, tensors | {f"{GATE}.{part}": tensor for part, tensor in parts.items()}, {"quant_method": "bitsandbytes"}
    )
    with pytest.raises(ModelError, match="gate_proj is not whole"):
        StoredModel(model)


@pytest.mark.parametrize("older", [False, True])
def test_modelopts_nvfp4_decodes_as_it_is_described(pico: Pico, tmp_path: Path, older: bool) -> None:
    model = Path(shutil.copytree(pico(), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    rows, columns = tensors.pop(GATE + ".weight").shape
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    scales, whole = (torch.rand(rows, columns // 16) * 100).to(torch.float8_e4m3fn), torch.tensor(0.00031)
    made = {"weight": codes, "weight_scale": scales, "weight_scale_2": whole, "input_scale": torch.tensor(0.1)}
    told = {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head"], "group_size": 16}
    restored(model, tensors | {f"{GATE}.{part}": tensor for part, tensor in made.items()}, {} if older else told)
    if older:
        config = json.loads((model / "config.json").read_text())
        del config["quantization_config"], told["quant_method"]
        (model / "config.json").write_text(json.dumps(config))
        (model / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": told}))
    found = open_model(model).tensor(GATE + ".weight")
    half = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    for row, column in ((0, 0), (3, 17), (rows - 1, columns - 1), (50, 32)):
        byte = int(codes[row, column // 2])
        code = byte >> 4 if column % 2 else byte & 15
        value = half[code & 7] * (-1 if code & 8 else 1)
        wanted = torch.tensor(value) * (scales[row, column // 16].float() * whole)
        assert found[row, column] == wanted.bfloat16()


@pytest.mark.parametrize(("bits", "form", "symmetric"), [(4, "gptq", True), (4, "gptq", False), (3, "gptq_v2", False)])
def test_gptqs_columns_in_an_order_of_their_own(
    pico: Pico, tmp_path: Path, bits: int, form: str, symmetric: bool
) -> None:
    """As desc_act leaves them, and zero points as the older form has them."""
    model = Path(shutil.copytree(pico(), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    rows, columns = tensors.pop(GATE + ".weight").shape
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    middle = 2 ** (bits - 1)
    zeros = torch.full((rows, 2), middle) if symmetric else torch.randint(1, 2**bits, (rows, 2), generator=generator)
    scales = torch.rand(rows, 2, generator=generator).half()
    order = torch.randperm(columns, generator=generator) % 2
    made = {
        "qweight": words(codes.T, bits).contiguous(),
        "qzeros": words(zeros - int(form == "gptq"), bits).T.contiguous(),
        "scales": scales.T.contiguous(),
        "g_idx": order.int(),
    }
    told = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": True, "sym": symmetric}
    told["checkpoint_format"] = form
    restored(model, tensors | {f"{GATE}.{part}": tensor for part, tensor in made.items()}, told)
    found = StoredModel(model)
    wanted = (codes - zeros[:, order]).float() * scales.float()[:, order]
    assert torch.equal(found.tensor(GATE + ".weight"), wanted.to(found.tensors[GATE + ".weight"].dtype))
    made["g_idx"] = (order + 1).int()
    restored(model, tensors | {f"{GATE}.{part}": tensor for part, tensor in made.items()}, told)
    with pytest.raises(ModelError, match="g_idx names groups that it does not have"):
        StoredModel(model).tensor(GATE + ".weight")


def words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes as a stream of bits along the first dimension, in words of 32 of them."""
    stream = (codes[:, None].long() >> torch.arange(bits)[None, :, None] & 1).flatten(0, 1)
    grouped = stream.unflatten(0, (-1, 32)) << torch.arange(32)[None, :, None]
    total = grouped.sum(1)
    return torch.where(total >= 2**31, total - 2**32, total).int()


def test_a_gptq_folder_in_plain_order_keeps_its_form(pico: Pico, tmp_path: Path) -> None:
    text = "output: {format: gptq}\npasses: [{kind: rtn, bits: 4, group_size: 32}]"
    apply(Job(parse_recipe(text), text, (), pico(), tmp_path / "out", "pico"), lambda event: None)
    assert isinstance(StoredModel(tmp_path / "out").operator(GATE), IntQuantized)


@pytest.mark.parametrize(("kind", "static"), [("int", False), ("float", False), ("float", True)])
def test_compressed_tensors_with_one_scale(pico: Pico, tmp_path: Path, kind: str, static: bool) -> None:
    model = Path(shutil.copytree(pico(), tmp_path / "model"))
    before = load_file(model / "model.safetensors")
    tensors, decoded = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in before.items():
        if not name.endswith(LINEAR):
            tensors[name] = tensor
            continue
        scale = (tensor.abs().max() / (127 if kind == "int" else 448)).bfloat16().view(1)
        exact = tensor.float() / scale.float()
        codes = exact.round().clamp(-128, 127).to(torch.int8) if kind == "int" else exact.to(torch.float8_e4m3fn)
        tensors |= {name: codes, name + "_scale": scale}
        if static:
            tensors[name.replace(".weight", ".input_scale")] = torch.tensor([0.02], dtype=torch.bfloat16)
        decoded[name] = (codes.float() * scale.float()).bfloat16()
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "tensor", "dynamic": False}
    inputs = {**weights, "strategy": "tensor" if static else "token", "dynamic": not static}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    told = {"quant_method": "compressed-tensors", "format": f"{kind}-quantized", "ignore": ["lm_head"]}
    restored(model, tensors, {**told, "config_groups": {"group_0": group}, "quantization_status": "compressed"})
    ours = StoredModel(model)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, weight in decoded.items():
        assert torch.equal(ours.tensor(name), weight)
    with torch.no_grad():
        found, reference = load(model, dtype=torch.float32)(IDS).logits, theirs(IDS).logits
    assert (found - reference).norm() / reference.norm() < 0.05


def test_gpt_oss_as_it_is_published(tmp_path: Path) -> None:
    """Experts in MXFP4, all of a block in one tensor; against transformers' own decoder."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    families = benchmark("families")
    model = families.build("gpt_oss", tmp_path / "model")
    before = load_file(model / "model.safetensors")
    tensors, decoded = dict[str, Tensor](), dict[str, Tensor]()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in before.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(119, 124, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
        tensors |= {name + "_blocks": blocks, name + "_scales": scales}
        decoded[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert decoded[name].shape == tensor.shape
    restored(model, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    source = StoredModel(model)
    for name, weight in decoded.items():
        where, _, part = name.rpartition(".")
        for number in range(len(weight)):
            for place, linear in enumerate(("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)):
                own = weight[number].T[place::2] if part == "gate_up_proj" else weight[number].T
                assert torch.equal(source.tensor(f"{where}.{number}.{linear}.weight"), own.to(source.dtype))
    assert source.nbytes < 1.05 * sum(tensor.nbytes for tensor in tensors.values())
    reference = run(tensors_without(tensors, "_blocks", "_scales") | decoded, model)
    with torch.no_grad():
        found = load(model, dtype=torch.float32)(IDS).logits
    assert (found - reference).norm() / reference.norm() < 1e-4
    families.compress(model, tmp_path / "out", "{kind: gptq, bits: 4, group_size: 32, targets: ['*.self_attn.*']}")
    out = StoredModel(tmp_path / "out")
    assert out.operator("model.layers.1.mlp.experts.2.up_proj").description == "mxfp4"
    assert verify(tmp_path / "out") == []
    families.compress(model, tmp_path / "four", "{kind: gptq, bits: 4, group_size: 32}")
    assert verify(tmp_path / "four") == []


def tensors_without(tensors: Mapping[str, Tensor], *endings: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(endings)}


def test_fp8_in_blocks_whose_rows_are_not_whole_is_written_as_it_is_published(folder: Path, tmp_path: Path) -> None:
    text = "passes: [{kind: rtn, scheme: fp8-block, ignore: ['*.k_proj']}]"
    plan = apply(Job(parse_recipe(text), text, (), folder, tmp_path / "out", "pico"), lambda event: None)
    assert plan.format.name == "fp8"
    assert plan.readers == ("compressor",)  # 192 columns are no multiple either
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert told["weight_block_size"] == [128, 128]
    assert {"lm_head", "model.layers.0.self_attn.k_proj"} <= set(told["modules_to_not_convert"])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scales = tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    codes = tensors["model.layers.1.mlp.up_proj.weight"]
    assert (codes.dtype, scales.shape) == (torch.float8_e4m3fn, (3, 2))
    found = open_model(tmp_path / "out").tensor("model.layers.1.mlp.up_proj.weight")
    assert torch.equal(found, (codes.float() * over(scales.float(), codes.shape)).bfloat16())
    before = load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert (found.float() - before.float()).norm() / before.float().norm() < 0.04
    assert verify(tmp_path / "out") == []
    text = "output: {format: fp8}\npasses: [{kind: rtn, bits: 4, group_size: 32}]"
    with pytest.raises(RecipeError, match="whose readers cannot take"):
        apply(Job(parse_recipe(text), text, (), folder, tmp_path / "no", "pico"), lambda event: None)


def in_blocks(folder: Path) -> dict[str, Tensor]:
    """All matrices of its blocks in FP8, routers and indexers too: what they decode to."""
    stored, decoded = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name] = tensor
        inside = ".layers." in name and ".mlp.gate." not in name
        if tensor.dim() == 2 and inside and name.endswith(".weight"):
            scales = (torch.rand(-(-tensor.shape[0] // 128), -(-tensor.shape[1] // 128)) + 0.5) / 4096
            wide = over(scales, tensor.shape)
            stored[name], stored[name + "_scale_inv"] = e4m3(tensor, wide), scales
            decoded[name] = (stored[name].float() * wide).to(tensor.dtype)
    blocks = {"weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    restored(folder, stored, blocks)
    return decoded


@pytest.mark.parametrize("extra", ["", "output: {format: compressor}\n"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_what_no_pass_can_rewrite_is_carried_in_its_form_and_run(
    pico: Pico, tmp_path: Path, family: str, extra: str
) -> None:
    """A router in FP8, and layers that predict more tokens behind the last block."""
    model = Path(shutil.copytree(pico(family), tmp_path / "model"))
    if family == "deepseek_v3":
        tensors = load_file(model / "model.safetensors")
        more = {
            name.replace(".layers.1.", ".layers.2."): tensor.clone()
            for name, tensor in tensors.items()
            if ".layers.1." in name
        }
        save_file(tensors | more, model / "model.safetensors", {"format": "pt"})
    decoded = in_blocks(model)
    text = extra + "passes: [{kind: rtn, scheme: fp8-block, targets: ['*.v_proj', '*.kv_b_proj']}]"
    apply(Job(parse_recipe(text), text, (), model, tmp_path / "out", "pico"), lambda event: None)
    assert verify(tmp_path / "out") == []
    out = StoredModel(tmp_path / "out")
    rewritten = ("v_proj.weight", "kv_b_proj.weight")
    assert all(
        torch.equal(out.tensor(name), weight) for name, weight in decoded.items() if not name.endswith(rewritten)
    )
    for folder in (model, tmp_path / "out"):
        with torch.no_grad():
            assert bool(load(folder)(IDS).logits.isfinite().all())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocksize": 128}, "weight.absmax has 96 numbers, not 48"),
        ({"blocksize": "64"}, "its blocks are of '64' numbers"),
        ({"nested_blocksize": 10**13, "nested_offset": None}, "nested_offset is None"),
        ({"nested_offset": None, "blocksize": None}, "gate_proj is not whole"),
    ],
)
def test_a_damaged_state_of_bitsandbytes_is_refused(
    pico: Pico, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    model = Path(shutil.copytree(pico(), tmp_path / "model"))
    made = load_file(Path(__file__).parent / "data" / "bitsandbytes.safetensors")
    parts = {name.removeprefix("nf4-nested/"): part for name, part in made.items() if name.startswith("nf4-nested/")}
    state = "weight.quant_state.bitsandbytes__nf4"
    told = json.loads(bytes(parts[state].tolist())) | change
    parts[state] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    del parts["decoded"]
    tensors = load_file(model / "model.safetensors")
    del tensors[GATE + ".weight"]
    restored(
        model, tensors | {f"{GATE}.{part}": tensor for part, tensor in parts.items()}, {"quant_method": "bitsandbytes"}
    )
    with pytest.raises(ModelError, match=words):
        StoredModel(model)
