"""bitsandbytes' folders: NF4 and FP4 in blocks, and int8 with a scale a row. They are read, and not written.

4 bits: `weight` is a stream of bytes over the rows one behind the other, the upper half first; `weight.quant_map` has
the numbers that they are places in. Every `blocksize` of them share a scale, `weight.absmax`; with double quantization
these are bytes themselves, places in `weight.nested_quant_map` times `weight.nested_absmax` of 256 of them, plus an
offset. JSON in `weight.quant_state.bitsandbytes__nf4` has the shape. int8: `SCB` has the largest of each row.
https://github.com/bitsandbytes-foundation/bitsandbytes
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ModelError
from ..schemes import Dense
from .base import HINT, Format, Schemes

_STATE = "weight.quant_state.bitsandbytes__"
_NESTED = {"weight.nested_absmax", "weight.nested_quant_map"}


class BitsAndBytes(Format):
    """`quant_method: bitsandbytes`, decoded to plain weights."""

    name: ClassVar[str] = "bitsandbytes"
    reads: ClassVar[str] = "bitsandbytes' NF4, FP4 and int8"
    shapes: ClassVar[tuple[str, ...]] = (f"{_STATE}nf4", f"{_STATE}fp4")

    def schemes(self, path: Path, config: Mapping[str, Any], stored: Mapping[str, Any]) -> Schemes:
        names = list(stored)
        fours = [name.split(f".{_STATE}")[0] for name in names if f".{_STATE}" in name]
        eights = [name.removesuffix(".SCB") for name in names if name.endswith(".SCB")]
        return {name: {"kind": Dense.kind, "bits": bits} for bits, some in ((4, fours), (8, eights)) for name in some}

    def check(self, path: Path, schemes: Schemes, suffixes: Mapping[str, Iterable[str]], stored: Iterable[str]) -> None:
        for name, found in suffixes.items():
            parts = {part for part in found if not part.startswith(_STATE)} - {"weight_format"}
            wanted = (
                {"weight", "SCB"} if schemes[name]["bits"] == 8 else {"weight", "weight.absmax", "weight.quant_map"}
            )
            if parts != wanted and not (schemes[name]["bits"] == 4 and parts == wanted | _NESTED):
                raise ModelError(f"{path}: {name} is not whole, or {HINT}: it has {', '.join(sorted(found))}")

    def operator_tensors(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> dict[str, Tensor]:
        codes = tensors["weight"]
        if scheme["bits"] == 8:
            if codes.dtype != torch.int8 or tensors["SCB"].shape != codes.shape[:1]:
                raise ValueError(f"its weight is {codes.dtype}, with {tensors['SCB'].numel()} scales")
            return {"weight": codes.float() * tensors["SCB"].float()[:, None] / 127}
        state = json.loads(bytes(next(part for name, part in tensors.items() if name.startswith(_STATE)).tolist()))
        rows, columns = state["shape"]
        _check_sizes(tensors, state, rows * columns)
        if codes.dtype != torch.uint8 or codes.numel() != -(-rows * columns // 2):
            raise ValueError(f"its weight is {codes.dtype} {list(codes.shape)}, but its state says {rows} x {columns}")
        if codes.is_meta:
            return {"weight": codes.new_empty(rows, columns, dtype=torch.float32)}
        scales = tensors["weight.absmax"].float()
        if "weight.nested_absmax" in tensors:
            largest = tensors["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])
            places = tensors["weight.absmax"].long()
            scales = tensors["weight.nested_quant_map"][places] * largest[: len(places)] + state["nested_offset"]
        places = torch.stack([codes >> 4, codes & 15], dim=-1).flatten()[: rows * columns].long()
        values = tensors["weight.quant_map"].float()[places]
        weight = values * scales.repeat_interleave(state["blocksize"])[: rows * columns]
        return {"weight": weight.view(rows, columns)}


def _check_sizes(tensors: Mapping[str, Tensor], state: Mapping[str, Any], numbers: int) -> None:
    """Refuse scales by which the numbers of a matrix would be others."""
    scales = tensors["weight.absmax"].numel()
    wanted = {"weight.quant_map": 16, "weight.absmax": _blocks(numbers, state["blocksize"])}
    if set(tensors) >= _NESTED:
        wanted |= {"weight.nested_quant_map": 256}
        wanted |= {"weight.nested_absmax": _blocks(scales, state["nested_blocksize"])}
        if not isinstance(state["nested_offset"], float):
            raise ValueError(f"its nested_offset is {reprlib.repr(state['nested_offset'])}")
    for name, count in wanted.items():
        if tensors[name].numel() != count:
            raise ValueError(f"its {name} has {tensors[name].numel()} numbers, not {count}")


def _blocks(numbers: int, size: Any) -> int:
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"its blocks are of {reprlib.repr(size)} numbers")
    return -(-numbers // size)
