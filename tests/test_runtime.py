"""The loader: light to import, true to transformers, and choosing kernels by pure functions."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pico import FAMILIES
from transformers import AutoModelForCausalLM

from compressor.kernels.dispatch import CpuCapability, has_int4_kernel, int4_path
from compressor.runtime import load

Pico = Callable[..., Path]
AMX, PLAIN = CpuCapability(True), CpuCapability(False)


def test_imports_nothing_of_the_floors_above(tmp_path: Path) -> None:
    code = (
        "import sys, compressor.runtime\n"
        "above = ('compressor.compress', 'compressor.cli', 'compressor.calibrate')\n"
        "assert not [name for name in sys.modules if name.startswith(above)]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_import_time_is_that_of_torch_and_transformers(tmp_path: Path) -> None:
    """At most 1.5 times as long; the faster of three runs each, since machines are noisy."""

    def seconds(code: str) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
            times.append(time.perf_counter() - start)
        return min(times)

    base = seconds("import torch; from transformers import AutoModelForCausalLM")
    assert seconds("import compressor.runtime") < 1.5 * base


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_folders_load_to_the_same_logits(pico: Pico, family: str) -> None:
    ids = torch.arange(30)[None]
    expected = AutoModelForCausalLM.from_pretrained(pico(family), dtype=torch.float32)
    with torch.no_grad():
        found = load(pico(family), dtype=torch.float32)(ids).logits
        torch.testing.assert_close(found, expected(ids).logits, rtol=1e-5, atol=1e-5)


def test_tied_embeddings_are_tied(pico: Pico) -> None:
    model = load(pico("llama", tie_word_embeddings=True))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.dtype == torch.bfloat16


def test_dispatch_is_by_shape_and_capability() -> None:
    assert has_int4_kernel(4, 64, 128, 256, True)
    assert not has_int4_kernel(4, 60, 128, 256, True)  # rows come in sixteens
    assert not has_int4_kernel(4, 64, 100, 200, True)
    assert not has_int4_kernel(4, 64, 128, 172, True)
    assert not has_int4_kernel(4, 64, 128, 256, False)
    assert not has_int4_kernel(3, 64, 128, 256, True)
    for tokens, capability, path in ((1, AMX, "int4pack"), (48, AMX, "int4pack"), (49, AMX, "dequantize")):
        assert int4_path(tokens, torch.bfloat16, capability) == path
    assert int4_path(64, torch.bfloat16, PLAIN) == "int4pack"
    assert int4_path(65, torch.bfloat16, PLAIN) == "dequantize"
    assert int4_path(1, torch.float32, PLAIN) == "dequantize"
