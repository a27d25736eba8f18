"""A compressed model folder: what `apply` wrote (or another tool's compressed-tensors integers), decoded on demand."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import operators
from .errors import ModelError
from .model.checkpoint import Checkpoint, TensorInfo
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
        if self.format != NATIVE_TYPE:
            _refuse_unknown_tensors(self.path, self.schemes, self._suffixes, self.stored)
        for name in self.schemes:
            shape = self.outline(name).shape
            owned = [stored_name(name, suffix) for suffix in self._suffixes[name]]
            file = next(self.stored[part].file for part in owned)
            floats = (info.dtype for part in owned if (info := self.stored[part]).dtype.is_floating_point)
            dtype = next(dtype for dtype in floats if dtype.itemsize > 1)  # of scales, where codes are floats too
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
    method = quantization.get("format") or quantization.get("quant_method")
    if quantization.get("quant_method") != "compressed-tensors" or method not in _MARKS:
        raise ModelError(
            f"{path}: quantized as {method!r}, which is not read here; compressed-tensors' {', '.join(_MARKS)} are"
        )
    _refuse_unknown(path, "quantization_config", quantization, _understood(method))
    targets = [(target, group) for group in quantization["config_groups"].values() for target in group["targets"]]
    literal = dict(reversed(targets))
    patterns = [(re.compile(target[3:]), group) for target, group in targets if target.startswith("re:")]
    schemes = {}
    for name in (key.removesuffix(_MARKS[method]) for key in stored if key.endswith(_MARKS[method])):
        matched = (group for pattern, group in patterns if pattern.match(name))
        group = literal.get(name) or next(matched, None) or literal.get("Linear")
        if group is None:
            raise ModelError(f"{path}: no config group targets {name}")
        schemes[name] = _scheme(path, name, method, group["weights"], group.get("input_activations"))
    return "compressed-tensors", schemes


# Formats of compressed-tensors that are read, and the tensor by which a compressed linear is known.
_MARKS = {"pack-quantized": ".weight_packed", "int-quantized": ".weight_scale", "float-quantized": ".weight_scale"}

_ANY = object()  # a value that is read here, or of no consequence for what a folder decodes to


def _understood(method: str) -> dict[str, Any]:
    """Keys that compressed-tensors writes for a format: what each may say, `*` standing for any name."""
    arguments = dict.fromkeys(
        ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "observer", "observer_kwargs"), _ANY
    )
    arguments |= {"actorder": ("weight", "static", False), "zp_dtype": ("torch.int8",)}
    group = {"targets": _ANY, "weights": arguments, "input_activations": arguments, "format": (method,)}
    sparsity = dict.fromkeys(
        ("global_sparsity", "sparsity_structure", "targets", "ignore", "registry_requires_subclass"), _ANY
    )
    folder = ("quant_method", "format", "ignore", "version", "quantization_status", "global_compression_ratio")
    return {
        **dict.fromkeys(folder, _ANY),
        "config_groups": {"*": group},
        "sparsity_config": {**sparsity, "format": ("dense",)},
    }


def _refuse_unknown(path: Path, where: str, found: Any, understood: Any) -> None:
    """Refuse what may mean other weights, or another model around them, than would be decoded.

    Args:
        where: the key in config.json.
        found: its value; null and what is empty says nothing.
        understood: the values it may have, or the same for each key of an object.
    """
    if understood is _ANY or found is None or found in ({}, []):
        return
    if isinstance(found, Mapping) and isinstance(understood, Mapping):
        for key, value in found.items():
            _refuse_unknown(path, f"{where}.{key}", value, understood.get(key, understood.get("*", ())))
    elif isinstance(understood, Mapping) or found not in understood:
        raise ModelError(
            f"{path}/config.json: {where} is {reprlib.repr(found)}, which is not read here; decode the folder with the "
            "tool that wrote it"
        )


def _refuse_unknown_tensors(
    path: Path,
    schemes: Mapping[str, Mapping[str, Any]],
    suffixes: Mapping[str, Iterable[str]],
    stored: Iterable[str],
) -> None:
    """Refuse tensors of compressed-tensors by which weights would be other than what is decoded."""
    hint = "which is not read here; decode the folder with the tool that wrote it"
    owned = set()
    for name, found in suffixes.items():
        known = {"weight", "weight_scale"}
        if schemes[name]["kind"] == "int":
            known = {"weight_packed", "weight_scale", "weight_shape"}
            known |= set() if schemes[name]["symmetric"] else {"weight_zero_point"}
        for suffix in found:
            if suffix not in known:
                raise ModelError(f"{path}: {name} has a tensor {suffix}, {hint}")
            owned.add(stored_name(name, suffix))
    for name in stored:
        if name not in owned and re.search(r"\.(weight_\w+|\w+_(scale|zero_point|g_idx))$", name):
            raise ModelError(f"{path}: {name} is of a linear in another format, {hint}")


def _scheme(
    path: Path, name: str, method: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """How `operators` names what a config group says of a linear."""
    kind, bits, group_size = weights.get("type", "int"), weights["num_bits"], weights.get("group_size") or -1
    if method == "pack-quantized" and kind == "int":
        by = "group" if group_size > 0 else "channel"
        strategy = weights.get("strategy") or ("tensor" if weights.get("group_size") is None else by)
        if strategy != by or weights.get("dynamic") or inputs is not None:
            raise ModelError(
                f"{path}: {name} is {method} in a way that is not read here: packed integers need scales by group or "
                "channel that are stored, and inputs as they are"
            )
        return {"kind": "int", "bits": bits, "group_size": group_size, "symmetric": weights.get("symmetric", True)}
    by_row = weights.get("strategy") == "channel" and weights.get("symmetric", True) and bits == 8
    inputs = inputs or {}
    dynamic = inputs.get("dynamic") is True and inputs.get("strategy") == "token" and inputs.get("num_bits") == 8
    if (
        by_row
        and dynamic
        and inputs.get("symmetric", True)
        and method == f"{kind}-quantized" == f"{inputs['type']}-quantized"
    ):
        return {"kind": "w8a8", "type": kind}
    raise ModelError(
        f"{path}: {name} is {method} in a way that is not read here: 8-bit weights need one scale a row, "
        "and inputs one a token that is found as they come"
    )


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
        original.pop("auto_map", None)  # ours
        if "base_auto_map" in original:
            original["auto_map"] = original.pop("base_auto_map")
    return original
