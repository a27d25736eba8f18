"""Linears taken from a checkpoint that is compressed already, for EoRA to make up for what it lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.compress.apply import Job, apply
from compressor.compress.events import Warned
from compressor.compress.plan import Plan
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.errors import ModelError, RecipeError, ResourceError
from compressor.runtime.stored import open_model

Pico = Callable[..., Path]
IDS = torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(2))
FORMS = {
    "compressed-tensors": "passes: [{kind: gptq, bits: 3, group_size: 32}]",
    "gptq": "passes: [{kind: gptq, bits: 4, group_size: 32}]\noutput: {format: gptq}",
    "compressor": "passes: [{kind: sparse24}]",
}


def compress(model: Path, out: Path, recipe: str, *, resume: bool = False) -> Plan:
    text = f"data: {{samples: 16, sequence_length: 32}}\n{recipe}\n"
    return apply(Job(parse_recipe(text), text, (), model, out, str(model)), lambda event: None, resume=resume)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load(folder, dtype=torch.float32)(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("form", FORMS)
def test_they_are_what_the_folder_has(pico: Pico, tmp_path: Path, form: str) -> None:
    model = pico("llama")
    compress(model, tmp_path / "few", FORMS[form])
    plan = compress(model, tmp_path / "out", f"passes: [{{kind: stored, model: {tmp_path / 'few'}}}]")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "few"))
    assert plan.format.name == ("compressor" if form == "compressor" else "compressed-tensors")


@pytest.mark.parametrize("form", FORMS)
def test_eora_makes_up_for_what_was_lost(pico: Pico, tmp_path: Path, form: str) -> None:
    model = pico("llama")
    compress(model, tmp_path / "few", FORMS[form])
    compress(model, tmp_path / "out", f"passes: [{{kind: stored, model: {tmp_path / 'few'}}}, {{kind: eora, rank: 8}}]")
    plain, few, more = (logits(folder) for folder in (model, tmp_path / "few", tmp_path / "out"))
    assert (more - plain).norm() < 0.9 * (few - plain).norm()
    held, had = open_model(tmp_path / "out"), open_model(tmp_path / "few")
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(held.operator(name).inner.dense(), had.operator(name).dense())  # type: ignore[attr-defined]


def test_what_does_not_go_together_is_refused(pico: Pico, tmp_path: Path) -> None:
    model, few = pico("llama"), tmp_path / "few"
    compress(model, few, "passes: [{kind: awq}, {kind: rtn, bits: 4, group_size: 32}]")
    taken = f"{{kind: stored, model: {few}}}"
    with pytest.raises(RecipeError, match=r"layernorm\.weight is another in .*scales were moved"):
        compress(model, tmp_path / "out", f"passes: [{taken}, {{kind: eora, rank: 8}}]")
    with pytest.raises(RecipeError, match=r"has .*q_proj\.weight as \[64, 64\]; it is of another model"):
        compress(pico("llama", head_dim=32), tmp_path / "out", f"passes: [{taken}]")
    with pytest.raises(RecipeError, match="compressed already: put it first"):
        compress(model, tmp_path / "out", f"passes: [{{kind: rtn, bits: 4, group_size: 32}}, {taken}]")
    turned = f"passes: [{{kind: rotate, residual: false}}, {{kind: stored, model: {few}, targets: '*.o_proj'}}]"
    with pytest.raises(RecipeError, match="which a pass before changes"):
        compress(model, tmp_path / "out", turned)
    name = "model.layers.0.mlp.up_proj"
    for changed, factor, told in (
        (name, -1, "is of another model"),
        ("model.embed_tokens", -1, "is another in"),
        ("model.norm", 0, "is another in"),
        (name, 0, r"has no .*up_proj\.weight; it is of another model"),
    ):
        other = Path(shutil.copytree(model, tmp_path / f"{changed} {factor}"))
        tensors = load_file(other / "model.safetensors")
        tensors[f"{changed}.weight"] *= factor
        if not factor:
            del tensors[f"{changed}.weight"]
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        with pytest.raises(RecipeError, match=told):
            compress(model, tmp_path / f"to {changed} {factor}", f"passes: [{{kind: stored, model: '{other}'}}]")
    with pytest.raises(ModelError, match="no such model folder"):
        compress(model, tmp_path / "out", "passes: [{kind: stored, model: nowhere}]")
    with pytest.raises(ResourceError, match="which is read"):
        compress(model, few, f"passes: [{taken}]")


def test_a_run_does_not_go_on_with_another_folder(pico: Pico, tmp_path: Path) -> None:
    model, few, out = pico("llama"), tmp_path / "few", tmp_path / "out"
    compress(model, few, "passes: [{kind: rtn, bits: 4, group_size: 32}]")
    recipe = f"passes: [{{kind: stored, model: {few}}}, {{kind: eora, rank: 8}}]"
    text = f"data: {{samples: 16, sequence_length: 32}}\n{recipe}\n"

    def stop(event: object) -> None:
        if not isinstance(event, Warned):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(Job(parse_recipe(text), text, (), model, out, str(model)), stop)
    (few / "model.safetensors").unlink()
    for path in few.iterdir():
        path.unlink() if path.is_file() else None
    compress(model, tmp_path / "other", "passes: [{kind: rtn, bits: 3, group_size: 32}]")
    for path in (tmp_path / "other").iterdir():
        if path.is_file():
            (few / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ResourceError, match="models"):
        compress(model, out, recipe, resume=True)
