"""The step after all passes: scales and norms of what was written, trained on text that did not calibrate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..calibrate.chains import Chains, Spill
from ..calibrate.drive import carry
from ..calibrate.tuning import Tuning
from ..runtime import processes
from ..runtime.errors import RecipeError, VerifyError
from ..runtime.files import read_saved, save_synced
from ..runtime.model.skeleton import Skeleton
from ..runtime.schemes import stored_name
from ..runtime.stored import open_model
from .events import Descending, Event, Surveyed, Tuned
from .journal import Journal
from .output.writer import ShardedWriter
from .plan import Plan
from .recipe import Recipe

JUDGES = 16  # windows of which the first says whether what came is better
_KEPT = 16  # steps between two times that they are kept for a run that goes on
_STATE, _STEPS = "state.safetensors", "steps"


def tune(
    plan: Plan,
    original: Skeleton,
    windows: Tensor,
    writer: ShardedWriter,
    written: Mapping[int, Sequence[str]],
    journal: Journal,
    listener: Callable[[Event], None],
) -> None:
    """Train what is written, as the recipe's `tune` says; it is replaced where held-out windows find that better.

    Args:
        windows: of text that did not calibrate, `[samples, tokens]`.
        written: block → the tensors that come with it.
    """
    entry = tuned(journal)
    if entry is None:
        folder = journal.chains / "tune"
        before, after = _trained(plan, original, windows, folder, journal, listener)
        entry = {"step": "tuned", "before": before, "after": after, "kept": after < before}
        if entry["kept"] and processes.leads():
            entry["untouched"] = [writer.checksum(names) for names in untouched(journal, written).values()]
        journal.done(entry)
    listener(Tuned(entry["before"], entry["after"]))
    if entry["kept"] and processes.leads():
        _put_in_place(writer, journal)
    processes.wait()


def check_text(recipe: Recipe, windows: Tensor) -> None:
    """
    Raises:
        RecipeError: there are too few windows for a step of the recipe's `tune`, and one that says what came of it.
    """
    assert recipe.tune is not None
    size = processes.size()
    fewest = len(windows) // size  # that a process has
    if fewest - math.ceil(fewest / JUDGES) < _each(recipe.tune.batch):
        beside = f" in {size} processes" if size > 1 else ""
        raise RecipeError(
            f"tune: {len(windows)} windows of text that does not calibrate are too few for steps of "
            f"{recipe.tune.batch}{beside}; give more text, or fewer data.samples"
        )


def _each(batch: int) -> int:
    """Windows of a step that a process runs."""
    return max(1, batch // processes.size())


def tuned(journal: Journal) -> dict[str, Any] | None:
    """What an earlier run said of it, once it was trained."""
    return next((entry for entry in journal.entries if entry.get("step") == "tuned"), None)


def untouched(journal: Journal, written: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    """Block → those of its tensors that training leaves as they are."""
    found = {block: list(names) for block, names in written.items()}
    for block in (block for block in written if block >= 0):
        changed = _result(journal, block)
        found[block] = [name for name in found[block] if name not in changed]
    return found


def _result(journal: Journal, block: int) -> dict[str, Tensor]:
    """Tensors of a block by their names on disk.

    Raises:
        ResourceError: they are not as they were left.
    """
    path = _file(journal.chains / "tune", block)
    try:
        return read_saved(path)[0]
    except (SafetensorError, OSError, ValueError):
        raise journal.damaged(str(path)) from None


def _file(folder: Path, block: int) -> Path:
    return folder / f"result-{block:05d}.safetensors"


def _put_in_place(writer: ShardedWriter, journal: Journal) -> None:
    """Write what came, as often as a run is taken up again; the journal then has other hashes of the files."""
    touched: set[str] = set()
    for path in sorted((journal.chains / "tune").glob(_file(Path(), 0).name.replace("00000", "*"))):
        tensors = _result(journal, int(path.stem.rpartition("-")[2]))
        writer.write(tensors)
        for name, tensor in tensors.items():
            if not writer.holds(name, tensor):
                raise VerifyError(f"{name}: what was read back is not what was written; check the disk")
        touched |= {writer.weight_map[name] for name in tensors}
    files = writer.hashes(sorted(touched))
    if not any(entry.get("step") == "replaced" for entry in journal.entries):
        journal.done({"step": "replaced", "files": files})


def _trained(
    plan: Plan, original: Skeleton, windows: Tensor, folder: Path, journal: Journal, listener: Callable[[Event], None]
) -> tuple[float, float]:
    """KL per token in nats on held-out windows, of what was written and of what training made of it, which is left in
    the folder."""
    wanted = plan.recipe.tune
    assert wanted is not None
    # Windows are dealt one by one, for all processes to have as many.
    chains = Chains(folder / "original", ("original",), (*windows.shape, original.width), windows.shape[1])
    judges, others = chains.own[::JUDGES], [n for place, n in enumerate(chains.own) if place % JUDGES]
    each = _each(wanted.batch)
    steps = min(processes.gathered(len(others) // each))
    exact = _leaving(original, windows, chains, listener)
    compressed = Skeleton(open_model(journal.result), original.dtype, original.device)
    tuning = Tuning(original, compressed)
    _taken_up(tuning, folder, journal)

    def judged(*, moved: bool) -> float:
        found = tuning.divergences(windows[list(judges)], _rows(exact, judges), moved=moved)
        every = [loss for part in processes.gathered(found) for loss in part]
        return sum(every) / len(every)

    for step in range(tuning.steps, steps):
        numbers = others[step * each : (step + 1) * each]
        lost = tuning.descend(windows[numbers], _rows(exact, numbers), wanted.rate, steps)
        listener(Descending(step + 1, steps, lost))
        if tuning.steps % _KEPT == 0 or tuning.steps == steps:
            _keep(tuning, folder)
    before, after = judged(moved=False), judged(moved=True)
    for index in range(compressed.blocks) if processes.leads() else ():
        save_synced(_file(folder, index), _changed(plan, compressed, tuning, index), {})
    processes.wait()
    return before, after


def _leaving(original: Skeleton, windows: Tensor, chains: Chains, listener: Callable[[Event], None]) -> Spill:
    """What leaves the last block of the original; goes on where it was interrupted."""
    blocks, chain = original.blocks, chains.names[0]
    if (start := chains.reached) < 0:
        carry(chains, chain, 0, lambda rows: original.embed(windows[rows]))
        chains.advanced(start := 0)
    for index in range(start, blocks):
        original.checkpoint.expect(index, index + 1)
        runner, entering = original.runner(index, original.block(index)), chains.read(index, chain)
        carry(chains, chain, index + 1, partial(_through, original, runner, entering))
        chains.advanced(index + 1)
        original.checkpoint.release()
        listener(Surveyed(index, blocks))
    return chains.read(blocks, chain)


def _through(skeleton: Skeleton, runner: Any, entering: Spill, rows: slice) -> Tensor:
    return skeleton.run(runner, entering[rows])


def _rows(spill: Spill, numbers: Sequence[int]) -> Tensor:
    """Some windows of it."""
    return torch.cat([spill[number : number + 1] for number in numbers])


def _keep(tuning: Tuning, folder: Path) -> None:
    if processes.leads():
        save_synced(folder / _STATE, tuning.state, {_STEPS: str(tuning.steps)})


def _taken_up(tuning: Tuning, folder: Path, journal: Journal) -> None:
    """Go on where an interrupted run was.

    Raises:
        ResourceError: what it left is damaged.
    """
    path = folder / _STATE
    if not processes.once(path.is_file):
        return
    try:
        tensors, told = read_saved(path)
        tuning.restore(int(told[_STEPS]), tensors)
    except (SafetensorError, OSError, ValueError, KeyError):
        raise journal.damaged(str(path)) from None


def _changed(plan: Plan, compressed: Skeleton, tuning: Tuning, block: int) -> dict[str, Tensor]:
    """Tensors of a block that are not what is stored any more, by their names on disk."""
    operators, every = tuning.result(block)
    for name, operator in operators.items():
        every |= {stored_name(name, suffix): tensor for suffix, tensor in plan.format.tensors(operator).items()}
    stored = compressed.checkpoint.stored_tensor
    return {name: tensor.cpu() for name, tensor in every.items() if not torch.equal(tensor.cpu(), stored(name))}
