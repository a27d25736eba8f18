"""Layers that predict a token further ahead, wherever they lie: what they make, and that fewer experts leave them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import benchmark
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from compressor.calibrate.folders import RoutingFolder
from compressor.calibrate.routing import observe_routing
from compressor.compress.apply import Job, apply
from compressor.compress.events import Event, ExpertsKept
from compressor.compress.recipe import parse_recipe
from compressor.runtime.model.drafting import Drafter, drafters
from compressor.runtime.model.skeleton import Skeleton
from compressor.runtime.stored import open_model

families = benchmark("families")
Pico = Callable[..., Path]
IDS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(4))


@dataclass(frozen=True)
class Naming:
    """What a family calls the layer that drafts, and what is around it.

    Attributes:
        block: prefix of the layer; `joined`: the linear of both inputs; `head`: of its own, or the model's.
        offset: what norms add to their weights.
        loud: the expert that is to put out much.
    """

    block: str
    joined: str
    embedded: str
    known: str
    left: str
    head: str
    offset: float = 0.0
    loud: int = 5


def behind(block: int) -> Naming:
    own = f"model.layers.{block}."
    parts = (own + part for part in ("eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head"))
    return Naming(own, *parts)


APART = Naming(
    "mtp.layers.0.", "mtp.fc", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm", "lm_head", 1.0, 3
)


def naming(folder: Path) -> Naming:
    config = AutoConfig.from_pretrained(folder)
    return APART if config.model_type == "qwen3_next" else behind(config.num_hidden_layers)


def with_drafter(pico: Pico, folder: Path, family: str) -> Path:
    """A model with a layer that drafts tokens, as published ones have it: much like its last block."""
    if family == "qwen3_next":
        source = families.build(family, folder)
    else:
        source = Path(shutil.copytree(pico(family, dtype=torch.float32), folder))
    tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    names, last = naming(source), f"model.layers.{config['num_hidden_layers'] - 1}."
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    hidden = config["hidden_size"]
    for name, tensor in [(name, tensor) for name, tensor in tensors.items() if name.startswith(last)]:
        tensors[name.replace(last, names.block)] = (tensor.float() + noise(*tensor.shape)).to(tensor.dtype)
    for name in (names.embedded, names.known, names.left):
        tensors[f"{name}.weight"] = 1 - names.offset + noise(hidden)
    tensors[f"{names.joined}.weight"] = noise(hidden, 2 * hidden)
    if names.head != "lm_head":
        tensors[f"{names.block}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{names.head}.weight"] = tensors["lm_head.weight"].clone()
        config["num_nextn_predict_layers"] = 1
    tensors[f"{names.block}mlp.experts.{names.loud}.down_proj.weight"] *= 30  # for which nothing else makes up
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
    return source


def drafted(folder: Path, ids: Tensor) -> Tensor:
    skeleton = Skeleton(open_model(folder))
    hidden = skeleton.embed(ids)
    for index in range(skeleton.blocks):
        hidden = skeleton.run(skeleton.runner(index, skeleton.block(index)), hidden)
    assert drafters(skeleton) == [skeleton.blocks]
    drafter = Drafter(skeleton, skeleton.blocks)
    return drafter.answers(drafter.run(hidden, ids))


def drafted_by_hand(folder: Path, ids: Tensor) -> Tensor:
    """By stock transformers: a model of one block, the layer that drafts, behind what it joins."""
    tensors, config = load_file(folder / "model.safetensors"), AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names, last = naming(folder), f"model.layers.{config.num_hidden_layers - 1}."

    def normed(x: Tensor, name: str) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add(config.rms_norm_eps).rsqrt()
        return x * scale * (names.offset + tensors[f"{name}.weight"].float())

    with torch.no_grad():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        own = tensors["model.embed_tokens.weight"].float()[ids[:, 1:]]
        entered = torch.cat([normed(own, names.embedded), normed(hidden, names.known)], -1)
        entered = entered @ tensors[f"{names.joined}.weight"].float().T
        with tempfile.TemporaryDirectory() as room:  # the layer that drafts in place of the last block
            place = Path(shutil.copytree(folder, Path(room) / "model"))
            moved = {name: t for name, t in tensors.items() if not name.startswith((last, names.block))}
            moved |= {n.replace(names.block, last): t for n, t in tensors.items() if n.startswith(names.block)}
            save_file(moved, place / "model.safetensors", {"format": "pt"})
            other = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).model
        other.layers, other.norm = other.layers[-1:], torch.nn.Identity()
        other.config.num_hidden_layers = 1
        if kinds := getattr(other.config, "layer_types", None):
            other.config.layer_types = kinds[-1:]
        left = other(inputs_embeds=entered, use_cache=False).last_hidden_state
        found: Tensor = normed(left, names.left) @ tensors[f"{names.head}.weight"].float().T
        return found


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "qwen3_next"])
def test_layers_that_draft_tokens_have_fewer_experts_too(pico: Pico, tmp_path: Path, family: str) -> None:
    source = with_drafter(pico, tmp_path / "model", family)
    names, config = naming(source), AutoConfig.from_pretrained(source)
    blocks, count = config.num_hidden_layers, len(Skeleton(open_model(source)).layers[-1].mlp.experts)
    before = drafted(source, IDS)
    torch.testing.assert_close(before, drafted_by_hand(source, IDS), rtol=1e-4, atol=1e-4)
    told: list[Event] = []

    def prune(keep: int, out: Path) -> None:
        step = f"{{kind: expert_prune, keep: {keep}, refit: false}}"
        text = f"data: {{samples: 4, sequence_length: 32}}\npasses: [{step}]\n"
        apply(Job(parse_recipe(text), text, (), source, out, "small"), told.append)

    prune(count, tmp_path / "all")
    assert torch.equal(drafted(tmp_path / "all", IDS), before)
    told.clear()
    keep = 3 if count == 4 else 4
    prune(keep, tmp_path / "out")
    kept = {event.block: event.kept for event in told if isinstance(event, ExpertsKept)}
    assert blocks in kept
    assert len(kept[blocks]) == keep
    assert names.loud in kept[blocks]
    tensors, was = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", source))
    for place, number in enumerate(kept[blocks]):
        name = names.block + "mlp.experts.{}.up_proj.weight"
        assert torch.equal(tensors[name.format(place)], was[name.format(number)])
    router = f"{names.block}mlp.gate.weight"
    assert torch.equal(tensors[router], was[router][list(kept[blocks])])
    if family != "qwen3_next":
        assert len(tensors[f"{names.block}mlp.gate.e_score_correction_bias"]) == keep
        assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    after = drafted(tmp_path / "out", IDS)
    assert (after - before).norm() / before.norm() < 1
    torch.testing.assert_close(after, drafted_by_hand(tmp_path / "out", IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_next"])
def test_what_experts_of_a_draft_layer_do_is_seen_on_the_text(pico: Pico, tmp_path: Path, family: str) -> None:
    skeleton = Skeleton(open_model(with_drafter(pico, tmp_path / "model", family)))
    folder = RoutingFolder(tmp_path / "routing", {})
    observe_routing(skeleton, IDS, tmp_path / "scratch", folder, lambda index: None)
    assert folder.complete
    hidden = skeleton.embed(IDS)
    for index in range(skeleton.blocks):
        hidden = skeleton.run(skeleton.runner(index, skeleton.block(index)), hidden)
    drafter = Drafter(skeleton, skeleton.blocks)
    sizes = torch.zeros(len(drafter.layer.mlp.experts), dtype=torch.float64)

    def adding(number: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            sizes[number] += output.double().norm(dim=1).sum()

        return hook

    for number, expert in enumerate(drafter.layer.mlp.experts):
        expert.register_forward_hook(adding(number))
    drafter.run(hidden, IDS)
    seen, sample = folder.load(skeleton.blocks)
    assert int(seen.tokens.sum()) == IDS[:, 1:].numel() * skeleton.experts_per_token
    torch.testing.assert_close(seen.weighted.double(), sizes, rtol=1e-4, atol=1e-5)
    assert len(sample) == IDS[:, 1:].numel()
