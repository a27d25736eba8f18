"""Every run says how far its output is from the original, and is held against the recipe's limits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import run as command
from pico import interrupt, same_folders
from safetensors.torch import load_file, save_file

from compressor.calibrate.corpus import drawn_windows, file_corpus, load_tokenizer
from compressor.compress.apply import Job, apply
from compressor.compress.evaluate import blocks, evaluate
from compressor.compress.events import Event, Measured, Measuring, Warned
from compressor.compress.output.verify import verify
from compressor.compress.plan import make_plan, plan_for_text
from compressor.compress.quality import Quality, measure, most_lost
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.errors import ModelError, RecipeError, VerifyError
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.skeleton import Skeleton

Pico = Callable[..., Path]
DATA = "data: {{source: {}, samples: 8, sequence_length: 64}}\n"


def run(text: str, model: Path, out: Path, **options: bool) -> Quality:
    events: list[Event] = []
    apply(Job(parse_recipe(text), text, (), model, out, "pico"), events.append, **options)
    [quality] = [event.quality for event in events if isinstance(event, Measured)]
    return quality


@pytest.mark.parametrize(
    ("family", "passes"),
    [
        ("llama", "{kind: rtn, bits: 3, group_size: 32}"),
        ("llama", "{kind: rtn, scheme: int8}"),
        ("llama", "{kind: lorc, ratio: 0.25, latent_bits: 4, rank_step: 1}"),
        ("qwen3_moe", "{kind: rtn, bits: 3, group_size: 32}"),
        ("qwen3_moe", "{kind: rtn, scheme: int8}"),
        ("granite", "{kind: rtn, bits: 3, group_size: 32}, {kind: rtn, bits: 4, group_size: 32, targets: lm_head}"),
        ("gemma3_text", "{kind: sparse24, method: magnitude}"),
    ],
)
def test_one_block_at_a_time_finds_what_whole_models_do(
    family: str, passes: str, pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded inputs and latents, routers, scaled logits and a rewritten head included; in several batches of windows,
    the last one smaller, and several pieces of logits, whose borders are not those of windows."""
    monkeypatch.setattr(blocks, "BATCH_TOKENS", 4 * 48)
    monkeypatch.setattr(blocks, "LOGITS", 40 * 128)
    model, out = pico(family, dtype=torch.float32), tmp_path / "out"
    run(f"passes: [{passes}]", model, out)
    windows = torch.randint(0, 128, (6, 48), generator=torch.Generator().manual_seed(1))
    quality = measure(out, Skeleton(Checkpoint(model)), {"a": windows[:4], "b": windows[4:]})
    loaded = [load(folder, dtype=torch.float32) for folder in (out, model)]
    for name, ids in (("a", windows[:4]), ("b", windows[4:])):
        expected, found = evaluate(loaded[0], ids, loaded[1]), quality.texts[name]
        assert expected.against is not None
        assert found.against is not None
        assert expected.against.kl_mean > 1e-5
        assert found.against.kl_mean == pytest.approx(expected.against.kl_mean, rel=2e-3)
        assert found.against.kl_error == pytest.approx(expected.against.kl_error, rel=2e-2)
        assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-3)
        assert found.against.base_perplexity == pytest.approx(expected.against.base_perplexity, rel=1e-5)
    assert len(quality.drift) == 2
    assert all(drift > 0 for drift in quality.drift)


def test_what_was_found_stands_in_report_manifest_and_card(pico: Pico, tmp_path: Path, calibration_text: Path) -> None:
    text = DATA.format(calibration_text) + "passes: [{kind: gptq, bits: 4, group_size: 32}]"
    quality = run(text, pico(), tmp_path / "out")
    assert list(quality.texts) == ["held-out", "calibration"]
    written = json.loads((tmp_path / "out" / "report" / "quality.json").read_text())
    assert Quality.of(written) == quality
    manifest = json.loads((tmp_path / "out" / "compressor.json").read_text())
    assert manifest["quality"] == written["texts"]
    assert f"KL {quality.texts['held-out'].against.kl_mean:.4g}" in (tmp_path / "out" / "README.md").read_text()  # type: ignore[union-attr]
    assert verify(tmp_path / "out") == []


def test_an_interrupted_run_finds_the_same(pico: Pico, tmp_path: Path, calibration_text: Path) -> None:
    text = DATA.format(calibration_text) + "passes: [{kind: gptq, bits: 4, group_size: 32}]"
    quality = run(text, pico(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        apply(Job(parse_recipe(text), text, (), pico(), tmp_path / "out", "pico"), interrupt)
    assert run(text, pico(), tmp_path / "out", resume=True) == quality
    same_folders(tmp_path / "out", tmp_path / "whole")


def test_a_model_without_a_tokenizer_is_not_measured(pico: Pico, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in pico().iterdir():
        if not path.name.startswith("token"):
            (model / path.name).write_bytes(path.read_bytes())
    text, events = "passes: [{kind: rtn, bits: 4, group_size: 32}]", list[Event]()
    apply(Job(parse_recipe(text), text, (), model, tmp_path / "out", "pico"), events.append)
    [quality] = [event.quality for event in events if isinstance(event, Measured)]
    [warned] = [event.text for event in events if isinstance(event, Warned)]
    assert quality.summary() == "not compared with the original: the model has no tokenizer"
    assert warned.endswith("limits are not held against it: the model has no tokenizer")
    assert quality.beyond(parse_recipe(text).limits) == ""
    stated = parse_recipe(text + "\nlimits: {kl: .1, perplexity_ratio: null}").limits
    assert quality.beyond(stated) == "limits.kl cannot be checked: the model has no tokenizer"
    assert verify(tmp_path / "out") == []


def test_beyond_a_limit_the_output_is_written_and_the_answer_is_no(pico: Pico, tmp_path: Path) -> None:
    out = tmp_path / "out"
    passes = "passes: [{kind: rtn, bits: 8, group_size: 32}, {kind: rtn, bits: 2, group_size: 32, targets: '*.1.*'}]"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(passes.replace("bits: 8, group_size: 32", "bits: 8, group_size: 32, ignore: '*.1.*'"))
    words = ["apply", str(recipe), str(pico()), str(out), "--set", "limits.kl=1e-6"]
    done = command(*words, cwd=tmp_path, code=1)
    assert "is above limits.kl 1e-06: most is lost in block 1" in done.stderr
    assert "by rtn, most of all in model.layers.1." in done.stderr
    assert "of the time" in done.stdout
    assert verify(out) == []
    words = [*words[:-1], "limits.kl=null", "--set", "limits.perplexity_ratio=null", "--overwrite", "--json"]
    found = json.loads(command(*words, cwd=tmp_path).stdout)
    assert found["beyond"] == ""
    assert found["quality"]["texts"]["built-in"]["against"]["kl_mean"] > 1e-6


HEAD = "{kind: rtn, bits: 2, group_size: 32, targets: [lm_head]}"
TABLE = "{kind: rtn, bits: 2, group_size: 32, targets: [model.embed_tokens]}"
PRUNED = "{kind: expert_prune, keep: 2}, {kind: rtn, bits: 8, group_size: 32}"


@pytest.mark.parametrize(
    ("family", "passes", "said"),
    [
        ("llama", HEAD, "all is lost behind the blocks, in lm_head"),
        ("llama", TABLE, ", or in model.embed_tokens in front of it"),
        ("qwen3_moe", PRUNED, ": by expert_prune or by what came after"),
    ],
)
def test_who_lost_most_is_said_as_far_as_it_is_known(
    family: str, passes: str, said: str, pico: Pico, tmp_path: Path, calibration_text: Path
) -> None:
    text = DATA.format(calibration_text) + f"passes: [{passes}]"
    events: list[Event] = []
    plan = apply(Job(parse_recipe(text), text, (), pico(family), tmp_path / "out", "pico"), events.append)
    quality = next(event.quality for event in events if isinstance(event, Measured))
    assert most_lost(plan, tmp_path / "out", quality.drift).endswith(said)


def test_an_output_without_a_tensor_of_the_original_is_found_before_it_is_published(
    pico: Pico, tmp_path: Path, calibration_text: Path
) -> None:
    """Also one that no text reaches."""

    def spoil(event: Event) -> None:
        if isinstance(event, Measuring):
            [path] = tmp_path.rglob("model.safetensors")
            tensors = load_file(path)
            save_file({name: t for name, t in tensors.items() if name != min(lost)}, path)

    model = pico("llava")
    lost = [name for name in Checkpoint(model).tensors if "vision_tower" in name]
    text = DATA.format(calibration_text) + "passes: [{kind: rtn, bits: 4, group_size: 32}]"
    with pytest.raises(VerifyError, match="in one of the model and its output only"):
        apply(Job(parse_recipe(text), text, (), model, tmp_path / "out", "pico"), spoil)
    assert not (tmp_path / "out").exists()


def test_held_out_windows_are_other_text_and_change_no_draw(pico: Pico, tmp_path: Path) -> None:
    """From what was read, or from parts that were not."""
    tokenizer = load_tokenizer(pico())
    for lines, samples in ((4000, 3), (9000, 600), (40, 3)):
        path = tmp_path / "text.txt"
        path.write_text("".join(f"{number:06d} abcdefghijklmnopqrstuvwxyz\n" for number in range(lines)))
        alone, none = drawn_windows(file_corpus(path), tokenizer, samples, 64, 0, least=1)
        drawn, others = drawn_windows(file_corpus(path), tokenizer, samples, 64, 0, least=1, held_out=5)
        assert torch.equal(alone, drawn)
        assert len(none) == 0
        assert len(others) == 5
        seen = {tuple(row.tolist()) for row in drawn}
        assert not seen.intersection(tuple(row.tolist()) for row in others)


def test_of_a_text_that_is_too_short_for_both_a_part_is_held_out(pico: Pico, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number:06d} abcdefghijklmnopqrstuvwxyz\n" for number in range(40)))
    tokenizer = load_tokenizer(pico())
    every, none = drawn_windows(file_corpus(path), tokenizer, 1000, 64, 0, least=1)
    assert len(every) >= 8
    assert len(none) == 0
    for held_out in (1, 1000):
        drawn, others = drawn_windows(file_corpus(path), tokenizer, 1000, 64, 0, least=1, held_out=held_out)
        assert len(others) == min(held_out, len(every) // 4)
        assert torch.equal(torch.cat([drawn, others]), every)
    with pytest.raises(RecipeError, match="1000 were asked for"):
        drawn_windows(file_corpus(path), tokenizer, 1000, 64, 0, held_out=5)


def test_wide_models_get_more_text(pico: Pico, tmp_path: Path, calibration_text: Path) -> None:
    text = "data: {{source: {}, sequence_length: 2{}}}\npasses: [{{kind: gptq, bits: 4, group_size: 32}}]"
    skeleton = Skeleton(Checkpoint(pico()))
    plan = make_plan(parse_recipe(text.format(calibration_text, "")), skeleton)
    assert plan.recipe.data.samples == 16 * 96 // 2
    assert not plan.warnings
    plan = make_plan(parse_recipe(text.format(calibration_text, ", samples: 4")), skeleton)
    assert plan.warnings[0].startswith("8 calibration tokens are 0.1 for each of the 96 inputs")
    assert "data.samples=768 would give 16 for each" in plan.warnings[0]
    events: list[Event] = []
    recipe = text.format(calibration_text, ", samples: 4")
    apply(Job(parse_recipe(recipe), recipe, (), pico(), tmp_path / "out", "pico"), events.append)
    assert isinstance(events[0], Warned)


def test_a_short_text_is_planned_told_and_written_down_as_long_as_it_is(pico: Pico, tmp_path: Path) -> None:
    path, out = tmp_path / "short.txt", tmp_path / "out"
    path.write_text("abcdefghijklmnopqrstuvwxyz\n" * 20)
    text = f"data: {{source: {path}, sequence_length: 64}}\npasses: [{{kind: gptq, bits: 4, group_size: 32}}]"
    events: list[Event] = []
    apply(Job(parse_recipe(text), text, (), pico(), out, "pico"), events.append)
    plan, found = plan_for_text(parse_recipe(text), Skeleton(Checkpoint(pico())))
    assert found is not None
    assert (len(found.windows), len(found.held_out)) == (6, 2)
    assert plan.recipe.data.samples == 6
    assert plan.disk < make_plan(parse_recipe(text), plan.skeleton).disk
    warned = [event.text for event in events if isinstance(event, Warned)]
    assert warned == list(plan.warnings)
    assert warned[0].startswith("384 calibration tokens are 4.0 for each of the 96 inputs")
    quality = next(event.quality for event in events if isinstance(event, Measured))
    assert list(quality.texts) == ["held-out", "calibration"]
    again = (out / "recipe.resolved.yaml").read_text()
    run(again, pico(), tmp_path / "again")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_text_that_all_calibrates_is_warned_of(pico: Pico, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz\n" * 20)
    text = (
        f"data: {{source: {path}, sequence_length: 64, samples: 8}}\npasses: [{{kind: gptq, bits: 4, group_size: 32}}]"
    )
    plan, _ = plan_for_text(parse_recipe(text), Skeleton(Checkpoint(pico())))
    assert plan.warnings[-1].startswith("no text is left beside what calibrates")
    assert list(run(text, pico(), tmp_path / "out").texts) == ["calibration"]


def test_token_ids_of_held_out_text_are_looked_at_too(pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.zeros(4, 64, dtype=torch.long), torch.full((2, 64), 10**6)
    monkeypatch.setattr("compressor.compress.surveys.drawn_windows", lambda *_, **__: drawn)
    text = "data: {sequence_length: 64}\npasses: [{kind: gptq, bits: 4, group_size: 32}]"
    with pytest.raises(ModelError, match="ids beyond"):
        plan_for_text(parse_recipe(text), Skeleton(Checkpoint(pico())))


def test_a_text_that_is_not_there_is_missed_before_the_run(pico: Pico, tmp_path: Path) -> None:
    text = f"data: {{source: {tmp_path}/none.txt}}\npasses: [{{kind: rtn, bits: 4, group_size: 32}}]"
    with pytest.raises(RecipeError, match=r"none\.txt"):
        make_plan(parse_recipe(text), Skeleton(Checkpoint(pico())))


def test_a_text_that_may_not_be_read_is_said_before_the_run(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("words")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "mine.txt")
    text = f"data: {{source: {tmp_path}/mine.txt}}\npasses: [{{kind: gptq, group_size: 32}}]"
    with pytest.raises(RecipeError, match=r"mine\.txt: this text file may not be read"):
        make_plan(parse_recipe(text), Skeleton(Checkpoint(pico())))


def test_the_plan_warns_of_ranks_that_weights_alone_decide(pico: Pico) -> None:
    skeleton = Skeleton(Checkpoint(pico()))
    for options, warned in (
        ("ratio: 0.5", True),
        ("ratio: 0.5, latent_bits: 8, allocation: uniform, rank_step: 1", True),
        ("ratio: 1, latent_bits: 8, allocation: uniform", False),
        ("ratio: 1", False),
    ):
        plan = make_plan(parse_recipe(f"passes: [{{kind: lorc, {options}}}]"), skeleton, look=True)
        assert [line.startswith("lorc: ranks are cut by the weights alone") for line in plan.warnings] == [
            True
        ] * warned
