"""The main job: recipe × model → a compressed folder, resumable at every block."""

from __future__ import annotations

import errno
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibrate.artefact import RoutingFolder, StatisticsFolder
from ..calibrate.chains import Chains
from ..calibrate.corpus import Corpus, builtin_corpus, file_corpus, load_tokenizer, token_windows
from ..calibrate.drive import start_chains
from ..calibrate.walk import Block, walk
from ..kernels.dispatch import cpu_capability
from ..runtime.errors import ModelError, RecipeError, ResourceError, VerifyError
from ..runtime.files import file_sha256
from ..runtime.formats import PLAIN
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.model.disk_experts import fuse
from ..runtime.model.skeleton import Skeleton, calibration_dtype
from ..runtime.schemes import Operator, from_tensors, identical, stored_name
from .events import BlockDone, Event, Fallback, LayerDone, Resumed, Starved, Surveyed
from .folder import finish_folder
from .journal import Journal
from .passes.base import ModelPass, Pass, Survey
from .plan import Plan, make_plan
from .recipe import Recipe
from .resources import chain_names, check_disk, check_memory
from .writer import ShardedWriter

Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Job:
    """Everything a run is made of.

    Attributes:
        recipe_text: the recipe's file verbatim; `edits` were applied to it.
        model, revision: the folder, and the hub commit it came from, if any.
        source: what the user named as the model.
        recipe_file: where the recipe lies, if it is a file.
    """

    recipe: Recipe
    recipe_text: str
    edits: tuple[str, ...]
    model: Path
    out: Path
    source: str
    revision: str | None = None
    recipe_file: Path | None = None

    @property
    def inputs(self) -> list[Path]:
        """What the run reads."""
        sources = {self.recipe.data.source, *(step.text or "builtin" for step in self.recipe.passes)}
        data = [Path(source) for source in sorted(sources - {"builtin"})]
        return [self.model, *data, *([self.recipe_file] if self.recipe_file else [])]


def apply(
    job: Job,
    listener: Listener,
    *,
    resume: bool = False,
    overwrite: bool = False,
    statistics: Path | None = None,
    memory: float | None = None,
    device: str = "cpu",
) -> Plan:
    """Run a job to its end.

    Args:
        device: where blocks run and passes solve, `cpu` or a GPU as `cuda`; one block at a time is there.
        statistics: a folder to take the original model's statistics from, or to keep them in.
        memory: bytes beyond the imports to get by with on that device; default: what is available there.

    Raises:
        CompressorError: anything a person can mend; what was done so far can be resumed.
    """
    inputs = [*job.inputs, *([statistics] if statistics else [])]
    check_output(job.out, resume=resume, overwrite=overwrite, inputs=inputs)
    skeleton = source_skeleton(job.model, device)
    checkpoint = skeleton.checkpoint
    plan = make_plan(job.recipe, skeleton, memory=memory)
    reshaped = any(isinstance(step, ModelPass) for step in job.recipe.passes)
    of_linears = plan.needs == {"reference"} and not reshaped
    if statistics is not None and not of_linears and "routing" not in plan.needs:
        raise RecipeError(
            "--statistics keeps statistics of the original model, which this recipe does not use; it is for rtn with "
            "search: true and other passes with sequential: false, without one that changes the model before, and for "
            "expert_prune"
        )
    if statistics is not None and of_linears:  # which are kept of all blocks at once
        plan = make_plan(job.recipe, skeleton, memory=float("inf"))
    journal = Journal(job.out)
    check_memory(plan, memory)
    if not resume:
        check_disk(plan, job.out)
    try:
        corpus, windows = calibration_windows(job.recipe, checkpoint) if plan.needs else (None, None)
        texts = survey_windows(plan.recipe, checkpoint)
        fingerprint = make_fingerprint(job, skeleton, corpus, windows, statistics)
        fingerprint["texts"] = {s: {"name": found.name, "sha256": found.sha256} for s, (found, _) in texts.items()}
        kept = None
        if statistics is not None and of_linears:
            kept = StatisticsFolder(statistics, statistics_source(fingerprint))
        routing = None if statistics is None or of_linears else routing_folder(statistics, plan.recipe, fingerprint)
        journal.open(fingerprint, resume=resume)
        surveyed = _surveyed(job.recipe, skeleton, windows, texts, routing, journal, listener)
        if surveyed != plan.recipe:
            plan = make_plan(surveyed, skeleton, memory=float("inf") if kept is not None else memory)
        job = replace(job, recipe=plan.recipe)
        if not any(entry.get("step") == "finished" for entry in journal.entries):
            _run(job, plan, windows, kept, journal, listener)
            finish_folder(journal.result, job, plan, plan.skeleton, fingerprint, journal.entries)
            journal.done({"step": "finished"})
        journal.publish(overwrite=overwrite)
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).splitlines()[0].split(". ")[:2])
        raise ResourceError(
            f"--device {device}: its memory is full ({reason}); end other programs on it, or set --memory lower than "
            f"{plan.memory / 1e9:.2f}GB, and run the same command with --resume; else start over with a smaller "
            "data.sequence_length"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"{job.out}: the disk is full; free some space and run the same command with --resume"
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise ResourceError(f"{error.filename or job.out}: {error.strerror}; choose another output") from None
        raise ResourceError(
            f"{error.filename or job.out}: {error.strerror or error}; mend that and run the same command with --resume"
        ) from None
    finally:
        journal.close()
    return plan


def source_skeleton(model: Path, device: str) -> Skeleton:
    """The model to compress, and the device where its blocks are to run.

    Raises:
        ModelError: the folder is damaged, or compressed already.
        ResourceError: the device is not there.
    """
    check_device(device)
    checkpoint = open_source(model)
    return Skeleton(checkpoint, calibration_dtype(checkpoint, device), device)


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind, index = device, 0
    if kind not in ("cpu", "cuda"):
        raise ResourceError(f"--device {device}: is not cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ResourceError(f"--device {device}: torch {torch.__version__} finds no GPU here; leave the option out")
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise ResourceError(f"--device {device}: there are {torch.cuda.device_count()} GPUs here, numbered from 0")


def check_output(out: Path, *, resume: bool, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse an output folder that is in the way, before any work; `inputs` may not lie in what would be replaced."""
    if out.is_symlink():
        raise ResourceError(f"{out}: is a symbolic link; name the folder itself")
    if not out.name or out.is_mount() or out.absolute() == Path.cwd():
        raise ResourceError(f"{out}: cannot be replaced by a finished folder; name a new folder in it")
    if out.exists() and not out.is_dir():
        raise ResourceError(f"{out}: a file of that name exists; choose another output folder")
    for path in inputs:
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise ResourceError(f"{out}: holds {path}, which is read; choose another output folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    a_model = any((out / name).is_file() for name in ("compressor.json", "config.json"))
    if not (overwrite or resume):
        hint = " or add --overwrite" if a_model else ""
        raise ResourceError(f"{out}: not empty; choose another output folder{hint}")
    if overwrite and not a_model:
        raise ResourceError(f"{out}: is not a model folder, which --overwrite replaces; choose another output")


def open_source(model: Path) -> Checkpoint:
    """A plain checkpoint to compress; an already compressed one is refused."""
    checkpoint = Checkpoint(model)
    quantized = checkpoint.config.get("quantization_config")
    if quantized or checkpoint.config.get("model_type") == "compressor":
        method = quantized.get("quant_method", "an unknown method") if quantized else "compressor"
        raise ModelError(f"{model}: already compressed ({method}); start from the original model")
    return checkpoint


def calibration_windows(recipe: Recipe, checkpoint: Checkpoint) -> tuple[Corpus, Tensor]:
    """The recipe's text and its token windows `[samples, sequence_length]`."""
    data = recipe.data
    limit = checkpoint.text_config.get("max_position_embeddings")
    if limit and data.sequence_length > limit:
        raise RecipeError(f"data.sequence_length {data.sequence_length} is beyond the model's {limit} positions")
    corpus = builtin_corpus("calibration") if data.source == "builtin" else file_corpus(Path(data.source))
    tokenizer = load_tokenizer(checkpoint.path)
    windows = token_windows(
        corpus, tokenizer, samples=data.samples, sequence_length=data.sequence_length, seed=data.seed
    )
    highest = checkpoint.vocabulary
    if int(windows.max()) >= highest:
        raise ModelError(f"{checkpoint.path}: the tokenizer has ids beyond the {highest} rows of the embedding")
    return corpus, windows


def survey_windows(recipe: Recipe, checkpoint: Checkpoint) -> dict[str | None, tuple[Corpus, Tensor]]:
    """Texts that single passes calibrate on, and their windows, of the size of the recipe's."""
    found: dict[str | None, tuple[Corpus, Tensor]] = {}
    for source in {step.text for step in recipe.passes if "routing" in step.needs and step.text is not None}:
        data = recipe.data.model_copy(update={"source": source})
        found[source] = calibration_windows(recipe.model_copy(update={"data": data}), checkpoint)
    return found


def make_fingerprint(
    job: Job, skeleton: Skeleton, corpus: Corpus | None, windows: Tensor | None, statistics: Path | None
) -> dict[str, Any]:
    """What must be the same for a run to be resumed; reads every weight once and refuses NaN and infinity.

    Raises:
        ModelError: a weight is not finite (named).
    """
    checkpoint = skeleton.checkpoint
    others = ["config.json", *(path.name for path in checkpoint.side_files)]
    return {
        "model": checkpoint.digests() | {name: file_sha256(checkpoint.path / name) for name in others},
        "recipe": job.recipe.model_dump(mode="json"),
        "corpus": None if corpus is None else {"name": corpus.name, "sha256": corpus.sha256},
        "tokens": None if windows is None else windows.numel(),
        "versions": {
            **{name: version(name) for name in ("compressor", "torch", "transformers", "safetensors", "numpy")},
            "python": platform.python_version(),
        },
        "device": str(skeleton.device),
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {cpu_capability()}",
        "computes": str(skeleton.dtype).removeprefix("torch."),
        "statistics": None if statistics is None else str(statistics.resolve()),
        "threads": torch.get_num_threads(),
    }


def statistics_source(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same for a folder of statistics to serve: weights, text and windows."""
    data = {key: value for key, value in fingerprint["recipe"]["data"].items() if key != "source"}
    same = {key: fingerprint[key] for key in ("model", "corpus", "versions", "device", "cpu", "computes")}
    return {**same, "windows": data}


def routing_folder(folder: Path, recipe: Recipe, fingerprint: dict[str, Any]) -> RoutingFolder | None:
    """Where statistics of the first pass's routing are kept; passes after it see another model."""
    first = recipe.passes[0]
    if "routing" not in first.needs:
        return None
    source = statistics_source(fingerprint)
    if first.text is not None:
        source["corpus"] = fingerprint["texts"][first.text]
    return RoutingFolder(folder, source)


def _surveyed(
    recipe: Recipe,
    skeleton: Skeleton,
    windows: Tensor | None,
    texts: Mapping[str | None, tuple[Corpus, Tensor]],
    routing: RoutingFolder | None,
    journal: Journal,
    listener: Listener,
) -> Recipe:
    """The recipe once its passes have looked at the whole model; what each found is kept in the journal."""
    entries = journal.entries
    known = {entry["number"]: entry for entry in entries if entry.get("step") == "survey"}
    told = [event for entry in entries if entry.get("step") == "surveying" for event in entry["events"]]
    passes: list[Pass] = []

    def heard(event: Event) -> None:
        record = event.record()
        if not isinstance(event, Surveyed) and record not in told:  # told again by a survey that goes on
            told.append(record)
            journal.done({"step": "surveying", "events": [record]})
        listener(event)

    for number, step in enumerate(recipe.passes):
        folder = journal.chains / f"survey-{number}"
        if number in known:
            content = recipe.model_dump(mode="json") | {"passes": [known[number]["pass"]]}
            ready = Recipe.model_validate(content).passes[0].prepare(skeleton)
            if isinstance(ready, ModelPass):
                ready = ready.with_made([folder / name for name in known[number]["made"]])
        else:
            folder.mkdir(parents=True, exist_ok=True)
            ready = step.prepare(skeleton)
            task = texts[ready.text][1] if ready.text in texts else None
            ready = ready.survey(skeleton, Survey(windows, folder, heard, task, None if number else routing))
            made = [str(path.relative_to(folder)) for path in ready.made] if isinstance(ready, ModelPass) else []
            journal.done({"step": "survey", "number": number, "pass": ready.model_dump(mode="json"), "made": made})
        skeleton.checkpoint.release()
        if isinstance(ready, ModelPass):
            skeleton = ready.view(skeleton)
        passes.append(ready)
    return recipe.model_copy(update={"passes": tuple(passes)})


def _run(
    job: Job,
    plan: Plan,
    windows: Tensor | None,
    kept: StatisticsFolder | None,
    journal: Journal,
    listener: Listener,
) -> None:
    skeleton = plan.skeleton
    checkpoint = skeleton.checkpoint
    writer = ShardedWriter(journal.result, plan.tensors, job.recipe.output.shard_bytes)
    files, names = writer.finished_by(checkpoint.block_index, skeleton.blocks), checkpoint.block_names()
    done = [entry["block"] for entry in journal.entries if "block" in entry]
    first = max(done) + 1 if done else 0
    if not done:
        writer.start()
    chains: Chains | None = None
    if windows is not None and chain_names(plan.needs) and not (kept is not None and kept.complete):
        if first == 0:
            chains = start_chains(skeleton, windows, journal.chains, chain_names(plan.needs))
        else:
            chains = Chains(journal.chains, chain_names(plan.needs), (*windows.shape, skeleton.config.hidden_size))
            if first < skeleton.blocks and not chains.exists(first):
                raise ResourceError(
                    f"{journal.folder}: the calibration activations are not there (a folder of statistics served in "
                    "their place?); put that folder back, or delete the work folder to start over"
                )
    if not done:
        writer.write({name: checkpoint.tensor(name) for name in checkpoint.outside_names()})
        journal.done({"step": "outside", "block": -1, "files": writer.hashes(files[-1])})
    if done:
        listener(Resumed(first, skeleton.blocks))
    wanting = [(name, step) for name in plan.linears for step in job.recipe.linear_passes.values() if step.wants(name)]
    wanted = {name for name, step in wanting if step.needs}
    probed = {name for name, step in wanting if "metric" in step.needs}
    for block in walk(skeleton, chains, wanted, first, kept, probed, plan.room):
        start = time.monotonic()
        events = list(_rewrite(job.recipe, block, listener))
        _store(block, names[block.index], plan, checkpoint, writer)
        if block.index + 1 < skeleton.blocks:
            block.advance()
        events.append(_block_done(events, block, skeleton.blocks))
        hashes = writer.hashes(files[block.index])
        journal.done({"block": block.index, "events": [event.record() for event in events], "files": hashes})
        journal.timing({"block": block.index, "seconds": round(time.monotonic() - start, 3)})
        if chains is not None:
            chains.drop(block.index)
        checkpoint.release()
        listener(events[-1])
    if kept is not None and not kept.complete:
        kept.finish(range(skeleton.blocks))


def _rewrite(recipe: Recipe, block: Block, listener: Listener) -> Iterator[Event]:
    for work in block.stages():
        for name, tokens in work.starved.items():
            listener(starved := Starved(name, tokens))
            yield starved
        for step in recipe.linear_passes.values():
            for event in step.apply(work):
                listener(event)
                yield event


def _store(block: Block, names: Sequence[str], plan: Plan, checkpoint: Checkpoint, writer: ShardedWriter) -> None:
    """Write a block's tensors, read them back and compare what they decode to with what the passes meant.

    Args:
        names: of the block's tensors in the checkpoint.
    """
    tensors: dict[str, Tensor] = {}
    rewritten: dict[str, tuple[Operator, list[str]]] = {}  # and the suffixes of its tensors
    for name in names:
        linear = name.removesuffix(".weight")
        if linear in plan.rewritten:
            operator = plan.format.as_written(block.linears[linear], checkpoint.tensors[name].dtype)
            stored = plan.format.tensors(operator)
            rewritten[linear] = operator, list(stored)
            tensors.update({stored_name(linear, suffix): tensor for suffix, tensor in stored.items()})
        else:
            tensors[name] = checkpoint.tensor(name)
    if plan.format is PLAIN:
        tensors = fuse(checkpoint.family, tensors)
    writer.write(tensors)
    for name in tensors:
        if not torch.equal(writer.read(name), tensors[name].cpu()):
            raise VerifyError(f"{name}: what was read back is not what was written; check the disk")
    for linear, (operator, suffixes) in rewritten.items() if plan.format is not PLAIN else ():
        # Of a tensor that several linears share, the last one's was written.
        parts = {suffix: tensors[stored_name(linear, suffix)] for suffix in suffixes}
        if not identical(from_tensors(plan.format.parts(parts, operator.scheme()), operator.scheme()), operator):
            raise VerifyError(f"{linear}: decodes to other weights than were meant; this is a bug, please report it")


def _block_done(events: list[Event], block: Block, blocks: int) -> BlockDone:
    layers = [event for event in events if isinstance(event, LayerDone)]
    weights = sum(event.weights for event in layers) or 1
    bits = sum(event.bits * event.weights for event in layers) / weights
    error = sum(event.error * event.weights for event in layers) / weights
    return BlockDone(block.index, blocks, bits, error, sum(isinstance(event, Fallback) for event in events))
