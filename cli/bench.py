"""`compressor bench`: how fast a model reads and writes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..runtime.errors import human_size
from . import render
from .arguments import JsonOption, ModelArgument, model_folder

if TYPE_CHECKING:
    from ..compress.evaluate.speed import Speed, Work


def bench(
    model: ModelArgument,
    against: Annotated[str | None, typer.Option(help="the model to compare with, timed in turns with it")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="tokens of a prompt")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="tokens written after it")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="prompts side by side")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="how often each is timed, after one that does not count")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Time MODEL as it runs: tokens per second of a prompt and after it, first token, memory, and by which kernels."""
    names = [model, *([against] if against is not None else [])]
    folders: list[Path] = [model_folder(name)[0] for name in names]

    from ..compress.evaluate.speed import Work
    from ..compress.evaluate.speed import bench as time_models

    work = Work(batch, prompt, tokens)
    with render.progress("rounds", rounds + 1) as passed:
        found = time_models(folders, work, rounds, lambda _: passed(1))
    if as_json:
        render.document([{"model": name, **speed.record(work)} for name, speed in zip(names, found, strict=True)])
        return
    render.out.print(_table(names, found, work))
    for name, speed in zip(names, found, strict=True):
        for what, paths in speed.paths.items():
            said = ", ".join(f"{count} by {path}" for path, count in paths.items())
            render.out.print(f"linears of {name} for {what}: {said}")


def _table(names: Sequence[str], found: Sequence[Speed], work: Work) -> Table:
    measures = [
        (f"prompt of {work.prompt:,}, tokens/s", [speed.rates(work)["prompt"] for speed in found], "{:,.1f}"),
        ("each token after it, tokens/s", [speed.rates(work)["decode"] for speed in found], "{:,.1f}"),
        ("first token, ms", [[1000 * seconds for seconds in speed.first] for speed in found], "{:,.1f}"),
    ]
    lines = []
    for label, numbers, form in measures:
        middles = [statistics.median(each) for each in numbers]
        spreads = [_spread(each) for each in numbers]
        cells = (" ± ".join(map(form.format, both)) for both in zip(middles, spreads, strict=True))
        lines.append((label, *cells, *_ratio(middles)))
    memory = [float(speed.memory) for speed in found]
    lines.append(("memory beyond the imports", *(human_size(count) for count in memory), *_ratio(memory)))
    lines.append(("computes in", *(f"{speed.dtype} on {speed.device}" for speed in found), *([""] * (len(found) > 1))))
    short = [Path(name).name for name in names]
    return render.table(("", *(short if len(set(short)) == len(names) else names), *["ratio"][: len(found) - 1]), lines)


def _spread(numbers: Sequence[float]) -> float:
    """Half of what the middle half of rounds covers."""
    if len(numbers) < 2:
        return 0.0
    low, _, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return (high - low) / 2


def _ratio(numbers: Sequence[float]) -> list[str]:
    return [f"{numbers[0] / numbers[1]:.2f} ×"] if len(numbers) > 1 else []
