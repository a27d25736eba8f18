"""What a format is: how a folder says to a reader in what form its linears lie there."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ModelError
from ..schemes import IntQuantized, Operator

OURS = ("compressor",)
VLLM_CPU, VLLM_GPU = "vLLM on CPUs", "vLLM on GPUs"
VLLM_GROUPS = (-1, 32, 64, 128)  # sizes of groups of integers that vLLM takes; -1: a row

HINT = "is not read here; decode the folder with the tool that wrote it"

ANY = object()  # a value of config.json that is read here, or of no consequence for what a folder decodes to

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
        untried: whether no engine but transformers was ever given a model of its family.
        rebuilt: whether transformers builds it with linears that have no weights of their own.
    """

    experts: frozenset[str] = frozenset()
    fused: Sequence[Sequence[str]] = ()
    one_tensor: bool = False
    outer: Mapping[str, bool] = field(default_factory=dict)
    tied: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    untried: bool = False
    rebuilt: bool = True


class Format(ABC):
    """A format that is read: how its folders are known, and what their linears are.

    Attributes:
        name: as `quant_method` of config.json has it.
        reads: what of it is read here, for people.
        shapes: how suffixes end of tensors whose values say what shape a linear has.
    """

    name: ClassVar[str]
    reads: ClassVar[str] = ""
    shapes: ClassVar[tuple[str, ...]] = ("weight_shape",)

    def operator_tensors(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors of a linear as its operator has them (`Operator.to_tensors`), of those that are stored; also on
        `meta`.

        Raises:
            KeyError, ValueError: one is missing, or they do not go together.
        """
        return dict(tensors)

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether a folder with this `config.json` is its to read."""
        return bool((config.get("quantization_config") or {}).get("quant_method") == self.name)

    @abstractmethod
    def schemes(self, path: Path, config: Mapping[str, Any], stored: Mapping[str, Any]) -> Schemes:
        """The scheme of every compressed linear in a folder that it claims.

        Args:
            path: of the folder, for errors.
            stored: its tensors by name, of which shape and dtype are known.

        Raises:
            ModelError: something in the config is not understood, so that weights might be read as others.
        """

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
        return {key: value for key, value in config.items() if key != "quantization_config"}


class WrittenFormat(Format):
    """A format that is written, too: what it holds and who reads it.

    Attributes:
        automatic: whether it is written without being asked for by `output.format` of a recipe.
        telling: whether people want to know why it was not.
        files: further files of a folder, with their texts.
    """

    automatic: ClassVar[bool] = True
    telling: ClassVar[bool] = True
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


def refuse_unknown(path: Path, found: Any, understood: Any, where: str = "quantization_config") -> None:
    """Refuse what may mean other weights, or another model around them, than would be decoded.

    Args:
        found: what config.json says; null and what is empty says nothing.
        understood: the values that it may have, or the same for each key of an object, `*` standing for any name; ANY
            is for what is of no consequence, or looked at elsewhere.
        where: the key.
    """
    if understood is ANY or found is None or found in ({}, []):
        return
    if isinstance(found, Mapping) and isinstance(understood, Mapping):
        for key, value in found.items():
            refuse_unknown(path, value, understood.get(key, understood.get("*", ())), f"{where}.{key}")
    elif isinstance(understood, Mapping) or found not in understood:
        raise ModelError(f"{path}/config.json: {where} is {reprlib.repr(found)}, which {HINT}")


def for_rows(scale: Tensor, rows: int) -> Tensor:
    """One scale for each of so many rows: `[rows, 1]`."""
    return scale.reshape(1, 1).expand(rows, 1).contiguous()


def targets(linears: Mapping[str, Operator]) -> list[tuple[dict[str, Any], list[str]]]:
    """Every scheme once, and the linears that are stored by it."""
    found: Schemes = {}
    names: dict[str, list[str]] = {}
    for name, operator in linears.items():
        scheme = operator.scheme()
        found.setdefault(repr(scheme), scheme)
        names.setdefault(repr(scheme), []).append(name)
    return [(scheme, names[key]) for key, scheme in found.items()]
