"""`compressor compare` and `sweep`: outputs, or what a recipe's options make of a model, beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..runtime.errors import human_size
from . import render
from .arguments import JsonOption, ModelArgument, RecipeArgument, check_files_to_write, model_folder
from .recipes import read

if TYPE_CHECKING:
    from ..compress.compare import Row

DataOption = Annotated[str, typer.Option(help="'builtin' (its evaluation split), or a .txt or .jsonl file")]
SamplesOption = Annotated[int, typer.Option(min=1, help="windows to measure on")]
LengthOption = Annotated[int, typer.Option(min=2, help="tokens of a window")]
HtmlOption = Annotated[Path | None, typer.Option("--html", help="a page to write: the table, and KL against bytes")]
PngOption = Annotated[Path | None, typer.Option("--png", help="a picture to write, of KL against bytes")]


def compare(
    base: Annotated[str, typer.Argument(help="the model that all came from: a folder, or a hub id")],
    outs: Annotated[list[str], typer.Argument(help="outputs, or other models of the same vocabulary")],
    data: DataOption = "builtin",
    samples: SamplesOption = 32,
    sequence_length: LengthOption = 512,
    html: HtmlOption = None,
    png: PngOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure OUTS beside BASE: bytes, KV cache, KL and perplexity, and which of them nothing beats."""
    check_files_to_write(html, png)
    sources = [base, *outs]
    folders = {_name(source, sources): model_folder(source)[0] for source in sources}
    if len(folders) < len(sources):
        from ..runtime.errors import RecipeError

        raise RecipeError("one of the models is named twice: name each once")

    from ..compress.baseline import Text
    from ..compress.compare import compared

    text = Text(source=data, samples=samples, sequence_length=sequence_length)
    found = []
    for row in compared(folders, text):
        found.append(row)
        render.err.print(f"{len(found)}/{len(folders)} {row[0]}: KL {row[1].kl_mean:.5f}")
    _show(found, f"{Path(base).name}: {len(outs)} outputs", html, png, as_json)


def sweep(
    recipe: RecipeArgument,
    model: ModelArgument,
    edits: Annotated[
        list[str], typer.Option("--set", help="path=[value,value,…] for what varies, path=value for what does not")
    ],
    work: Annotated[
        Path, typer.Option(help="folder that keeps all outputs; what is there already is not made again")
    ] = Path("sweep"),
    data: DataOption = "builtin",
    samples: SamplesOption = 32,
    sequence_length: LengthOption = 512,
    jobs: Annotated[
        int, typer.Option(min=1, help="recipes at a time, which share the processor; of 1 alone, calibration is shared")
    ] = 1,
    html: HtmlOption = None,
    png: PngOption = None,
    as_json: JsonOption = False,
) -> None:
    """Apply RECIPE to MODEL with every combination of options, and compare what comes out.

    What calibration finds of the model is found once, where the recipe lets it serve others: statistics of rtn and of
    sequential: false, of experts, and what bits: mixed asks of the model. A sweep that was interrupted goes on where it
    was, if it is started again with the same --work.
    """
    check_files_to_write(html, png)
    folder, _ = model_folder(model)

    from ..compress.baseline import Baseline, Text
    from ..compress.check import Case, run_cases
    from ..compress.compare import variations

    named = variations(edits)
    for _, own in named:
        read(recipe, list(own))
    text = Text(source=data, samples=samples, sequence_length=sequence_length)
    kept = work.absolute() / "statistics" if jobs == 1 else None
    cases = [Case(folder.resolve().name, model, recipe, own, text, statistics=kept) for _, own in named]
    names = {case: name for case, (name, _) in zip(cases, named, strict=True)}
    found: dict[str, Row] = {}
    failed = 0
    try:
        for outcome in run_cases(cases, Baseline(text=text), jobs, work):
            name = names[outcome.case]
            took = f"{outcome.seconds:.0f} s" if outcome.seconds else "kept"
            if outcome.figures is None:
                failed += 1
                render.err.print(f"{name}: failed: {outcome.reason}")
                continue
            found[name] = name, outcome.figures
            said = f"KL {outcome.figures.kl_mean:.5f}, {human_size(outcome.figures.bytes)} ({took})"
            render.err.print(f"{len(found) + failed}/{len(cases)} {name}: {said}")
    except KeyboardInterrupt:
        render.err.print(f"interrupted after {len(found)} of {len(cases)}; the same command goes on")
        raise typer.Exit(130) from None
    if found:
        rows = [found[name] for name, _ in named if name in found]
        _show(rows, f"{recipe} on {folder.name}", html, png, as_json)
        if not as_json:
            for case, name in names.items():
                if name in found:
                    render.out.print(f"{name}: {work / case.name / 'out'}")
    if failed:
        render.err.print(f"{failed} of {len(cases)} failed")
        raise typer.Exit(1)


def _name(source: str, sources: Sequence[str]) -> str:
    """A short name, where it is the only one of that name."""
    names = [Path(other).resolve().name for other in sources]
    own = Path(source).resolve().name
    return own if names.count(own) == 1 else source


def _show(rows: Sequence[Row], title: str, html: Path | None, png: Path | None, as_json: bool) -> None:
    from ..compress.compare import unbeaten

    best = unbeaten(rows, "bytes")
    if as_json:
        render.document([{"name": name, "unbeaten": name in best, **figures.model_dump()} for name, figures in rows])
    else:
        render.out.print(_table(rows, best))
        render.out.print("* nothing else here is as small and as good")
    if html is None and png is None:
        return
    from ..compress.report import comparison

    if html is not None:
        comparison.write_page(rows, title, html)
    if png is not None:
        comparison.write_picture(rows, png)


def _table(rows: Sequence[Row], best: set[str]) -> Table:
    lines = []
    for name, figures in rows:
        error = figures.kl_error
        noise = f"{error:.5f}" if error is not None and math.isfinite(error) else "–"
        lines.append((
            f"{'*' if name in best else ' '} {name}", f"{figures.kl_mean:.5f}", noise,
            f"{figures.perplexity_ratio:.4f}", human_size(figures.bytes), f"{figures.kv_bytes_per_token:,.0f}",
            figures.format,
        ))  # fmt: skip
    headings = ("", "KL", "± se", "perplexity ×", "weights", "KV B/token", "format")
    return render.table(headings, lines, spare=("format", "± se", "KV B/token"))
