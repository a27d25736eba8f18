"""MXFP4 as gpt-oss is published in it: all experts of a block in one tensor, two numbers of e2m1 a byte. It is read,
and not written.

`experts.gate_up_proj_blocks` `[experts, rows, columns / 32, 16]`, the lower half of a byte first, rows of gate and up
in turns; `experts.gate_up_proj_scales` `[experts, rows, columns / 32]`, powers of two by their exponents; `down_proj`
alike.
https://huggingface.co/openai/gpt-oss-20b
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ModelError
from ..schemes import BlockScaled
from .base import ANY, HINT, Format, Schemes, refuse_unknown

_BLOCKS, _SCALES = "_blocks", "_scales"
_LINEARS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Mxfp4(Format):
    """`quant_method: mxfp4`."""

    name: ClassVar[str] = "mxfp4"
    reads: ClassVar[str] = "gpt-oss' MXFP4"

    def schemes(self, path: Path, config: Mapping[str, Any], stored: Mapping[str, Any]) -> Schemes:
        told = config["quantization_config"]
        refuse_unknown(path, told, dict.fromkeys(("quant_method", "modules_to_not_convert", "dequantize"), ANY))
        found: Schemes = {}
        for key in (key for key in stored if key.endswith(_BLOCKS)):
            tensor = key.removesuffix(_BLOCKS)
            where, _, part = tensor.rpartition(".")
            if part not in _LINEARS or tensor + _SCALES not in stored:
                raise ModelError(f"{path}: {key} is of a linear in another format, which {HINT}")
            own = {"kind": BlockScaled.kind, "name": "mxfp4", "inputs": None, "shared": where, "tensor": tensor}
            for expert in range(stored[key].shape[0]):
                for place, linear in enumerate(_LINEARS[part]):
                    rows = {"expert": expert, "first": place, "step": len(_LINEARS[part])}
                    found[f"{where}.{expert}.{linear}"] = {**own, **rows}
        return found

    def check(self, path: Path, schemes: Schemes, suffixes: Mapping[str, Iterable[str]], stored: Iterable[str]) -> None:
        for name in stored:
            if name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS not in stored:
                raise ModelError(f"{path}: {name} is there, and the numbers are not that it scales")

    def operator_tensors(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> dict[str, Tensor]:
        rows = slice(scheme["first"], None, scheme["step"])
        blocks, scales = (tensors[f"/{scheme['tensor']}{part}"][scheme["expert"]][rows] for part in (_BLOCKS, _SCALES))
        if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
            raise ValueError(f"its blocks are {blocks.dtype}, its scales {scales.dtype}")
        return {"weight_packed": blocks.flatten(1).contiguous(), "weight_scale": scales.contiguous()}
