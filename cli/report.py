"""`compressor report`: what an output is and how it came about, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import render
from .arguments import FolderArgument, check_files_to_write, model_folder

PROMPTS = 3  # beginnings of windows of the evaluation text, that both models go on from
PROMPT, ANSWER = 48, 64  # tokens


def report(
    folder: FolderArgument,
    against: Annotated[
        str | None, typer.Option(help="the model it came from: measured beside it, and what both write is shown")
    ] = None,
    data: Annotated[
        str, typer.Option(help="with --against, 'builtin' (its evaluation split), or a .txt or .jsonl file")
    ] = "builtin",
    samples: Annotated[int, typer.Option(min=1, help="with --against, windows of 512 tokens to measure on")] = 32,
    out: Annotated[Path | None, typer.Option(help="the file to write; default: report/report.html in FOLDER")] = None,
) -> None:
    """Write what FOLDER is, what was lost, where and why, as one HTML page that needs nothing else."""
    from ..compress.report.page import write_report

    check_files_to_write(out)
    more: dict[str, Any] = {}
    if against is not None:
        from ..compress.evaluate import EvaluationJob, run_evaluation
        from ..compress.report.samples import written

        base, _ = model_folder(against)
        job = EvaluationJob(folder, base, (data,), samples)
        found = run_evaluation(job, lambda windows: render.reading(windows, job.sequence_length, None))
        more["found"] = found[data]
        more["samples"] = written(folder, base, data, PROMPTS, PROMPT, ANSWER)
    render.out.print(str(write_report(folder, out, **more)))
