"""Speed on the CPU: 4-bit weights, and 8-bit weights and inputs, against the dense bf16 model they came from, and where
the kernels cross over.

    python benchmarks/cpu_decode.py

One square layer in several schemes beside fp32 and bf16, by number of tokens; then a random Llama of the shape of a 1B
model (speed does not depend on the values) beside what rounding to 4 bits and to 8 makes of it. Between them, prompts
through transformers and through `load`: no slower here.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.compress.apply import Job, apply
from compressor.compress.recipe import parse_recipe
from compressor.kernels.cpu import (
    Scratch,
    decode_fp8,
    decode_packed,
    linear_int4,
    linear_int8,
    linear_tiles,
    pack_int4,
    pack_int8,
)
from compressor.kernels.layouts import pack_codes
from compressor.kernels.reference import quantize_rows
from compressor.runtime import load

RECIPES = {"int4": "passes: [{kind: rtn, bits: 4, group_size: 128}]", "w8a8": "passes: [{kind: rtn, scheme: int8}]"}


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


def kernels(size: int, bits: int, group_size: int, symmetric: bool) -> None:
    """One square layer: milliseconds by number of tokens, and how many times as fast as bf16 the better way is."""
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (size, size)).to(torch.int8)
    scales = torch.rand(size, size // group_size).to(torch.bfloat16)
    zeros = None if symmetric else torch.randint(-half, half, scales.shape).to(torch.int8)
    dense = torch.randn(size, size)
    half_dense, packed = dense.to(torch.bfloat16), pack_codes(codes, bits)
    native = pack_int4(codes, scales, zeros, group_size)
    scheme = f"{bits} bits, groups of {group_size}{'' if symmetric else ', asymmetric'}"
    print(f"\n{size} × {size}, {scheme}, ms:\n tokens     fp32     bf16 int4pack dequantize   × bf16  × fp32")

    def decode(rows: slice, room: Scratch) -> torch.Tensor:
        zero = None if zeros is None else zeros[rows]
        return decode_packed(packed[rows], scales[rows], zero, bits, size, group_size, torch.bfloat16, room)

    for tokens in (1, 4, 16, 32, 64, 96, 128, 256):
        x = torch.randn(tokens, size)
        inputs = x.to(torch.bfloat16)
        functions: dict[str, Callable[[], object]] = {
            "fp32": lambda x=x: F.linear(x, dense),
            "bf16": lambda x=inputs: F.linear(x, half_dense),
            "int4pack": lambda x=inputs: linear_int4(x, native),
            "dequantize": lambda x=inputs: linear_tiles(x, decode, size),
        }
        found = medians(functions, 9)
        best = min(found["int4pack"], found["dequantize"])
        columns = "".join(f"{1e3 * value:9.2f}" for value in found.values())
        print(f"{tokens:>7}{columns}   {found['bf16'] / best:8.2f}{found['fp32'] / best:8.2f}", flush=True)


def bytes_kernels(size: int) -> None:
    """The same of weights and inputs of 8 bits; fp8, which CPUs do not multiply, is decoded."""
    codes, scales = torch.randint(-127, 128, (size, size)).to(torch.int8), torch.rand(size)
    dense, packed = torch.randn(size, size).to(torch.bfloat16), pack_int8(codes)
    fp8 = dense.to(torch.float8_e4m3fn)
    print(f"\n{size} × {size}, 8 bits, ms:\n tokens     bf16     int8      fp8   int8 × bf16")
    for tokens in (1, 4, 16, 64, 256, 1024):
        x = torch.randn(tokens, size).to(torch.bfloat16)
        functions: dict[str, Callable[[], object]] = {
            "bf16": lambda x=x: F.linear(x, dense),
            "int8": lambda x=x: linear_int8(x, packed, scales),
            "fp8": lambda x=x: linear_tiles(x, lambda rows, room: decode_fp8(fp8[rows], torch.bfloat16, room), size),
        }
        found = medians(functions, 9)
        columns = "".join(f"{1e3 * value:9.2f}" for value in found.values())
        print(f"{tokens:>7}{columns}   {found['bf16'] / found['int8']:8.2f}", flush=True)


def narrow_layers(columns: int) -> None:
    """One token through layers of few rows, beside the same product without `linear_int8`'s padding."""
    x = torch.randn(1, columns).to(torch.bfloat16)
    print(f"\n{columns} columns, one token, 8 bits, µs:\n   rows     bf16     bare   padded   padded × bare")
    for rows in (64, 128, 192, 256, 320):
        codes, scales = torch.randint(-127, 128, (rows, columns)).to(torch.int8), torch.rand(rows)
        dense, packed, zeros = codes.to(torch.bfloat16), pack_int8(codes), torch.zeros(rows, dtype=torch.int32)

        def bare(packed: Any = packed, scales: Any = scales, zeros: Any = zeros) -> object:
            inputs, factors = quantize_rows(x, torch.int8)
            sums = torch.ops.onednn.qlinear_pointwise(
                inputs, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
            )
            return sums.mul_(factors[:, None]).to(x.dtype)

        functions: dict[str, Callable[[], object]] = {
            "bf16": lambda dense=dense: F.linear(x, dense),
            "bare": bare,
            "padded": lambda packed=packed, scales=scales: linear_int8(x, packed, scales),
        }
        found = medians(functions, 31)
        figures = "".join(f"{1e6 * value:9.0f}" for value in found.values())
        print(f"{rows:>7}{figures}   {found['bare'] / found['padded']:8.2f}", flush=True)


@torch.no_grad()
def prompts(tokens: int, vocabulary: int = 128000) -> None:
    """A prompt read by transformers and by a plain model of ours, of which the output head is the most."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=1024, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        ours: Any = load(folder, "cpu")
        print(
            f"\n2 layers of 1024, {vocabulary} words, prompts of {tokens}, ms:\n  batch transformers     ours   ratio"
        )
        for batch in (1, 4):
            ids = torch.arange(tokens).expand(batch, -1)
            functions: dict[str, Callable[[], object]] = {
                name: lambda model=model, ids=ids: model(input_ids=ids, use_cache=True, logits_to_keep=1)
                for name, model in (("theirs", theirs), ("ours", ours))
            }
            found = medians(functions, 9)
            columns = f"{1e3 * found['theirs']:13.2f}{1e3 * found['ours']:9.2f}"
            print(f"{batch:>7}{columns}{found['theirs'] / found['ours']:8.2f}", flush=True)


def models(layers: int, hidden_size: int, tokens: int, prompt: int) -> None:
    """Whole models: tokens per second, of a prompt and after it."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain"
        config = LlamaConfig(
            vocab_size=32000, hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=layers,
            num_attention_heads=hidden_size // 64, num_key_value_heads=8, head_dim=64, eos_token_id=None,
            tie_word_embeddings=True,
        )  # fmt: skip
        LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(plain)
        ids, loaded = torch.arange(prompt)[None], {"bf16": load(plain)}
        for name, recipe in RECIPES.items():
            apply(Job(parse_recipe(recipe), recipe, (), plain, Path(folder) / name, "random"), lambda event: None)
            loaded[name] = load(Path(folder) / name)
        count = sum(parameter.numel() for parameter in loaded["bf16"].parameters())
        found = {name: generation(model, ids, tokens) for name, model in loaded.items()}
    print(f"\n{layers} layers of {hidden_size}, {count / 1e9:.2f} B parameters; tokens/s:")
    for place, what in enumerate((f"prompt of {prompt}", "after it")):
        dense = found["bf16"][place]
        speeds = (f"{name} {speed[place]:7.1f} ({speed[place] / dense:.2f} ×)" for name, speed in found.items())
        print(f"  {what:<14} " + ", ".join(speeds))


@torch.no_grad()
def generation(model: Any, ids: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Tokens per second while reading a prompt and while writing: the best of three."""
    reading, writing = [], []
    for _ in range(3):
        start = time.perf_counter()
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        reading.append(ids.shape[1] / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(tokens):
            last = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=last, past_key_values=output.past_key_values)
        writing.append(tokens / (time.perf_counter() - start))
    return max(reading), max(writing)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--size", type=int, default=4096, help="of the single layer")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for bits, group_size, symmetric in ((4, 128, True), (4, 128, False), (4, 16, True), (3, 128, True), (2, 64, True)):
        kernels(options.size, bits, group_size, symmetric)
    bytes_kernels(options.size)
    narrow_layers(576)
    prompts(options.prompt)
    models(options.layers, options.hidden_size, options.tokens, options.prompt)
