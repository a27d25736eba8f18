"""Is an output what its manifest says? And the way back to a plain folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..runtime.checkpoint import Checkpoint, non_finite
from ..runtime.errors import CompressorError, ResourceError, VerifyError
from ..runtime.skeleton import Skeleton
from ..runtime.stored import StoredModel, open_model
from .apply import check_output
from .folder import check_runs
from .writer import ShardedWriter, file_sha256, sync_folder, write_synced


def read_manifest(folder: Path) -> dict[str, Any]:
    """`compressor.json` of an output.

    Raises:
        VerifyError: there is none, or it is not readable.
    """
    path = folder / "compressor.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VerifyError(f"{folder}: no compressor.json; it was not written by compressor, or not finished") from None
    except (OSError, ValueError) as error:
        raise VerifyError(f"{path}: not readable ({error})") from None


def verify(folder: Path) -> list[str]:
    """What is wrong with an output, a line each; empty when all is well.

    Weight files against the manifest's hashes, headers against the config, decoded weights finite, and sixteen tokens
    run through every block.
    """
    manifest = read_manifest(folder)
    findings = []
    for name, sha256 in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            findings.append(f"{path}: missing")
        elif file_sha256(path) != sha256:
            findings.append(f"{path}: its hash is not the one in compressor.json; it was changed or damaged")
    if findings:
        return findings
    try:
        model = open_model(folder)
        findings += [f"{folder}: {name} decodes to NaN or infinity" for name in _bad_weights(model)]
        if not findings:
            check_runs(folder, Skeleton(model))
    except CompressorError as error:
        findings.append(str(error))
    return findings


def _bad_weights(model: Checkpoint) -> list[str]:
    return list(non_finite((name, model.tensor(name)) for name in model.tensors))


def export_dense(folder: Path, out: Path, *, overwrite: bool = False) -> None:
    """Decode an output to a plain folder that every tool reads, one tensor at a time.

    Raises:
        VerifyError: the folder is plain already.
        ResourceError: the output is in the way, or cannot be written.
    """
    check_output(out, resume=False, overwrite=overwrite)
    model = open_model(folder)
    if not isinstance(model, StoredModel):
        raise VerifyError(f"{folder}: nothing in it is compressed; copy the folder instead")
    work = out.with_name(out.name + ".work")
    shutil.rmtree(work, ignore_errors=True)
    try:
        specs = {name: (info.dtype, info.shape) for name, info in model.tensors.items()}
        writer = ShardedWriter(work, specs, 5 * 10**9)
        writer.start()
        for name in model.tensors:
            writer.write({name: model.tensor(name)})
        writer.finish()
        write_synced(work / "config.json", json.dumps(model.config, indent=2) + "\n")
        for path in model.side_files:
            shutil.copyfile(path, work / path.name)
        check_runs(work, Skeleton(model))
        if out.exists():
            shutil.rmtree(out)
        os.rename(work, out)
        sync_folder(out.parent)
    except OSError as error:
        raise ResourceError(f"{out}: cannot be written ({error.strerror}); choose another output") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
