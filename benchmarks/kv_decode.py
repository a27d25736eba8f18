"""Decoding on the CPU with latents in the KV cache: tokens per second and bytes of the cache beside the original.

    python benchmarks/kv_decode.py --contexts 256 1024 4096

A random Llama (speed does not depend on the weights' values) and what `lorc` makes of it. The models take turns, a few
tokens each, and the median of each one's turns is printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig

from compressor.compress.apply import Job, apply
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.attention import cache_bytes

LINES = {
    "half, joint": "ratio: 0.5",
    "half, heads in pairs": "ratio: 0.5, granularity: 2",
    "half, per head": "ratio: 0.5, granularity: per_head",
    "quarter, joint": "ratio: 0.25",
    "half, 8 bits": "ratio: 0.5, latent_bits: 8",
    "quarter, 8 bits": "ratio: 0.25, latent_bits: 8",
}


def random_model(folder: Path, options: argparse.Namespace) -> None:
    config = LlamaConfig(
        vocab_size=4096, hidden_size=options.width, intermediate_size=3 * options.width, head_dim=64,
        num_hidden_layers=options.layers, num_attention_heads=options.width // 64,
        num_key_value_heads=options.kv_heads, max_position_embeddings=1 << 17,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer = Path(__file__).resolve().parent.parent / "examples" / "tiny-llama"
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


@torch.no_grad()
def filled(model: Any, context: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    ids = torch.randint(0, 4096, (1, context), generator=torch.Generator().manual_seed(0))
    for part in ids.split(512, 1):
        model(input_ids=part, past_key_values=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def seconds(model: Any, cache: DynamicCache, tokens: int) -> float:
    """Of a token; the cache is as before afterwards."""
    ids, start = torch.tensor([[1]]), time.perf_counter()
    for _ in range(tokens):
        model(input_ids=ids, past_key_values=cache)
    elapsed = (time.perf_counter() - start) / tokens
    cache.crop(-tokens)
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8, help="of a turn")
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        source = Path(room) / "model"
        random_model(source, options)
        models = {"original": load(source)}
        for name, lorc in LINES.items():
            text = f"passes: [{{kind: lorc, {lorc}}}]"
            folder = Path(room) / name.replace(" ", "-")
            apply(Job(parse_recipe(text), text, (), source, folder, "random"), lambda event: None)
            models[name] = load(folder)
        for context in options.contexts:
            caches = {name: filled(model, context) for name, model in models.items()}
            times: dict[str, list[float]] = {name: [] for name in models}
            for turn in range(options.turns + 1):
                for name, model in models.items():
                    elapsed = seconds(model, caches[name], options.tokens)
                    if turn:  # the first is to warm up
                        times[name].append(elapsed)
            first = statistics.median(times["original"])
            for name, found in times.items():
                size, middle = cache_bytes(caches[name]), statistics.median(found)
                print(
                    f"context {context:>5}, {name:<20} {1 / middle:7.1f} tokens/s ({first / middle:.2f} ×), "
                    f"cache {size:>10,} bytes",
                    flush=True,
                )


if __name__ == "__main__":
    main()
