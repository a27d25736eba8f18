"""Plans of a `config.json` alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command import run

from compressor.runtime.errors import ModelError
from compressor.runtime.model.imagined import imagine
from compressor.runtime.stored import open_model

Pico = Callable[..., Path]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}), ("llama", {"tie_word_embeddings": True}), ("mixtral", {}), ("qwen2_moe", {}), ("granitemoe", {}),
        ("deepseek_v3", {}), ("gpt2", {}), ("phi3", {}), ("gemma3", {}), ("qwen3_vl", {}),
    ],
)  # fmt: skip
def test_the_headers_are_those_that_the_model_has(
    family: str, changes: dict[str, object], pico: Pico, tmp_path: Path
) -> None:
    folder = pico(family, **changes)
    imagine(folder / "config.json", tmp_path)
    found, expected = open_model(tmp_path), open_model(folder)
    assert {name: (info.dtype, info.shape) for name, info in found.tensors.items()} == {
        name: (info.dtype, info.shape) for name, info in expected.tensors.items()
    }


def test_files_of_many_bytes_take_no_room(pico: Pico, tmp_path: Path) -> None:
    config = json.loads((pico() / "config.json").read_text())
    config |= {"vocab_size": 2**20, "hidden_size": 8192, "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = tmp_path / "folder"
    folder.mkdir()
    imagine(tmp_path / "config.json", folder)
    checkpoint = open_model(folder)
    assert len(checkpoint.files) > 2
    assert checkpoint.nbytes > 2 * 2**20 * 8192 * 2
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 1e6
    assert float(checkpoint.tensor("model.embed_tokens.weight")[-1, -1]) == 0


def test_a_config_is_planned_as_its_model(pico: Pico, tmp_path: Path) -> None:
    model = pico("qwen3_moe")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes: [{kind: expert_prune, ratio: .25}, {kind: gptq, group_size: 32}]\ndata: {samples: 4}\n")
    plans = [
        json.loads(run("plan", recipe, source, "--set", "data.sequence_length=64", "--json", cwd=tmp_path).stdout)
        for source in (model / "config.json", model)
    ]
    alone, whole = ({**plan, "seconds": 0, "seconds_of_parts": {}, "disk_free": 0} for plan in plans)
    assert alone == whole
    assert alone["memory"] > 0


def test_what_a_config_cannot_do_is_said(pico: Pico, tmp_path: Path) -> None:
    config = pico() / "config.json"
    said = run("plan", "w4a16-gptq", config, "--predict", cwd=tmp_path, code=2).stderr
    assert "a config alone has no weights" in said
    (tmp_path / "other.json").write_text('{"model_type": "nothing"}')
    said = run("plan", "w4a16-gptq", "other.json", cwd=tmp_path, code=2).stderr
    assert said == "error: other.json: model_type 'nothing' is not a family that transformers knows\n"
    for changes, why in (
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and no model has more than 10,000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, and no model has more than 10,000"),
        ({"hidden_size": "x"}, "transformers cannot read it"),
        ({"num_key_value_heads": 3, "num_experts": 10**9}, "num_experts is 1000000000, which no model has"),
    ):
        (tmp_path / "other.json").write_text(json.dumps(json.loads(config.read_text()) | changes))
        said = run("plan", "w4a16-gptq", "other.json", cwd=tmp_path, code=2).stderr
        assert said.startswith(f"error: other.json: {why}"), said
    (tmp_path / "other.json").write_text(json.dumps({"model_type": "t5"}))
    said = run("plan", "w4a16-gptq", "other.json", cwd=tmp_path, code=2).stderr
    assert said.startswith("error: other.json: "), said  # no folder that is there no more
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ModelError, match="a JSON object is expected"):
        imagine(tmp_path / "other.json", tmp_path)
    said = run("apply", "w4a16-gptq", config, "out", cwd=tmp_path, code=2).stderr
    assert "is a config alone, of which plan says what it would come to" in said
