"""Every family by the same table: compressed by gptq and by latents, read by stock transformers and by our runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pico import FAMILIES, stock_logits

from compressor.compress.apply import Job, apply
from compressor.compress.plan import Plan
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.families import FAMILIES as KNOWN
from compressor.runtime.model.families import text_config

Pico = Callable[..., Path]
IDS = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(3))
# Families whose rows hold what is tested elsewhere in any number of ways run once.
QUICK = [family for family in FAMILIES if family not in ("mistral", "qwen2", "qwen3_moe", "olmoe", "deepseek_v2")]
# Sliding windows everywhere, latents of their own, one matrix for queries, keys and values, or capped scores.
NO_LATENTS = {"mistral", "qwen2", "phi3", "deepseek_v2", "deepseek_v3", "gemma2"}


def made(passes: str, model: Path, out: Path, text: Path) -> Plan:
    recipe = f"data: {{source: '{text}', samples: 4, sequence_length: 32}}\npasses: [{passes}]\n"
    return apply(Job(parse_recipe(recipe), recipe, (), model, out, "pico"), lambda event: None)


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 3e-5) -> None:
    assert float((found - expected).norm() / expected.norm()) < tolerance


@torch.no_grad()
def own_logits(folder: Path) -> torch.Tensor:
    logits: torch.Tensor = load(folder, dtype=torch.float32)(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("family", QUICK)
def test_quantized_weights_are_read_by_stock_transformers(
    pico: Pico, calibration_text: Path, tmp_path: Path, family: str
) -> None:
    """As the plan promises; in float32, for stock transformers rounds the weights of experts that it decodes."""
    model = pico(family, dtype=torch.float32)
    plan = made(
        "{kind: gptq, bits: 8, group_size: 32, refinements: 0, search: false}",
        model,
        tmp_path / "out",
        calibration_text,
    )
    assert not plan.left
    found = own_logits(tmp_path / "out")
    near(found, stock_logits(model, IDS), 0.2)
    if "transformers" in plan.readers:
        near(found, stock_logits(tmp_path / "out", IDS))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NO_LATENTS])
def test_latents_of_full_rank_change_nothing(pico: Pico, calibration_text: Path, tmp_path: Path, family: str) -> None:
    model = pico(family, dtype=torch.float32)
    made("{kind: lorc, ratio: 1}", model, tmp_path / "out", calibration_text)
    near(own_logits(tmp_path / "out"), stock_logits(model, IDS))


def test_every_family_is_in_the_table() -> None:
    tested = {text_config(config).get("model_type", family) for family, config in FAMILIES.items()}
    assert set(KNOWN) <= tested | {"qwen2_5_vl_text", "qwen3_vl_text"}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_what_is_beside_the_language_model_is_carried(
    pico: Pico, calibration_text: Path, tmp_path: Path, family: str
) -> None:
    model = pico(family)
    made("{kind: rtn, bits: 4, group_size: 32}", model, tmp_path / "out", calibration_text)
    before, after = Checkpoint(model), Checkpoint(tmp_path / "out")
    outside = before.outside_names()
    assert any("vision" in name or "visual" in name for name in outside)
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in outside)
