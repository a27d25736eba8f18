"""What two models go on with, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...calibrate.corpus import builtin_corpus, file_corpus, first_windows, load_tokenizer
from ...runtime.loader import load
from .page import Sample


@torch.no_grad()
def written(folder: Path, base: Path, data: str, count: int, prompt: int, answer: int) -> list[Sample]:
    """The likeliest next tokens of the base and of an output.

    Args:
        data: `builtin` (its evaluation split), or a .txt or .jsonl file, of which beginnings of windows are prompts.
        count, prompt, answer: prompts, and tokens of each and of what follows it.
    """
    corpus = builtin_corpus("evaluation") if data == "builtin" else file_corpus(Path(data))
    tokenizer = load_tokenizer(folder)
    windows = first_windows(corpus, tokenizer, count, prompt)
    found = []
    for each in (base, folder):
        model: Any = load(each)
        ids = windows.to(model.device)
        texts = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=answer, do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        found.append([tokenizer.decode(row[prompt:], skip_special_tokens=True) for row in texts])
    return [Sample(tokenizer.decode(ids), *both) for ids, *both in zip(windows, *found, strict=True)]
