"""Peak anonymous memory of `apply` against the plan's prediction, on random models of several shapes.

    python benchmarks/memory.py

Runs with a fixed threshold of malloc, which then gives large blocks back at once, so that resident means in use.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

_LLAMA = {"vocab_size": 4096, "num_hidden_layers": 2, "head_dim": 64}
_MOE = {
    **_LLAMA, "num_hidden_layers": 1, "hidden_size": 512, "num_experts": 32, "num_experts_per_tok": 2,
    "moe_intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
_WIDE_MOE = {
    **_MOE, "num_hidden_layers": 2, "hidden_size": 1024, "num_experts": 64, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "num_attention_heads": 16, "num_key_value_heads": 8,
}  # fmt: skip

_DEEPSEEK = {
    "vocab_size": 4096, "num_hidden_layers": 4, "first_k_dense_replace": 1, "hidden_size": 1024,
    "intermediate_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 384,
    "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 64,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "moe_intermediate_size": 512,
}  # fmt: skip


def _llama(hidden: int, inner: int) -> tuple[str, dict[str, int]]:
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128}
    return "llama", {**_LLAMA, "hidden_size": hidden, "intermediate_size": inner, **heads}


_FULL = "solver: als, objective: full, correction: 1, block_size: 32"

# name → family and sizes, passes; and those that made the model, where it is not stored as plain weights, or `tune`
CASES: dict[str, tuple[Any, ...]] = {
    "hidden 512": (_llama(512, 1536), "{kind: gptq, bits: 4}"),
    "hidden 1024": (_llama(1024, 4096), "{kind: gptq, bits: 4}"),
    "hidden 1024, the model's end": (_llama(1024, 4096), "{kind: gptq, bits: 4, objective: model}"),
    "hidden 1024, plain": (
        _llama(1024, 4096), "{kind: gptq, bits: 4, correction: 0, refinements: 0, search: false}"
    ),
    "hidden 1024, rtn": (_llama(1024, 4096), "{kind: rtn, bits: 4}"),
    "hidden 1024, rtn, tuned": (_llama(1024, 4096), "{kind: rtn, bits: 4}", "tune"),
    "both ends, tuned": (
        ("llama", {**_llama(512, 1024)[1], "vocab_size": 65536}), "{kind: rtn, bits: 4}", "tune"
    ),
    "hidden 1024, rtn with search": (_llama(1024, 4096), "{kind: rtn, bits: 4, search: true}"),
    "hidden 1024, w8a8": (_llama(1024, 4096), "{kind: rtn, scheme: int8}"),
    "hidden 1024, w8a8 fp8": (_llama(1024, 4096), "{kind: rtn, scheme: fp8}"),
    "hidden 1024, fp8-block by gptq": (_llama(1024, 4096), "{kind: gptq, scheme: fp8-block}"),
    "hidden 1024, outlier columns": (_llama(1024, 4096), "{kind: outlier_columns}, {kind: gptq, bits: 4}"),
    "32 experts": (("qwen3_moe", _MOE), "{kind: gptq, bits: 4}"),
    "32 experts, rtn": (("qwen3_moe", _MOE), "{kind: rtn, bits: 4}"),
    "64 experts, pruned": (("qwen3_moe", _WIDE_MOE), "{kind: expert_prune, keep: 48}"),
    "64 experts, pruned, hc": (("qwen3_moe", _WIDE_MOE), "{kind: expert_prune, keep: 48, merge: hc, refit: false}"),
    "64 experts, pruned, dern": (("qwen3_moe", _WIDE_MOE), "{kind: expert_prune, keep: 48, merge: dern, refit: false}"),
    "64 experts, reconstruction": (
        ("qwen3_moe", _WIDE_MOE), "{kind: expert_prune, keep: 62, criterion: reconstruction, refit: false}"
    ),
    "64 experts, narrowed": (("qwen3_moe", _WIDE_MOE), "{kind: expert_width, width: 512}"),
    "64 experts": (("qwen3_moe", _WIDE_MOE), "{kind: gptq, bits: 4}"),
    "hidden 2048": (_llama(2048, 5632), "{kind: gptq, bits: 4}"),
    "hidden 1024, wanda": (_llama(1024, 4096), "{kind: sparse24, method: wanda}"),
    "hidden 1024, sparse": (_llama(1024, 4096), "{kind: sparse24, sweeps: 2}, {kind: eora, rank: 16}"),
    "hidden 1024, sparse int4": (_llama(1024, 4096), "{kind: sparse24, sweeps: 2}, {kind: gptq, bits: 4}"),
    "hidden 1024, armor": (_llama(1024, 4096), f"{{kind: armor, {_FULL}, iterations: 6}}"),
    "hidden 1024, armor shared int4": (
        _llama(1024, 4096), f"{{kind: armor, {_FULL}, share: true, iterations: 6}}, {{kind: gptq, bits: 4}}"
    ),
    "hidden 1024, lorc": (_llama(1024, 4096), "{kind: lorc, ratio: 0.5, calibrated: true}"),
    "hidden 1024, lorc int4": (
        _llama(1024, 4096), "{kind: lorc, ratio: 0.5, calibrated: true, latent_bits: 8}, {kind: gptq, bits: 4}"
    ),
    "both ends": (
        ("llama", {**_llama(512, 1024)[1], "vocab_size": 65536}),
        "{kind: rtn, bits: 8, targets: [model.embed_tokens, lm_head]}",
    ),
    "both ends, gptq": (
        ("llama", {**_llama(512, 1024)[1], "vocab_size": 65536}),
        "{kind: gptq, bits: 4, targets: ['*', model.embed_tokens, lm_head]}",
    ),
    "turned": (("llama", {**_llama(512, 1024)[1], "vocab_size": 65536}), "{kind: rotate}, {kind: rtn, bits: 4}"),
    "hidden 1024, turned": (_llama(1024, 4096), "{kind: rotate}, {kind: gptq, bits: 4}"),
    "hidden 1024, stored in fp8": (
        _llama(1024, 4096), "{kind: gptq, bits: 4}", "{kind: rtn, scheme: fp8-block}"
    ),
    "hidden 1024, stored in fp8, one layer kept": (
        _llama(1024, 4096), "{kind: gptq, scheme: fp8-block, ignore: ['*.mlp.*']}", "{kind: rtn, scheme: fp8-block}"
    ),
    "DeepSeek-V3's layout, 64 experts, stored in fp8": (
        ("deepseek_v3", _DEEPSEEK), "{kind: gptq, bits: 4, objective: model}", "{kind: rtn, scheme: fp8-block}"
    ),
    "hidden 1024, armor adam": (_llama(1024, 4096), "{kind: armor, block_size: 32, iterations: 3}"),
}  # fmt: skip


def anonymous() -> int:
    """Anonymous resident bytes of this process."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def child(recipe_text: str, model: Path) -> None:
    """Measure one run in a process of its own."""
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    import compressor.cli.main  # what a person runs imports
    import compressor.compress.solvers
    from compressor.compress.apply import Job, apply
    from compressor.compress.plan import make_plan
    from compressor.compress.recipe import parse_recipe
    from compressor.runtime.model.skeleton import Skeleton, calibration_dtype
    from compressor.runtime.stored import open_model

    for module in pkgutil.iter_modules(compressor.compress.solvers.__path__, "compressor.compress.solvers."):
        importlib.import_module(module.name)  # which passes do when they need it
    recipe = parse_recipe(recipe_text)
    checkpoint = open_model(model)
    predicted = make_plan(recipe, Skeleton(checkpoint, calibration_dtype(checkpoint))).memory
    base = peak = anonymous()
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.001):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    apply(Job(recipe, recipe_text, (), model, model.with_name("out"), "random"), lambda event: None)
    stop.set()
    thread.join()
    print(predicted, peak - base, base, round(time.perf_counter() - start))


def measure(name: str) -> tuple[int, int, int, int]:
    """Bytes of anonymous memory of a case: predicted, measured, and in use before it began; and seconds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    (family, sizes), step, *more = CASES[name]
    before, tune = [part for part in more if part != "tune"], "tune: {samples: 18}\n" if "tune" in more else ""
    examples = Path(__file__).resolve().parent.parent / "examples"
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        config = CONFIG_MAPPING[family](**sizes)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
        AutoTokenizer.from_pretrained(examples / "tiny-llama").save_pretrained(model)
        if before:
            from compressor.compress.apply import Job, apply
            from compressor.compress.recipe import parse_recipe

            text, plain = f"passes: [{before[0]}]\n", model.rename(model.with_name("plain"))
            apply(Job(parse_recipe(text), text, (), plain, model, "random"), lambda event: None)
        text = f"data: {{samples: 16}}\npasses: [{step}]\n{tune}"
        command = [sys.executable, __file__, "--child", text, str(model)]
        settings = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}  # as the command line has them
        environment = {**os.environ, **settings, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    predicted, measured, base, seconds = (int(word) for word in done.stdout.split())
    return predicted, measured, base, seconds


def main(names: list[str]) -> None:
    """Print predicted and measured megabytes for the cases named, or for all."""
    print("case: predicted MB, measured MB (beyond the imports), error of the whole, time")
    for name in names or CASES:
        predicted, measured, base, seconds = measure(name)
        error = (predicted - measured) / (base + measured)
        print(f"{name}: {predicted / 1e6:.0f}, {measured / 1e6:.0f}, {100 * error:+.1f} %, {seconds} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2)
    parser.add_argument("cases", nargs="*", help="their names; default: all")
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]))
    else:
        main(options.cases)
