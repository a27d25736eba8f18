"""The main job: recipe × model → a compressed folder, resumable at every block."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibrate.chains import Chains
from ..calibrate.drive import start_chains
from ..calibrate.folders import CurvatureFolder, FiguresFolder, StatisticsFolder
from ..calibrate.stage import StageWork
from ..calibrate.statistics import KINDS
from ..calibrate.walk import Block, walk
from ..runtime import processes
from ..runtime.errors import RecipeError, ResourceError, VerifyError, human_size
from ..runtime.files import file_sha256
from ..runtime.formats import PLAIN
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.model.disk_experts import fuse
from ..runtime.model.skeleton import Skeleton
from ..runtime.schemes import Dense, Operator, from_tensors, identical, stored_name
from .dealing import rewritten
from .events import BlockDone, Event, Fallback, LayerDone, Measured, Measuring, Resumed, Solving, Starved, Warned
from .fingerprint import machine, make_fingerprint, statistics_source
from .guards import check_output, source_skeleton
from .job import Job
from .journal import Journal, differences
from .output.folder import check_complete, check_runs, finish_folder, write_beside
from .output.stock import check_stock
from .output.verify import changed_files
from .output.writer import ShardedWriter
from .plan import Plan, make_plan, plan_for_text
from .quality import Quality, measure, texts_to_measure
from .recipe import Recipe
from .resources import chain_names, check_disk, check_memory
from .surveys import Text, curvature_folder, keeps, routing_folder, survey_texts, surveyed
from .tune import check_text, tune, tuned, untouched

Listener = Callable[[Event], None]


def apply(
    job: Job,
    listener: Listener,
    *,
    resume: bool = False,
    overwrite: bool = False,
    statistics: Path | None = None,
    memory: float | None = None,
    device: str = "cpu",
    present: Callable[[Path], object] = lambda folder: None,
) -> Plan:
    """Run a job to its end.

    Args:
        present: makes for people what shows them the finished folder, in it, before it appears as OUT.
        device: where blocks run and passes solve, `cpu` or a GPU as `cuda`; one block at a time is there.
        statistics: a folder to take the original model's statistics from, or to keep them in.
        memory: bytes beyond the imports to get by with on that device; default: what is available there.

    Raises:
        CompressorError: anything a person can mend; what was done so far can be resumed.
    """
    inputs = [*job.inputs, *([statistics] if statistics else [])]
    processes.once(partial(check_output, job.out, resume=resume, overwrite=overwrite, inputs=inputs))
    skeleton = source_skeleton(job.model, device)
    checkpoint = skeleton.checkpoint
    least = None if job.recipe.data.samples else 1
    with _mendable(job, device):
        plan, text = plan_for_text(job.recipe, skeleton, memory=memory)
    job = replace(job, recipe=job.recipe.model_copy(update={"data": plan.recipe.data}))
    for warning in plan.warnings:
        listener(Warned(warning))
    kept = keeps(plan.recipe) if statistics is not None else frozenset()
    if statistics is not None and not kept:
        raise RecipeError(
            "--statistics keeps statistics of the original model, which this recipe does not use; it is for rtn with "
            "search: true and other passes with sequential: false, without one that changes the model before, for "
            "expert_prune, for bits: mixed, and for passes with objective: model"
        )
    if "linears" in kept:  # which are kept of all blocks at once
        plan = replace(make_plan(job.recipe, skeleton, memory=float("inf")), warnings=plan.warnings)
    journal = Journal(job.out)
    check_memory(plan, memory)
    if not resume:
        processes.once(partial(check_disk, plan, job.out))
    with _mendable(job, device, plan.memory), closing(journal):
        texts = survey_texts(plan.recipe, checkpoint, least)
        _check_windows([*texts.values(), *([text] if text else [])])
        if text is not None and plan.recipe.tune is not None:
            check_text(plan.recipe, text.tuning)
        corpus, windows = (None, None) if text is None else (text.corpus, text.windows)
        fingerprint = processes.once(partial(make_fingerprint, job, skeleton, corpus, windows, statistics))
        fingerprint["processes"] = processes.size()
        _check_alike(skeleton)
        fingerprint["texts"] = {
            source: {"name": found.corpus.name, "sha256": found.corpus.sha256} for source, found in texts.items()
        }
        folder, routing, figures = None, None, None
        source = statistics_source(fingerprint)
        if statistics is not None:
            folder = StatisticsFolder(statistics, source) if "linears" in kept else None
            routing = routing_folder(statistics, plan.recipe, fingerprint) if "routing" in kept else None
            figures = FiguresFolder(statistics, source)
        journal.open(fingerprint, resume=resume)
        curvature = curvature_folder(statistics, plan.recipe, source, journal)
        recipe = surveyed(job.recipe, skeleton, windows, texts, routing, figures, curvature, journal, listener)
        if recipe != plan.recipe:
            plan = make_plan(recipe, skeleton, memory=float("inf") if folder is not None else memory)
        job = replace(job, recipe=plan.recipe)
        if journal.finished is None:
            _run(job, plan, windows, folder, curvature, journal, listener)
        _finish(job, plan, skeleton, text, fingerprint, journal, listener)
        processes.once(partial(_show, journal, present, overwrite=overwrite))
    return plan


def _check_windows(texts: Sequence[Text]) -> None:
    """
    Raises:
        RecipeError: there are not enough for each process to have one.
    """
    fewest = min((len(text.windows) for text in texts), default=processes.size())
    if fewest < processes.size():
        raise RecipeError(
            f"there are {fewest} windows of text (data.samples) for {processes.size()} processes, each of which needs "
            "one; start fewer"
        )


def _check_alike(skeleton: Skeleton) -> None:
    """
    Raises:
        ResourceError: processes would not compute alike.
    """
    first, *others = processes.gathered(machine(skeleton))
    for number, other in enumerate(others, 1):
        if changed := differences(first, other):
            raise ResourceError(f"process {number} is not like the first in {'; '.join(changed)}; start all alike")


def _finish(
    job: Job,
    plan: Plan,
    skeleton: Skeleton,
    text: Text | None,
    fingerprint: dict[str, Any],
    journal: Journal,
    listener: Listener,
) -> None:
    """Complete the output and see that it runs; or, where an earlier run did, see that it is still what that left."""
    if journal.finished is not None:
        processes.once(partial(_check_finished, journal))
    else:
        processes.once(partial(write_beside, journal.result, job, plan))
        if text is not None and plan.recipe.tune is not None:
            writer = ShardedWriter(journal.result, plan.tensors, job.recipe.output.shard_bytes)
            written = writer.written_by(plan.skeleton.checkpoint.block_index, plan.skeleton.blocks)
            tune(plan, skeleton, text.tuning, writer, written, journal, listener)
        quality = _measured(job, plan, skeleton, text, journal, listener)
        if processes.leads():
            finish_folder(journal.result, job, plan, fingerprint, journal.entries, quality)
            journal.done({"step": "finished", "manifest": file_sha256(journal.result / "compressor.json")})
    listener(Measured(_known_quality(journal)))


def _check_finished(journal: Journal) -> None:
    """
    Raises:
        ResourceError: the finished output is not as it was.
    """
    if journal.result.is_dir() and (not journal.holds(journal.result) or changed_files(journal.result)):
        raise journal.damaged(str(journal.result))


def _show(journal: Journal, present: Callable[[Path], object], *, overwrite: bool) -> None:
    """Let the finished output appear."""
    if journal.result.is_dir():
        present(journal.result)
    journal.publish(overwrite=overwrite)


@contextmanager
def _mendable(job: Job, device: str, memory: float = 0.0) -> Iterator[None]:
    """Say what can be done where the memory or the disk is full, or a file cannot be read or written."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).splitlines()[0].split(". ")[:2])
        raise ResourceError(
            f"--device {device}: its memory is full ({reason}); end other programs on it, or set --memory lower than "
            f"{human_size(memory).replace(' ', '')}, and run the same command with --resume; else start over with "
            "a smaller data.sequence_length"
        ) from None
    except OSError as error:
        again = "run the same command with --resume" if Journal(job.out).folder.is_dir() else "run the same command"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{job.out}: the disk is full; free some space and {again}") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise ResourceError(f"{error.filename or job.out}: {error.strerror}; choose another output") from None
        raise ResourceError(f"{error.filename or job.out}: {error.strerror or error}; mend that and {again}") from None


def _measured(
    job: Job, plan: Plan, original: Skeleton, text: Text | None, journal: Journal, listener: Listener
) -> Quality:
    """How far the written folder is from the original, which all processes find together, unless an earlier run did."""
    if not any(entry.get("step") == "measured" for entry in journal.entries):
        start = time.monotonic()
        listener(Measuring())
        texts, reason = processes.once(partial(_to_measure, job, plan, original, text, journal.result))
        if texts:
            quality = measure(journal.result, original, texts, plan.recipe.passes)
        else:
            processes.once(partial(check_runs, journal.result, plan.skeleton.checkpoint))
            quality = Quality({}, (), reason)
            listener(Warned(f"what was lost is not measured, and limits are not held against it: {reason}"))
        journal.done({"step": "measured", "quality": quality.record()})
        journal.timing({"step": "measured", "seconds": round(time.monotonic() - start, 3)})
    return _known_quality(journal)


def _to_measure(
    job: Job, plan: Plan, original: Skeleton, text: Text | None, folder: Path
) -> tuple[dict[str, Tensor], str]:
    """As `texts_to_measure`, once the folder is seen to be complete."""
    check_stock(check_complete(folder, plan.skeleton.checkpoint), original.checkpoint)
    return texts_to_measure(job.recipe, original.checkpoint, text)


def _known_quality(journal: Journal) -> Quality:
    return Quality.of(next(entry["quality"] for entry in journal.entries if entry.get("step") == "measured"))


def _run(
    job: Job,
    plan: Plan,
    windows: Tensor | None,
    folder: StatisticsFolder | None,
    curvature: CurvatureFolder | None,
    journal: Journal,
    listener: Listener,
) -> None:
    skeleton = plan.skeleton
    checkpoint = skeleton.checkpoint
    writer = ShardedWriter(journal.result, plan.tensors, job.recipe.output.shard_bytes)
    written, names = writer.written_by(checkpoint.block_index, skeleton.blocks), checkpoint.block_names()
    files = writer.finished_by(written)
    done = {entry["block"]: entry for entry in journal.entries if "block" in entry}
    first = max(done) + 1 if done else 0
    if processes.leads():
        _check_written(writer, written, done, journal)
    if not chain_names(plan.needs) or (folder is not None and folder.complete):
        windows = None  # which nothing is run over
    chains: Chains | None = None
    if first == 0:
        chains = _begin(plan, windows, writer, written[-1], files[-1], journal, listener, fresh=not done)
    elif windows is not None:
        if skeleton.wide is not None:
            outer: dict[str, Operator] = {}
            list(_rewrite_outer(plan, outer, lambda event: None))
            skeleton.wide.changed = _embedding(plan, outer)
        chains = Chains(journal.chains, chain_names(plan.needs), (*windows.shape, skeleton.width))
        if first < skeleton.blocks and not chains.exists(first):
            raise ResourceError(
                f"{journal.folder}: the calibration activations are not there (a folder of statistics served in "
                "their place?); put that folder back, or delete the work folder to start over"
            )
        if first < skeleton.blocks and chains.checksums(first) != done[first - 1]["chains"]:
            raise journal.damaged(str(journal.chains))
    if done:
        listener(Resumed(first, skeleton.blocks))
    wanting = [(name, step) for name in plan.linears for step in job.recipe.linear_passes.values() if step.wants(name)]
    wanted: dict[str, set[str]] = {}
    for name, step in wanting:
        if kinds := step.needs & KINDS.keys():
            wanted.setdefault(name, set()).update(kinds)
    probed, aimed = ({name for name, step in wanting if need in step.needs} for need in ("metric", "curvature"))
    room = min((room for room in processes.gathered(plan.room) if room is not None), default=None)
    for block in walk(skeleton, chains, wanted, first, folder, probed, room, plan.stays, curvature, aimed):
        start = time.monotonic()
        seconds: dict[str, float] = {}
        events = list(_rewrite(job.recipe, block, listener, seconds))
        if processes.leads():
            _store(block.linears, block.tensors, names[block.index], plan, checkpoint, writer)
        went_on = chains is not None and block.index + 1 < skeleton.blocks
        if went_on:
            block.advance()
        events.append(_block_done(events, block, skeleton.blocks))
        sums = chains.checksums(block.index + 1) if chains is not None and went_on else {}
        if processes.leads():
            entry = _done(block.index, events, writer, written[block.index], files[block.index])
            journal.done({**entry, "chains": sums})
        steps = {step: round(spent, 3) for step, spent in seconds.items()}
        journal.timing({"block": block.index, "seconds": round(time.monotonic() - start, 3), "steps": steps})
        if chains is not None:
            chains.drop(block.index)
        checkpoint.release()
        listener(events[-1])
    if folder is not None and not folder.complete:
        folder.finish(range(skeleton.blocks))


def _done(
    block: int, events: Sequence[Event], writer: ShardedWriter, written: Sequence[str], files: Sequence[str]
) -> dict[str, Any]:
    """For the journal: what happened to a block, or to what is in none (-1), and how to tell what is on disk.

    Args:
        written: its tensors; files: that are whole with it.
    """
    records, hashes = [event.record() for event in events], writer.hashes(files)
    return {"block": block, "events": records, "tensors": writer.checksum(written), "files": hashes}


def _check_written(
    writer: ShardedWriter, written: Mapping[int, Sequence[str]], done: Mapping[int, dict[str, Any]], journal: Journal
) -> None:
    """
    Raises:
        ResourceError: what an interrupted run wrote is not there any more, or not as it was.
    """
    if done and not writer.laid_out():
        raise journal.damaged(str(journal.result))
    sums = {block: entry["tensors"] for block, entry in done.items()}
    if (entry := tuned(journal)) is not None and entry["kept"]:  # and what that changed may be written by half
        written = untouched(journal, written)
        sums = dict(zip(written, entry["untouched"], strict=True))
    for block, known in sums.items():
        if writer.checksum(written[block]) != known:
            where = "tensors outside the blocks" if block < 0 else f"block {block}"
            raise journal.damaged(f"{journal.result}: {where}")


def _begin(
    plan: Plan,
    windows: Tensor | None,
    writer: ShardedWriter,
    written: Sequence[str],
    files: Sequence[str],
    journal: Journal,
    listener: Listener,
    *,
    fresh: bool,
) -> Chains | None:
    """Rewrite what is outside the blocks, write it unless an earlier run did, and start the chains from it.

    Args:
        windows: of text that is run over the model; None for none.
        written: names of the tensors outside the blocks; files: that are whole with these.
    """
    skeleton, outer = plan.skeleton, dict[str, Operator]()
    events = list(_rewrite_outer(plan, outer, listener if fresh else lambda event: None))
    if fresh and processes.leads():
        writer.start()
        names = skeleton.checkpoint.outside_names()
        for together in [[name] for name in names] if any(map(skeleton.checkpoint.made, names)) else [names]:
            _store(outer, {}, together, plan, skeleton.checkpoint, writer)
        journal.done({"step": "outside", **_done(-1, events, writer, written, files)})
    if windows is None:
        return None
    embedding = _embedding(plan, outer)
    if skeleton.wide is not None:
        skeleton.wide.changed = embedding
    return start_chains(skeleton, windows, journal.chains, chain_names(plan.needs), embedding)


def _embedding(plan: Plan, outer: Mapping[str, Operator]) -> Operator | None:
    """The embedding of the model that is written, where it is another than that of the one that is read."""
    name = next(name for name, looked_up in plan.skeleton.outer().items() if looked_up)
    return plan.skeleton.checkpoint.operator(name) if name in plan.stays else outer.get(name)


def _rewrite_outer(plan: Plan, found: dict[str, Operator], listener: Listener) -> Iterator[Event]:
    """Fill in what becomes of the embedding and the head, where passes name them."""
    checkpoint = plan.skeleton.checkpoint
    for name in (name for name in plan.skeleton.outer() if name in plan.linears and name not in plan.stays):
        weight = checkpoint.tensor(f"{name}.weight").to(plan.skeleton.device)
        work = StageWork({name: Dense(weight)}, {name: weight}, [[name]], unseen="its inputs are not measured")
        for step in plan.recipe.linear_passes.values():
            for event in step.apply(work) if step.names(name) else ():
                listener(event)
                yield event
        found[name] = work.linears[name]


def _rewrite(recipe: Recipe, block: Block, listener: Listener, seconds: dict[str, float]) -> Iterator[Event]:
    """Every stage of a block through the passes; the `seconds` that each takes are added up by its kind."""
    for work in block.stages():
        for name, tokens in work.starved.items():
            listener(starved := Starved(name, tokens))
            yield starved
        work.heard = lambda name, step, share: listener(Solving(name, step, share))
        for step in recipe.linear_passes.values():
            start = time.monotonic()
            for event in rewritten(step, work):
                listener(event)
                yield event
            seconds[step.kind] = seconds.get(step.kind, 0.0) + time.monotonic() - start


def _store(
    linears: Mapping[str, Operator],
    changed: Mapping[str, Tensor],
    names: Sequence[str],
    plan: Plan,
    checkpoint: Checkpoint,
    writer: ShardedWriter,
) -> None:
    """Write tensors of a block, or of none; read them back and compare what they decode to with what the passes meant.

    Args:
        linears: disk name → what is to be stored in place of the checkpoint's weight; others that the plan says stay
            as they are stored are, too.
        changed: tensors besides that are not as in the checkpoint.
        names: of all these, and of those that stay, in the checkpoint.
    """
    tensors: dict[str, Tensor] = {}
    written: dict[str, tuple[Operator, list[str]]] = {}  # and the suffixes of its tensors
    for name in names:
        linear = name.removesuffix(".weight")
        if linear in linears or linear in plan.stays:
            becomes = linears[linear] if linear in linears else checkpoint.operator(linear)
            operator = plan.format.as_written(becomes, checkpoint.tensors[name].dtype)
            stored = plan.format.tensors(operator)
            written[linear] = operator, list(stored)
            tensors.update({stored_name(linear, suffix): tensor for suffix, tensor in stored.items()})
        else:
            tensors[name] = changed[name] if name in changed else checkpoint.tensor(name)
    if plan.format is PLAIN:
        tensors = fuse(checkpoint.family, tensors)
    writer.write(tensors)
    for name in tensors:
        if not writer.holds(name, tensors[name]):
            raise VerifyError(f"{name}: what was read back is not what was written; check the disk")
    for linear, (operator, suffixes) in written.items() if plan.format is not PLAIN else ():
        # Of a tensor that several linears share, the last one's was written.
        parts = {suffix: tensors[stored_name(linear, suffix)] for suffix in suffixes}
        if not identical(
            from_tensors(plan.format.operator_tensors(parts, operator.scheme()), operator.scheme()), operator
        ):
            raise VerifyError(f"{linear}: decodes to other weights than were meant; this is a bug, please report it")


def _block_done(events: list[Event], block: Block, blocks: int) -> BlockDone:
    layers = [event for event in events if isinstance(event, LayerDone)]
    weights = sum(event.weights for event in layers) or 1
    bits = sum(event.bits * event.weights for event in layers) / weights
    error = sum(event.error * event.weights for event in layers) / weights
    return BlockDone(block.index, blocks, bits, error, sum(isinstance(event, Fallback) for event in events))
