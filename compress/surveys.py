"""What passes look at before the first block is rewritten: the text, and the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..calibrate.corpus import Corpus, builtin_corpus, drawn_windows, file_corpus, load_tokenizer
from ..calibrate.folders import CurvatureFolder, FiguresFolder, RoutingFolder
from ..calibrate.statistics import UNPAIRED
from ..runtime import processes
from ..runtime.errors import RecipeError
from ..runtime.files import read_saved
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.model.skeleton import Skeleton
from .events import Event, Surveyed
from .fingerprint import statistics_source
from .foretelling import WalkBack
from .journal import Journal
from .passes.base import SURVEYED, LinearPass, ModelPass, Pass, Survey
from .recipe import Recipe


@dataclass(frozen=True)
class Text:
    """A text and its token windows.

    Attributes:
        windows: that calibrate, `[samples, sequence_length]`; held_out: others of the same text, alike; tuning: others
            again, for the recipe's `tune`.
    """

    corpus: Corpus
    windows: Tensor
    held_out: Tensor
    tuning: Tensor


def read_calibration(
    recipe: Recipe, checkpoint: Checkpoint, *, least: int | None = None, held_out: int = 0, tuning: int = 0
) -> Text:
    """The recipe's text and its windows.

    Args:
        least, held_out: as of `drawn_windows`; tuning: windows that are held out for that.
    """
    data = recipe.data
    limit = checkpoint.positions
    if limit and data.sequence_length > limit:
        raise RecipeError(f"data.sequence_length {data.sequence_length} is beyond the model's {limit} positions")
    corpus = builtin_corpus("calibration") if data.source == "builtin" else file_corpus(Path(data.source))
    tokenizer = load_tokenizer(checkpoint.path)
    samples, length = data.tokens // data.sequence_length, data.sequence_length
    beside = held_out + tuning
    windows, others = drawn_windows(corpus, tokenizer, samples, length, data.seed, least=least, held_out=beside)
    checkpoint.check_ids(torch.cat([windows, others]))
    return Text(corpus, windows, others[:held_out], others[held_out:])


def survey_texts(recipe: Recipe, checkpoint: Checkpoint, least: int | None) -> dict[str | None, Text]:
    """Texts that single passes calibrate on, of the size of the recipe's."""
    found: dict[str | None, Text] = {}
    for source in {step.text for step in recipe.passes if "routing" in step.needs and step.text is not None}:
        data = recipe.data.model_copy(update={"source": source})
        found[source] = read_calibration(recipe.model_copy(update={"data": data}), checkpoint, least=least)
    return found


def routing_folder(folder: Path, recipe: Recipe, fingerprint: dict[str, Any]) -> RoutingFolder:
    """Where statistics of the first pass's routing are kept."""
    first = recipe.passes[0]
    source = statistics_source(fingerprint)
    if first.text is not None:
        source["corpus"] = fingerprint["texts"][first.text]
    return RoutingFolder(folder, source)


def keeps(recipe: Recipe) -> frozenset[str]:
    """What calibration for a planned recipe finds of the original model, and other recipes can use: `linears`,
    statistics of what enters these; `routing`; `divergences`; `curvature`."""
    needs = frozenset(need for step in recipe.passes for need in step.needs)
    reshaped = any(isinstance(step, ModelPass) for step in recipe.passes)
    found = {"linears"} if "reference" in needs - SURVEYED <= {"reference", *UNPAIRED} and not reshaped else set()
    if "routing" in recipe.passes[0].needs:  # passes after it see another model
        found.add("routing")
    return frozenset(found | needs & ({"divergences"} if reshaped else {"divergences", "curvature"}))


def statistics_bytes(skeleton: Skeleton) -> float:
    """What statistics of all linears take on disk: second moments, one for linears that read the same input."""
    widths = [
        skeleton.linears(index)[skeleton.disk_name(index, group.linears[0])].in_features
        for index in range(skeleton.blocks)
        for stage in skeleton.stages(index)
        for group in stage
    ]
    return 4.0 * sum(width**2 for width in widths)


def curvature_folder(
    kept: Path | None, recipe: Recipe, source: Mapping[str, Any], journal: Journal
) -> CurvatureFolder | None:
    """Where is found what errors of linears cost the model that its passes see; None where none asks for it.

    Args:
        kept: a folder for statistics of the original model.
        source: of these.
    """
    if not any("curvature" in step.needs for step in recipe.passes):
        return None
    reshaped = any(isinstance(step, ModelPass) for step in recipe.passes)
    folder = kept if kept is not None and not reshaped else journal.chains / "curvature"
    return CurvatureFolder(folder, source)


def surveyed(
    recipe: Recipe,
    skeleton: Skeleton,
    windows: Tensor | None,
    texts: Mapping[str | None, Text],
    routing: RoutingFolder | None,
    figures: FiguresFolder | None,
    curvature: CurvatureFolder | None,
    journal: Journal,
    listener: Callable[[Event], None],
) -> Recipe:
    """The recipe once its passes have looked at the whole model; what each found is kept in the journal."""
    entries = journal.entries
    known = {entry["number"]: entry for entry in entries if entry.get("step") == "survey"}
    told = [event for entry in entries if entry.get("step") == "surveying" for event in entry["events"]]
    passes: list[Pass] = []
    foretold: dict[int, dict[str, float]] | None = None

    def heard(event: Event) -> None:
        record = event.record()
        if not isinstance(event, Surveyed) and record not in told:  # told again by a survey that goes on
            told.append(record)
            journal.done({"step": "surveying", "events": [record]})
        listener(event)

    for number, step in enumerate(recipe.passes):
        folder, later = journal.chains / f"survey-{number}", recipe.passes[number + 1 :]
        if isinstance(step, LinearPass) and foretold is None:  # and so are all that follow
            open_yet = {n: _ready(recipe, n, skeleton) for n in range(number, len(recipe.passes)) if n not in known}
            foretold = _foretold(skeleton, windows, open_yet, curvature, _figures(figures, passes), journal, listener)
        went_on = folder.is_dir()
        if number not in known and not step.joint and not processes.leads():
            known[number] = processes.shared(None)
        if number in known:
            content = recipe.model_dump(mode="json") | {"passes": [known[number]["pass"]]}
            ready = Recipe.model_validate(content).passes[0].before(later).prepare(skeleton)
            if isinstance(ready, ModelPass):
                ready = ready.with_made([folder / name for name in known[number]["made"]])
            # Of a finished run, a crash may have left a part of what is deleted behind the output.
            if journal.finished is None and processes.leads():
                _check_made(folder, known[number]["made"], journal)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            ready = step.before(later).prepare(skeleton)
            task = texts[ready.text].windows if ready.text in texts else None
            own = (foretold or {}).get(number, {})
            found = Survey(windows, folder, heard, task, None if number else routing, _figures(figures, passes), own)
            with nullcontext() if step.joint else processes.alone():
                ready = ready.survey(skeleton, found)
            made = _made(folder, ready)
            if went_on and processes.leads():
                _check_made(folder, made, journal)
            entry = {"step": "survey", "number": number, "pass": ready.model_dump(mode="json"), "made": made}
            journal.done(entry)
            if not step.joint:
                processes.shared(entry)
        skeleton.checkpoint.release()
        if isinstance(ready, ModelPass):
            skeleton = ready.view(skeleton)
        passes.append(ready)
    return recipe.model_copy(update={"passes": tuple(passes)})


def _ready(recipe: Recipe, number: int, skeleton: Skeleton) -> LinearPass:
    """A linear pass, prepared."""
    ready = recipe.passes[number].before(recipe.passes[number + 1 :]).prepare(skeleton)
    assert isinstance(ready, LinearPass)
    return ready


def _figures(figures: FiguresFolder | None, passes: Sequence[Pass]) -> FiguresFolder | None:
    """Those of the model that some passes leave."""
    if figures is None:
        return None
    before = [step.model_dump(mode="json") for step in passes if isinstance(step, ModelPass)]
    return FiguresFolder(figures.folder, {**figures.source, "passes": before})


def _foretold(
    skeleton: Skeleton,
    windows: Tensor | None,
    passes: Mapping[int, LinearPass],
    curvature: CurvatureFolder | None,
    figures: FiguresFolder | None,
    journal: Journal,
    listener: Callable[[Event], None],
) -> dict[int, dict[str, float]]:
    """What linear passes ask of the end of the model, and what errors of linears cost it."""
    asks = curvature is not None or any("foretold" in step.needs for step in passes.values())
    if not asks or journal.finished is not None:
        return {}
    assert windows is not None
    return WalkBack(skeleton, windows, journal.chains, curvature, figures, listener).foretold(passes)


def _made(folder: Path, step: Pass) -> dict[str, list[str]]:
    """What a pass made in its folder: of each folder there, the names of the files."""
    made = step.made if isinstance(step, ModelPass) else ()
    return {str(path.relative_to(folder)): sorted(file.name for file in path.iterdir()) for path in made}


def _check_made(folder: Path, made: Mapping[str, Sequence[str]], journal: Journal) -> None:
    """
    Raises:
        ResourceError: a file is not there any more, or not as it was.
    """
    for path in (folder / name / file for name, files in made.items() for file in files):
        try:
            read_saved(path)
        except (SafetensorError, OSError, ValueError):
            raise journal.damaged(str(path)) from None
