"""Several processes at work on one model."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from command import run, run_together, started_together
from pico import same_folders

from compressor.calibrate.chains import Chains
from compressor.calibrate.curvature import reverse_walk
from compressor.calibrate.drive import start_chains
from compressor.calibrate.routing import Routing
from compressor.calibrate.statistics import KINDS, Statistics
from compressor.calibrate.tuning import Tuning
from compressor.compress.evaluate.blocks import evaluate_blocks
from compressor.compress.guards import source_skeleton
from compressor.runtime import processes
from compressor.runtime.memory import available_memory
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.skeleton import Skeleton
from compressor.runtime.stored import open_model

Pico = Callable[..., Path]
GPTQ = "{kind: gptq, group_size: 32, objective: model}"
QUICK = "{kind: gptq, group_size: 32, search: false, refinements: 0, beam: 1}"
MIXTURE = "{kind: expert_prune, ratio: .25}, {kind: lorc, ratio: .5, rank_step: 4, calibrated: true}, "
MIXTURE += QUICK.replace("}", ", objective: model}")


def together(count: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """What a function returns in each of some processes."""
    files = [folder / f"found-{number}" for number in range(count)]
    for process in started_together(count, _found, [(file, function, arguments) for file in files]):
        process.join()
        assert process.exitcode == 0
    return [pickle.loads(file.read_bytes()) for file in files]


def _found(file: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with processes.joined():
        file.write_bytes(pickle.dumps(function(*arguments)))


def written(tmp_path: Path, text: Path, passes: str, samples: int = 32, more: str = "") -> Path:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"version: 1\ndata: {{source: '{text}', samples: {samples}, sequence_length: 256}}\nlimits: {{kl: null, "
        f"perplexity_ratio: null}}\noutput: {{shard_size: 0.05MB}}\npasses: [{passes}]\n{more}\n"
    )
    return recipe


def _shared_things() -> dict[str, Any]:
    number, count = processes.rank(), processes.size()
    part = torch.arange(6, dtype=torch.bfloat16)[number::2]  # a view of more than it shows
    jobs = [lambda n=n: (n, processes.size(), number) for n in range(5)]
    return {
        "own": processes.own(7),
        "gathered": processes.gathered({"a": part, "b": torch.tensor(number > 0), "c": torch.empty(0, 3)}),
        "shared": processes.shared("from the first" if number == 0 else None),
        "once": processes.once(lambda: (number, processes.size())),
        "summed": processes.summed(torch.tensor([1.0, number])),
        "largest": processes.largest(torch.tensor([-1.0, number])),
        "spread": processes.spread(jobs, [1, 1, 5, 1, 1]),
        "leads": processes.leads(),
        "memory": available_memory() / processes.once(available_memory),
        "size": count,
    }


def test_what_processes_share(tmp_path: Path) -> None:
    first, second, third = together(3, _shared_things, folder=tmp_path)
    assert [found["own"] for found in (first, second, third)] == [range(0, 2), range(2, 4), range(4, 7)]
    for found in (first, second, third):
        assert found["size"] == 3
        assert 0.2 < found["memory"] < 0.5  # a third, of what others change
        assert [part["a"].tolist() for part in found["gathered"]] == [[0, 2, 4], [1, 3, 5], [2, 4]]
        assert [bool(part["b"]) for part in found["gathered"]] == [False, True, True]
        assert found["gathered"][1]["a"].dtype == torch.bfloat16
        assert found["gathered"][1]["c"].shape == (0, 3)
        assert found["shared"] == "from the first"
        assert found["once"] == (0, 1)
        assert found["summed"].tolist() == [3, 3]
        assert found["largest"].tolist() == [-1, 2]
        assert [n for n, _, _ in found["spread"]] == [0, 1, 2, 3, 4]
        assert {size for _, size, _ in found["spread"]} == {1}
        owners = [owner for _, _, owner in found["spread"]]
        assert owners.count(owners[2]) == 1  # the long job is all that one has to do
        assert owners.count(owners[0]) == 2
    assert [found["leads"] for found in (first, second, third)] == [True, False, False]


def test_jobs_are_dealt_to_whoever_has_least_to_do() -> None:
    assert processes.dealt([1, 1, 5, 1, 1], 3) == [1, 2, 0, 1, 2]
    assert processes.dealt([3, 3, 2, 2, 2], 2) == [0, 1, 0, 1, 0]
    assert processes.dealt([1], 4) == [0]


def test_one_process_shares_with_nobody() -> None:
    assert processes.gathered(3) == [3]
    assert processes.spread([lambda: 1, lambda: 2], [1, 1]) == [1, 2]
    assert processes.own(5) == range(5)
    assert (processes.once(lambda: processes.size()), processes.shared("x"), processes.beside()) == (1, "x", 1)


def _routed(outputs: torch.Tensor) -> Routing:
    found, rows = Routing.empty(2), processes.own(len(outputs))
    found.add(rows.start % 2, torch.ones(len(rows)), outputs[rows.start : rows.stop])
    found.across()
    return found


def test_what_experts_do_is_added_up(tmp_path: Path) -> None:
    outputs = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    first, second = together(2, _routed, outputs, folder=tmp_path)
    whole = Routing.empty(2)
    whole.add(0, torch.ones(3), outputs[:3])
    whole.add(1, torch.ones(3), outputs[3:])
    for found in (first, second):
        assert all(torch.equal(getattr(found, name), sums) for name, sums in vars(whole).items())


def _of_part(x: torch.Tensor, moved: torch.Tensor) -> Statistics:
    found = Statistics.empty(x.shape[1], KINDS)
    rows = processes.own(len(x))
    found.add(x[rows.start : rows.stop], None, moved[rows.start : rows.stop])
    found.across()
    return found


def test_statistics_of_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    x = torch.randn(96, 16, generator=torch.Generator().manual_seed(0))
    moved = x + 0.1
    first, second, third = together(3, _of_part, x, moved, folder=tmp_path)
    whole = Statistics.empty(16, KINDS)
    whole.add(x, None, moved)
    assert first.tokens == whole.tokens == 96
    for name in ("moment", "cross", "peak"):
        torch.testing.assert_close(first.sums[name], whole.sums[name], rtol=1e-5, atol=1e-4)
    held = torch.cat([part[-8:] for part in x.split(32)])  # the last quarter of each batch
    torch.testing.assert_close(first.sums["held_moment"], held.T @ held, rtol=1e-5, atol=1e-4)
    rows = first.sums["sample"]
    rows = rows[rows.any(1)]
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, x.tolist()))
    for other in (second, third):
        assert all(torch.equal(other.sums[name], first.sums[name]) for name in KINDS)


def _carried(folder: Path, model: Path, windows: torch.Tensor) -> tuple[dict[str, str], int, torch.Tensor]:
    skeleton = source_skeleton(model, "cpu")
    chains = start_chains(skeleton, windows, folder, ("reference",))
    chains.advanced(0)
    seen = sum(rows.stop - rows.start for rows in chains.batches())
    scratch = chains.scratch(4, torch.float32)
    for rows in chains.batches():
        scratch[rows] = torch.full((rows.stop - rows.start, windows.shape[1], 4), float(rows.start))
        assert float(scratch[rows].mean()) == rows.start
    assert chains.reached == 0
    processes.wait()
    own = chains.read(0, "reference")[slice(chains.own.start, chains.own.stop)].clone()
    return chains.checksums(0), seen, torch.cat(processes.gathered(own))


def test_each_process_carries_its_own_samples(pico: Pico, tmp_path: Path) -> None:
    windows = torch.randint(0, 64, (7, 16), generator=torch.Generator().manual_seed(0))
    found = together(3, _carried, tmp_path / "three", pico(), windows, folder=tmp_path)
    _, _, alone = _carried(tmp_path / "one", pico(), windows)
    assert [seen for _, seen, _ in found] == [2, 2, 3]
    for sums, _, chain in found:
        assert torch.equal(chain, alone)
        assert sums == found[0][0]
    # What another number of processes left, or what was damaged, is begun anew.
    assert Chains(tmp_path / "three", ("reference",), alone.shape).reached == -1


def _curvatures(folder: Path, model: Path, windows: torch.Tensor) -> dict[str, tuple[float, torch.Tensor | None]]:
    skeleton, found = source_skeleton(model, "cpu"), {}

    def take(back: Any) -> None:
        found.update({name: (own.trace, own.metric) for name, own in back.found().items()})
        found.update({f"lost {back.index} {number}": (lost, None) for number, lost in back.lost.items()})
        found.update({f"met {back.index} {name}": (1.0, own[1].moment) for name, own in back.met.items()})

    wanted = [name for index in range(skeleton.blocks) for name in skeleton.linears(index)]
    reverse_walk(skeleton, windows, folder, take, lambda step: None, metrics=True, inputs=wanted)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_gradients_of_parts_are_those_of_the_whole(family: str, pico: Pico, tmp_path: Path) -> None:
    model = pico(family, num_hidden_layers=2)
    windows = torch.randint(0, 64, (4, 1024), generator=torch.Generator().manual_seed(0))  # a batch each
    first, second = together(2, _curvatures, tmp_path / "two", model, windows, folder=tmp_path)
    whole = _curvatures(tmp_path / "one", model, windows)
    assert first.keys() == second.keys() == whole.keys()
    for name, (trace, metric) in whole.items():
        assert first[name][0] == second[name][0] == pytest.approx(trace, rel=1e-4)
        if metric is not None:
            torch.testing.assert_close(first[name][1], metric, rtol=1e-3, atol=1e-4 * float(metric.abs().max()))
            assert torch.equal(first[name][1], second[name][1])
    assert not (tmp_path / "two").exists()


def _means(model: Path, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of gradients, after a step on all processes' windows together."""
    skeleton = Skeleton(Checkpoint(model))
    exact = torch.randn(*windows.shape, skeleton.width, generator=torch.Generator().manual_seed(0))
    tuning, own = Tuning(skeleton, skeleton), list(processes.own(len(windows)))
    tuning.descend(windows[own], exact[own], 0.001, 2)
    return tuning.means


def test_a_step_is_made_on_all_windows(pico: Pico, tmp_path: Path) -> None:
    windows = torch.arange(128).view(4, 32)
    alone = _means(pico(), windows)
    for found in together(2, _means, pico(), windows, folder=tmp_path):
        assert found.keys() == alone.keys()
        for name, mean in alone.items():
            torch.testing.assert_close(found[name], mean, rtol=1e-4, atol=1e-5 * float(mean.abs().max()))


def _lost(model: Path, output: Path, texts: dict[str, torch.Tensor]) -> tuple[dict[str, Any], list[float]]:
    original, made = source_skeleton(model, "cpu"), source_skeleton(output, "cpu")
    found, drift = evaluate_blocks(original, made, texts)
    return {name: one.record() for name, one in found.items()}, drift


@pytest.mark.parametrize("counts", [(5, 3), (1, 1)])  # of windows: for three processes, enough and too few
def test_an_output_is_read_in_parts(counts: tuple[int, int], pico: Pico, tmp_path: Path) -> None:
    model, output = pico(num_hidden_layers=2), pico(num_hidden_layers=2, initializer_range=0.021)
    windows = torch.randint(0, 64, (sum(counts), 32), generator=torch.Generator().manual_seed(0))
    texts = dict(zip(("held-out", "calibration"), windows.split(counts), strict=True))
    whole, drift = _lost(model, output, texts)
    for found, off in together(3, _lost, model, output, texts, folder=tmp_path):
        assert off == pytest.approx(drift)
        for name, one in whole.items():
            assert found[name]["tokens"] == one["tokens"]
            assert found[name]["perplexity"] == pytest.approx(one["perplexity"])
            assert found[name]["against"] == pytest.approx(one["against"], nan_ok=True)


def applied(count: int, *words: object, cwd: Path, before: Callable[[int], object] | None = None) -> list[Any]:
    return run_together(count, "apply", *words, cwd=cwd, before=before)


@pytest.mark.parametrize(("family", "passes"), [("llama", GPTQ), ("qwen3_moe", MIXTURE)])
def test_processes_together_do_what_one_does(
    family: str, passes: str, pico: Pico, calibration_text: Path, tmp_path: Path
) -> None:
    # With 24 windows no number is so near the middle of two codes that the order of sums decides, for it and others.
    recipe, model = written(tmp_path, calibration_text, passes, 24), pico(family, num_hidden_layers=2)
    first, *others = applied(2, recipe, model, "out", cwd=tmp_path)
    assert first[0] == 0, first[1].stderr
    assert [(code, done.stdout + done.stderr) for code, done in others] == [(0, "")]
    assert "next: compressor eval" in first[1].stdout
    run("apply", recipe, model, "one", cwd=tmp_path)
    ours, theirs = (open_model(tmp_path / folder) for folder in ("out", "one"))
    assert ours.tensors.keys() == theirs.tensors.keys()
    same = {name: float((ours.tensor(name) == theirs.tensor(name)).double().mean()) for name in theirs.tensors}
    assert sum(same.values()) / len(same) > 0.9  # rounding may turn a code, and others with it
    assert all(same[f"model.layers.0.self_attn.{name}_proj.weight"] > 0.99 for name in "qkv")


def killed_at(number: int, count: int, this: int) -> None:
    """Let one process be killed at so many syncs or sums."""
    if number != this:
        return
    calls = iter(range(count))

    def deadly(real: Callable[..., Any], *arguments: Any) -> Any:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    os.fsync = partial(deadly, os.fsync)
    torch.distributed.all_reduce = partial(deadly, torch.distributed.all_reduce)


@pytest.mark.parametrize(
    ("number", "count", "more"), [(0, 12, ""), (1, 25, ""), (1, 9, "tune: {samples: 40, batch: 4}")]
)
def test_when_one_is_killed_all_end_and_go_on_to_the_same_bytes(
    number: int, count: int, more: str, pico: Pico, calibration_text: Path, tmp_path: Path
) -> None:
    passes = "{kind: rtn, bits: 2, group_size: 32}" if more else QUICK
    recipe, model = written(tmp_path, calibration_text, passes, more=more), pico(num_hidden_layers=2)
    applied(2, recipe, model, "expected", cwd=tmp_path)
    ended = applied(2, recipe, model, "out", cwd=tmp_path, before=partial(killed_at, number, count))
    assert ended[number][0] == -signal.SIGKILL
    code, done = ended[1 - number]
    assert code == 2
    assert not (tmp_path / "out").exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("error")]
    if number == 1:  # the first tells
        [line] = said
        assert line.endswith(
            "another process of this run has ended; what was done is kept: start all again with --resume"
        )
    else:
        assert said == []
    [(code, alone)] = applied(1, recipe, model, "out", "--resume", cwd=tmp_path)
    assert code == 2
    assert "differs in processes: 2 → 1" in alone.stderr
    assert applied(2, recipe, model, "out", "--resume", cwd=tmp_path)[0][0] == 0
    same_folders(tmp_path / "out", tmp_path / "expected")


def failing(this: int) -> None:
    """Let the second process fail at what it has to solve."""
    from compressor.compress.passes.linear.gptq import Gptq
    from compressor.runtime.errors import ResourceError

    def fail(*arguments: object) -> None:
        raise ResourceError("no more of something")

    if this == 1:
        Gptq._solve_rows = fail


def test_what_is_wrong_is_said_once(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    recipe, model = written(tmp_path, calibration_text, QUICK), pico(num_hidden_layers=2)
    (first, told), (second, silent) = applied(2, recipe, model, "out", cwd=tmp_path, before=failing)
    assert (first, second) == (2, 2)
    assert told.stderr.splitlines()[-1] == (
        "error: process 1: no more of something; what was done is kept: start all again with --resume"
    )
    assert silent.stderr == ""
    (first, told), (second, silent) = run_together(2, "eval", model, cwd=tmp_path)
    assert (first, told.stdout, second, silent) == (2, "", 2, ("", ""))
    assert told.stderr == "error: compressor eval works in one process: start it without torchrun\n"
    (first, told), (second, silent) = applied(2, tmp_path / "none.yaml", model, "out", cwd=tmp_path)
    assert (first, second, silent.stderr) == (2, 2, "")
    assert told.stderr.count("\n") == 1


def test_every_process_needs_a_window(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    recipe, model = written(tmp_path, calibration_text, QUICK), pico(num_hidden_layers=2)
    (first, told), *others = applied(3, recipe, model, "out", "--set", "data.samples=2", cwd=tmp_path)
    assert first == 2
    assert "2 windows of text (data.samples) for 3 processes" in told.stderr
    assert [done.stderr for _, done in others] == ["", ""]
    (tmp_path / "task.txt").write_text("a few words " * 15)
    recipe.write_text(
        f"data: {{source: '{calibration_text}', sequence_length: 128}}\n"
        f"passes: [{{kind: expert_prune, ratio: .25, task: {tmp_path / 'task.txt'}}}]\n"
    )
    (first, told), *others = applied(3, recipe, pico("qwen3_moe"), "out", cwd=tmp_path)
    assert first == 2
    assert "windows of text (data.samples) for 3 processes" in told.stderr


def late(this: int) -> None:
    """Let the second process come late to what follows every block."""
    from compressor.runtime.model.checkpoint import Checkpoint

    release = Checkpoint.release

    def slow(checkpoint: Checkpoint) -> None:
        time.sleep(0.5)
        release(checkpoint)

    if this == 1:
        Checkpoint.release = slow


def test_statistics_that_are_kept_are_those_of_all(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    passes = "{kind: awq}, {kind: gptq, group_size: 32, sequential: false, correction: 0, search: false}"
    recipe, model = written(tmp_path, calibration_text, passes), pico(num_hidden_layers=2)
    for out in ("out", "again"):
        found = applied(2, recipe, model, out, "--statistics", "kept", cwd=tmp_path, before=late)
        assert [code for code, _ in found] == [0, 0], found[0][1].stderr
    same_folders(tmp_path / "again", tmp_path / "out")
    run("apply", recipe, model, "one", cwd=tmp_path)
    ours, theirs = (open_model(tmp_path / folder) for folder in ("out", "one"))
    same = [float((ours.tensor(name) == theirs.tensor(name)).double().mean()) for name in theirs.tensors]
    assert sum(same) / len(same) > 0.9  # scales that awq moves are the same everywhere, too


def test_what_is_beyond_the_limits_is_said_once(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    recipe, model = written(tmp_path, calibration_text, "{kind: rtn, bits: 2, group_size: 32}"), pico()
    recipe.write_text(recipe.read_text().replace("kl: null", "kl: 1.e-9"))
    (first, told), (second, silent) = applied(2, recipe, model, "out", cwd=tmp_path)
    assert (first, second) == (1, 0)
    assert "is above limits.kl" in told.stderr
    assert silent == ("", "")


def test_a_plan_is_printed_once(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    recipe = written(tmp_path, calibration_text, QUICK)
    (first, told), (second, silent) = applied(2, recipe, pico(), "out", "--dry-run", cwd=tmp_path)
    assert (first, second) == (0, 0)
    assert told.stdout.count("memory") == 1
    assert silent == ("", "")


def stopped(this: int) -> None:
    """Let all processes be interrupted in their first block, as from a keyboard."""
    from compressor.calibrate.walk import Block

    advance = Block.advance

    def interrupted(block: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        advance(block)

    Block.advance = interrupted


def test_an_interruption_is_said_once(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    recipe, model = written(tmp_path, calibration_text, QUICK), pico(num_hidden_layers=2)
    (first, told), (second, silent) = applied(2, recipe, model, "out", cwd=tmp_path, before=stopped)
    assert first == second == 130
    assert told.stderr.splitlines()[-1] == (
        f"interrupted; nothing is lost, go on with: torchrun --nproc-per-node 2 -m compressor.cli apply {recipe} "
        f"{model} out --resume"
    )
    assert silent.stderr == ""
    assert applied(2, recipe, model, "out", "--resume", cwd=tmp_path)[0][0] == 0


def test_devices_are_looked_at_first(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    recipe = written(tmp_path, calibration_text, QUICK)
    (first, told), (second, silent) = applied(2, recipe, pico(), "out", "--device", "gpu", cwd=tmp_path)
    assert (first, second, silent.stderr) == (2, 2, "")
    assert told.stderr == "error: --device gpu: is not cpu or cuda\n"


def one_more_thread(this: int) -> None:
    torch.set_num_threads(1 + this)


def test_processes_have_to_compute_alike(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    recipe, model = written(tmp_path, calibration_text, QUICK), pico(num_hidden_layers=2)
    (first, told), _ = applied(2, recipe, model, "out", cwd=tmp_path, before=one_more_thread)
    assert first == 2
    assert "process 1 is not like the first in threads: 1 → 2; start all alike" in told.stderr
