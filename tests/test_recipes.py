"""Every shipped recipe on the tiny models against `recipes/baselines.json`, by the command that users run: quality,
bytes, format. A few of them here; continuous integration runs `make check`, all.

Quality is compared closely only where the built-in text is the same (it varies with the Python version).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from command import run

from compressor.compress.baseline import Baseline
from compressor.compress.recipe import parse_recipe, shipped

ROOT = Path(__file__).resolve().parent.parent
BASELINES = ROOT / "recipes" / "baselines.json"


@pytest.mark.parametrize(("model", "recipe"), [("tiny-llama", "w8a8-int8"), ("tiny-moe", "moe-reap-25")])
def test_baseline(model: str, recipe: str) -> None:
    run("check", recipe, "--model", f"examples/{model}", "--baseline", BASELINES, cwd=ROOT)


def test_every_recipe_has_a_baseline() -> None:
    """Rows of tiny-moe are not of blocks of 256."""
    models = Baseline.read(BASELINES).models
    for name, left_out in (("tiny-llama", "moe"), ("tiny-moe", "gguf")):
        assert set(models[name].recipes) == {recipe for recipe in shipped() if left_out not in recipe}
        for recipe, entry in models[name].recipes.items():
            parse_recipe(shipped()[recipe], recipe, entry.edits)


def test_quality_falls_in_the_expected_order() -> None:
    for name, found in Baseline.read(BASELINES).models.items():
        for recipes in (
            ("w8a16", "w4a16-gptq", "w3a16-gptq", "w2a16-gptq"),
            ("w4a16-gptq", "w4a16-rtn"),
            ("w8a16", "w8a8-int8", "w8a8-fp8"),
            ("w4a16-gptq", "armor-24", "armor-24-w4", "sparsegpt-24", "sparsegpt-24-w4"),
            ("armor-24", "armor-24-paper"),
            ("latents-50", "latents-w4"),
            ("latents-8bit", "latents-w4"),
            ("moe-width-50-w4", "moe-reap-25", "moe-reap-25-w4", "moe-reap-dern-50"),
            ("latents-50", "lorc-50"),
        ):
            order = [found.recipes[recipe].figures.kl_mean for recipe in recipes if recipe in found.recipes]
            assert order == sorted(order), name
