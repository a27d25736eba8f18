"""Model folders from strangers: each fault is one line that says what, where and what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pico import at_once
from safetensors.torch import load_file, save_file

from compressor.compress.apply import Job
from compressor.compress.fingerprint import make_fingerprint
from compressor.compress.recipe import parse_recipe
from compressor.runtime.errors import ModelError
from compressor.runtime.files import file_sha256
from compressor.runtime.hub import resolve_model
from compressor.runtime.loader import load
from compressor.runtime.model import checkpoint as checkpoint_module
from compressor.runtime.model.checkpoint import Checkpoint, non_finite
from compressor.runtime.model.skeleton import Skeleton
from compressor.runtime.model.view import Derived, changed
from compressor.runtime.stored import open_model

Pico = Callable[..., Path]


@pytest.fixture
def folder(pico: Pico, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pico(), tmp_path / "model"))


@pytest.fixture
def sharded(folder: Path) -> Path:
    return in_shards(folder)


def in_shards(folder: Path) -> Path:
    """The same model in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def change(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        Skeleton(open_model(folder))
    assert "\n" not in str(caught.value)


def test_reads_single_and_sharded_alike(pico: Pico, sharded: Path) -> None:
    one, two = Checkpoint(pico()), Checkpoint(sharded)
    assert set(one.tensors) == set(two.tensors)
    assert (one.parameters, one.nbytes, one.dtype) == (two.parameters, two.nbytes, two.dtype)
    assert all(torch.equal(one.tensor(name), two.tensor(name)) for name in one.tensors)
    assert [len(names) for names in two.block_names()] == [9, 9]
    assert len(two.files) == 2


def test_missing_folder_and_files(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such model folder")
    (folder / "model.safetensors").unlink()
    refused(folder, "no model.safetensors and no model.safetensors.index.json")
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin is a pickle, which can run code; convert it to safetensors")
    (folder / "model.safetensors").symlink_to("nowhere")
    refused(folder, "model.safetensors is a link to a file that is not there")
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing")


def test_names_that_would_change_a_terminal(folder: Path) -> None:
    save_file({**load_file(folder / "model.safetensors"), "\x1b[31mred": torch.ones(2)}, folder / "model.safetensors")
    refused(folder, r"'.x1b\[31mred' is no name that a tensor can have")


def test_index_may_not_leave_the_folder(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for file in ("../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 3):
        change(index, weight_map={**weight_map, "lm_head.weight": file})
        refused(sharded, "the index puts 'lm_head.weight' in .* not a file name here")


def test_index_and_shards_must_agree(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    file = weight_map["lm_head.weight"]
    change(index, weight_map={**weight_map, "extra.weight": file})
    refused(sharded, "extra.weight is promised by the index but not in the file")
    change(index, weight_map={k: v for k, v in weight_map.items() if k != "lm_head.weight"})
    refused(sharded, "lm_head.weight is not in the index")
    change(index, weight_map=weight_map)
    (sharded / file).unlink()
    refused(sharded, "named by the index but missing")
    os.mkfifo(sharded / file)  # which would be waited for
    refused(sharded, "named by the index but missing")


def test_damaged_files(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:-5], whole + b"xx", whole[:100], b"", (2**62).to_bytes(8, "little") + whole[8:]):
        file.write_bytes(broken)
        refused(folder, "damaged or cut short")
    file.write_bytes(whole)
    for broken_text in ("{", '{"a": ' * 100_000, '{"a": ' + "9" * 5000 + "}"):
        (folder / "config.json").write_text(broken_text)
        refused(folder, "not readable as JSON")


def test_tensors_must_fit_the_config(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, folder / "model.safetensors")
    refused(folder, f"{name} is missing")
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, folder / "model.safetensors")
    refused(folder, r"down_proj.weight has shape \[64, 95\], config.json says \[64, 96\]")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    assert list(non_finite(iter(tensors.items()))) == ["model.layers.1.mlp.up_proj.weight"]


class Counted:
    """A file that counts the bytes that are read of it."""

    def __init__(self, path: Path, counts: dict[str, int]) -> None:
        self.file, self.name, self.counts = open(path, "rb"), path.name, counts  # noqa: SIM115

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def read(self, size: int) -> bytes:
        found = self.file.read(size)
        self.counts[self.name] = self.counts.get(self.name, 0) + len(found)
        return found

    def readinto(self, room: memoryview) -> int:
        size = self.file.readinto(room)
        self.counts[self.name] = self.counts.get(self.name, 0) + size
        return size


@pytest.mark.parametrize("piece", [64, 1 << 22])
def test_weight_files_are_read_once_to_be_hashed_and_searched(
    sharded: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[str, int] = {}
    monkeypatch.setattr(checkpoint_module, "PIECE", piece)
    monkeypatch.setattr(checkpoint_module, "open", lambda path, mode: Counted(path, counts), raising=False)
    monkeypatch.setattr(Checkpoint, "stored_tensor", lambda *_: pytest.fail("read another time"))
    recipe = parse_recipe("passes: [{kind: rtn}]")
    job = Job(recipe, "", (), sharded, sharded / "out", "pico")
    found = make_fingerprint(job, Skeleton(open_model(sharded)), None, None, None)["model"]
    assert counts == {path.name: path.stat().st_size for path in sharded.glob("*.safetensors")}
    assert {"config.json", "tokenizer.json", *counts} <= set(found)
    assert all(sha256 == file_sha256(sharded / name) for name, sha256 in found.items())


@pytest.mark.parametrize("place", [0, 31, 32, 3000, -1])  # of elements, around the ends of pieces and of the tensor
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_weight_that_is_not_finite_is_named_wherever_it_lies(
    folder: Path, place: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "PIECE", 64)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[place] = value
    save_file(tensors | {"counts": torch.full((5,), -1)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r": model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite weights"):
        open_model(folder).digests()


def test_a_weight_of_a_fused_expert_is_named_by_its_linear(pico: Pico, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico("granitemoe"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.input_linear.weight"][2, -1, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"experts\.2\.up_proj\.weight holds NaN or infinite weights"):
        open_model(folder).digests()


def test_families_and_quantized_inputs(folder: Path) -> None:
    change(folder / "config.json", quantization_config={"quant_method": "gptq"})
    refused(folder, "config.json says that it is stored as gptq, but no linear of it is")
    change(folder / "config.json", quantization_config={"quant_method": "exl9"})
    refused(folder, "quantized as 'exl9', which is not read here")
    change(folder / "config.json", quantization_config=None, model_type="gpt_oss")
    refused(folder, r"self_attn\.sinks is missing, which gpt_oss needs")
    change(folder / "config.json", num_hidden_layers=10**9)
    refused(folder, r"config\.json: num_hidden_layers is 1000000000, and there are 2\d tensors")
    change(folder / "config.json", num_hidden_layers=2, model_type="llama9")
    refused(folder, r"config\.json: model_type 'llama9' is not a family that transformers knows")
    for wrong in ([], {}, 5, None, "\x1b[31mred"):
        change(folder / "config.json", model_type=wrong)
        refused(folder, r"config\.json: model_type is .*, not a name")
    change(folder / "config.json", model_type="llama", text_config="llama")
    refused(folder, r"config\.json: text_config is 'llama', not an object")
    change(folder / "config.json", text_config=None, head_dim=10**30)
    refused(folder, rf"{folder}/config\.json: transformers cannot")
    change(folder / "config.json", head_dim=10**9)  # of which as many frequencies are not computed
    refused(folder, r"q_proj\.weight has shape \[64, 64\], config\.json says \[4000000000, 64\]")
    for count, said in (
        (10**9, "counts 1000000000 blocks"),
        (-1, "num_hidden_layers is -1"),
        ("2", "is '2', not their"),
    ):
        change(folder / "config.json", head_dim=16, num_hidden_layers=count)
        refused(folder, said)


def test_a_token_goes_to_experts_that_there_are(pico: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(pico("qwen3_moe"), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    there = json.loads(config.read_text())["num_local_experts"]
    for count in (0, -(2**63), there + 1):
        change(config, num_experts_per_tok=count)
        refused(tmp_path / "model", rf"config\.json: num_experts_per_tok is {count!r}, of {there} experts")
    change(config, num_experts_per_tok=there)
    Skeleton(Checkpoint(tmp_path / "model"))
    content = json.loads(config.read_text())
    del content["num_experts_per_tok"]  # for which transformers has a number
    config.write_text(json.dumps(content))
    refused(tmp_path / "model", rf"num_experts_per_tok is 8, of {there} experts")


def test_a_pipe_is_no_file(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refused(folder, "config.json is missing")


def test_integers_are_no_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    save_file(tensors | {name: tensors[name].view(torch.int16)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name} is of int16, and no floating-point numbers"):
        load(folder)
    with pytest.raises(ModelError, match=rf"{name} is of int16, and no floating-point numbers"):
        Skeleton(open_model(folder)).block(1)
    save_file({name: tensor.view(torch.int16) for name, tensor in tensors.items()}, folder / "model.safetensors")
    refused(folder, "hold no tensor of floating-point numbers")


def test_model_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(folder)) == (folder, None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source, match in ((str(tmp_path / "x/y"), "no such model folder"), ("nobody/nothing", "not to be had")):
        with pytest.raises(ModelError, match=match):
            resolve_model(source)
    with pytest.raises(ModelError, match="no revisions"):
        resolve_model(str(folder), "main")


def test_tensors_of_a_view_are_made_when_they_are_read(pico: Pico) -> None:
    source = Checkpoint(pico("llama"))
    norm, matrix = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"
    calls: list[str] = []

    def scaled(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        calls.append(weight.device.type)
        return (weight * scales).float()

    view = changed(source, {matrix: Derived((matrix, norm), scaled)})
    assert calls == ["meta"]
    assert view.tensors[matrix].dtype == torch.float32
    assert view.tensors[matrix].shape == source.tensors[matrix].shape
    assert torch.equal(view.tensor(matrix), (source.tensor(matrix) * source.tensor(norm)).float())
    assert torch.equal(view.tensor(norm), source.tensor(norm))
    assert calls == ["meta", "cpu"]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice on files")
@pytest.mark.parametrize("family", ["llama", "granitemoe", "gpt2"])
def test_a_block_is_read_ahead_and_nothing_else(
    family: str, pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_shards(Path(shutil.copytree(pico(family, num_hidden_layers=11), tmp_path / "model")))
    read: list[tuple[str, int, int]] = []

    def advised(descriptor: int, start: int, length: int, advice: int) -> None:
        read.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, start, length))

    monkeypatch.setattr(os, "posix_fadvise", advised)
    monkeypatch.setattr(checkpoint_module, "Thread", at_once)
    monkeypatch.setattr(checkpoint_module, "_ADVISED", 1000)
    checkpoint = changed(Checkpoint(model), {})
    for block in range(11):
        checkpoint.expect(block)
        found = b"".join((model / file).read_bytes()[start:][:length] for file, start, length in sorted(read))
        assert 0 < max(length for *_, length in read) <= 1000
        own = [name for name in checkpoint.stored if checkpoint.block_index(name) == block]
        assert len(found) == sum(checkpoint.stored[name].nbytes for name in own)
        for name in own:
            assert checkpoint.stored_tensor(name).contiguous().view(torch.uint8).numpy().tobytes() in found
        read.clear()
    checkpoint.expect(-1, 11)  # before the first, and behind the last
    monkeypatch.setattr(checkpoint_module, "available_memory", lambda: 4096)
    checkpoint.expect(0)
    assert read == []
