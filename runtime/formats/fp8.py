"""FP8 as models are published in it: numbers of e4m3 in blocks of 128 x 128 (DeepSeek, Qwen, MiniMax), with one scale
(Mistral), or with one a row (fbgemm, Llama).

`weight` `[rows, columns]`; `weight_scale_inv`, by which it is multiplied, `[rows / 128, columns / 128]`, rounded up, or
one number. https://huggingface.co/docs/transformers/quantization/finegrained_fp8
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ModelError
from ..schemes import W8A8, BlockScaled, Operator, rewritten
from .base import ANY, HINT, OURS, VLLM_GPU, Around, Format, Schemes, WrittenFormat, for_rows, refuse_unknown

_BLOCK = [128, 128]
_SCALING = re.compile(r"^weight|scale|zero_point|g_idx")  # how tensors are called that change what others decode to


class Fp8(WrittenFormat):
    """`quant_method: fp8`: blocks, or one scale for all, which alone is not written.

    It holds what compressed-tensors does not, rows that are no multiple of a block, as DeepSeek's models have them.
    """

    name: ClassVar[str] = "fp8"
    telling: ClassVar[bool] = False
    reads: ClassVar[str] = "FP8 in blocks of 128 x 128 or with one scale"
    _parts: ClassVar[frozenset[str]] = frozenset({"weight", "weight_scale_inv", "activation_scale"})
    _understood: ClassVar[Mapping[str, Any]] = {
        **dict.fromkeys(("quant_method", "dequantize", "modules_to_not_convert", "modules_to_convert"), ANY),
        "ignored_layers": ANY,
        "activation_scheme": ("dynamic", "static"),
        "fmt": ("e4m3",),
        "weight_block_size": (_BLOCK,),
        "scale_fmt": ("float", "ue8m0"),  # which the scales' dtype tells
        "expert_dtype": ("fp8",),
    }

    def obstacle(self, linears: Mapping[str, Operator], around: Around) -> str:
        for name, operator in rewritten(linears).items():
            if name in around.outer or (name in around.experts and around.one_tensor) or not _in_blocks(operator):
                return f"{name} ({operator.description})"
        return "" if rewritten(linears) else "a model in which no linear is stored otherwise"

    def readers(self, linears: Mapping[str, Operator], around: Around) -> tuple[str, ...]:
        stored = rewritten(linears)
        whole = all(not operator.shape[1] % _BLOCK[1] for operator in stored.values())
        fused = all(len({name in stored for name in group}) < 2 for group in around.fused)
        return (*OURS, VLLM_GPU) if whole and fused else OURS  # by its documentation

    def tensors(self, operator: Operator) -> dict[str, Tensor]:
        found = operator.to_tensors()
        if isinstance(operator, BlockScaled):
            found["weight_scale_inv"] = found.pop("weight_scale")
        return found

    def config(
        self, source: Mapping[str, Any], linears: Mapping[str, Operator], dense: Iterable[str], around: Around
    ) -> dict[str, Any]:
        told = {
            "quant_method": self.name,
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": _BLOCK,
            "modules_to_not_convert": sorted(dense),
        }
        return {**source, "quantization_config": told}

    def schemes(self, path: Path, config: Mapping[str, Any], stored: Mapping[str, Any]) -> Schemes:
        told = config["quantization_config"]
        refuse_unknown(path, told, self._understood)
        static = told.get("activation_scheme") == "static"
        if told.get("weight_block_size"):
            if static:
                raise ModelError(f"{path}: FP8 in blocks with one scale for all inputs {HINT}")
            scheme = {"kind": BlockScaled.kind, "name": "fp8_block", "inputs": "fp8_group"}
        else:
            scheme = {"kind": W8A8.kind, "type": "float", **({"inputs": "tensor"} if static else {})}
        return dict.fromkeys(_linears(stored, ".weight_scale_inv"), scheme)

    def check(self, path: Path, schemes: Schemes, suffixes: Mapping[str, Iterable[str]], stored: Iterable[str]) -> None:
        _refuse_parts(path, suffixes, self._parts)

    def operator_tensors(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> dict[str, Tensor]:
        if "weight_scale_inv" not in tensors:  # what it leaves as it was
            return dict(tensors)
        codes, scales = tensors["weight"], tensors["weight_scale_inv"]
        if scales.dtype == torch.float8_e8m0fnu:
            scales = scales.float()
        if scheme["kind"] == BlockScaled.kind:
            return {"weight": codes, "weight_scale": scales}
        found = {"weight": codes, "weight_scale": for_rows(scales, len(codes))}
        return {**found, "input_scale": tensors["activation_scale"].view(1)} if "inputs" in scheme else found


class FbgemmFp8(Format):
    """`quant_method: fbgemm_fp8`: a scale for each row, inputs rounded as they come."""

    name: ClassVar[str] = "fbgemm_fp8"
    reads: ClassVar[str] = "fbgemm's FP8"
    _understood: ClassVar[Mapping[str, Any]] = dict.fromkeys(
        ("quant_method", "modules_to_not_convert", "activation_scale_ub"), ANY
    )

    def schemes(self, path: Path, config: Mapping[str, Any], stored: Mapping[str, Any]) -> Schemes:
        refuse_unknown(path, config["quantization_config"], self._understood)
        return {name: {"kind": W8A8.kind, "type": "float"} for name in _linears(stored, ".weight_scale")}

    def check(self, path: Path, schemes: Schemes, suffixes: Mapping[str, Iterable[str]], stored: Iterable[str]) -> None:
        _refuse_parts(path, suffixes, {"weight", "weight_scale", "input_scale_ub"})

    def operator_tensors(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"weight": tensors["weight"], "weight_scale": tensors["weight_scale"].view(-1, 1)}


def _in_blocks(operator: Operator) -> bool:
    return isinstance(operator, BlockScaled) and (operator.name, operator.inputs) == ("fp8_block", "fp8_group")


def _linears(stored: Iterable[str], suffix: str) -> list[str]:
    return [name.removesuffix(suffix) for name in stored if name.endswith(suffix)]


def _refuse_parts(path: Path, suffixes: Mapping[str, Iterable[str]], known: Iterable[str]) -> None:
    for name, found in suffixes.items():
        if more := sorted(part for part in set(found).difference(known) if _SCALING.search(part)):
            raise ModelError(f"{path}: {name} has a tensor {more[0]}, which {HINT}")
