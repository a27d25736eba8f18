"""What a recipe is expected to cost, against what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run

from compressor.calibrate.curvature import BlockBack, reverse_walk
from compressor.compress.apply import Job, apply
from compressor.compress.evaluate import evaluate
from compressor.compress.foretelling import WalkBack
from compressor.compress.passes.linear.lorc import Lorc
from compressor.compress.plan import make_plan
from compressor.compress.predict import AtWidth, Prediction, per_bit, predicted
from compressor.compress.recipe import parse_recipe
from compressor.compress.surveys import read_calibration
from compressor.runtime import load
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.skeleton import Skeleton

Pico = Callable[..., Path]
PASSES = {
    "rtn": "{kind: rtn, bits: 4, group_size: 32}",
    "gptq": "{kind: gptq, bits: 3, group_size: 32, correction: 0, search: false, refinements: 0}",
    "mixed": "{kind: gptq, bits: mixed, average_bits: 4, group_size: 32, correction: 0}",
    "wanda": "{kind: sparse24, method: wanda, targets: '*.mlp.*'}",
    "latents": "{kind: lorc, ratio: .5, calibrated: true, correction: 0}",
    "both": "{kind: lorc, ratio: .6, calibrated: true}, {kind: rtn, bits: 4, group_size: 32}",
}


@pytest.mark.parametrize("name", PASSES)
def test_about_as_much_is_lost_as_is_expected(name: str, pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    model = pico("llama", dtype=torch.float32)
    text = f"data: {{source: '{calibration_text}', samples: 24, sequence_length: 64}}\npasses: [{PASSES[name]}]\n"
    recipe, skeleton = parse_recipe(text), Skeleton(Checkpoint(model))
    windows = read_calibration(recipe, Checkpoint(model)).windows
    found = predicted(make_plan(recipe, skeleton), windows, tmp_path / "room", lambda event: None)
    assert not found.unknown
    assert len(found.passes) == len(recipe.passes)
    apply(Job(recipe, text, (), model, tmp_path / "out", str(model)), lambda event: None)
    against = evaluate(load(tmp_path / "out", dtype=torch.float32), windows, load(model, dtype=torch.float32)).against
    assert against is not None
    # Of values, the longest gradients, which are cut, have much of what errors cost in a model of random weights.
    assert (0.2 if name in ("rtn", "latents") else 0.5) < found.kl / against.kl_mean < 1.5


def test_what_cannot_be_told_is_named(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    edits = [f"data.source={calibration_text}", "data.samples=4", "data.sequence_length=64"]
    options = [word for edit in edits for word in ("--set", edit)]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes: [{kind: rtn, bits: 3, group_size: 32}, {kind: eora, rank: 2}]\ntune: {samples: 20}\n")
    said = run("plan", recipe, pico("llama"), "--predict", *options, cwd=tmp_path).stdout
    assert "KL expected: " in said
    assert "not counted: eora, tune" in said
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    shown = run("plan", recipe, pico("llama"), "--predict", "--json", *options, cwd=tmp_path).stdout
    record = json.loads(shown)["predicted"]
    assert record["unknown"] == ["eora", "tune"]
    [[kind, cost]] = record["passes"]
    assert (kind, cost) == ("rtn", record["kl"])


def test_other_widths_cost_what_recipes_of_them_do(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    """One walk tells of all of them what each would tell alone; a bit less costs about four times as much."""
    model = pico("llama", dtype=torch.float32)
    options = [f"data.source={calibration_text}", "data.samples=4", "data.sequence_length=64"]
    edits = [word for edit in options for word in ("--set", edit)]
    recipe = tmp_path / "recipe.yaml"

    def planned(bits: int, *more: str) -> dict[str, Any]:
        passes = f"{{kind: sparse24, targets: '*.mlp.*'}}, {{kind: gptq, bits: {bits}, group_size: 32}}"
        recipe.write_text(f"passes: [{passes}]\n")
        record: dict[str, Any] = json.loads(
            run("plan", recipe, model, "--predict", "--json", *more, *edits, cwd=tmp_path).stdout
        )
        return record

    swept = planned(5, "--sweep")
    rows = {row["bits"]: row for row in swept["widths"]}
    assert list(rows) == [2, 3, 4, 5, 6, 8]
    for bits in (3, 5):
        alone = planned(bits)
        assert rows[bits]["nbytes"] == alone["bytes_after"]
        assert rows[bits]["kl"] == pytest.approx(alone["predicted"]["kl"])
    assert swept["predicted"] == planned(5)["predicted"]
    ideal = [AtWidth(bits, 0.0, 4.0**-bits) for bits in (2, 3, 4, 6)]
    assert per_bit(ideal) == pytest.approx(4)
    shown = run("plan", recipe, model, "--predict", "--sweep", *edits, cwd=tmp_path).stdout
    assert "a bit less" in shown


def test_a_sweep_needs_bits(pico: Pico, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes: [{kind: sparse24}]\n")
    edits = ("--set", "data.samples=4", "--set", "data.sequence_length=64")
    for options, said in (((), "--sweep goes with --predict"), (("--predict",), "no pass of the recipe has integers")):
        failed = run("plan", recipe, pico("llama"), "--sweep", *options, *edits, cwd=tmp_path, code=2)
        assert said in failed.stderr


def test_of_coupled_rows_less_is_foretold(pico: Pico, tmp_path: Path) -> None:
    skeleton = Skeleton(Checkpoint(pico("llama")))
    windows = torch.randint(0, 128, (16, 64), generator=torch.Generator().manual_seed(0))
    found = {}
    for objective in ("layer", "model"):
        for kind in ("gptq, bits: 3, group_size: 32", "sparse24"):
            recipe = parse_recipe(f"passes: [{{kind: {kind}, objective: {objective}}}]")
            (room := tmp_path / f"{objective}-{kind[:4]}").mkdir()
            found[kind, objective] = predicted(make_plan(recipe, skeleton), windows, room, lambda event: None).kl
    for kind in ("gptq, bits: 3, group_size: 32", "sparse24"):
        assert 0.2 * found[kind, "layer"] < found[kind, "model"] < 0.97 * found[kind, "layer"]


def test_what_is_told() -> None:
    assert Prediction((("rtn", 0.0123),), ()).told() == "KL expected: 0.012"
    assert Prediction((), ("armor",)).told() == "no expectation of what is lost: armor cannot tell before the run"
    assert Prediction((("rtn", 0.2), ("lorc", 0.1)), ()).told().endswith("beyond 0.1 such an estimate is a rough one")


@pytest.mark.parametrize(
    ("family", "passes", "unknown"),
    [
        ("llama", "{kind: rtn, scheme: int8}", ("rtn",)),
        ("mixtral", "{kind: expert_prune, keep: 3, refit: false}, {kind: rtn}", ("expert_prune", "rtn")),
    ],
)
def test_no_figure_is_given_for_what_is_not_seen(
    family: str, passes: str, unknown: tuple[str, ...], pico: Pico, calibration_text: Path, tmp_path: Path
) -> None:
    """What rounded inputs cost, and a model whose experts are not chosen yet."""
    model = pico(family)
    text = f"data: {{source: '{calibration_text}', samples: 4, sequence_length: 64}}\npasses: [{passes}]\n"
    recipe, skeleton = parse_recipe(text), Skeleton(Checkpoint(model))
    windows = read_calibration(recipe, Checkpoint(model)).windows
    found = predicted(make_plan(recipe, skeleton), windows, tmp_path / "room", lambda event: None)
    assert found == Prediction((), unknown)


def test_a_pass_that_asks_later_is_asked_too(pico: Pico, tmp_path: Path) -> None:
    """What an interrupted run found of some passes does not answer for the others."""
    recipe = parse_recipe("passes: [{kind: rtn, bits: 4, group_size: 32}, {kind: sparse24, targets: '*.mlp.*'}]")
    skeleton = Skeleton(Checkpoint(pico("llama")))
    windows = torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(0))
    back = WalkBack(skeleton, windows, tmp_path, None, None, lambda event: None)
    first, second = recipe.linear_passes.values()
    alone = back.asked({0: first})
    both = back.asked({0: first, 1: second})
    assert both[0] == alone[0]
    assert both[1].keys() == {name for index in range(2) for name in skeleton.linears(index) if ".mlp." in name}


@pytest.mark.parametrize("sequential", ["true", "false"])
def test_what_ranks_cost_is_the_definition(sequential: str, pico: Pico, tmp_path: Path) -> None:
    """`½ tr(M Δ H Δᵀ)` of the best product of that rank, by singular values of `M^½ W H^½`; tokens as the run counts
    them."""
    skeleton = Skeleton(Checkpoint(pico("llama", dtype=torch.float32)))
    recipe = f"passes: [{{kind: lorc, ratio: .5, calibrated: true, sequential: {sequential}}}]"
    step = parse_recipe(recipe).passes[0].prepare(skeleton)
    assert isinstance(step, Lorc)
    names = {name for index in range(2) for name in skeleton.linears(index) if step.wants(name)}
    windows = torch.randint(0, 128, (8, 64), generator=torch.Generator().manual_seed(0))
    checked = 0

    def root(matrix: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(matrix.double())
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    def take(back: BlockBack) -> None:
        nonlocal checked
        found, curvatures = step.foretell(skeleton, back), back.found()
        for inside, (moment, weighed) in back.met.items():
            name = skeleton.disk_name(back.index, inside)
            own, weight = curvatures[name], skeleton.checkpoint.tensor(f"{name}.weight").double()
            assert own.metric is not None
            assert own.places is not None
            counted = moment.moment / moment.tokens
            if sequential == "true":
                counted = (counted + weighed.moment / moment.tokens / own.places.mean()) / 2
            seen = root(own.metric) @ weight @ root(counted)
            sizes = torch.linalg.svdvals(seen).square()
            for rank in (8, 16, 24):
                assert found[f"{name} {rank}"] == pytest.approx(float(sizes[rank:].sum()) / 2, rel=5e-3)
                checked += 1

    reverse_walk(skeleton, windows, tmp_path / "walk", take, lambda number: None, metrics=True, inputs=names)
    assert checked == 12
