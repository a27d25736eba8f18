"""AWQ's checkpoints: integers of 4 bits in groups, as AutoAWQ laid them out (`gemm`) and vLLM and GPTQModel read them.

`qweight` `[columns, rows / 8]` and `qzeros` `[groups, rows / 8]` hold unsigned codes along rows, eight in a word, those
of even rows before those of odd ones; `scales` `[groups, rows]`. All linears have one size of groups, and zero points.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.layouts import pack_codes, unpack_codes
from ..errors import ModelError
from ..schemes import IntQuantized, Operator, rewritten
from .base import HINT, Around, Schemes
from .integers import IntegerFormat, check_parts

BITS, SIZES = 4, (32, 64, 128)
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # rows of a word's codes, the lowest bits first


class Awq(IntegerFormat):
    """Integers of 4 bits; symmetric ones have the zero point in the middle, for readers look for one."""

    name: ClassVar[str] = "awq"
    parts: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales"})
    reads: ClassVar[str] = "AWQ's"

    def unheld(self, operator: IntQuantized) -> str:
        rows, columns = operator.shape
        if operator.bits != BITS:
            return "it has no such width"
        whole = operator.group_size in SIZES and rows % 32 == columns % operator.span == 0
        return "" if whole else f"{rows} x {columns} is not of whole groups of 32, 64 or 128"

    def at_odds(self, operators: list[IntQuantized]) -> str:
        sizes = sorted({operator.group_size for operator in operators})
        several = " beside others of ".join(map(str, sizes))
        return f"groups of {several}, for it has one size: set group_size" if len(sizes) > 1 else ""

    def vllm_takes(self, linears: Mapping[str, Operator], around: Around) -> bool:
        stored = rewritten(linears)
        return all(len({name in stored for name in group}) < 2 for group in around.fused)

    def tensors(self, operator: Operator) -> dict[str, Tensor]:
        if not isinstance(operator, IntQuantized):
            return super().tensors(operator)
        zeros = operator.zeros
        if zeros is None:
            zeros = torch.zeros_like(operator.scales, dtype=torch.int8)
        return {
            "qweight": _along_rows(operator.codes),
            "qzeros": _along_rows(zeros),
            "scales": operator.scales.T.contiguous(),
        }

    def operator_tensors(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> dict[str, Tensor]:
        if scheme["kind"] != IntQuantized.kind:
            return dict(tensors)
        columns, words = tensors["qweight"].shape
        size = scheme["group_size"]
        check_parts(tensors, {"scales": (-(-columns // size), 8 * words), "qzeros": (-(-columns // size), words)})
        return {
            "weight_packed": pack_codes(_along_columns(tensors["qweight"]), BITS),
            "weight_scale": tensors["scales"].T.contiguous(),
            "weight_zero_point": pack_codes(_along_columns(tensors["qzeros"]).T.contiguous(), BITS).T.contiguous(),
            "weight_shape": torch.tensor([8 * words, columns], dtype=torch.int64, device="cpu"),
        }

    def config(
        self, source: Mapping[str, Any], linears: Mapping[str, Operator], dense: Iterable[str], around: Around
    ) -> dict[str, Any]:
        size = next(iter(rewritten(linears).values())).scheme()["group_size"]
        plain = [name for name in dense if name not in around.outer]
        plain = sorted({one for name in plain for one in (name, around.names.get(name, name))})
        quantization = {
            "quant_method": self.name,
            "version": "gemm",
            "bits": BITS,
            "group_size": size,
            "zero_point": True,
            "modules_to_not_convert": plain or None,
        }
        return {**source, "quantization_config": quantization}

    def schemes(self, path: Path, config: Mapping[str, Any], stored: Mapping[str, Any]) -> Schemes:
        told = config["quantization_config"]
        version = str(told.get("version", "gemm")).lower()
        size, zeros = told.get("group_size"), told.get("zero_point", True)
        if version != "gemm" or told.get("bits") != BITS or size not in SIZES or zeros is not True:
            raise ModelError(f"{path}: AWQ of version {version!r}, {told.get('bits')} bits, groups of {size} {HINT}")
        names = [key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")]
        plain = told.get("modules_to_not_convert") or []
        bad = next((name for name in names if any(f".{one}." in f".{name}." for one in plain)), None)
        if bad is not None:
            raise ModelError(f"{path}: {bad} is quantized, though config.json says that it is not")
        scheme = {"kind": IntQuantized.kind, "bits": BITS, "group_size": size, "symmetric": False}
        return {name: dict(scheme) for name in names}


def _along_rows(codes: Tensor) -> Tensor:
    """Signed codes `[rows, n]` → words `[n, rows / 8]`."""
    lanes = codes.T.unflatten(1, (-1, 8))[..., list(_ORDER)]
    return pack_codes(lanes.flatten(1), BITS)


def _along_columns(words: Tensor) -> Tensor:
    """The inverse: signed codes `[rows, n]`."""
    lanes = unpack_codes(words, BITS, 8 * words.shape[1]).unflatten(1, (-1, 8))
    places = [_ORDER.index(row) for row in range(8)]
    return lanes[..., places].flatten(1).T.contiguous()
