"""Weight files written as blocks finish.

Every tensor's dtype and shape is known from the plan, so a shard's header is written first and each tensor goes to its
place: no copy of a shard is ever held, and what a finished block wrote is synced before the journal says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...runtime.errors import VerifyError
from ...runtime.files import PIECE, checksum, file_sha256, pieces_of, raw_bytes, reserve, sync_folder, write_synced
from ...runtime.model.checkpoint import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class ShardedWriter:
    """The weight files of one output, safetensors.

    Args:
        folder: where they go.
        tensors: name → (dtype, shape), in the order they are laid out.
        shard_bytes: largest file; a single larger tensor gets a file of its own.
    """

    def __init__(self, folder: Path, tensors: Specs, shard_bytes: int) -> None:
        self.folder = folder
        shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
        room = shard_bytes
        for name, (dtype, shape) in tensors.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            if size > room and shards[-1]:
                shards.append({})
                room = shard_bytes
            shards[-1][name] = (dtype, shape)
            room -= size
        self.weight_map: dict[str, str] = {}
        self._places: dict[str, tuple[Path, int, torch.dtype, tuple[int, ...]]] = {}
        self._headers: dict[Path, tuple[bytes, int]] = {}
        for number, shard in enumerate(shards, 1):
            several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._lay_out("model.safetensors" if len(shards) == 1 else several, shard)

    def _lay_out(self, file: str, shard: Specs) -> None:
        path = self.folder / file
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # Widest elements first keeps every tensor aligned to its element size.
        for name, (dtype, shape) in sorted(shard.items(), key=lambda item: -item[1][0].itemsize):
            size = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            self._places[name] = (path, offset, dtype, shape)
            self.weight_map[name] = file
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._headers[path] = (len(text).to_bytes(8, "little") + text, offset)

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(len(header) + size for header, size in self._headers.values())

    def start(self) -> None:
        """Create every file at its full size (a full disk is noticed now, where the file system can tell)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path, (header, size) in self._headers.items():
            with open(path, "wb") as file:
                file.write(header)
                file.flush()
                reserve(file, len(header) + size)
                os.fsync(file.fileno())
        sync_folder(self.folder)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in their places and sync the files they went to.

        Raises:
            VerifyError: a tensor is not what the plan said; nothing of it is written.
        """
        touched: dict[Path, list[str]] = {}
        for name, tensor in tensors.items():
            path, _, dtype, shape = self._places[name]
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise VerifyError(
                    f"{name}: planned {_NAMES[dtype]} {list(shape)}, made {_NAMES[tensor.dtype]} {list(tensor.shape)}"
                )
            touched.setdefault(path, []).append(name)
        for path, names in touched.items():
            base = len(self._headers[path][0])
            with open(path, "rb+") as file:
                for name in names:
                    file.seek(base + self._places[name][1])
                    file.write(raw_bytes(tensors[name]).data)
                file.flush()
                os.fsync(file.fileno())

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor's place in its file has exactly its bytes; a few megabytes are read at a time."""
        path, offset, _, _ = self._places[name]
        expected = memoryview(raw_bytes(tensor).data)
        with open(path, "rb") as file:
            file.seek(len(self._headers[path][0]) + offset)
            starts = range(0, len(expected), PIECE)
            return all(file.read(len(part)) == part for part in (expected[s : s + PIECE] for s in starts))

    def written_by(self, block_index: Callable[[str], int | None], blocks: int) -> dict[int, list[str]]:
        """Block → the tensors that come with it; -1 for what is in none of the first `blocks`."""
        found: dict[int, list[str]] = {block: [] for block in range(-1, blocks)}
        for name in self.weight_map:
            index = block_index(name)
            found[-1 if index is None or index >= blocks else index].append(name)
        return found

    def finished_by(self, written: Mapping[int, Iterable[str]]) -> dict[int, list[str]]:
        """Block → the files whose last tensor comes with it.

        Args:
            written: as of `written_by`.
        """
        last = {self.weight_map[name]: block for block, names in written.items() for name in names}
        found: dict[int, list[str]] = {block: [] for block in written}
        for file, block in last.items():
            found[block].append(file)
        return found

    def checksum(self, names: Iterable[str]) -> str:
        """Of what lies in the places of some tensors."""

        def pieces() -> Iterator[bytes]:
            for name in names:
                path, offset, dtype, shape = self._places[name]
                size = torch.Size(shape).numel() * dtype.itemsize
                yield from pieces_of(path, len(self._headers[path][0]) + offset, size)

        return checksum(pieces())

    def laid_out(self) -> bool:
        """Whether every file is there, with its header and at its full size."""
        for path, (header, size) in self._headers.items():
            if not path.is_file() or path.stat().st_size != len(header) + size:
                return False
            if b"".join(pieces_of(path, 0, len(header))) != header:
                return False
        return True

    def hashes(self, files: Iterable[str]) -> dict[str, str]:
        """File name → sha256."""
        return {file: file_sha256(self.folder / file) for file in files}

    def write_index(self) -> None:
        """Write the index where there are several files."""
        if len(self._headers) > 1:
            total = sum(size for _, size in self._headers.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self.weight_map.items()))}
            write_synced(self.folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
