"""MODEL on the command line: a folder, or a Hugging Face hub id."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from .errors import ModelError

_PATTERNS = [
    "*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt",
    "LICENSE*", "NOTICE",
]  # fmt: skip
_NOT = ["consolidated*", "*/*"]  # the same weights over again, in their makers' own formats


def resolve_model(source: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The local folder of a model, and the commit when it came from the hub.

    A folder is used as it is, and of a GGUF file one that links to it. Anything shaped like `owner/name` is downloaded
    (or found in the cache; with `HF_HUB_OFFLINE=1` only the cache is looked at).

    Raises:
        ModelError: neither a folder nor a hub model that can be had.
    """
    path = Path(source)
    if path.is_dir():
        if revision:
            raise ModelError(f"{source}: is a folder, which has no revisions; leave --revision out")
        return path, None
    if path.is_file() and path.suffix == ".gguf":
        from .gguf_source import folder_of  # which imports torch

        return folder_of(path), None
    if path.is_file() and path.suffix == ".json":
        raise ModelError(
            f"{source}: is a config alone, of which plan says what it would come to, and no more can be done"
        )
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ModelError(f"{source}: no such model folder, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_NOT))
    except Exception as error:  # network, permission, not found: the hub's own words, first line
        first = str(error).strip().splitlines()[0]
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        close = get_close_matches(path.name, beside, 1)
        hint = f"; did you mean {path.with_name(close[0])}?" if close else ""
        raise ModelError(f"{source}: no such folder, and not to be had from the hub ({first}){hint}") from None
    return folder, folder.name


def upload(folder: Path, names: Sequence[str], repository: str, message: str, *, private: bool) -> str:
    """Put files of a folder, by their names in it, on the hub in one commit, and say where that is.

    Raises:
        ModelError: the hub does not take it: no network, no token, no permission.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ModelError(f"{repository}: is not of the form owner/name")
    try:
        hub = HfApi()
        hub.create_repo(repository, private=private, exist_ok=True)
        files = [CommitOperationAdd(name, folder / name) for name in names]
        commit = hub.create_commit(repository, files, commit_message=message)
    except Exception as error:  # the hub's own words, first line
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{repository}: not uploaded ({first}); `hf auth login` says who you are") from None
    return str(commit.commit_url)
