"""What a format is: how a folder says to a reader in what form its linears lie there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..schemes import IntQuantized, Operator

OURS = ("compressor",)
VLLM_CPU, VLLM_GPU = "vLLM on CPUs", "vLLM on GPUs"
VLLM_GROUPS = (-1, 32, 64, 128)  # sizes of groups of integers that vLLM takes; -1: a row

Schemes = dict[str, dict[str, Any]]  # name of a compressed linear → its scheme, as `schemes.from_tensors` takes it


def runs_on_cpu(operator: IntQuantized) -> bool:
    """Whether vLLM 0.32 ran such integers of a linear on a CPU (one with AVX-512): it has a kernel for 4 bits, and cuts
    rows that share one scale into groups of 128 of its own."""
    rows, columns = operator.shape
    whole = not columns % (128 if operator.group_size < 0 else 32) and not rows % 32
    return whole and operator.bits == 4 and operator.group_size in VLLM_GROUPS


@dataclass(frozen=True)
class Around:
    """What matters of the model beside the form of its linears, which go by their names on disk.

    Attributes:
        experts: linears of routed experts.
        fused: names that some readers put into one matrix (q, k, v; gate, up).
        one_tensor: whether the model as it is published has all experts of a block in one tensor, which transformers
            does not look for in parts.
        outer: the embedding and the head → whether rows are looked up (`Skeleton.outer`).
        tied: whether config.json says that the two are one, whatever the files hold.
        names: name on disk → in memory, where they differ.
    """

    experts: frozenset[str] = frozenset()
    fused: Sequence[Sequence[str]] = ()
    one_tensor: bool = False
    outer: Mapping[str, bool] = field(default_factory=dict)
    tied: bool = False
    names: Mapping[str, str] = field(default_factory=dict)


class Format(ABC):
    """One format: what it holds and who reads it, what it writes, and how it is read.

    Attributes:
        name: as recipes ask for it by `output.format`.
        automatic: whether it is written without being asked for.
        reads: what of it is read here, for people.
        files: further files of a folder, with their texts.
    """

    name: ClassVar[str]
    automatic: ClassVar[bool] = True
    reads: ClassVar[str] = ""
    files: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def obstacle(self, linears: Mapping[str, Operator], around: Around) -> str:
        """What of the linears it cannot hold, for people; empty where it holds all."""

    @abstractmethod
    def readers(self, linears: Mapping[str, Operator], around: Around) -> tuple[str, ...]:
        """Who reads linears that it holds: names that a test here runs, or whose own documentation says so."""

    def as_written(self, operator: Operator, dtype: torch.dtype = torch.float32) -> Operator:
        """What it holds of an operator where that is something else.

        Args:
            dtype: of plain weights.
        """
        return operator

    def tensors(self, operator: Operator) -> dict[str, Tensor]:
        """The stored tensors of a linear by suffix (`schemes.stored_name`)."""
        return operator.to_tensors()

    def operator_tensors(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inverse: tensors of a linear as its operator has them, of those that are stored; also on `meta`.

        Raises:
            KeyError, ValueError: one is missing, or they do not go together.
        """
        return dict(tensors)

    @abstractmethod
    def config(
        self, source: Mapping[str, Any], linears: Mapping[str, Operator], dense: Iterable[str], around: Around
    ) -> dict[str, Any]:
        """`config.json` of a folder.

        Args:
            source: that of the original model.
            linears: those that are rewritten.
            dense: names of the linears (and the embedding and head) that stay as they were.
        """

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether a folder with this `config.json` is its to read."""
        return False

    def schemes(self, path: Path, config: Mapping[str, Any], stored: Iterable[str]) -> Schemes:
        """The scheme of every compressed linear in a folder that it claims.

        Args:
            path: of the folder, for errors.
            stored: names of its tensors.

        Raises:
            ModelError: something in the config is not understood, so that weights might be read as others.
        """
        return {}

    def check(  # noqa: B027
        self, path: Path, schemes: Schemes, suffixes: Mapping[str, Iterable[str]], stored: Iterable[str]
    ) -> None:
        """Refuse tensors by which weights would be other than what is decoded.

        Args:
            suffixes: of the stored tensors of each compressed linear (`schemes.stored_name`).

        Raises:
            ModelError: there is one.
        """

    def original(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The original model's `config.json`, of a folder that it claims."""
        return dict(config)


def targets(linears: Mapping[str, Operator]) -> list[tuple[dict[str, Any], list[str]]]:
    """Every scheme once, and the linears that are stored by it."""
    found: Schemes = {}
    names: dict[str, list[str]] = {}
    for name, operator in linears.items():
        scheme = operator.scheme()
        found.setdefault(repr(scheme), scheme)
        names.setdefault(repr(scheme), []).append(name)
    return [(scheme, names[key]) for key, scheme in found.items()]
