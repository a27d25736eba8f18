"""ModelOpt's folders: NVFP4 and FP8 as NVIDIA publishes models. They are read, and not written.

NVFP4: `weight` `[rows, columns / 2]`, two numbers of e2m1 a byte, the lower half first; `weight_scale` e4m3
`[rows, columns / 16]`; `weight_scale_2`, one float, by which all is multiplied. FP8: `weight` e4m3; `weight_scale`, one
float. Scales for inputs are left aside. https://github.com/NVIDIA/Model-Optimizer
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.layouts import unpack_indices
from ...kernels.numbers import E2M1
from ..errors import ModelError
from ..schemes import Dense
from .base import HINT, Format, Schemes

_BLOCK = 16
_PARTS = {
    "NVFP4": frozenset({"weight", "weight_scale", "weight_scale_2"}),
    "FP8": frozenset({"weight", "weight_scale"}),
}


class ModelOpt(Format):
    """`quant_method: modelopt`, decoded to plain weights."""

    name: ClassVar[str] = "modelopt"
    reads: ClassVar[str] = "ModelOpt's NVFP4 and FP8"

    def schemes(self, path: Path, config: Mapping[str, Any], stored: Mapping[str, Any]) -> Schemes:
        told = config["quantization_config"]
        method = told.get("quant_algo")
        if method not in _PARTS:
            raise ModelError(f"{path}: ModelOpt's {method!r} {HINT}")
        if method == "NVFP4" and told.get("group_size", _BLOCK) != _BLOCK:
            raise ModelError(f"{path}: ModelOpt's NVFP4 in groups of {told['group_size']} {HINT}")
        names = [name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")]
        return {name: {"kind": Dense.kind, "quant_algo": method} for name in names}

    def check(self, path: Path, schemes: Schemes, suffixes: Mapping[str, Iterable[str]], stored: Iterable[str]) -> None:
        for name, found in suffixes.items():
            wanted = _PARTS[schemes[name]["quant_algo"]]
            if wanted != set(found) - {"input_scale", "k_scale", "v_scale"}:
                raise ModelError(f"{path}: {name} is not whole: it has {', '.join(sorted(found))}")

    def operator_tensors(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> dict[str, Tensor]:
        codes, scales = tensors["weight"], tensors["weight_scale"]
        if scheme["quant_algo"] == "FP8":
            if codes.dtype != torch.float8_e4m3fn:
                raise ValueError(f"its weight is {codes.dtype}")
            return {"weight": codes.float() * scales.float().view(1, 1)}
        rows, columns = codes.shape[0], 2 * codes.shape[1]
        kinds, shape = (codes.dtype, scales.dtype), tuple(scales.shape)
        if kinds != (torch.uint8, torch.float8_e4m3fn) or shape != (rows, columns // _BLOCK):
            raise ValueError(f"its weight and scales are {kinds}, of {list(codes.shape)} and {list(scales.shape)}")
        values = E2M1.of_bytes(unpack_indices(codes, columns)).unflatten(1, (-1, _BLOCK))
        steps = scales.float() * tensors["weight_scale_2"].float()
        return {"weight": (values * steps[..., None]).flatten(1)}
