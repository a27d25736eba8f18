"""Bits where they matter: how they are shared out, and that engines find the same bits where they want them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.compress.apply import Job, apply
from compressor.compress.evaluate import evaluate
from compressor.compress.output.verify import verify
from compressor.compress.passes.linear.mixed import Mixed
from compressor.compress.plan import make_plan
from compressor.compress.recipe import parse_recipe
from compressor.compress.solvers.bits import _allocated, allocated
from compressor.compress.surveys import read_calibration
from compressor.runtime import load
from compressor.runtime.errors import RecipeError, ResourceError
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.skeleton import Skeleton
from compressor.runtime.stored import StoredModel

Pico = Callable[..., Path]
IDS = torch.arange(40)[None]
GIVEN = {
    "hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def compress(model: Path, out: Path, text: Path, passes: str) -> Path:
    recipe = f"data: {{source: '{text}', samples: 4, sequence_length: 64}}\npasses: [{passes}]\n"
    apply(Job(parse_recipe(recipe), recipe, (), model, out, str(model)), lambda event: None)
    return out


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def widths(out: Path) -> dict[str, int]:
    [step] = yaml.safe_load((out / "recipe.resolved.yaml").read_text())["passes"]
    found: dict[str, int] = step["widths"]
    return found


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**20), names=st.integers(1, 4), choices=st.integers(2, 4), share=st.floats(0, 1),
    convex=st.booleans(),
)  # fmt: skip
def test_few_could_share_bits_out_better(seed: int, names: int, choices: int, share: float, convex: bool) -> None:
    """And by no more than a step saves, the one that did not fit."""
    draw = torch.Generator().manual_seed(seed)
    costs = {str(n): (torch.rand(choices, generator=draw) + 0.1).cumsum(0).tolist() for n in range(names)}
    losses = {str(n): (4.0 ** -torch.arange(choices) * torch.rand(1, generator=draw)).tolist() for n in range(names)}
    if not convex:
        losses = {name: torch.rand(choices, generator=draw).sort(descending=True).values.tolist() for name in losses}
    least, most = (sum(cost[end] for cost in costs.values()) for end in (0, -1))
    budget = least + share * (most - least)

    def total(table: dict[str, list[float]], found: dict[str, int]) -> float:
        return sum(table[name][number] for name, number in found.items())

    every = [dict(zip(costs, each, strict=True)) for each in itertools.product(range(choices), repeat=names)]
    best = min(total(losses, each) for each in every if total(costs, each) <= budget + 1e-9)
    ahead = max(loss[0] - loss[-1] for loss in losses.values())  # what one step saves at most
    for found, more in ((allocated(losses, costs, budget + 1e-9), 0.0), (_allocated(losses, costs, budget), ahead)):
        assert total(costs, found) <= budget + 1e-9
        assert total(losses, found) <= best + more + 1e-9


def test_a_combination_that_fits_nowhere_is_the_cheapest() -> None:
    assert allocated({"a": [1.0, 0.5]}, {"a": [3.0, 2.0]}, 1.0) == {"a": 1}


def test_optimal_where_the_hull_is_met() -> None:
    allocated = _allocated
    losses = {"a": [8.0, 2.0, 0.5], "b": [4.0, 1.0, 0.25], "c": [1.0, 0.9, 0.0]}
    costs = {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0], "c": [1.0, 2.0, 3.0]}
    assert allocated(losses, costs, 3.0) == {"a": 0, "b": 0, "c": 0}
    assert allocated(losses, costs, 4.0) == {"a": 1, "b": 0, "c": 0}
    assert allocated(losses, costs, 5.0) == {"a": 1, "b": 1, "c": 0}
    assert allocated(losses, costs, 6.0) == {"a": 2, "b": 1, "c": 0}
    assert allocated(losses, costs, 7.0) == {"a": 2, "b": 2, "c": 0}
    assert allocated(losses, costs, 8.0) == {"a": 2, "b": 2, "c": 1}  # beyond the last corner that fits
    assert allocated(losses, costs, 9.0) == {"a": 2, "b": 2, "c": 2}
    bent = {"a": [8.0, 7.9, 0.0], "b": [4.0, 2.0, 1.9]}  # of a, the middle choice serves no budget
    assert allocated(bent, {name: [1.0, 2.0, 3.0] for name in bent}, 4.0) == {"a": 2, "b": 0}


def test_choices_need_not_rise() -> None:
    losses, costs = {"a": [1.0, 8.0, 3.0], "b": [1.0, 1.0, 4.0]}, {"a": [3.0, 1.0, 2.0], "b": [2.0, 2.0, 1.0]}
    assert allocated(losses, costs, 2.0) == {"a": 1, "b": 2}
    assert allocated(losses, costs, 3.0) == {"a": 2, "b": 2}
    assert allocated(losses, costs, 5.0) == {"a": 0, "b": 0}


@pytest.mark.parametrize(("choices", "average"), [("[3, 4]", 4), ("[4]", 4.5)])
def test_groups_are_chosen_too(
    choices: str, average: float, pico: Pico, calibration_text: Path, tmp_path: Path
) -> None:
    """Of each set of linears, bits and groups; the folder says both, and what was found can be used again."""
    model = pico("llama", **GIVEN)
    sizes = f"choices: {choices}, group_sizes: [16, 32, 128]"
    passes = f"{{kind: rtn, bits: mixed, average_bits: {average}, {sizes}}}"
    out = compress(model, tmp_path / "out", calibration_text, passes)
    [step] = yaml.safe_load((out / "recipe.resolved.yaml").read_text())["passes"]
    assert set(step["sizes"]) == set(step["widths"])
    assert len(set(step["sizes"].values())) > 1
    stored = StoredModel(out)
    spent = sum(stored.operator(name).nbytes for name in step["widths"])
    weights = sum(stored.operator(name).codes.numel() for name in step["widths"])
    assert average - 0.2 < 8 * spent / weights <= average + 0.05  # shapes of tensors are counted there
    for name, bits in step["widths"].items():
        assert (stored.schemes[name]["bits"], stored.schemes[name]["group_size"]) == (bits, step["sizes"][name])
    again = tmp_path / "again.yaml"
    again.write_text((out / "recipe.resolved.yaml").read_text())
    text = again.read_text()
    apply(Job(parse_recipe(text), text, (), model, tmp_path / "again", str(model)), lambda event: None)
    one, other = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_groups_divide_what_they_are_of(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    """Where a size on offer does not, group_size is what there is, in the folder and in what it records."""
    model = pico("llama", **GIVEN | {"hidden_size": 96})
    passes = "{kind: gptq, bits: mixed, average_bits: 4, group_size: 32, group_sizes: [64, 128]}"
    out = compress(model, tmp_path / "out", calibration_text, passes)
    [step] = yaml.safe_load((out / "recipe.resolved.yaml").read_text())["passes"]
    stored, offered = StoredModel(out), {96: {32}, 128: {64, 128}, 256: {64, 128}}
    for name, size in step["sizes"].items():
        operator = stored.operator(name)
        assert size in offered[operator.shape[1]]
        assert (operator.group_size, operator.bits) == (size, step["widths"][name])
    assert set(step["sizes"].values()) > {32}
    spent = 8 * sum(stored.operator(name).nbytes for name in step["widths"])
    assert spent <= 4.05 * sum(stored.operator(name).codes.numel() for name in step["widths"])


def test_what_is_lost_is_known_by_the_choice_that_loses_it(
    pico: Pico, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though choices that come to the same are tried once."""
    seen: list[tuple[dict[str, Any], dict[str, float]]] = []
    foretell = Mixed.foretell

    def noted(step: Any, skeleton: Skeleton, back: Any) -> dict[str, float]:
        found = foretell(step, skeleton, back)
        seen.append(({"sizes": step.group_sizes}, found))
        return found

    monkeypatch.setattr(Mixed, "foretell", noted)
    model = pico("llama", **GIVEN | {"hidden_size": 96})
    common = "kind: rtn, bits: mixed, average_bits: 4, group_size: 32"
    for number, sizes in enumerate(("[]", "[128, 64, 256]")):
        compress(model, tmp_path / str(number), calibration_text, f"{{{common}, group_sizes: {sizes}}}")
    plain = {place: cost for sizes, found in seen if not sizes["sizes"] for place, cost in found.items()}
    among = {place: cost for sizes, found in seen if sizes["sizes"] for place, cost in found.items()}
    assert len(among) == 3 * len(plain)
    apart = 0
    for place, cost in plain.items():
        costs = {size: among[f"{place} g{size}"] for size in (64, 128, 256)}
        if "mlp.down_proj" not in place and "o_proj" not in place:
            assert set(costs.values()) == {cost}
        elif "down_proj" in place:
            assert cost < costs[64] < costs[128] < costs[256]
            apart += 1
    assert apart > 6


def test_more_choices_are_no_hindrance(pico: Pico) -> None:
    """Where a size that does not divide stands for small groups: the cheapest choice need not be the last."""
    skeleton = Skeleton(Checkpoint(pico("llama", **GIVEN | {"hidden_size": 192, "intermediate_size": 192})))
    common = "kind: rtn, bits: mixed, average_bits: 2.6, group_size: 16"
    for sizes in ("[64]", "[64, 256]", "[256, 64]"):
        step = make_plan(parse_recipe(f"passes: [{{{common}, group_sizes: {sizes}}}]"), skeleton).recipe.passes[0]
        assert isinstance(step, Mixed)
        weights, least, most = step.sizes_of(skeleton)
        assert 8 * least / weights == pytest.approx(2.26, abs=0.02)
        assert 8 * most / weights == pytest.approx(8.26 if sizes == "[64]" else 9.0, abs=0.02)


def test_factors_get_sizes_that_divide_them() -> None:
    step = parse_recipe("passes: [{kind: rtn, bits: mixed, widths: {a.q: 4}, sizes: {a.q: 256}}]").passes[0]
    assert isinstance(step, Mixed)
    assert step.rounding(512, "a.q").columns == 256
    assert step.rounding(320, "a.q.0").columns == 64
    assert step.note == "linears by bits: 1 of 4 in groups of 256"
    assert step.model_copy(update={"sizes": {"a.q": -1}}).note == "linears by bits: 1 of 4 in one a row"


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_what_matters_gets_more(family: str, pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    """And linears that read the same input, and all experts of a block, get the same."""
    source = pico(family, **GIVEN)
    model = tmp_path / "model"
    model.mkdir()
    for path in source.iterdir():
        if path.name != "model.safetensors":
            (model / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    last = max(Skeleton(Checkpoint(source)).linears(0))  # some linear that the answers will hang on
    tensors[last + ".weight"] *= 30
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    passes = "{kind: rtn, bits: mixed, average_bits: 4, group_size: 32}"
    out = compress(model, tmp_path / "out", calibration_text, passes)
    found = widths(out)
    mean = sum(found.values()) / len(found)
    assert found[last] > mean
    assert len(set(found.values())) > 1
    for index in (0, 1):
        for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",)):
            alike = {bits for name, bits in found.items() if f"layers.{index}." in name and name.endswith(parts)}
            assert len(alike) == 1
    stored = StoredModel(out)
    assert all(stored.schemes[name]["bits"] == bits for name, bits in found.items())
    weights = sum(Checkpoint(model).tensors[name + ".weight"].nbytes // 2 for name in found)
    bits = 8 * sum(stored.operator(name).nbytes for name in found) / weights
    assert 3.4 < bits <= 4
    assert verify(out) == []
    if family == "llama":
        assert stored.format.name == "compressed-tensors"
        stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        ours, theirs = logits(load(out, dtype=torch.float32)), logits(stock)
        assert (ours - theirs).norm() < 1e-5 * ours.norm()


def test_what_was_found_is_kept(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    """In the resolved recipe, which needs no survey, and no text where the pass needs none."""
    model = pico(**GIVEN)
    passes = "{kind: rtn, bits: mixed, average_bits: 3.5, choices: [8, 2, 4, 4], group_size: 32, ignore: '*.o_proj'}"
    out = compress(model, tmp_path / "out", calibration_text, passes)
    found = widths(out)
    assert set(found.values()) <= {2, 4, 8}
    assert not any("o_proj" in name for name in found)
    resolved = (out / "recipe.resolved.yaml").read_text()
    recipe = parse_recipe(resolved)
    [step] = recipe.passes
    assert step.needs == frozenset()
    again = tmp_path / "again"
    apply(Job(recipe, resolved, (), model, again, str(model)), lambda event: None)
    one, other = (load_file(folder / "model.safetensors") for folder in (out, again))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert json.loads((out / "compressor.json").read_text())["format"] == "compressed-tensors"


@pytest.mark.parametrize(("kind", "tied"), [("rtn", False), ("rtn", True), ("gptq", True), ("gptq", False)])
def test_the_embedding_and_the_head_get_bits_too(
    kind: str, tied: bool, pico: Pico, calibration_text: Path, tmp_path: Path
) -> None:
    """What rounding each does is what a model with it alone rounded does, and it is paid out of the same average."""
    model = pico("llama", **GIVEN, tie_word_embeddings=tied)
    outer = list(Skeleton(Checkpoint(model)).outer())
    assert len(outer) == 2 - tied
    step = f"kind: {kind}, group_size: 32, targets: ['*', {', '.join(outer)}]"
    text = (
        f"data: {{source: '{calibration_text}', samples: 4, sequence_length: 64}}\n"
        f"passes: [{{{step}, bits: mixed, average_bits: 4}}]\nlimits: {{kl: null, perplexity_ratio: null}}\n"
    )
    out, kept = tmp_path / "out", tmp_path / "kept"
    apply(Job(parse_recipe(text), text, (), model, out, str(model)), lambda event: None, statistics=kept)
    found = widths(out)
    assert set(outer) < set(found)
    stored = StoredModel(out)
    assert all(stored.schemes[name]["bits"] == bits for name, bits in found.items())
    shapes = {name: Checkpoint(model).tensors[name + ".weight"].shape for name in found}
    spent = sum(stored.operator(name).nbytes for name in found)
    assert 3.4 < 8 * spent / sum(rows * columns for rows, columns in shapes.values()) <= 4 + 1e-2
    assert verify(out) == []
    lost: dict[str, float] = {}
    for survey in kept.glob("survey-*.json"):  # of blocks, and of what is outside
        lost |= json.loads(survey.read_text())["found"]
    windows = read_calibration(parse_recipe(text), Checkpoint(model)).windows
    for name in outer:
        alone = tmp_path / name
        weight = f"passes: [{{kind: rtn, bits: 3, group_size: 32, targets: [{name}]}}]\n"
        apply(Job(parse_recipe(weight), weight, (), model, alone, str(model)), lambda event: None)
        against = evaluate(load(alone, dtype=torch.float32), windows, load(model, dtype=torch.float32)).against
        assert against is not None
        assert lost[f"{name} 3"] == pytest.approx(against.kl_mean, rel=0.1)  # scales are rounded there


def test_one_survey_serves_other_averages(
    pico: Pico, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kept = pico(**GIVEN), tmp_path / "kept"
    head = f"data: {{source: '{calibration_text}', samples: 4, sequence_length: 64}}\n"

    def found(out: str, options: str, statistics: Path | None) -> dict[str, int]:
        text = head + f"passes: [{{kind: rtn, bits: mixed, group_size: 32, {options}}}]\n"
        job = Job(parse_recipe(text), text, (), model, tmp_path / out, str(model))
        apply(job, lambda event: None, statistics=statistics)
        return widths(tmp_path / out)

    averages = ("average_bits: 3.5", "average_bits: 4.6, choices: [3, 4, 8]")
    own = [found(f"own {number}", options, None) for number, options in enumerate(averages)]
    assert found("first", averages[0], kept) == own[0]
    [file] = kept.glob("survey-*.json")
    with monkeypatch.context() as patch:
        patch.setattr("compressor.compress.foretelling.reverse_walk", None)  # as if it were not there
        assert [found(f"again {number}", options, kept) for number, options in enumerate(averages)] == own
        with pytest.raises(TypeError):
            found("other", "average_bits: 4, symmetric: false", kept)
    file.write_text(file.read_text().replace("model.layers.0", "model.layers.1", 1))
    with pytest.raises(ResourceError, match=r"damaged .* delete it"):
        found("damaged", averages[0], kept)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("bits: mixed", "bits: mixed needs average_bits"),
        ("bits: 4, average_bits: 3", "average_bits does nothing without bits: mixed"),
        ("scheme: nvfp4a16, bits: mixed, average_bits: 3", "bits does nothing with scheme: nvfp4a16"),
        ("bits: mixed, average_bits: 3, choices: [4]", "needs two choices at least, or two group_sizes"),
        ("bits: mixed, average_bits: 3, choices: [4, 4], group_sizes: [32]", "needs two choices at least"),
        ("bits: mixed, average_bits: 3, sizes: {x: 32}", "sizes are of the linears that widths names"),
        ("bits: mixed, widths: {x: 4, y: 4}, sizes: {x: 32}", "sizes are of the linears that widths names"),
    ],
)
def test_options_that_do_not_go_together(options: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(f"passes: [{{kind: rtn, {options}}}]")


def test_widths_of_another_model_are_refused(pico: Pico) -> None:
    text = "passes: [{kind: rtn, bits: mixed, widths: {model.layers.9.mlp.up_proj: 4}}]"
    with pytest.raises(
        RecipeError, match=r"widths names model\.layers\.9\.mlp\.up_proj, which is no linear that targets"
    ):
        make_plan(parse_recipe(text), Skeleton(Checkpoint(pico())))


def test_plans_know_the_bytes(pico: Pico, tmp_path: Path) -> None:
    skeleton = Skeleton(Checkpoint(pico(**GIVEN)))
    plans = [
        make_plan(parse_recipe(f"passes: [{{kind: rtn, {options}}}]"), skeleton)
        for options in ("bits: 3", "bits: mixed, average_bits: 3.9", "bits: mixed, average_bits: 3.2")
    ]
    assert plans[0].bytes_after == plans[1].bytes_after == plans[2].bytes_after  # until the survey
    with pytest.raises(RecipeError, match=r"2 bits everywhere are 2\.\d\d bits per weight, scales counted; ask for"):
        make_plan(parse_recipe("passes: [{kind: rtn, bits: mixed, average_bits: 2}]"), skeleton)


def test_figures_that_are_damaged_are_found_again(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    """Also by a run that had asked for something else, before it was told."""
    model, kept, out = pico(**GIVEN), tmp_path / "kept", tmp_path / "out"
    head = f"data: {{source: '{calibration_text}', samples: 4, sequence_length: 64}}\n"
    mixed = "{kind: gptq, bits: mixed, group_size: 32, average_bits: 4}"

    def run(passes: str, out: Path, *, resume: bool = False) -> None:
        text = head + f"passes: [{passes}]\n"
        job = Job(parse_recipe(text), text, (), model, out, str(model))
        apply(job, lambda event: None, statistics=kept, resume=resume)

    run(mixed, tmp_path / "first")
    [file] = kept.glob("survey-*.json")
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    both = f"{mixed}, {{kind: eora, rank: 2, objective: model}}"
    with pytest.raises(ResourceError, match="delete it"):
        run(both, out)
    file.unlink()
    run(both, out, resume=True)
    assert json.loads(file.read_text())["found"].keys() == json.loads(whole)["found"].keys()
    resolved = yaml.safe_load((out / "recipe.resolved.yaml").read_text())
    assert resolved["passes"][0]["widths"] == widths(tmp_path / "first")
