"""Every shipped recipe on the tiny models against the committed baseline: quality, bytes, format.

    python tests/test_recipes.py        # measure again and write tests/baselines.json

Quality is compared only where the built-in text is the same (it varies with the Python version).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from compressor.calibrate.corpus import builtin_corpus, token_windows
from compressor.compress.apply import Job, apply
from compressor.compress.evaluate import evaluate
from compressor.compress.recipe import parse_recipe, shipped
from compressor.runtime import load

ROOT = Path(__file__).resolve().parent.parent
BASELINES = Path(__file__).with_name("baselines.json")
EDITS = ("data.samples=32", "data.sequence_length=512")  # with less, experts make the result a matter of chance
# Iterations and sweeps that fit a test.
SMALL = {
    "armor-24": ("passes.0.iterations=10",),
    "armor-24-w4": ("passes.0.iterations=10",),
    "armor-24-paper": ("passes.0.iterations=20",),
    "everything-moe": ("passes.2.iterations=3",),
    "sparsegpt-24": ("passes.0.sweeps=3",),
    "sparsegpt-24-w4": ("passes.0.sweeps=3",),
}
QUICK = ("w4a16-rtn", "w8a8-int8", "lorc-50", "moe-reap-25")
MODELS = ("tiny-llama", "tiny-moe")
# Rows of tiny-moe are not of blocks of 256.
CASES = [
    (recipe, name)
    for recipe in shipped()
    for name in MODELS
    if ("gguf" not in recipe if name == "tiny-moe" else "moe" not in recipe)
]


@cache
def base(name: str) -> tuple[Any, torch.Tensor]:
    folder = ROOT / "examples" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = token_windows(builtin_corpus("evaluation"), tokenizer, samples=24, sequence_length=256, seed=0)
    return load(folder, dtype=torch.float32), windows


def corpus_hash() -> str:
    return builtin_corpus("calibration").sha256 + builtin_corpus("evaluation").sha256


def measure(recipe: str, name: str, out: Path) -> dict[str, Any]:
    text = shipped()[recipe]
    edits = (*EDITS, *SMALL.get(recipe, ()))
    job = Job(parse_recipe(text, recipe, edits), text, edits, ROOT / "examples" / name, out, name)
    plan = apply(job, lambda event: None)
    model, windows = base(name)
    result = evaluate(load(out, dtype=torch.float32), windows, model)
    assert result.against is not None
    return {
        "bytes": plan.bytes_after,
        "kv_bytes_per_token": plan.kv_after,
        "format": plan.format.name,
        "kl_mean": result.against.kl_mean,
        "perplexity_ratio": result.against.perplexity_ratio,
    }


def _cases() -> list[Any]:
    """One recipe of a kind on one model; marked, all others."""
    first = dict(reversed(CASES))
    quick = [(recipe, first[recipe]) for recipe in QUICK]
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.long) for case in CASES]


@pytest.mark.parametrize(("recipe", "name"), _cases())
def test_baseline(recipe: str, name: str, tmp_path: Path) -> None:
    baselines = json.loads(BASELINES.read_text(encoding="utf-8"))
    expected = baselines["models"][name][recipe]
    found = measure(recipe, name, tmp_path / "out")
    for key in ("bytes", "kv_bytes_per_token", "format"):
        assert found[key] == expected[key]
    # Thread counts and processors round differently; a broken solver is far outside of either tolerance.
    tolerance = 0.08 if baselines["corpus"] == corpus_hash() else 0.5
    assert found["kl_mean"] == pytest.approx(expected["kl_mean"], rel=tolerance)


def test_quality_falls_in_the_expected_order() -> None:
    for name, found in json.loads(BASELINES.read_text(encoding="utf-8"))["models"].items():
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
            order = [found[recipe]["kl_mean"] for recipe in recipes if recipe in found]
            assert order == sorted(order), name


if __name__ == "__main__":
    import tempfile

    content: dict[str, Any] = {"corpus": corpus_hash(), "models": {}}
    for recipe_name, model_name in CASES:
        found = measure(recipe_name, model_name, Path(tempfile.mkdtemp()) / "out")
        content["models"].setdefault(model_name, {})[recipe_name] = found
    BASELINES.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
