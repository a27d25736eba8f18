"""Calibration activations on disk: one file per chain and generation, of which only the rows in use are mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..runtime.files import checksum, pieces_of, reserve, sync_folder, write_synced

BATCH_TOKENS = 4096  # tokens per micro-batch: enough to fill a GEMM, little enough to stay small beside a block


class Spill:
    """A tensor `[samples, tokens, width]` in a file, read and written a slice of samples at a time.

    A slice is mapped when it is taken and unmapped with its last reference, so that resident memory is the slice.
    """

    def __init__(self, file: BinaryIO, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.shape, self.dtype, self._file = shape, dtype, file
        self._row = shape[1] * shape[2] * dtype.itemsize

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        size = (stop - start) * self._row
        data = np.memmap(self._file, np.uint8, "r+", offset=start * self._row, shape=(size,))
        return torch.from_numpy(data).view(self.dtype).view(stop - start, *self.shape[1:])

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        self[rows].copy_(values)


class Chains:
    """Hidden states `[samples, tokens, hidden_size]` entering a block, for each chain in `names`.

    A generation is complete once `commit` returns: its files are synced, and the generation before may go.
    """

    dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(
        self, folder: Path, names: tuple[str, ...], shape: tuple[int, int, int], batch_tokens: int = BATCH_TOKENS
    ) -> None:
        self.folder, self.names, self.shape, self._tokens = folder, names, shape, batch_tokens
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def batch(self) -> int:
        """Samples per micro-batch."""
        return max(1, self._tokens // self.shape[1])

    def batches(self) -> Iterator[slice]:
        """Samples of one micro-batch after the other."""
        for start in range(0, self.shape[0], self.batch):
            yield slice(start, start + self.batch)

    def read(self, generation: int, name: str) -> Spill:
        return Spill(open(self._path(generation, name), "rb+"), self.shape, self.dtype)

    def create(self, generation: int, name: str) -> Spill:
        """A new generation's file, at its full size."""
        return self._new(self._path(generation, name), self.shape, self.dtype)

    def scratch(self, width: int, dtype: torch.dtype) -> Spill:
        """Room for `[samples, tokens, width]` that is gone with its last reference."""
        path = self.folder / "scratch"
        spill = self._new(path, (*self.shape[:2], width), dtype)
        path.unlink()
        return spill

    def exists(self, generation: int) -> bool:
        size = self.dtype.itemsize * int(np.prod(self.shape))
        return all(p.is_file() and p.stat().st_size == size for p in (self._path(generation, n) for n in self.names))

    def checksums(self, generation: int) -> dict[str, str]:
        """Of a generation's files, by chain."""
        return {name: checksum(pieces_of(self._path(generation, name))) for name in self.names}

    def commit(self, generation: int) -> None:
        for name in self.names:
            with open(self._path(generation, name), "rb+") as file:
                os.fsync(file.fileno())

    def advanced(self, generation: int) -> None:
        """Commit a generation and drop the one before, in a walk that has no journal; `reached` then knows of it."""
        self.commit(generation)
        write_synced(self.folder / "reached", json.dumps([generation, self.checksums(generation)]))
        sync_folder(self.folder)
        self.drop(generation - 1)

    @property
    def reached(self) -> int:
        """The generation from which an interrupted walk without a journal goes on; -1: none is there, or it was
        damaged."""
        try:
            generation, checksums = json.loads((self.folder / "reached").read_text(encoding="utf-8"))
            whole = self.exists(generation) and self.checksums(generation) == checksums
        except (OSError, ValueError, TypeError):
            return -1
        return int(generation) if whole else -1

    def drop(self, generation: int) -> None:
        for name in self.names:
            self._path(generation, name).unlink(missing_ok=True)

    def _path(self, generation: int, name: str) -> Path:
        return self.folder / f"{generation:05d}.{name}.f{8 * self.dtype.itemsize}"

    def _new(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> Spill:
        file = open(path, "wb+")  # noqa: SIM115 (the spill keeps it)
        reserve(file, shape[0] * shape[1] * shape[2] * dtype.itemsize)
        return Spill(file, shape, dtype)


class Trail(Chains):
    """Chains of which every generation stays, for a walk back."""

    def advanced(self, generation: int) -> None:
        self.commit(generation)
        write_synced(self._sums(generation), json.dumps(self.checksums(generation)))
        sync_folder(self.folder)

    @property
    def reached(self) -> int:
        """The last generation up to which all are there and undamaged."""
        generation = 0
        while self._whole(generation):
            generation += 1
        return generation - 1

    def _whole(self, generation: int) -> bool:
        try:
            known = json.loads(self._sums(generation).read_text(encoding="utf-8"))
            return self.exists(generation) and self.checksums(generation) == known
        except (OSError, ValueError):
            return False

    def _sums(self, generation: int) -> Path:
        return self.folder / f"{generation:05d}.sums"


class HalfTrail(Trail):
    """The same in bfloat16."""

    dtype = torch.bfloat16
