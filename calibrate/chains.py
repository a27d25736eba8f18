"""Calibration activations on disk: one file per chain and generation, of which only the rows in use are mapped.

Where several processes share a model (`runtime/processes.py`), each has files of its own, for its own samples.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..runtime import processes
from ..runtime.files import checksum, pieces_of, reserve, sync_folder, write_synced

BATCH_TOKENS = 4096  # tokens per micro-batch: enough to fill a GEMM, little enough to stay small beside a block


class Spill:
    """A tensor `[samples, tokens, width]` in a file, read and written a slice of samples at a time.

    A slice is mapped when it is taken and unmapped with its last reference, so that resident memory is the slice.

    Args:
        first: the sample with which the file begins.
    """

    def __init__(self, file: BinaryIO, shape: tuple[int, int, int], dtype: torch.dtype, first: int = 0) -> None:
        self.shape, self.dtype, self._file, self._first = shape, dtype, file, first
        self._row = shape[1] * shape[2] * dtype.itemsize

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        size = (stop - start) * self._row
        data = np.memmap(self._file, np.uint8, "r+", offset=(start - self._first) * self._row, shape=(size,))
        return torch.from_numpy(data).view(self.dtype).view(stop - start, *self.shape[1:])

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        self[rows].copy_(values)


class Chains:
    """Hidden states `[samples, tokens, hidden_size]` entering a block, for each chain in `names`.

    A generation is complete once `commit` returns: its files are synced, and the generation before may go.

    Attributes:
        own: samples that are this process's: whole micro-batches, the same as of one process, if there are enough.
    """

    dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(
        self, folder: Path, names: tuple[str, ...], shape: tuple[int, int, int], batch_tokens: int = BATCH_TOKENS
    ) -> None:
        self.folder, self.names, self.shape, self._tokens = folder, names, shape, batch_tokens
        self._process = f"-{processes.rank()}" if processes.size() > 1 else ""
        batches = -(-shape[0] // self.batch)
        self.own = processes.own(shape[0])
        if batches >= processes.size():
            part = processes.own(batches)
            self.own = range(part.start * self.batch, min(part.stop * self.batch, shape[0]))
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def batch(self) -> int:
        """Samples per micro-batch."""
        return max(1, self._tokens // self.shape[1])

    def batches(self) -> Iterator[slice]:
        """This process's samples, one micro-batch after the other."""
        for start in range(self.own.start, self.own.stop, self.batch):
            yield slice(start, min(start + self.batch, self.own.stop))

    def read(self, generation: int, name: str) -> Spill:
        return Spill(open(self._path(generation, name), "rb+"), self.shape, self.dtype, self.own.start)

    def create(self, generation: int, name: str) -> Spill:
        """A new generation's file, at its full size."""
        return self._new(self._path(generation, name), self.shape, self.dtype)

    def scratch(self, width: int, dtype: torch.dtype) -> Spill:
        """Room for `[samples, tokens, width]` that is gone with its last reference."""
        path = self.folder / f"scratch{self._process}"
        spill = self._new(path, (*self.shape[:2], width), dtype)
        path.unlink()
        return spill

    def exists(self, generation: int) -> bool:
        size, paths = self._nbytes(self.shape, self.dtype), [self._path(generation, name) for name in self.names]
        return all(processes.gathered(all(path.is_file() and path.stat().st_size == size for path in paths)))

    def checksums(self, generation: int) -> dict[str, str]:
        """Of a generation's files, by chain; of each process's."""
        mine = {name: checksum(pieces_of(self._path(generation, name))) for name in self.names}
        parts = processes.gathered(mine)
        return {name: " ".join(found[name] for found in parts) for name in self.names}

    def commit(self, generation: int) -> None:
        """Make durable what this process wrote."""
        for name in self.names:
            with open(self._path(generation, name), "rb+") as file:
                os.fsync(file.fileno())

    def advanced(self, generation: int) -> None:
        """Commit a generation and drop the one before, in a walk that has no journal; `reached` then knows of it."""
        self.commit(generation)
        found = self.checksums(generation)
        if processes.leads():
            write_synced(self.folder / "reached", json.dumps([generation, found]))
            sync_folder(self.folder)
        self.drop(generation - 1)

    @property
    def reached(self) -> int:
        """The generation from which an interrupted walk without a journal goes on; -1: none is there, or it was
        damaged."""
        generation, known = processes.once(self._recorded)
        whole = generation >= 0 and self.exists(generation) and self.checksums(generation) == known
        return generation if whole else -1

    def _recorded(self) -> tuple[int, dict[str, str]]:
        """What `advanced` left, or -1."""
        try:
            generation, checksums = json.loads((self.folder / "reached").read_text(encoding="utf-8"))
            return int(generation), dict(checksums)
        except (OSError, ValueError, TypeError):
            return -1, {}

    def drop(self, generation: int) -> None:
        """Delete a generation, once all processes know, and the first has recorded, that it is not wanted any more."""
        processes.wait()
        for name in self.names:
            self._path(generation, name).unlink(missing_ok=True)

    def _path(self, generation: int, name: str) -> Path:
        return self.folder / f"{generation:05d}.{name}{self._process}.f{8 * self.dtype.itemsize}"

    def _new(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> Spill:
        """A new file with room for this process's part of `[samples, ...]`."""
        file = open(path, "wb+")  # noqa: SIM115 (the spill keeps it)
        reserve(file, self._nbytes(shape, dtype))
        return Spill(file, shape, dtype, self.own.start)

    def _nbytes(self, shape: tuple[int, int, int], dtype: torch.dtype) -> int:
        return len(self.own) * math.prod(shape[1:]) * dtype.itemsize


def delete(folder: Path) -> None:
    """Delete a folder of chains, once no process reads them."""
    processes.wait()
    if processes.leads():
        shutil.rmtree(folder)
    processes.wait()


class Trail(Chains):
    """Chains of which every generation stays, for a walk back."""

    def advanced(self, generation: int) -> None:
        self.commit(generation)
        found = self.checksums(generation)
        if processes.leads():
            write_synced(self._sums(generation), json.dumps(found))
            sync_folder(self.folder)

    @property
    def reached(self) -> int:
        """The last generation up to which all are there and undamaged."""
        generation = 0
        while self._whole(generation):
            generation += 1
        return generation - 1

    def _whole(self, generation: int) -> bool:
        known = processes.once(partial(self._known, generation))
        return bool(known) and self.exists(generation) and self.checksums(generation) == known

    def _known(self, generation: int) -> dict[str, str]:
        """What `advanced` left of a generation; nothing where that, or it, is not there."""
        try:
            return dict(json.loads(self._sums(generation).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def _sums(self, generation: int) -> Path:
        return self.folder / f"{generation:05d}.sums"


class HalfTrail(Trail):
    """The same in bfloat16."""

    dtype = torch.bfloat16
