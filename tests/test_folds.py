"""Scales that move between norms, or linears, and what reads them leave the function as it is, in every family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import FAMILIES, benchmark, stock_logits
from torch import Tensor

from compressor.calibrate.drive import start_chains
from compressor.calibrate.stage import StageWork
from compressor.calibrate.statistics import KINDS
from compressor.calibrate.walk import walk
from compressor.compress.apply import Job, apply
from compressor.compress.events import Event
from compressor.compress.passes.base import LinearPass, Need
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.folds import folded, seams
from compressor.runtime.model.skeleton import Skeleton
from compressor.runtime.model.view import Derived, changed
from compressor.runtime.schemes import Dense, Operator

Pico = Callable[..., Path]
# Where attention and MLP read the residual stream itself, no norm feeds them.
NOT_THERE = {"olmo2": {"norm"}, "exaone4": {"norm"}}


def then(first: Any, second: Any) -> Any:
    return lambda tensor: second(first(tensor))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fold_changes_nothing(pico: Pico, family: str) -> None:
    skeleton = Skeleton(Checkpoint(pico(family, dtype=torch.float32)))
    generator, parts, kinds = torch.Generator().manual_seed(0), dict[str, Derived](), set[str]()
    for index in range(skeleton.blocks):
        for seam in seams(skeleton, index).values():
            kinds.add("norm" if seam.norm else "linear")
            scale = torch.rand(seam.channels, generator=generator) + 0.5
            assert torch.equal(seam.largest(seam.columns(scale)), scale)
            made = folded(skeleton, index, seam, scale)
            moved = Skeleton(changed(skeleton.checkpoint, made))
            assert all(not torch.equal(moved.checkpoint.tensor(n), skeleton.checkpoint.tensor(n)) for n in made)
            for name, part in made.items():  # of what two seams meet at, such as an upper projection, both
                parts[name] = Derived((name,), then(parts[name].make, part.make)) if name in parts else part
    assert kinds == {"norm", "linear"} - NOT_THERE.get(family, set())
    moved = Skeleton(changed(skeleton.checkpoint, parts))
    ids = torch.randint(0, 128, (2, 24), generator=generator)
    hidden = moved.embed(ids)
    for index in range(moved.blocks):
        hidden = moved.run(moved.runner(index, moved.block(index)), hidden)
    torch.testing.assert_close(
        moved.logits(hidden), stock_logits(pico(family, dtype=torch.float32), ids), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused(pico: Pico, wrong: float) -> None:
    skeleton = Skeleton(Checkpoint(pico(dtype=torch.float32)))
    seam = seams(skeleton, 0)["input_layernorm"]
    weights = {name: skeleton.checkpoint.tensor(f"{name}.weight") for name in seam.linears}
    linears = {name: Dense(weight) for name, weight in weights.items()}
    work = StageWork(dict(linears), weights, [list(weights)], seams={seam.feeder: seam})
    scale = torch.ones(seam.channels)
    scale[3] = wrong
    with pytest.raises(ValueError, match="input_layernorm: scales that are moved have to be positive"):
        work.fold(seam.feeder, scale)
    assert work.linears == linears


SCALED = ["llama", "qwen2", "gemma2", "phi3", "starcoder2", "cohere2", "mixtral", "granitemoe", "deepseek_v3"]


def random_scales(work: StageWork, generator: torch.Generator) -> dict[str, Tensor]:
    """One for each seam of a stage, moved there."""
    scales = {feeder: torch.rand(seam.channels, generator=generator) + 0.5 for feeder, seam in work.seams.items()}
    for feeder, scale in scales.items():
        work.fold(feeder, scale)
    return scales


@pytest.mark.parametrize("room", [None, 1.0])
@pytest.mark.parametrize("family", SCALED)
def test_inside_the_walk_statistics_follow_and_both_chains_stay_together(
    pico: Pico, tmp_path: Path, family: str, room: float | None
) -> None:
    skeleton = Skeleton(Checkpoint(pico(family, dtype=torch.float32)))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 128, (4, 32), generator=generator)
    wanted = {name: tuple(KINDS) for index in range(skeleton.blocks) for name in skeleton.linears(index)}
    chains = start_chains(skeleton, ids, tmp_path, ("compressed", "reference"))
    moved = 0
    for block in walk(skeleton, chains, wanted, room=room):
        columns: dict[str, Tensor] = {}
        for work in block.stages():
            before = {name: found.sums["peak"].clone() for name, found in work.statistics.items()}
            for feeder, scale in random_scales(work, generator).items():
                columns |= dict.fromkeys(work.seams[feeder].linears, work.seams[feeder].columns(scale))
            moved += len(work.folded)
            for name, found in work.statistics.items():
                plain = skeleton.checkpoint.tensor(f"{name}.weight")
                torch.testing.assert_close(work.originals[name], plain * columns.get(name, 1.0))
                assert float(found.cross.abs().max()) < 1e-3 * float(found.moment.abs().max())
                scaled = columns.get(name, torch.ones(len(before[name]))) if work.folded else 1.0
                torch.testing.assert_close(found.sums["peak"], before[name] / scaled)
        block.advance()
        after = (chains.read(block.index + 1, chain)[:] for chain in chains.names)
        torch.testing.assert_close(*after, rtol=1e-4, atol=1e-4)
    assert moved >= 2 * skeleton.blocks


class Mover(LinearPass):
    """Moves scales wherever it can."""

    kind: str = "mover"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"compressed", "moment"})

    def planned(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Operator:
        return operator

    def apply(self, work: StageWork) -> Iterator[Event]:
        random_scales(work, torch.Generator().manual_seed(len(work.linears)))
        yield from ()


@pytest.mark.parametrize("family", SCALED)
def test_a_model_whose_scales_moved_in_the_walk_is_the_same(pico: Pico, tmp_path: Path, family: str) -> None:
    model = pico(family, dtype=torch.float32)
    text = "data: {samples: 4, sequence_length: 32}\npasses: [{kind: rtn}]\n"
    recipe = parse_recipe(text).model_copy(update={"passes": (Mover(targets=("*mlp*", "*attn*", "*moe*")),)})
    apply(Job(recipe, text, (), model, tmp_path / "out", "x"), lambda event: None)
    before, after = Checkpoint(model), Checkpoint(tmp_path / "out")
    assert sum(not torch.equal(before.tensor(name), after.tensor(name)) for name in before.tensors) > 4
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = stock_logits(model, ids)
    torch.testing.assert_close(stock_logits(tmp_path / "out", ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "passes",
    [
        "{kind: rtn, bits: 8}",
        "{kind: rtn, scheme: int8}",
        "{kind: sparse24}, {kind: rtn, bits: 8, group_size: 16}",
        "{kind: armor, iterations: 2}",
        "{kind: rtn, bits: 8}, {kind: eora, rank: 8}",
        "{kind: lorc, ratio: 0.75}",
        "{kind: lorc, ratio: 0.75, latent_bits: 4, targets: '*.[kv]_proj'}, {kind: gptq, bits: 3, targets: '*q_proj'}",
    ],
)
def test_what_feeds_a_stage_follows_in_whatever_form_it_is(
    pico: Pico, tmp_path: Path, family: str, passes: str
) -> None:
    """Scales by powers of two move into a projection that was compressed before: the model it makes is the same."""
    model = pico(family, dtype=torch.float32)
    text = f"data: {{samples: 4, sequence_length: 32}}\npasses: [{passes}]\n"
    recipe, outputs = parse_recipe(text), []

    class Doubler(Mover):
        @property
        def needs(self) -> frozenset[Need]:  # so that attention runs again, and not its last linear over kept inputs
            return frozenset()

        def apply(self, work: StageWork) -> Iterator[Event]:
            for feeder, seam in work.seams.items():
                if not seam.norm and all(self.wants(name) for name in seam.linears):
                    work.fold(feeder, 2.0 ** torch.randint(-1, 2, (seam.channels,)))
            yield from ()

    narrow = [step.model_copy(update={"ignore": ("*.o_proj", "*.down_proj")}) for step in recipe.passes]
    for name, steps in {"still": narrow, "moved": [Doubler(targets=("*.o_proj", "*.down_proj")), *narrow]}.items():
        job = Job(recipe.model_copy(update={"passes": tuple(steps)}), text, (), model, tmp_path / name, "x")
        apply(job, lambda event: None)
        outputs.append(load(tmp_path / name, "cpu", torch.float32)(input_ids=torch.arange(1, 40)[None]).logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_the_judge_with_outliers_computes_the_same(pico: Pico, tmp_path: Path) -> None:
    """Bit for bit, for its scales are powers of two; and a few channels are that much larger."""
    model, out = pico("qwen3_moe"), tmp_path / "out"
    benchmark("outliers").write(model, out, share=0.02)
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    largest: list[list[Tensor]] = []
    logits = []
    for folder in (model, out):
        loaded, seen = load(folder, dtype=torch.float32), list[Tensor]()
        for name in ("q_proj", "o_proj"):
            reader = loaded.model.layers[1].self_attn.get_submodule(name)
            reader.register_forward_pre_hook(
                lambda module, inputs, seen=seen: seen.append(inputs[0].abs().amax((0, 1)))
            )
        logits.append(loaded(input_ids=ids).logits.detach())
        largest.append(seen)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    for before, after in zip(*largest, strict=True):
        times = (after / before).round()
        assert set(times.tolist()) <= {1.0, 16.0, 32.0}
        assert 0 < int((times > 1).sum()) <= 2
