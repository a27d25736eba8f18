"""Files that survive a crash once a call returns."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import ResourceError

PIECE = 1 << 22  # bytes of a file at a time
_PAGE = 4096  # bytes that are summed
_CHECKSUM = "checksum"  # in the metadata of files


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
    """Write a safetensors file, which is whole or not there, and says itself what its checksum is.

    Raises:
        ResourceError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    made = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(made, partial, {**metadata, _CHECKSUM: _saved_checksum(made, metadata)})
    except SafetensorError as error:  # not an OSError, whatever the reason
        raise ResourceError(
            f"{partial}: cannot be written ({error}); name another folder, or free some space"
        ) from None
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def read_saved(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, memory mapped, and metadata of a file that `save_synced` wrote; all of it is read.

    Raises:
        ValueError: it is not as it was written.
        SafetensorError, OSError: it cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata.pop(_CHECKSUM, "") != _saved_checksum(tensors, metadata):
        raise ValueError("it is not as it was written")
    return tensors, metadata


def _saved_checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    def pieces() -> Iterator[Any]:
        yield json.dumps(sorted(metadata.items())).encode()
        for name, tensor in sorted(tensors.items()):
            yield f"{name} {tensor.dtype} {list(tensor.shape)}".encode()
            data = raw_bytes(tensor)
            yield from (data[start : start + PIECE] for start in range(0, len(data), PIECE))

    return checksum(pieces())


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
        while chunk := file.read(PIECE):
            digest.update(chunk)
    return digest.hexdigest()


def checksum(pieces: Iterable[Any]) -> str:
    """The hash of the sums of all pages: it tells bytes that were damaged or never written, and takes no longer than
    reading them, where a hash of all bytes would take as long as a GPU does for a block.

    Args:
        pieces: bytes, or what has a buffer of them; the same bytes in other pieces have another checksum.
    """
    digest = hashlib.sha256()
    for piece in pieces:
        data = np.frombuffer(piece, np.uint8)
        whole = len(data) - len(data) % _PAGE
        digest.update(data[:whole].view(np.uint64).reshape(-1, _PAGE // 8).sum(1).tobytes())
        digest.update(data[whole:].tobytes())
    return digest.hexdigest()


def pieces_of(path: Path, start: int = 0, size: int | None = None) -> Iterator[bytes]:
    """A part of a file, or what there is of it, some megabytes at a time."""
    left = path.stat().st_size if size is None else size
    with open(path, "rb") as file:
        file.seek(start)
        while piece := file.read(min(PIECE, left)):
            yield piece
            left -= len(piece)


def raw_bytes(tensor: Tensor) -> np.ndarray:
    """What a tensor's numbers are in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
