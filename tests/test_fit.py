"""A recipe for so many bytes: what it makes fits, for the reader that was named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run

from compressor.compress.apply import Job, apply
from compressor.compress.events import Allocated, Event
from compressor.compress.fit import READERS, Aim, fitted
from compressor.compress.passes.linear.gptq import Gptq
from compressor.compress.plan import Plan, make_plan
from compressor.compress.recipe import Recipe, parse_recipe
from compressor.runtime.errors import RecipeError
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.skeleton import Skeleton

Pico = Callable[..., Path]
# Wide enough that scales, which pico models have many of, are not what decides.
GIVEN = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "dtype": torch.bfloat16}


def made(model: Path, nbytes: float, **options: Any) -> tuple[Recipe, Plan]:
    skeleton = Skeleton(Checkpoint(model))
    recipe = parse_recipe(fitted(skeleton, Aim(nbytes, **options)), "auto")
    return recipe, make_plan(recipe, skeleton)


@pytest.mark.parametrize("reader", ["transformers", "vllm", "vllm-cpu", "compressor"])
def test_a_reader_gets_what_it_reads(pico: Pico, reader: str) -> None:
    model = pico("llama", **GIVEN)
    whole = Checkpoint(model).nbytes
    for share in (0.85, 0.7) if reader == "vllm-cpu" else (0.85, 0.7, 0.55):
        recipe, plan = made(model, share * whole, reader=reader)
        assert plan.bytes_after <= share * whole
        assert READERS[reader] in plan.readers  # type: ignore[index]
        if (options := recipe.passes[0].model_dump())["bits"] == "mixed":
            assert set(options["choices"]) == ({4, 8} if reader == "vllm" else {2, 3, 4, 5, 6, 8})
            assert set(options["group_sizes"]) == (set() if reader == "vllm" else {128, 256})


def test_the_file_is_as_large_as_asked_for_and_no_larger(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    model = pico("llama", **GIVEN)
    edits = (f"data.source={calibration_text}", "data.samples=4", "data.sequence_length=64")
    lost = []
    for number, share in enumerate((0.3, 0.4)):
        wanted, told = share * Checkpoint(model).nbytes, list[Event]()
        text = fitted(Skeleton(Checkpoint(model)), Aim(wanted, "compressor"))
        out = tmp_path / str(number)
        apply(Job(parse_recipe(text, "auto", edits), text, edits, model, out, str(model)), told.append)
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        assert 0.93 * wanted < size <= wanted
        [shared] = [event for event in told if isinstance(event, Allocated)]
        lost.append(shared.lost)
        sizes, losses = zip(*shared.curve, strict=True)
        assert list(sizes) == sorted(sizes)
        assert list(losses) == sorted(losses, reverse=True)
    assert lost[1] < lost[0]


@pytest.mark.parametrize("reader", ["transformers", "vllm"])
def test_experts_are_of_one_form_where_engines_want_it(
    pico: Pico, calibration_text: Path, tmp_path: Path, reader: Any
) -> None:
    model = pico("mixtral", **GIVEN)
    edits = (f"data.source={calibration_text}", "data.samples=4", "data.sequence_length=64", "limits.kl=null")
    chosen = []
    for share in (0.4, 0.48):
        wanted, told = share * Checkpoint(model).nbytes, list[Event]()
        text = fitted(Skeleton(Checkpoint(model)), Aim(wanted, reader))
        out = tmp_path / f"{share}"
        plan = apply(Job(parse_recipe(text, "auto", edits), text, edits, model, out, str(model)), told.append)
        assert READERS[reader] in plan.readers  # type: ignore[index]
        assert plan.bytes_after <= wanted
        [step] = plan.recipe.passes
        assert isinstance(step, Gptq)
        assert step.widths is not None
        assert (step.sizes is not None) == (reader == "transformers")
        forms = {(".experts." in name, bits, step.size(name)) for name, bits in step.widths.items()}
        assert len(forms) == 2
        chosen.append(max(forms)[1])  # of experts
        [shared] = [event for event in told if isinstance(event, Allocated)]
        assert shared.nbytes <= step._budget
    assert chosen[0] < chosen[1] or reader == "vllm"


def test_the_cache_counts_for_the_tokens_that_are_to_be_kept(pico: Pico) -> None:
    model = pico("llama", **GIVEN)
    skeleton, whole = Skeleton(Checkpoint(model)), Checkpoint(model).nbytes
    plan = make_plan(parse_recipe("passes: [{kind: rtn}]"), skeleton)
    cache = 512 * plan.kv_before
    alone, beside = (made(model, 0.6 * whole + n * plan.kv_before, reader="compressor", context=n)[0] for n in (0, 512))
    assert alone.passes[0].model_dump()["average_bits"] == pytest.approx(
        beside.passes[0].model_dump()["average_bits"], abs=1e-3
    )
    recipe, cut = made(model, 0.6 * whole + cache, reader="compressor", context=512, kv_share=0.5)
    assert [step.kind for step in recipe.passes] == ["lorc", "gptq", "gptq"]
    assert cut.kv_after <= 0.5 * plan.kv_before
    with pytest.raises(RecipeError, match="vllm caches keys and values as they are; with --for compressor"):
        made(model, whole, reader="vllm", kv_share=0.5)


def test_what_is_cached_in_latents_fits_too(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    """Factors of keys and values are not what bits are shared out among."""
    model = pico("llama", **GIVEN)
    wanted = 0.3 * Checkpoint(model).nbytes
    edits = (f"data.source={calibration_text}", "data.samples=4", "data.sequence_length=64")
    text = fitted(Skeleton(Checkpoint(model)), Aim(wanted, "compressor", kv_share=0.3))
    out = tmp_path / "out"
    done = apply(Job(parse_recipe(text, "auto", edits), text, edits, model, out, str(model)), lambda event: None)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert 0.9 * wanted < size <= wanted
    assert done.kv_after <= 0.3 * done.kv_before


@pytest.mark.parametrize("reader", ["transformers", "compressor", "llama.cpp"])
def test_the_least_that_is_told_can_be_asked_for(reader: Any, pico: Pico) -> None:
    model = pico("llama", **{**GIVEN, "hidden_size": 256, "num_attention_heads": 8})
    with pytest.raises(RecipeError, match="is the least") as refused:
        made(model, 1000, reader=reader)
    told = str(refused.value).split()[1:3]
    nbytes = float(told[0]) * {"kB": 1e3, "MB": 1e6}[told[1]]
    _, plan = made(model, nbytes, reader=reader)
    assert 0.9 * nbytes < plan.bytes_after <= nbytes


def test_why_nothing_is_made_is_said(pico: Pico) -> None:
    model = pico("llama", **GIVEN)
    with pytest.raises(RecipeError, match="one step of ranks"):
        made(model, 1e5, reader="compressor", kv_share=0.01)
    with pytest.raises(RecipeError, match="not blocks of 256"):
        made(model, 1e5, reader="llama.cpp")
    with pytest.raises(RecipeError, match="caches something else than keys and values"):
        made(pico("deepseek_v3"), 1e5, reader="compressor", context=100)


def test_changes_that_make_it_larger_are_warned_of(pico: Pico, tmp_path: Path) -> None:
    model = pico("llama", **GIVEN)
    size = f"{0.5 * Checkpoint(model).nbytes / 1e6:.3f}MB"
    words = ["plan", "auto", model, "--fit", size, "--set", "data.samples=4", "--set", "data.sequence_length=64"]
    assert "more than --fit" not in run(*words, cwd=tmp_path).stderr
    for edit in ("output.format=dense", "passes.0.ignore=['*.mlp.*']", "passes.0.average_bits=8"):
        said = run(*words, "--set", edit, cwd=tmp_path).stderr.replace("\n", " ")
        assert "are more than --fit" in said


def test_what_does_not_fit_or_fits_already_is_said(pico: Pico) -> None:
    model = pico("llama", **GIVEN)
    with pytest.raises(RecipeError, match="is the least that this model becomes for transformers; ask for as much"):
        made(model, 1000)
    with pytest.raises(RecipeError, match="as it is, which fits"):
        made(model, 1e9)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["auto"], "auto makes a recipe for so many bytes: say how many, as in --fit 12GB"),
        (["auto", "--fit", "12"], "--fit 12: write it as 16GB or 500MB"),
        (["auto", "--fit", "1MB", "--for", "me"], "--for me: say one of transformers, vllm"),
        (["auto", "--fit", "1MB", "--context", "many"], "--context many: write it as 32k"),
        (["w4a16-rtn", "--fit", "1MB"], "--fit is for the recipe auto"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], said: str, pico: Pico, tmp_path: Path) -> None:
    recipe, *options = words
    result = run("plan", recipe, pico("llama"), *options, cwd=tmp_path, code=2)
    assert said in result.stderr.replace("\n", " ")
