"""A compressed model folder: what `apply` wrote (or another tool's compressed-tensors integers), decoded on demand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import operators
from .checkpoint import Checkpoint, TensorInfo
from .errors import ModelError
from .operators import Operator, stored_name

NATIVE_TYPE, NATIVE_VERSION = "compressor", 1


class StoredModel(Checkpoint):
    """A compressed folder that reads like the plain one it came from.

    `config` is the original model's and `tensors` / `tensor` speak of decoded weights, so whatever runs a plain
    checkpoint runs this one too; `operator` gives what really lies on disk.

    Attributes:
        stored: name → header of the tensors on disk.
        schemes: name of a compressed linear → its scheme, as `operators.from_tensors` takes it.
        format: `compressed-tensors` or `compressor`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.stored = dict(self.stored)
        try:
            self.format, self.schemes = _read_schemes(self.path, self.config, self.stored)
        except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
            raise ModelError(
                f"{self.path}/config.json: its description of the compressed weights is damaged ({error!r})"
            ) from None
        self.config = _original_config(self.config)
        self._suffixes = _suffixes(self.schemes, self.stored)
        for name in self.schemes:
            shape = self.outline(name).shape
            owned = [stored_name(name, suffix) for suffix in self._suffixes[name]]
            file = next(self.stored[part].file for part in owned)
            dtype = next(info.dtype for part in owned if (info := self.stored[part]).dtype.is_floating_point)
            for part in owned:
                self.tensors.pop(part, None)
            self.tensors[name + ".weight"] = TensorInfo(file, dtype, shape)

    def outline(self, name: str) -> Operator:
        """The compressed linear `name` on `meta`: shapes and schemes without values.

        Raises:
            ModelError: a tensor of it is missing or has another shape.
        """
        parts: dict[str, Tensor] = {}
        for suffix in self._suffixes[name]:
            info = self.stored[stored_name(name, suffix)]
            parts[suffix] = torch.empty(info.shape, dtype=info.dtype, device="meta")
            if suffix.endswith("weight_shape"):  # the one tensor whose values are a shape
                parts[suffix] = self.stored_tensor(stored_name(name, suffix))
        try:
            operator = operators.from_tensors(parts, self.schemes[name])
            assert operator.shape
            return operator
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            found = ", ".join(parts) or "nothing"
            raise ModelError(f"{self.path}: {name} is not whole ({error}); it has {found}") from None

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.stored.values())

    def operator(self, name: str) -> Operator:
        """The linear `name` (without `.weight`) as it is stored."""
        if name not in self.schemes:
            return operators.Dense(self.stored_tensor(name + ".weight"))
        return operators.from_tensors(self.parts(name), self.schemes[name])

    def parts(self, name: str) -> dict[str, Tensor]:
        """The stored tensors of a compressed linear by suffix."""
        return {suffix: self.stored_tensor(stored_name(name, suffix)) for suffix in self._suffixes[name]}

    def tensor(self, name: str) -> Tensor:
        """A tensor by its original name, decoded where it is compressed."""
        linear = name.removesuffix(".weight")
        if name.endswith(".weight") and linear in self.schemes:
            return self.operator(linear).dense(self.tensors[name].dtype)
        return super().tensor(name)


def open_model(path: Path) -> Checkpoint:
    """Any model folder this package can run: plain, or compressed by it."""
    checkpoint = Checkpoint(path)
    if "quantization_config" in checkpoint.config or checkpoint.config.get("model_type") == NATIVE_TYPE:
        return StoredModel(path)
    return checkpoint


def _read_schemes(
    path: Path, config: Mapping[str, Any], stored: Iterable[str]
) -> tuple[str, dict[str, dict[str, Any]]]:
    if config.get("model_type") == NATIVE_TYPE:
        native = config.get("compressor", {})
        if native.get("version") != NATIVE_VERSION:
            raise ModelError(
                f"{path}: format version {native.get('version')}, but this release reads {NATIVE_VERSION}; "
                "upgrade compressor"
            )
        return NATIVE_TYPE, {
            name: {key: value for key, value in entry.items() if key != "targets"}
            for entry in native["operators"]
            for name in entry["targets"]
        }
    quantization = config.get("quantization_config", {})
    if quantization.get("quant_method") != "compressed-tensors" or quantization.get("format") != "pack-quantized":
        method = quantization.get("format") or quantization.get("quant_method")
        raise ModelError(f"{path}: quantized as {method!r}, which is not read here; only pack-quantized integers are")
    targets = [
        (target, group["weights"]) for group in quantization["config_groups"].values() for target in group["targets"]
    ]
    literal = dict(reversed(targets))
    patterns = [(re.compile(target[3:]), weights) for target, weights in targets if target.startswith("re:")]
    schemes = {}
    for name in (key.removesuffix(".weight_packed") for key in stored if key.endswith(".weight_packed")):
        matched = (weights for pattern, weights in patterns if pattern.match(name))
        weights = literal.get(name) or next(matched, None) or literal.get("Linear")
        if weights is None or weights.get("type", "int") != "int":
            raise ModelError(f"{path}: no integer config group targets {name}")
        schemes[name] = {
            "kind": "int",
            "bits": weights["num_bits"],
            "group_size": weights.get("group_size") or -1,
            "symmetric": weights.get("symmetric", True),
        }
    return "compressed-tensors", schemes


def _suffixes(schemes: Mapping[str, Mapping[str, Any]], stored: Iterable[str]) -> dict[str, list[str]]:
    """For each compressed linear, the suffixes of its stored tensors (`operators.stored_name`)."""
    found: dict[str, list[str]] = {name: [] for name in schemes}
    prefixes: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        for prefix in operators.shared_prefixes(scheme):
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


def _original_config(config: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("quantization_config", "compressor")
    original = {key: value for key, value in config.items() if key not in left_out}
    if "base_model_type" in original:
        original["model_type"] = original.pop("base_model_type")
        original["architectures"] = original.pop("base_architectures", None)
    return original
