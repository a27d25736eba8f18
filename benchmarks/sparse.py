"""2:4 sparsity and ARMOR: quality, bytes and seconds of every method.

    python benchmarks/sparse.py examples/tiny-llama --seeds 0 1 2
    python benchmarks/sparse.py MODEL --text calibration.txt evaluation.txt --length 256

KL(original ‖ result) per token and perplexity, float32 forward passes over the same windows. Wrappers have blocks of
`--block`, and low-rank residuals that rank: where the block divides the layer, both take the same bytes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import functional as F

from compressor.calibrate.corpus import builtin_corpus, file_corpus, load_tokenizer, token_windows
from compressor.compress.apply import Job, apply
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load


def methods(block: int) -> dict[str, list[dict[str, Any]]]:
    """Name → passes."""

    def sparse(method: str, **more: Any) -> dict[str, Any]:
        return {"kind": "sparse24", "method": method, **more}

    def armor(**more: Any) -> dict[str, Any]:
        return {"kind": "armor", "block_size": block, **more}

    plain = {"correction": 0}
    eora = {"kind": "eora", "rank": block}
    als = {"solver": "als", "iterations": 60}
    full = {**als, "objective": "full"}
    int4 = {"kind": "gptq", "bits": 4, "group_size": 128}
    return {
        "magnitude": [sparse("magnitude")],
        "wanda": [sparse("wanda")],
        "nowag": [sparse("nowag")],
        "sparsegpt": [sparse("sparsegpt", **plain)],
        "sparsegpt, corrected": [sparse("sparsegpt")],
        "sparsegpt_sweep": [sparse("sparsegpt_sweep", **plain)],
        "sparsegpt_sweep, corrected": [sparse("sparsegpt_sweep")],
        "sparsegpt + eora": [sparse("sparsegpt", **plain), {**eora, **plain}],
        "sparsegpt_sweep + eora": [sparse("sparsegpt_sweep", **plain), {**eora, **plain}],
        "sparsegpt_sweep + eora, corrected": [sparse("sparsegpt_sweep"), eora],
        "armor, adam 4000": [armor(iterations=4000)],
        "armor, als": [armor(**als)],
        "armor, als + full": [armor(**full)],
        "armor, als + full, corrected": [armor(**full, correction=1)],
        "armor, als + full, shrunk .3": [armor(**full, shrinkage=0.3)],
        "armor, als + full, shared B": [armor(**full, share=True)],
        "armor, als + full, int8 wrappers": [armor(**full, wrapper_bits=8)],
        "sparsegpt_sweep, int4 g128": [sparse("sparsegpt_sweep"), int4],
        "armor, als + full, int4 g128, int8 wrappers": [armor(**full, wrapper_bits=8), int4],
        "gptq int4 g128": [int4],
        "gptq int3 g128": [{**int4, "bits": 3}],
    }


def windows_of(source: str, split: str, model: Path, samples: int, length: int, seed: int) -> torch.Tensor:
    corpus = builtin_corpus(split) if source == "builtin" else file_corpus(Path(source))
    return token_windows(corpus, load_tokenizer(model), samples=samples, sequence_length=length, seed=seed)


@torch.no_grad()
def judge(folder: Path, base: list[torch.Tensor], windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and KL of each window."""
    model, losses, divergences = load(folder, dtype=torch.float32), [], []
    for ids, reference in zip(windows.split(8), base, strict=True):
        logs = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        losses.append(-logs.gather(-1, ids[:, 1:, None])[..., 0].mean(1))
        if reference is not logs and reference.numel():
            divergences.append(F.kl_div(logs, reference, log_target=True, reduction="none").sum(-1).mean(1))
    return torch.cat(losses).double(), torch.cat(divergences).double() if divergences else torch.zeros(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--text", nargs=2, default=["builtin", "builtin"], help="calibration and evaluation text")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=197)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument(
        "--overhead", type=float, default=0.0955, help="of low-rank residuals: their share of the bytes"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="methods to run")
    parser.add_argument("--out", type=Path, help="append results as JSON lines")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    windows = windows_of(options.text[1], "evaluation", options.model, options.windows, options.length, 0)
    model: Any = load(options.model, dtype=torch.float32)
    with torch.no_grad():
        base = [model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1) for ids in windows.split(8)]
    dense, _ = judge(options.model, [torch.empty(0)] * len(base), windows)
    print(f"dense: perplexity {float(dense.mean().exp()):.4f}, {windows.numel() - len(windows)} predicted tokens")
    for name, passes in methods(options.block).items():
        if options.only and name not in options.only:
            continue
        found = []
        for seed in options.seeds:
            data = {
                "source": options.text[0],
                "samples": options.samples,
                "sequence_length": options.length,
                "seed": seed,
            }
            text = yaml.safe_dump({"data": data, "passes": passes}, sort_keys=False)
            with tempfile.TemporaryDirectory() as room:
                out, start = Path(room) / "out", time.perf_counter()
                plan = apply(Job(parse_recipe(text), text, (), options.model, out, "benchmark"), lambda event: None)
                seconds = time.perf_counter() - start
                losses, divergences = judge(out, base, windows)
            found.append((losses, divergences, seconds))
        kl = torch.stack([divergences for _, divergences, _ in found])
        record = {
            "method": name,
            "perplexity": round(sum(float(losses.mean().exp()) for losses, _, _ in found) / len(found), 4),
            "kl": [round(float(values.mean()), 5) for values in kl],
            "bytes": plan.bytes_after,
            "seconds": round(sum(seconds for _, _, seconds in found) / len(found), 1),
        }
        print(json.dumps(record), flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps({**record, "windows": [round(float(x), 6) for x in kl.mean(0)]}) + "\n")


if __name__ == "__main__":
    main()
