"""Families whose experts are one tensor on disk: seen as linears, written as linears where compressed, fused again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compressor.compress.apply import Job, apply
from compressor.compress.output.verify import export_dense, verify
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.disk_experts import fuse

Pico = Callable[..., Path]


def test_linears_are_slices_of_what_lies_on_disk_and_fuse_again(pico: Pico) -> None:
    checkpoint, stored = Checkpoint(pico("granitemoe")), load_file(pico("granitemoe") / "model.safetensors")
    start = "model.layers.1.block_sparse_moe."
    both = stored[start + "input_linear.weight"][2]
    assert torch.equal(checkpoint.tensor(start + "experts.2.gate_proj.weight"), both[:96])
    assert torch.equal(checkpoint.tensor(start + "experts.2.up_proj.weight"), both[96:])
    found = fuse(checkpoint.family, {name: checkpoint.tensor(name) for name in checkpoint.tensors})
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    assert sum(info.nbytes for info in checkpoint.tensors.values()) == sum(t.nbytes for t in stored.values())


@pytest.mark.parametrize("ignore", ["[]", "['*.experts.*']", "['*.experts.1.*', '*.self_attn.*']"])
def test_compressed_and_decoded_again(pico: Pico, tmp_path: Path, ignore: str) -> None:
    source, out, plain = pico("granitemoe", dtype=torch.float32), tmp_path / "out", tmp_path / "plain"
    recipe = f"passes: [{{kind: rtn, group_size: 32, ignore: {ignore}}}]"
    apply(Job(parse_recipe(recipe), recipe, (), source, out, "pico"), lambda event: None)
    assert verify(out) == []
    export_dense(out, plain)
    model, found = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(load(out, dtype=torch.float32)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_decoded_at_once(pico: Pico, tmp_path: Path) -> None:
    recipe = "passes: [{kind: rtn, group_size: 32}]\noutput: {format: dense}"
    apply(Job(parse_recipe(recipe), recipe, (), pico("granitemoe"), tmp_path / "out", "pico"), lambda event: None)
    written, source = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", pico("granitemoe")))
    assert {name: t.shape for name, t in written.items()} == {name: t.shape for name, t in source.items()}
    assert not torch.equal(*(t["model.layers.0.block_sparse_moe.input_linear.weight"] for t in (written, source)))
