"""Every family by the same table: compressed by gptq and by latents, read by stock transformers and by our runtime."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pico import FAMILIES, stock_logits

from compressor.cli.apply import plan
from compressor.compress.apply import Job, apply
from compressor.compress.plan import Plan
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.errors import RecipeError
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.families import FAMILIES as KNOWN
from compressor.runtime.model.families import text_config

Pico = Callable[..., Path]
IDS = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(3))
# Families whose rows hold what is tested elsewhere in any number of ways run once.
QUICK = [family for family in FAMILIES if family not in ("mistral", "qwen2", "qwen3_moe", "olmoe", "deepseek_v2")]
# Sliding windows everywhere, latents of their own, one matrix for queries, keys and values, or capped scores.
NO_LATENTS = {"mistral", "qwen2", "phi3", "deepseek_v2", "deepseek_v3", "gemma2", "gpt2"}


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


def test_capped_scores_are_no_place_for_latents(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="caps the scores of attention"):
        made("{kind: lorc, ratio: 1}", pico("gemma2"), tmp_path / "out", calibration_text)


def test_a_matrix_that_no_group_names_is_told(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = KNOWN["llama"]
    monkeypatch.setitem(KNOWN, "llama", replace(whole, stages=whole.stages[:-1]))
    plan("w4a16-rtn", str(pico()), edits=["passes.0.group_size=32"])
    told = capsys.readouterr().out
    names = [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    assert f"2 matrices of blocks stay as they are, for their family does not name them: {', '.join(names)}" in told
    plan("w4a16-rtn", str(pico()), edits=["passes.0.group_size=32"], as_json=True)
    assert json.loads(capsys.readouterr().out)["left"] == names


@torch.no_grad()
def test_loading_draws_no_random_numbers(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    """Nor do embeddings with a scale, or keys that are turned again, change what a user's seed gives."""
    made("{kind: lorc, ratio: 0.5}", pico("gemma3_text"), tmp_path / "out", calibration_text)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load(tmp_path / "out")
    assert torch.equal(torch.rand(3), expected)


def test_every_family_is_in_the_table() -> None:
    tested = {text_config(config).get("model_type", family) for family, config in FAMILIES.items()}
    assert set(KNOWN) <= tested | {"qwen2_5_vl_text", "qwen3_vl_text"}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_what_is_beside_the_language_model_is_carried(
    pico: Pico, calibration_text: Path, tmp_path: Path, family: str
) -> None:
    model = Path(shutil.copytree(pico(family), tmp_path / "model"))
    (model / "preprocessor_config.json").write_text("{}")
    made("{kind: rtn, bits: 4, group_size: 32}", model, tmp_path / "out", calibration_text)
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == "{}"
    assert "AutoModelForImageTextToText.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    before, after = Checkpoint(model), Checkpoint(tmp_path / "out")
    outside = before.outside_names()
    assert any("vision" in name or "visual" in name for name in outside)
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in outside)
