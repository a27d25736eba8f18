"""compressed-tensors: integers and 8-bit numbers that transformers and vLLM read too."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.layouts import expand24
from ...kernels.numbers import ROUNDINGS
from ..errors import ModelError
from ..schemes import W8A8, BlockScaled, IntQuantized, Operator, Sparse24, rewritten, stored_name
from .base import (
    ANY,
    HINT,
    OURS,
    VLLM_CPU,
    VLLM_GPU,
    VLLM_GROUPS,
    Around,
    Schemes,
    WrittenFormat,
    for_rows,
    refuse_unknown,
    runs_on_cpu,
    targets,
)

_EVERYONE = (*OURS, "transformers", VLLM_CPU, VLLM_GPU)
# Formats of compressed-tensors that are read, and the tensor by which a compressed linear is known.
_MARKS = {
    "pack-quantized": ".weight_packed", "int-quantized": ".weight_scale", "float-quantized": ".weight_scale",
    "nvfp4-pack-quantized": ".weight_packed", "mxfp4-pack-quantized": ".weight_packed",
    "mxfp8-quantized": ".weight_scale",
}  # fmt: skip
# Blocks that share a scale → the format, and what compressed-tensors calls the blocks.
_BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8_block": (
        "float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
         "scale_dtype": "torch.float8_e4m3fn"},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
    "mxfp8": (
        "mxfp8-quantized",
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
}  # fmt: skip
# What inputs are rounded to as they come → what compressed-tensors calls it.
_INPUTS: dict[str, dict[str, Any]] = {
    "int8": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    "fp8": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    "int8_tensor": {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False},
    "fp8_tensor": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    "fp8_group": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True},
    "nvfp4": {**_BLOCKS["nvfp4"][1], "dynamic": "local"},
    "mxfp4": {**_BLOCKS["mxfp4"][1], "dynamic": True},
    "mxfp8": {**_BLOCKS["mxfp8"][1], "dynamic": True},
}
_STRATEGIES = ("channel", "tensor")  # of scales for 8-bit weights
_TELLING = ("num_bits", "type", "strategy", "group_size", "block_structure")  # of two arguments, whether they are alike


def _understood(method: str) -> dict[str, Any]:
    """Keys that compressed-tensors writes for a format: what each may say (`refuse_unknown`)."""
    arguments = dict.fromkeys(
        ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "observer", "observer_kwargs"), ANY
    )
    arguments |= {"actorder": ("weight", "static", False), "zp_dtype": ("torch.int8",)}
    for layout, blocks in _BLOCKS.values():
        if layout == method:
            kinds = (blocks["scale_dtype"],) if "scale_dtype" in blocks else ()
            arguments |= {"block_structure": ANY, "scale_dtype": kinds, "zp_dtype": ("torch.int8", *kinds)}
    group = {"targets": ANY, "weights": arguments, "input_activations": arguments, "format": (method,)}
    sparsity = dict.fromkeys(
        ("global_sparsity", "sparsity_structure", "targets", "ignore", "registry_requires_subclass"), ANY
    )
    folder = ("quant_method", "format", "ignore", "version", "quantization_status", "global_compression_ratio")
    return {
        **dict.fromkeys(folder, ANY),
        "config_groups": {"*": group},
        "sparsity_config": {**sparsity, "format": ("dense",)},
    }


class CompressedTensors(WrittenFormat):
    """What vLLM's project writes: packed integers, 8-bit numbers with rounded inputs, and blocks that share a scale."""

    name: ClassVar[str] = "compressed-tensors"
    reads: ClassVar[str] = f"compressed-tensors' {', '.join(_MARKS)}"

    def obstacle(self, linears: Mapping[str, Operator], around: Around) -> str:
        stored = rewritten(linears)
        found = _mixture(linears, around)
        if any(around.outer.get(name) for name in stored):
            found = found or "an embedding that is stored otherwise"
        if around.tied and any(name in around.outer for name in stored):
            found = found or "a head that config.json ties to the embedding"
        if around.one_tensor and any(name in around.experts for name in stored):
            found = found or "experts that lie in one tensor"
        for name, operator in stored.items():
            if not found and not _readers(operator):
                found = f"{name} ({operator.description}{_way_out(operator)})"
        return found

    def readers(self, linears: Mapping[str, Operator], around: Around) -> tuple[str, ...]:
        stored = rewritten(linears)
        found = set(_EVERYONE).intersection(*(_readers(operator) for operator in stored.values()))
        experts = [operator.scheme() for name, operator in stored.items() if name in around.experts]
        if experts:
            found -= {VLLM_CPU}  # refused
        if any(scheme.get("name") == "nvfp4" for scheme in experts):
            found -= {"transformers"}  # which does without what all of an expert's scales share (5.23)
        if any(len({repr(linears[name].scheme()) for name in group}) > 1 for group in around.fused):
            found -= {VLLM_CPU, VLLM_GPU}
        if any(name in around.outer for name in stored):
            found -= {VLLM_CPU, VLLM_GPU}  # not run
        return tuple(sorted(found))

    def as_written(self, operator: Operator, dtype: torch.dtype = torch.float32) -> Operator:
        """Of a 2:4 pattern of integers, its zeros as codes."""
        kept = operator.numbers
        if not isinstance(operator, Sparse24) or not isinstance(kept, IntQuantized):
            return operator
        size = kept.group_size if kept.group_size < 0 else 2 * kept.group_size
        if kept.codes.is_meta:
            codes = torch.empty(operator.shape, dtype=torch.int8, device="meta")
        else:
            codes = expand24(kept.codes, operator.indices)
        return operator if kept.zeros is not None else IntQuantized(codes, kept.scales, None, kept.bits, size)

    def config(
        self, source: Mapping[str, Any], linears: Mapping[str, Operator], dense: Iterable[str], around: Around
    ) -> dict[str, Any]:
        schemes = targets(linears)
        groups = {}
        for number, (scheme, names) in enumerate(schemes):
            both = [*names, *(around.names[name] for name in names if name in around.names)]
            wanted = ["re:.*[.]experts[.].*"] if names[0] in around.experts else both
            groups[f"group_{number}"] = {
                "targets": wanted if len(schemes) > 1 else ["Linear"], **_arguments(scheme), "format": _layout(scheme),
            }  # fmt: skip
        quantization = {
            "quant_method": self.name,
            "format": _layout(schemes[0][0]),
            "quantization_status": "compressed",
            "ignore": sorted(dense),
            "config_groups": groups,
        }
        return {**source, "quantization_config": quantization}

    def claims(self, config: Mapping[str, Any]) -> bool:
        quantization = config.get("quantization_config") or {}
        return quantization.get("quant_method") == self.name and (quantization.get("format") or self.name) in _MARKS

    def schemes(self, path: Path, config: Mapping[str, Any], stored: Mapping[str, Any]) -> Schemes:
        quantization = config["quantization_config"]
        method = quantization["format"]
        refuse_unknown(path, quantization, _understood(method))
        groups = [(target, group) for group in quantization["config_groups"].values() for target in group["targets"]]
        literal = dict(reversed(groups))
        patterns = [(re.compile(target[3:]), group) for target, group in groups if target.startswith("re:")]
        schemes = {}
        for name in (key.removesuffix(_MARKS[method]) for key in stored if key.endswith(_MARKS[method])):
            matched = (group for pattern, group in patterns if pattern.match(name))
            group = literal.get(name) or next(matched, None) or literal.get("Linear")
            if group is None:
                raise ModelError(f"{path}: no config group targets {name}")
            schemes[name] = _scheme(path, name, method, group["weights"], group.get("input_activations"))
        return schemes

    def operator_tensors(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> dict[str, Tensor]:
        if scheme.get("strategy") != "tensor":
            return dict(tensors)
        found = {**tensors, "weight_scale": for_rows(tensors["weight_scale"], len(tensors["weight"]))}
        return {**found, "input_scale": tensors["input_scale"].view(1)} if "inputs" in scheme else found

    def check(self, path: Path, schemes: Schemes, suffixes: Mapping[str, Iterable[str]], stored: Iterable[str]) -> None:
        owned = set()
        for name, found in suffixes.items():
            known = {"weight", "weight_scale"}
            if schemes[name]["kind"] == IntQuantized.kind:
                known = {"weight_packed", "weight_scale", "weight_shape"}
                known |= set() if schemes[name]["symmetric"] else {"weight_zero_point"}
            elif schemes[name].get("name") in ("nvfp4", "mxfp4"):
                known = {"weight_packed", "weight_scale"}
                if schemes[name]["name"] == "nvfp4":
                    known |= {"weight_global_scale", "input_global_scale"}
            elif schemes[name].get("inputs") == "tensor":
                known |= {"input_scale"}
            for suffix in found:
                if suffix not in known:
                    raise ModelError(f"{path}: {name} has a tensor {suffix}, which {HINT}")
                owned.add(stored_name(name, suffix))
        for name in stored:
            if name not in owned and re.search(
                r"\.(weight_\w+|(input|output|[qkv]|kv)_(\w*scale|zero_point|g_idx))$", name
            ):
                raise ModelError(f"{path}: {name} is of a linear in another format, which {HINT}")


def _readers(operator: Operator) -> tuple[str, ...]:
    """Who reads an operator in this format; nobody where none takes it."""
    scheme, columns = operator.scheme(), operator.shape[1]
    if scheme["kind"] == W8A8.kind:
        # tests/test_w8a8.py; vLLM 0.32 on a CPU ran all but fp8 with one scale for all inputs.
        run = scheme["type"] == "int" or "inputs" not in scheme
        return _EVERYONE if run else tuple(name for name in _EVERYONE if name != VLLM_CPU)
    if scheme["kind"] == BlockScaled.kind:
        rounding = ROUNDINGS[scheme["name"]]
        whole = not columns % rounding.columns and not operator.shape[0] % rounding.rows
        return (*OURS, "transformers", VLLM_GPU) if whole and scheme["name"] in _BLOCKS else ()
    if scheme["kind"] != IntQuantized.kind or columns % max(scheme["group_size"], 1):
        return ()  # compressed-tensors refuses rows that the group does not divide
    if not scheme["symmetric"]:
        # transformers 5.23 with compressed-tensors 0.19 or 0.20 expects zero points unpacked and refuses packed ones;
        # asymmetric experts fail in any case (huggingface/transformers#47430).
        return ()
    found = [*OURS, "transformers"]  # tests/test_formats.py
    assert isinstance(operator, IntQuantized)
    if scheme.get("inputs") is not None:  # by the schemes that its source has for them
        taken = scheme["bits"] == 4 and scheme["group_size"] > 0
    else:  # by the kernels that its source names (Machete, Marlin)
        taken = scheme["bits"] in (4, 8) and scheme["group_size"] in VLLM_GROUPS
    found += [VLLM_GPU] * taken + [VLLM_CPU] * runs_on_cpu(operator)
    return tuple(found)


def _way_out(operator: Operator) -> str:
    """The columns of an operator, where they may be the reason, and what to set where groups do not divide them."""
    if not isinstance(operator, IntQuantized):
        return ""
    ragged = operator.group_size > 32 and operator.shape[1] % operator.group_size
    return f", {operator.shape[1]} columns" + (", which group_size: auto would divide" if ragged else "")


def _layout(scheme: Mapping[str, Any]) -> str:
    """What compressed-tensors calls the way a scheme's tensors are stored."""
    if scheme["kind"] == BlockScaled.kind:
        return _BLOCKS[scheme["name"]][0] if scheme["name"] in _BLOCKS else "blocks that it does not have"
    return f"{scheme['type']}-quantized" if scheme["kind"] == W8A8.kind else "pack-quantized"


def _mixture(linears: Mapping[str, Operator], around: Around) -> str:
    """What is not written in one layout, or what of a model with experts transformers would read wrongly: it takes them
    to be compressed, decodes all of them by one scheme, and all other linears by one (5.23,
    `integrations/compressed_tensors.py`)."""
    stored = {name: operator.scheme() for name, operator in rewritten(linears).items()}
    if len({_layout(scheme) for scheme in stored.values()}) > 1:
        return "weights for products of 8 bits beside others"
    if any(name in around.experts and _layout(scheme) == "int-quantized" for name, scheme in stored.items()):
        return "experts of unpacked integers"
    experts = {repr(operator.scheme()) for name, operator in linears.items() if name in around.experts}
    others = {repr(scheme) for name, scheme in stored.items() if name not in around.experts}
    if len(experts) > 1:
        return "experts stored in different ways"
    if experts and len(others) > 1:
        return "linears beside experts that are stored in different ways"
    if any(name in around.experts and name not in stored for name in linears):
        return "experts left as they are"
    return ""


def _arguments(scheme: Mapping[str, Any]) -> dict[str, Any]:
    """A scheme in the words of compressed-tensors."""
    if scheme["kind"] == W8A8.kind:
        weights: dict[str, Any] = {"num_bits": 8, "type": scheme["type"], "symmetric": True, "strategy": "channel"}
        inputs: str | None = "int8" if scheme["type"] == "int" else "fp8"
        inputs = f"{inputs}_tensor" if scheme.get("inputs") == "tensor" else inputs
    elif scheme["kind"] == BlockScaled.kind:
        weights, inputs = {"symmetric": True, **_BLOCKS[scheme["name"]][1]}, scheme["inputs"]
    else:
        size = None if scheme["group_size"] < 0 else scheme["group_size"]
        weights = {"num_bits": scheme["bits"], "type": "int", "symmetric": scheme["symmetric"]}
        weights |= {"strategy": "group" if size else "channel", "group_size": size}
        inputs = scheme.get("inputs")
    found = {"weights": {**weights, "dynamic": False}}
    return found if inputs is None else {**found, "input_activations": {"symmetric": True, **_INPUTS[inputs]}}


def _scheme(
    path: Path, name: str, method: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The scheme that a config group tells of a linear."""
    kind, bits, group_size = weights.get("type", "int"), weights["num_bits"], weights.get("group_size") or -1
    symmetric, met = weights.get("symmetric", True), _met(path, name, inputs)
    if method == "pack-quantized" and kind == "int":
        by = "group" if group_size > 0 else "channel"
        strategy = weights.get("strategy") or ("tensor" if weights.get("group_size") is None else by)
        if strategy == by and not weights.get("dynamic") and met in (None, "int8", "fp8"):
            found = {"kind": "int", "bits": bits, "group_size": group_size, "symmetric": symmetric}
            return found if met is None else {**found, "inputs": met}
    blocks = next((one for one, (layout, told) in _BLOCKS.items() if layout == method and _alike(weights, told)), None)
    if blocks is not None and symmetric and not weights.get("dynamic"):
        return {"kind": "block_scaled", "name": blocks, "inputs": met}
    eights = method == f"{kind}-quantized" and symmetric and bits == 8 and weights.get("strategy") in _STRATEGIES
    own = {"int": "int8", "float": "fp8"}.get(kind)
    if eights and met in (own, f"{own}_tensor"):
        found = {"kind": W8A8.kind, "type": kind, "strategy": weights["strategy"]}
        return found if met == own else {**found, "inputs": "tensor"}
    raise ModelError(
        f"{path}: {name} is {method} in a way that is not read here: packed integers need scales by group or channel "
        "that are stored; 8-bit weights one scale, or one a row or a block, and inputs of their kind that are rounded "
        "as they come, or by one scale that is stored"
    )


def _met(path: Path, name: str, inputs: Mapping[str, Any] | None) -> str | None:
    """What a config group says that inputs are rounded to; None where they are not."""
    if inputs is None:
        return None
    found = next((one for one, told in _INPUTS.items() if _alike(inputs, told)), None)
    if found is None or not inputs.get("symmetric", True) or inputs.get("dynamic") != _INPUTS[found]["dynamic"]:
        raise ModelError(
            f"{path}: {name} rounds its inputs in a way that is not read here: they are rounded as they come, without "
            "zero points, each token by itself or in the blocks of a known format, or all by one scale"
        )
    return found


def _alike(found: Mapping[str, Any], told: Mapping[str, Any]) -> bool:
    return all(found.get(key) == told.get(key) for key in _TELLING)
