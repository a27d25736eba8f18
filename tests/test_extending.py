"""The worked examples of docs/extending.md, as they stand there."""

from __future__ import annotations

import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.compress.apply import Job, apply
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.model import families

Pico = Callable[..., Path]
ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def example() -> Any:
    module = types.ModuleType("smoothquant_example")
    sys.modules[module.__name__] = module
    exec(compile(BLOCKS[0], "docs/extending.md", "exec"), vars(module))
    return module.SmoothQuant


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


def test_the_pass_smooths_what_is_then_rounded(
    example: Any, outliers: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"data: {{source: '{calibration_text}', samples: 4, sequence_length: 32}}\npasses: [{{kind: w8a8}}]\n"
    rounded = parse_recipe(text)
    smooth = example(kind="smoothquant")
    ids = torch.arange(1, 40)[None]
    original = load(outliers, "cpu", torch.float32)(input_ids=ids).logits
    lost = {}
    for name, passes in {"alone": (smooth,), "rounded": rounded.passes, "both": (smooth, *rounded.passes)}.items():
        job = Job(rounded.model_copy(update={"passes": passes}), text, (), outliers, tmp_path / name, "x")
        apply(job, lambda event: None)
        found = load(tmp_path / name, "cpu", torch.float32)(input_ids=ids).logits
        lost[name] = float((found - original).norm() / original.norm())
    assert lost["alone"] < 1e-5
    assert lost["both"] < 0.5 * lost["rounded"], lost


def test_the_row_of_a_family_is_one() -> None:
    made = eval("{" + BLOCKS[1] + "}", vars(families))
    assert [group.linears for stage in made["mymodel"].stages for group in stage][-2:] == [("mlp.fc1",), ("mlp.fc2",)]
