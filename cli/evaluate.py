"""`compressor eval`: how good a model is, and how far from another one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import render
from .arguments import JsonOption, ModelArgument, check_files_to_write, model_folder


def evaluate_command(
    model: ModelArgument,
    against: Annotated[str | None, typer.Option(help="the model to compare with")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="'builtin' (its evaluation split, the default), or a .txt or .jsonl file; may be repeated, and the "
            "first counts for --max-ppl-ratio"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="windows; all of the text if it has fewer")] = 128,
    sequence_length: Annotated[int, typer.Option(min=2, help="tokens of a window")] = 512,
    long: Annotated[
        int | None, typer.Option(min=128, help="also windows of this length: perplexity by position, and retrieval")
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="with --long, ask a second question on the cache that answered a first")
    ] = False,
    choices: Annotated[
        Path | None,
        typer.Option(help="a .jsonl file of questions, {prompt, choices, answer}: is the right one likeliest?"),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="tasks of lm-evaluation-harness, as arc_easy,hellaswag (extra: tasks)")
    ] = None,
    task_path: Annotated[Path | None, typer.Option(help="with --tasks, a folder of tasks of your own")] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="with --tasks, questions of each; default: all")] = None,
    max_ppl_ratio: Annotated[float | None, typer.Option(help="exit with 1 if the ratio to --against is higher")] = None,
    out: Annotated[Path | None, typer.Option(help="a file to write all figures to, as JSON")] = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of MODEL, in float32 and as it runs, and how far it is from another model."""
    from ..runtime.errors import RecipeError

    if max_ppl_ratio is not None and against is None:
        raise RecipeError("--max-ppl-ratio compares with another model: name it with --against")
    if shared and long is None:
        raise RecipeError("--shared asks about a long text: name its length with --long")
    if tasks is None and (task_path is not None or task_limit is not None):
        raise RecipeError("--task-path and --task-limit are for --tasks: name some")
    check_files_to_write(out)
    folders = [model_folder(name)[0] for name in (model, against) if name is not None]

    from ..compress.evaluate import EvaluationJob, run_evaluation
    from ..compress.evaluate.tasks import read_questions

    questions = None if choices is None else read_questions(choices)
    texts = tuple(dict.fromkeys(data or ["builtin"]))
    job = EvaluationJob(folders[0], folders[1] if against else None, texts, samples, sequence_length, long, shared)
    calibrated = _calibrated_on(folders[0])
    found = run_evaluation(job, lambda windows: render.reading(windows, sequence_length, long))
    for text, one in found.items():
        if one.corpus_sha256 == calibrated:
            render.err.say(f"warning: {model} was calibrated on {text}, and may seem better there than it is")
    first, *rest = found.items()
    record: dict[str, Any] = {"model": model, "base": against, **first[1].record()}
    if rest:
        record["texts"] = {text: one.record() for text, one in found.items()}
    if questions is not None:
        record["choices"] = _answers(folders, questions)
    if tasks is not None:
        record["tasks"] = _tasks(folders, tasks.split(","), task_path, task_limit)
    if out is not None:
        render.document(record, out)
    if as_json:
        render.document(record)
    else:
        for text, one in found.items():
            if rest:
                render.out.print(f"{text}:")
            render.evaluation(model, folders[0], one)
        render.scores([name for name in (model, against) if name is not None], record)
    exact = first[1].exact.against
    if max_ppl_ratio is not None and exact and not exact.perplexity_ratio <= max_ppl_ratio:
        render.err.print(f"the perplexity ratio {exact.perplexity_ratio:.5f} is above {max_ppl_ratio}")
        raise typer.Exit(1)


def _calibrated_on(folder: Path) -> str | None:
    """The sha256 of the text that an output was calibrated on."""
    from ..compress.output.verify import read_manifest
    from ..runtime.errors import VerifyError

    try:
        corpus = read_manifest(folder).get("corpus")
    except VerifyError:  # there is none: nothing is known
        return None
    return corpus.get("sha256") if isinstance(corpus, dict) else None


def _answers(folders: list[Path], questions: list[Any]) -> list[dict[str, Any]]:
    """The score of each model."""
    from ..compress.evaluate.tasks import score

    with render.progress("questions", len(folders) * len(questions)) as passed:
        return [score(folder, questions, passed).record() for folder in folders]


def _tasks(folders: list[Path], tasks: list[str], include: Path | None, limit: int | None) -> list[dict[str, Any]]:
    from ..compress.evaluate.tasks import harness

    return [harness(folder, tasks, include, limit) for folder in folders]
