"""What is refused before any work: devices and folders that are not there, or are in the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..runtime.errors import ResourceError
from ..runtime.model.skeleton import Skeleton, calibration_dtype
from ..runtime.stored import open_model


def source_skeleton(model: Path, device: str) -> Skeleton:
    """The model to compress, plain or stored in a form that is read here, and the device where its blocks are to run.

    Raises:
        ModelError: the folder is damaged, or in a format that is not read here.
        ResourceError: the device is not there.
    """
    check_device(device)
    checkpoint = open_model(model)
    return Skeleton(checkpoint, calibration_dtype(checkpoint, device), device)


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind, index = device, 0
    if kind not in ("cpu", "cuda"):
        raise ResourceError(f"--device {device}: is not cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ResourceError(f"--device {device}: torch {torch.__version__} finds no GPU here; leave the option out")
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise ResourceError(f"--device {device}: there are {torch.cuda.device_count()} GPUs here, numbered from 0")


def check_output(out: Path, *, resume: bool, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse an output folder that is in the way, before any work; `inputs` may not lie in what would be replaced."""
    if out.is_symlink():
        raise ResourceError(f"{out}: is a symbolic link; name the folder itself")
    if not out.name or out.is_mount() or out.absolute() == Path.cwd():
        raise ResourceError(f"{out}: cannot be replaced by a finished folder; name a new folder in it")
    if out.exists() and not out.is_dir():
        raise ResourceError(f"{out}: a file of that name exists; choose another output folder")
    for path in inputs:
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise ResourceError(f"{out}: holds {path}, which is read; choose another output folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    a_model = any((out / name).is_file() for name in ("compressor.json", "config.json"))
    if not (overwrite or resume):
        hint = " or add --overwrite" if a_model else ""
        raise ResourceError(f"{out}: not empty; choose another output folder{hint}")
    if overwrite and not a_model:
        raise ResourceError(f"{out}: is not a model folder, which --overwrite replaces; choose another output")
