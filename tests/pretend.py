"""A device that is not there: tensors on the CPU that refuse to meet those of another device, as a GPU's would."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from compressor.kernels import dispatch

DEVICE = torch.device("cuda", 0)
_MEET = {"copy_", "__setitem__", "__getitem__", "index", "to", "cpu", "set_", "is_set_to", "type_as", "index_put_"}
_LOOK = {
    "__get__",
    "dim",
    "size",
    "stride",
    "numel",
    "is_floating_point",
    "data_ptr",
    "untyped_storage",
    "element_size",
}


class PretendDevice(TorchFunctionMode):
    """Under it `cuda:0` exists. What is asked for on it is computed on the CPU and belongs to it."""

    def __init__(self) -> None:
        super().__init__()
        self._there: dict[int, StorageWeakRef] = {}

    @property
    def met(self) -> bool:
        """Whether anything ever was on it."""
        return bool(self._there)

    def holds(self, tensor: torch.Tensor) -> bool:
        storage = StorageWeakRef(tensor.untyped_storage())
        known = self._there.get(storage.cdata)
        return known is not None and not known.expired()

    def _claim(self, tensor: torch.Tensor) -> torch.Tensor:
        known = StorageWeakRef(tensor.untyped_storage())
        self._there[known.cdata] = known
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            real = func(*args)
            return DEVICE if real.type == "cpu" and self.holds(args[0]) else real
        if name in _LOOK or func is torch.device:
            return func(*args, **kwargs)
        wanted = [one for one in [*args, *kwargs.values()] if _is_place(one)]
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor) and not one.is_meta]
        there = [self.holds(one) for one in tensors]
        if wanted and torch.device(wanted[-1]).type == "meta":
            return func(*args, **kwargs)
        if name == "to" and len(args) > 1 and isinstance(args[1], torch.Tensor):
            wanted = [DEVICE if self.holds(args[1]) else "cpu"]
        if name == "cpu":
            return args[0].clone() if there[0] else args[0]
        if name == "numpy" and there[0]:
            raise RuntimeError("numpy() of a tensor on the device")
        here = [torch.device("cpu") if _is_place(one) else one for one in args]
        kwargs = {key: torch.device("cpu") if _is_place(one) else one for key, one in kwargs.items()}
        if name not in _MEET and len({place for one, place in zip(tensors, there, strict=True) if one.dim()}) > 1:
            shapes = [(tuple(one.shape), place) for one, place in zip(tensors, there, strict=True)]
            raise RuntimeError(f"{name} of tensors on two devices: {shapes}")
        writes = name.startswith("__i") or (name.endswith("_") and not name.endswith("__") and name not in _MEET)
        if writes and any(there) and not there[0]:
            raise RuntimeError(f"{name} of a tensor of the CPU with one of the device")
        target = torch.device(wanted[-1]).type == "cuda" if wanted else bool(there) and _first(name, there)
        result = func(*here, **kwargs)
        for one in tree_flatten(result)[0]:
            if not isinstance(one, torch.Tensor) or one.is_meta or self.holds(one) == target:
                continue
            if name == "to":
                moved = one.clone()
                return self._claim(moved) if target else moved
            if target:
                self._claim(one)
        return result


def _first(name: str, there: list[bool]) -> bool:
    return there[0] if name in _MEET else any(there)


def _is_place(one: Any) -> bool:
    return isinstance(one, torch.device) or (isinstance(one, str) and one.split(":")[0] in ("cpu", "cuda", "meta"))


@contextlib.contextmanager
def pretended() -> Iterator[PretendDevice]:
    """`cuda:0` for the time being, autocast included."""
    real = torch.autocast

    class Autocast(real):  # type: ignore[misc, valid-type]
        def __init__(self, device_type: str, *args: Any, **options: Any) -> None:
            super().__init__("cpu", *args, **options)

    generator = torch.Generator

    class Generator:
        def __new__(cls, device: Any = "cpu") -> Any:
            return generator()

    present = mock.patch.multiple(
        torch.cuda, is_available=lambda: True, device_count=lambda: 1, mem_get_info=lambda device: (10**12, 10**12)
    )
    capability = mock.patch.object(dispatch, "gpu_capability", return_value=dispatch.INTERPRETER)
    patched = mock.patch.multiple(torch, autocast=Autocast, Generator=Generator)
    with present, capability, patched, PretendDevice() as device:
        yield device
