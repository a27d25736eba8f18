"""A compressed model folder: what `apply` wrote (or another tool's compressed-tensors integers), decoded on demand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import operators
from .checkpoint import Checkpoint, TensorInfo
from .errors import ModelError
from .operators import Operator

NATIVE_TYPE, NATIVE_VERSION = "compressor", 1
_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


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
        self.stored = dict(self.tensors)
        try:
            self.format, self.schemes = _read_schemes(self.path, self.config, self.stored)
        except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
            raise ModelError(
                f"{self.path}/config.json: its description of the compressed weights is damaged ({error!r})"
            ) from None
        self.config = _original_config(self.config)
        for name in self.schemes:
            parts = {part: self.tensors.pop(f"{name}.{part}", None) for part in _PARTS}
            scale = parts["weight_scale"]
            if scale is None or parts["weight_packed"] is None or parts["weight_shape"] is None:
                raise ModelError(f"{self.path}: {name} lacks one of {', '.join(_PARTS[:2])}, weight_shape")
            shape = tuple(int(n) for n in self.stored_tensor(f"{name}.weight_shape"))
            self.tensors[name + ".weight"] = TensorInfo(scale.file, scale.dtype, shape)

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
        return {part: self.stored_tensor(f"{name}.{part}") for part in _PARTS if f"{name}.{part}" in self.stored}

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


def _original_config(config: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("quantization_config", "compressor")
    original = {key: value for key, value in config.items() if key not in left_out}
    if "base_model_type" in original:
        original["model_type"] = original.pop("base_model_type")
        original["architectures"] = original.pop("base_architectures", None)
    return original
