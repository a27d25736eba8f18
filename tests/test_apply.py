"""The whole job: interrupted, resumed, refused, in the way, on a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from compressor.cli.apply import apply as apply_command
from compressor.cli.session import session
from compressor.compress import journal as journal_module
from compressor.compress.apply import Job, apply
from compressor.compress.output.verify import export_dense
from compressor.compress.output.writer import ShardedWriter
from compressor.compress.recipe import parse_recipe
from compressor.kernels import layouts
from compressor.runtime.errors import CompressorError, ModelError, ResourceError, VerifyError
from compressor.runtime.schemes import IntQuantized
from compressor.runtime.stored import StoredModel

Pico = Callable[..., Path]


@pytest.fixture
def job(pico: Pico, calibration_text: Path, tmp_path: Path) -> Job:
    data = f"data: {{source: '{calibration_text}', samples: 8, sequence_length: 64}}\n"
    text = data + "output: {shard_size: 0.05MB}\npasses:\n  - {kind: gptq, bits: 4, group_size: 32}\n"
    model = pico("llama", num_hidden_layers=4)
    return Job(parse_recipe(text), text, (), model, tmp_path / "out", "pico")


def quiet(event: object) -> None:
    pass


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output that must be the same between equal runs."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("timings.jsonl", "report.html"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Killed(BaseException):
    """Stands in for a kill: nothing may catch it and tidy up."""


def kill_at(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die at the `count`-th sync to disk, whatever is being synced."""
    calls = iter(range(count))
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls, None) is None:
            raise Killed
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_killed_at_any_sync_a_run_resumes_to_the_same_bytes(
    pico: Pico, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"data: {{source: '{calibration_text}', samples: 4, sequence_length: 64}}\noutput: {{shard_size: 0.05MB}}\n"
    text += "passes: [{kind: gptq, bits: 4, group_size: 32, search: false, refinements: 0, objective: model}]\n"
    job = Job(parse_recipe(text), text, (), pico("llama", num_hidden_layers=2), tmp_path / "out", "pico")
    apply(job, quiet)
    expected = contents(job.out)
    shutil.rmtree(job.out)
    count = rounds = 0
    while True:
        with monkeypatch.context() as patch:
            kill_at(count, patch)
            try:
                apply(job, quiet, resume=count % 2 == 1)
            except Killed:
                rounds += 1
            else:
                break
        assert not job.out.exists() or contents(job.out) == expected
        apply(job, quiet, resume=True)
        assert contents(job.out) == expected, f"after dying at sync {count}"
        assert not job.out.with_name("out.work").exists()
        shutil.rmtree(job.out)
        count += 1
    assert rounds > 40


def test_a_kill_while_overwriting_never_loses_both(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    apply(job, quiet)
    expected = contents(job.out)
    real = os.rename
    for deadly in (1, 2):
        for path in job.out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (job.out / "config.json").write_text("{}")
        (job.out / "old").write_text("old")
        calls = iter(range(deadly - 1))

        def rename(a: Path, b: Path, calls=calls) -> None:  # type: ignore[no-untyped-def]
            if next(calls, None) is None:
                raise Killed
            real(a, b)

        with monkeypatch.context() as patch:
            patch.setattr(journal_module.os, "rename", rename)
            with pytest.raises(Killed):
                apply(job, quiet, overwrite=True)
        old = job.out / "old", job.out.with_name("out.work") / "replaced" / "old"
        assert any(path.exists() for path in old)
        apply(job, quiet, resume=True, overwrite=True)
        assert contents(job.out) == expected


def test_interrupted_work_is_not_thrown_away_unasked(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(12, patch)
        with pytest.raises(Killed):
            apply(job, quiet)
    with pytest.raises(ResourceError, match="an interrupted run is there; add --resume"):
        apply(job, quiet)


def test_resume_names_what_changed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(12, patch)
        with pytest.raises(Killed):
            apply(job, quiet)
    text = job.recipe_text.replace("bits: 4", "bits: 3")
    other = Job(parse_recipe(text), text, (), job.model, job.out, "pico")
    with pytest.raises(ResourceError, match=r"cannot resume, since this run differs in recipe\.passes"):
        apply(other, quiet, resume=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(ResourceError, match=r"threads: \d+ → 77"):
        apply(job, quiet, resume=True)


def test_a_second_run_keeps_out(job: Job) -> None:
    journal = journal_module.Journal(job.out)
    journal.open({}, resume=False)
    with pytest.raises(ResourceError, match="another run is working there"):
        apply(job, quiet, resume=True)
    journal.close()


def test_outputs_in_the_way(job: Job, tmp_path: Path) -> None:
    job.out.mkdir()
    apply(job, quiet)  # an empty folder is fine
    with pytest.raises(ResourceError, match="not empty; choose another output folder or add --overwrite"):
        apply(job, quiet)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ResourceError, match="a file of that name exists"):
        apply(Job(job.recipe, job.recipe_text, (), job.model, file, "pico"), quiet)


def test_a_full_disk_is_said_and_resumable(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ShardedWriter.write
    calls = iter(range(2))

    def write(self: ShardedWriter, tensors: dict[str, torch.Tensor]) -> None:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(ShardedWriter, "write", write)
        with pytest.raises(
            ResourceError, match="the disk is full; free some space and run the same command with --resume"
        ):
            apply(job, quiet)
    assert not job.out.exists()
    apply(job, quiet, resume=True)
    assert StoredModel(job.out).schemes


def test_too_little_disk_is_refused_before_work(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(job.out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=r"1\.00 kB free, .* [kM]B needed"):
        apply(job, quiet)
    assert not job.out.with_name("out.work").exists()


def test_weights_that_are_not_finite_stop_the_run_before_work(job: Job, tmp_path: Path) -> None:
    model = Path(shutil.copytree(job.model, tmp_path / "bad"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.weight holds NaN or infinite weights"):
        apply(Job(job.recipe, job.recipe_text, (), model, job.out, "bad"), quiet)
    assert not job.out.exists()


def test_a_linear_is_packed_once_and_not_decoded_to_be_stored(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str] = Counter()
    for name in ("to_tensors", "dense"):
        real = getattr(IntQuantized, name)

        def counted(self: IntQuantized, *args: object, name: str = name, real: Callable[..., Any] = real) -> Any:
            counts[name] += not self.codes.is_meta
            return real(self, *args)

        monkeypatch.setattr(IntQuantized, name, counted)
    text = "passes: [{kind: rtn, bits: 4, group_size: 32}]"
    apply(Job(parse_recipe(text), text, (), pico(), tmp_path / "out", "pico"), quiet)
    assert counts == {"to_tensors": 14, "dense": 14}  # decoded when the output is run at the end


@pytest.mark.parametrize("passes", ["{kind: rtn, bits: 4, group_size: 32}", "{kind: sparse24, method: magnitude}"])
def test_what_decodes_to_something_else_is_found(
    passes: str, pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = (layouts.pack_codes, layouts.pack_indices)
    monkeypatch.setattr(layouts, "pack_codes", lambda codes, bits: real[0](codes.flip(0), bits))
    monkeypatch.setattr(layouts, "pack_indices", lambda indices: real[1](indices.flip(0)))
    text = f"passes: [{passes}]"
    with pytest.raises(VerifyError, match=r"_proj: decodes to other weights than were meant"):
        apply(Job(parse_recipe(text), text, (), pico(), tmp_path / "out", "pico"), quiet)


def test_the_report_tells_every_linear(job: Job) -> None:
    apply(job, quiet)
    events = [json.loads(line) for line in (job.out / "report" / "layers.jsonl").read_text().splitlines()]
    layers = [event for event in events if event["kind"] == "LayerDone"]
    assert len(layers) == 4 * 7
    assert all(0 < event["error"] < 0.05 and 4.5 < event["bits"] < 4.6 and event["tokens"] == 512 for event in layers)
    assert sum(event["kind"] == "BlockDone" for event in events) == 4
    assert len((job.out / "report" / "timings.jsonl").read_text().splitlines()) == 4 + 1  # and the comparison
    assert (job.out / "recipe.yaml").read_text() == job.recipe_text


def test_an_expert_without_tokens_leans_on_others_and_says_so(
    pico: Pico, calibration_text: Path, tmp_path: Path
) -> None:
    data = f"data: {{source: '{calibration_text}', samples: 1, sequence_length: 3}}\n"
    text = data + "passes:\n  - {kind: gptq, bits: 4, group_size: 32}\n"
    apply(Job(parse_recipe(text), text, (), pico("qwen3_moe", num_experts=16), tmp_path / "out", "pico"), quiet)
    events = [json.loads(line) for line in (tmp_path / "out" / "report" / "layers.jsonl").read_text().splitlines()]
    starved = {event["name"]: event["tokens"] for event in events if event["kind"] == "Starved"}
    done = {event["name"]: event["tokens"] for event in events if event["kind"] == "LayerDone"}
    assert min(starved.values()) == 0
    assert starved == {name: tokens for name, tokens in done.items() if ".experts." in name}, "all of three tokens"
    assert "saw few calibration tokens" in (tmp_path / "out" / "README.md").read_text()


SLOW = """
import sys, time
from compressor.cli import main, render
draw = render.ApplyProgress.__call__
render.ApplyProgress.__call__ = lambda self, event: (draw(self, event), time.sleep(0.05))
main.main()
"""


def test_a_signal_that_was_lost_in_a_destructor_still_stops_the_run(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(job.recipe_text)
    monkeypatch.setattr(session, "interrupted", True)
    with pytest.raises(typer.Exit) as end:
        apply_command(str(recipe), str(job.model), job.out)
    assert end.value.exit_code == 130
    assert "go on with: compressor apply" in capsys.readouterr().err
    apply(job, lambda event: None, resume=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_a_resumable_run(job: Job, pico: Pico, tmp_path: Path, number: signal.Signals) -> None:
    job = replace(job, model=pico("llama", num_hidden_layers=16))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(job.recipe_text)
    words = ["apply", str(recipe), str(job.model), str(job.out)]
    slow = [sys.executable, "-c", SLOW, *words]  # for the signal to come in time
    process = subprocess.Popen(slow, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stderr is not None
    while not (line := process.stderr.readline()).startswith("block"):
        assert line, "the run ended before its first block"
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing is lost, go on with: compressor apply" in message
    assert not job.out.exists()
    resumed = [sys.executable, "-m", "compressor.cli", *words, "--resume"]
    subprocess.run(resumed, check=True, capture_output=True, cwd=tmp_path)
    assert StoredModel(job.out).schemes


def test_errors_are_of_the_family(job: Job, tmp_path: Path) -> None:
    with pytest.raises(CompressorError, match="no such model folder"):
        apply(Job(job.recipe, job.recipe_text, (), tmp_path / "nowhere", job.out, "x"), quiet)


def test_statistics_are_kept_and_used_again(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "statistics"

    def variant(passes: str, out: str) -> Job:
        text = job.recipe_text.partition("passes:")[0] + f"passes:\n  - {{{passes}}}\n"
        return Job(parse_recipe(text), text, (), job.model, tmp_path / out, "pico")

    apply(variant("kind: rtn, group_size: 32, search: true", "a"), quiet, statistics=folder)
    blocks = sorted(path.name for path in folder.iterdir())
    assert blocks == [*(f"block-{i:05d}.safetensors" for i in range(4)), "statistics.json"]
    apply(variant("kind: gptq, group_size: 32, sequential: false", "fresh"), quiet)
    with monkeypatch.context() as patch:
        patch.setattr("compressor.compress.apply.start_chains", lambda *_: pytest.fail("calibrated again"))
        apply(variant("kind: gptq, group_size: 32, sequential: false", "kept"), quiet, statistics=folder)
    weights = [path.name for path in (tmp_path / "fresh").glob("*.safetensors")]
    assert all((tmp_path / "fresh" / n).read_bytes() == (tmp_path / "kept" / n).read_bytes() for n in weights)
    text = variant("kind: rtn, search: true", "b").recipe_text.replace("samples: 8", "samples: 4")
    other = Job(parse_recipe(text), text, (), job.model, tmp_path / "b", "pico")
    with pytest.raises(CompressorError, match="these statistics are of another windows"):
        apply(other, quiet, statistics=folder)
    with pytest.raises(CompressorError, match="which this recipe does not use"):
        apply(job, quiet, statistics=folder)


def test_what_is_read_is_never_replaced(job: Job, tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    (zoo / "config.json").write_text("{}")
    shutil.copytree(job.model, zoo / "model")
    for model, out in ((zoo / "model", zoo / "model"), (zoo / "model", zoo)):
        with pytest.raises(ResourceError, match="which is read; choose another output folder"):
            apply(replace(job, model=model, out=out), quiet, overwrite=True)
        with pytest.raises(ResourceError, match="which is read"):
            export_dense(model, out, overwrite=True)
    recipe = zoo / "recipe.yaml"
    recipe.write_text(job.recipe_text)
    with pytest.raises(ResourceError, match=r"holds .*recipe\.yaml, which is read"):
        apply(replace(job, recipe_file=recipe, out=zoo), quiet, overwrite=True)
    assert (zoo / "model" / "model.safetensors").is_file()


def test_only_a_model_folder_is_overwritten(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "mine.txt").write_text("mine")
    with pytest.raises(ResourceError, match="is not a model folder"):
        apply(replace(job, out=letters), quiet, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ResourceError, match="is a symbolic link"):
        apply(replace(job, out=link), quiet)
    monkeypatch.chdir(letters)
    for here in (Path("."), letters, Path("/")):
        with pytest.raises(ResourceError, match="cannot be replaced by a finished folder"):
            apply(replace(job, out=here), quiet, overwrite=True)
    assert (letters / "mine.txt").read_text() == "mine"


def test_a_folder_that_only_looks_like_a_work_folder_is_left_alone(job: Job) -> None:
    other = job.out.with_name("out.work")
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(ResourceError, match="is in the way and not of a run"):
        apply(job, quiet)
    assert (other / "thesis.txt").read_text() == "mine"


def test_export_leaves_work_folders_alone(job: Job, tmp_path: Path) -> None:
    apply(job, quiet)
    work = tmp_path / "plain.work"
    work.mkdir()
    (work / "journal.jsonl").write_text("{}\n")
    export_dense(job.out, tmp_path / "plain")
    assert (work / "journal.jsonl").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain", "plain.work"]


def test_a_damaged_journal_is_said(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(12, patch)
        with pytest.raises(Killed):
            apply(job, quiet)
    path = job.out.with_name("out.work") / "journal.jsonl"
    path.write_bytes(b"\0" * 40 + b"\n" + path.read_bytes())
    with pytest.raises(ResourceError, match=r"journal\.jsonl: damaged"):
        apply(job, quiet, resume=True)


def test_a_run_with_statistics_is_resumed_with_them(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = job.recipe_text.replace("gptq,", "gptq, sequential: false, correction: 0,")
    job, kept = replace(job, recipe=parse_recipe(text), recipe_text=text), tmp_path / "kept"
    apply(job, quiet, statistics=kept)
    expected = contents(job.out)
    shutil.rmtree(job.out)
    with monkeypatch.context() as patch:
        kill_at(14, patch)
        with pytest.raises(Killed):
            apply(job, quiet, statistics=kept)
    with pytest.raises(ResourceError, match="this run differs in statistics"):
        apply(job, quiet, resume=True)
    kept.rename(tmp_path / "away")
    with pytest.raises(ResourceError, match="put that folder back"):
        apply(job, quiet, resume=True, statistics=kept)
    (tmp_path / "away").rename(kept)
    apply(job, quiet, resume=True, statistics=kept)
    assert contents(job.out) == expected


def test_too_little_memory_is_refused_before_work(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.compress.resources.available_memory", lambda device: 1000)
    with pytest.raises(ResourceError, match=r"of memory are needed and 1\.00 kB are available"):
        apply(job, quiet)
    assert not job.out.with_name("out.work").exists()


def test_layers_beyond_the_last_block_are_carried_along(pico: Pico, tmp_path: Path) -> None:
    """DeepSeek-V3 stores a layer for predicting a second token as `model.layers.<last + 1>`."""
    model = tmp_path / "model"
    shutil.copytree(pico("deepseek_v3"), model)
    tensors = load_file(model / "model.safetensors")
    extra = {f"model.layers.2.{name}": torch.randn(8, 64) for name in ("eh_proj.weight", "embed_tokens.weight")}
    save_file(tensors | extra, model / "model.safetensors", {"format": "pt"})
    text = "passes: [{kind: rtn, bits: 4, group_size: 32}]"
    apply(Job(parse_recipe(text), text, (), model, tmp_path / "out", "pico"), quiet)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], extra[name]) for name in extra)
