"""Peak anonymous memory of `apply` against the plan's prediction, on random models of several shapes.

    MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/memory.py

With a fixed threshold malloc gives large blocks back at once, so that resident means in use.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

CASES = {
    "hidden 512": (512, 1536, "{kind: gptq, bits: 4}"),
    "hidden 1024": (1024, 4096, "{kind: gptq, bits: 4}"),
    "hidden 1024, plain": (1024, 4096, "{kind: gptq, bits: 4, correction: 0, refinements: 0, search: false}"),
    "hidden 1024, rtn": (1024, 4096, "{kind: rtn, bits: 4}"),
    "hidden 2048": (2048, 5632, "{kind: gptq, bits: 4}"),
}


def anonymous() -> int:
    """Anonymous resident bytes of this process."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def child(recipe_text: str, model: Path) -> None:
    """Measure one run in a process of its own."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import compressor.cli.main  # noqa: F401  (what a person's run imports)
    from compressor.compress.apply import Job, apply, open_source
    from compressor.compress.plan import make_plan
    from compressor.compress.recipe import parse_recipe
    from compressor.runtime.skeleton import Skeleton, calibration_dtype

    recipe = parse_recipe(recipe_text)
    checkpoint = open_source(model)
    predicted = make_plan(recipe, Skeleton(checkpoint, calibration_dtype(checkpoint))).memory
    base = peak = anonymous()
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.001):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    apply(Job(recipe, recipe_text, (), model, model.with_name("out"), "random"), lambda event: None)
    stop.set()
    thread.join()
    print(predicted, peak - base, base)


def main() -> None:
    """Print predicted and measured megabytes for every case."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).resolve().parent.parent / "examples" / "tiny-llama")
    print("case: predicted MB, measured MB (beyond the imports), error of the whole")
    for name, (hidden, inner, step) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            config = LlamaConfig(
                vocab_size=4096, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2,
                num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64,
            )  # fmt: skip
            import torch

            model = Path(folder) / "model"
            LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(model)
            tokenizer.save_pretrained(model)
            text = f"data: {{samples: 16}}\npasses:\n  - {step}\n"
            command = [sys.executable, __file__, "--child", text, str(model)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            predicted, measured, base = (int(word) for word in done.stdout.split())
        error = (predicted - measured) / (base + measured)
        print(f"{name}: {predicted / 1e6:.0f}, {measured / 1e6:.0f}, {100 * error:+.1f} %", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]))
    else:
        main()
