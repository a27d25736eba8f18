"""Whole models on this GPU: how long compressing takes and what it holds there beside the plan; prompts and decoding by
the kernels beside the original.

    python benchmarks/gpu_models.py --layers 8 --out benchmarks/results/models-H200.txt

A random Llama with the widths of a 1B model (speed does not depend on the weights' values), every recipe in turn.
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
from compressor.compress.guards import source_skeleton
from compressor.compress.plan import make_plan
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load

RECIPES = {
    "w4a16, rtn": "{kind: rtn, bits: 4, group_size: 128}",
    "w4a16, gptq": "{kind: gptq, bits: 4, group_size: 128}",
    "fp8": "{kind: rtn, scheme: fp8}",
    "nvfp4, rtn": "{kind: rtn, scheme: nvfp4a16}",
    "2:4": "{kind: sparse24}",
    "armor int4": "{kind: armor, block_size: 64, solver: als, iterations: 8}, {kind: gptq, bits: 4, group_size: 128}",
    "latents half": "{kind: lorc, ratio: 0.5, calibrated: true}",
    "latents half, w4a16": "{kind: lorc, ratio: 0.5, granularity: per_head}, {kind: rtn, bits: 4, group_size: 128}",
}
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def random_model(folder: Path, layers: int, width: int) -> None:
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, head_dim=128,
        num_attention_heads=width // 128, num_key_value_heads=max(1, width // 512), max_position_embeddings=1 << 17,
    )  # fmt: skip
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EXAMPLES / "tiny-llama").save_pretrained(folder)


def compressed(name: str, source: Path, folder: Path) -> str:
    """Seconds of a run, and its bytes on the GPU, planned and met."""
    text = f"data: {{samples: 64, sequence_length: 1024}}\npasses: [{RECIPES[name]}]\n"
    recipe = parse_recipe(text)
    planned = make_plan(recipe, source_skeleton(source, "cuda")).memory
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    apply(Job(recipe, text, (), source, folder, "random"), lambda event: None, device="cuda")
    elapsed, met = time.perf_counter() - start, torch.cuda.max_memory_allocated() - before
    return f"{name:<20} {elapsed:>6.1f} s, planned {planned / 1e6:>6.0f} MB, met {met / 1e6:>6.0f} MB"


def median_seconds(run: Any, rounds: int) -> float:
    times = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


@torch.no_grad()
def speeds(model: Any, context: int) -> list[float]:
    """Seconds of a prompt of some tokens, and of a token behind it for one text and for eight."""
    found = []
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 8):
        ids = torch.randint(0, 4096, (batch, context), generator=generator).cuda()
        cache = DynamicCache(config=model.config)
        if batch == 1:
            found.append(median_seconds(lambda ids=ids: model(input_ids=ids, logits_to_keep=1), 5))
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        token = ids[:, :1]

        def step(token: Any = token, cache: Any = cache) -> None:
            model(input_ids=token, past_key_values=cache)

        found.append(median_seconds(step, 24))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--out", type=Path, help="a file to keep the table in")
    options = parser.parse_args()
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if options.out:
            options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")

    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: Llama of {options.layers} × {options.width}")
    with tempfile.TemporaryDirectory() as room:
        source = Path(room) / "model"
        random_model(source, options.layers, options.width)
        original = load(source, "cuda")
        first = speeds(original, options.context)
        size = torch.cuda.memory_allocated()
        say(f"original: {size / 1e6:.0f} MB, prompt {1e3 * first[0]:.1f} ms, token {1e3 * first[1]:.2f} ms, "
            f"of 8 {1e3 * first[2]:.2f} ms")  # fmt: skip
        del original
        for number, name in enumerate(options.recipes):
            torch.cuda.empty_cache()
            line = compressed(name, source, Path(room) / str(number))
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            model = load(Path(room) / str(number), "cuda")
            found = speeds(model, options.context)
            ratios = ", ".join(
                f"{what} {1e3 * here:.2f} ms ({there / here:.2f} ×)"
                for what, there, here in zip(("prompt", "token", "of 8"), first, found, strict=True)
            )
            say(f"{line}; loaded {(torch.cuda.memory_allocated() - before) / 1e6:.0f} MB, {ratios}")
            del model


if __name__ == "__main__":
    main()
