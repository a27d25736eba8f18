"""Is an output what its manifest says? And the way back to a plain folder."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from ...runtime.errors import CompressorError, ResourceError, VerifyError
from ...runtime.files import copy_synced, file_sha256, sync_folder, write_synced
from ...runtime.model.checkpoint import Checkpoint, non_finite
from ...runtime.model.disk_experts import fuse
from ...runtime.stored import StoredModel, open_model
from ..guards import check_output
from .folder import Track, check_runs, untracked
from .writer import ShardedWriter

# What readers look for beside the weights that they know.
_READ = frozenset({".safetensors", ".json", ".bin", ".jinja", ".model", ".txt", ".py"})


def read_manifest(folder: Path) -> dict[str, Any]:
    """`compressor.json` of an output.

    Raises:
        VerifyError: there is none, or it is not readable.
    """
    path = folder / "compressor.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
            raise ValueError("no 'files' object")
        return manifest
    except FileNotFoundError:
        if not folder.is_dir():
            raise VerifyError(f"{folder}: no such folder") from None
        raise VerifyError(f"{folder}: no compressor.json; it was not written by compressor, or not finished") from None
    except (OSError, ValueError, RecursionError) as error:
        raise VerifyError(f"{path}: not readable ({error})") from None


def verify(folder: Path, track: Track = untracked) -> list[str]:
    """What is wrong with an output, a line each; empty when all is well.

    Files against the manifest's hashes, files that it does not name, headers against the config, decoded weights, which
    have to be finite, and sixteen tokens run through every block.
    """
    if findings := changed_files(folder, track):
        return findings
    try:
        model = open_model(folder)
        findings += [f"{folder}: {name} decodes to NaN or infinity" for name in _bad_weights(model, track)]
        if not findings:
            check_runs(folder, model, track)
    except CompressorError as error:
        findings.append(str(error))
    return findings


def check_files(folder: Path, track: Track = untracked) -> None:
    """
    Raises:
        VerifyError: the folder is an output of ours, and its files are not those of its manifest.
    """
    if (folder / "compressor.json").is_file() and (changed := changed_files(folder, track)):
        raise VerifyError(changed[0])


def changed_files(folder: Path, track: Track = untracked) -> list[str]:
    """Files of an output that are not what its manifest says, or not in it though readers look for them, a line each.

    Raises:
        VerifyError: there is no manifest, or it is not readable.
    """
    findings, listed = [], read_manifest(folder)["files"]
    for name, sha256 in track("hashing files", list(listed.items())):
        path = folder / name
        if (
            Path(name).is_absolute() or ".." in Path(name).parts or not name.isprintable()
        ):  # but links to elsewhere are how hubs keep files
            raise VerifyError(f"{folder}/compressor.json: {name!r} is not a file of this folder")
        if not path.is_file():
            findings.append(f"{path}: missing")
        elif file_sha256(path) != sha256:
            findings.append(f"{path}: its hash is not the one in compressor.json; it was changed or damaged")
    for path in sorted(folder.rglob("*")):
        if path.suffix in _READ and path.relative_to(folder).as_posix() not in {*listed, "compressor.json"}:
            findings.append(f"{path}: is not in compressor.json, and readers may take it for a part of the model")
    return findings


def _bad_weights(model: Checkpoint, track: Track) -> list[str]:
    return list(non_finite((name, model.tensor(name)) for name in track("decoding tensors", list(model.tensors))))


def export_dense(folder: Path, out: Path, *, overwrite: bool = False, track: Track = untracked) -> None:
    """Decode an output to a plain folder that every tool reads, one tensor at a time.

    Raises:
        VerifyError: the folder is plain already, or not what its manifest says.
        ResourceError: the output is in the way, or cannot be written.
    """
    check_output(out, resume=False, overwrite=overwrite, inputs=[folder])
    model = open_model(folder)
    if not isinstance(model, StoredModel):
        raise VerifyError(f"{folder}: nothing in it is compressed; copy the folder instead")
    check_files(folder, track)
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=out.name + ".export-", dir=out.parent, ignore_cleanup_errors=True
        ) as room:
            work, replaced = Path(room) / "out", Path(room) / "replaced"
            _write_dense(model, work, track)
            if out.exists():
                os.rename(out, replaced)
            try:
                os.rename(work, out)
            except BaseException:
                if replaced.exists():
                    os.rename(replaced, out)
                raise
            sync_folder(out.parent)
    except OSError as error:
        raise ResourceError(f"{out}: cannot be written ({error.strerror}); choose another output") from None


def _write_dense(model: StoredModel, folder: Path, track: Track) -> None:
    empty = {n: torch.empty(info.shape, dtype=info.dtype, device="meta") for n, info in model.tensors.items()}
    fused = fuse(model.family, empty)
    writer = ShardedWriter(folder, {name: (t.dtype, tuple(t.shape)) for name, t in fused.items()}, 5 * 10**9)
    writer.start()
    together = model.block_names() if model.family.experts.fused else []
    alone = set(model.tensors).difference(*together)
    for names in track("decoding", [*together, *([name] for name in model.tensors if name in alone)]):
        writer.write(fuse(model.family, {name: model.tensor(name) for name in names}))
    writer.write_index()
    write_synced(folder / "config.json", json.dumps(model.config, indent=2) + "\n")
    for path in model.side_files:
        copy_synced(path, folder / path.name)
    check_runs(folder, model, track)
