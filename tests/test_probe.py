"""Families that are found by running them: what is described is found alike, what is not is run exactly or refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import FAMILIES, benchmark
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compressor.cli.apply import plan
from compressor.runtime import load
from compressor.runtime.errors import ModelError, RecipeError
from compressor.runtime.model import disk_names, probe
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.families import FAMILIES as KNOWN
from compressor.runtime.model.families import Family, Group
from compressor.runtime.model.folds import seams
from compressor.runtime.model.trace import traced
from compressor.runtime.stored import open_model

families = benchmark("families")
DESCRIBED = [name for name in KNOWN if name in FAMILIES]
# How often stages of equal groups differ: MLPs that read what attention does are measured with it.
PARALLEL = {"cohere2"}


# Windows, capped scores, or layers that do not rotate: what a row says of these is not found.
NO_LATENTS = {"mistral", "gemma2", "cohere2", "smollm3", "exaone4"}


@functools.cache
def found_of(name: str) -> Family:
    return probe.find(families.config_of(name))


def groups(family: Family) -> dict[frozenset[str], str]:
    return {frozenset(group.linears): group.reads for stage in family.stages for group in stage}


@pytest.mark.parametrize("name", DESCRIBED)
def test_what_is_described_is_what_is_found(name: str) -> None:
    found, row = found_of(name), KNOWN[name]
    own = groups(found)
    for linears, reads in own.items():
        assert any(linears <= other for other in groups(row)), linears
        assert {reads} == {other for key, other in groups(row).items() if linears <= key}
    assert (found.offset_norms, found.centered, found.head) == (row.offset_norms, row.centered, row.head)
    assert found.ends.items() <= row.ends.items()
    assert (found.keys, found.values) == (("", "") if name in NO_LATENTS else (row.keys, row.values))
    assert (found.entrance, found.transposed, found.joined) == (row.entrance, row.transposed, row.joined)
    if any("experts" in linear for linears in own for linear in linears):
        ours, theirs = found.experts, row.experts
        assert (ours.where, ours.router, ours.width, ours.top_k) == (
            theirs.where,
            theirs.router,
            theirs.width,
            theirs.top_k,
        )
        assert ours.fused == theirs.fused
    start = f"{row.decoder}.{row.layers}"
    names = [f"{start}.3.{name}.weight".replace("*", "5") for linears in own for name in linears]
    for one in [*names, f"{row.decoder}.{row.embedding}.weight", f"{start}.0.{row.experts.router}.weight"]:
        assert found.disk_name(one) == row.disk_name(one)
        assert found.memory_name(found.disk_name(one)) == one


@pytest.mark.parametrize("name", DESCRIBED)
def test_groups_come_after_what_they_need(name: str) -> None:
    """Whatever the row says, a stage's inputs are final once the stages before it are."""
    found, row = found_of(name), KNOWN[name]
    places = [
        {linear: place for place, stage in enumerate(family.stages) for group in stage for linear in group.linears}
        for family in (found, row)
    ]
    for group in (group for stage in found.stages for group in stage):
        feeder = group.reads
        if feeder in places[0]:
            assert all(places[0][feeder] < places[0][linear] for linear in group.linears)
    if name not in PARALLEL:
        shared = places[0].keys() & places[1].keys()
        assert sorted(shared, key=lambda one: (places[0][one], one)) == sorted(
            shared, key=lambda one: (places[1][one], one)
        )


# Of each mechanism one: gated delta nets, state spaces, MLA, lists of blocks of other names, experts named otherwise or
# fused on disk, dense layers among sparse ones, two matrices in an MLP, positions that are added, a norm behind the
# embedding, factors and buffers of the whole model, a decoder of another name on disk, experts without gates, parts
# that lie below one another in memory alone, several streams, keys and values that blocks share, ids that they look up,
# routers that scale what enters experts.
NEW = ["gpt_oss", "qwen3_next", "jamba", "glm4_moe_lite", "gpt_neox", "minimax_m2", "ernie4_5_moe", "opt", "bloom"]
NEW += [
    "falcon_h1",
    "nemotron_h",
    "kimi_linear",
    "bailing_hybrid",
    "gemma3n_text",
    "gemma4_text",
    "deepseek_v4",
    "xglm",
    "llama4_text",
]
# Of these, stock transformers does not build linears that have no weight, or finds other names.
ALONE = {"gpt_oss", "llama4_text", "kimi_linear", "bailing_hybrid", "gemma3n_text", "deepseek_v4"}


@pytest.mark.parametrize("name", NEW)
def test_what_nobody_described_is_compressed_and_read_by_stock_transformers(name: str, tmp_path: Path) -> None:
    assert name not in KNOWN
    said = families.check(families.build(name, tmp_path / "model"), tmp_path)
    assert [line.split()[0] for line in said][:2] == ["rtn", "gptq"]
    assert all(("read by transformers" in line) == (name not in ALONE) for line in said[:2])


@pytest.mark.parametrize(("name", "cached"), [("arcee", True), ("minimax_m2", True), ("bitnet", False)])
def test_latents_for_attention_that_does_what_ours_does(name: str, cached: bool, tmp_path: Path) -> None:
    """BitNet's has a norm before the output projection."""
    assert bool(found_of(name).keys) == cached
    assert ("latents" in families.check(families.build(name, tmp_path / "model"), tmp_path)) == cached


@pytest.mark.parametrize("name", ["minimax_m2", "ernie4_5_moe", "qwen3_5_moe_text", "llama4_text"])
@pytest.mark.parametrize("step", ["{kind: expert_prune, ratio: 0.25}", "{kind: expert_width, width: 16}"])
def test_experts_of_what_was_found_are_fewer_or_narrower(name: str, step: str, tmp_path: Path) -> None:
    model = families.build(name, tmp_path / "model")
    families.compress(model, tmp_path / "out", step)
    plain, found = families.stock_logits(model), families.stock_logits(tmp_path / "out")
    assert 0 < (found - plain).norm() / plain.norm() < 1
    own = load(tmp_path / "out", dtype=torch.float32)(input_ids=families.IDS, use_cache=False).logits
    assert (own - found).norm() / found.norm() < 1e-5


@pytest.mark.parametrize(
    "step", ["{kind: expert_prune, ratio: 0.25}", "{kind: expert_prune, keep: 3, criterion: reconstruction}"]
)
def test_a_router_with_further_tensors_keeps_those(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4's scales channels before it chooses, and lies beside the MLP, not in it."""
    sparse = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 704}
    monkeypatch.setitem(families.SAID, "gemma4_text", {"hidden_size_per_layer_input": 0, **sparse})
    model = families.build("gemma4_text", tmp_path / "model")
    families.compress(model, tmp_path / "out", step)
    found, own = families.stock_logits(tmp_path / "out"), load(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(own(input_ids=families.IDS, use_cache=False).logits, found, atol=1e-4)
    assert open_model(tmp_path / "out").text_config["num_experts"] == 3
    assert open_model(tmp_path / "out").family.experts.router == "router"


def test_sums_of_outputs_do_not_choose_experts_whose_inputs_are_scaled(tmp_path: Path) -> None:
    model = families.build("llama4_text", tmp_path / "model")
    with pytest.raises(RecipeError, match="the router's coefficients multiply what enters them; use reap"):
        families.compress(model, tmp_path / "out", "{kind: expert_prune, keep: 3, criterion: reconstruction}")


def test_scales_move_across_seams_that_were_found(tmp_path: Path) -> None:
    model = families.build("qwen3_next", tmp_path / "model")
    families.compress(model, tmp_path / "out", "{kind: awq}, {kind: rtn, bits: 8, group_size: 32}")
    plain, found = families.stock_logits(model), families.stock_logits(tmp_path / "out")
    assert (found - plain).norm() / plain.norm() < 0.1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nanochat", r"run block by block, its answers are [\d.e+]+ off"),
        ("longcat_flash", "its blocks are not in a list of their own"),
        ("jetmoe", r"model\.layers\.0\.mlp\.input_linear\.weight has three dimensions, and is not of experts"),
        ("hy_v4", "its blocks hand on more than hidden states, keys and values"),
        ("ctrl", "what enters its first block is changed by more than a factor, positions or a norm"),
    ],
)
def test_what_is_not_run_exactly_is_refused_with_the_reason(name: str, why: str, tmp_path: Path) -> None:
    model = families.build(name, tmp_path / "model")
    with pytest.raises(ModelError, match=rf"model_type '{name}' is not described here, nor found by running it: {why}"):
        open_model(model).family  # noqa: B018
    with pytest.raises(ModelError, match="nor found by running it"):
        plan("w4a16-rtn", str(model))


def test_a_type_that_transformers_does_not_know(tmp_path: Path) -> None:
    model = families.build("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "llama9"}))
    with pytest.raises(ModelError, match="model_type 'llama9' is not a family that transformers knows"):
        Checkpoint(model).family  # noqa: B018


def test_latents_are_not_for_attention_of_another_kind(tmp_path: Path) -> None:
    model = families.build("bitnet", tmp_path / "model")
    with pytest.raises(RecipeError, match="lorc"):
        families.compress(model, tmp_path / "out", "{kind: lorc, ratio: 0.5}")


class Block(nn.Module):
    """Something of everything that matters for seams."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("a", "b", "c", "d", "e", "f", "g"):
            self.add_module(name, nn.Linear(8, 8, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.a(x), self.b(x)
        c = self.c(a * b.sigmoid())  # a, channel by channel
        d = self.d(c + x)  # of a sum
        e = self.e((c @ c.transpose(-1, -2)).softmax(-1) @ d)  # d, tokens added up
        f = self.f(e * e)  # twice in a product
        out: torch.Tensor = self.g(f @ torch.eye(8))  # channels added up
        return out


def test_what_is_linear_in_what() -> None:
    block = Block()
    x = torch.randn(2, 3, 8)
    trace = traced(block, lambda: block(x))
    linear = {
        name: {one for one, linearly in source.linear.items() if linearly} for name, source in trace.reads.items()
    }
    assert linear == {"a": set(), "b": set(), "c": {"a"}, "d": set(), "e": {"d"}, "f": set(), "g": set()}
    assert set(trace.reads["g"].linear) == set("abcdef")
    assert trace.inputs["a"] == trace.inputs["b"] != trace.inputs["c"]


def test_segments_that_make_one_name_of_another() -> None:
    pairs = {
        "model.layers.0.mlp.gate.weight": "model.layers.0.mlp.router.gate.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight": "model.layers.0.mlp.experts.0.w3.weight",
        "model.layers.1.mlp.gate.weight": "model.layers.1.mlp.router.gate.weight",
        "model.norm.weight": "model.norm.weight",
    }
    assert disk_names._segments(pairs) == {"gate": "router.gate", "up_proj": "w3"}
    with pytest.raises(probe.Unfit, match=r"b\.weight is model\.layers\..\..\.weight on disk"):
        disk_names._segments(
            {"model.layers.0.b.weight": "model.layers.0.c.weight", "model.layers.1.b.weight": "model.layers.1.d.weight"}
        )


def test_a_seam_that_changes_answers_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a norm whose output something else reads, too."""
    real = probe.groups_of

    def wrong(*args: object, **options: object) -> list[list[Group]]:
        stages = real(*args, **options)  # type: ignore[arg-type]
        return [
            [Group(group.linears, group.reads.replace("post_attention", "input")) for group in stage]
            for stage in stages
        ]

    monkeypatch.setattr(probe, "groups_of", wrong)
    found = probe.find(families.config_of("arcee"))
    assert groups(found)[frozenset({"mlp.up_proj"})] == ""


def test_seams_of_a_family_that_was_found_serve_every_block(tmp_path: Path) -> None:
    checkpoint = open_model(families.build("jamba", tmp_path / "model"))
    skeleton = probe._skeleton(checkpoint.family, checkpoint.path)
    assert all(seams(skeleton, index) for index in range(skeleton.blocks))


def test_experts_in_one_tensor_though_transformers_writes_them_one_by_one(tmp_path: Path) -> None:
    """As Qwen3.5's mixtures are published."""
    model = families.build("qwen3_5_moe_text", tmp_path / "model")
    plain, tensors = families.stock_logits(model), load_file(model / "model.safetensors")
    for where in {name.partition(".experts.")[0] + ".experts" for name in tensors if ".experts." in name}:
        count = len({name for name in tensors if name.startswith(where + ".") and name.endswith("down_proj.weight")})
        parts = [[tensors.pop(f"{where}.{n}.{p}_proj.weight") for p in ("gate", "up", "down")] for n in range(count)]
        tensors[f"{where}.gate_up_proj"] = torch.stack([torch.cat(part[:2]) for part in parts])
        tensors[f"{where}.down_proj"] = torch.stack([part[2] for part in parts])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert torch.allclose(families.stock_logits(model), plain)
    said = families.check(model, tmp_path)
    assert all("read by transformers" in line for line in said)


def test_kinds_of_layers_that_begin_somewhere(tmp_path: Path) -> None:
    """Whatever is said of each layer, and from which one on experts are."""
    types = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 4
    config = CONFIG_MAPPING["afmoe"](num_hidden_layers=16, num_dense_layers=6, layer_types=types)
    found = probe.find(config)
    assert frozenset({"mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"}) in groups(found)
    assert found.experts.router == "mlp.router"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"linear_conv_kernel_dim": 10**6}, "a small copy of it has .* weights"),
        ({"num_experts": 10**9}, "num_experts is 1000000000, which no model has"),
        ({"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers is 1000000000, and there are"),
    ],
)
def test_a_config_that_says_too_much_is_refused_at_once(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    model = families.build("qwen3_next", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=why):
        open_model(model).family  # noqa: B018


def test_nobodys_code_is_run(tmp_path: Path) -> None:
    model = families.build("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mt5", "auto_map": {"AutoModelForCausalLM": "somebody/something--modeling_x.X"}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="a small copy of it cannot be built"):
        open_model(model).family  # noqa: B018


def test_a_router_that_goes_by_more_than_its_weight_is_not_run_alone(tmp_path: Path) -> None:
    model = families.build("minimax_m2", tmp_path / "model")
    with pytest.raises(RecipeError, match=r"runs the router alone, which here goes by .*e_score_correction_bias too"):
        families.compress(model, tmp_path / "out", "{kind: expert_prune, keep: 3, criterion: reconstruction}")


def test_what_stays_beside_a_group_follows_the_scales_that_are_moved() -> None:
    """Gates of heads read the same norm: without them a scale could not be moved across it."""
    group = next(group for group in found_of("qwen3_5_text").stages[0] if "linear_attn.in_proj_qkv" in group.linears)
    assert group == Group(
        ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
        "input_layernorm",
        ("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    )


def test_engines_that_nobody_tried_are_not_named(tmp_path: Path) -> None:
    made = families.compress(families.build("arcee", tmp_path / "model"), tmp_path / "out", families.PASSES["rtn"])
    assert made.readers == ("compressor", "transformers")
