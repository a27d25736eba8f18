"""The work folder: a resumed run goes on from what was left there, or it stops."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import flip
from pico import interrupt, same_folders

from compressor.compress.apply import Job, apply
from compressor.compress.events import Event, Surveyed
from compressor.compress.journal import Journal, differences
from compressor.compress.recipe import parse_recipe
from compressor.runtime.errors import ResourceError
from compressor.runtime.model.checkpoint import Checkpoint

Pico = Callable[..., Path]


class Killed(BaseException):
    """Stands in for a kill: nothing may catch it and tidy up."""


def killed(*_: object, **__: object) -> None:
    raise Killed


def die_behind_rename(patch: pytest.MonkeyPatch) -> None:
    """Let a run die when it has renamed the first folder of those that take the place of others."""
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        real(source, target)
        raise Killed

    patch.setattr("compressor.compress.journal.os.rename", rename)


def quiet(event: Event) -> None:
    pass


@pytest.fixture
def job(pico: Pico, calibration_text: Path, tmp_path: Path) -> Job:
    text = f"data: {{source: '{calibration_text}', samples: 4, sequence_length: 64}}\noutput: {{shard_size: 0.05MB}}\n"
    text += "passes: [{kind: gptq, bits: 4, group_size: 32, search: false, refinements: 0}]\n"
    return Job(parse_recipe(text), text, (), pico(), tmp_path / "out", "pico")


@pytest.fixture
def pruning(pico: Pico, calibration_text: Path, tmp_path: Path) -> Job:
    text = f"data: {{source: '{calibration_text}', samples: 4, sequence_length: 64}}\n"
    text += "passes: [{kind: expert_prune, keep: 3}]\n"
    return Job(parse_recipe(text), text, (), pico("qwen3_moe"), tmp_path / "out", "pico")


def left(job: Job, listener: Callable[[Event], None] = interrupt) -> Path:
    """The work folder of a run that was interrupted."""
    with pytest.raises(KeyboardInterrupt):
        apply(job, listener)
    return job.out.with_name("out.work")


def first_tensor(work: Path) -> Path:
    """A weight file that the first block is in."""
    index = {path.name: path.read_bytes() for path in sorted((work / "out").glob("*.safetensors"))}
    return work / "out" / next(name for name, raw in index.items() if b"layers.0.mlp.down_proj" in raw)


def without_line(path: Path, number: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda work: flip(first_tensor(work), -1), r"out: block 0: damaged"),
        (lambda work: flip(first_tensor(work), 20), r"out: damaged"),
        (lambda work: flip(next((work / "chains").glob("*.compressed.f32")), 99), r"chains: damaged"),
        (
            lambda work: next((work / "chains").glob("*.reference.f32")).unlink(),
            r"activations are not there",
        ),
        (lambda work: shutil.rmtree(work / "out"), r"out: damaged"),
        (lambda work: flip(work / "journal.jsonl", 99), r"journal\.jsonl: damaged"),
        (lambda work: without_line(work / "journal.jsonl", 1), r"journal\.jsonl: damaged"),
        (lambda work: (work / "journal.jsonl").write_text("5\n"), r"journal\.jsonl: damaged"),
    ],
    ids=["tensor", "header", "chain", "no chain", "no output", "journal", "no line", "no object"],
)
def test_a_run_does_not_go_on_from_what_was_damaged(job: Job, damage: Callable[[Path], None], said: str) -> None:
    damage(left(job))
    with pytest.raises(ResourceError, match=said):
        apply(job, quiet, resume=True)
    assert not job.out.exists()


@pytest.mark.parametrize("name", ["out/report/timings.jsonl", "lock", "chains/reached"])
def test_what_is_written_on_is_a_file(job: Job, name: str, tmp_path: Path) -> None:
    """A pipe would be waited at, and a link would lead the lines to somewhere else."""
    path = left(job) / name
    path.touch()
    (tmp_path / "theirs").write_text("theirs")
    links = (lambda path: path.symlink_to(tmp_path / "elsewhere"), lambda path: path.symlink_to(tmp_path / "theirs"))
    for replace in (os.mkfifo, *links, *([Path.mkdir] if "reached" not in name else [])):
        path.unlink() if not path.is_dir() else path.rmdir()
        replace(path)
        with pytest.raises(ResourceError, match=r"damaged, or changed|is in the way"):
            apply(job, quiet, resume=True)
    assert not (tmp_path / "elsewhere").exists()
    assert (tmp_path / "theirs").read_text() == "theirs"


@pytest.mark.parametrize("damage", [lambda made: flip(made, -1), Path.unlink, lambda made: shutil.rmtree(made.parent)])
def test_weights_that_a_survey_made_are_not_done_without(pruning: Job, damage: Callable[[Path], None]) -> None:
    [made, *_] = sorted(left(pruning).glob("chains/survey-0/refitted/*.safetensors"))
    damage(made)
    with pytest.raises(ResourceError, match=r"refitted/block-00000\.safetensors: damaged"):
        apply(pruning, quiet, resume=True)


def after(blocks: int) -> Callable[[Event], None]:
    """Interrupts a run when surveys have passed so many blocks."""
    seen: list[Event] = []

    def stop(event: Event) -> None:
        seen.append(event)
        if [type(one) for one in seen].count(Surveyed) == blocks:
            raise KeyboardInterrupt

    return stop


def test_a_survey_does_not_go_on_without_what_it_made(pruning: Job) -> None:
    apply(pruning, quiet)
    expected = pruning.out.rename(pruning.out.with_name("expected"))
    blocks = Checkpoint(pruning.model).block_names()
    work = left(pruning, after(len(blocks) + 2))  # the second walk has passed its second block
    shutil.rmtree(work / "chains" / "survey-0" / "refitted")
    with pytest.raises(ResourceError, match=r"refitted: what was made of block 0 is gone; the same command"):
        apply(pruning, quiet, resume=True)
    apply(pruning, quiet, resume=True)
    same_folders(pruning.out, expected)


def test_a_survey_does_not_go_on_from_damaged_activations(pruning: Job) -> None:
    apply(pruning, quiet)
    expected = pruning.out.rename(pruning.out.with_name("expected"))
    work = left(pruning, after(4))  # two blocks of two walks
    flip(next((work / "chains").rglob("*.changed.f32")), 99)
    apply(pruning, quiet, resume=True)
    same_folders(pruning.out, expected)


def test_statistics_are_not_taken_from_a_damaged_file(job: Job, tmp_path: Path) -> None:
    text = job.recipe_text.replace("gptq,", "gptq, sequential: false, correction: 0,")
    job, kept = Job(parse_recipe(text), text, (), job.model, job.out, "pico"), tmp_path / "kept"
    apply(job, quiet, statistics=kept)
    shutil.rmtree(job.out)
    flip(kept / "block-00001.safetensors", -1)
    with pytest.raises(ResourceError, match=r"block-00001\.safetensors: not readable \(it is not as it was written\)"):
        apply(job, quiet, statistics=kept)


def test_a_finished_run_is_not_resumed_to_nothing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        die_behind_rename(patch)
        with pytest.raises(Killed):
            apply(job, quiet)
    away = job.out.rename(job.out.with_name("away"))
    with pytest.raises(ResourceError, match="the finished output is neither in it nor at"):
        apply(job, quiet, resume=True)
    away.rename(job.out)
    apply(job, quiet, resume=True)
    assert [path.name for path in job.out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("damage", [lambda out: flip(out / "config.json", 9), lambda out: flip(first_of(out), -1)])
def test_a_finished_output_is_not_published_once_it_is_damaged(
    job: Job, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "publish", killed)
        with pytest.raises(Killed):
            apply(job, quiet)
    damage(job.out.with_name("out.work") / "out")
    with pytest.raises(ResourceError, match=r"out: damaged"):
        apply(job, quiet, resume=True)
    shutil.rmtree(job.out.with_name("out.work") / "out")
    with pytest.raises(ResourceError, match="the finished output is neither in it nor at"):
        apply(job, quiet, resume=True)


def first_of(out: Path) -> Path:
    return sorted(out.glob("*.safetensors"))[0]


@pytest.mark.parametrize("whole", [False, True])
def test_a_run_that_died_while_it_tidied_up_is_resumed(
    whole: bool, pruning: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a survey made may be gone in part, or all of it, behind an output that is where it should be."""
    real = shutil.rmtree

    def remove(path: Path, **options: bool) -> None:
        if path.name != "chains" or not path.exists():
            return real(path, **options)
        real(path) if whole else next(path.glob("*/refitted/*")).unlink()
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("compressor.compress.journal.shutil.rmtree", remove)
        with pytest.raises(Killed):
            apply(pruning, quiet)
    assert (pruning.out / "compressor.json").is_file()
    apply(pruning, quiet, resume=True)
    assert not Journal(pruning.out).folder.exists()


def test_nobody_is_told_to_delete_the_output_that_was_being_replaced(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.out.mkdir()
    (job.out / "config.json").write_text(json.dumps("old"))
    with monkeypatch.context() as patch:
        die_behind_rename(patch)
        with pytest.raises(Killed):
            apply(job, quiet, overwrite=True)
    with pytest.raises(ResourceError, match=r"add --resume, or to start over, move .*out\.work/replaced, which was at"):
        apply(job, quiet)
    text = job.recipe_text.replace("bits: 4", "bits: 3")
    other = Job(parse_recipe(text), text, (), job.model, job.out, "pico")
    with pytest.raises(ResourceError, match=r"undo that, or to start over, move .*out\.work/replaced"):
        apply(other, quiet, resume=True)
    assert json.loads((job.out.with_name("out.work") / "replaced" / "config.json").read_text()) == "old"


def test_what_differs_is_shown_where_it_does() -> None:
    steps = [{"kind": "rtn", "bits": 4}, {"kind": "eora", "rank": 8}]
    before = {"recipe": {"passes": steps}, "hash": "a" * 64, "targets": ["*.layers.*"] * 9 + ["x"]}
    now = {"recipe": {"passes": [steps[0], {**steps[1], "rank": 9}]}, "hash": "b" * 64, "targets": ["*.layers.*"] * 10}
    assert differences(before, now) == [
        "hash: aaaaaaaaaaaa… → bbbbbbbbbbbb…",
        "recipe.passes.1.rank: 8 → 9",
        'targets: …x"]… → …*.layers.*"]…',
    ]
    assert differences({"passes": steps}, {"passes": steps[:1]}) == ['passes.1: {"kind": "eora", "rank": 8} → null']
