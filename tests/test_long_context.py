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
from compressor.compress.apply import Job, apply
from compressor.compress.evaluate import evaluate
from compressor.compress.evaluate.long_context import evaluate_long
from compressor.compress.recipe import parse_recipe
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


def test_a_second_question_finds_what_the_first_left(pico: Pico) -> None:
    """A cache that keeps what the first question needs answers the second one worse than a text that is read anew."""

    class Forgetful(Copier):
        def __call__(self, input_ids: Tensor, use_cache: bool, past_key_values: Any = None, **more: Any) -> Any:
            kept = past_key_values if past_key_values is None or input_ids.shape[1] == 1 else past_key_values[:]
            found = super().__call__(input_ids, use_cache, past_key_values=kept, **more)
            if use_cache and input_ids.shape[1] < 100 and past_key_values is not None:  # a question was answered
                found.past_key_values = found.past_key_values[len(found.past_key_values) // 2 :]
            return found

    windows = torch.randint(1, 128, (3, 512), generator=torch.Generator().manual_seed(0))
    tokenizer = load_tokenizer(pico("llama"))
    *_, whole = evaluate_long(Copier(), tokenizer, windows, shared=True).shared
    assert (whole.tokens, whole.exact, whole.exact_anew) == (512, 1, 1)
    assert whole.second == pytest.approx(whole.anew)
    *_, lost = evaluate_long(Forgetful(), tokenizer, windows, shared=True).shared
    assert lost.first == pytest.approx(whole.first)
    assert lost.anew == pytest.approx(whole.anew)
    assert lost.second < lost.anew - 1
    assert not evaluate_long(Copier(), tokenizer, windows).shared


@pytest.mark.parametrize("bits", [16, 8])
def test_latents_do_not_depend_on_the_question(pico: Pico, calibration_text: Path, tmp_path: Path, bits: int) -> None:
    text = f"passes: [{{kind: lorc, ratio: .5, rank_step: 4, latent_bits: {bits}}}]\n" if bits == 16 else (
        "passes: [{kind: lorc, ratio: .8, rank_step: 32, latent_bits: 8}]\n"
    )  # fmt: skip
    model = pico(max_position_embeddings=512)
    apply(Job(parse_recipe(text), text, (), model, tmp_path / "out", "x"), lambda event: None)
    windows = torch.randint(1, 128, (2, 512), generator=torch.Generator().manual_seed(0))
    loaded = load(tmp_path / "out", dtype=torch.float32)
    *_, found = evaluate_long(loaded, load_tokenizer(model), windows, shared=True).shared
    assert found.second == pytest.approx(found.anew, rel=1e-4)
