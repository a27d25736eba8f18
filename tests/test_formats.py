"""Outputs: what stands on disk, who reads it, and who must stop instead of guessing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from compressor.compress.apply import Job, apply
from compressor.compress.output.verify import export_dense, verify
from compressor.compress.passes.linear.rtn import Rtn
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.errors import CompressorError, ModelError, RecipeError
from compressor.runtime.formats import NATIVE, Around, choose_format
from compressor.runtime.schemes import Dense, IntQuantized
from compressor.runtime.stored import StoredModel

Pico = Callable[..., Path]
IDS = torch.arange(40)[None]


def compress(model: Path, out: Path, *passes: str, extra: str = "") -> Path:
    text = extra + "passes:\n" + "".join(f"  - {step}\n" for step in passes)
    apply(Job(parse_recipe(text), text, (), model, out, str(model)), lambda event: None)
    return out


def logits(model) -> torch.Tensor:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return model(IDS).logits


def decoded_reference(out: Path) -> torch.Tensor:
    """Logits of the plain folder that an output decodes to, in stock transformers."""
    plain = out.with_name(out.name + "-plain")
    export_dense(out, plain)
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    return logits(reference)


EXACT = {"dtype": torch.float32}  # scales and decoded weights are stored without another rounding
FAMILIES = ["llama", "qwen2", "mixtral", "phimoe", "glm4_moe", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_reads_what_we_write(pico: Pico, tmp_path: Path, family: str) -> None:
    out = compress(pico(family, **EXACT), tmp_path / "out", "{kind: rtn, bits: 4, group_size: 32}")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == family
    QuantizationConfig.model_validate(config["quantization_config"])
    model, report = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    reference = decoded_reference(out)
    torch.testing.assert_close(logits(model), reference, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(load(out, dtype=torch.float32)), reference, rtol=1e-4, atol=1e-4)
    assert verify(out) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_both_loaders_agree_on_bf16_scales(pico: Pico, tmp_path: Path, family: str) -> None:
    out = compress(pico(family), tmp_path / "out", "{kind: rtn, bits: 3, group_size: 32}")
    stock = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    # transformers decodes experts to the scales' dtype, where the product of code and scale is rounded once more.
    tolerance = 1e-2 if "experts" in str(StoredModel(out).schemes) else 1e-6
    assert (logits(load(out, dtype=torch.float32)) - stock).norm() / stock.norm() < tolerance


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_every_width_the_table_claims_is_read_by_transformers(
    pico: Pico, tmp_path: Path, bits: int, group_size: int
) -> None:
    step = f"{{kind: rtn, bits: {bits}, group_size: {group_size}}}"
    out = compress(pico(**EXACT), tmp_path / "out", step, extra="output: {format: compressed-tensors}\n")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(logits(model), decoded_reference(out))


def test_two_schemes_in_one_model(pico: Pico, tmp_path: Path) -> None:
    steps = (
        "{kind: rtn, bits: 4, group_size: 32, ignore: ['*.v_proj']}",
        "{kind: rtn, bits: 8, targets: ['*.v_proj']}",
    )
    out = compress(pico(**EXACT), tmp_path / "out", *steps)
    assert {scheme["bits"] for scheme in StoredModel(out).schemes.values()} == {4, 8}
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(logits(model), decoded_reference(out))


@pytest.mark.parametrize(
    ("step", "family"),
    [
        ("{kind: rtn, bits: 4, group_size: 64}", "llama"),  # 96 columns: a ragged last group
        ("{kind: rtn, bits: 3, group_size: 32, symmetric: false}", "llama"),
        ("{kind: rtn, bits: 4, group_size: 32, symmetric: false}", "mixtral"),
    ],
)
def test_what_no_one_else_can_say_goes_native(pico: Pico, tmp_path: Path, step: str, family: str) -> None:
    out = compress(pico(family, **EXACT), tmp_path / "out", step)
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["base_model_type"]) == ("compressor", family)
    reference = decoded_reference(out)
    torch.testing.assert_close(logits(load(out, dtype=torch.float32)), reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)), reference)
    assert verify(out) == []
    with pytest.raises(RecipeError, match="whose readers cannot take"):
        compress(pico(family), tmp_path / "x", step, extra="output: {format: compressed-tensors}\n")
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x.work").exists()


@pytest.fixture(scope="module")
def native(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(pico(), tmp_path_factory.mktemp("native") / "out", "{kind: rtn, bits: 4, group_size: 64}")


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_a_native_folder_takes_the_options_of_transformers(native: Path, device: Any) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(
        native, dtype="float32", device_map=device, attn_implementation="eager", output_loading_info=True,
        revision="main", low_cpu_mem_usage=True, quantization_config=None,
    )  # fmt: skip
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "eager"
    assert set(report) == {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}
    assert not any(report.values())
    config = AutoConfig.from_pretrained(native)
    config._attn_implementation = "eager"
    again = AutoModelForCausalLM.from_pretrained(native, config=config, torch_dtype="auto")
    assert (again.dtype, again.config._attn_implementation) == (torch.bfloat16, "eager")
    sdpa = AutoModelForCausalLM.from_pretrained(native.parent, subfolder=native.name, dtype=torch.float32)
    torch.testing.assert_close(logits(sdpa), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"load_in_8bit": True}, "not loaded with load_in_8bit; leave that out"),
        ({"num_hidden_layers": 1, "max_memory": {}}, "not loaded with max_memory, num_hidden_layers; leave"),
        ({"experts_implementation": "eager"}, "not loaded with experts_implementation; leave"),
        ({"device_map": {"model": "cpu", "lm_head": "meta"}}, "lies on one device; name that"),
        ({"device_map": "balanced"}, "device_map='balanced': a compressed model lies on one device"),
    ],
)
def test_what_a_native_folder_does_not_understand_is_refused(native: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        AutoModelForCausalLM.from_pretrained(native, **options)


def elsewhere(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process that imports nothing of ours by itself."""
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_a_process_without_compressor_stops_at_a_native_folder(native: Path, tmp_path: Path) -> None:
    code = f"from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained({str(native)!r})"
    done = elsewhere(code, tmp_path)
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr


def test_trusting_its_code_opens_a_native_folder(native: Path, tmp_path: Path) -> None:
    """Wherever compressor is installed, without importing it first: the model, its tokenizer, and a pipeline."""
    manifest = json.loads((native / "compressor.json").read_text())
    assert "modeling_compressor.py" in manifest["files"]
    assert verify(native) == []
    code = f"""
import sys, torch, transformers
assert "compressor" not in sys.modules
model = transformers.AutoModelForCausalLM.from_pretrained({str(native)!r}, trust_remote_code=True, dtype="float32")
assert "compressor.runtime.schemes.linear" in sys.modules
torch.save(model(torch.arange(40)[None]).logits, "logits.pt")
"""
    done = elsewhere(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(load(native, "cpu", torch.float32)))
    code = f"""
from transformers import pipeline
print(pipeline("text-generation", {str(native)!r}, trust_remote_code=True, device="cpu")("import os", max_new_tokens=3))
"""
    done = elsewhere(code, tmp_path)
    assert "generated_text" in done.stdout, done.stderr


def test_code_of_the_model_itself_comes_back_from_a_native_folder(pico: Pico, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(pico(), model)
    config = json.loads((model / "config.json").read_text()) | {"auto_map": {"AutoConfig": "theirs.TheirConfig"}}
    (model / "config.json").write_text(json.dumps(config))
    out = compress(model, tmp_path / "out", "{kind: rtn, bits: 4, group_size: 64}")
    assert StoredModel(out).config["auto_map"] == config["auto_map"]
    assert "base_auto_map" not in StoredModel(out).config


def test_the_files_hold_what_the_plan_promised(pico: Pico, tmp_path: Path) -> None:
    out = compress(pico(), tmp_path / "out", "{kind: rtn, bits: 4, group_size: 32}")
    stored = StoredModel(out)
    manifest = json.loads((out / "compressor.json").read_text())
    assert manifest["bytes"]["after"] == stored.nbytes
    header = 2000 + 200 * len(stored.stored)
    assert stored.nbytes < sum(path.stat().st_size for path in out.glob("*.safetensors")) < stored.nbytes + header
    operator = stored.operator("model.layers.0.mlp.up_proj")
    assert isinstance(operator, IntQuantized)
    packed = stored.stored["model.layers.0.mlp.up_proj.weight_packed"]
    assert packed.nbytes * 8 == 4 * 96 * 64


def test_small_shards_have_an_index_and_load(pico: Pico, tmp_path: Path) -> None:
    step = "{kind: rtn, bits: 4, group_size: 32}"
    out = compress(pico(), tmp_path / "out", step, extra="output: {shard_size: 0.02MB}\n")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    whole = compress(pico(), tmp_path / "whole", step)
    sharded, single = (logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in (out, whole))
    assert torch.equal(sharded, single)


def test_damage_is_found(pico: Pico, tmp_path: Path) -> None:
    out = compress(pico(), tmp_path / "out", "{kind: rtn, bits: 4, group_size: 32}")
    file = out / "model.safetensors"
    for name in ("model.safetensors.index.json", "chat_template.jinja", "other.safetensors"):
        planted = out / name  # transformers would take them for a part of the model
        planted.write_bytes(b"{}")
        assert verify(out) == [f"{planted}: is not in compressor.json, and readers may take it for a part of the model"]
        planted.unlink()
    (out / "notes.md").write_text("mine")
    assert verify(out) == []
    raw = bytearray(file.read_bytes())
    raw[-10] ^= 1
    file.write_bytes(raw)
    assert verify(out) == [f"{file}: its hash is not the one in compressor.json; it was changed or damaged"]
    file.unlink()
    assert verify(out) == [f"{file}: missing"]
    (out / "compressor.json").unlink()
    with pytest.raises(CompressorError, match=r"no compressor\.json"):
        verify(out)


def test_a_newer_native_version_is_refused(pico: Pico, tmp_path: Path) -> None:
    out = compress(pico(), tmp_path / "out", "{kind: rtn, bits: 4, group_size: 64}")
    config = json.loads((out / "config.json").read_text())
    config["compressor"]["version"] = 2
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressorError, match="format version 2, but this release reads 1"):
        load(out)


def test_readers_are_those_of_every_tensor() -> None:
    codes = torch.zeros(32, 64, dtype=torch.int8)
    operators = {
        str(bits): IntQuantized(codes, torch.ones(32, 2, dtype=torch.bfloat16), None, bits, 32) for bits in (4, 8, 3)
    }
    four, eight = {"4": operators["4"]}, {"8": operators["8"]}
    assert choose_format("auto", four)[1] == ("compressor", "transformers", "vLLM on CPUs", "vLLM on GPUs")
    assert choose_format("auto", four | eight)[1] == ("compressor", "transformers", "vLLM on GPUs")
    by_row = {"4": IntQuantized(codes, torch.ones(32, 1, dtype=torch.bfloat16), None, 4, -1)}  # of 64 columns
    assert choose_format("auto", by_row)[1] == ("compressor", "transformers", "vLLM on GPUs")
    assert choose_format("auto", operators)[1] == ("compressor", "transformers")
    assert choose_format("compressor", operators) == (NATIVE, ("compressor",), "")
    odd = {
        "4": IntQuantized(codes[:16], torch.ones(16, 2, dtype=torch.bfloat16), None, 4, 32)
    }  # its CPU kernel wants 32
    assert choose_format("auto", odd)[1] == ("compressor", "transformers", "vLLM on GPUs")


@pytest.mark.parametrize("step", ["{kind: rtn, bits: 4}", "{kind: gptq, bits: 4}"])
def test_the_trained_moe_reloads_in_stock_transformers(tmp_path: Path, step: str) -> None:
    """Every expert under its original name: no missing or unexpected key, and the same logits."""
    model = Path(__file__).resolve().parent.parent / "examples" / "tiny-moe"
    out = compress(model, tmp_path / "out", step, extra="data: {samples: 8, sequence_length: 128}\n")
    stock, report = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert sum(".experts." in name for name in StoredModel(out).schemes) == 4 * 8 * 3
    expected = logits(stock)  # which decodes the rest
    stored, weights = StoredModel(out), stock.state_dict()
    for name in stored.schemes:  # stock transformers rounds decoded experts to bfloat16
        block, expert, inner = name.partition(".experts.")
        if expert:
            number, _, part = inner.partition(".")
            fused = weights[f"{block}.experts.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"][int(number)]
            rows = {"gate_proj": slice(len(fused) // 2), "up_proj": slice(len(fused) // 2, None)}.get(part, slice(None))
            assert torch.equal(fused[rows], stored.operator(name).dense(torch.bfloat16).float()), name
        else:
            assert torch.equal(weights[f"{name}.weight"], stored.operator(name).dense(torch.float32)), name
    found = logits(load(out, dtype=torch.float32))
    off = ((expected - found).norm(dim=-1) / found.norm(dim=-1)).flatten()
    assert float(off.median()) < 3e-3
    assert int((off > 1e-2).sum()) <= 1  # where two experts are nearly level, that rounding sends a token elsewhere


FOUR, EIGHT = "{kind: rtn, bits: 4, group_size: 32, ", "{kind: rtn, bits: 8, group_size: 32, "
ATTENTION, EXPERTS = "'*.self_attn.*'", "'*.experts.*'"


@pytest.mark.parametrize(
    ("passes", "expert", "dropped"),
    [
        ({"bits": 4, "group_size": 32}, False, set()),
        ({"bits": 4, "group_size": 32}, True, {"vLLM on CPUs"}),
        ({"scheme": "int-a8", "group_size": 32}, False, set()),
        ({"scheme": "int8"}, False, set()),
        ({"scheme": "fp8"}, False, set()),
        ({"scheme": "fp8"}, True, {"vLLM on CPUs"}),
        ({"scheme": "nvfp4a16"}, False, {"vLLM on CPUs"}),
        ({"scheme": "nvfp4a16"}, True, {"vLLM on CPUs", "transformers"}),
    ],
)
def test_who_reads_is_who_was_seen_to(passes: dict[str, object], expert: bool, dropped: set[str]) -> None:
    everyone = {"compressor", "transformers", "vLLM on CPUs", "vLLM on GPUs"}
    plain = {"q": Dense(torch.empty(32, 128, device="meta"))}
    made = {"q": Rtn.model_validate({"kind": "rtn", **passes}).plan("q", plain["q"], plain)}
    chosen, readers, _ = choose_format("auto", made, Around(experts=frozenset({"q"} if expert else ())))
    assert chosen.name == "compressed-tensors"
    assert set(readers) == everyone - dropped


@pytest.mark.parametrize(
    ("family", "passes", "format"),
    [
        ("qwen3_moe", (FOUR + f"ignore: [{ATTENTION}]}}", EIGHT + f"targets: [{ATTENTION}]}}"), "compressed-tensors"),
        ("mixtral", (EIGHT + f"targets: [{ATTENTION}]}}", FOUR + f"targets: [{EXPERTS}]}}"), "compressed-tensors"),
        ("qwen3_moe", (FOUR + f"targets: [{ATTENTION}]}}",), "compressor"),
        ("qwen2_moe", (FOUR + f"targets: [{EXPERTS}]}}",), "compressed-tensors"),
        ("qwen3_moe", (FOUR + "ignore: ['*.0.self_attn.q_proj']}",), "compressed-tensors"),
        ("qwen3_moe", (FOUR + "ignore: ['*.layers.0.*']}", EIGHT + "targets: ['*.layers.0.*']}"), "compressor"),
        ("qwen3_moe", (FOUR + "ignore: ['*.layers.0.*']}",), "compressor"),
        ("qwen3_moe", (FOUR + "ignore: ['*.experts.1.*']}",), "compressor"),
        ("mixtral", (FOUR + "ignore: ['*.w2']}", EIGHT + "targets: ['*.w2']}"), "compressor"),
        ("qwen2_moe", (FOUR + "ignore: ['*.q_proj']}", EIGHT + "targets: ['*.q_proj']}"), "compressor"),
        ("llama", (FOUR + "ignore: ['*.layers.0.*']}", EIGHT + "targets: ['*.layers.0.*']}"), "compressed-tensors"),
    ],
)
def test_mixtures_are_written_only_for_readers_that_decode_them(
    pico: Pico, tmp_path: Path, family: str, passes: tuple[str, ...], format: str
) -> None:
    out = compress(pico(family, **EXACT), tmp_path / "out", *passes)
    assert json.loads((out / "compressor.json").read_text())["format"] == format
    model, report = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), {}
    if format == "compressed-tensors":
        model, report = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    reference = decoded_reference(out)
    torch.testing.assert_close(logits(model), reference, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(load(out, dtype=torch.float32)), reference, rtol=1e-4, atol=1e-4)


def test_readers_that_fuse_linears_need_one_scheme_for_them() -> None:
    make = {
        bits: IntQuantized(torch.zeros(16, 64, dtype=torch.int8), torch.ones(16, 1), None, bits, 64) for bits in (4, 8)
    }
    linears = {"q": make[4], "k": make[8]}
    assert "vLLM on GPUs" in choose_format("auto", linears, Around(fused=[["q"], ["k"]]))[1]
    assert choose_format("auto", linears, Around(fused=[["q", "k"]]))[1] == ("compressor", "transformers")
    odd = {"q": IntQuantized(torch.zeros(16, 64, dtype=torch.int8), torch.ones(16, 4), None, 4, 16)}
    assert choose_format("auto", odd)[1] == ("compressor", "transformers")


def test_an_exported_native_folder_names_its_architecture(pico: Pico, tmp_path: Path) -> None:
    out = compress(pico(), tmp_path / "out", "{kind: rtn, bits: 4, group_size: 64}")
    export_dense(out, tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_loaded_model_is_not_saved_without_its_linears(pico: Pico, tmp_path: Path) -> None:
    model = load(compress(pico(), tmp_path / "out", "{kind: rtn, bits: 4, group_size: 32}"))
    with pytest.raises(CompressorError, match="compressor export"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_manifest_covers_every_file(pico: Pico, tmp_path: Path) -> None:
    out = compress(pico(), tmp_path / "out", "{kind: rtn, bits: 4, group_size: 32}")
    listed = json.loads((out / "compressor.json").read_text())["files"]
    present = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert present - set(listed) == {"compressor.json", "report/timings.jsonl"}
    (out / "tokenizer.json").write_text("")
    assert "tokenizer.json: its hash is not" in verify(out)[0]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_that_are_not_plain_floats_are_refused(pico: Pico, tmp_path: Path, dtype: torch.dtype) -> None:
    model = tmp_path / "model"
    shutil.copytree(pico(), model)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[name + ".weight"] = tensors[name + ".weight"].to(dtype)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match=f"rtn cannot take {name}: it is stored as"):
        compress(model, tmp_path / "out", "{kind: rtn, bits: 4, group_size: 32}")


def foreign(pico: Pico, out: Path, config: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    """A 4-bit folder in which another tool might have put more: paths into config.json, and tensors of one linear."""
    compress(pico(), out, "{kind: rtn, bits: 4, group_size: 32}")
    content = json.loads((out / "config.json").read_text())
    for path, value in config.items():
        inner = content["quantization_config"]
        *parents, last = path.split(".")
        for parent in parents:
            inner = inner["config_groups"]["group_0"] if parent == "group" else inner[parent]
        inner[last] = value
    (out / "config.json").write_text(json.dumps(content))
    weights = load_file(out / "model.safetensors")
    save_file(weights | tensors, out / "model.safetensors", {"format": "pt"})
    return out


LINEAR = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("config", "suffix", "match"),
    [
        ({}, "weight_g_idx", f"{LINEAR} has a tensor weight_g_idx, which is not read here"),
        ({}, "weight_zero_point", f"{LINEAR} has a tensor weight_zero_point"),
        ({}, "input_scale", f"{LINEAR} has a tensor input_scale"),
        ({"group.weights.actorder": "group"}, "", r"group_0\.weights\.actorder is 'group', which is not read here"),
        ({"group.weights.block_structure": [128, 128]}, "", r"weights\.block_structure is \[128, 128\]"),
        ({"group.weights.scale_dtype": "torch.uint8"}, "", r"weights\.scale_dtype is 'torch.uint8'"),
        ({"group.weights.sign": True}, "", r"weights\.sign is True"),
        ({"group.weights.strategy": "tensor", "group.weights.group_size": None}, "", "need scales by group or channel"),
        ({"group.weights.strategy": None, "group.weights.group_size": None}, "", "need scales by group or channel"),
        (
            {"group.input_activations": {"num_bits": 8, "dynamic": True}},
            "",
            "rounds its inputs in a way that is not read here",
        ),
        ({"group.input_activations": {"num_bits": 8, "rotated": "yes"}}, "", r"input_activations\.rotated is 'yes'"),
        ({"group.output_activations": {"num_bits": 8}}, "", r"group_0\.output_activations is {'num_bits': 8}"),
        ({"group.format": "float-quantized"}, "", r"group_0\.format is 'float-quantized'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "", r"quantization_config\.kv_cache_scheme is {'num_bits': 8}"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "", r"quantization_config\.transform_config is"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "", r"sparsity_config\.format is 'sparse-24-bitmask'"),
        ({"moe_sparsity_config": {"method": "prune"}}, "", r"quantization_config\.moe_sparsity_config is"),
    ],
)
def test_what_would_change_the_weights_is_refused(
    pico: Pico, tmp_path: Path, config: dict[str, object], suffix: str, match: str
) -> None:
    tensors = {f"{LINEAR}.{suffix}": torch.zeros(64, dtype=torch.int32)} if suffix else {}
    with pytest.raises(ModelError, match=match) as caught:
        load(foreign(pico, tmp_path / "out", config, tensors))
    assert "\n" not in str(caught.value)


def test_a_linear_in_another_format_is_refused(pico: Pico, tmp_path: Path) -> None:
    out = foreign(pico, tmp_path / "out", {}, {"lm_head.weight_scale": torch.ones(128, 1)})
    with pytest.raises(ModelError, match=r"lm_head\.weight_scale is of a linear in another format"):
        load(out)


def test_what_changes_nothing_is_read(pico: Pico, tmp_path: Path) -> None:
    """All that compressed-tensors has written over the years beside what matters."""
    arguments = {
        "actorder": "static", "block_structure": None, "observer": "minmax", "observer_kwargs": {"averaging": 1},
        "scale_dtype": None, "zp_dtype": "torch.int8",
    }  # fmt: skip
    group = {"format": "pack-quantized", "input_activations": None, "output_activations": None}
    folder = {
        "version": "0.12.2", "sparsity_config": {}, "transform_config": {}, "kv_cache_scheme": None,
        "global_compression_ratio": 1.5, "quantization_status": "frozen", "moe_sparsity_config": None,
    }  # fmt: skip
    changes = {f"group.weights.{key}": value for key, value in arguments.items()}
    changes |= {f"group.{key}": value for key, value in group.items()} | folder
    found = logits(load(foreign(pico, tmp_path / "out", changes, {})))
    plain = logits(load(compress(pico(), tmp_path / "plain", "{kind: rtn, bits: 4, group_size: 32}")))
    assert torch.equal(found, plain)
    dense = {"format": "dense", "global_sparsity": 0.1, "sparsity_structure": "unstructured"}
    assert torch.equal(logits(load(foreign(pico, tmp_path / "b", {"sparsity_config": dense}, {}))), plain)


def test_a_damaged_description_is_said(pico: Pico, tmp_path: Path) -> None:
    out = compress(pico(), tmp_path / "out", "{kind: rtn, bits: 4, group_size: 32}")
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["config_groups"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressorError, match="its description of the compressed weights is damaged"):
        load(out)
    (out / "compressor.json").write_text("{}")
    with pytest.raises(CompressorError, match=r"compressor\.json: not readable"):
        verify(out)
