"""Models that come as GGUF files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from pico import at_once
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from compressor.compress.apply import Job, apply
from compressor.compress.plan import Plan
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.errors import ModelError, ResourceError
from compressor.runtime.hub import resolve_model
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.stored import open_model

Pico = Callable[..., Path]
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "gemma2": "gemma2"}
TIED = {"gemma2": {"tie_word_embeddings": True}}
IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def turned(weight: Tensor, heads: int) -> Tensor:
    """Rows as llama.cpp's converter puts those of queries and keys of a Llama."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def written(folder: Path, path: Path, kind: Kind) -> Path:
    """A folder as llama.cpp's converter and quantizer make it."""
    model = Checkpoint(folder)
    config, arch = model.config, ARCHITECTURES[model.config["model_type"]]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names, writer = gguf.get_tensor_name_map(number, config["num_hidden_layers"]), GGUFWriter(path, arch)
    writer.add_name("a model")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"].get("rope_theta", 10000.0))
    if arch == "qwen3moe":
        writer.add_expert_count(config.get("num_local_experts", config.get("num_experts")))
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_tokenizer_model("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    writer.add_token_list([tokenizer.convert_ids_to_tokens(number) for number in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (config["vocab_size"] - 1))
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_eos_token_id(0)
    experts: dict[str, list[Tensor]] = {}
    for name in sorted(model.tensors, key=lambda name: [int(n) if n.isdigit() else 0 for n in name.split(".")]):
        weight = model.tensor(name).float()
        plain = ".".join(part for part in name.split(".") if name.find("experts") < 0 or not part.isdigit())
        plain = (
            name
            if "experts" not in name
            else f"model.layers.{name.split('.')[2]}.mlp.experts.{name.split('.')[-2]}.weight"
        )
        there = names.get_name(plain, try_suffixes=(".weight", ".bias"))
        assert there is not None, plain
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            weight = turned(weight, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        if arch == "gemma2" and "norm" in name:
            weight = weight + 1
        if "experts" in name:
            experts.setdefault(there, []).append(weight)
        else:
            add(writer, there, weight, kind)
    for there, members in experts.items():
        add(writer, there, torch.stack(members), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: GGUFWriter, name: str, weight: Tensor, kind: Kind) -> None:
    if weight.dim() == 1 or kind == Kind.F32 or "gate_inp" in name:
        writer.add_tensor(name, weight.numpy())
    elif kind == Kind.F16:
        writer.add_tensor(name, weight.numpy().astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quantize(weight.numpy(), kind), raw_dtype=kind)


def compress(model: Path, out: Path, passes: str) -> Plan:
    text = f"data: {{samples: 4, sequence_length: 32}}\npasses: [{passes}]\n"
    return apply(Job(parse_recipe(text), text, (), model, out, str(model)), lambda event: None)


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.F16])
def test_it_is_what_transformers_reads(pico: Pico, tmp_path: Path, family: str, kind: Kind) -> None:
    """Bit by bit."""
    file = written(pico(family, **TIED.get(family, {})), tmp_path / "model.gguf", kind)
    folder, commit = resolve_model(str(file))
    found, theirs = (
        open_model(folder),
        AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=file.name, dtype=torch.float32, config=AutoConfig.from_pretrained(folder)
        ),
    )
    assert commit is None
    expected = {name: tensor for name, tensor in theirs.state_dict().items() if name in found.tensors}
    assert set(found.tensors) - set(expected) == {name for name in found.tensors if "experts" in name}
    for name, tensor in expected.items():
        assert torch.equal(found.tensor(name), tensor.to(found.tensors[name].dtype)), name
        assert found.rows(name, torch.tensor([0])).equal(found.tensor(name)[:1].float())
    for index in range(2 if family == "qwen3_moe" else 0):
        whole = theirs.get_submodule(f"model.layers.{index}.mlp.experts")
        for number, gate_up in enumerate(whole.gate_up_proj):
            parts = [
                found.tensor(f"model.layers.{index}.mlp.experts.{number}.{part}_proj.weight") for part in ("gate", "up")
            ]
            assert torch.equal(torch.cat(parts), gate_up.to(parts[0].dtype))
    with torch.no_grad():
        logits = theirs(input_ids=IDS, use_cache=False).logits
    own = load(folder, dtype=torch.float32)(input_ids=IDS, use_cache=False).logits
    assert (own - logits).norm() / logits.norm() < (1e-2 if kind == Kind.Q8_0 else 1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_it_is_compressed(pico: Pico, tmp_path: Path, family: str) -> None:
    file = written(pico(family), tmp_path / "model.gguf", Kind.Q8_0)
    folder, _ = resolve_model(str(file))
    plan = compress(folder, tmp_path / "out", "{kind: gptq, bits: 4, group_size: 32}")
    assert any("as GGUF Q8_0" in line for line in plan.warnings)
    assert "transformers" in plan.readers
    before = load(folder, dtype=torch.float32)(input_ids=IDS, use_cache=False).logits
    after = load(tmp_path / "out", dtype=torch.float32)(input_ids=IDS, use_cache=False).logits
    assert 0 < (after - before).norm() / before.norm() < 0.5
    assert plan.bytes_before < file.stat().st_size
    assert plan.bytes_before == sum(open_model(folder).stored_bytes(name) for name in open_model(folder).tensors)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"]
    assert config["dtype"] == "bfloat16"
    assert config["num_experts_per_tok" if family == "qwen3_moe" else "hidden_size"] == (
        2 if family == "qwen3_moe" else 64
    )


def test_a_folder_is_made_once_for_each_file(pico: Pico, tmp_path: Path, cache: Path) -> None:
    file = written(pico("llama"), tmp_path / "model.gguf", Kind.F16)
    first = resolve_model(str(file))[0]
    assert resolve_model(str(file))[0] == first
    os.utime(file, (1, 1))
    assert resolve_model(str(file))[0] != first
    assert not [path for path in (cache / "compressor").iterdir() if path.name.startswith(".")]


def test_damage_is_refused(pico: Pico, tmp_path: Path, cache: Path) -> None:
    file = written(pico("llama"), tmp_path / "model.gguf", Kind.F16)
    folder = resolve_model(str(file))[0]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    with pytest.raises(ModelError, match=r"model\.gguf: cut short; get a whole copy"):
        open_model(folder)
    for damaged in (whole[:100], b"GGUF" + bytes(40), b"nothing of the kind"):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"model\.gguf: transformers cannot read it \("):
            resolve_model(str(file))
    nan = bytearray(whole)
    nan[-2:] = np.float16("nan").tobytes()
    file.write_bytes(nan)
    checkpoint = open_model(resolve_model(str(file))[0])
    with pytest.raises(ModelError, match="holds NaN or infinite weights"):
        checkpoint.digests()
    file.unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        open_model(folder)


def test_without_the_package_it_says_so(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(pico("llama"), tmp_path / "model.gguf", Kind.F16)
    real: Any = __import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "gguf":
            raise ImportError
        return real(name, *args, **options)

    monkeypatch.setattr("builtins.__import__", without)
    with pytest.raises(ModelError, match=r"pip install 'compressor\[gguf\]'"):
        resolve_model(str(file))


def test_rows_of_a_table_are_decoded_alone(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_model(resolve_model(str(written(pico("llama"), tmp_path / "model.gguf", Kind.Q8_0)))[0])
    name, which = "model.embed_tokens.weight", torch.tensor([5, 0, 127])
    expected = found.tensor(name)[which].float()
    monkeypatch.setattr(type(found), "tensor", lambda self, name: pytest.fail("the whole of it"))
    assert torch.equal(found.rows(name, which), expected)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice on files")
def test_a_block_is_read_ahead(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(pico("llama", num_hidden_layers=2), tmp_path / "model.gguf", Kind.Q8_0)
    read: list[tuple[int, int]] = []
    monkeypatch.setattr("os.posix_fadvise", lambda descriptor, start, length, advice: read.append((start, length)))
    monkeypatch.setattr("compressor.runtime.model.checkpoint.Thread", at_once)
    open_model(resolve_model(str(file))[0]).expect(1)
    lying = [one for one in gguf.GGUFReader(file).tensors if one.name.startswith("blk.1.")]
    first, last = min(one.data_offset for one in lying), max(one.data_offset + one.n_bytes for one in lying)
    assert read[0][0] == first
    assert [start + length for start, length in read] == [*(start for start, _ in read[1:]), last]


def test_the_file_is_not_overwritten_by_what_becomes_of_it(pico: Pico, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    file = written(pico("llama"), out / "model.gguf", Kind.F16)
    (out / "config.json").write_text("{}")
    text = "passes: [{kind: rtn, bits: 4, group_size: 32}]"
    job = Job(parse_recipe(text), text, (), resolve_model(str(file))[0], out, str(file))
    with pytest.raises(ResourceError, match="which is read"):
        apply(job, lambda event: None, overwrite=True)
    assert file.is_file()


def test_a_folder_that_somebody_else_made_is_checked(pico: Pico, tmp_path: Path) -> None:
    folder = resolve_model(str(written(pico("llama"), tmp_path / "model.gguf", Kind.Q8_0)))[0]
    table = folder / "gguf.json"
    told = json.loads(table.read_text())
    for change in (
        {"tensors": None},
        {"tensors": [told["tensors"][0][:3]]},
        {"tensors": [[*told["tensors"][0][:3], -8, told["tensors"][0][4]]]},
        {"tensors": [[*told["tensors"][0][:4], 7]]},
        {"tensors": [[told["tensors"][0][0], 99, *told["tensors"][0][2:]]]},
        {"names": 5},
    ):
        table.write_text(json.dumps({**told, **change}))
        with pytest.raises(ModelError, match=r"gguf\.json: damaged \(.*delete"):
            open_model(folder)
    table.write_text(json.dumps(told))
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="no 'weight_map' object"):
        open_model(folder)


def test_as_many_blocks_as_nobody_has_are_not_built(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = GGUFWriter.add_block_count
    monkeypatch.setattr(GGUFWriter, "add_block_count", lambda self, count: real(self, 20_000_000))
    with pytest.raises(ModelError, match="block_count is 20000000, and there are"):
        resolve_model(str(written(pico("llama"), tmp_path / "model.gguf", Kind.F16)))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("No space left on device")])
def test_a_full_disk_is_no_fault_of_the_file(
    pico: Pico, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """tokenizers has an error of its own for it."""
    file = written(pico("llama"), tmp_path / "model.gguf", Kind.F16)

    def full(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(ResourceError, match=r"cannot be written \(No space left on device\); make room there"):
        resolve_model(str(file))
    assert not list((cache / "compressor").iterdir())
