"""Decode speed on the CPU: 4-bit against the dense bf16 model it came from, and where the kernels cross over.

    python benchmarks/cpu_decode.py --layers 8 --hidden-size 2048

Makes a random Llama (speed does not depend on the values), compresses it with `w4a16-rtn`, and times both in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.compress.apply import Job, apply
from compressor.compress.recipe import parse_recipe
from compressor.kernels.cpu import decode_packed, linear_int4, linear_tiles, pack_int4
from compressor.kernels.layouts import pack_codes
from compressor.runtime import load

RECIPE = "passes:\n  - {kind: rtn, bits: 4, group_size: 128}\n"


def medians(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each function, taken in turn; the median."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def kernels(size: int) -> None:
    """One square layer: milliseconds by number of tokens."""
    codes = torch.randint(-8, 8, (size, size)).to(torch.int8)
    scales = torch.rand(size, size // 128).to(torch.bfloat16)
    dense = torch.randn(size, size).to(torch.bfloat16)
    packed, (native, pairs) = pack_codes(codes, 4), pack_int4(codes, scales)
    print(f"\n{size} × {size}, ms:  tokens  bf16  int4pack  dequantize")

    def decode(rows: slice) -> torch.Tensor:
        return decode_packed(packed[rows], scales[rows], None, 4, size, 128, torch.bfloat16)

    for tokens in (1, 4, 16, 32, 48, 64, 96, 128, 512):
        x = torch.randn(tokens, size).to(torch.bfloat16)
        functions: dict[str, Callable[[], object]] = {
            "bf16": lambda x=x: F.linear(x, dense),
            "int4pack": lambda x=x: linear_int4(x, native, pairs, 128),
            "dequantize": lambda x=x: linear_tiles(x, decode, size),
        }
        found = medians(functions, 9)
        print(f"{tokens:>28}" + "".join(f"  {1e3 * value:8.2f}" for value in found.values()))


def decode(layers: int, hidden_size: int, tokens: int) -> None:
    """Whole models: tokens per second."""
    with tempfile.TemporaryDirectory() as folder:
        plain, out = Path(folder) / "plain", Path(folder) / "out"
        config = LlamaConfig(
            vocab_size=4096, hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=layers,
            num_attention_heads=hidden_size // 128, num_key_value_heads=hidden_size // 512, head_dim=128,
            eos_token_id=None,
        )  # fmt: skip
        LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(plain)
        apply(Job(parse_recipe(RECIPE), RECIPE, (), plain, out, "random"), lambda event: None)
        ids = torch.arange(16)[None]
        models = {"bf16": load(plain), "int4": load(out)}
        functions: dict[str, Callable[[], object]] = {
            name: lambda model=model: model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
            for name, model in models.items()
        }
        found = medians(functions, 3)
    print(f"{layers} layers of {hidden_size}: " + ", ".join(f"{k} {tokens / v:.2f} tokens/s" for k, v in found.items()))
    print(f"int4 decodes {found['bf16'] / found['int4']:.2f} × as fast as bf16")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    decode(options.layers, options.hidden_size, options.tokens)
    kernels(4096)
