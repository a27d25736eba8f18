"""`compressor check`: recipes against a committed baseline, for people and for continuous integration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from . import render
from .arguments import JsonOption, SetOption, check_files_to_write
from .session import session

if TYPE_CHECKING:
    from ..compress.baseline import Baseline, Figures
    from ..compress.check import Case, Outcome

_MEANS = {
    "failed": "failed", "worse": "worse", "other": "other than before", "better": "better than recorded",
    "new": "not in the baseline", "same": "as before",
}  # fmt: skip


def check(
    recipes: Annotated[
        list[str] | None, typer.Argument(help="recipes; default: those that the baseline has for the models")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="a model folder or hub id, may be repeated; default: all that the baseline names"),
    ] = None,
    baseline: Annotated[Path, typer.Option(help="the file to compare with")] = Path("baseline.json"),
    edits: SetOption = None,
    update: Annotated[bool, typer.Option("--update", help="write what has moved into the baseline")] = False,
    why: Annotated[str | None, typer.Option(help="with --update: the reason, which the baseline keeps")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="recipes at a time, which share the processor")] = 1,
    speed: Annotated[
        bool, typer.Option("--speed", help="time outputs beside their models, too; with --jobs 1 alone")
    ] = False,
    work: Annotated[
        Path | None, typer.Option(help="folder that keeps outputs; what has not changed is not done again")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="a file to write, as test reports are in JUnit's XML")] = None,
    markdown: Annotated[Path | None, typer.Option(help="a file to write, as a comment for a pull request")] = None,
    as_json: JsonOption = False,
) -> None:
    """Apply recipes, measure what comes out, and compare with a baseline.

    Exits with 1 where something is worse, and where something is better that nobody has recorded (--update).
    """
    from ..runtime.errors import RecipeError

    if update != bool(why and why.strip()):
        raise RecipeError("--update and --why TEXT go together: the baseline keeps the reason of a change")
    if speed and jobs > 1:
        raise RecipeError("--speed would time what runs beside, too: leave --jobs out")

    from ..compress.baseline import Baseline
    from ..compress.check import record, run_cases, text_of

    check_files_to_write(baseline, junit, markdown)
    if not baseline.exists() and not update:
        raise RecipeError(f"--baseline {baseline}: no such file; --update --why TEXT makes it")
    expected = Baseline.read(baseline) if baseline.exists() else Baseline()
    cases = _cases(expected, recipes or [], model or [], tuple(edits or ()), speed)
    text = text_of(expected.text).sha256
    if update:
        _refuse_part(expected, cases, text, baseline)
    outcomes = []
    try:
        for outcome in run_cases(cases, expected, jobs, work):
            outcomes.append(outcome)
            took = f"{outcome.seconds:.0f} s" if outcome.seconds else "kept"
            render.err.print(f"{len(outcomes)}/{len(cases)} {outcome.case}: {_MEANS[outcome.verdict]} ({took})")
    except KeyboardInterrupt:
        kept = "those that were done are kept" if work else "with --work FOLDER, those that were done would be kept"
        session.told = True
        render.err.print(f"interrupted after {len(outcomes)} of {len(cases)}; {kept}")
        raise typer.Exit(130) from None
    outcomes.sort(key=lambda outcome: cases.index(outcome.case))
    failed = [outcome for outcome in outcomes if outcome.verdict != "same"]
    if update:
        _update(expected, outcomes, text, str(why), baseline)
        failed = [outcome for outcome in failed if outcome.figures is None]
    if as_json:
        render.document({"baseline": str(baseline), "updated": update, "cases": [record(one) for one in outcomes]})
    else:
        render.out.print(_table(outcomes))
        for outcome in outcomes:
            if outcome.verdict != "same" and not (update and outcome.verdict == "new"):
                render.out.print(": ".join(filter(None, (str(outcome.case), _MEANS[outcome.verdict], outcome.said))))
    _for_machines(outcomes, junit, markdown)
    if failed:
        render.err.print(_advice(failed, baseline))
        raise typer.Exit(1)


def _cases(
    baseline: Baseline, recipes: Sequence[str], models: Sequence[str], edits: tuple[str, ...], speed: bool
) -> list[Case]:
    """What to run: of each model the recipes asked for, or all that the baseline has."""
    from ..compress.check import Case
    from ..compress.recipe import parse_recipe, read_recipe
    from ..runtime.errors import RecipeError
    from ..runtime.hub import resolve_model

    named = {source: Path(source).resolve().name if Path(source).is_dir() else source for source in models}
    if len(set(named.values())) < len(named):
        raise RecipeError(
            f"--model: two of {', '.join(named)} have one name, by which a baseline knows them; rename one"
        )
    sources = {name: source for source, name in named.items()}
    sources = sources or {name: entry.source for name, entry in baseline.models.items()}
    if not sources:
        raise RecipeError("the baseline names no model: give one by --model")
    cases = []
    for name, source in sources.items():
        resolve_model(source, None)
        known = baseline.models[name].recipes if name in baseline.models else {}
        for recipe in recipes or known:
            label, text = read_recipe(recipe)
            own = edits or (known[recipe].edits if recipe in known else ())
            parse_recipe(text, label, own)
            cases.append(Case(name, source, recipe, own, baseline.text, speed))
    if not cases:
        raise RecipeError("the baseline has no recipe for that model: name recipes to run")
    return cases


def _refuse_part(baseline: Baseline, cases: Sequence[Case], text: str, path: Path) -> None:
    """
    Raises:
        RecipeError: entries that are left as they are would be of another text than those that are written.
    """
    from ..runtime.errors import RecipeError

    left = {(name, recipe) for name, entry in baseline.models.items() for recipe in entry.recipes}
    if text != baseline.text.sha256 and left - {(case.model, case.recipe) for case in cases}:
        raise RecipeError(
            f"{path}: its figures are of another text than the one here, so that all have to be measured again: run "
            "check --update without RECIPES or --model"
        )


def _update(baseline: Baseline, outcomes: Sequence[Outcome], text: str, why: str, path: Path) -> None:
    """Write what has moved, and what was not measured before; nothing where the text is another one and a case failed,
    which would be of the old one."""
    from datetime import datetime, timezone
    from importlib.metadata import version

    from ..compress.baseline import Entry, Update, updated
    from ..runtime.hub import resolve_model
    from ..runtime.stored import open_model

    measured = [outcome for outcome in outcomes if outcome.figures is not None]
    other = text != baseline.text.sha256
    if other and baseline.models and len(measured) < len(outcomes):
        render.err.print(f"{path}: left as it is, for the text is another one and not all could be measured on it")
        return
    changes, said = {}, []
    for outcome in measured:
        case, figures = outcome.case, outcome.figures
        assert figures is not None
        known = baseline.models[case.model].recipes.get(case.recipe) if case.model in baseline.models else None
        as_before = outcome.verdict == "same" and not other
        if known is not None:
            full = known.figures.filled(figures)
            if as_before and full == known.figures:
                continue
            if as_before:
                figures = full
            elif known.edits == case.edits:  # speed may not have been asked for
                figures = figures.filled(known.figures)
        own = None if known is None else known.tolerances
        changes[case.model, case.recipe] = Entry(edits=case.edits, figures=figures, tolerances=own)
        said.append(f"{case}: {outcome.said or ('measured again' if outcome.verdict == 'same' else 'new')}")
    if not changes:
        return
    sources = {outcome.case.model: outcome.case.folder for outcome in measured}
    sizes = {name: open_model(resolve_model(source, None)[0]).nbytes for name, source in sources.items()}
    new = updated(baseline, changes, sources, sizes)
    date = datetime.now(timezone.utc).date().isoformat()
    entry = Update(date=date, compressor=version("compressor"), why=why, changed=tuple(said))
    spec = baseline.text.model_copy(update={"sha256": text})
    new.model_copy(update={"updates": (*baseline.updates, entry), "text": spec}).write(path)
    render.err.print(f"{path}: {len(changes)} entries written")


def _table(outcomes: Sequence[Outcome]) -> Table:
    lines = []
    timed = any(outcome.case.speed for outcome in outcomes)
    for outcome in outcomes:
        found = outcome.figures
        cells = ["–"] * (5 + timed)
        if found is not None:
            cells = [f"{found.kl_mean:.5f}", f"{found.kl_error or 0:.5f}", f"{found.perplexity_ratio:.4f}"]
            cells += [f"{found.bytes:,}", f"{found.kv_bytes_per_token:,.0f}"]
            cells += [_times(found)] if timed else []
        lines.append((str(outcome.case), *cells, _MEANS[outcome.verdict]))
    headings = ("model / recipe", "KL", "± se", "perplexity ×", "bytes", "KV bytes", *["time ×"][:timed], "verdict")
    return render.table(headings, lines, spare=("± se", "KV bytes", "perplexity ×"))


def _times(found: Figures) -> str:
    """Of a prompt and of each token after it, beside the model's."""
    return " / ".join("–" if time is None else f"{time:.2f}" for time in (found.prompt_time, found.decode_time))


def _advice(failed: Sequence[Outcome], baseline: Path) -> str:
    """What is wrong, and what to do about it."""
    count = {verdict: sum(outcome.verdict == verdict for outcome in failed) for verdict in _MEANS}
    bad = count["failed"] + count["worse"]
    parts = [f"{bad} worse or failed"] if bad else []
    parts += [f"{count[verdict]} {_MEANS[verdict]}" for verdict in ("other", "better", "new") if count[verdict]]
    return f"{', '.join(parts)}; if that is meant: compressor check --baseline {baseline} ... --update --why TEXT"


def _for_machines(outcomes: Sequence[Outcome], junit: Path | None, markdown: Path | None) -> None:
    """Files that were asked for; where GitHub runs this, its annotations and summary."""
    from . import ci

    if junit is not None:
        junit.write_text(ci.junit(outcomes), encoding="utf-8")
    said = ci.markdown(outcomes)
    if markdown is not None:
        markdown.write_text(said, encoding="utf-8")
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in ci.github(outcomes):
            render.err.print(line)
        if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
            with open(summary, "a", encoding="utf-8") as file:
                file.write(said)
