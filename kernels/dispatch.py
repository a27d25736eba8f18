"""Which path runs a linear: pure functions of shapes and capabilities, so they are tested without the hardware."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class CpuCapability:
    """What of the processor the choice depends on."""

    bf16_matrix: bool  # AMX tiles: bf16 GEMMs far ahead of everything else at many rows
    bf16: bool  # instructions for bf16 products at all; without them bf16 is emulated


@cache
def cpu_capability() -> CpuCapability:
    matrix = bool(torch.cpu._is_amx_tile_supported())
    return CpuCapability(matrix, matrix or bool(torch.cpu._is_avx512_bf16_supported()))


def products_dtype(capability: CpuCapability) -> torch.dtype:
    """What GEMMs that tolerate rounded inputs multiply in: bfloat16 where the processor is fast at it."""
    return torch.bfloat16 if capability.bf16 else torch.float32


def has_int4_kernel(bits: int, rows: int, group_size: int, columns: int, symmetric: bool) -> bool:
    """Whether torch's native CPU kernel takes a `[rows, columns]` weight of this scheme."""
    return bits == 4 and symmetric and rows % 16 == 0 and group_size in (32, 64, 128, 256) and columns % group_size == 0


def int4_path(tokens: int, dtype: torch.dtype, capability: CpuCapability) -> str:
    """`int4pack` or `dequantize` for a batch of `tokens` on a CPU.

    The native kernel multiplies with few tokens at the speed of memory; dequantizing once and multiplying in bf16 wins
    when many tokens share the work (crossovers: `benchmarks/cpu_decode.py`). It computes in bf16 only.
    """
    if dtype != torch.bfloat16:
        return "dequantize"
    return "int4pack" if tokens <= (48 if capability.bf16_matrix else 64) else "dequantize"
