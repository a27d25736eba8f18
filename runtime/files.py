"""Files that survive a crash once a call returns."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import ResourceError


def reserve(file: BinaryIO, size: int) -> None:
    """Give a file its full size now, so that a full disk is an error here and not a crash of a mapped write."""
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


def write_synced(path: Path, text: str) -> None:
    """Write a small text file; it is the old one or the new one at any moment."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def save_synced(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, which is whole or not there.

    Raises:
        ResourceError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, dict(metadata))
    except SafetensorError as error:  # not an OSError, whatever the reason
        raise ResourceError(
            f"{partial}: cannot be written ({error}); name another folder, or free some space"
        ) from None
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def copy_synced(source: Path, target: Path) -> None:
    """Copy a file's content."""
    shutil.copyfile(source, target)
    with open(target, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
