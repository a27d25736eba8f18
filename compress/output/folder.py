"""What an output folder holds beside the weights: config, tokenizer, recipe, manifest, model card, report."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from ...runtime.errors import VerifyError
from ...runtime.files import copy_synced, file_sha256, sync_folder, write_synced
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.model.skeleton import Skeleton, calibration_dtype
from ...runtime.stored import open_model
from ...runtime.text import json_text, without_nan
from ..plan import Plan, around_of
from ..recipe import resolved_yaml
from .card import model_card
from .writer import ShardedWriter

if TYPE_CHECKING:
    from ..job import Job
    from ..quality import Quality


PLAN, TIMINGS, REPORT = "report/plan.json", "report/timings.jsonl", "report/report.html"


def write_beside(folder: Path, job: Job, plan: Plan) -> None:
    """Write what a folder of weights needs to be loaded: config, tokenizer, index; and the recipe."""
    skeleton, checkpoint = plan.skeleton, plan.skeleton.checkpoint
    config = plan.format.config(checkpoint.config, plan.rewritten, _untouched(plan, skeleton), around_of(skeleton))
    write_synced(folder / "config.json", json.dumps(config, indent=2) + "\n")
    for name, text in plan.format.files.items():
        write_synced(folder / name, text)
    for path in checkpoint.side_files:
        copy_synced(path, folder / path.name)
    write_synced(folder / "recipe.yaml", job.recipe_text)
    write_synced(folder / "recipe.resolved.yaml", resolved_yaml(job.recipe))
    ShardedWriter(folder, plan.tensors, job.recipe.output.shard_bytes).write_index()


def finish_folder(
    folder: Path,
    job: Job,
    plan: Plan,
    fingerprint: Mapping[str, Any],
    entries: Sequence[Any],
    quality: Quality,
) -> None:
    """Write report, model card and manifest: what was done, and what came of it."""
    report = folder / "report"
    report.mkdir(exist_ok=True)
    write_synced(report / "quality.json", json_text(quality.record()))
    write_synced(folder / PLAN, json_text(plan.record()))
    events = [event for entry in entries for event in entry.get("events", ())]
    write_synced(report / "layers.jsonl", "".join(json.dumps(event) + "\n" for event in events))
    hashes = {name: sha256 for entry in entries for name, sha256 in entry.get("files", {}).items()}
    write_synced(folder / "README.md", model_card(job, plan, fingerprint, events, quality))
    # Timings, and the report that shows them, differ between equal runs; the manifest may be from before a crash.
    left_out = {*hashes, TIMINGS, REPORT, "compressor.json", "compressor.json.partial"}
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    small = [name for name in names if name not in left_out]
    manifest = {
        "compressor": fingerprint["versions"]["compressor"],
        "source": {"name": job.source, "revision": job.revision, "files": fingerprint["model"]},
        "edits": list(job.edits),
        "corpus": fingerprint["corpus"],
        "texts": fingerprint["texts"],
        "format": plan.format.name,
        "readers": list(plan.readers),
        "quality": without_nan({name: found.record() for name, found in quality.texts.items()}),
        "bytes": {"before": plan.bytes_before, "after": plan.bytes_after},
        "environment": {key: fingerprint[key] for key in ("versions", "device", "cpu", "computes", "threads")},
        "files": hashes | {name: file_sha256(folder / name) for name in small},
    }
    write_synced(folder / "compressor.json", json.dumps(manifest, indent=2) + "\n")
    for path in (report, folder):
        sync_folder(path)


def events_of(folder: Path) -> list[dict[str, Any]]:
    """Records of what happened while an output was made."""
    lines = (folder / "report" / "layers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _untouched(plan: Plan, skeleton: Skeleton) -> set[str]:
    """Names of all modules with a matrix that stays as it is, on disk and in memory: readers that match by either must
    leave them alone."""
    family, tensors = skeleton.family, skeleton.checkpoint.tensors
    inside = {name for names in skeleton.checkpoint.block_names() for name in names}
    matrices = [name for name in inside if name.endswith(".weight") and len(tensors[name].shape) == 2]
    names = {name.removesuffix(".weight") for name in matrices}
    names |= {family.memory_name(name) for name in names if name not in plan.linears}
    outside = [name for name in skeleton.checkpoint.outside_names() if name.endswith("weight")]
    beside = {disk: memory for memory, disk in skeleton.beside().items()}
    outside += [beside.get(name) or family.memory_name(name) for name in outside]
    names |= {name.removesuffix(".weight") for name in outside if not name.endswith("norm.weight")} | {family.head}
    return names - {form for name in plan.rewritten for form in (name, family.memory_name(name))}


def check_complete(folder: Path, original: Checkpoint) -> Checkpoint:
    """The folder, opened.

    Raises:
        VerifyError: a tensor is in it or in the original only.
    """
    opened = open_model(folder)
    if missing := sorted(set(original.tensors).symmetric_difference(opened.tensors)):
        raise VerifyError(f"{folder}: {missing[0]} is in one of the model and its output only")
    return opened


Thing = TypeVar("Thing")


class Track(Protocol):
    """Goes over things, and may show somebody how far it is."""

    def __call__(self, what: str, things: Collection[Thing], /) -> Iterable[Thing]: ...


def untracked(what: str, things: Collection[Thing], /) -> Iterable[Thing]:
    """Shows nobody."""
    return things


def check_runs(folder: Path, original: Checkpoint, track: Track = untracked) -> None:
    """Run sixteen tokens through the folder's blocks, one at a time.

    Raises:
        VerifyError: a tensor is missing, or a block gives NaN or infinities.
    """
    opened = check_complete(folder, original)
    skeleton = Skeleton(opened, calibration_dtype(opened))
    ids = torch.arange(16)[None] % skeleton.config.vocab_size
    hidden = skeleton.embed(ids)
    for index in track("running blocks", range(skeleton.blocks)):
        hidden = skeleton.run(skeleton.runner(index, skeleton.block(index)), hidden)
        if not bool(torch.isfinite(hidden).all()):
            raise VerifyError(f"{folder}: block {index} gives activations that are not finite")
