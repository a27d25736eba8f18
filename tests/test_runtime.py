"""The loader: light to import, true to transformers, and choosing kernels by pure functions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import FAMILIES, stock_logits
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from compressor.kernels.dispatch import CpuCapability, int4_path, products_dtype
from compressor.runtime import load
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.skeleton import Skeleton

Pico = Callable[..., Path]
AMX, PLAIN, OLD = (CpuCapability(*able) for able in ((True, True, True), (False, True, True), (False, False, False)))


def test_imports_nothing_of_the_floors_above(tmp_path: Path) -> None:
    code = (
        "import sys, compressor.runtime\n"
        "above = ('compressor.compress', 'compressor.cli', 'compressor.calibrate')\n"
        "assert not [name for name in sys.modules if name.startswith(above)]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_importing_it_brings_in_no_more_than_torch_and_transformers(tmp_path: Path) -> None:
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\nbefore = set(sys.modules)\n"
        "import compressor.runtime\n"
        "more = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "assert more <= {'compressor', 'transformers', 'safetensors'}, more\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    "imports",
    [
        "import compressor.runtime\nimport transformers",
        "import transformers\nimport compressor.runtime",
        "from compressor.runtime import load",
        "import compressor.runtime.model.skeleton",
        "import compressor.runtime.attention",
        "import compressor.runtime, importlib.util\nimportlib.util.find_spec('transformers')",
        "from compressor.compress.apply import apply",
    ],
)
def test_transformers_knows_of_native_folders_in_whatever_order_the_two_come(tmp_path: Path, imports: str) -> None:
    code = (
        f"{imports}\nfrom transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "assert 'compressor' in CONFIG_MAPPING\n"
        "import sys, transformers\nassert 'compressor' not in type(transformers.__spec__.loader).__module__\n"
        "assert not [finder for finder in sys.meta_path if 'compressor.runtime' in type(finder).__module__]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_folders_load_to_the_same_logits(pico: Pico, family: str) -> None:
    ids = torch.arange(30)[None]
    expected = stock_logits(pico(family), ids)
    with torch.no_grad():
        found = load(pico(family), dtype=torch.float32)(input_ids=ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_tied_embeddings_are_tied(pico: Pico) -> None:
    model = load(pico("llama", tie_word_embeddings=True))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.dtype == torch.bfloat16


class Products(TorchDispatchMode):
    """Names of products by the shape of their second factor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.seen.append((func.overloadpacket.__name__, tuple(args[1].shape)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 2])
def test_the_head_is_multiplied_where_it_lies(pico: Pico, batch: int) -> None:
    """A batched product of it would copy it, for each prompt."""
    model, ids = load(pico()), torch.arange(30)[None].expand(batch, -1)
    with torch.no_grad(), Products() as products:
        last = model(ids, logits_to_keep=1).logits
        whole = model(ids).logits
    heads = [(name, shape) for name, shape in products.seen if shape[-1] == model.config.vocab_size]
    assert heads == [("mm", (64, 128))] * 2
    torch.testing.assert_close(last[:, 0], whole[:, -1])


def test_dispatch_is_by_shape_and_capability() -> None:
    assert [int4_path(64, torch.bfloat16, cpu) for cpu in (AMX, OLD)] == ["int4pack"] * 2
    assert [int4_path(65, torch.bfloat16, cpu) for cpu in (AMX, PLAIN, OLD)] == ["dequantize", "dequantize", "int4pack"]
    assert int4_path(1, torch.float32, OLD) == "dequantize"
    assert [products_dtype(cpu) for cpu in (AMX, PLAIN, OLD)] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_a_head_of_its_own_is_not_tied(pico: Pico, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(pico(), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    ids = torch.arange(30)[None]
    expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        found = load(model, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(found, expected(ids).logits, rtol=1e-5, atol=1e-5)


def test_what_chooses_experts_stays_in_float32(pico: Pico, tmp_path: Path) -> None:
    """DeepSeek-V3's correction bias: differences that bfloat16 would round away decide which experts run."""
    model = tmp_path / "model"
    shutil.copytree(pico("deepseek_v3"), model)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[name] = torch.linspace(7, 7.1, 8)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    ids = torch.arange(30)[None]
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    loaded = load(model, dtype=torch.bfloat16)
    assert torch.equal(loaded.get_buffer(name), tensors[name])
    seen = {}
    for label, one in (("stock", stock), ("ours", loaded)):
        one.model.layers[1].mlp.gate.register_forward_hook(lambda m, a, out, label=label: seen.update({label: out[2]}))
        with torch.no_grad():
            one(ids)
    assert (seen["stock"].sort(-1).values == seen["ours"].sort(-1).values).float().mean() > 0.95
    skeleton = Skeleton(Checkpoint(model), torch.bfloat16)
    block = skeleton.block(1)
    assert torch.equal(block.mlp.gate.e_score_correction_bias, tensors[name])
    scores = []
    block.mlp.gate.register_forward_hook(lambda m, a, out: scores.append(out[0]))
    skeleton.run(skeleton.runner(1, block), torch.randn(1, 10, 64))
    assert scores[0].dtype == torch.float32
    assert not torch.equal(scores[0], scores[0].bfloat16().float())
