"""Outputs and models that somebody, or a disk, has changed: no command takes them for what they were."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import flip
from safetensors.torch import load_file, save_file

from compressor.cli.generate import run as generate
from compressor.compress.apply import Job, apply
from compressor.compress.evaluate import EvaluationJob, run_evaluation
from compressor.compress.output.gguf import export_gguf
from compressor.compress.output.verify import export_dense, verify
from compressor.compress.recipe import parse_recipe
from compressor.runtime.errors import ModelError, VerifyError
from compressor.runtime.files import file_sha256
from compressor.runtime.loader import load
from compressor.runtime.stored import open_model

Pico = Callable[..., Path]


def compress(model: Path, out: Path, step: str) -> Path:
    text = f"passes: [{step}]"
    apply(Job(parse_recipe(text), text, (), model, out, "pico"), lambda event: None)
    return out


@pytest.fixture(scope="module")
def whole(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(pico(), tmp_path_factory.mktemp("whole") / "out", "{kind: rtn, bits: 4, group_size: 32}")


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def test_an_output_that_names_no_file_is_no_output(out: Path) -> None:
    manifest = json.loads((out / "compressor.json").read_text())
    (out / "compressor.json").write_text(json.dumps(manifest | {"files": {}}))
    flip(out / "model.safetensors", -1)
    assert any("model.safetensors: is not in compressor.json" in line for line in verify(out))


def test_templates_in_folders_are_found(out: Path) -> None:
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "other.jinja").write_text("{{ x }}")
    assert ["other.jinja: is not in compressor.json" in line for line in verify(out)] == [True]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_what_was_damaged_is_not_exported(
    out: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(out / name, -5)
    with pytest.raises(VerifyError, match=rf"{name}: its hash is not the one"):
        export_dense(out, tmp_path / "plain")
    monkeypatch.setattr("compressor.compress.output.gguf._reader", lambda path: None)
    with pytest.raises(VerifyError, match=rf"{name}: its hash is not the one"):
        export_gguf(out, tmp_path / "file.gguf", tmp_path / "like.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_in_the_cache_of_a_hub_is_verified_behind_its_links(out: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "commit", tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(path for path in sorted(out.rglob("*")) if path.is_file()):
        blob, link = blobs / str(number), snapshot / path.relative_to(out)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert verify(snapshot) == []
    flip(snapshot / "model.safetensors", -1)
    assert "its hash is not the one" in verify(snapshot)[0]


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hostname", "a/../../b", "\x1b[31mred"])
def test_a_manifest_names_nothing_elsewhere(out: Path, name: str) -> None:
    manifest = json.loads((out / "compressor.json").read_text())
    (out / "compressor.json").write_text(json.dumps(manifest | {"files": {name: ""}}))
    with pytest.raises(VerifyError, match="is not a file of this folder"):
        verify(out)


def test_one_folder_has_one_set_of_weights(pico: Pico, tmp_path: Path) -> None:
    model = Path(shutil.copytree(pico(), tmp_path / "model"))
    tensors, index = load_file(model / "model.safetensors"), model / "model.safetensors.index.json"
    save_file(tensors, model / "other.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "other.safetensors")}))
    with pytest.raises(ModelError, match=r"has model\.safetensors, and an index of other weight files beside it"):
        open_model(model)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    assert open_model(model).files == ["model.safetensors"]


def test_a_quantization_that_is_none(pico: Pico, tmp_path: Path) -> None:
    model = Path(shutil.copytree(pico(), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())

    def told(quantization: object) -> Path:
        (model / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        return model

    assert open_model(told(None)).config == config
    assert open_model(model).config == config
    for wrong in (5, "gptq", [], False):
        with pytest.raises(ModelError, match="not an object"):
            open_model(told(wrong))
    with pytest.raises(ModelError, match="quantized as None, which is not read here"):
        open_model(told({}))


def test_models_with_other_tokens_are_not_compared(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(pico(), tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    names = sorted(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"] = {name: number for number, name in enumerate(reversed(names))}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    job = EvaluationJob(pico(), other, (str(calibration_text),), samples=1, sequence_length=32)
    with pytest.raises(ModelError, match="make different tokens of one text"):
        run_evaluation(job, lambda windows: pytest.fail("nothing is to be read"))


def exchanged(out: Path, suffix: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Path:
    """An output in which somebody has put another tensor of a linear, or none, and made the manifest say so."""
    name = f"model.layers.1.mlp.up_proj.{suffix}"
    tensors = load_file(out / "model.safetensors")
    found = change(tensors.pop(name))
    save_file(tensors if found is None else tensors | {name: found.contiguous()}, out / "model.safetensors")
    manifest = json.loads((out / "compressor.json").read_text())
    manifest["files"]["model.safetensors"] = file_sha256(out / "model.safetensors")
    (out / "compressor.json").write_text(json.dumps(manifest))
    return out


@pytest.mark.parametrize(
    ("suffix", "change", "said"),
    [
        ("weight_scale", lambda scale: scale[:, :1], "its tensors do not go together"),
        ("weight_scale", lambda scale: scale[:5], "its tensors do not go together"),
        ("weight_scale", lambda scale: scale.flatten(), "its tensors do not go together"),
        ("weight_scale", lambda scale: scale.short(), "weight_scale is of integers"),
        (
            "weight_packed",
            lambda packed: packed[:, :-1],
            r"weight_packed is int32 \[96, 7\], the others go with int32 \[96, 8",
        ),
        ("weight_packed", lambda packed: packed.float(), r"weight_packed is float32 .*, the others go with int32"),
        ("weight_shape", lambda shape: 2 * shape, "its tensors do not go together"),
        ("weight_shape", lambda shape: None, "weight_shape"),
    ],
)
def test_tensors_of_a_linear_that_do_not_go_together(
    out: Path, suffix: str, change: Callable[[torch.Tensor], torch.Tensor | None], said: str
) -> None:
    exchanged(out, suffix, change)
    [line] = verify(out)
    assert "model.layers.1.mlp.up_proj is not whole" in line
    with pytest.raises(ModelError, match=said):
        load(out)


@pytest.mark.parametrize(
    ("scheme", "suffix", "change", "said"),
    [
        ("int8", "weight_scale", lambda scale: None, "up_proj.weight is of int8, and no floating-point numbers"),
        ("int8", "weight_scale", lambda scale: scale[:5], "weight_scale is not a float for each of 96 rows"),
        ("int8", "weight", lambda codes: codes.view(torch.uint8), "is not what 8-bit codes of type int are"),
        ("fp8", "weight_scale", lambda scale: None, "up_proj.weight is of 8 bits, and its scale is missing"),
    ],
)
def test_scales_that_are_missing(
    pico: Pico, tmp_path: Path, scheme: str, suffix: str, change: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    out = compress(pico(), tmp_path / "out", f"{{kind: rtn, scheme: {scheme}}}")
    exchanged(out, suffix, change)
    assert [said in line for line in verify(out)] == [True]
    with pytest.raises(ModelError, match=said):
        load(out)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("generation_config.json", "{", r"generation_config\.json: transformers cannot read it"),
        ("generation_config.json", "[]", r"generation_config\.json: transformers cannot read it"),
        ("generation_config.json", '{"eos_token_id": [1, NaN]}', r"cannot read it \(eos_token_id is \[1, nan\]\)"),
        (
            "generation_config.json",
            '{"cache_implementation": "x"}',
            r"generation_config\.json: transformers cannot read it",
        ),
        (
            "generation_config.json",
            '{"num_beams": "x"}',
            r"generation_config\.json: transformers cannot generate by it",
        ),
        ("tokenizer_config.json", '{"model_max_length": "x"}', "its tokenizer cannot be loaded"),
    ],
)
def test_what_lies_beside_the_weights_may_be_wrong(out: Path, name: str, content: str, said: str) -> None:
    (out / name).write_text(content)
    with pytest.raises(ModelError, match=said):
        generate(str(out), "import", max_tokens=2)


def test_a_model_may_stop_at_a_text(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "generation_config.json").write_text('{"stop_strings": ["x"]}')
    generate(str(out), "import", max_tokens=2)
    assert capsys.readouterr().out.startswith("import")


@pytest.mark.parametrize("number", [130, 2**31])
def test_tokens_that_the_model_does_not_have(pico: Pico, tmp_path: Path, number: int) -> None:
    model = Path(shutil.copytree(pico(), tmp_path / "model"))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["o"] = number
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "text.txt").write_text("import os\n" * 100)
    with pytest.raises(ModelError, match="the tokenizer has ids beyond the 128 rows"):
        generate(str(model), "import", max_tokens=2)
    with pytest.raises(ModelError, match="tokenizer has ids beyond"):
        run_evaluation(
            EvaluationJob(model, None, (str(tmp_path / "text.txt"),), 1, 32), lambda windows: pytest.fail("read")
        )
