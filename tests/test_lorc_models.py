"""Latents in the KV cache of whole models: the same answers, through every way of generating, from smaller tensors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from compressor.compress.apply import Job, apply
from compressor.compress.plan import Plan
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.attention import LatentAttention, RotaryTable, cache_bytes
from compressor.runtime.errors import ModelError, RecipeError

Pico = Callable[..., Path]
FULL = "{kind: lorc, ratio: 1}"
HALF = "{kind: lorc, ratio: 0.5}"
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
FLOAT = {"dtype": torch.float32}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "heads without groups": ("llama", {"num_key_value_heads": 4}),
    "llama-3 rotary": ("llama", {"rope_parameters": LLAMA3}),
    "yarn rotary": ("llama", {"rope_parameters": YARN}),
    "biases everywhere": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2, biases": ("qwen2", {"use_sliding_window": False}),
    "qwen3, norms of heads": ("qwen3", {}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "olmoe, norms over heads": ("olmoe", {}),
    "glm4_moe, half of a head rotated": ("glm4_moe", {}),
    "phimoe": ("phimoe", {}),
    "granitemoe, scaled": ("granitemoe", {}),
}


def made(recipe: str, model: Path, out: Path, text: Path | None = None) -> Plan:
    data = f"data: {{source: {text}, samples: 12, sequence_length: 64}}\n" if text else ""
    recipe = f"{data}passes: [{recipe}]\n"
    return apply(Job(parse_recipe(recipe), recipe, (), model, out, "pico"), lambda event: None)


def half(folder: Path) -> Any:
    """A loaded model of which prompts and single tokens may round alike."""
    return load(folder, dtype=torch.float32)


def prompt(rows: int = 2, tokens: int = 12) -> torch.Tensor:
    return torch.randint(1, 128, (rows, tokens), generator=torch.Generator().manual_seed(3))


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("granularity", ["joint", "per_head"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_full_rank_gives_the_models_own_logits(pico: Pico, tmp_path: Path, layout: str, granularity: str) -> None:
    family, changes = LAYOUTS[layout]
    source = pico(family, **changes, **FLOAT)
    made(f"{{kind: lorc, ratio: 1, granularity: {granularity}}}", source, tmp_path / "out")
    model, original = half(tmp_path / "out"), half(source)
    assert all(isinstance(layer.self_attn, LatentAttention) for layer in model.model.layers)
    ids = prompt()
    with torch.no_grad():
        expected = original(input_ids=ids).logits
        near(model(input_ids=ids, use_cache=False).logits, expected)
        cache = DynamicCache()
        parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([5, 1, 1, 4, 1], 1)]
        near(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("more", ["", ", latent_bits: 8", ", latent_bits: 4", ", granularity: per_head, rank_step: 2"])
def test_the_cache_gives_what_no_cache_gives(pico: Pico, tmp_path: Path, more: str) -> None:
    """For one recipe each: tokens one by one, static and dynamic, after a crop, with left padding."""
    made(f"{{kind: lorc, ratio: 0.3{more}}}", pico("llama", **FLOAT), tmp_path / "out")
    model, ids = half(tmp_path / "out"), prompt()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=16)):
            parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(1, 1)]
            near(torch.cat(parts, 1), expected)
        cache = DynamicCache()
        model(input_ids=ids, past_key_values=cache)
        cache.crop(-4)
        near(model(input_ids=ids[:, -4:], past_key_values=cache).logits, expected[:, -4:])
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], 1)
        mask = torch.cat([torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(ids)], 1)
        near(model(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, 3:], expected)
        cache, parts = DynamicCache(), []
        for end in range(1, padded.shape[1] + 1):  # a pad alone sees nothing, and spoils nothing
            token, seen = padded[:, end - 1 : end], mask[:, :end]
            positions = (seen.sum(1, keepdim=True) - 1).clamp(min=0)
            step = model(input_ids=token, attention_mask=seen, position_ids=positions, past_key_values=cache)
            parts.append(step.logits)
        near(torch.cat(parts, 1)[:, 3:], expected)


def generated(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    result: torch.Tensor = model.generate(ids, **settings)
    return result


def test_every_way_of_generating_agrees_with_none(pico: Pico, tmp_path: Path) -> None:
    made(HALF, pico("qwen3", **FLOAT), tmp_path / "out")
    model, ids = half(tmp_path / "out"), prompt(1, 9)
    expected = generated(model, ids, use_cache=False)
    for options in (
        {}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4},
        {"cache_implementation": "static", "prefill_chunk_size": 4},
    ):  # fmt: skip
        assert torch.equal(generated(model, ids, **options), expected), options
    beams = {"num_beams": 3, "length_penalty": 0.0}
    assert torch.equal(generated(model, ids, **beams), generated(model, ids, **beams, use_cache=False))


@pytest.mark.parametrize(("bits", "ranks"), [(8, (7, 31)), (4, (5, 29)), (4, (6, 10))])
def test_prompts_of_one_token_need_no_even_rank(pico: Pico, tmp_path: Path, bits: int, ranks: tuple[int, int]) -> None:
    """Behind an odd number of bytes of codes, scales lie at an odd address."""
    sizes = {
        f"model.layers.{i}.self_attn.{part}_proj": rank for i in (0, 1) for part, rank in zip("kv", ranks, strict=True)
    }
    made(f"{{kind: lorc, latent_bits: {bits}, ranks: {json.dumps(sizes)}}}", pico("llama", **FLOAT), tmp_path / "out")
    model, ids = half(tmp_path / "out"), prompt(1, 1)
    assert torch.equal(generated(model, ids), generated(model, ids, use_cache=False))


def test_rows_of_a_padded_batch_are_those_of_single_prompts(pico: Pico, tmp_path: Path) -> None:
    made(HALF, pico("llama", **FLOAT), tmp_path / "out")
    model, long = half(tmp_path / "out"), prompt(1, 10)
    short = long[:, 4:]
    batch = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.int64), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    found = generated(model, batch, attention_mask=mask)[:, 10:]
    assert torch.equal(found[:1], generated(model, long)[:, 10:])
    assert torch.equal(found[1:], generated(model, short)[:, 6:])


@pytest.mark.parametrize(("bits", "itemsize"), [(16, 2), (8, None), (4, None)])
@pytest.mark.parametrize("static", [False, True])
def test_the_tensors_of_the_cache_are_as_small_as_the_plan_says(
    pico: Pico, tmp_path: Path, bits: int, itemsize: int | None, static: bool
) -> None:
    source = pico("llama", max_position_embeddings=1024)
    plan = made(f"{{kind: lorc, ratio: 0.25, latent_bits: {bits}}}", source, tmp_path / "out")
    model, ids = load(tmp_path / "out"), prompt(2, 4)
    options = {"cache_implementation": "static"} if static else {}
    found: Any = model.generate(
        ids, max_new_tokens=512, min_new_tokens=512, do_sample=False, pad_token_id=0, return_dict_in_generate=True,
        **options,
    )  # fmt: skip
    tokens = found.past_key_values.layers[0].keys.shape[2]
    assert tokens >= 515
    assert cache_bytes(found.past_key_values) == plan.kv_after * tokens * 2
    assert plan.kv_after <= 0.25 * plan.kv_before
    if itemsize:
        ranks = [layer.self_attn.keys.rank + layer.self_attn.values.rank for layer in model.model.layers]
        assert plan.kv_after == sum(ranks) * itemsize
    original: Any = load(source)
    full = original.generate(ids, max_new_tokens=8, pad_token_id=0, return_dict_in_generate=True).past_key_values
    assert cache_bytes(full) == plan.kv_before * full.get_seq_length() * 2


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("which", ["k_proj", "v_proj"])
def test_only_one_of_keys_and_values_in_latents(pico: Pico, tmp_path: Path, which: str, bits: int) -> None:
    """The other is cached whole, before the rotary embedding; and both lie in tensors of one dtype."""
    recipe = f"{{kind: lorc, ratio: 0.5, targets: '*.{which}', latent_bits: {bits}}}"
    plan = made(recipe, pico("llama", **FLOAT), tmp_path / "out")
    assert 0.5 * plan.kv_before < plan.kv_after <= 0.75 * plan.kv_before
    model, ids = half(tmp_path / "out"), prompt()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=ids.shape[1])):
            parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([4, 1, 5, 1, 1], 1)]
            near(torch.cat(parts, 1), expected)
            assert cache_bytes(cache) == plan.kv_after * ids.numel()


class Angles(torch.nn.Module):
    """A rotary module of one angle."""

    def forward(self, x: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = slots[..., None].expand(-1, -1, 2).to(x.dtype)
        return angles.cos(), angles.sin()


@pytest.mark.parametrize("warm", [False, True])
def test_a_rotary_table_may_grow_between_any_two_lines(warm: bool) -> None:
    """As it does where another thread reads more of a longer cache."""
    like, lines = torch.empty(0), 12

    def grow(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code is not RotaryTable.halves.__code__:
            return None
        left -= event == "line"
        if left == 0:
            table(5000, like)
        return grow

    for line in range(1, lines + 1):
        table, left = RotaryTable(Angles()), line
        if warm:
            table.halves(7, like, 4)
        before = sys.gettrace()
        sys.settrace(grow)
        try:
            short = table.halves(7, like, 4)
        finally:
            sys.settrace(before)
        for length, (cosines, sines) in ((7, short), (5000, table.halves(5000, like, 4))):
            angles = torch.arange(float(length))
            assert torch.equal(cosines[:length, 0], angles.cos())
            assert torch.equal(sines[:length, 0], angles.sin())


def test_layers_with_a_window_keep_their_cache(pico: Pico, tmp_path: Path) -> None:
    source = pico("qwen2", **FLOAT)  # its second layer sees eight tokens
    plan = made(HALF, source, tmp_path / "out")
    assert {name.split(".")[2] for name in plan.rewritten} == {"0"}
    model, ids = half(tmp_path / "out"), prompt(1, 20)
    assert [isinstance(layer.self_attn, LatentAttention) for layer in model.model.layers] == [True, False]
    assert torch.equal(generated(model, ids), generated(model, ids, use_cache=False))
    with pytest.raises(RecipeError, match=r"passes\.0: lorc finds no key or value"):
        made(HALF, pico("mistral"), tmp_path / "other")


def test_positions_that_jump_are_refused(pico: Pico, tmp_path: Path) -> None:
    made(HALF, pico("llama", **FLOAT), tmp_path / "out")
    model, ids = half(tmp_path / "out"), prompt(1, 6)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ModelError, match="position_ids that jump"):
        model(input_ids=ids, position_ids=packed)
    shifted = torch.arange(5, 11)[None]
    near(
        model(input_ids=ids, position_ids=shifted, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits
    )
    cache = DynamicCache()
    model(input_ids=ids, past_key_values=cache)
    with pytest.raises(ModelError, match="position_ids that jump"):
        model(input_ids=ids, position_ids=packed, past_key_values=cache)
    tree = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()  # a mask of one's own, as trees of guesses have
    near(
        model(input_ids=ids, attention_mask=tree, position_ids=shifted, use_cache=False).logits,
        model(input_ids=ids, use_cache=False).logits,
    )
    for positions in ([0, 1, 2, 2, 3, 3], [0, 1, 2, 10, 11, 12]):
        with pytest.raises(ModelError, match="position_ids that jump"):
            model(input_ids=ids, attention_mask=tree, position_ids=torch.tensor([positions]), use_cache=False)


def test_rotary_embeddings_of_more_than_the_position_are_refused(pico: Pico, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(RecipeError, match=r"passes\.0: lorc: .* 'dynamic' depends on more"):
        made(HALF, pico("llama", rope_parameters=rope), tmp_path / "out")


def test_eager_attention_agrees(pico: Pico, tmp_path: Path) -> None:
    made(HALF, pico("llama", attention_bias=True, **FLOAT), tmp_path / "out")
    model, ids = half(tmp_path / "out"), prompt()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        model.set_attn_implementation("eager")
        near(model(input_ids=ids, use_cache=False).logits, expected)
        cache = DynamicCache()
        parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(1, 1)]
        near(torch.cat(parts, 1), expected)


@pytest.mark.parametrize(
    "after",
    [
        "{kind: gptq, bits: 4, group_size: 16}",
        "{kind: rtn, bits: 8, group_size: 32}",
        "{kind: armor, solver: als, block_size: 4, iterations: 4, targets: '*.mlp.*'}, {kind: gptq, bits: 8}",
        "{kind: sparse24}",
    ],
)
def test_passes_after_it_rewrite_the_factors(pico: Pico, tmp_path: Path, calibration_text: Path, after: str) -> None:
    recipe = f"{{kind: lorc, ratio: 0.5, calibrated: true, latent_bits: 8}}, {after}"
    plan = made(recipe, pico("qwen3_moe"), tmp_path / "out", calibration_text)
    assert plan.kv_after <= 0.5 * plan.kv_before
    assert plan.bytes_after < plan.bytes_before
    model = half(tmp_path / "out")
    ids = prompt()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        cache = DynamicCache()
        parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([6, 1, 1, 4], 1)]
    near(torch.cat(parts, 1), expected, 1e-4)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert isinstance(again.model.layers[0].self_attn, LatentAttention)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
