"""The worked examples of docs/extending.md, as they stand there."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.calibrate.stage import StageWork
from compressor.cli.folders import inspect
from compressor.compress.apply import Job, apply
from compressor.compress.events import Event
from compressor.compress.output.verify import export_dense, verify
from compressor.compress.passes.base import LinearPass
from compressor.compress.recipe import parse_recipe
from compressor.runtime import formats, load
from compressor.runtime.errors import ModelError
from compressor.runtime.model import families
from compressor.runtime.schemes import Operator, base

Pico = Callable[..., Path]
ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), re.DOTALL)


def module_of(number: int) -> Any:
    """One of the page's blocks as a module."""
    module = types.ModuleType(f"example_{number}")
    sys.modules[module.__name__] = module
    exec(compile(BLOCKS[number], "docs/extending.md", "exec"), vars(module))
    return module


@pytest.fixture(scope="module")
def example() -> Any:
    return module_of(0).Equalize


@pytest.fixture
def outliers(pico: Pico, tmp_path: Path) -> Path:
    """A model whose norms make one channel of a hundred times the size of others."""
    folder = Path(shutil.copytree(pico("llama", dtype=torch.float32), tmp_path / "outliers"))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[3] *= 100
    for name in [name for name in tensors if name.endswith(("q_proj.weight", "up_proj.weight", "gate_proj.weight"))]:
        tensors[name][:, 3] /= 100
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_pass_is_short() -> None:
    assert BLOCKS[0].count("\n") <= 80


def test_the_pass_makes_equal_what_is_then_rounded(
    example: Any, outliers: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = f"data: {{source: '{calibration_text}', samples: 4, sequence_length: 32}}\n"
    text = f"{data}passes: [{{kind: rtn, scheme: int8}}]\n"
    rounded = parse_recipe(text)
    equal = example(kind="equalize")
    ids = torch.arange(1, 40)[None]
    original = load(outliers, "cpu", torch.float32)(input_ids=ids).logits
    lost = {}
    nearest = parse_recipe("passes: [{kind: rtn, bits: 8, group_size: 32}]\n").passes
    variants = {"alone": (equal,), "rounded": rounded.passes, "both": (equal, *rounded.passes)}
    for name, passes in (variants | {"nearest": (equal, *nearest)}).items():
        job = Job(rounded.model_copy(update={"passes": passes}), text, (), outliers, tmp_path / name, "x")
        apply(job, lambda event: None)
        found = load(tmp_path / name, "cpu", torch.float32)(input_ids=ids).logits
        lost[name] = float((found - original).norm() / original.norm())
    assert lost["alone"] < 1e-5
    assert lost["both"] < 0.5 * lost["rounded"], lost
    assert 0 < lost["nearest"] < lost["rounded"], lost  # a pass that asks for no statistics finds some, of another kind


def test_the_row_of_a_family_is_one() -> None:
    made = eval("{" + BLOCKS[1] + "}", vars(families))
    assert [group.linears for stage in made["mymodel"].stages for group in stage][-2:] == [("mlp.fc1",), ("mlp.fc2",)]


def test_the_scheme_is_written_verified_and_run(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(base, "KINDS", dict(base.KINDS))
    signs = module_of(2).Signs

    class Binary(LinearPass):
        kind: str = "binary"

        def planned(self, name: str, operator: Operator, group: Any) -> Operator:
            weight = operator.dense(torch.bfloat16)
            return signs(weight.to(torch.int8), weight[:, :1])

        def apply(self, work: StageWork) -> Iterator[Event]:
            for name, weight in work.originals.items():
                scales = weight.abs().float().mean(1, keepdim=True).to(weight.dtype)
                work.linears[name] = signs(torch.where(weight < 0, -1, 1).to(torch.int8), scales)
            yield from ()

    text = "passes: [{kind: rtn, bits: 8}]\n"
    recipe = parse_recipe(text).model_copy(update={"passes": (Binary(),)})
    apply(Job(recipe, text, (), pico(), tmp_path / "out", "x"), lambda event: None)
    verify(tmp_path / "out")
    inspect(str(tmp_path / "out"))
    assert "signs" in capsys.readouterr().out
    export_dense(tmp_path / "out", tmp_path / "plain")
    ids = torch.arange(1, 40)[None]
    found, expected = (load(tmp_path / name, "cpu", torch.float32)(input_ids=ids).logits for name in ("out", "plain"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    packed, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    name = "model.layers.0.mlp.down_proj."
    assert 8 * packed[name + "signs"].nbytes == plain[name + "weight"].numel()


def test_the_format_is_written_and_read_and_refuses_what_it_does_not_know(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = module_of(3).ByteRows()
    known = {"dense": formats.PLAIN, example.name: example, **formats.FORMATS}
    text = "passes: [{kind: rtn, bits: 8, group_size: -1}]\n"
    job = Job(parse_recipe(text), text, (), pico(), tmp_path / "usual", "x")
    apply(job, lambda event: None)
    monkeypatch.setattr(formats, "FORMATS", known)
    out = tmp_path / "out"
    apply(replace(job, out=out), lambda event: None)
    verify(out)
    assert "model.layers.0.mlp.down_proj.codes" in load_file(out / "model.safetensors")
    ids = torch.arange(1, 40)[None]
    found, expected = (load(folder, "cpu", torch.float32)(input_ids=ids).logits for folder in (out, job.out))
    assert torch.equal(found, expected)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["rotated"] = True
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantization_config\.rotated is not read here"):
        load(out)
