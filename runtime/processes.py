"""Several processes at work on one model (`torchrun`): every one runs the same program, and here is what they share.

A process reads its own part of the calibration text; sums are added up over all; jobs that are independent of each
other are dealt out, and everybody gets their results. The first process, which leads, is the only one that writes what
more than one would write. All of it does nothing where there is one process.
"""

from __future__ import annotations

import copyreg
import io
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ResourceError, first_line

T = TypeVar("T")
_FAILED = "compressor/failed"  # in the store that all processes reach: why one of them ended
_MEETING = timedelta(minutes=5)  # in which all processes have to be there
_PATIENCE = timedelta(days=30)  # a process may solve for hours while others wait; one that ends is noticed at once
_ALIGNED = 16  # bytes: where a tensor of any dtype can begin
_group: Any = None  # of processes that work together, if they do
_alone = False


class PeerLost(ResourceError):
    """Another process of the run has ended."""


def size() -> int:
    """How many processes are at work together."""
    return dist.get_world_size() if _group is not None and not _alone else 1


def rank() -> int:
    """The number of this one among them, from 0."""
    return dist.get_rank() if _group is not None and not _alone else 0


def leads() -> bool:
    """Whether this is the one that writes."""
    return rank() == 0


def beside() -> int:
    """How many of them share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if size() > 1 else 1


@contextmanager
def joined(device: str = "cpu") -> Iterator[None]:
    """Inside, the processes that `torchrun` started work together.

    Args:
        device: of the blocks; of GPUs, each process on a machine takes its own.

    Raises:
        ResourceError: a machine has fewer GPUs than processes, or they do not come together.
    """
    global _group
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    gpu = torch.device(device).type == "cuda"
    if gpu:
        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        if torch.device(device).index is not None:
            raise ResourceError(f"--device {device}: several processes take a GPU each; say cuda")
        if local >= torch.cuda.device_count():
            raise ResourceError(f"there are {torch.cuda.device_count()} GPUs here for more processes than that")
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=_MEETING)
        _group = dist.new_group(timeout=_PATIENCE)
    except RuntimeError as error:
        raise ResourceError(f"the processes do not come together ({first_line(error)})") from None
    yield
    _group = None
    dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works as if there were no others."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def once(make: Callable[[], T]) -> T:
    """What the leading process makes, on its own, while the others wait for it."""
    if size() == 1:
        return make()
    found = None
    if leads():
        with alone():
            found = make()
    return shared(found)


def shared(value: T | None) -> T:
    """The leading process's value."""
    return _broadcast(value, 0) if size() > 1 else value  # type: ignore[return-value]


def gathered(value: T) -> list[T]:
    """Every process's value, by its number."""
    return [_broadcast(value, number) for number in range(size())] if size() > 1 else [value]


def wait() -> None:
    """Go on once every process is here."""
    if size() > 1:
        with _noticing():
            dist.barrier(_group)


def summed(values: Tensor) -> Tensor:
    """The sum of every process's tensor, in its place; the same bits in all of them."""
    return _reduced(values, "SUM")


def largest(values: Tensor) -> Tensor:
    """The same with the largest numbers."""
    return _reduced(values, "MAX")


def own(count: int) -> range:
    """Of so many things in a row, those that are this process's."""
    number, processes = rank(), size()
    return range(count * number // processes, count * (number + 1) // processes)


def spread(jobs: Sequence[Callable[[], T]], costs: Sequence[float], *, divisible: bool = False) -> list[T]:
    """The results of jobs that are independent of each other, each done by one process on its own.

    Args:
        costs: what each takes, in any unit.
        divisible: whether jobs deal out parts of themselves, where they are not done by one process on its own: then
            all processes do one after the other together where not each can have one.
    """
    if size() == 1 or (divisible and len(jobs) < size()):
        return [job() for job in jobs]
    owners = dealt(costs, size())
    with alone():
        mine = {number: jobs[number]() for number, owner in enumerate(owners) if owner == dist.get_rank()}
    found = gathered(mine)
    return [found[owner][number] for number, owner in enumerate(owners)]


def dealt(costs: Sequence[float], count: int) -> list[int]:
    """Which of so many processes does each job: the longest first, to whoever has least to do."""
    load, owners = [0.0] * count, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        owners[number] = min(range(count), key=load.__getitem__)
        load[owners[number]] += costs[number]
    return owners


def reason() -> str:
    """Why another process ended, where it had time to say so."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.get(_FAILED).decode() if store.check([_FAILED]) else ""
    except (RuntimeError, ValueError):
        return ""


def tell(why: str) -> None:
    """Leave for the leading process why this one is about to end."""
    with suppress(RuntimeError, ValueError):
        dist.distributed_c10d._get_default_store().set(_FAILED, f"process {rank()}: {why}")


@contextmanager
def _noticing() -> Iterator[None]:
    """Say in a line that another process is gone.

    Raises:
        PeerLost: it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        why = reason() or "another process of this run has ended"
        raise PeerLost(f"{why}; what was done is kept: start all again with --resume") from None


def _reduced(values: Tensor, how: str) -> Tensor:
    if size() > 1:
        with _noticing():
            dist.all_reduce(values, getattr(dist.ReduceOp, how), _group)
    return values


def _broadcast(value: T, source: int) -> T:
    """One process's value; its own is not copied."""
    mine = source == rank()
    data, lengths = _packed(value) if mine else (torch.empty(0, dtype=torch.uint8), torch.empty(2, dtype=torch.int64))
    with _noticing():
        dist.broadcast(lengths, source, _group)
        if not mine:
            data = torch.empty(int(lengths[0]), dtype=torch.uint8)
        dist.broadcast(data, source, _group)
    return value if mine else _unpacked(data, int(lengths[1]))


def _packed(value: object) -> tuple[Tensor, Tensor]:
    """Bytes, and how many they are and of these those before the tensors; each tensor is copied once."""
    file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    pickler = pickle.Pickler(file, 5, buffer_callback=buffers.append)
    pickler.dispatch_table = copyreg.dispatch_table.copy()
    pickler.dispatch_table[Tensor] = _tensor_parts
    pickler.dispatch_table[torch.nn.Parameter] = _tensor_parts
    pickler.dump(value)
    tensors = [torch.from_numpy(np.asarray(buffer.raw())) for buffer in buffers]
    head = pickle.dumps((file.getvalue(), [len(tensor) for tensor in tensors]))
    parts = [torch.frombuffer(bytearray(head), dtype=torch.uint8), *tensors]
    total = sum(_aligned(len(part)) for part in parts)
    data, at = torch.empty(total, dtype=torch.uint8), 0
    for part in parts:
        data[at : at + len(part)] = part
        at += _aligned(len(part))
    return data, torch.tensor([total, len(head)])


def _unpacked(data: Tensor, head: int) -> Any:
    """The value, whose tensors lie in the bytes."""
    content, lengths = pickle.loads(data[:head].numpy().tobytes())
    buffers, at = list[Any](), _aligned(head)
    for length in lengths:
        buffers.append(data[at : at + length].numpy())
        at += _aligned(length)
    return pickle.loads(content, buffers=buffers)


def _aligned(length: int) -> int:
    return -(-length // _ALIGNED) * _ALIGNED


def _tensor_parts(tensor: Tensor) -> tuple[Any, ...]:
    """How to make a tensor again, of which there is no more than what it shows."""
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _tensor, (pickle.PickleBuffer(data), tensor.dtype, tuple(tensor.shape), tensor.device.type)


def _tensor(data: Any, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Tensor:
    flat = torch.frombuffer(data, dtype=dtype) if len(data) else torch.empty(0, dtype=dtype)
    return flat.view(shape).to(device)
