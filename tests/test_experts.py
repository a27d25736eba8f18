"""What is made of experts that go: merged neurons, fitted projections, narrower experts; beside brute force."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import same_folders
from safetensors.torch import load_file, save_file
from test_expert_prune import FLOAT, ONE, logits, run, stock, windows
from torch import Tensor, nn

from compressor.calibrate import refit
from compressor.calibrate.chains import Chains
from compressor.calibrate.curvature import BlockBack, reverse_walk
from compressor.calibrate.folders import RoutingFolder
from compressor.calibrate.refit import Member, Routed, fit
from compressor.calibrate.routing import Routing
from compressor.compress.apply import Job, apply
from compressor.compress.events import Event, ExpertsChanged, ExpertsKept, Surveyed
from compressor.compress.passes.model.experts import expert_counts
from compressor.compress.plan import make_plan
from compressor.compress.recipe import parse_recipe
from compressor.compress.solvers import expert_neurons
from compressor.compress.solvers.coupled import metric_of
from compressor.compress.solvers.expert_merge import Neurons, aligned, averaged, clusters, redistributed
from compressor.compress.solvers.expert_neurons import eliminated, strongest
from compressor.compress.surveys import read_calibration
from compressor.runtime import load
from compressor.runtime.errors import RecipeError, ResourceError
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.experts import Expert
from compressor.runtime.model.skeleton import Skeleton
from compressor.runtime.model.view import fewer_experts

Pico = Callable[..., Path]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def neurons(width: int = 24, hidden: int = 16, seed: int = 0) -> Neurons:
    return Neurons(*(random(width, hidden, seed=3 * seed + part) for part in range(3)))


def disguised(expert: Neurons, seed: int = 9) -> Neurons:
    """The same function: neurons in another order, some with both signs turned, up and down scaled in turn."""
    order = torch.randperm(len(expert.up), generator=torch.Generator().manual_seed(seed))
    factor = random(len(order), 1, seed=seed).exp() * random(len(order), 1, seed=seed + 1).sign()
    gate, up, down = expert.rows(order)
    return Neurons(gate, factor * up, down / factor)


def output(expert: Neurons, x: Tensor) -> Tensor:
    return (nn.functional.silu(x @ expert.gate.T) * (x @ expert.up.T)) @ expert.down


def test_a_disguised_copy_is_recognized() -> None:
    expert, x = neurons(), random(50, 16, seed=5)
    copy = disguised(expert)
    torch.testing.assert_close(output(copy, x), output(expert, x), rtol=1e-4, atol=1e-4)
    for found, own in zip(aligned(copy, expert), expert, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
    merged = averaged([expert, copy, copy], [1.0, 2.0, 0.0])
    torch.testing.assert_close(output(merged, x), output(expert, x), rtol=1e-3, atol=1e-3)
    naive = Neurons(*((a + b) / 2 for a, b in zip(expert, copy, strict=True)))
    assert float((output(naive, x) - output(expert, x)).norm() / output(expert, x).norm()) > 0.5


def test_neurons_go_where_their_like_are() -> None:
    a, b, x = neurons(seed=1), neurons(seed=2), random(50, 16, seed=5)
    experts = [a, b, disguised(b)]
    found = redistributed(experts, (0, 1), torch.tensor([1.0, 2.0, 3.0]), 0.6)
    assert set(found) == {1}, "nothing in expert 0 is like the dropped one"
    torch.testing.assert_close(output(found[1], x), output(b, x), rtol=1e-3, atol=1e-3)
    assert redistributed(experts, (0, 1), torch.ones(3), 1.01) == {}
    assert redistributed(experts, (0, 1, 2), torch.ones(3), 0.0) == {}
    everything = redistributed(experts, (0,), torch.ones(3), -1.0)
    assert everything[0].up.shape == (24, 16)
    assert all(torch.isfinite(part).all() for part in everything[0])


def test_experts_that_put_out_the_same_are_one_cluster() -> None:
    outputs = random(3, 16)[[0, 1, 0, 2, 1]] + 0.01 * random(5, 16, seed=1)
    assert sorted(clusters(outputs, 3)) == [[0, 2], [1, 4], [3]]
    assert sorted(clusters(torch.zeros(4, 8), 3), key=len)[-1] != []
    assert len(clusters(torch.zeros(4, 8), 3)) == 3
    assert clusters(outputs, 5) == [[0], [1], [2], [3], [4]]


def routed_tokens(room: Path, experts: list[Expert], samples: int = 4, tokens: int = 64) -> Routed:
    """Tokens of which each goes to two of three experts, with a fourth member that sees all."""
    chains = Chains(room, (), (samples, tokens, 16))
    routed = Routed(chains, torch.float32, 2)
    count = samples * tokens
    places = torch.stack([random(3, seed=token).topk(2).indices for token in range(count)])
    every = slice(None)
    routed.store(every, random(count, 16, seed=1), places, random(count, 2, seed=2).abs())
    routed.target[every] = random(samples, tokens, 16, seed=3)
    return routed


def test_a_fit_is_the_ridge_regression_of_all_experts_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    experts = [Expert(16, 8, nn.functional.silu).requires_grad_(False) for _ in range(4)]
    members = [Member(f"e{n}", expert, n if n < 3 else None) for n, expert in enumerate(experts)]
    routed, every = routed_tokens(tmp_path, experts), slice(None)
    features = torch.zeros(256, 32, dtype=torch.float64)
    for number, (_, tokens, h) in enumerate(routed.activations(every, members)):
        features[tokens, 8 * number : 8 * number + 8] = h.double()
    whole = features @ random(32, 16, seed=7).double() + 0.1 * random(256, 16, seed=8).double()
    routed.target[every] = whole.view(4, 64, 16).float()
    target, held, aside = whole[:192], whole[192:], features[192:]  # the last of four samples is not fitted
    features = features[:192]
    before = torch.cat([expert.down_proj.weight.T for expert in experts]).double()
    gram = features.T @ features
    ridge = 0.01 * gram.diagonal().mean()
    residual = target - features @ before
    change = torch.linalg.solve(gram + ridge * torch.eye(32), features.T @ residual)
    share = ((held - aside @ before) * (aside @ change)).sum() / (aside @ change).square().sum()
    assert share > 0.5
    best = before + share.clamp(max=1) * change
    monkeypatch.setattr(refit, "ITERATIONS", 40)
    fit(routed, members, 0.01)
    found = torch.cat([expert.down_proj.weight.T for expert in experts]).double()
    torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-4)
    torch.manual_seed(0)
    for member in members:
        member.module.down_proj.weight = nn.Parameter(torch.randn(16, 8) / 9, requires_grad=False)
    monkeypatch.undo()
    fit(routed, members, 0.01)
    found = torch.cat([expert.down_proj.weight.T for expert in experts]).double()
    lost, least = ((target - features @ d).square().sum() for d in (found, best))
    assert lost < 1.02 * least, "ten iterations are enough"


def test_a_fit_that_serves_no_other_tokens_is_not_made(tmp_path: Path) -> None:
    """What the held out samples want is the opposite of what the others do."""
    experts = [Expert(16, 8, nn.functional.silu).requires_grad_(False) for _ in range(3)]
    members = [Member(f"e{n}", expert, n) for n, expert in enumerate(experts)]
    routed, every = routed_tokens(tmp_path, experts), slice(None)
    found = list(routed.activations(every, members))
    target = refit.put_out(found, [random(16, 8, seed=n) for n in range(3)], 256).view(4, 64, 16)
    now = refit.put_out(found, [expert.down_proj.weight for expert in experts], 256).view(4, 64, 16)
    for turned in (False, True):
        routed.target[every] = now + target
        if turned:
            routed.target[slice(3, 4)] = now[3:] - target[3:]
        before = [expert.down_proj.weight.clone() for expert in experts]
        fit(routed, members, 0.01)
        same = [torch.equal(old, expert.down_proj.weight) for old, expert in zip(before, experts, strict=True)]
        assert same == [turned] * 3
        for old, expert in zip(before, experts, strict=True):
            expert.down_proj.weight = nn.Parameter(old, requires_grad=False)


def test_a_fit_leaves_alone_what_is_right(tmp_path: Path) -> None:
    experts = [Expert(16, 8, nn.functional.silu).requires_grad_(False) for _ in range(3)]
    members = [Member(f"e{n}", expert, n) for n, expert in enumerate(experts)]
    routed, every = routed_tokens(tmp_path, experts), slice(None)
    target = torch.zeros(256, 16)
    for member, tokens, h in routed.activations(every, members):
        target.index_add_(0, tokens, h @ member.module.down_proj.weight.T)
    routed.target[every] = target.view(4, 64, 16)
    before = [expert.down_proj.weight.clone() for expert in experts]
    fit(routed, members, 0.01)
    for old, expert in zip(before, experts, strict=True):
        torch.testing.assert_close(expert.down_proj.weight, old, rtol=0, atol=1e-5)


def test_eliminated_neurons_cost_least_and_the_others_make_up_for_them() -> None:
    features = random(200, 12) @ random(12, 12, seed=1)
    moment, weight, ridge = features.T @ features, random(7, 12, seed=2), 1.0
    damped = moment.double() + ridge * torch.eye(12)

    def compensated(numbers: list[int]) -> tuple[Tensor, float]:
        best = weight.double() @ damped[:, numbers] @ torch.linalg.inv(damped[numbers][:, numbers])
        delta = weight.double().clone()
        delta[:, numbers] -= best
        return best, float((delta @ damped * delta).sum())

    losses = [compensated([n for n in range(12) if n != gone])[1] for gone in range(12)]
    numbers, narrow = eliminated(weight, moment, 11, ridge)
    assert set(range(12)) - set(numbers.tolist()) == {losses.index(min(losses))}
    numbers, narrow = eliminated(weight, moment, 5, ridge)
    torch.testing.assert_close(narrow.double(), compensated(numbers.tolist())[0], rtol=1e-4, atol=1e-5)
    plain, same = strongest(weight, moment, 5)
    assert torch.equal(same, weight[:, plain])
    assert compensated(numbers.tolist())[1] < compensated(plain.tolist())[1]


def test_eliminated_neurons_cost_the_model_least() -> None:
    """By a metric of the outputs, in which neurons matter in another order; what the others make up for is the same."""
    features = random(200, 12) @ random(12, 12, seed=1)
    moment, weight, ridge = features.T @ features, random(7, 12, seed=2), 1.0
    damped, root = moment.double() + ridge * torch.eye(12), torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 1, 4])
    metric = torch.diag(root) @ random(7, 7, seed=3)
    metric = metric @ metric.T

    def lost(numbers: list[int]) -> float:
        best = weight.double() @ damped[:, numbers] @ torch.linalg.inv(damped[numbers][:, numbers])
        delta = weight.double().clone()
        delta[:, numbers] -= best
        return float((metric.double() @ delta @ damped * delta).sum())

    losses = [lost([n for n in range(12) if n != gone]) for gone in range(12)]
    numbers, _ = eliminated(weight, moment, 11, ridge, metric)
    assert set(range(12)) - set(numbers.tolist()) == {losses.index(min(losses))}
    plain, _ = eliminated(weight, moment, 11, ridge)
    assert plain.tolist() != numbers.tolist()
    numbers, narrow = eliminated(weight, moment, 5, ridge, metric)
    assert lost(numbers.tolist()) < lost(eliminated(weight, moment, 5, ridge)[0].tolist())
    stays = list(range(12))
    while len(stays) > 5:  # one after the other, the one without which least is lost
        stays = min(([n for n in stays if n != gone] for gone in stays), key=lost)
    assert numbers.tolist() == stays
    best = weight.double() @ damped[:, numbers] @ torch.linalg.inv(damped[numbers][:, numbers])
    torch.testing.assert_close(narrow.double(), best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_neurons_are_chosen_by_what_their_blocks_mixture_costs(
    pico: Pico, tmp_path: Path, calibration_text: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metric that a walk back finds of it, shared experts and all; one that was interrupted goes on."""
    met: list[Tensor | None] = []

    def noted(weight: Tensor, moment: Tensor, keep: int, ridge: float, metric: Tensor | None = None) -> Any:
        met.append(metric)
        return eliminated(weight, moment, keep, ridge, metric)

    monkeypatch.setattr(expert_neurons, "eliminated", noted)
    model, again = pico(family, **FLOAT), list[Event]()
    text = f"data: {{source: {calibration_text}, samples: 8, sequence_length: 64}}\n"
    text += "passes: [{kind: expert_width, ratio: 0.5, objective: model}]"
    recipe = parse_recipe(text)
    job = Job(recipe, text, (), model, tmp_path / "out", str(model))

    def stop(event: Event) -> None:
        if isinstance(event, Surveyed) and event.block == 2:  # of two blocks, the last is behind on the way back
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(job, stop)
    apply(job, again.append, resume=True)
    assert next(event.block for event in again if isinstance(event, Surveyed)) == 3
    skeleton, metrics, scratch = Skeleton(Checkpoint(model)), list[Tensor | None](), tmp_path / "scratch"

    def take(back: BlockBack) -> None:
        last = next(name for name in back.found() if ".experts." in name and name.endswith(("down_proj", "w2")))
        metrics.insert(0, metric_of(back.found()[last]))

    read = read_calibration(recipe, skeleton.checkpoint, least=1).windows
    reverse_walk(skeleton, read, scratch, take, lambda step: None, metrics=True)
    members = len(met) // 2
    assert members >= expert_counts("expert_width", skeleton)[0]
    for number, found in enumerate(met):
        assert found is not None
        torch.testing.assert_close(found.float(), metrics[number // members])


def test_too_few_tokens_for_a_metric_are_refused(pico: Pico, calibration_text: Path) -> None:
    model = Skeleton(Checkpoint(pico("qwen3_moe")))
    text = f"data: {{source: {calibration_text}, samples: 2, sequence_length: 32}}\n"
    text += "passes: [{kind: expert_width, width: 16, objective: model}]"
    with pytest.raises(RecipeError, match=r"data.samples: expert_width with objective: model takes 128 tokens or more"):
        make_plan(parse_recipe(text), model)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "deepseek_v3", "qwen2_moe"])
def test_narrower_experts_reload_everywhere(pico: Pico, tmp_path: Path, calibration_text: Path, family: str) -> None:
    data = f"data: {{source: {calibration_text}, samples: 8, sequence_length: 64}}\noutput: {{shard_size: 0.1MB}}\n"
    events: list[Event] = []
    run(data + "passes: [{kind: expert_width, ratio: 0.5}]", pico(family, **FLOAT), tmp_path / "out", events.append)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    plain, own = stock(tmp_path / "out"), load(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(own, windows()), logits(plain, windows()), rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("moe_intermediate_size", config["intermediate_size"]) == (
        48 if family in ("mixtral", "granitemoe") else 16
    )
    changed = [event for event in events if isinstance(event, ExpertsChanged)]
    assert len(changed) == (1 if family == "deepseek_v3" else 2)
    assert all(0 < event.error < 0.5 for event in changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("width: 40", "40 of 32 neurons cannot stay"),
        ("width: 24", "24 of 32 neurons cannot stay: kernels need a multiple of 16"),
        ("ratio: 0.5, width: 16", "give either ratio or width"),
        ("ratio: 0.5, width: 8", "width: Input should be greater than or equal to 16"),
    ],
)
def test_widths_that_kernels_cannot_take_are_refused(pico: Pico, options: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_plan(parse_recipe(f"passes: [{{kind: expert_width, {options}}}]"), Skeleton(Checkpoint(pico("qwen3_moe"))))


def test_a_fitted_model_is_nearer_to_the_original(pico: Pico, tmp_path: Path, calibration_text: Path) -> None:
    """On its calibration text, where fits are certain to help; with whatever was merged before."""
    source = pico("qwen3_moe", **FLOAT)
    data = f"data: {{source: {calibration_text}, samples: 24, sequence_length: 64}}\n"
    options = {
        "plain": "refit: false", "fitted": "", "dern": "merge: dern, similarity: 0.1, refit: false",
        "hc": "merge: hc, refit: false", "hc, fitted": "merge: hc", "corrected": "mass_correction: true, refit: false",
    }  # fmt: skip
    ids, found = windows(), {}
    expected = logits(stock(source), ids)
    for name, option in options.items():
        out = tmp_path / name
        run(data + f"passes: [{{kind: expert_prune, keep: 2, min_tokens: 0, {option}}}]", source, out)
        found[name] = float((logits(stock(out), ids) - expected).square().mean())
    assert found["fitted"] < found["plain"]
    assert found["hc, fitted"] < found["hc"]
    assert len(set(found.values())) == len(found), "every option does something"


def test_moving_no_neuron_is_plain_pruning(pico: Pico, tmp_path: Path, calibration_text: Path) -> None:
    data = f"data: {{source: {calibration_text}, samples: 8, sequence_length: 64}}\n"
    for name, merge in (("plain", "none"), ("dern", "dern, similarity: 1.01")):
        option = f"{{kind: expert_prune, keep: 3, merge: {merge}, refit: false}}"
        run(data + f"passes: [{option}]", pico("mixtral"), tmp_path / name)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "dern"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_order_of_experts_does_not_matter(pico: Pico) -> None:
    skeleton = Skeleton(Checkpoint(pico("qwen3_moe", **FLOAT)))
    turned = Skeleton(fewer_experts(skeleton.checkpoint, {0: (2, 0, 3, 1), 1: (3, 2, 1, 0)}))
    x = random(2, 20, 64)
    for index in range(2):
        found, expected = (s.run(s.runner(index, s.block(index)), x) for s in (turned, skeleton))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_twin_is_missed_where_two_are_chosen(pico: Pico, tmp_path: Path, top_k: int) -> None:
    """The same expert twice: one of a token's experts then, both of two; only in the first case nobody misses it."""
    source = tmp_path / "model"
    shutil.copytree(pico("mixtral", **{**ONE, "num_experts_per_tok": top_k}, **FLOAT), source)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if ".experts.3." in name]:
        tensors[name] = tensors[name.replace(".experts.3.", ".experts.1.")].clone()
    for name in [name for name in tensors if name.endswith("block_sparse_moe.gate.weight")]:
        tensors[name][3] = tensors[name][1]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    skeleton = Skeleton(Checkpoint(source))
    without = Skeleton(fewer_experts(skeleton.checkpoint, {0: (0, 1, 2), 1: (0, 1, 2)}))
    x = random(2, 20, 64)
    found, expected = (s.run(s.runner(0, s.block(0)), x) for s in (without, skeleton))
    difference = float((found - expected).abs().max())
    assert difference < 1e-5 if top_k == 1 else difference > 1e-2


def test_statistics_serve_other_ratios_and_criteria(
    pico: Pico, tmp_path: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = f"data: {{source: {calibration_text}, samples: 8, sequence_length: 64}}\n"

    def pruned(out: str, option: str, statistics: Path | None) -> list[list[int]]:
        recipe, events = data + f"passes: [{{kind: expert_prune, refit: false, {option}}}]", list[Event]()
        job = Job(parse_recipe(recipe), recipe, (), pico("mixtral"), tmp_path / out, "pico")
        apply(job, events.append, statistics=statistics)
        return [event.kept for event in events if isinstance(event, ExpertsKept)]

    options = ["keep: 2, criterion: frequency", "keep: 2, criterion: reconstruction", "keep: 3, merge: hc"]
    own = [pruned(f"own {number}", option, None) for number, option in enumerate(options)]
    kept = tmp_path / "statistics"
    first = pruned("first", "keep: 3", kept)
    monkeypatch.setattr("compressor.calibrate.routing.observe_routing", None)  # as if it were not there
    assert [pruned(f"again {number}", option, kept) for number, option in enumerate(options)] == own
    assert pruned("again", "keep: 3", kept) == first


def test_experts_are_judged_on_a_text_of_their_own(pico: Pico, tmp_path: Path, calibration_text: Path) -> None:
    task = tmp_path / "task.txt"
    task.write_text("0123456789 " * 3000)
    data = f"data: {{source: {calibration_text}, samples: 8, sequence_length: 64}}\n"
    tokens = []
    for name, option in (("data", ""), ("task", f", task: {task}")):
        events: list[Event] = []
        recipe = data + f"passes: [{{kind: expert_prune, keep: 3, refit: false{option}}}]"
        run(recipe, pico("mixtral"), tmp_path / name, events.append)
        tokens.append([event.tokens for event in events if isinstance(event, ExpertsKept)])
    assert tokens[0] != tokens[1]
    with pytest.raises(RecipeError, match="nowhere"):
        run(data + "passes: [{kind: expert_prune, keep: 3, task: nowhere.txt}]", pico("mixtral"), tmp_path / "x")


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_fit_goes_on_where_it_was(
    pico: Pico, tmp_path: Path, calibration_text: Path, after: int
) -> None:
    """In the first pass, or in the second: what was done is not done again, and the folder is the same."""
    data = f"data: {{source: {calibration_text}, samples: 8, sequence_length: 64}}\n"
    recipe = data + "passes: [{kind: expert_prune, keep: 3, merge: hc}, {kind: expert_width, width: 16}]"
    changed: list[Event] = []

    def stopped(event: Event) -> None:
        changed.extend([event] if isinstance(event, ExpertsChanged) else [])
        if len(changed) > after:
            raise KeyboardInterrupt

    run(recipe, pico("qwen2_moe"), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, pico("qwen2_moe"), tmp_path / "out", stopped)
    again: list[Event] = []
    job = Job(parse_recipe(recipe), recipe, (), pico("qwen2_moe"), tmp_path / "out", "pico")
    apply(job, again.append, resume=True)
    assert sum(isinstance(event, ExpertsChanged) for event in again) == 4 - after
    same_folders(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("passes", ["[{kind: expert_prune, keep: 3}]", "[{kind: expert_width, width: 16}]"])
def test_a_fit_asks_for_samples_to_hold_out(passes: str, pico: Pico, tmp_path: Path, calibration_text: Path) -> None:
    recipe = f"data: {{source: {calibration_text}, samples: 1, sequence_length: 64}}\npasses: {passes}"
    with pytest.raises(RecipeError, match=r"data\.samples"):
        run(recipe, pico("qwen2_moe"), tmp_path / "out")
    run(recipe.replace("}]", ", refit: false}]"), pico("qwen2_moe"), tmp_path / "out")


def test_files_of_another_text_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    """Two runs began with one folder, and both were interrupted."""
    mine, other = (RoutingFolder(tmp_path, {"corpus": name}) for name in "ab")
    mine.save(0, Routing.empty(4), torch.zeros(2, 8))
    other.save(1, Routing.empty(4), torch.zeros(2, 8))
    mine.finish([0, 1])
    assert not mine.complete
    with pytest.raises(ResourceError, match="of another model or text; delete"):
        mine.load(1)
    mine.save(1, Routing.empty(4), torch.zeros(2, 8))
    mine.finish([0, 1])
    assert mine.complete


def test_statistics_of_the_whole_model_do_not_serve_a_smaller_one(
    pico: Pico, tmp_path: Path, calibration_text: Path
) -> None:
    data = f"data: {{source: {calibration_text}, samples: 4, sequence_length: 32}}\n"
    kept = "kept: {0: [0, 1, 2], 1: [1, 2, 3]}, keep: 3, refit: false, task: nowhere.txt"
    recipe = data + f"passes: [{{kind: expert_prune, {kept}}}, {{kind: gptq, group_size: 32, sequential: false}}]"
    job = Job(parse_recipe(recipe), recipe, (), pico("mixtral"), tmp_path / "out", "pico")
    with pytest.raises(RecipeError, match="which this recipe does not use"):
        apply(job, lambda event: None, statistics=tmp_path / "kept")
    apply(job, lambda event: None)  # the text of a choice that was made is not asked for


def test_a_correction_is_the_best_factor(pico: Pico, tmp_path: Path, calibration_text: Path) -> None:
    source = pico("olmoe", **FLOAT)
    data = f"data: {{source: {calibration_text}, samples: 8, sequence_length: 64}}\n"
    kept = "kept: {0: [0, 1, 3], 1: [1, 2, 3]}, keep: 3, refit: false"
    for name, option in (("plain", ""), ("corrected", ", mass_correction: true")):
        run(data + f"passes: [{{kind: expert_prune, {kept}{option}}}]", source, tmp_path / name)
    plain, corrected = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "corrected"))
    name = "model.layers.0.mlp.experts.%d.down_proj.weight"
    factors = [float((corrected[name % n] * plain[name % n]).sum() / plain[name % n].square().sum()) for n in range(3)]
    assert max(factors) - min(factors) < 1e-5
    assert 0 < factors[0] < 1, "the softmax over fewer experts gives more to each"
    recipe = parse_recipe(data + "passes: [{kind: rtn}]")
    skeleton = Skeleton(Checkpoint(source))
    ids = read_calibration(recipe, skeleton.checkpoint).windows
    models = [Skeleton(Checkpoint(folder)) for folder in (source, tmp_path / "plain")]
    entered: list[Tensor] = []
    blocks = [model.block(0) for model in models]
    handle = blocks[0].mlp.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    skeleton.run(skeleton.runner(0, blocks[0]), skeleton.embed(ids))
    handle.remove()
    with torch.no_grad():
        f, g = (block.mlp(entered[0]) for block in blocks)
    assert factors[0] == pytest.approx(float((f * g).sum() / g.square().sum()), rel=1e-3)


@pytest.mark.parametrize("sequential", ["true", "false"])
def test_little_memory_changes_nothing_but_the_order_of_work(
    pico: Pico, tmp_path: Path, calibration_text: Path, sequential: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments of a stage in parts of one or two experts, the others not run."""
    data = f"data: {{source: {calibration_text}, samples: 8, sequence_length: 64}}\n"
    recipe = parse_recipe(data + f"passes: [{{kind: gptq, group_size: 32, sequential: {sequential}}}]")
    model = pico("qwen2_moe")
    plan = make_plan(recipe, Skeleton(Checkpoint(model)))
    for name, room in (("whole", None), ("parts", 50_000.0)):
        monkeypatch.setattr("compressor.compress.plan.room_for_moments", lambda *_, room=room: room)
        apply(Job(recipe, "", (), model, tmp_path / name, "pico"), lambda event: None)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert plan.room is None


def test_the_plan_makes_do_with_what_memory_there_is(pico: Pico, tmp_path: Path) -> None:
    sizes = {"num_experts": 16, "moe_intermediate_size": 512, "hidden_size": 64}
    recipe = parse_recipe("data: {samples: 2, sequence_length: 16}\npasses: [{kind: gptq, group_size: 32}]")
    skeleton = Skeleton(Checkpoint(pico("qwen3_moe", **sizes)))
    whole = make_plan(recipe, skeleton, memory=1e12)
    less = make_plan(recipe, skeleton, memory=whole.memory - 20e6)
    assert whole.room is None
    assert less.room is not None
    assert less.memory <= whole.memory - 20e6
    least = make_plan(recipe, skeleton, memory=1.0)
    assert least.memory < less.memory
    with pytest.raises(ResourceError, match="--memory allows"):
        apply(Job(recipe, "", (), skeleton.checkpoint.path, tmp_path / "x", "pico"), lambda event: None, memory=1.0)
