"""Blocks of ggml, as GGUF files hold them: which of them holds an operator's numbers, and their bytes.

A block is some columns of a row with what they share. Where groups are wider than a block, each block repeats their
scale, so that nothing is rounded but scales that half precision does not have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.reference import expand_groups
from ...runtime.schemes import W8A8, BlockScaled, IntQuantized, KQuantized, Operator

_BLOCK = 32
_SUPER = 64  # columns of NVFP4, four blocks of 16


def fitting(operator: Operator) -> str | None:
    """The ggml type that holds the numbers of an operator, by its name there; None where none does."""
    columns = operator.shape[1]
    if isinstance(operator, KQuantized):
        return operator.name.upper()
    if isinstance(operator, W8A8) and operator.codes.dtype == torch.int8 and columns % _BLOCK == 0:
        return "Q8_0"
    if isinstance(operator, BlockScaled) and columns % (_SUPER if operator.name == "nvfp4" else _BLOCK) == 0:
        return {"nvfp4": "NVFP4", "mxfp4": "MXFP4"}.get(operator.name)
    if not isinstance(operator, IntQuantized) or columns % _BLOCK or operator.span % _BLOCK:
        return None
    if operator.zeros is None:
        return "Q4_0" if operator.bits <= 4 else "Q5_0" if operator.bits == 5 else "Q8_0"
    return "Q4_1" if operator.bits <= 4 else "Q5_1" if operator.bits == 5 else None


def packed(operator: Operator) -> Tensor:
    """Its rows in that type: uint8 `[rows, bytes]`."""
    if isinstance(operator, BlockScaled):
        return _floats(operator)
    if isinstance(operator, KQuantized):
        return operator.to_tensors()["weight_blocks"]
    assert isinstance(operator, W8A8 | IntQuantized)
    span = operator.shape[1] if isinstance(operator, W8A8) else operator.span
    kind, codes = fitting(operator), operator.codes.unflatten(1, (-1, _BLOCK))
    step = _of_blocks(operator.scales.float(), span, codes.shape[1])
    if kind == "Q8_0":
        return _joined(_halves(step), codes.view(torch.uint8))
    middle = 8 if kind in ("Q4_0", "Q4_1") else 16
    heads = [_halves(step)]
    if isinstance(operator, IntQuantized) and operator.zeros is not None:
        heads.append(_halves(-step * (middle + _of_blocks(operator.zeros.float(), span, codes.shape[1]))))
    moved = (codes.to(torch.int16) + middle).to(torch.uint8)
    if middle == 16:
        bits = (moved >> 4).unflatten(2, (4, 8)).to(torch.int32) << torch.arange(8, dtype=torch.int32)
        heads.append(bits.sum(3).to(torch.uint8))
    return _joined(*heads, _nibbles(moved & 15))


def rounded_scales(operator: Operator) -> float:
    """The largest share by which half precision is off of a scale."""
    if not isinstance(operator, W8A8 | IntQuantized):
        return 0.0
    exact = operator.scales.double()
    return float(((exact.half().double() - exact) / exact).abs().nan_to_num(0.0).max())


def _of_blocks(per_group: Tensor, span: int, blocks: int) -> Tensor:
    """`[rows, groups]` → `[rows, blocks]`."""
    return expand_groups(per_group, blocks * _BLOCK, span)[:, ::_BLOCK]


def _halves(values: Tensor) -> Tensor:
    """float16 as bytes: `[rows, blocks]` → `[rows, blocks, 2]`."""
    return values.half()[..., None].contiguous().view(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    """Codes of 4 bits `[..., n]` → `[..., n / 2]`: the first half of them below, the second above."""
    half = codes.shape[-1] // 2
    return codes[..., :half] | codes[..., half:] << 4


def _joined(*parts: Tensor) -> Tensor:
    """Parts of each block `[rows, blocks, bytes]` one after the other."""
    return torch.cat(parts, 2).flatten(1)


def _floats(operator: BlockScaled) -> Tensor:
    """NVFP4 without the number that all of it is over, and MXFP4."""
    scales = operator.scales.view(torch.uint8)
    if operator.name == "mxfp4":
        return _joined(scales[..., None], _nibbles(operator.codes.unflatten(1, (-1, _BLOCK))))
    codes = _nibbles(operator.codes.unflatten(1, (-1, 4, 16))).flatten(2)
    return _joined(scales.unflatten(1, (-1, 4)), codes)
