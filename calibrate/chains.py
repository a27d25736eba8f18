"""Calibration activations on disk: one file per chain and generation, of which only the rows in use are mapped.

Where several processes share a model (`runtime/processes.py`), each writes its own samples of the same files.
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

    @property
    def own(self) -> range:
        """Samples that are this process's: whole micro-batches, the same as of one process, if there are enough."""
        samples, batches = self.shape[0], -(-self.shape[0] // self.batch)
        if batches < processes.size():
            return processes.own(samples)
        part = processes.own(batches)
        return range(part.start * self.batch, min(part.stop * self.batch, samples))

    def batches(self) -> Iterator[slice]:
        """This process's samples, one micro-batch after the other."""
        for start in range(self.own.start, self.own.stop, self.batch):
            yield slice(start, min(start + self.batch, self.own.stop))

    def read(self, generation: int, name: str) -> Spill:
        return Spill(open(self._path(generation, name), "rb+"), self.shape, self.dtype)

    def create(self, generation: int, name: str) -> Spill:
        """A new generation's file, at its full size, for all processes."""
        path = self._path(generation, name)
        if processes.leads():
            _reserved(path, _nbytes(self.shape, self.dtype)).close()
        processes.wait()
        return self.read(generation, name)

    def scratch(self, width: int, dtype: torch.dtype) -> Spill:
        """Room for this process's part of `[samples, tokens, width]` that is gone with its last reference."""
        path, shape = self.folder / f"scratch-{processes.rank()}", (*self.shape[:2], width)
        file = _reserved(path, _nbytes((len(self.own), *shape[1:]), dtype))
        path.unlink()
        return Spill(file, shape, dtype, self.own.start)

    def exists(self, generation: int) -> bool:
        size = _nbytes(self.shape, self.dtype)
        return all(p.is_file() and p.stat().st_size == size for p in (self._path(generation, n) for n in self.names))

    def checksums(self, generation: int) -> dict[str, str]:
        """Of a generation's files, by chain; of each process's part, where there are several."""
        row = _nbytes(self.shape, self.dtype) // self.shape[0]
        part = self.own.start * row, len(self.own) * row
        mine = {name: checksum(pieces_of(self._path(generation, name), *part)) for name in self.names}
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
        return generation if generation >= 0 and self.checksums(generation) == known else -1

    def _recorded(self) -> tuple[int, dict[str, str]]:
        """What `advanced` left, or -1."""
        try:
            generation, checksums = json.loads((self.folder / "reached").read_text(encoding="utf-8"))
            return (int(generation), dict(checksums)) if self.exists(generation) else (-1, {})
        except (OSError, ValueError, TypeError):
            return -1, {}

    def drop(self, generation: int) -> None:
        """Delete a generation that no process reads any more."""
        for name in self.names if processes.leads() else ():
            self._path(generation, name).unlink(missing_ok=True)

    def _path(self, generation: int, name: str) -> Path:
        return self.folder / f"{generation:05d}.{name}.f{8 * self.dtype.itemsize}"


def delete(folder: Path) -> None:
    """Delete a folder of chains, once no process reads them."""
    processes.wait()
    if processes.leads():
        shutil.rmtree(folder)
    processes.wait()


def _nbytes(shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _reserved(path: Path, size: int) -> BinaryIO:
    """A new file of so many bytes."""
    file = open(path, "wb+")  # noqa: SIM115 (the caller keeps it)
    reserve(file, size)
    return file


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
        while (known := processes.once(partial(self._known, generation))) and self.checksums(generation) == known:
            generation += 1
        return generation - 1

    def _known(self, generation: int) -> dict[str, str]:
        """What `advanced` left of a generation; nothing where that, or it, is not there."""
        try:
            known = dict(json.loads(self._sums(generation).read_text(encoding="utf-8")))
            return known if self.exists(generation) else {}
        except (OSError, ValueError, TypeError):
            return {}

    def _sums(self, generation: int) -> Path:
        return self.folder / f"{generation:05d}.sums"


class HalfTrail(Trail):
    """The same in bfloat16."""

    dtype = torch.bfloat16
