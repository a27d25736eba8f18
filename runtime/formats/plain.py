"""Plain weights, as every tool reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..schemes import Dense, Operator, rewritten
from .base import OURS, VLLM_CPU, VLLM_GPU, Around, Schemes, WrittenFormat


class Plain(WrittenFormat):
    """The original model's own form."""

    name: ClassVar[str] = "dense"

    def obstacle(self, linears: Mapping[str, Operator], around: Around) -> str:
        return next(iter(rewritten(linears)), "")

    def readers(self, linears: Mapping[str, Operator], around: Around) -> tuple[str, ...]:
        return *OURS, "transformers", VLLM_CPU, VLLM_GPU

    def as_written(self, operator: Operator, dtype: torch.dtype = torch.float32) -> Operator:
        """The weight that an operator decodes to."""
        if isinstance(operator, Dense):
            return operator
        meta = next(iter(operator.to_tensors().values())).is_meta
        return Dense(torch.empty(operator.shape, dtype=dtype, device="meta") if meta else operator.dense(dtype))

    def config(
        self, source: Mapping[str, Any], linears: Mapping[str, Operator], dense: Iterable[str], around: Around
    ) -> dict[str, Any]:
        return dict(source)

    def claims(self, config: Mapping[str, Any]) -> bool:
        return False  # it is what no other claims

    def schemes(self, path: Path, config: Mapping[str, Any], stored: Mapping[str, Any]) -> Schemes:
        return {}
