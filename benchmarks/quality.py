"""What the quality benchmarks share: recipes applied for several seeds, and judged on the same windows.

KL(original ‖ result) per token and perplexity, float32 forward passes over the same windows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import functional as F

from compressor.calibrate.corpus import builtin_corpus, file_corpus, load_tokenizer, token_windows
from compressor.compress.apply import Job, apply
from compressor.compress.plan import Plan
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load


def windows_of(source: str, split: str, model: Path, samples: int | None, length: int, seed: int) -> torch.Tensor:
    corpus = builtin_corpus(split) if source == "builtin" else file_corpus(Path(source))
    return token_windows(corpus, load_tokenizer(model), samples=samples, sequence_length=length, seed=seed)


class Judge:
    """Losses and KL to the original of every window, in float32. Of the original, hidden states in front of the head
    are kept: logits of all windows would be gigabytes where vocabularies are real ones."""

    @torch.no_grad()
    def __init__(self, original: Any, windows: torch.Tensor) -> None:
        self.windows, self._head = windows, original.get_output_embeddings()
        self._hidden = [original.model(ids, use_cache=False).last_hidden_state[:, :-1] for ids in windows.split(1)]

    @torch.no_grad()
    def __call__(self, model: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a model; None: of the original itself."""
        losses, divergences = [], []
        for ids, hidden in zip(self.windows.split(1), self._hidden, strict=True):
            reference = self._head(hidden).log_softmax(-1)
            logs = reference
            if model is not None:
                logs = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
            losses.append(-logs.gather(-1, ids[:, 1:, None])[..., 0].mean(1))
            divergences.append(F.kl_div(logs, reference, log_target=True, reduction="none").sum(-1).mean(1))
        return torch.cat(losses).double(), torch.cat(divergences).double()


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of every quality benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--text", nargs=2, default=["builtin", "builtin"], help="calibration and evaluation text")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=197)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="methods to run")
    parser.add_argument("--out", type=Path, help="append results as JSON lines")
    return parser


def compare(
    options: argparse.Namespace,
    methods: Mapping[str, list[dict[str, Any]]],
    more: Callable[[Plan], dict[str, Any]] = lambda plan: {},
) -> None:
    """Apply each method (name → passes) for every seed, and print a JSON line for it."""
    torch.set_num_threads(options.threads)
    windows = windows_of(options.text[1], "evaluation", options.model, options.windows, options.length, 0)
    judge = Judge(load(options.model, dtype=torch.float32), windows)
    dense, _ = judge()
    print(f"dense: perplexity {float(dense.mean().exp()):.4f}, {windows.numel() - len(windows)} predicted tokens")
    for name, passes in methods.items():
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
                losses, divergences = judge(load(out, dtype=torch.float32))
            found.append((losses, divergences, seconds))
        kl = torch.stack([divergences for _, divergences, _ in found])
        record = {
            "method": name,
            "perplexity": round(sum(float(losses.mean().exp()) for losses, _, _ in found) / len(found), 4),
            "kl": [round(float(values.mean()), 5) for values in kl],
            "bytes": plan.bytes_after,
            **more(plan),
            "seconds": round(sum(seconds for _, _, seconds in found) / len(found), 1),
        }
        print(json.dumps(record), flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps({**record, "windows": [round(float(x), 6) for x in kl.mean(0)]}) + "\n")
