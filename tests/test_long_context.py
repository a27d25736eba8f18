"""Far from the beginning: perplexity by position against the plain one, and retrieval by models that can and cannot."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.calibrate.corpus import load_tokenizer
from compressor.compress.evaluate import evaluate
from compressor.compress.evaluate.long_context import evaluate_long
from compressor.runtime import load

Pico = Callable[..., Path]


class Copier:
    """Expects what followed the last occurrence of the seven tokens before, as an induction head does."""

    device = "cpu"

    def __call__(
        self, input_ids: Tensor, use_cache: bool, logits_to_keep: int = 0, past_key_values: list[int] | None = None
    ) -> Any:
        ids = [*(past_key_values or []), *input_ids[0].tolist()]
        logits = torch.zeros(1, len(ids), 128)
        seen: dict[tuple[int, ...], int] = {}
        for place in range(7, len(ids)):
            before = tuple(ids[place - 7 : place])
            if before in seen:
                logits[0, place - 1, ids[seen[before]]] = 20
            seen[before] = place
        kept = logits_to_keep or input_ids.shape[1]
        return SimpleNamespace(logits=logits[:, -kept:], past_key_values=ids)


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "llava"])
def test_spans_add_up_to_the_whole(pico: Pico, family: str) -> None:
    """Also where more than the output head follows the last block, or the language model is a part of several."""
    model = load(pico(family), dtype=torch.float32)
    windows = torch.randint(1, 128, (3, 256), generator=torch.Generator().manual_seed(0))
    found = evaluate_long(model, load_tokenizer(pico(family)), windows)
    assert [(span.start, span.end) for span in found.spans] == [(0, 64), (64, 128), (128, 256)]
    counts = [63, 64, 128]
    whole = sum(n * math.log(span.perplexity) for n, span in zip(counts, found.spans, strict=True)) / 255
    assert math.exp(whole) == pytest.approx(evaluate(model, windows).perplexity, rel=1e-5)
    assert [each.tokens for each in found.retrievals] == [256], "in fewer bytes there is no room to hide it"
    assert all(each.exact < 0.5 for each in found.retrievals)


def test_what_can_look_back_finds_the_number(pico: Pico) -> None:
    windows = torch.randint(1, 128, (3, 512), generator=torch.Generator().manual_seed(0))
    found = evaluate_long(Copier(), load_tokenizer(pico("llama")), windows)
    for each in found.retrievals:
        assert each.exact == 1
        assert each.logprob > -0.1
        assert each.lost < -2
