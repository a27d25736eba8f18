"""Commands on a model folder: `inspect`, `verify` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime.errors import human_size
from . import render
from .arguments import FolderArgument, JsonOption, ModelArgument, OverwriteOption, model_folder


def inspect(
    model: ModelArgument,
    tensors: Annotated[str | None, typer.Option(help="list the tensors whose names match this glob")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a model folder, plain or compressed, consists of."""
    import fnmatch

    from ..runtime.errors import ModelError

    folder, _ = model_folder(model, None)

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
        if (folder / "compressor.json").is_file():
            from ..compress.output.verify import read_manifest

            record["read by"] = ", ".join(read_manifest(folder)["readers"])
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


def verify(folder: FolderArgument, as_json: JsonOption = False) -> None:
    """Check that FOLDER is what its manifest says, decodes and runs."""
    from ..compress.output.verify import verify as find_faults

    findings = find_faults(folder, render.track)
    if as_json:
        render.document({"folder": str(folder), "findings": findings})
    else:
        for line in findings:
            render.out.print(line)
        if not findings:
            render.out.print(f"{folder}: hashes, headers, weights and a run of every block are as they should be")
    if findings:
        raise typer.Exit(1)


def push(
    folder: FolderArgument,
    repository: Annotated[str, typer.Argument(help="owner/name on the hub; made if it is not there")],
    private: Annotated[bool, typer.Option("--private", help="if it is made, for its owner's eyes alone")] = False,
    message: Annotated[str, typer.Option(help="of the commit")] = "Upload a compressed model",
) -> None:
    """Upload an output to the Hugging Face hub, once it is what its manifest says, and nothing else that lies there."""
    from ..compress.output.folder import REPORT, TIMINGS
    from ..compress.output.verify import changed_files, read_manifest
    from ..runtime.errors import VerifyError
    from ..runtime.hub import upload

    if changed := changed_files(folder, render.track):
        raise VerifyError(changed[0])
    beside = [name for name in (TIMINGS, REPORT) if (folder / name).is_file()]
    names = [*read_manifest(folder)["files"], "compressor.json", *beside]
    render.out.print(upload(folder, names, repository, message, private=private))


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
        export_dense(folder, out, overwrite=overwrite, track=render.track)
        size, said = sum(path.stat().st_size for path in out.glob("*.safetensors")), "a plain model folder"
        said += f", {human_size(size)}"
    if as_json:
        render.document({"out": str(out), "format": form, "bytes": size, **more})
    else:
        render.out.print(f"{out}: {said}")
