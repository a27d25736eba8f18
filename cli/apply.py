"""`compressor apply` and `plan`: what a recipe does to a model, and what it would do."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime.errors import CompressorError, RecipeError, human_size
from . import render
from .arguments import (
    ContextOption,
    DeviceOption,
    FitOption,
    ForOption,
    JsonOption,
    KvShareOption,
    MemoryOption,
    ModelArgument,
    OverwriteOption,
    PlannedArgument,
    RecipeArgument,
    RevisionOption,
    SetOption,
    bytes_of,
    model_folder,
    tokens_of,
)
from .recipes import read
from .session import session
from .together import command_line, interruption, together


@together
def apply(
    recipe: RecipeArgument,
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    edits: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with an interrupted run")] = False,
    overwrite: OverwriteOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="print the plan and stop")] = False,
    statistics: Annotated[
        Path | None, typer.Option(help="folder of the original model's statistics: used if there, else made")
    ] = None,
    memory: MemoryOption = None,
    device: DeviceOption = "cpu",
    revision: RevisionOption = None,
    fit: FitOption = None,
    reader: ForOption = None,
    context: ContextOption = None,
    kv_share: KvShareOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compress MODEL by RECIPE into OUT; the recipe auto is made for the bytes that --fit allows."""
    if dry_run:
        plan(recipe, model, edits, memory, device, revision, fit, reader, context, kv_share, as_json)
        return
    aim = _aim(recipe, fit, reader, context, kv_share)
    text, parsed, folder, commit = _read(recipe, edits, aim, model, revision, device)
    allowed = bytes_of(memory)

    from ..compress.apply import Job
    from ..compress.apply import apply as run_job
    from ..compress.events import Event, Measured
    from ..compress.output.folder import REPORT
    from ..compress.quality import Quality
    from ..runtime.stored import open_model

    checkpoint = open_model(folder)
    blocks = len(checkpoint.block_names())
    recipe_file = Path(recipe) if Path(recipe).is_file() else None
    _say_first(folder, model, out, resume)
    found: list[Quality] = []
    job = Job(parsed, text, tuple(edits or ()), folder, out, model, commit, recipe_file)
    try:
        with render.ApplyProgress(blocks, session.quiet) as progress:

            def listener(event: Event) -> None:
                progress(event)
                if isinstance(event, Measured):
                    found.append(event.quality)
                if session.interrupted:  # Python drops what a handler raises inside a destructor or a C callback
                    raise KeyboardInterrupt

            done = run_job(
                job, listener, resume=resume, overwrite=overwrite, statistics=statistics, memory=allowed, device=device,
                present=lambda folder: _report(folder, out),
            )  # fmt: skip
    except KeyboardInterrupt:
        options = {
            "--set": edits, "--memory": memory, "--statistics": statistics, "--revision": revision,
            "--device": device if device != "cpu" else None, "--fit": fit, "--for": reader, "--context": context,
            "--kv-share": kv_share,
        }  # fmt: skip
        again = _resuming([*command_line(), "apply", recipe, model, str(out)], options, overwrite)
        if not session.told and not session.follows:
            render.err.print(f"{interruption()}; nothing is lost, go on with: {again}", soft_wrap=True)
        session.told = True
        raise typer.Exit(130) from None
    if session.follows:
        return
    [quality], beyond, page = found, found[0].beyond(parsed.limits), out / REPORT
    _say_size(done, aim)
    if as_json:
        shown = str(page) if page.is_file() else None
        render.document(
            _plan_record(done) | {"out": str(out), "quality": quality.record(), "beyond": beyond, "report": shown}
        )
    else:
        _print_applied(done, model, out, quality, page)
    if beyond:
        _say_beyond(beyond, done, out, quality)
        raise typer.Exit(1)


def _say_beyond(beyond: str, done: Any, out: Path, quality: Any) -> None:
    """That an output is farther from the original than its recipe allows, and what to do."""
    from ..compress.quality import most_lost

    if quality.main is not None:
        beyond += f": {most_lost(done, out, quality.drift)}"
    render.err.say(
        f"{beyond}; {out} is written, but {'compress less' if quality.main else 'mend that'}, or say in the recipe "
        "that this is meant (limits)"
    )


def _aim(recipe: str, fit: str | None, reader: str | None, context: str | None, kv_share: float | None) -> Any:
    """What the recipe auto is to be made for; None for other recipes.

    Raises:
        RecipeError: options are missing, or of no use.
    """
    from ..runtime.errors import RecipeError

    given = {"--fit": fit, "--for": reader, "--context": context, "--kv-share": kv_share}
    if recipe != "auto" or Path(recipe).is_file():
        if idle := [option for option, value in given.items() if value is not None]:
            raise RecipeError(f"{idle[0]} is for the recipe auto: compressor apply auto MODEL OUT --fit 12GB")
        return None
    from ..compress.fit import READERS, Aim

    nbytes = bytes_of(fit, "--fit")
    if nbytes is None:
        raise RecipeError("auto makes a recipe for so many bytes: say how many, as in --fit 12GB")
    found = next((name for name in READERS if name == (reader or "transformers")), None)
    if found is None:
        raise RecipeError(f"--for {reader}: say one of {', '.join(READERS)}")
    return Aim(nbytes, found, tokens_of(context, "--context"), kv_share or 1.0)


def _read(
    recipe: str, edits: list[str] | None, aim: Any, model: str, revision: str | None, device: str
) -> tuple[str, Any, Path, str | None]:
    """The text of a recipe, what it says once edits are made, the model's folder, and its commit on the hub.

    Args:
        aim: what the recipe auto is made for; None for others.
    """
    if aim is None:
        return *read(recipe, edits), *model_folder(model, revision)
    folder, commit = model_folder(model, revision)

    from ..compress.fit import fitted
    from ..compress.guards import source_skeleton
    from ..compress.recipe import parse_recipe

    text = fitted(source_skeleton(folder, device), aim)
    return text, parse_recipe(text, "auto", tuple(edits or ())), folder, commit


def _say_size(plan: Any, aim: Any) -> None:
    """Where --set made an output larger than --fit allows."""
    from ..compress.fit import beyond

    if aim is not None and (said := beyond(plan, aim)):
        render.err.say(f"warning: {said}: the recipe auto was changed by --set")


def _say_first(folder: Path, model: str, out: Path, resume: bool) -> None:
    """What a person may not expect of a run."""
    if session.follows:
        return
    from ..calibrate.corpus import has_tokenizer
    from ..compress.journal import Journal

    if resume and out.name and not Journal(out).folder.is_dir() and not out.exists():
        render.err.say(f"there is nothing of {out} to go on with: the run starts from the beginning")
    if not has_tokenizer(folder):
        render.err.say(f"warning: {model} has no tokenizer, so {out} will have none: eval and run will need one")


def _report(folder: Path, out: Path) -> None:
    """Write the report of an output that will lie at OUT; without one, the output is no less finished."""
    try:
        from ..compress.report.page import write_report  # which imports what draws

        write_report(folder, shown=out)
    except Exception as error:
        render.err.say(f"warning: the report is not made ({error!r}); compressor report {out} tries again")


def _resuming(words: list[str], options: Mapping[str, Any], overwrite: bool) -> str:
    """The command that goes on with an interrupted run; options without a value are left out."""
    for option, value in options.items():
        values = value if isinstance(value, list) else [] if value is None else [value]
        words += [str(word) for one in values for word in (option, one)]
    return shlex.join([*words, *["--overwrite"] * overwrite, "--resume"])


def _print_applied(done: Any, model: str, out: Path, quality: Any, page: Path) -> None:
    """What was done, and what came of it."""
    from ..compress.plan import rows

    render.out.print(render.plan_table(rows(done)))
    ratio = done.bytes_before / done.bytes_after
    render.out.say(
        f"\n{out}: {human_size(done.bytes_before)} → {human_size(done.bytes_after)}, {ratio:.2f} × smaller; "
        f"format {done.format.name}, read by {render.readers(done)}"
    )
    _print_notes(done)
    render.out.say(quality.summary())
    if any(part.kind == "k_quant" for linear in done.linears.values() for part in linear.operator.inside()):
        command = shlex.join(["compressor", "export", str(out), f"{out}.gguf", "--format", "gguf", "--like"])
        render.out.print(f"for llama.cpp: {command} PLAIN, which its converter makes of {model} in 16 bits")
    if page.is_file():
        render.out.print(f"report: {page}")
    more = "" if done.recipe.data.source == "builtin" else " --samples 16 --data TEXT, a text that it was not made with"
    render.out.print(f"next: {shlex.join(['compressor', 'eval', str(out), '--against', model])}{more}")


def plan(
    recipe: RecipeArgument,
    model: PlannedArgument,
    edits: SetOption = None,
    memory: MemoryOption = None,
    device: DeviceOption = "cpu",
    revision: RevisionOption = None,
    fit: FitOption = None,
    reader: ForOption = None,
    context: ContextOption = None,
    kv_share: KvShareOption = None,
    as_json: JsonOption = False,
    tp: Annotated[
        int | None,
        typer.Option("--tp", min=2, help="also what keeps engines from sharing the output out among so many GPUs"),
    ] = None,
    predict: Annotated[
        bool,
        typer.Option(
            "--predict", help="also what the answers are expected to lose, by a walk back from the model's end: minutes"
        ),
    ] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="with --predict, the same for 2 to 8 bits in every pass that has integers")
    ] = False,
) -> None:
    """Print what RECIPE would do to MODEL; reads headers and calibration text, and weights where ranks
    depend on them alone or with --predict."""
    if sweep and not predict:
        raise RecipeError("--sweep goes with --predict")
    aim, allowed = _aim(recipe, fit, reader, context, kv_share), bytes_of(memory)
    with _headers(model, predict) as (model, alone):
        _, parsed, folder, _ = _read(recipe, edits, aim, model, revision, device)

        from ..compress.guards import source_skeleton
        from ..compress.parallel import unsplittable
        from ..compress.plan import make_plan, plan_for_text
        from ..compress.resources import estimated_seconds

        skeleton, text = source_skeleton(folder, device), None
        if alone:
            result = make_plan(parsed, skeleton, memory=allowed)
        else:
            result, text = plan_for_text(parsed, skeleton, look=True, memory=allowed)
    seconds, free = estimated_seconds(result), shutil.disk_usage(Path.cwd()).free
    apart = None if tp is None else unsplittable(result, tp)
    expected, widths = _predicted(result, text, sweep=sweep) if predict else (None, [])
    if as_json:
        lost = None if expected is None else {"kl": expected.kl, "passes": expected.passes, "unknown": expected.unknown}
        more = {
            "seconds": sum(seconds.values()),
            "seconds_of_parts": seconds,
            "disk_free": free,
            "unsplittable": apart,
            "predicted": lost,
        }
        at = {"widths": [asdict(row) for row in widths]} if sweep else {}
        render.document(_plan_record(result) | more | at)
        return
    _print_plan(result, device, seconds, free)
    if expected is not None:
        render.out.say(expected.told())
    if widths:
        render.out.print(render.widths_table(widths))
    for warning in result.warnings:
        render.err.say(f"warning: {warning}")
    _say_size(result, aim)
    if allowed is not None and result.memory > allowed:
        render.err.say(f"warning: apply would refuse: {human_size(allowed)} are less than that memory")
    for problem in apart or ():
        render.out.say(f"not over {tp} GPUs: {problem}")
    if apart == []:
        render.out.print(f"over {tp} GPUs: every part holds whole groups")
    if any(step.to_survey for step in result.recipe.passes):
        render.out.say("the run begins with a survey of the model, which finds the ranks, experts or weights to keep")


@contextmanager
def _headers(model: str, predict: bool) -> Iterator[tuple[str, bool]]:
    """A model whose headers can be read, and whether these are all that there is: of a config, those that it says."""
    if not (Path(model).is_file() and Path(model).suffix == ".json"):
        yield model, False
        return
    if predict:
        raise RecipeError("--predict runs the model, and a config alone has no weights")
    from tempfile import TemporaryDirectory

    from ..runtime.model.imagined import imagine

    with TemporaryDirectory(prefix="compressor-config-") as folder:
        imagine(Path(model), Path(folder))
        try:
            yield folder, True
        except CompressorError as error:  # what it names is there no more
            raise type(error)(str(error).replace(f"{folder}/config.json", model).replace(folder, model)) from None


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 10_000 else f"{seconds / 3600:,.0f} h"


def _print_plan(result: Any, device: str, seconds: dict[str, float], free: int) -> None:
    from ..compress.plan import rows

    render.out.print(render.plan_table(rows(result)))
    parts = ", ".join(f"{part} {_time(spent)}" for part, spent in seconds.items() if spent >= 0.5)
    render.out.say(
        f"\nweights {human_size(result.bytes_before)} → {human_size(result.bytes_after)} "
        f"({result.bytes_before / result.bytes_after:.2f} × smaller), format {result.format.name}, read by "
        f"{render.readers(result)}\nmemory {human_size(result.memory)} beyond the imports (on {device}), disk "
        f"{human_size(result.disk)} of {human_size(free)} free here (activations in it are deleted at the end), "
        f"roughly {_time(sum(seconds.values()))} with one process ({parts})"
    )
    _print_notes(result)
    data = result.recipe.data
    if result.needs:
        render.out.print(f"calibration: {data.tokens:,} tokens, in windows of {data.sequence_length}")


def _predicted(result: Any, text: Any, *, sweep: bool) -> tuple[Any, list[Any]]:
    """What a plan is expected to cost, and with integers of other widths; text is the calibration text, if a pass needs
    any."""
    from tempfile import TemporaryDirectory

    from ..compress.predict import at_widths, predicted
    from ..compress.surveys import read_calibration

    windows = (text or read_calibration(result.recipe, result.skeleton.checkpoint, least=1)).windows
    progress = render.ApplyProgress(2 * result.skeleton.blocks, session.quiet)
    with TemporaryDirectory(prefix="compressor-predict-", dir=Path.cwd()) as room, progress:
        asked = result, windows, Path(room), progress
        return at_widths(*asked) if sweep else (predicted(*asked), [])


def _plan_record(result: Any) -> dict[str, Any]:
    return {**result.record(), "memory": result.memory, "disk": result.disk, "warnings": list(result.warnings)}


def _print_notes(result: Any) -> None:
    """What a plan's table does not show: whole parts that go, and the KV cache, if a pass changes it."""
    for note in result.record()["notes"]:
        render.out.say(note)
    if result.kv_after != result.kv_before:
        render.out.print(render.cache_line(result.kv_before, result.kv_after, result.bytes_after))
    if result.left:
        render.out.say(
            f"{len(result.left)} matrices of blocks stay as they are, for their family does not name them: "
            f"{', '.join(result.left[:3])}{', …' if len(result.left) > 3 else ''}"
        )
