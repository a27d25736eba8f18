"""A compressed model folder: what `apply` wrote, or another tool in a format that is read here, decoded on demand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ModelError
from .formats import NATIVE, PLAIN, format_of
from .gguf_source import GgufModel, is_gguf
from .model.checkpoint import Checkpoint, TensorInfo
from .schemes import LOOKUPS, Operator, from_tensors, looked_up, shared_prefixes, stored_name


class StoredModel(Checkpoint):
    """A compressed folder that reads like the plain one it came from.

    `config` is the original model's and `tensors` / `tensor` speak of decoded weights, so whatever runs a plain
    checkpoint runs this one too; `operator` gives what really lies on disk.

    Attributes:
        stored: name → header of the tensors on disk.
        schemes: name of a compressed linear → its scheme, as `schemes.from_tensors` takes it.
        format: in which it is written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.stored = dict(self.stored)
        self.format = form = format_of(self.path, self.config)
        try:
            self.schemes = form.schemes(self.path, self.config, self.stored)
        except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
            raise ModelError(
                f"{self.path}/config.json: its description of the compressed weights is damaged ({error!r})"
            ) from None
        if not self.schemes:
            raise ModelError(f"{self.path}: config.json says that it is stored as {form.name}, but no linear of it is")
        self.config = form.original(self.config)
        self._suffixes = _suffixes(self.schemes, self.stored)
        self._outlines: dict[str, Operator] = {}
        form.check(self.path, self.schemes, self._suffixes, self.stored)
        outlines = {name: self.outline(name).shape for name in self.schemes}
        owned = {name: [stored_name(name, suffix) for suffix in self._suffixes[name]] for name in self.schemes}
        for part in (part for parts in owned.values() for part in parts):
            self.tensors.pop(part, None)
        for name, info in self.tensors.items():
            if info.dtype.is_floating_point and info.dtype.itemsize == 1:
                raise ModelError(f"{self.path}: {name} is of 8 bits, and its scale is missing; is the folder whole?")
        plain = any(info.dtype.is_floating_point for info in self.tensors.values())
        others = self.dtype if plain else torch.bfloat16
        for name, parts in owned.items():
            file = next(self.stored[part].file for part in parts)
            # Of scales for rows or groups; codes may be floats too, and so may what a whole matrix is scaled by.
            telling = (self.stored[part].dtype for part in parts if not part.endswith("global_scale"))
            wide = next((dtype for dtype in telling if dtype.is_floating_point and dtype.itemsize > 1), others)
            # Scales of other tools may be wider than what the model computes in.
            dtype = others if plain and wide.itemsize > others.itemsize else wide
            self.tensors[name + ".weight"] = TensorInfo(file, dtype, outlines[name])

    def outline(self, name: str) -> Operator:
        """The compressed linear `name` on `meta`: shapes and schemes without values.

        Raises:
            ModelError: a tensor of it is missing, or is not of the shape and dtype that the others go with.
        """
        if name not in self.schemes:
            return super().outline(name)
        parts: dict[str, Tensor] = {}
        for suffix in self._suffixes[name]:
            info = self.stored[stored_name(name, suffix)]
            parts[suffix] = torch.empty(info.shape, dtype=info.dtype, device="meta")
            if suffix.endswith(self.format.shapes):
                parts[suffix] = self.stored_tensor(stored_name(name, suffix))
        scheme = self.schemes[name]
        told = [
            (suffix, part.dtype, part.tolist() if suffix.endswith(self.format.shapes) else part.shape)
            for suffix, part in parts.items()
        ]
        key = repr((scheme, told))  # linears of all blocks are alike, and experts are many
        if key not in self._outlines:
            try:
                self._outlines[key] = self._checked(self.format.operator_tensors(parts, scheme), scheme)
            except (KeyError, IndexError, RuntimeError, ValueError, TypeError) as error:
                reason = str(error) if isinstance(error, (KeyError, ValueError)) else "its tensors do not go together"
                found = ", ".join(parts) or "nothing"
                raise ModelError(f"{self.path}: {name} is not whole ({reason}); it has {found}") from None
        return self._outlines[key]

    @staticmethod
    def _checked(tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> Operator:
        """An operator, of tensors that are those it would be written as.

        Raises:
            RuntimeError, ValueError: they are not, or do not go together.
        """
        operator = from_tensors(tensors, scheme)
        assert operator.dense().shape == operator.shape  # scales that do not fit cannot be multiplied
        for suffix, tensor in operator.to_tensors().items():
            found = tensors[suffix]
            if found.shape != tensor.shape or (found.dtype != tensor.dtype and not suffix.endswith("weight_shape")):
                kinds = [f"{str(one.dtype).removeprefix('torch.')} {list(one.shape)}" for one in (found, tensor)]
                raise ValueError(f"{suffix} is {kinds[0]}, the others go with {kinds[1]}")
        return operator

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.stored.values())

    @property
    def native(self) -> bool:
        return self.format is NATIVE

    def stored_bytes(self, name: str) -> int:
        linear = name.removesuffix(".weight")
        if not self.made(name):
            return super().stored_bytes(name)
        if any(suffix.startswith("/") for suffix in self._suffixes[linear]):  # of which others have a part
            return int(self.outline(linear).nbytes)
        return sum(self.stored[stored_name(linear, suffix)].nbytes for suffix in self._suffixes[linear])

    def made(self, name: str) -> bool:
        return name.endswith(".weight") and name.removesuffix(".weight") in self.schemes

    def operator(self, name: str) -> Operator:
        if name not in self.schemes:
            return super().operator(name)
        return from_tensors(self.operator_tensors(name), self.schemes[name])

    def operator_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a compressed linear as its operator has them, by suffix."""
        stored = {suffix: self.stored_tensor(stored_name(name, suffix)) for suffix in self._suffixes[name]}
        try:
            return self.format.operator_tensors(stored, self.schemes[name])
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError) as error:
            raise ModelError(f"{self.path}: {name} cannot be decoded: {error}") from None

    def tensor(self, name: str) -> Tensor:
        """A tensor by its original name, decoded where it is compressed."""
        if not self.made(name):
            return super().tensor(name)
        return self.operator(name.removesuffix(".weight")).dense(self.tensors[name].dtype)

    def by_rows(self, name: str) -> bool:
        return self.schemes.get(name.removesuffix(".weight"), {}).get("kind") in LOOKUPS

    def rows(self, name: str, which: Tensor) -> Tensor:
        """Some rows of a matrix, no more of which is decoded where its form can be looked up."""
        if not self.by_rows(name):
            return super().rows(name, which)
        linear = name.removesuffix(".weight")
        found: Tensor = looked_up(self.operator_tensors(linear), self.schemes[linear])(which, torch.float32)
        return found


def open_model(path: Path) -> Checkpoint:
    """Any model folder this package can run: plain, or compressed by it.

    Raises:
        ModelError: it is damaged, or in a format that is not read here.
    """
    if is_gguf(path):
        return GgufModel(path)
    checkpoint = Checkpoint(path)
    return checkpoint if format_of(path, checkpoint.config) is PLAIN else StoredModel(path)


def _suffixes(schemes: Mapping[str, Mapping[str, Any]], stored: Iterable[str]) -> dict[str, list[str]]:
    """For each compressed linear, the suffixes of its stored tensors (`schemes.stored_name`)."""
    found: dict[str, list[str]] = {name: [] for name in schemes}
    prefixes: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        for prefix in shared_prefixes(scheme):
            prefixes.setdefault(prefix, []).append(name)
    for key in stored:
        parts = key.split(".")
        for end in range(len(parts) - 1, 0, -1):
            start = ".".join(parts[:end])
            if start in found and key != f"{start}.bias":
                found[start].append(key.removeprefix(start + "."))
            for name in prefixes.get(start, ()):
                found[name].append("/" + key)
    return found
