"""The step after all passes: scales and norms trained for the original's answers."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from damage import flip
from pico import same_folders
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from compressor.calibrate.capture import as_it_runs
from compressor.calibrate.tuning import Tuning
from compressor.compress.apply import Job, apply
from compressor.compress.events import Descending, Event, Tuned
from compressor.compress.output.writer import ShardedWriter
from compressor.compress.plan import make_plan, plan_for_text
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.errors import RecipeError, ResourceError
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.skeleton import Skeleton, calibration_dtype
from compressor.runtime.stored import StoredModel, open_model

Pico = Callable[..., Path]
Jobs = Callable[..., Job]
IDS = torch.randint(0, 100, (3, 40), generator=torch.Generator().manual_seed(0))


def quiet(event: Event) -> None:
    pass


@pytest.fixture
def job(pico: Pico, calibration_text: Path, tmp_path: Path) -> Jobs:
    """`job(tune, family)`: integers of 2 bits, and then what `tune` says."""

    def make(
        tune: str = "{samples: 35, batch: 2, rate: 0.006}", family: str = "llama", out: str = "out", **changes: str
    ) -> Job:
        text = f"data: {{source: '{calibration_text}', samples: 4, sequence_length: 32}}\n"
        text += f"output: {{shard_size: 0.05MB}}\nlimits: {{kl: null, perplexity_ratio: null}}\ntune: {tune}\n"
        text += f"passes: [{changes.get('passes', '{kind: rtn, bits: 2, group_size: 32}')}]\n"
        return Job(parse_recipe(text), text, (), pico(family), tmp_path / out, "pico")

    return make


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder as it lies there."""
    found = open_model(folder)
    assert isinstance(found, StoredModel)
    return {name: found.stored_tensor(name).clone() for name in found.stored}


def leaving(skeleton: Skeleton) -> torch.Tensor:
    hidden = skeleton.embed(IDS)
    for index in range(skeleton.blocks):
        hidden = skeleton.run(skeleton.runner(index, skeleton.block(index)), hidden)
    return hidden


def divergence(skeleton: Skeleton, folder: Path, changed: Mapping[str, torch.Tensor]) -> float:
    """KL summed over tokens in float64, of whole models, with other numbers in some places of the compressed one."""
    compressed = open_model(folder)
    assert isinstance(compressed, StoredModel)
    with torch.no_grad():
        exact = load(skeleton.checkpoint.path, dtype=torch.float32).double()(IDS).logits.log_softmax(-1)
        model = load(skeleton.checkpoint.path, dtype=torch.float32).double()
        state = {}
        for name in model.state_dict():
            disk = skeleton.family.disk_name(name)
            linear = disk.removesuffix(".weight")
            if linear in compressed.schemes:
                operator = compressed.operator(linear)
                scales = {
                    place: changed.get(f"{linear}:{place}", tensor).double()
                    for place, tensor in operator.multipliers().items()
                }
                state[name] = operator.multiplied(scales).dense(torch.float64)
            else:
                state[name] = changed.get(disk, compressed.tensor(disk)).double()
        model.load_state_dict(state)
        return float(F.kl_div(model(IDS).logits.log_softmax(-1), exact, log_target=True, reduction="sum"))


def test_gradients_are_those_of_the_whole_model(job: Jobs, tmp_path: Path) -> None:
    """Against differences of a model that has all its blocks, in float64, and norms of all sizes."""
    folder = shutil.copytree(job("null").model, tmp_path / "model")
    [file] = folder.glob("*.safetensors")
    tensors, draw = load_file(file), torch.Generator().manual_seed(2)
    for name in (name for name in tensors if name.endswith("norm.weight")):
        tensors[name] *= 0.3 + torch.rand(tensors[name].shape, generator=draw)
    save_file(tensors, file, {"format": "pt"})
    one = replace(job("null"), model=folder)
    apply(one, quiet)
    skeleton, compressed = Skeleton(Checkpoint(one.model)), open_model(one.out)
    tuning = Tuning(skeleton, Skeleton(compressed))
    lost, found = tuning._gradients(IDS, leaving(skeleton))
    assert lost == pytest.approx(divergence(skeleton, one.out, {}), rel=1e-4)
    assert found.keys() == tuning.deltas.keys()
    assert len(found) == 2 * 7 + 2 * 2  # linears and norms of two blocks
    generator, step = torch.Generator().manual_seed(1), 1e-3
    for name, gradient in found.items():
        linear, _, place = name.partition(":")
        value = compressed.operator(linear).multipliers()[place] if place else compressed.tensor(name)
        way = torch.randn(value.shape, generator=generator).double()
        ends = [divergence(skeleton, one.out, {name: value.double() * (1 + sign * step * way)}) for sign in (1, -1)]
        difference = (ends[0] - ends[1]) / 2 / step
        assert float((gradient * way).sum()) == pytest.approx(difference, abs=2e-3 * float(gradient.norm()))


@pytest.mark.parametrize(
    "passes",
    [
        "{kind: rtn, scheme: nvfp4}",
        "{kind: rtn, scheme: int8}",
        "{kind: lorc, ratio: 1.0, latent_bits: 8}",
        "{kind: armor, block_size: 16, wrapper_bits: 8, share: true, iterations: 1}, {kind: rtn, bits: 2, "
        "group_size: 16}",
    ],
    ids=["inputs in floats", "inputs in integers", "latents", "shared"],
)
def test_what_is_judged_is_what_is_written(job: Jobs, passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after, by what else reads the folder."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = Tuning.divergences

    def divergences(self: Tuning, ids: torch.Tensor, exact: torch.Tensor, *, moved: bool) -> list[float]:
        seen.append((ids, exact.clone()))
        return real(self, ids, exact, moved=moved)

    monkeypatch.setattr(Tuning, "divergences", divergences)
    events: list[Event] = []
    plain, trained = job("null", out="plain", passes=passes), job(passes=passes)
    apply(plain, quiet)
    apply(trained, events.append)
    [told] = [event for event in events if isinstance(event, Tuned)]
    ids, _ = seen[0]
    dtype = calibration_dtype(Checkpoint(plain.model))
    for folder, lost in ((plain.out, told.before), (trained.out, min(told.before, told.after))):
        skeletons = [Skeleton(open_model(path), dtype) for path in (plain.model, folder)]
        answers = []
        for skeleton in skeletons:
            hidden = skeleton.embed(ids)
            for index in range(skeleton.blocks):
                block = as_it_runs(skeleton, index)
                hidden = skeleton.run(skeleton.runner(index, block), hidden)
            answers.append(skeleton.logits(hidden).log_softmax(-1))
        divergence = F.kl_div(answers[1], answers[0], log_target=True, reduction="sum") / ids.numel()
        assert float(divergence) == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_scales_and_norms_come_nearer_and_codes_stay(job: Jobs, family: str) -> None:
    events: list[Event] = []
    plain, trained = job("null", family, "plain"), job(family=family)
    apply(plain, quiet)
    apply(trained, events.append)
    [told] = [event for event in events if isinstance(event, Tuned)]
    steps = [event for event in events if isinstance(event, Descending)]
    assert [event.step for event in steps] == list(range(1, 17))  # of 35 windows, 3 of which judge
    assert told.after < 0.97 * told.before
    before, after = stored(plain.out), stored(trained.out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith(("weight_scale", "norm.weight")) for name in changed)
    assert {name.rpartition(".")[2] for name in changed} == {"weight_scale", "weight"}
    assert not any("router" in name or "mlp.gate.w" in name for name in changed)


def test_what_is_no_better_is_not_kept(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    plain, trained, real = job("null", out="plain"), job(), Tuning._move
    monkeypatch.setattr(Tuning, "_move", lambda self, name, gradient, rate: real(self, name, -gradient, rate))
    apply(plain, quiet)
    apply(trained, events.append)
    [told] = [event for event in events if isinstance(event, Tuned)]
    assert told.after > told.before
    assert all(torch.equal(tensor, stored(plain.out)[name]) for name, tensor in stored(trained.out).items())


class Stop(BaseException):
    """Stands in for a kill."""


def killed_at(step: int) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, Descending) and event.step == step:
            raise Stop

    return listen


@pytest.mark.parametrize("step", [15, 17])
def test_a_run_that_goes_on_ends_as_one_that_was_left_alone(job: Jobs, step: int) -> None:
    tune = "{samples: 45, rate: 0.006}"  # 21 steps, which are kept every 16
    alone, killed = job(tune, out="alone"), job(tune)
    apply(alone, quiet)
    with pytest.raises(Stop):
        apply(killed, killed_at(step))
    apply(killed, quiet, resume=True)
    same_folders(killed.out, alone.out)


def test_a_run_goes_on_from_files_of_which_some_are_replaced(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, killed = job(out="alone"), job()
    apply(alone, quiet)
    seen: list[Event] = []
    with monkeypatch.context() as patch:
        real = ShardedWriter.write

        def write(self: ShardedWriter, tensors: Mapping[str, torch.Tensor]) -> None:
            real(self, tensors)
            if any(isinstance(event, Tuned) for event in seen):
                raise Stop

        patch.setattr(ShardedWriter, "write", write)
        with pytest.raises(Stop):
            apply(killed, seen.append)
    apply(killed, quiet, resume=True)
    same_folders(killed.out, alone.out)


@pytest.mark.parametrize("name", ["chains/tune/state.safetensors", "chains/tune/result-00001.safetensors", "codes"])
def test_what_was_damaged_in_between_is_noticed(job: Jobs, name: str) -> None:
    one = job("{samples: 45, rate: 0.006}")
    last = Tuned if "state" not in name else Descending

    def stop(event: Event) -> None:
        if isinstance(event, last) and getattr(event, "step", 17) == 17:
            raise Stop

    with pytest.raises(Stop):
        apply(one, stop)
    work = one.out.with_name("out.work")
    if name == "codes":
        header = {path: path.read_bytes() for path in (work / "out").glob("*.safetensors")}
        path = next(path for path, raw in header.items() if b"layers.0.mlp.down_proj.weight_packed" in raw)
        length = int.from_bytes(header[path][:8], "little")
        start, _ = json.loads(header[path][8 : 8 + length])["model.layers.0.mlp.down_proj.weight_packed"][
            "data_offsets"
        ]
        flip(path, 8 + length + start)
    else:
        flip(work / name, -1)
    with pytest.raises(ResourceError, match="damaged"):
        apply(one, quiet, resume=True)


def test_too_little_text_is_said(job: Jobs, calibration_text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(calibration_text.read_text(encoding="utf-8")[:400], encoding="utf-8")
    one = job("{samples: 5000}")
    data = one.recipe.data.model_copy(update={"source": str(short), "sequence_length": 64, "samples": 2})
    little = replace(one, recipe=one.recipe.model_copy(update={"data": data}))
    with pytest.raises(RecipeError, match=r"tune: \d+ windows of text that does not calibrate are too few"):
        apply(little, quiet)


@pytest.mark.parametrize("other", ["passes: [{kind: rtn, scheme: mxfp4}]", "output: {format: dense}"])
def test_that_norms_alone_are_trained_is_warned_of(job: Jobs, other: str) -> None:
    one = job()
    text = re.sub(rf"^{other.partition(':')[0]}: .*", other, one.recipe_text, flags=re.MULTILINE)
    for recipe, warned in ((parse_recipe(text), True), (one.recipe, False)):
        plan, _ = plan_for_text(recipe, Skeleton(Checkpoint(one.model)))
        assert any("norms and biases alone" in warning for warning in plan.warnings) == warned


def test_text_that_is_asked_for_and_not_there_is_warned_of(job: Jobs) -> None:
    one = job("{samples: 5000, rate: 0.006}")
    plan, text = plan_for_text(one.recipe, Skeleton(Checkpoint(one.model)))
    assert text is not None
    assert 35 < len(text.tuning) < 5000
    assert (
        f"tune: the text has {len(text.tuning)} windows beside those that calibrate, of 5000 asked for" in plan.warnings
    )


def test_windows_that_train_are_none_that_calibrate_or_measure(job: Jobs) -> None:
    one, two = job(), job("null")
    skeleton = Skeleton(Checkpoint(one.model))
    (_, text), (_, before) = (plan_for_text(each.recipe, skeleton, memory=1e9) for each in (one, two))
    assert text is not None
    assert before is None  # nothing calibrates
    sets = [{tuple(window.tolist()) for window in part} for part in (text.windows, text.held_out, text.tuning)]
    assert [len(part) for part in sets] == [4, 32, 35]
    assert not any(one & other for one, other in itertools.combinations(sets, 2))


def test_a_plan_counts_it(job: Jobs) -> None:
    skeleton = Skeleton(Checkpoint(job().model))
    without, little, much = (
        make_plan(job(f"{tune}").recipe, skeleton) for tune in ("null", "{samples: 40}", "{samples: 4000, batch: 64}")
    )
    assert without.work["tune"] == 0
    assert much.work["tune"] == pytest.approx(100 * little.work["tune"])
    assert without.memory < little.memory < much.memory
    assert without.disk < little.disk < much.disk
