"""`compressor`: the commands. torch is imported inside them, once recipe and model are found, so that help and errors
come at once."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime.errors import human_size
from . import render
from .arguments import (
    DeviceOption,
    FolderArgument,
    JsonOption,
    MemoryOption,
    ModelArgument,
    OverwriteOption,
    RecipeArgument,
    RevisionOption,
    SetOption,
    bytes_of,
)
from .check import check
from .recipes import read, recipes_app

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Compress language models: one recipe, composable passes, a checkpoint that runs.",
    epilog="Exit codes: 0 done, 1 the answer is no, 2 could not run, 130 interrupted and resumable.",
)  # fmt: skip
app.add_typer(recipes_app, name="recipes")
app.command()(check)

_state = {"debug": False, "quiet": False, "interrupted": False}


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        render.out.print(f"compressor {version('compressor')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and stop", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress")] = False,
) -> None:
    _state.update(debug=debug, quiet=quiet)


@app.command()
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
    as_json: JsonOption = False,
) -> None:
    """Compress MODEL by RECIPE into OUT."""
    if dry_run:
        plan(recipe, model, edits, memory, device, revision, as_json)
        return
    text, parsed = read(recipe, edits)
    folder, commit = _model(model, revision)
    allowed = bytes_of(memory)

    from ..calibrate.corpus import has_tokenizer
    from ..compress.apply import Job
    from ..compress.apply import apply as run_job
    from ..compress.events import Event, Measured
    from ..compress.quality import Quality, most_lost
    from ..runtime.model.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    blocks = len(checkpoint.block_names())
    recipe_file = Path(recipe) if Path(recipe).is_file() else None
    if not has_tokenizer(folder):
        render.err.print(f"warning: {model} has no tokenizer, so {out} will have none: eval and run will need one")
    found: list[Quality] = []
    job = Job(parsed, text, tuple(edits or ()), folder, out, model, commit, recipe_file)
    try:
        with render.ApplyProgress(blocks, _state["quiet"]) as progress:

            def listener(event: Event) -> None:
                progress(event)
                if isinstance(event, Measured):
                    found.append(event.quality)
                if _state["interrupted"]:  # Python drops what a handler raises inside a destructor or a C callback
                    raise KeyboardInterrupt

            done = run_job(
                job, listener, resume=resume, overwrite=overwrite, statistics=statistics, memory=allowed, device=device
            )  # fmt: skip
    except KeyboardInterrupt:
        words = ["compressor", "apply", recipe, model, str(out)]
        for option, values in (
            ("--set", edits or []),
            ("--memory", [memory] if memory else []),
            ("--statistics", [str(statistics)] if statistics else []),
            ("--device", [device] if device != "cpu" else []),
            ("--revision", [revision] if revision else []),
        ):
            words += [word for value in values for word in (option, value)]
        words += ["--overwrite"] * overwrite + ["--resume"]
        render.err.print(f"interrupted; nothing is lost, go on with: {shlex.join(words)}", soft_wrap=True)
        raise typer.Exit(130) from None
    [quality], beyond = found, found[0].beyond(parsed.limits)
    if as_json:
        render.document(_plan_record(done) | {"out": str(out), "quality": quality.record(), "beyond": beyond})
    else:
        _print_applied(done, model, out, quality)
    if beyond:
        if quality.main is not None:
            beyond += f": {most_lost(done, out, quality.drift)}"
        render.err.print(
            f"{beyond}; {out} is written, but {'compress less' if quality.main else 'mend that'}, or say in the recipe "
            "that this is meant (limits)"
        )
        raise typer.Exit(1)


def _print_applied(done: Any, model: str, out: Path, quality: Any) -> None:
    """What was done, and what came of it."""
    from ..compress.plan import rows

    render.out.print(render.plan_table(rows(done)))
    ratio = done.bytes_before / done.bytes_after
    render.out.print(
        f"\n{out}: {human_size(done.bytes_before)} → {human_size(done.bytes_after)}, {ratio:.2f} × smaller; "
        f"format {done.format.name}, read by {render.readers(done)}"
    )
    _print_notes(done)
    render.out.print(quality.summary())
    if any(part.kind == "k_quant" for linear in done.linears.values() for part in linear.operator.inside()):
        render.out.print(
            f"for llama.cpp: compressor export {out} {out}.gguf --format gguf --like PLAIN, which its converter makes "
            f"of {model} in 16 bits"
        )
    render.out.print(f"next: compressor eval {out} --against {model}")


@app.command()
def plan(
    recipe: RecipeArgument,
    model: ModelArgument,
    edits: SetOption = None,
    memory: MemoryOption = None,
    device: DeviceOption = "cpu",
    revision: RevisionOption = None,
    as_json: JsonOption = False,
    tp: Annotated[
        int | None,
        typer.Option("--tp", min=2, help="also what keeps engines from sharing the output out among so many GPUs"),
    ] = None,
) -> None:
    """Print what RECIPE would do to MODEL; reads headers and calibration text, and weights where ranks
    depend on them alone."""
    _, parsed = read(recipe, edits)
    folder, _ = _model(model, revision)
    allowed = bytes_of(memory)

    from ..compress.guards import source_skeleton
    from ..compress.parallel import unsplittable
    from ..compress.plan import plan_for_text, rows
    from ..compress.resources import estimated_seconds

    result, _ = plan_for_text(parsed, source_skeleton(folder, device), look=True, memory=allowed)
    seconds, free = estimated_seconds(result), shutil.disk_usage(Path.cwd()).free
    apart = None if tp is None else unsplittable(result, tp)
    if as_json:
        render.document(_plan_record(result) | {"seconds": seconds, "disk_free": free, "unsplittable": apart})
        return
    render.out.print(render.plan_table(rows(result)))
    render.out.print(
        f"\nweights {human_size(result.bytes_before)} → {human_size(result.bytes_after)} "
        f"({result.bytes_before / result.bytes_after:.2f} × smaller), format {result.format.name}, read by "
        f"{render.readers(result)}\nmemory {human_size(result.memory)} beyond the imports (on {device}), disk "
        f"{human_size(result.disk)} of {human_size(free)} free here (activations in it are deleted at the end), "
        f"roughly {seconds:.0f} s"
    )
    _print_notes(result)
    data = result.recipe.data
    if result.needs:
        render.out.print(f"calibration: {data.tokens:,} tokens, in windows of {data.sequence_length}")
    for warning in result.warnings:
        render.err.print(f"warning: {warning}")
    for problem in apart or ():
        render.out.print(f"not over {tp} GPUs: {problem}")
    if apart == []:
        render.out.print(f"over {tp} GPUs: every part holds whole groups")
    if any(step.to_survey for step in result.recipe.passes):
        render.out.print("the run begins with a survey of the model, which finds the ranks, experts or weights to keep")


@app.command()
def inspect(
    model: ModelArgument,
    tensors: Annotated[str | None, typer.Option(help="list the tensors whose names match this glob")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a model folder, plain or compressed, consists of."""
    import fnmatch

    from ..runtime.errors import ModelError

    folder, _ = _model(model, None)

    from ..runtime.stored import StoredModel, open_model

    opened = open_model(folder)
    record: dict[str, Any] = {
        "model_type": opened.config.get("model_type"),
        "blocks": len(opened.block_names()),
        "parameters": opened.parameters,
        "bytes": opened.nbytes,
        "format": "plain",
    }
    if isinstance(opened, StoredModel):
        kinds: dict[str, int] = {}
        for name in opened.schemes:
            label = opened.outline(name).description
            kinds[label] = kinds.get(label, 0) + 1
        record |= {"format": opened.format.name, "linears stored as": kinds}
    if tensors is not None:
        found = {
            name: {"dtype": str(info.dtype).removeprefix("torch."), "shape": list(info.shape), "file": info.file}
            for name, info in opened.stored.items()
            if fnmatch.fnmatchcase(name, tensors)
        }
        if not found:
            raise ModelError(f"{model}: no tensor matches {tensors}; names look like {next(iter(opened.stored))}")
        record["tensors"] = found
    if as_json:
        render.document(record)
        return
    for key, value in record.items():
        if isinstance(value, dict):
            render.out.print(f"{key}:")
            for name, detail in value.items():
                words = detail.values() if isinstance(detail, dict) else [detail]
                render.out.print(f"  {name}: {'  '.join(map(str, words))}")
        else:
            render.out.print(f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}")


@app.command("eval")
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
    folder, _ = _model(model, None)
    other = None if against is None else _model(against, None)[0]

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


@app.command()
def verify(folder: FolderArgument, as_json: JsonOption = False) -> None:
    """Check that FOLDER is what its manifest says, decodes and runs."""
    from ..compress.output.verify import verify as find_faults

    findings = find_faults(folder)
    if as_json:
        render.document({"folder": str(folder), "findings": findings})
    else:
        for line in findings:
            render.out.print(line)
        if not findings:
            render.out.print(f"{folder}: hashes, headers, weights and a run of every block are as they should be")
    if findings:
        raise typer.Exit(1)


@app.command()
def export(
    folder: FolderArgument,
    out: Annotated[Path, typer.Argument(help="the folder to write, or the file if it is one")],
    form: Annotated[
        str,
        typer.Option("--format", help="dense: plain weights that every tool reads; gguf: a file that llama.cpp runs"),
    ] = "dense",
    like: Annotated[
        Path | None,
        typer.Option(help="for gguf: a GGUF file of the same model in 16 bits, as llama.cpp's converter makes it"),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Decode FOLDER into another format."""
    from ..compress.output.gguf import export_gguf
    from ..compress.output.verify import export_dense
    from ..runtime.errors import RecipeError

    if form not in ("dense", "gguf"):
        raise RecipeError(f"--format {form}: only 'dense' and 'gguf' can be exported")
    if (like is None) == (form == "gguf"):
        raise RecipeError(
            "--format gguf and --like FILE.gguf go together: FILE is the same model in 16 bits, which llama.cpp makes "
            "by `convert_hf_to_gguf.py DENSE --outtype bf16` of what `compressor export OUT DENSE` writes"
        )
    more: dict[str, Any] = {}
    if like is not None:
        written = export_gguf(folder, out, like, overwrite=overwrite)
        size, more = written.size, {"tensors": written.kinds, "scales_rounded_by": written.rounded}
        kinds = ", ".join(f"{count} {kind}" for kind, count in written.kinds.items())
        said = f"a file for llama.cpp, {human_size(size)}: {kinds}"
        if written.rounded:
            said += f"; scales in half precision, which is off by {written.rounded:.1e} at most"
    else:
        export_dense(folder, out, overwrite=overwrite)
        size, said = sum(path.stat().st_size for path in out.glob("*.safetensors")), "a plain model folder"
        said += f", {human_size(size)}"
    if as_json:
        render.document({"out": str(out), "format": form, "bytes": size, **more})
    else:
        render.out.print(f"{out}: {said}")


@app.command()
def run(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="text to go on from")],
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens to generate")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token each time")] = 0.0,
    seed: Annotated[int, typer.Option(help="number that decides what is sampled")] = 0,
) -> None:
    """Generate text."""
    folder, _ = _model(model, None)

    import torch

    from ..calibrate.corpus import load_tokenizer
    from ..runtime.errors import RecipeError
    from ..runtime.loader import load

    tokenizer = load_tokenizer(folder)
    loaded: Any = load(folder)
    torch.manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(loaded.device)
    if not ids.numel():
        raise RecipeError("--prompt holds no token: give some text to go on from")
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    generated = loaded.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )  # fmt: skip
    print(tokenizer.decode(generated[0], skip_special_tokens=True))


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine offers and which kernels would be used."""
    from .doctor import examine

    record = examine()
    if as_json:
        render.document(record)
        return
    for key, value in record.items():
        render.out.print(f"{key}: {value}")


def _model(source: str, revision: str | None) -> tuple[Path, str | None]:
    from ..runtime.hub import resolve_model

    return resolve_model(source, revision)


def _plan_record(result: Any) -> dict[str, Any]:
    from dataclasses import asdict

    from ..compress.plan import rows

    return {
        "rows": [asdict(row) for row in rows(result)],
        "format": result.format.name,
        "readers": list(result.readers),
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "memory": result.memory,
        "disk": result.disk,
        "left": list(result.left),
        "warnings": list(result.warnings),
        "kv_bytes_per_token_before": result.kv_before,
        "kv_bytes_per_token_after": result.kv_after,
    }


def _print_notes(result: Any) -> None:
    """What a plan's table does not show: whole parts that go, and the KV cache, if a pass changes it."""
    for step in result.recipe.passes:
        if step.note:
            render.out.print(f"{step.kind}: {step.note}")
    if result.kv_after != result.kv_before:
        render.out.print(render.cache_line(result.kv_before, result.kv_after, result.bytes_after))
    if result.left:
        render.out.print(
            f"{len(result.left)} matrices of blocks stay as they are, for their family does not name them: "
            f"{', '.join(result.left[:3])}{', …' if len(result.left) > 3 else ''}"
        )


def _full_memory(error: Exception) -> str:
    """What to do about an error by which a device's memory is full; empty for others."""
    kind = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    if not isinstance(error, (kind, MemoryError)) and "can't allocate memory" not in str(error):
        return ""
    reason = ". ".join(str(error).splitlines()[0].split(". ")[:2]) if str(error) else "no room for more"
    return (
        f"the memory is full ({reason}); end other programs that use it, or ask for less at a time: windows of fewer "
        "tokens, a shorter prompt"
    )


def _interrupt(number: int, frame: object) -> None:
    _state["interrupted"] = True
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: errors that people can mend are one line and exit code 2."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    # A kernel is compiled and kept for every batch size, and experts see all of them: the default of 1024 is 400 MB.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
    try:
        app()
    except Exception as error:
        from ..runtime.errors import CompressorError

        if _state["debug"]:
            traceback.print_exc()
        elif isinstance(error, CompressorError):
            print(f"error: {error}", file=sys.stderr)
        elif full := _full_memory(error):
            print(f"error: {full}", file=sys.stderr)
        else:
            print(f"internal error: {error!r}; `compressor --debug ...` shows where, please report it", file=sys.stderr)
        sys.exit(2)
