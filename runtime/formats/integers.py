"""What formats share that hold integers of a model's linears and nothing else, under `quant_method` of config.json."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ModelError
from ..schemes import IntQuantized, Operator, rewritten
from .base import OURS, VLLM_CPU, VLLM_GPU, Around, Schemes, WrittenFormat, runs_on_cpu

GPTQMODEL = "GPTQModel"


class IntegerFormat(WrittenFormat):
    """One of them.

    Attributes:
        parts: suffixes of the tensors of a linear.
    """

    automatic: ClassVar[bool] = False
    parts: ClassVar[frozenset[str]]

    def obstacle(self, linears: Mapping[str, Operator], around: Around) -> str:
        stored = rewritten(linears)
        if not stored:
            return "a model in which no linear is stored otherwise"
        if any(name in around.outer for name in stored):
            return "an embedding or a head that is stored otherwise"
        if any(name in around.experts for name in stored):
            return "experts that are stored otherwise"
        for name, operator in stored.items():
            if not isinstance(operator, IntQuantized) or operator.inputs:
                return f"{name} ({operator.description})"
            if why := self.unheld(operator):
                return f"{name} ({operator.description}), for {why}"
        return self.at_odds([operator for operator in stored.values() if isinstance(operator, IntQuantized)])

    def readers(self, linears: Mapping[str, Operator], around: Around) -> tuple[str, ...]:
        found, stored = [*OURS, GPTQMODEL], rewritten(linears).values()
        if self.vllm_takes(linears, around):
            whole = all(isinstance(operator, IntQuantized) and runs_on_cpu(operator) for operator in stored)
            found += [VLLM_GPU, *([VLLM_CPU] if whole else [])]
        return tuple(sorted(found))

    @abstractmethod
    def vllm_takes(self, linears: Mapping[str, Operator], around: Around) -> bool:
        """Whether vLLM knows what to do with all of them."""

    @abstractmethod
    def unheld(self, operator: IntQuantized) -> str:
        """Why it cannot hold an operator; empty where it can."""

    @abstractmethod
    def at_odds(self, operators: list[IntQuantized]) -> str:
        """What of operators that it holds cannot be in one folder."""

    def check(self, path: Path, schemes: Schemes, suffixes: Mapping[str, Iterable[str]], stored: Iterable[str]) -> None:
        for name, found in suffixes.items():
            if set(found) != self.parts:
                raise ModelError(f"{path}: {name} is not whole: it has {', '.join(sorted(found))}")


def check_parts(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors of a linear that do not go together.

    Args:
        shapes: by suffix.
    """
    for part, shape in shapes.items():
        if tuple(tensors[part].shape) != shape:
            raise ValueError(f"its {part} is {list(tensors[part].shape)}, but config.json says {list(shape)}")
    if not tensors["scales"].is_floating_point() or tensors["qweight"].dtype != torch.int32:
        raise ValueError("its scales are no floats, or its words not of 32 bits")
