"""Fewer experts: statistics against stock transformers, exact removals, counts that routers can work with, reloads."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import interrupt, same_folders
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.calibrate.folders import RoutingFolder
from compressor.calibrate.routing import Routing, chosen, observe_routing
from compressor.compress.apply import Job, apply
from compressor.compress.events import Event, ExpertsKept
from compressor.compress.passes.base import Survey
from compressor.compress.passes.model.expert_prune import ExpertPrune, highest, saliency
from compressor.compress.passes.model.experts import expert_counts, super_experts
from compressor.compress.plan import make_plan
from compressor.compress.recipe import parse_recipe
from compressor.compress.solvers.expert_subsets import best_subset, few_enough, subset_losses
from compressor.compress.surveys import read_calibration
from compressor.runtime import load
from compressor.runtime.errors import RecipeError
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.skeleton import Skeleton
from compressor.runtime.model.view import fewer_experts

Pico = Callable[..., Path]
FLOAT = {"dtype": torch.float32}
FAMILIES = (
    "mixtral", "phimoe", "granitemoe", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v2", "deepseek_v3",
)  # fmt: skip
ONE = {"num_experts_per_tok": 1}
EXACT = {
    "mixtral": ONE,
    "granitemoe": ONE,
    "glm4_moe": {},
    "qwen3_moe": {**ONE, "norm_topk_prob": True},
    "deepseek_v3": {"n_group": 1, "topk_group": 1},
}
INEXACT = {"qwen2_moe": ONE, "olmoe": ONE, "deepseek_v2": {}}  # softmax over all, not normalized again


def run(recipe: str, model: Path, out: Path, listener: Callable[[Event], None] = lambda event: None) -> None:
    apply(Job(parse_recipe(recipe), recipe, (), model, out, "pico"), listener)


def windows(samples: int = 3, tokens: int = 20) -> Tensor:
    return torch.randint(0, 128, (samples, tokens), generator=torch.Generator().manual_seed(0))


def observed(skeleton: Skeleton, ids: Tensor, room: Path, done: Callable[[int], None]) -> dict[int, Routing]:
    folder = RoutingFolder(room / "routing", {})
    observe_routing(skeleton, ids, room / "scratch", folder, done)
    return {index: folder.load(index)[0] for index in expert_counts("test", skeleton)}


def stock(folder: Path) -> Any:
    """transformers' own model, nothing missing and nothing left over."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found
    return model


def fused_experts(layer: Any) -> Any:
    return (layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp).experts


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, use_cache=False).logits
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_stock_transformers(pico: Pico, tmp_path: Path, family: str) -> None:
    """Routing seen in front of the fused experts, outputs computed by hand from the fused weights."""
    ids = windows()
    behind: list[int] = []
    found = observed(Skeleton(Checkpoint(pico(family, **FLOAT))), ids, tmp_path, behind.append)
    assert behind == [0, 1]
    assert not (tmp_path / "scratch").exists()
    model = stock(pico(family, **FLOAT))
    for index, routing in found.items():
        experts = fused_experts(model.model.layers[index])
        seen: list[tuple[Tensor, ...]] = []
        handle = experts.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args))
        logits(model, ids)
        handle.remove()
        x, chosen, weights = seen[0]
        for number in range(len(routing.tokens)):
            token, slot = torch.where(chosen == number)
            gate, up = (experts.gate_up_proj[number] @ x[token].T).chunk(2)
            output = (experts.down_proj[number] @ (experts.act_fn(gate) * up)).T.detach()
            g, norms = weights[token, slot], output.norm(dim=1)
            expected = [len(token), g.sum(), norms.sum(), (g * norms).sum(), output.abs().max() if len(token) else 0]
            sums = routing.tokens, routing.weights, routing.norms, routing.weighted, routing.peak
            for value, total in zip(expected, sums, strict=True):
                assert float(total[number]) == pytest.approx(float(value), rel=1e-3, abs=1e-6), (index, number)


def with_an_idle_expert(source: Path, folder: Path, number: int) -> Path:
    """A copy in which the router never chooses one expert: scores a, -a, a / 2 and 0, or a bias that falls."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight", "router.layer.weight")):
            first = tensor[0].clone()
            tensor.zero_()
            if len(tensor) == 4:
                tensor[0], tensor[1], tensor[2] = first, -first, first / 2
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(-torch.arange(len(tensor)))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("family", [*EXACT, *INEXACT])
def test_an_expert_that_no_token_meets_goes_without_a_trace(pico: Pico, tmp_path: Path, family: str) -> None:
    """Where chosen weights are normalized again; where they are not, the others' weights grow, and that is seen."""
    source = with_an_idle_expert(pico(family, **{**EXACT, **INEXACT}[family], **FLOAT), tmp_path / "model", 3)
    skeleton = Skeleton(Checkpoint(source))
    seen = observed(skeleton, windows(), tmp_path, lambda index: None)
    assert all(routing.tokens[3] == 0 for routing in seen.values())
    count = len(next(iter(seen.values())).tokens)
    kept = {index: tuple(n for n in range(count) if n != 3) for index in seen}
    if family == "deepseek_v2":
        kept = {index: numbers[:-1] for index, numbers in kept.items()}  # two groups of three
    keep = len(next(iter(kept.values())))
    recipe = f"passes: [{{kind: expert_prune, refit: false, keep: {keep}, kept: {json.dumps(kept)}}}]"
    run(recipe, source, tmp_path / "out")
    before, after = logits(stock(source), windows()), logits(stock(tmp_path / "out"), windows())
    difference = float((before - after).abs().max() / before.abs().max())
    assert difference < 1e-5 if family in EXACT else difference > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_the_experts_reload_everywhere(pico: Pico, tmp_path: Path, calibration_text: Path, family: str) -> None:
    data = f"data: {{source: {calibration_text}, samples: 8, sequence_length: 64}}\n"
    run(data + "passes: [{kind: expert_prune, ratio: 0.5}]", pico(family, **FLOAT), tmp_path / "out")
    plain = stock(tmp_path / "out")
    own = load(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(own, windows()), logits(plain, windows()), rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    counts = {config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config}
    assert counts == {4 if family.startswith(("deepseek", "glm")) else 2}
    if family == "qwen3_moe":
        assert {"num_experts", "num_local_experts"} <= set(config)
    report = [json.loads(line) for line in (tmp_path / "out" / "report" / "layers.jsonl").read_text().splitlines()]
    kept = [event for event in report if event["kind"] == "ExpertsKept"]
    assert [len(event["kept"]) for event in kept] == [next(iter(counts))] * len(kept)
    assert all(len(event["scores"]) == len(event["tokens"]) == 2 * len(event["kept"]) for event in kept)


def test_dropping_none_changes_nothing(pico: Pico, tmp_path: Path) -> None:
    run("passes: [{kind: expert_prune, ratio: 0, criterion: random}]", pico("qwen3_moe"), tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (pico("qwen3_moe"), tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_pruned_experts_are_quantized_and_reload_in_stock_transformers(
    pico: Pico, tmp_path: Path, calibration_text: Path
) -> None:
    data = f"data: {{source: {calibration_text}, samples: 16, sequence_length: 64}}\n"
    recipe = data + "passes: [{kind: expert_prune, ratio: 0.5}, {kind: gptq, bits: 8, group_size: 32}]"
    run(recipe, pico("qwen3_moe", **FLOAT), tmp_path / "out")
    run(data + "passes: [{kind: expert_prune, ratio: 0.5}]", pico("qwen3_moe", **FLOAT), tmp_path / "plain")
    quantized, plain = logits(stock(tmp_path / "out"), windows()), logits(stock(tmp_path / "plain"), windows())
    own = logits(load(tmp_path / "out", dtype=torch.float32), windows())
    torch.testing.assert_close(own, quantized, rtol=1e-3, atol=1e-3)
    assert float((quantized - plain).norm() / plain.norm()) < 0.05


def test_a_run_goes_on_with_the_experts_it_chose(
    pico: Pico, tmp_path: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = f"data: {{source: {calibration_text}, samples: 8, sequence_length: 64}}\n"
    recipe = data + "passes: [{kind: expert_prune, keep: 3}, {kind: gptq, group_size: 32}]"
    run(recipe, pico("qwen2_moe"), tmp_path / "whole")

    with pytest.raises(KeyboardInterrupt):
        run(recipe, pico("qwen2_moe"), tmp_path / "out", interrupt)
    monkeypatch.setattr("compressor.calibrate.routing.observe_routing", None)  # as if it were not there
    monkeypatch.setattr("compressor.calibrate.refit.refit_blocks", None)
    apply(
        Job(parse_recipe(recipe), recipe, (), pico("qwen2_moe"), tmp_path / "out", "pico"), lambda e: None, resume=True
    )
    same_folders(tmp_path / "out", tmp_path / "whole")


def routing(**sums: list[float]) -> Routing:
    result = Routing.empty(len(next(iter(sums.values()))))
    for name, values in sums.items():
        setattr(result, name, torch.tensor(values, dtype=torch.float64))
    return result


def test_criteria_by_hand() -> None:
    seen = routing(tokens=[4, 0, 2], weights=[1, 0, 1.5], norms=[8, 0, 9], weighted=[2, 0, 4], peak=[1, 0, 5])
    assert saliency(seen, "reap").tolist() == [0.5, 0, 2]
    assert saliency(seen, "frequency").tolist() == [4, 0, 2]
    assert saliency(seen, "router_weight").tolist() == [1, 0, 1.5]
    assert saliency(seen, "ean").tolist() == [8, 0, 9]
    scores = torch.tensor([5.0, 4, 3, 2, 9, 1, 0, 8])
    assert highest(scores, 4, 1) == (0, 1, 4, 7)
    assert highest(scores, 4, 2) == (0, 1, 4, 7)
    assert highest(scores, 2, 2) == (0, 4)
    assert highest(scores, 2, 1, protected=(6,)) == (4, 6)
    peaks = {index: routing(peak=[1.0] * 100) for index in range(8)}
    peaks[1].peak[7] = peaks[7].peak[3] = 50
    found = super_experts(peaks, 8)
    assert found[1] == (7,)
    assert 7 not in found, "the last quarter is not protected"


@pytest.mark.parametrize("top_k", [2, 4])
def test_routers_are_read_in_either_order(top_k: int) -> None:
    scores = torch.randn(5, 4)
    weights, indices = scores.softmax(-1).topk(top_k)

    class Router(torch.nn.Module):
        def __init__(self, *returned: torch.Tensor) -> None:
            super().__init__()
            self.returned = returned

        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.returned

    for router in (Router(scores, weights, indices), Router(indices, weights, scores)):
        found = chosen(router, torch.zeros(5, 8))
        assert found[0] is weights
        assert found[1] is indices


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen3_moe", "keep: 5", "5 experts of each block cannot stay: there are 4"),
        ("qwen3_moe", "keep: 1", "each token is sent to 2"),
        ("deepseek_v3", "keep: 7", "they stand in 2 groups of equal size"),
        ("deepseek_v3", "keep: 2", "groups are compared by their two best"),
        ("llama", "keep: 2", "this model has no experts"),
        ("qwen3_moe", "keep: 2, ratio: 0.5", "give either ratio or keep"),
        ("qwen3_moe", "keep: 2, criterion: reconstruction, merge: hc", "hc merges: use reap with it"),
        ("qwen3_moe", "keep: 2, kept: {0: [0, 1]}", "kept has to name 2 rising numbers"),
        ("qwen3_moe", "keep: 2, kept: {0: [0, 1], 1: [1, 9]}", "kept has to name 2 rising numbers"),
        ("qwen3_moe", "keep: 2, kept: {0: [0, 1], 1: [-1, 0]}", "kept has to name 2 rising numbers"),
        ("deepseek_v3", "keep: 4, kept: {1: [0, 1, 2, 4]}", "as many of each of 2 groups"),
    ],
)
def test_what_routers_cannot_work_with_is_refused_before_work(
    pico: Pico, family: str, options: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        make_plan(parse_recipe(f"passes: [{{kind: expert_prune, {options}}}]"), Skeleton(Checkpoint(pico(family))))


def test_experts_without_groups_are_not_held_to_them(pico: Pico) -> None:
    """deepseek_v2 has groups only where its router is limited to them, and compares them by their best expert."""
    skeleton = Skeleton(Checkpoint(pico("deepseek_v2", topk_method="greedy")))
    make_plan(parse_recipe("passes: [{kind: expert_prune, keep: 3, criterion: random}]"), skeleton)
    skeleton = Skeleton(Checkpoint(pico("deepseek_v2", topk_method="group_limited_greedy", topk_group=2)))
    make_plan(parse_recipe("passes: [{kind: expert_prune, keep: 2, criterion: random}]"), skeleton)


def test_it_comes_before_what_rewrites_linears(pico: Pico) -> None:
    recipe = parse_recipe("passes: [{kind: rtn, group_size: 32}, {kind: expert_prune, keep: 2}]")
    with pytest.raises(RecipeError, match=r"passes\.1: expert_prune changes the model itself"):
        make_plan(recipe, Skeleton(Checkpoint(pico("qwen3_moe"))))


def test_a_file_of_new_weights_is_opened_once(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, opened = Checkpoint(pico("mixtral")), list[Path]()
    names = [f"model.layers.0.block_sparse_moe.experts.{n}.w2.weight" for n in range(2)]
    save_file({name: torch.full(source.tensors[name].shape, 7.0) for name in names}, tmp_path / "a.safetensors")
    view = fewer_experts(source, {0: (1, 3), 1: (0, 2)}, [tmp_path])

    def counted(path: Path, framework: str) -> object:
        opened.append(path)
        return safe_open(path, framework=framework)

    monkeypatch.setattr("compressor.runtime.model.view.safe_open", counted)
    assert all(bool((view.tensor(name) == 7).all()) for name in [*names, *names])
    assert opened == [tmp_path / "a.safetensors"]
    view.release()
    assert bool((view.tensor(names[0]) == 7).all())
    assert len(opened) == 2


def test_the_view_of_fewer_experts_names_and_slices(pico: Pico) -> None:
    source = Checkpoint(pico("mixtral"))
    view = fewer_experts(source, {0: (1, 3), 1: (0, 2)})
    assert torch.equal(
        view.tensor("model.layers.0.block_sparse_moe.experts.1.w2.weight"),
        source.tensor("model.layers.0.block_sparse_moe.experts.3.w2.weight"),
    )
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    assert torch.equal(view.tensor(gate), source.tensor(gate)[[0, 2]])
    assert view.tensors[gate].shape == (2, 64)
    assert view.config["num_local_experts"] == 2
    assert source.config["num_local_experts"] == 4
    assert view.nbytes < source.nbytes
    step = ExpertPrune(kind="expert_prune", keep=2)
    assert step.prepare(Skeleton(source)).note == "4 → 2 experts in 2 blocks"


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_reconstruction_finds_the_best_subset_of_all(
    pico: Pico, tmp_path: Path, calibration_text: Path, family: str
) -> None:
    """Against every pruned block run for real on the sampled tokens; and no criterion does better there."""
    folder = pico(family, n_group=1, topk_group=1, **FLOAT) if family == "deepseek_v3" else pico(family, **FLOAT)
    data = f"data: {{source: {calibration_text}, samples: 8, sequence_length: 64}}\n"
    recipe = parse_recipe(data + "passes: [{kind: expert_prune, ratio: 0.5, criterion: reconstruction}]")
    skeleton = Skeleton(Checkpoint(folder))
    ids = read_calibration(recipe, skeleton.checkpoint).windows
    events: list[Event] = []
    step = recipe.passes[0].prepare(skeleton).survey(skeleton, Survey(ids, tmp_path, events.append))
    assert isinstance(step, ExpertPrune)
    assert step.kept is not None
    model = stock(folder)
    for index, numbers in step.kept.items():
        moe = model.model.layers[index].mlp
        entered: list[Tensor] = []
        handle = moe.register_forward_pre_hook(lambda module, args, entered=entered: entered.append(args[0]))
        logits(model, ids)
        handle.remove()
        with torch.no_grad():
            expected = moe(entered[0])
            losses = {}
            count = 8 if family == "deepseek_v3" else 4
            for subset in itertools.combinations(range(count), count // 2):
                kept = {number: tuple(range(count // 2)) for number in step.kept} | {index: subset}
                pruned = Skeleton(fewer_experts(skeleton.checkpoint, kept))
                found = pruned.block(index).mlp(entered[0])
                losses[subset] = float((found - expected).square().sum())
        assert losses[numbers] == pytest.approx(min(losses.values()), rel=1e-4)
    kinds = [event for event in events if isinstance(event, ExpertsKept)]
    assert all(len(event.scores) == len(event.tokens) for event in kinds)


def test_one_after_the_other_where_subsets_are_many() -> None:
    """Twenty experts of which ten are copies that nobody would miss: top-1, so that the twin takes over."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(10, 6, generator=generator)
    rows = torch.cat([rows, rows])
    x = torch.randn(200, 6, generator=generator)
    outputs = torch.randn(10, 200, 6, generator=generator)
    outputs = torch.cat([outputs, outputs])

    def route(numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        best = (x @ rows[list(numbers)].T).topk(1, dim=1)
        return torch.ones_like(best.values), best.indices

    assert not few_enough(20, 10, 1)
    kept = best_subset(route, outputs, 10)
    assert sorted(number % 10 for number in kept) == list(range(10))
    assert subset_losses(route, outputs, [kept]) == [0.0]
    assert few_enough(8, 4, 1)
    assert best_subset(route, outputs[:8], 8) == tuple(range(8))


def test_layers_beyond_the_last_block_go_with_the_count_of_experts(pico: Pico, tmp_path: Path) -> None:
    """They hold as many experts as before, which config.json could not say."""
    source = tmp_path / "model"
    shutil.copytree(pico("deepseek_v3", **FLOAT), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.mlp.experts.7.up_proj.weight"] = torch.ones(32, 64)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    run("passes: [{kind: expert_prune, keep: 4, criterion: random, refit: false}]", source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not any(".layers.2." in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    stock(tmp_path / "out")


def test_experts_stay_without_which_most_would_be_lost(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    """Against what the model loses when each alone puts out nothing; and what was found serves other counts."""
    model, kept = pico("qwen3_moe", **FLOAT), tmp_path / "kept"
    told: list[Event] = []
    data = f"data: {{source: '{calibration_text}', samples: 8, sequence_length: 64}}\n"
    alone = "refit: false, protect_super_experts: false"
    for keep in (3, 2):
        recipe = f"{data}passes: [{{kind: expert_prune, keep: {keep}, criterion: model, {alone}}}]"
        out = tmp_path / str(keep)
        apply(Job(parse_recipe(recipe), recipe, (), model, out, "pico"), told.append, statistics=kept)
    scores = {event.block: event.scores for event in told if isinstance(event, ExpertsKept)}
    assert len(list(kept.glob("survey-*.json"))) == 1
    ids = read_calibration(parse_recipe(recipe), Checkpoint(model)).windows
    whole: Any = load(model, dtype=torch.float32)
    with torch.no_grad():
        before = whole(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        measured = []
        for block, each in scores.items():
            for number in range(len(each)):
                down = whole.model.layers[block].mlp.experts[number].down_proj
                was = down.weight.clone()
                down.weight.zero_()
                after = whole(input_ids=ids, use_cache=False).logits.log_softmax(-1)
                down.weight.copy_(was)
                measured.append(float((before.exp() * (before - after)).sum(-1).mean()))
    found = torch.tensor([score for each in scores.values() for score in each])
    assert found.sum() == pytest.approx(sum(measured), rel=0.3)
    assert float(torch.corrcoef(torch.stack([found, torch.tensor(measured)]))[0, 1]) > 0.9
    for event in told:
        if isinstance(event, ExpertsKept):
            assert event.kept == sorted(torch.tensor(event.scores).topk(len(event.kept)).indices.tolist())
