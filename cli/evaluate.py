"""`compressor eval`: how good a model is, and how far from another one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import render
from .arguments import JsonOption, ModelArgument, model_folder


def evaluate_command(
    model: ModelArgument,
    against: Annotated[str | None, typer.Option(help="the model to compare with")] = None,
    data: Annotated[str, typer.Option(help="'builtin' (its evaluation split), or a .txt or .jsonl file")] = "builtin",
    samples: Annotated[int, typer.Option(min=1, help="windows; all of the text if it has fewer")] = 128,
    sequence_length: Annotated[int, typer.Option(min=2, help="tokens of a window")] = 512,
    long: Annotated[
        int | None, typer.Option(min=128, help="also windows of this length: perplexity by position, and retrieval")
    ] = None,
    max_ppl_ratio: Annotated[float | None, typer.Option(help="exit with 1 if the ratio to --against is higher")] = None,
    out: Annotated[Path | None, typer.Option(help="a file to write all figures to, as JSON")] = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of MODEL, in float32 and as it runs, and how far it is from another model."""
    from ..runtime.errors import RecipeError, ResourceError

    if max_ppl_ratio is not None and against is None:
        raise RecipeError("--max-ppl-ratio compares with another model: name it with --against")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ResourceError(f"--out {out}: is no file in a folder that is there; name one")
    folder, _ = model_folder(model, None)
    other = None if against is None else model_folder(against, None)[0]

    from ..compress.evaluate import EvaluationJob, run_evaluation

    job = EvaluationJob(folder, other, data, samples, sequence_length, long)
    found = run_evaluation(job, lambda windows: render.reading(windows, sequence_length, long))
    record = {"model": model, "base": against, **found.record()}
    if out is not None:
        render.document(record, out)
    if as_json:
        render.document(record)
    else:
        render.evaluation(model, folder, found)
    if max_ppl_ratio is not None and found.exact.against and not found.exact.against.perplexity_ratio <= max_ppl_ratio:
        render.err.print(f"the perplexity ratio {found.exact.against.perplexity_ratio:.5f} is above {max_ppl_ratio}")
        raise typer.Exit(1)
